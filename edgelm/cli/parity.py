"""`edgelm parity`: check that this device computes the same model as the reference."""

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
    verbose_option,
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
    help="Also fail if quantisation lost more than this: the mean KL divergence to the float model, in nats per token.",
)
@option("--no-integrity", is_flag=True, help="Do not check the hashes of the bundle's files first.")
@option(
    "--checkpoint",
    metavar="CHECKPOINT",
    default_text="the results stored in the bundle",
    help="Compute the reference anew from this checkpoint. Needs torch.",
)
@verbose_option("Also list every check with its value, its limit and its formula.")
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
    verbose: bool,
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
        echo(summary(result, verbose=verbose))
    if not result.passed:
        raise click.exceptions.Exit(1)


def summary(report: ParityReport, *, verbose: bool = False) -> str:
    """Format the result for a terminal: a sentence, a line for each group of checks; with `verbose` every check."""
    from edgelm.parity.result import counted, summary_lines

    marks = {True: "ok", False: "FAIL", None: ""}
    # What failed stands first, next to the sentence.
    found = sorted(summary_lines(report), key=lambda line: line.passed is not False)
    lines = [report.sentence]
    if report.evidence:
        lines.append(f"{report.evidence[0].upper()}{report.evidence[1:]}.")
    lines += ["", *(f"{marks[line.passed]:<4}  {line.name:<12}  {line.text}" for line in found), ""]
    if report.float_loss.warning:
        lines.append(f"warning: {report.float_loss.warning}; only --max-kl makes this a failure")
    lines += [f"note: {note}" for note in report.notes]
    lines.append(counted(report) if verbose else f"{counted(report)}; --verbose lists them")
    if verbose:
        lines += ["", *map(_row, report.checks)]
    return "\n".join(lines)


def _row(check: Check) -> str:
    """Format a check with its value, its limit and its detail."""
    word = {True: "pass", False: "FAIL", None: "-"}[check.passed]
    text = check.title
    if check.value is not None and check.limit is not None:
        text += f": {check.value:.3g} ({'at most' if check.better == 'lower' else 'at least'} {check.limit:.3g})"
    return f"{word:<4}  {text}: {check.detail}" if check.detail else f"{word:<4}  {text}"
