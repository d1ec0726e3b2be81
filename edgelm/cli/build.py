"""`edgelm build`: an engine for a bundle, on the device that is to run it or for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgelm.cli.common.options import BUNDLE, Renamed, build_options, chosen_sms, json_option


@click.command()
@click.argument("bundle", type=BUNDLE)
@click.option(
    "--sm",
    "sms",
    metavar="SM,...",
    callback=chosen_sms,
    help="The GPUs to build for, for example 86,89 [all that the bundle has kernels for; full TensorRT: the GPU here].",
)
@click.option(
    "--edition",
    "--flavour",
    cls=Renamed,
    type=click.Choice(["tensorrt", "tensorrt-rtx"]),
    help="The TensorRT to build with [full TensorRT where it is installed].",
)
@build_options
@json_option
def build(
    bundle: Path,
    sms: tuple[int, ...] | None,
    edition: str | None,
    building: dict[str, Any],
    as_json: bool,
) -> None:
    """Build a TensorRT engine of BUNDLE, which was exported with --target tensorrt, and add it to the bundle.

    Full TensorRT builds for the GPU of this machine, which is how Orin (SM 87), Hopper (SM 90) and Thor (SM 110) get
    theirs. TensorRT-RTX builds on any machine, for SM 75, 80, 86, 89, 120 and 121, one engine for all of them.
    """
    import json

    from edgelm.bundle import Bundle
    from edgelm.progress import Bars
    from edgelm.runtimes.tensorrt.build import build_bundle
    from edgelm.runtimes.tensorrt.builder import BuildOptions
    from edgelm.runtimes.tensorrt.engine_info import engine_document, engine_lines

    progress = Bars()
    options = BuildOptions(sms or (), **building)
    made = build_bundle(Bundle.open(bundle), options, edition=edition, progress=progress)
    opened = Bundle.open(bundle)
    if as_json:
        click.echo(json.dumps(engine_document(made, opened)))
        return
    progress.note(f"built in {made.seconds:.0f} s")
    for line in engine_lines(made, opened):
        progress.note(line)
