"""Evaluation of the benchmark's measurements: medians, paired ratios, and the table of targets.

A measurement has the values of one engine in one row, one per repetition, in order. Engines that were measured in turn
share a `match`. Values are paired only within a match, since the machine's speed drifts.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

NATIVE = "native"
NATIVE_INT8 = "native, int8 cache"
PORTABLE = "portable"
LLAMA = "llama.cpp fa"
LLAMA_PLAIN = "llama.cpp no fa"
LLAMA_Q8 = "llama.cpp fa, q8_0 cache"
OPENVINO = "openvino"
MACHINE = "machine"
LLAMAS = (LLAMA, LLAMA_PLAIN, LLAMA_Q8)
PEERS = (*LLAMAS, OPENVINO)

PREFILL, LONG_PREFILL = "prefill", "long prefill"
DECODE, LONG_DECODE = "decode", "long decode"
BATCH, BATCH_ONE = "batch 8", "batch 1"
FIRST, FIRST_IMPORTED, FIRST_SPAWNED = "first token", "first token, imports too", "first token, from a new process"
RESIDENT, WEIGHTS, CACHE, MEMORY = "resident", "weights touched", "cache", "resident over needed"
ANONYMOUS, MAPPED = "bandwidth, anonymous", "bandwidth, mapped file"
BYTES = "bytes per token"
UNITS = {
    **dict.fromkeys((PREFILL, LONG_PREFILL, DECODE, LONG_DECODE, BATCH, BATCH_ONE), "tokens/s"),
    **dict.fromkeys((FIRST, FIRST_IMPORTED, FIRST_SPAWNED), "s"),
    **dict.fromkeys((RESIDENT, WEIGHTS, CACHE), "GB"),
    MEMORY: "x",
    **dict.fromkeys((ANONYMOUS, MAPPED), "GB/s"),
    BYTES: "GB",
}

COLUMNS = ("olmoe int4", "fox int4", "olmoe int8", "fox int8")


@dataclass(frozen=True)
class Measurement:
    """One engine's values in one row; `column` is the checkpoint's name and the recipe, for example "olmoe int4"."""

    column: str
    match: str
    row: str
    engine: str
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median of the values, of which there is at least one."""
        return statistics.median(self.values)

    def as_dict(self) -> dict[str, object]:
        """Return the fields as JSON-ready values."""
        return {**asdict(self), "unit": UNITS[self.row], "median": self.median}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Measurement:
        """Read the result of `as_dict`."""
        return cls(
            record["column"], record["match"], record["row"], record["engine"], tuple(map(float, record["values"]))
        )


class Measurements:
    """All measurements of a run."""

    def __init__(self, found: Iterable[Measurement] = ()) -> None:
        self.all = list(found)

    def add(self, column: str, match: str, row: str, engine: str, values: Sequence[float]) -> None:
        """Add the values of a measurement; nothing is added if there are none."""
        if values:
            self.all.append(Measurement(column, match, row, engine, tuple(values)))

    def extend(self, earlier: Iterable[Measurement]) -> None:
        """Append the measurements of earlier runs; of each row in a match only the latest run's are kept."""
        known = {(item.column, item.match, item.row) for item in self.all}
        self.all += [item for item in earlier if (item.column, item.match, item.row) not in known]

    def select(
        self, column: str, row: str, engines: Iterable[str] | None = None, match: str | None = None
    ) -> list[Measurement]:
        """Return the matching measurements in the order in which they were added."""
        wanted = None if engines is None else set(engines)
        return [
            item
            for item in self.all
            if item.column == column
            and item.row == row
            and (wanted is None or item.engine in wanted)
            and (match is None or item.match == match)
        ]

    @property
    def columns(self) -> list[str]:
        """Return the columns: first those with targets, then the others in order of appearance."""
        found = dict.fromkeys(item.column for item in self.all)
        return [*(name for name in COLUMNS if name in found), *(name for name in found if name not in COLUMNS)]


def paired(ours: Measurement, theirs: Measurement) -> list[float]:
    """Return the ratio ours / theirs of each repetition.

    Raises:
        ValueError: they were not measured in turn, or their numbers of repetitions differ.
    """
    if ours.match != theirs.match or len(ours.values) != len(theirs.values):
        raise ValueError(f"{ours.engine} and {theirs.engine} were not measured in turns: {ours} and {theirs}")
    return [a / b for a, b in zip(ours.values, theirs.values, strict=True)]


def ratio(found: Measurements, column: str, row: str, ours: str, theirs: Iterable[str]) -> float | None:
    """Return the smallest median of the paired ratios over the engines `theirs`; None without a pair."""
    ratios = []
    for other in found.select(column, row, theirs):
        ratios += [
            statistics.median(paired(own, other)) for own in found.select(column, row, [ours], match=other.match)
        ]
    return min(ratios, default=None)


def share(found: Measurements, column: str, engine: str, bandwidth: str = ANONYMOUS) -> float | None:
    """Return the median over all matches of the fraction of the bandwidth that decoding uses."""
    parts: list[float] = []
    for rate in found.select(column, DECODE, [engine]):
        moved = found.select(column, BYTES, [engine])
        limit = found.select(column, bandwidth, [MACHINE], match=rate.match)
        if moved and limit:
            parts += [moved[0].median * value for value in paired(rate, limit[0])]
    return statistics.median(parts) if parts else None


def _least(found: Measurements, column: str, row: str) -> float | None:
    medians = [item.median for item in found.select(column, row, [NATIVE])]
    return min(medians, default=None)


Figure = Callable[[Measurements, str], float | None]


@dataclass(frozen=True)
class Target:
    """A figure and its target, a lower or an upper bound, per column (checkpoint and recipe)."""

    name: str
    figure: Figure
    bounds: dict[str, float]
    at_most: bool = False
    percent: bool = False

    def text(self, value: float) -> str:
        """Format a value for the table."""
        return f"{100 * value:.0f} %" if self.percent else f"{value:.2f}"

    def reached(self, column: str, value: float) -> bool | None:
        """Return whether a value reaches the target; None where there is none."""
        bound = self.bounds.get(column)
        if bound is None:
            return None
        return value <= bound if self.at_most else value >= bound


def _per_column(olmoe4: float | None, fox4: float | None, olmoe8: float | None, fox8: float | None) -> dict[str, float]:
    bounds = zip(COLUMNS, (olmoe4, fox4, olmoe8, fox8), strict=True)
    return {column: bound for column, bound in bounds if bound is not None}


def _against(row: str, ours: str, *theirs: str) -> Figure:
    return lambda found, column: ratio(found, column, row, ours, theirs)


def _batch(found: Measurements, column: str) -> float | None:
    for eight in found.select(column, BATCH, [NATIVE]):
        for one in found.select(column, BATCH_ONE, [NATIVE], match=eight.match):
            return statistics.median(paired(eight, one))
    return None


TARGETS = (
    Target("prefill vs llama.cpp, x", _against(PREFILL, NATIVE, *LLAMAS), _per_column(4.5, 2.2, 6, 3.8)),
    Target("prefill vs portable, x", _against(PREFILL, NATIVE, PORTABLE), _per_column(2.4, 2.5, 2.2, 2.1)),
    Target("prefill vs OpenVINO, x", _against(PREFILL, NATIVE, OPENVINO), _per_column(None, 1.1, None, 1.1)),
    Target("long prefill vs the best peer, x", _against(LONG_PREFILL, NATIVE, *PEERS), _per_column(4, 1.2, None, None)),
    Target("decode vs the best peer, x", _against(DECODE, NATIVE, *PEERS), _per_column(1.05, 1.15, 1.1, 1.0)),
    Target("bytes per token vs llama.cpp, x", _against(BYTES, NATIVE, *LLAMAS), _per_column(1, 1, 1, 1), at_most=True),
    Target(
        "decode, share of the bandwidth",
        lambda found, column: share(found, column, NATIVE),
        _per_column(0.92, 0.92, 0.92, 0.92),
        percent=True,
    ),
    Target(
        "decode, share of a mapped file's",
        lambda found, column: share(found, column, NATIVE, MAPPED),
        {},
        percent=True,
    ),
    Target(
        "decode after the long prompt vs the best peer, x",
        _against(LONG_DECODE, NATIVE_INT8, *PEERS),
        _per_column(2.2, 1.8, None, None),
    ),
    Target("batch 8 decode over batch 1, x", _batch, _per_column(2, 5, None, None)),
    Target(
        "load to first token, s",
        lambda found, column: _least(found, column, FIRST),
        _per_column(1, 1, 1, 1),
        at_most=True,
    ),
    Target("the same with imports, s", lambda found, column: _least(found, column, FIRST_IMPORTED), {}, at_most=True),
    Target(
        "resident over needed, x",
        lambda found, column: _least(found, column, MEMORY),
        _per_column(1.08, 1.08, 1.08, 1.08),
        at_most=True,
    ),
)


def target_records(found: Measurements) -> list[dict[str, object]]:
    """Return a record for each target and column with a figure."""
    records: list[dict[str, object]] = []
    for target in TARGETS:
        for column in found.columns:
            value = target.figure(found, column)
            if value is not None:
                records.append(
                    {
                        "target": target.name,
                        "column": column,
                        "value": value,
                        "bound": target.bounds.get(column),
                        "reached": target.reached(column, value),
                    }
                )
    return records


def target_table(found: Measurements) -> str:
    """Return a Markdown table with the figure of each target, its bound, and whether it is reached, per column."""
    lines = ["| | " + " | ".join(found.columns) + " |", "|---" * (len(found.columns) + 1) + "|"]
    for target in TARGETS:
        cells = []
        for column in found.columns:
            value, bound = target.figure(found, column), target.bounds.get(column)
            sign = "<=" if target.at_most else ">="
            if value is None:
                cells.append("not measured" if bound is not None else "")
            elif bound is None:
                cells.append(target.text(value))
            else:
                word = "reached" if target.reached(column, value) else "not reached"
                cells.append(f"{target.text(value)} ({sign} {target.text(bound)}) {word}")
        if any(cells):
            lines.append(f"| {target.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def row_table(found: Measurements, column: str) -> str:
    """Return a table with the median and spread of every measurement, and the ratios of ours to other engines."""
    lines = []
    for item in (item for item in found.all if item.column == column):
        scale = 1e9 if UNITS[item.row].startswith("GB") else 1.0
        low, high = min(item.values) / scale, max(item.values) / scale
        text = f"  {item.row:<32}{item.engine:<26}{item.median / scale:9.2f} {UNITS[item.row]:<9}"
        text += f"({low:.2f} .. {high:.2f})" if len(item.values) > 1 else ""
        if item.engine in (PORTABLE, *PEERS) and UNITS[item.row] == "tokens/s":
            for ours in found.select(column, item.row, [NATIVE, NATIVE_INT8], match=item.match):
                ratios = paired(ours, item)
                text += f"  {ours.engine}: {statistics.median(ratios):.2f}x ({min(ratios):.2f} .. {max(ratios):.2f})"
        lines.append(text)
    return "\n".join(lines)


@dataclass(frozen=True)
class Agreement:
    """Comparison of another engine's logits [positions, vocabulary] with ours.

    Attributes:
        error: root mean square of the differences, relative to the standard deviation of ours.
        kl: mean KL(ours || theirs) in nats.
        same: positions with the same most likely token.
    """

    engine: str
    error: float
    correlation: float
    kl: float
    same: int
    positions: int

    def __str__(self) -> str:
        return (
            f"{self.engine}: error {self.error:.3f} of the logits' spread, correlation {self.correlation:.4f}, "
            f"KL {self.kl:.2e} nats, same token at {self.same} of {self.positions} positions"
        )


def agreement(engine: str, ours: np.ndarray, theirs: np.ndarray) -> Agreement:
    """Compare logits; error and correlation are those of the worst position.

    Raises:
        ValueError: the shapes differ, or logits are not finite.
    """
    if ours.shape != theirs.shape or not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        raise ValueError(f"{engine}: logits {theirs.shape} beside our {ours.shape}, or some are not finite")
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    spread = np.sqrt(np.mean((ours - ours.mean(axis=1, keepdims=True)) ** 2, axis=1))
    error = np.sqrt(np.mean((ours - theirs) ** 2, axis=1)) / spread
    mine, other = _log_softmax(ours), _log_softmax(theirs)
    return Agreement(
        engine=engine,
        error=float(error.max()),
        correlation=min(float(np.corrcoef(a, b)[0, 1]) for a, b in zip(ours, theirs, strict=True)),
        kl=float(np.mean(np.sum(np.exp(mine) * (mine - other), axis=1))),
        same=int(np.sum(ours.argmax(axis=1) == theirs.argmax(axis=1))),
        positions=len(ours),
    )


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=1, keepdims=True)
    logs: np.ndarray = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    return logs
