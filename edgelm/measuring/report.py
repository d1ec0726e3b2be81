"""Render benchmarks as one HTML page, with the template `bench.html.j2` of `edgelm.pages`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from edgelm.benchmark import BenchResult, Spread
from edgelm.measuring.matrix import Matrix
from edgelm.pages.bars import Bar, bar_chart
from edgelm.pages.charts import STYLES, Series, line_chart
from edgelm.pages.frame import Figure
from edgelm.pages.numbers import number, size_label
from edgelm.pages.page import render as render_page
from edgelm.pages.page import write_page
from edgelm.sizes import format_number, format_size

_PARTS: dict[str, Callable[[BenchResult], str]] = {
    "runtime": lambda result: result.runtime,
    "ops": lambda result: f"{result.ops} operators",
    "threads": lambda result: "1 thread" if result.threads == 1 else f"{result.threads} threads",
    "kv": lambda result: f"{result.kv} cache",
    "batch": lambda result: f"batch {result.batch}",
}


def write_report(matrix: Matrix, path: Path) -> None:
    """Write the benchmarks to `path`; raises as `write_page`."""
    write_page(render(matrix), path)


def render(matrix: Matrix) -> str:
    """Return the benchmarks as an HTML document."""
    results = matrix.results
    names = labels(results)
    return render_page(
        "bench.html.j2",
        matrix=matrix,
        answer=answer(matrix),
        rows=list(zip(labels(results, lengths=False), results, strict=True)),
        fixed=shared(results),
        charts=_charts(results, names),
        device={**results[0].device.as_dict(), "measured with": results[0].made_by, "date": results[0].created},
        energy=next((result.energy_problem for result in results if result.energy is None), None),
        load=results[-1].load_average,
        spread=spread_text,
    )


def answer(matrix: Matrix) -> str:
    """Return the result in one sentence."""
    results = matrix.results
    names = labels(results)
    if len(results) == 1:
        decode, prefill = results[0].decode_tokens_per_second.median, results[0].prefill_tokens_per_second.median
        return (
            f"This device generates {format_number(decode)} tokens/s, after reading the prompt at "
            f"{format_number(prefill)} tokens/s."
        )
    best = max(range(len(results)), key=lambda i: results[i].decode_tokens_per_second.median)
    rate = format_number(results[best].decode_tokens_per_second.median)
    return f"Of {len(results)} combinations, {names[best]} generates most: {rate} tokens/s."


def varying(results: Sequence[BenchResult]) -> list[str]:
    """Return the settings that are not the same in all results."""
    return [name for name, text in _PARTS.items() if len({text(result) for result in results}) > 1]


def shared(results: Sequence[BenchResult]) -> str:
    """Return the settings that all results have, in words."""
    return ", ".join(text(results[0]) for name, text in _PARTS.items() if name not in varying(results))


def bundle_names(results: Sequence[BenchResult]) -> list[str]:
    """Return a short name for the bundle of each result: its folder's, or its path where two folders have one name."""
    paths = list(dict.fromkeys(result.bundle for result in results))
    names = [Path(path).name for path in paths]
    short = {path: name if names.count(name) == 1 else path for path, name in zip(paths, names, strict=True)}
    return [short[result.bundle] for result in results]


def labels(results: Sequence[BenchResult], *, lengths: bool = True) -> list[str]:
    """Return a name for each result: its bundle, and the settings that are not the same in all."""
    parts = varying(results)
    tokens = lengths and len({result.prompt_tokens for result in results}) > 1
    found = []
    for name, result in zip(bundle_names(results), results, strict=True):
        more = [_PARTS[part](result) for part in parts]
        more += [f"prompt {result.prompt_tokens:,}"] if tokens else []
        found.append(", ".join([name, *more]))
    return found


def spread_text(spread: Spread) -> str:
    """Format the median, and half the distance of the extreme runs in percent of it."""
    half = 50 * (spread.high - spread.low) / spread.median if spread.median else 0.0
    return f"{format_number(spread.median)} ± {half:.0f} %"


def _prefill(result: BenchResult) -> Spread:
    return result.prefill_tokens_per_second


def _decode(result: BenchResult) -> Spread:
    return result.decode_tokens_per_second


def _charts(results: Sequence[BenchResult], names: Sequence[str]) -> list[Figure | None]:
    charts = _curves(results)
    for title, get in (("Prefill", _prefill), ("Decode", _decode)):
        bars = [
            Bar(name, get(result).median, spread_text(get(result))) for name, result in zip(names, results, strict=True)
        ]
        charts.append(bar_chart(f"{title}, tokens/s", bars, x_label="tokens/s; higher is better"))
    charts.append(_one_for_each_load(results))
    energy = [
        Bar(name, result.energy.decode_joules_per_token.median,
            f"{number(result.energy.decode_joules_per_token.median, 3)} J")
        for name, result in zip(names, results, strict=True) if result.energy is not None
    ]  # fmt: skip
    charts.append(bar_chart("Energy of decode", energy, x_label="joules per token; lower is better"))
    return charts


def _one_for_each_load(results: Sequence[BenchResult]) -> Figure | None:
    """Return the chart of memory: one bar for all lengths of a loaded model."""
    found = dict(zip(labels(results, lengths=False), results, strict=True))
    bars = [
        Bar(name, None if memory is None else float(memory), format_size(memory))
        for name, result in found.items()
        for memory in (result.resident_after_run,)
    ]
    return bar_chart("Memory after the runs", bars, x_label="resident memory; lower is better", tick=size_label)


def _curves(results: Sequence[BenchResult]) -> list[Figure | None]:
    """Return the speed over the length of the prompt, for models that were measured with several lengths."""
    found: dict[str, list[BenchResult]] = {}
    for name, result in zip(labels(results, lengths=False), results, strict=True):
        found.setdefault(name, []).append(result)
    curves = {name: sorted(ones, key=lambda one: one.prompt_tokens) for name, ones in found.items() if len(ones) > 1}
    charts: list[Figure | None] = []
    for title, get in (
        ("Prefill by length of the prompt", _prefill),
        ("Decode after a prompt of this length", _decode),
    ):
        for start in range(0, len(curves), STYLES):
            part = list(curves.items())[start : start + STYLES]
            series = [
                Series(name, style, [one.prompt_tokens for one in ones], [get(one).median for one in ones])
                for style, (name, ones) in enumerate(part, 1)
            ]
            measured = {float(one.prompt_tokens): f"{one.prompt_tokens:,}" for _, ones in part for one in ones}
            charts.append(
                line_chart(
                    title,
                    series,
                    x_label="tokens of the prompt",
                    y_label="tokens/s; higher is better",
                    x_names=measured,
                    scale=[get(one).median for ones in curves.values() for one in ones],
                )
            )
    return charts
