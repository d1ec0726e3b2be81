"""`edgelm bench`: measure load time, speed and memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelm.bundle.kv_cache import KV_TYPES
from edgelm.cli.common.help import Group, option, verb
from edgelm.cli.common.interrupts import INTERRUPTED
from edgelm.cli.common.options import (
    BUNDLE,
    PHYSICAL_CORES,
    RuntimeName,
    Threads,
    Whole,
    json_option,
    report_option,
    weight_memory_option,
)

if TYPE_CHECKING:
    from edgelm.benchmark import BenchResult, Spread
    from edgelm.measuring.matrix import Matrix


class Several(click.ParamType[Any]):
    """Values separated by commas, each of the type `inner`; what is given twice counts once."""

    name = "list"

    def __init__(self, inner: click.ParamType[Any]) -> None:
        self.inner = inner

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        """Return the values."""
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in str(value).split(",")]
        if "" in parts:
            example = ",".join(self.inner.choices[:2]) if isinstance(self.inner, click.Choice) else "1,2"
            self.fail(f"{value!r} is no list: write for example {example}", param, ctx)
        return tuple(dict.fromkeys(self.inner.convert(part, param, ctx) for part in parts))


@verb(example="edgelm bench olmoe-int4 olmoe-int8 --prompt-tokens 128,512 --report bench.html")
@click.argument("bundles", nargs=-1, required=True, metavar="BUNDLE...", type=BUNDLE)
@option(
    "--prompt-tokens",
    type=Several(Whole(min=1)),
    metavar="N[,N...]",
    default_text="512, or what fits",
    help="Length of the prompt, which is random tokens.",
)
@option("--new-tokens", type=Whole(min=1), default_text="128, or what fits", help="Tokens to generate.")
@option("--repeat", type=Whole(min=1), default=5, help="Measured runs, after one that is not counted.")
@option(
    "--batch",
    type=Several(Whole(min=1)),
    metavar="N[,N...]",
    default="1",
    help="Sequences that decode together.",
)
@report_option
@option(
    "--runtime",
    "runtimes",
    group=Group.RUNTIME,
    multiple=True,
    type=RuntimeName(),
    metavar="NAME",
    default_text="the best one here",
    help="Runtime to use; may be repeated. `edgelm doctor` lists them.",
)
@option(
    "--threads",
    group=Group.RUNTIME,
    type=Several(Threads()),
    metavar="N[,N...]",
    default_text=PHYSICAL_CORES,
    help="CPU threads.",
)
@option(
    "--kv",
    group=Group.RUNTIME,
    type=Several(click.Choice(KV_TYPES)),
    metavar="TYPE[,TYPE...]",
    default_text="as exported: float16; float32 for recipe `none` and for portable bundles",
    help=f"Data type of the KV cache: {', '.join(KV_TYPES)}.",
)
@weight_memory_option
@json_option
def bench(
    bundles: tuple[Path, ...],
    prompt_tokens: tuple[int, ...] | None,
    new_tokens: int | None,
    repeat: int,
    batch: tuple[int, ...],
    report_path: Path | None,
    runtimes: tuple[str, ...],
    threads: tuple[int, ...] | None,
    kv: tuple[str, ...] | None,
    weight_memory: int | None,
    as_json: bool,
) -> None:
    """Measure load time, speed and memory of BUNDLE on this machine.

    The speeds are those of prefill (tokens of the prompt per second) and of decode (new tokens per second). Several
    bundles, or lists of values, are measured side by side: every combination, in turns. Ctrl-C ends the measurement and
    shows what was measured.
    """
    import json

    from edgelm.output_paths import check_output
    from edgelm.pages.page import REPORT
    from edgelm.progress import Bars

    for bundle in bundles:
        if [path.resolve() for path in bundles].count(bundle.resolve()) > 1:
            raise click.UsageError(f"{bundle} is given twice: give each bundle once")
    if report_path is not None:
        check_output(report_path, REPORT, sources=list(bundles), overwrite=True)
    progress = Bars()
    lists: dict[str, Sequence[Any]] = {
        "runtimes": tuple(dict.fromkeys(runtimes)) or (None,), "threads": threads or (None,), "kv": kv or (None,),
        "batch": batch, "prompt_tokens": prompt_tokens or (None,),
    }  # fmt: skip
    single = len(bundles) == 1 and all(len(values) == 1 for values in lists.values())
    found = _measure(bundles, lists, single, new_tokens, repeat, weight_memory, progress)
    if report_path is not None:
        from edgelm.measuring.report import write_report

        write_report(found, report_path)
        progress.note(f"report: {report_path}")
    if as_json:
        click.echo(json.dumps(found.results[0].as_dict() if single else found.to_dict(), allow_nan=False))
    else:
        click.echo(table(found.results[0]) if single else tables(found))
    if found.interrupted:
        raise click.exceptions.Exit(INTERRUPTED)


def _measure(
    bundles: Sequence[Path],
    lists: dict[str, Sequence[Any]],
    single: bool,
    new_tokens: int | None,
    repeat: int,
    weight_memory: int | None,
    progress: Any,
) -> Matrix:
    from edgelm.benchmark import bench as measure
    from edgelm.measuring.matrix import Matrix, bench_matrix

    more = {"new_tokens": new_tokens, "repeat": repeat, "weight_memory": weight_memory, "progress": progress}
    if not single:
        return bench_matrix(bundles, **lists, **more)  # type: ignore[arg-type]  # the options' own types
    named = {"runtimes": "runtime"}
    result = measure(bundles[0], **{named.get(name, name): values[0] for name, values in lists.items()}, **more)
    return Matrix((result,), (), True, False, ())


def tables(matrix: Matrix) -> str:
    """Format several results for people: a sentence, a table, and what was not measured."""
    from edgelm.cli.common.output import grid
    from edgelm.measuring.report import answer, bundle_names, shared, spread_text, varying
    from edgelm.sizes import format_size

    results = matrix.results
    columns = varying(results)
    joules = any(result.energy is not None for result in results)
    header = ["bundle", "size", *columns, "prompt", "new", "prefill/s", "decode/s", "load", "memory"]
    rows = []
    for name, result in zip(bundle_names(results), results, strict=True):
        energy = "-" if result.energy is None else f"{result.energy.decode_joules_per_token.median:.3g}"
        rows.append([
            name, format_size(sum(result.files.values())), *(str(getattr(result, column)) for column in columns),
            f"{result.prompt_tokens:,}", f"{result.new_tokens:,}", spread_text(result.prefill_tokens_per_second),
            spread_text(result.decode_tokens_per_second), f"{result.load_seconds:.2f} s",
            format_size(result.resident_after_run), *([energy] if joules else []),
        ])  # fmt: skip
    fixed = ", ".join(part for part in (results[0].device.cpu, shared(results)) if part)
    repeat = len(results[0].decode_tokens_per_second.runs)
    runs = f"medians of {repeat} runs" if repeat > 1 else "1 run"
    lines = [answer(matrix), "", f"{fixed}; {runs}", "", grid(header + (["J/token"] if joules else []), rows), ""]
    lines += [f"note: {note}" for note in dict.fromkeys((*matrix.notes, *(n for one in results for n in one.notes)))]
    lines += matrix.skipped_lines
    last = results[-1]
    lines += [f"energy: not measured: {last.energy_problem}"] if last.energy_problem else []
    return "\n".join([*lines, *_busy(last)])


def table(result: BenchResult) -> str:
    """Format the result for people: a sentence, then the figures."""
    from edgelm.cli.common.output import pairs
    from edgelm.sizes import format_number, format_size

    def spread(value: Spread, unit: str, digits: int) -> str:
        median, low, high = (format_number(number, digits) for number in (value.median, value.low, value.high))
        return f"{median} {unit}  ({low} to {high})"

    several = f" x {result.batch}" if result.batch > 1 else ""
    repeat = len(result.decode_tokens_per_second.runs)
    loaded, run = format_size(result.resident_after_load), format_size(result.resident_after_run)
    peak, before = format_size(result.resident_peak), format_size(result.resident_before_load)
    rows = [
        ("bundle", f"{result.bundle} ({result.model}, {result.recipe})"),
        ("device", f"{result.device.cpu}, {result.threads} of {result.device.logical_cores} logical cores used"),
        ("runtime", f"{result.runtime}, {result.ops} operators, {result.kv} cache"),
        ("load", f"{result.load_seconds:.2f} s"),
        (f"prefill {result.prompt_tokens:,}", spread(result.prefill_tokens_per_second, "tokens/s", 1)),
        ("first token", spread(result.time_to_first_token, "s", 3)),
        (f"decode {result.new_tokens:,}{several}", spread(result.decode_tokens_per_second, "tokens/s", 1)),
        ("runs", f"{repeat}: median (least to greatest)"),
        ("resident", f"{loaded} loaded, {run} after the runs"),
        ("resident peak", f"{peak} ({before} before loading)"),
        ("files", f"{format_size(sum(result.files.values()))} in {len(result.files)} files"),
        *_bandwidth(result),
        _energy(result),
        *(("note", note) for note in result.notes),
        *(("note", line.removeprefix("note: ")) for line in _busy(result)),
    ]
    decode, prefill = (
        format_number(value.median) for value in (result.decode_tokens_per_second, result.prefill_tokens_per_second)
    )
    together = f", {result.batch} sequences together" if result.batch > 1 else ""
    sentence = f"This device generates {decode} tokens/s{together}, after reading the prompt at {prefill} tokens/s."
    return f"{sentence}\n\n{pairs(rows)}"


def _busy(result: BenchResult) -> list[str]:
    if result.load_average is None or result.load_average <= result.threads + 1:
        return []
    return [f"note: the machine was busy (load {result.load_average:.1f}): measure again when it is quiet"]


def _energy(result: BenchResult) -> tuple[str, str]:
    energy = result.energy
    if energy is None:
        return "energy", f"not measured: {result.energy_problem}"
    prefill, decode = energy.prefill_joules_per_token.median, energy.decode_joules_per_token.median
    return "energy", f"{decode:.3g} J per token of decode, {prefill:.3g} of prefill ({energy.source}, whole machine)"


def _bandwidth(result: BenchResult) -> list[tuple[str, str]]:
    """Return rows about the bytes that decoding reads and, for a large model, the share of the memory's bandwidth."""
    from edgelm.sizes import format_size

    reads = f"{format_size(result.bytes_per_token)} per token"
    if result.decode_bandwidth is None:
        return [] if result.batch > 1 else [("reads", f"{reads}, so little that the CPU's caches may hold it")]
    said = f"{format_size(result.decode_bandwidth)}/s: {reads}"
    if result.machine_bandwidth is None:
        return [("bandwidth", f"{said}; the memory's own was not measured: too little of it is free")]
    reader = "1 thread reads" if result.threads == 1 else f"{result.threads} threads read"
    by = reader if result.runtime == "onnxruntime-cpu" else "the GPU copies"
    machine = f"{format_size(result.machine_bandwidth)}/s that {by} here"
    return [("bandwidth", f"{said}; {result.bandwidth_share:.0%} of the {machine}")]
