"""`edgelm build`: build a TensorRT engine for a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgelm.cli.common.help import option, verb
from edgelm.cli.common.options import BUNDLE, build_options, chosen_sms, json_option


@verb(example="edgelm build olmoe-gpu")
@click.argument("bundle", type=BUNDLE)
@option(
    "--edition",
    old_names=("--flavour",),
    type=click.Choice(["tensorrt", "tensorrt-rtx"]),
    default_text="tensorrt where it is installed",
    help="TensorRT edition to build with. `tensorrt` builds for the GPU of this machine only; `tensorrt-rtx` builds on "
    "any machine, one engine for SM 80, 86, 89, 120 and 121.",
)
@option(
    "--sm",
    "sms",
    metavar="SM,...",
    callback=chosen_sms,
    default_text="all the bundle has kernels for; with `tensorrt` the GPU here",
    help="Compute capabilities of the GPUs to build for, for example 86,89.",
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
    """Build a TensorRT engine and add it to BUNDLE.

    BUNDLE must have been exported with --target tensorrt. Orin (SM 87), Hopper (SM 90) and Thor (SM 110) need an engine
    that is built on the device itself, with full TensorRT.
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
