"""The tables of `serving.md`, from `serving.json`: what `tests/bench/serving.py --out` writes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "bench"))

from serving_load import Round, ratios
from serving_servers import LLAMA, OURS

NAMES = {OURS: "EdgeLM", LLAMA: "llama.cpp"}
WORKLOADS = ("distinct", "shared")
FIGURES = ("tokens", "first", "between", "spread")


def rounds_of(document: dict[str, Any], model: str, workload: str) -> dict[int, list[Round]]:
    """Return the rounds of one model and workload by the number of clients."""
    found: dict[int, list[Round]] = {}
    for record in document["rounds"]:
        item = Round(**record)
        if (item.column, item.workload) == (f"{model} int4", workload):
            found.setdefault(item.clients, []).append(item)
    return dict(sorted(found.items()))


def _of(rounds: Sequence[Round], engine: str, field: str) -> list[float]:
    return [getattr(item, field) for item in rounds if item.engine == engine]


def _ratio(rounds: Sequence[Round], field: str) -> str:
    values = ratios(rounds, field, OURS, LLAMA)
    return f"**{median(values):.2f}**" if values else ""


def _tokens(rounds: Sequence[Round]) -> list[str]:
    return [*(f"{median(_of(rounds, engine, 'rate')):.1f}" for engine in NAMES), _ratio(rounds, "rate")]


def _times(rounds: Sequence[Round], fields: Sequence[str], scale: float, digits: int) -> list[str]:
    cells = [f"{scale * median(_of(rounds, engine, field)):,.{digits}f}" for field in fields for engine in NAMES]
    return [*cells, _ratio(rounds, fields[-1])]


def _spread(rounds: Sequence[Round]) -> list[str]:
    cells = []
    for field, scale, digits in (("rate", 1, 1), ("gap99", 1000, 0)):
        for engine in NAMES:
            values = [scale * value for value in _of(rounds, engine, field)]
            cells.append(f"{min(values):,.{digits}f} to {max(values):,.{digits}f}")
    return cells


def serving(document: dict[str, Any], name: str) -> list[str]:
    """Return a table, `FIGURE-MODEL-WORKLOAD`: one of `FIGURES`, `olmoe` or `fox`, one of `WORKLOADS`.

    Raises:
        ValueError: there is no such table.
    """
    figure, _, rest = name.partition("-")
    model, _, workload = rest.partition("-")
    rounds = rounds_of(document, model, workload)
    if figure not in FIGURES or not rounds:
        raise ValueError(f"there is no table 'serving-{name}'")
    both = [NAMES[OURS], NAMES[LLAMA]]
    ratio = f"{both[0]} / {both[1]}"
    if figure == "tokens":
        head = [*both, ratio]
    elif figure == "spread":
        head = [f"{what}, {engine}" for what in ("tokens/s", "ms between tokens, p99") for engine in both]
    else:
        head = [f"{part}, {engine}" for part in ("p50", "p99") for engine in both] + [f"p99, {ratio}"]
    unit = {"tokens": "tokens/s", "first": "s to the first token", "between": "ms between tokens", "spread": "clients"}
    lines = ["| " + " | ".join([unit[figure], *head]) + " |", "|---" * (len(head) + 1) + "|"]
    for clients, mine in rounds.items():
        if figure == "tokens":
            cells = _tokens(mine)
        elif figure == "first":
            cells = _times(mine, ("first50", "first99"), 1, 1)
        elif figure == "between":
            cells = _times(mine, ("gap50", "gap99"), 1000, 0)
        else:
            cells = _spread(mine)
        label = f"{clients} client{'s' if clients > 1 else ''}"
        lines.append("| " + " | ".join([label, *cells]) + " |")
    return lines
