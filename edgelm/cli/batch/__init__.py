"""`edgelm batch`: answer a file of requests."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelm.cli.common.cluster import cluster_options
from edgelm.cli.common.help import option, verb
from edgelm.cli.common.options import PATH, json_option, loading_options
from edgelm.cli.serve import cache_options, need_serve_extra

if TYPE_CHECKING:
    from edgelm.serving.batch import BatchReport


@verb(example="edgelm batch requests.jsonl answers.jsonl --bundle olmoe")
@click.argument("source", metavar="IN", type=PATH)
@click.argument("target", metavar="OUT", type=PATH)
@option(
    "--bundle",
    "bundles",
    metavar="[NAME=]BUNDLE",
    multiple=True,
    required=True,
    help="A model of the requests, called NAME, or like the bundle's folder. May be repeated.",
)
@json_option
@cluster_options(scaling=False)
@cache_options
@loading_options
def batch(
    source: Path,
    target: Path,
    bundles: tuple[str, ...],
    as_json: bool,
    cluster: dict[str, Any] | None,
    caching: dict[str, Any],
    loading: dict[str, Any],
) -> None:
    """Write the answers to the requests in IN to OUT, in the same order.

    IN has a request a line, as for OpenAI's batches: {"custom_id": "1", "method": "POST", "url":
    "/v1/chat/completions", "body": {...}}. All lines are checked first. When a run was stopped, the same command goes
    on where it was. The exit code is 1 if an answer is an error.
    """
    need_serve_extra()
    from edgelm.errors import EdgeLMError
    from edgelm.progress import Bars
    from edgelm.serving.batch import batch_settings, reader_for, run_batch, run_here
    from edgelm.serving.settings import Settings, named_bundles

    progress = Bars()
    settings = batch_settings(Settings(models=named_bundles(bundles), loading=loading, **caching))
    run = run_here(settings)
    if cluster is not None:
        from edgelm.serving.ray.data import run_on_ray

        run = run_on_ray(settings, **cluster, progress=progress)
    report = run_batch(source, target, reader_for(settings), run, progress=progress)
    click.echo(_as_json(report) if as_json else summary(report, target))
    if report.failed:
        raise EdgeLMError(f"{report.failed:,} of {report.requests:,} answers in {target} are errors")


def _as_json(report: BatchReport) -> str:
    import json
    from dataclasses import asdict

    return json.dumps(asdict(report))


def summary(report: BatchReport, target: Path) -> str:
    """Format the report for a terminal."""
    from edgelm.sizes import format_number

    new = report.requests - report.kept
    line = f"{target}: {report.requests:,} answers"
    if not new:
        return f"{line}, none of them new"
    if report.kept:
        line += f", {new:,} of them new"
    rate = report.completion_tokens / report.seconds
    return (
        f"{line}; {report.prompt_tokens:,} tokens of prompts, {report.completion_tokens:,} generated in "
        f"{report.seconds:.1f} s ({format_number(rate)}/s)"
    )
