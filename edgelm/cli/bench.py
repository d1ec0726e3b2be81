"""`edgelm bench`: load time, speed, memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgelm.cli.options import (
    BUNDLE,
    json_option,
    kv_option,
    runtime_option,
    threads_option,
    weight_budget_option,
)

if TYPE_CHECKING:
    from edgelm.benchmark import BenchResult, Spread


@click.command()
@click.argument("bundle", type=BUNDLE)
@click.option(
    "--prompt-tokens", type=click.IntRange(min=1), default=512, show_default=True, help="Random tokens to read."
)
@click.option("--new-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Tokens to generate.")
@click.option("--repeat", type=click.IntRange(min=1), default=5, show_default=True, help="Runs, after one not counted.")
@threads_option()
@runtime_option
@kv_option
@weight_budget_option
@click.option(
    "--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Sequences that decode together."
)
@json_option
def bench(
    bundle: Path,
    prompt_tokens: int,
    new_tokens: int,
    repeat: int,
    threads: int | None,
    runtime: str | None,
    kv: str | None,
    weight_budget: int | None,
    batch: int,
    as_json: bool,
) -> None:
    """Measure BUNDLE on this machine: load time, prefill, time to first token, decode, memory, bandwidth."""
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
        weight_budget=weight_budget,
        batch=batch,
        progress=Bars(),
    )
    click.echo(json.dumps(result.as_dict()) if as_json else table(result))


def table(result: BenchResult) -> str:
    """The result for people."""
    from edgelm.cli.tables import pairs
    from edgelm.sizes import format_size

    def spread(value: Spread, unit: str, digits: int) -> str:
        return f"{value.median:.{digits}f} {unit}  ({value.low:.{digits}f} to {value.high:.{digits}f})"

    several = f" x {result.batch}" if result.batch > 1 else ""
    repeat = len(result.decode_tokens_per_second.runs)
    rows = [
        ("bundle", f"{result.bundle} ({result.model}, {result.recipe})"),
        ("device", f"{result.device.cpu}, {result.threads} of {result.device.logical_cores} logical cores used"),
        ("runtime", f"{result.runtime}, {result.ops} operators, {result.kv} cache"),
        ("load", f"{result.load_seconds:.2f} s"),
        (f"prefill {result.prompt_tokens}", spread(result.prefill_tokens_per_second, "tokens/s", 1)),
        ("first token", spread(result.time_to_first_token, "s", 3)),
        (
            f"decode {result.new_tokens}{several}",
            spread(result.decode_tokens_per_second, "tokens/s", 1),
        ),
        ("runs", f"{repeat}: median (least to greatest)"),
        (
            "resident",
            f"{format_size(result.resident_after_load)} loaded, "
            f"{format_size(result.resident_after_run)} after the runs",
        ),
        (
            "resident peak",
            f"{format_size(result.resident_peak)} ({format_size(result.resident_before_load)} before loading)",
        ),
        ("files", f"{format_size(sum(result.files.values()))} in {len(result.files)} files"),
    ]
    if result.decode_bandwidth is not None:
        said = f"{result.decode_bandwidth / 1e9:.1f} GB/s: {format_size(result.bytes_per_token)} a token"
        if result.machine_bandwidth is not None:
            by = f"{result.threads} threads read" if result.runtime == "onnxruntime-cpu" else "the GPU copies"
            said += f"; {result.bandwidth_share:.0%} of the {result.machine_bandwidth / 1e9:.1f} GB/s that {by} here"
        rows.append(("bandwidth", said))
    if result.load_average is not None and result.load_average > result.threads + 1:
        rows.append(("note", f"the machine was busy (load {result.load_average:.1f}): measure again when it is quiet"))
    return pairs(rows)
