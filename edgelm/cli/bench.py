"""`edgelm bench`: measure load time, speed and memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgelm.cli.common.help import option, verb
from edgelm.cli.common.options import (
    BUNDLE,
    json_option,
    kv_option,
    runtime_option,
    threads_option,
    weight_memory_option,
)

if TYPE_CHECKING:
    from edgelm.benchmark import BenchResult, Spread


@verb(example="edgelm bench olmoe")
@click.argument("bundle", type=BUNDLE)
@option(
    "--prompt-tokens",
    type=click.IntRange(min=1),
    default_text="512, or what fits",
    help="Length of the prompt, which is random tokens.",
)
@option("--new-tokens", type=click.IntRange(min=1), default_text="128, or what fits", help="Tokens to generate.")
@option("--repeat", type=click.IntRange(min=1), default=5, help="Measured runs, after one that is not counted.")
@option("--batch", type=click.IntRange(min=1), default=1, help="Sequences that decode together.")
@runtime_option
@threads_option()
@kv_option
@weight_memory_option
@json_option
def bench(
    bundle: Path,
    prompt_tokens: int | None,
    new_tokens: int | None,
    repeat: int,
    threads: int | None,
    runtime: str | None,
    kv: str | None,
    weight_memory: int | None,
    batch: int,
    as_json: bool,
) -> None:
    """Measure load time, speed and memory of BUNDLE on this machine.

    The speeds are those of prefill (tokens of the prompt per second) and of decode (new tokens per second).
    """
    import json

    from edgelm.benchmark import bench as measure
    from edgelm.progress import Bars

    result = measure(
        bundle,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeat=repeat,
        threads=threads,
        runtime=runtime,
        kv=kv,
        weight_memory=weight_memory,
        batch=batch,
        progress=Bars(),
    )
    click.echo(json.dumps(result.as_dict()) if as_json else table(result))


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
        *(("note", note) for note in result.notes),
    ]
    if result.load_average is not None and result.load_average > result.threads + 1:
        rows.append(("note", f"the machine was busy (load {result.load_average:.1f}): measure again when it is quiet"))
    decode, prefill = (
        format_number(value.median) for value in (result.decode_tokens_per_second, result.prefill_tokens_per_second)
    )
    together = f", {result.batch} sequences together" if result.batch > 1 else ""
    sentence = f"This device generates {decode} tokens/s{together}, after reading the prompt at {prefill} tokens/s."
    return f"{sentence}\n\n{pairs(rows)}"


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
