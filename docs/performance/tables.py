"""Write the tables of measured figures in the documentation, from the benchmarks' JSON beside this file.

    python docs/performance/tables.py --write     put the tables into the pages
    python docs/performance/tables.py --check     exit code 1 if a page has another table

A page holds `<!-- table: NAME -->`, the table, and `<!-- /table -->`. `peers.json` is what `tests/bench/vs_peers.py
--out` writes, `serving.json` what `tests/bench/serving.py --out` writes. `NAME_quality.json` has the last line that
`tests/bench/NAME_quality.py` prints, with date and command.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "docs" / "performance"), str(ROOT / "tests" / "bench")]

import figures  # noqa: E402  found by the line above
import serving_tables  # noqa: E402
from figures import LLAMAS, MACHINE, NATIVE, NATIVE_INT8, OPENVINO, PEERS, PORTABLE  # noqa: E402

from edgelm.models import decoder  # noqa: E402
from edgelm.quant import PRESETS  # noqa: E402
from edgelm.synth import PUBLISHED  # noqa: E402

PAGES = (
    ROOT / "README.md", ROOT / "docs" / "index.md", ROOT / "docs" / "guides" / "quantise.md",
    *sorted((ROOT / "docs" / "performance").glob("*.md")),
)  # fmt: skip
NAMES = {"olmoe": "OLMoE-1B-7B", "fox": "Fox-1-1.6B"}
COLUMNS = ("olmoe int4", "olmoe int8", "fox int4", "fox int8")
OTHERS = {"llama.cpp": LLAMAS, "openvino": (OPENVINO,), "portable": (PORTABLE,), "best": PEERS}
_BLOCK = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)

Cell = Callable[["Peers", str], str | None]
"""Text of one cell, from the measurements and a column's name; None where nothing was measured."""


class Peers:
    """One run of `vs_peers.py`. Ratios are medians of paired ratios, as the run has them."""

    def __init__(self, path: Path) -> None:
        self.document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        self.found = figures.Measurements(map(figures.Measurement.from_dict, self.document["measurements"]))

    def median(self, column: str, row: str, engines: Iterable[str], match: str | None = None) -> float | None:
        """Return the median of the first engine that was measured; of several llama.cpp's settings the fastest."""
        medians = [item.median for item in self.found.select(column, row, engines, match)]
        fastest = figures.UNITS[row] == "tokens/s" and set(engines) <= set(LLAMAS)
        return (max(medians) if fastest else medians[0]) if medians else None

    def ratio(self, column: str, row: str, ours: str, theirs: str) -> float | None:
        """Return ours over theirs.

        Of speeds it is the median of paired ratios. A run whose repetitions were not kept has these in `ratios`. Of
        anything else, and where one is missing there, it is the ratio of the medians.
        """
        recorded = self.document.get("ratios")
        if recorded is None and figures.UNITS[row] == "tokens/s":
            return figures.ratio(self.found, column, row, ours, OTHERS[theirs])
        wanted = {"column": column, "row": row, "ours": ours, "theirs": theirs}
        for record in recorded or ():
            if wanted.items() <= record.items():
                return float(record["value"])
        other = self.median(column, row, OTHERS[theirs])
        match = next((item.match for item in self.found.select(column, row, OTHERS[theirs])), None)
        own = self.median(column, row, [ours], match)
        return own / other if own and other else None

    def share(self, column: str, bandwidth: str) -> float | None:
        """Return the part of the bandwidth that the bytes of decoding take."""
        for record in self.document.get("ratios", ()):
            if (record["column"], record["theirs"]) == (column, bandwidth):
                return float(record["value"])
        return figures.share(self.found, column, NATIVE, bandwidth)

    def batch(self, column: str) -> float | None:
        """Return the tokens/s of eight sequences over those of one."""
        for record in self.document.get("ratios", ()):
            if (record["column"], record["row"]) == (column, figures.BATCH):
                return float(record["value"])
        pairs = zip(
            self.found.select(column, figures.BATCH), self.found.select(column, figures.BATCH_ONE), strict=False
        )
        return next((statistics.median(figures.paired(eight, one)) for eight, one in pairs), None)


def number(value: float | None, unit: str) -> str | None:
    """Return the value with three digits, GB from bytes."""
    if value is None:
        return None
    if unit == "GB" or unit == "GB/s":
        value /= 1e9
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def measured(row: str, *engines: str, match: str | None = None) -> Cell:
    """Make the cell that shows the median of the first of these engines."""
    return lambda peers, column: number(peers.median(column, row, engines, match), figures.UNITS[row])


def times(row: str, ours: str, theirs: str) -> Cell:
    """Make the cell that shows ours over theirs."""

    def cell(peers: Peers, column: str) -> str | None:
        value = peers.ratio(column, row, ours, theirs)
        return None if value is None else f"**{value:.2f}**"

    return cell


def percent(bandwidth: str) -> Cell:
    """Make the cell that shows the share of a bandwidth."""

    def cell(peers: Peers, column: str) -> str | None:
        value = peers.share(column, bandwidth)
        return None if value is None else f"{100 * value:.0f} %"

    return cell


def batch(peers: Peers, column: str) -> str | None:
    """Show how many times the tokens/s of one sequence eight have."""
    value = peers.batch(column)
    return None if value is None else f"**{value:.2f}**"


@dataclass(frozen=True)
class Table:
    """Models in columns, engines and ratios in rows."""

    head: str
    rows: Sequence[tuple[str, Cell]]

    def lines(self, peers: Peers) -> list[str]:
        """Columns and rows without a figure are left out."""
        cells = {column: [cell(peers, column) for _, cell in self.rows] for column in COLUMNS}
        used = [column for column in COLUMNS if any(cells[column])]
        lines = [_row(self.head, *map(model_name, used)), "|---" * (1 + len(used)) + "|"]
        for number, (label, _) in enumerate(self.rows):
            texts = [cells[column][number] for column in used]
            if any(texts):
                lines.append(_row(label, *(text or "" for text in texts)))
        return lines


def model_name(column: str) -> str:
    """Make "OLMoE-1B-7B int4" of "olmoe int4"."""
    name, recipe = column.split()
    return f"{NAMES.get(name, name)} {recipe}"


def spread(peers: Peers) -> list[str]:
    """Least and greatest of every figure that was repeated."""
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for item in peers.found.all:
        unit = figures.UNITS[item.row]
        low, high = (number(value, unit) for value in (min(item.values), max(item.values)))
        if len(item.values) > 1 and low != high:
            rows.setdefault((item.row, item.engine, item.match), {})[item.column] = f"{low} to {high}"
    lines = [_row("figure, engine", *map(model_name, COLUMNS)), "|---" * (1 + len(COLUMNS)) + "|"]
    for (row, engine, match), cells in rows.items():
        beside = f", beside {match}" if engine == NATIVE and match in ("openvino", "portable") else ""
        engine = "" if engine == MACHINE else f", {LABELS.get(engine, engine)}"
        label = f"{row}, {figures.UNITS[row]}{engine}{beside}"
        lines.append(_row(label, *(cells.get(column, "") for column in COLUMNS)))
    return lines


def measured_with(peers: Peers) -> str:
    """When, on what and with which versions."""
    names = {**dict.fromkeys(LLAMAS, "llama-cpp-python"), OPENVINO: "OpenVINO GenAI"}
    found = {names.get(engine, "EdgeLM"): version for engine, version in peers.document["versions"].items()}
    versions = ", ".join(f"{name} {version}" for name, version in found.items())
    return (
        f"Measured {peers.document['date']} on {peers.document['cpu']}, {peers.document['threads']} threads, with "
        f"{versions}."
    )


def headline(peers: Peers) -> list[str]:
    """Both models in int4 beside llama.cpp, one figure per row."""
    lines = [_row("", "EdgeLM", "llama.cpp", "ratio"), "|---|---:|---:|---:|"]
    for column in ("olmoe int4", "fox int4"):
        for row, label in ((figures.DECODE, "decode"), (figures.PREFILL, "prefill of 512")):
            cells = [measured(row, *engines)(peers, column) for engines in ([NATIVE], LLAMAS)]
            value = peers.ratio(column, row, NATIVE, "llama.cpp")
            if all(cells) and value is not None:
                name = NAMES[column.split()[0]]
                lines.append(_row(f"{name}: {label}, tokens/s", *(cell or "" for cell in cells), f"{value:.2f}"))
    return lines


def schemes(document: dict[str, Any], model: str) -> list[str]:
    """What each way to quantise loses."""
    lines = [_row(model, "MB per token", "KL", "top-1"), "|---|---|---|---|"]
    lines += [
        _row(line["name"], f"{line['megabytes']:.0f}", kl(line["kl"]), f"{100 * line['top1']:.1f} %")
        for line in document[model]
    ]
    return lines


def both_models(document: dict[str, Any], head: str, wanted: Callable[[str], bool]) -> list[str]:
    """KL and top-1 of both tiny models, of the lines whose name is wanted."""
    lines = [_row(head, "olmoe-tiny, KL", "top-1", "fox-tiny, KL", "top-1"), "|---|---|---|---|---|"]
    chosen = [[line for line in document[model] if wanted(line["name"])] for model in ("olmoe-tiny", "fox-tiny")]
    for line, other in zip(*chosen, strict=True):
        assert line["name"] == other["name"]
        cells = [text for item in (line, other) for text in (kl(item["kl"]), f"{100 * item['top1']:.1f} %")]
        lines.append(_row(line["name"], *cells))
    return lines


def sizes() -> list[str]:
    """GB of the published models' matrices under each preset: of bf16 checkpoints, scales included."""
    presets = ("none", "int8", "fp8", "int4")
    lines = [_row("GB", "bf16", *presets[1:]), "|---|---|---|---|---|"]
    for name, config in PUBLISHED.items():
        model = decoder(config)
        totals = []
        for preset in presets:
            recipe = PRESETS[preset].for_model(model)
            total = 0.0
            for matrix in model.matrices.values():
                scheme = recipe.scheme_for(matrix.name, (matrix.rows, matrix.columns))
                bits = 16.0 if scheme is None else scheme.bits_per_weight(matrix.columns)
                total += matrix.rows * matrix.columns * bits / 8
            totals.append(total)
        lines.append(_row(name, *(number(total, "GB") or "" for total in totals)))
    return lines


def mixed(document: dict[str, Any]) -> list[str]:
    """KL of each uniform scheme, and of what is chosen at the same bytes."""
    lines = [_row("uniform scheme", "olmoe-tiny, KL", "chosen", "fox-tiny, KL", "chosen"), "|---|---|---|---|---|"]
    for line, other in zip(document["olmoe-tiny"], document["fox-tiny"], strict=True):
        assert line["uniform"] == other["uniform"]
        cells = [
            text
            for item in (line, other)
            for text in (kl(item["kl"]), f"{kl(item['each'])} ({item['each'] / item['kl']:.2f})")
        ]
        lines.append(_row(line["uniform"], *cells))
    return lines


def kl(value: float) -> str:
    """Return 6.15e-4 of 0.000615."""
    digits, exponent = f"{value:.2e}".split("e")
    return f"{digits}e{int(exponent)}"


def _row(*cells: str) -> str:
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)


LABELS = {NATIVE: "EdgeLM", NATIVE_INT8: "EdgeLM with an int8 cache", PORTABLE: "EdgeLM, portable operators"} | {
    OPENVINO: "OpenVINO GenAI", **{name: name.replace("llama.cpp ", "llama.cpp, ") for name in LLAMAS}
}  # fmt: skip


def _beside(row: str, *, int8_cache: bool = True) -> list[tuple[str, Cell]]:
    cache = [("EdgeLM, int8 cache", measured(row, NATIVE_INT8))] if int8_cache else []
    return [
        ("EdgeLM", measured(row, NATIVE)), *cache, ("llama.cpp", measured(row, *LLAMAS)),
        ("OpenVINO GenAI", measured(row, OPENVINO)),
    ]  # fmt: skip


TABLES = {
    "decode": Table(
        "tokens/s",
        [
            ("EdgeLM", measured(figures.DECODE, NATIVE)),
            ("llama.cpp", measured(figures.DECODE, *LLAMAS)),
            ("EdgeLM / llama.cpp", times(figures.DECODE, NATIVE, "llama.cpp")),
            ("OpenVINO GenAI", measured(figures.DECODE, OPENVINO)),
            ("EdgeLM in the same minutes", measured(figures.DECODE, NATIVE, match="openvino")),
            ("EdgeLM / OpenVINO GenAI", times(figures.DECODE, NATIVE, "openvino")),
        ],
    ),
    "long-decode": Table(
        "tokens/s",
        [
            *_beside(figures.LONG_DECODE),
            ("EdgeLM, int8 cache / fastest other", times(figures.LONG_DECODE, NATIVE_INT8, "best")),
        ],
    ),
    "prefill": Table(
        "tokens/s",
        [
            *_beside(figures.PREFILL),
            ("EdgeLM / llama.cpp", times(figures.PREFILL, NATIVE, "llama.cpp")),
            ("EdgeLM / OpenVINO GenAI", times(figures.PREFILL, NATIVE, "openvino")),
        ],
    ),
    "long-prefill": Table(
        "tokens/s",
        [
            *_beside(figures.LONG_PREFILL),
            ("EdgeLM / fastest other", times(figures.LONG_PREFILL, NATIVE, "best")),
            ("EdgeLM, int8 cache / fastest other", times(figures.LONG_PREFILL, NATIVE_INT8, "best")),
        ],
    ),
    "batch": Table(
        "tokens/s, all sequences",
        [
            ("8 sequences", measured(figures.BATCH, NATIVE)),
            ("1 sequence, in the same minute", measured(figures.BATCH_ONE, NATIVE)),
            ("8 / 1", batch),
        ],
    ),
    "load": Table(
        "seconds",
        [
            *_beside(figures.FIRST, int8_cache=False),
            ("EdgeLM, Python's imports included", measured(figures.FIRST_IMPORTED, NATIVE)),
        ],
    ),
    "memory": Table(
        "GB",
        [
            *_beside(figures.RESIDENT, int8_cache=False),
            ("EdgeLM / llama.cpp", times(figures.RESIDENT, NATIVE, "llama.cpp")),
            ("EdgeLM / (weights touched + cache)", measured(figures.MEMORY, NATIVE)),
        ],
    ),
    "portable": Table(
        "",
        [
            ("prefill of 512, tokens/s", measured(figures.PREFILL, PORTABLE)),
            ("native / portable", times(figures.PREFILL, NATIVE, "portable")),
            ("decode, tokens/s", measured(figures.DECODE, PORTABLE)),
            ("native in the same minutes", measured(figures.DECODE, NATIVE, match="portable")),
            ("native / portable", times(figures.DECODE, NATIVE, "portable")),
            ("load to first token, s", measured(figures.FIRST, PORTABLE)),
            ("memory in use, GB", measured(figures.RESIDENT, PORTABLE)),
        ],
    ),
    "bandwidth": Table(
        "",
        [
            ("bytes per token, EdgeLM, GB", measured(figures.BYTES, NATIVE)),
            ("bytes per token, llama.cpp, GB", measured(figures.BYTES, *LLAMAS)),
            ("bandwidth of a mapped file, GB/s", measured(figures.MAPPED, MACHINE)),
            ("EdgeLM's share of it", percent(figures.MAPPED)),
            ("bandwidth of anonymous memory, GB/s", measured(figures.ANONYMOUS, MACHINE)),
            ("EdgeLM's share of it", percent(figures.ANONYMOUS)),
        ],
    ),
}
"""Tables of `peers.json`, by name; `spread` and `headline` are made of it too."""


ACTIVATIONS = {
    "activations": (
        "weights, activations",
        lambda name: not any(word in name for word in ("cache", "smoothed", "scaled", "int8-row")),
    ),
    "smoothing": (
        "weights, activations",
        lambda name: name.startswith("int8-row") or any(word in name for word in ("smoothed", "scaled")),
    ),
    "caches": ("weights, cache, one scale for each", lambda name: "cache" in name),
}
"""Tables of `activation_quality.json`: the first column's head, and which lines they have."""


def table(name: str, folder: Path) -> list[str]:
    """Return the lines of a table.

    Raises:
        ValueError: there is no such table.
    """
    peers = Peers(folder / "peers.json")
    if name in TABLES:
        return TABLES[name].lines(peers)
    if name in ("spread", "headline"):
        return spread(peers) if name == "spread" else headline(peers)
    if name == "measured":
        return textwrap.wrap(measured_with(peers), 120)
    if name == "sizes":
        return sizes()
    if name == "mixed":
        return mixed(json.loads((folder / "mixed_precision_quality.json").read_text(encoding="utf-8")))
    if name in ACTIVATIONS:
        return both_models(
            json.loads((folder / "activation_quality.json").read_text(encoding="utf-8")), *ACTIVATIONS[name]
        )
    if name.startswith("serving-"):
        return serving_tables.serving(
            json.loads((folder / "serving.json").read_text(encoding="utf-8")), name.removeprefix("serving-")
        )
    if name == "presets" or name.startswith("schemes-"):
        document = json.loads((folder / "quantize_quality.json").read_text(encoding="utf-8"))
        if name == "presets":
            return both_models(document, "preset", lambda line: ": " in line)
        return schemes(document, name[8:] + "-tiny")
    raise ValueError(f"there is no table {name!r}")


def rewrite(text: str, folder: Path) -> str:
    """Return a page's text with its tables made anew from the JSON files in the folder."""
    return _BLOCK.sub(lambda found: f"{found[1]}{chr(10).join(table(found['name'], folder))}\n{found[3]}", text)


def main() -> int:
    """Write or check the tables of all pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", action="store_true")
    what.add_argument("--check", action="store_true")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent, help="folder of the JSON files")
    options = parser.parse_args()
    wrong = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        new = rewrite(text, options.json)
        if new != text:
            wrong.append(page)
            if options.write:
                page.write_text(new, encoding="utf-8")
    for page in wrong:
        print(f"{page.relative_to(ROOT)}: {'written' if options.write else 'its tables are not those of the JSON'}")
    return 1 if wrong and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
