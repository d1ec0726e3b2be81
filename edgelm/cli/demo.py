"""`edgelm demo`: export, run and check the two tiny trained checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgelm.cli.common.help import option, verb
from edgelm.cli.common.options import PATH, Whole, need_export_extra
from edgelm.cli.common.output import echo

if TYPE_CHECKING:
    from edgelm.generation.stream import Generation
    from edgelm.parity.result import ParityReport
    from edgelm.progress import Progress

NAMES = ("olmoe-tiny", "fox-tiny")
RECIPES = ("int4", "int8")
# The models were trained on the sources of Python's standard library.
PROMPT = 'def read(self, path):\n    """Return'

NOTES = """\
KL lost: float model -> this device, in nats per token.
KL added: quantised reference -> this device; parity judges this one.
top-1: positions with the same most probable token as the quantised reference."""


@dataclass(frozen=True)
class Outcome:
    """Results of one checkpoint with one recipe."""

    bundle: Path
    checkpoint_bytes: int
    bundle_bytes: int
    generation: Generation
    report: ParityReport
    page: Path


@verb(example="edgelm demo")
@option(
    "-o",
    "--output",
    "out",
    old_names=("--out",),
    metavar="DIR",
    type=PATH,
    default=Path("bundles/demo"),
    help="Folder to write the bundles to.",
)
@option(
    "--checkpoints",
    metavar="DIR",
    type=PATH,
    default_text="examples/checkpoints of a checkout",
    help="Folder with the tiny checkpoints.",
)
@option("-n", "--max-tokens", type=Whole(min=1), default=48, help="Tokens to generate.")
def demo(out: Path, checkpoints: Path | None, max_tokens: int) -> None:
    """Export the tiny trained models as int4 and int8, run and check them.

    Exit code 1 if a parity check fails.
    """
    import time

    from edgelm.progress import Bars

    need_export_extra()
    started = time.perf_counter()
    folder = find_checkpoints(checkpoints)
    progress = Bars()
    outcomes = []
    for name in NAMES:
        for recipe in RECIPES:
            click.echo(f"== {name}, {recipe}")
            outcome = take(folder / name, out / f"{name}-{recipe}", recipe, max_tokens, progress)
            outcomes.append(outcome)
            click.echo(PROMPT + outcome.generation.text)
            click.echo()
    echo(table(outcomes))
    click.echo()
    for outcome in outcomes:
        click.echo(f"report  {outcome.page}")
    click.echo(f"next    edgelm run {outcomes[0].bundle} 'import os'   ({time.perf_counter() - started:.0f} s in all)")
    if not all(outcome.report.passed for outcome in outcomes):
        raise click.exceptions.Exit(1)


def find_checkpoints(given: Path | None) -> Path:
    """Return the folder that holds the tiny checkpoints.

    Raises:
        EdgeLMError: a checkpoint is missing in it, or there is no checkout to find them in.
    """
    from edgelm.errors import EdgeLMError

    # From a checkout, in its folder or installed from it as editable.
    places = (
        [given]
        if given
        else [Path("examples/checkpoints"), Path(__file__).resolve().parents[2] / "examples/checkpoints"]
    )
    for place in places:
        if all((place / name / "config.json").is_file() for name in NAMES):
            return place
    raise EdgeLMError(
        f"{' and '.join(NAMES)} are not in {' or '.join(map(str, places))}: run this in a checkout of EdgeLM, or name "
        "the folder that holds them with --checkpoints"
    )


def take(checkpoint: Path, out: Path, recipe: str, max_tokens: int, progress: Progress) -> Outcome:
    """Export, run and check one checkpoint."""
    from edgelm.export import ExportOptions, export_bundle
    from edgelm.generation.language_model import load
    from edgelm.output_paths import check_output
    from edgelm.pages.page import REPORT
    from edgelm.parity.check import check_parity
    from edgelm.parity.report import write_report

    page = out.with_name(f"{out.name}.html")
    if page.exists():
        check_output(page, REPORT, sources=[checkpoint], overwrite=True)
    bundle = export_bundle(checkpoint, out, recipe=recipe, options=ExportOptions(overwrite=True), progress=progress)
    with load(out, chat=False) as model:
        generation = model.generate(PROMPT, max_tokens=max_tokens)
    report = check_parity(out, progress=progress)
    write_report(report, page)
    weights = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    return Outcome(
        out, weights, bundle.manifest.files[bundle.manifest.graph.weights_file].size, generation, report, page
    )


def table(outcomes: list[Outcome]) -> str:
    """Format all outcomes as one table."""
    from edgelm.cli.common.output import grid
    from edgelm.sizes import format_size

    header = ("bundle", "weights", "of bf16", "KL lost", "KL added", "top-1", "parity")
    rows = []
    for outcome in outcomes:
        report = outcome.report
        rows.append(
            (
                outcome.bundle.name,
                format_size(outcome.bundle_bytes),
                f"{outcome.bundle_bytes / outcome.checkpoint_bytes:.0%}",
                f"{report.float_kl_mean:.4f}",
                f"{report.kl_mean:.1e}",
                f"{report.top1:.1%}",
                "passed" if report.passed else "FAILED",
            )
        )
    return f"{grid(header, rows)}\n{NOTES}"
