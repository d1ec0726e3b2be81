"""`edgelm parity`: does this bundle compute on this device what the reference computed?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgelm.cli.common.help import option, verb
from edgelm.cli.common.options import (
    BUNDLE,
    Number,
    json_option,
    kv_option,
    report_option,
    runtime_option,
    threads_option,
)
from edgelm.cli.common.output import echo

if TYPE_CHECKING:
    from edgelm.parity.result import Check, ParityReport


@verb(example="edgelm parity olmoe --report parity.html")
@click.argument("bundle", type=BUNDLE)
@report_option
@option(
    "--max-kl",
    metavar="NATS",
    type=Number(min=0),
    default_text="no limit",
    help="Also fail if quantisation lost more than this: the mean KL divergence to the float model, in nats a token.",
)
@option("--no-integrity", is_flag=True, help="Do not check the hashes of the bundle's files first.")
@option(
    "--checkpoint",
    metavar="CHECKPOINT",
    default_text="the results stored in the bundle",
    help="Compute the reference anew from this checkpoint. Needs torch.",
)
@runtime_option
@threads_option()
@kv_option
@json_option
def parity(
    bundle: Path,
    report_path: Path | None,
    checkpoint: str | None,
    runtime: str | None,
    threads: int | None,
    kv: str | None,
    max_kl: float | None,
    no_integrity: bool,
    as_json: bool,
) -> None:
    """Check that this device computes the same model as the reference.

    Runs the prompts stored in BUNDLE and compares logits, tokens and expert choices with those of the PyTorch reference
    that was quantised the same way. Exit code 1 if a check fails. The loss to the float model is shown, and checked
    only with --max-kl.
    """
    import json

    from edgelm.output_paths import check_output
    from edgelm.pages.page import REPORT
    from edgelm.parity.check import check_parity
    from edgelm.progress import Bars

    if report_path is not None:
        check_output(report_path, REPORT, sources=[bundle, checkpoint], overwrite=True)
    progress = Bars()
    result = check_parity(
        bundle,
        runtime=runtime,
        threads=threads,
        kv=kv,
        checkpoint=checkpoint,
        integrity=not no_integrity,
        max_kl=max_kl,
        progress=progress,
    )
    if report_path is not None:
        from edgelm.parity.report import write_report

        write_report(result, report_path)
        progress.note(f"report: {report_path}")
    if as_json:
        click.echo(json.dumps(result.to_dict(), allow_nan=False))
    else:
        echo(summary(result))
    if not result.passed:
        raise click.exceptions.Exit(1)


def summary(report: ParityReport) -> str:
    """The outcome for a terminal: what failed, else the numbers that matter."""
    from edgelm.cli.common.output import pairs
    from edgelm.sizes import format_number

    shown = [check for check in report.checks if check.layer is None or check.passed is False]
    # What failed stands last, next to the outcome.
    lines = [_row(check) for check in sorted(shown, key=lambda check: check.passed is False)]
    per_layer = [check for check in report.checks if check.layer is not None]
    good = sum(check.passed is True for check in per_layer)
    if per_layer:
        lines.append(("pass" if good == len(per_layer) else "FAIL", f"Layers: {good} of {len(per_layer)} checks pass"))
    total = len([check for check in report.checks if check.passed is not None])
    outcome = "PASSED" if report.passed else "FAILED"
    end = [f"parity {outcome}: {total - len(report.failures)} of {total} checks, limits for {report.kind}"]
    if report.cause:
        end.append(f"first divergence: {report.cause}")
    end.append(f"lost against the float model: {report.float_loss.text}")
    if report.float_loss.warning:
        end.append(f"warning: {report.float_loss.warning}; the exit code does not count it without --max-kl")
    if report.speed is not None:
        end.append(
            f"{report.runtime}, {report.threads} threads: prefill {format_number(report.speed.prefill_tokens_per_s)}, "
            f"decode {format_number(report.speed.decode_tokens_per_s)} tokens/s"
        )
    return "\n".join([pairs(lines), *report.notes, *end])


def _row(check: Check) -> tuple[str, str]:
    word = {True: "pass", False: "FAIL", None: "-"}[check.passed]
    text = check.title
    if check.value is not None and check.limit is not None:
        text += f": {check.value:.3g} ({'at most' if check.better == 'lower' else 'at least'} {check.limit:.3g})"
    show = check.detail and (check.passed is not True or check.value is None)
    return word, f"{text}: {check.detail}" if show else text
