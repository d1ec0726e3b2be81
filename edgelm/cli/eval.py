"""`edgelm eval`: measure how close quantised models are to the float model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgelm.bundle.kv_cache import KV_TYPES
from edgelm.cli.common.help import Group, option, verb
from edgelm.cli.common.options import Whole, as_usage, json_option, report_option, runtime_option, threads_option

if TYPE_CHECKING:
    from edgelm.evaluation import EvaluationReport
    from edgelm.evaluation.result import TargetResult


@verb(example="edgelm eval olmoe --checkpoint allenai/OLMoE-1B-7B-0924")
@click.argument("targets", nargs=-1, required=True, metavar="TARGET...")
@option(
    "--checkpoint",
    metavar="CHECKPOINT",
    help="The float model to compare with: a folder or a hub id. Needs torch. Without it only perplexity is measured.",
)
@report_option
@option("--speed/--no-speed", default=True, default_text="--speed", help="Measure the speed of bundles too.")
@option("--layers", is_flag=True, help="Measure the error of every layer and every expert too.")
@option(
    "--text",
    group=Group.TEXT,
    default="builtin",
    metavar="TEXT",
    help="Evaluation text: a file, a folder, or `builtin` (files of Python's standard library that calibration does "
    "not see).",
)
@option("--tokens", group=Group.TEXT, type=Whole(min=2), default=16384, help="Tokens to evaluate.")
@option("--length", group=Group.TEXT, type=Whole(min=2), default=256, help="Tokens of one window.")
@runtime_option
@threads_option("CPU threads, for bundles.")
@option(
    "--kv",
    group=Group.RUNTIME,
    multiple=True,
    type=click.Choice(KV_TYPES),
    default_text="as exported",
    help="Data type of the KV cache of bundles. May be repeated, to compare types.",
)
@json_option
def eval(  # noqa: A001 - the verb's name
    targets: tuple[str, ...],
    checkpoint: str | None,
    text: str,
    tokens: int,
    length: int,
    layers: bool,
    speed: bool,
    kv: tuple[str, ...],
    runtime: str | None,
    threads: int | None,
    report_path: Path | None,
    as_json: bool,
) -> None:
    """Measure how close each TARGET is to the float model.

    Shows KL divergence, agreement of the most probable token, perplexity, size and speed. A TARGET is a bundle, which
    runs as on a device; a quantised checkpoint; or a recipe (int4, int8, fp8, none, or a TOML file), which is applied
    to CHECKPOINT in memory.
    """
    from edgelm.evaluation import EvalOptions, evaluate
    from edgelm.output_paths import check_output
    from edgelm.pages.page import REPORT
    from edgelm.progress import Bars

    options = EvalOptions(
        text=text, tokens=tokens, length=length, layers=layers, speed=speed, kv=kv, runtime=runtime, threads=threads
    )
    with as_usage():
        options.check()
    _check_names(targets, checkpoint)
    if report_path is not None:
        folders = [target for target in targets if Path(target).is_dir()]
        check_output(report_path, REPORT, sources=[checkpoint, *folders], overwrite=True)
    progress = Bars()
    found = evaluate(targets, checkpoint, options, progress)
    if report_path is not None:
        from edgelm.evaluation.report import write_report

        write_report(found, report_path)
        progress.note(f"report: {report_path}")
    click.echo(found.to_json() if as_json else summary(found))


def _check_names(targets: tuple[str, ...], checkpoint: str | None) -> None:
    """Refuse unknown recipes, and recipes without a float model.

    Raises:
        click.UsageError: a target is one of these.
    """
    from edgelm.quant.recipe import PRESETS

    for target in targets:
        if target in PRESETS and checkpoint is None:
            raise click.UsageError(
                f"the recipe {target} needs weights to quantise: give the float model with --checkpoint"
            )
        if target not in PRESETS and not Path(target).exists() and Path(target).name == target:
            raise click.UsageError(
                f"there is no bundle, checkpoint or recipe {target!r}: give a folder, {', '.join(PRESETS)}, or a "
                ".toml file"
            )


def summary(report: EvaluationReport) -> str:
    """Format the report for a terminal: a sentence, a table, then lines about caches and layers."""
    from edgelm.cli.common.output import grid
    from edgelm.evaluation.report import sentence

    text = report.text
    lines = [
        sentence(report),
        "",
        f"{report.model}: {text.tokens:,} tokens of {text.name}, {text.windows} windows of {text.length}",
        "",
        grid(_header(report), [row for row in (_reference_row(report), *map(_row, report.targets)) if row]),
    ]
    lines += _cache_lines(report) + _layer_lines(report)
    notes = [*report.notes, *dict.fromkeys(f"{t.target}: {note}" for t in report.targets for note in t.notes)]
    return "\n".join(lines + (["", *notes] if notes else []))


def _header(report: EvaluationReport) -> tuple[str, ...]:
    del report
    return (
        *("target", "size", "bits/weight", "KL, nats/token", "median", "p99", "top-1", "perplexity"),
        *("prefill/s", "decode/s", "peak memory"),
    )


def _reference_row(report: EvaluationReport) -> tuple[str, ...]:
    from edgelm.sizes import format_size

    reference = report.reference
    if reference is None:
        return ()
    blank = ("",) * 4
    bits = f"{reference.bits_per_weight:.2f}"
    return (
        "float model",
        format_size(reference.stored_bytes),
        bits,
        *blank,
        _perplexity(reference.perplexity),
        "",
        "",
        "",
    )


def _row(target: TargetResult) -> tuple[str, ...]:
    from edgelm.sizes import format_number, format_size

    kl, speed = target.kl, target.speed
    bits = "" if target.bits_per_weight is None else f"{target.bits_per_weight:.2f}"
    found = ("", "", "", "")
    if kl is not None:
        found = (f"{kl.mean:.3g} ± {kl.standard_error:.1g}", f"{kl.median:.2g}", f"{kl.p99:.2g}", f"{kl.top1:.2%}")
    fast = ("", "", "")
    if speed is not None:
        fast = (
            format_number(speed.prefill_tokens_per_second),
            format_number(speed.decode_tokens_per_second),
            format_size(speed.peak_memory),
        )
    return (target.name, format_size(target.stored_bytes), bits, *found, _perplexity(target.perplexity), *fast)


def _perplexity(value: float) -> str:
    from edgelm.sizes import format_number

    return f"{value:.4g}" if value < 1000 else format_number(value)


def _cache_lines(report: EvaluationReport) -> list[str]:
    found = []
    bases = {target.target: target.kl.mean for target in report.targets if target.kl and target.kv == "float32"}
    for target in report.targets:
        if target.kv_loss is not None:
            base, lost = bases[target.target], target.kv_loss
            share = f", {lost.mean / base:+.1%}" if base > 0 else ""
            found.append(
                f"{target.name}: KL {lost.mean:+.2g} ± {lost.standard_error:.1g} over the float32 cache{share}"
            )
    return ["", *found] if found else []


def _layer_lines(report: EvaluationReport) -> list[str]:
    lines: list[str] = []
    # Layers are measured once for all KV cache types of a bundle.
    for target in _once(report):
        if target.layers:
            worst = max(target.layers, key=lambda layer: layer.error)
            where = "the embedding" if worst.layer < 0 else f"layer {worst.layer}"
            line = f"{target.target}: largest error of the residual stream {worst.error:.3g}, after {where}"
            same = [layer.same_experts for layer in target.layers if layer.same_experts is not None]
            lines.append(line + (f"; the same experts for at least {min(same):.1%} of tokens" if same else ""))
        if target.experts and target.experts.worst:
            named = [
                f"{expert.layer}.{expert.expert} {expert.error:.3g} ({expert.tokens:,} tokens)"
                for expert in target.experts.worst[:5]
            ]
            lines.append(f"{target.target}: experts with the largest squared error (layer.expert): {', '.join(named)}")
    return ["", *lines] if lines else []


def _once(report: EvaluationReport) -> list[TargetResult]:
    found: dict[str, TargetResult] = {}
    for target in report.targets:
        found.setdefault(target.target, target)
    return list(found.values())
