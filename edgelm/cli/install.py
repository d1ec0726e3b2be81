"""`edgelm install`: a bundle to the place where an app finds it."""

from __future__ import annotations

from pathlib import Path

import click

from edgelm.cli.common.options import BUNDLE, PATH, json_option, overwrite_option


@click.command()
@click.argument("bundle", type=BUNDLE)
@click.argument("dest", type=PATH)
@overwrite_option("the bundle at DEST")
@json_option
def install(bundle: Path, dest: Path, overwrite: bool, as_json: bool) -> None:
    """Copy BUNDLE to the folder DEST, checking every file's hash on the way.

    At any moment DEST is the old bundle or the new one, whole, even after a kill or a loss of power. Programs that run
    the old bundle go on with it until they load again. Files of a bundle must never be written in place: a program maps
    them into its memory, and a file that becomes shorter would end it.
    """
    import json
    import time

    from edgelm.bundle import Bundle
    from edgelm.progress import Bars
    from edgelm.sizes import format_size

    start = time.monotonic()
    installed = Bundle.open(bundle).install(dest, overwrite=overwrite, progress=Bars())
    seconds = time.monotonic() - start
    if as_json:
        click.echo(json.dumps({"bundle": str(dest), "bytes": installed.size, "seconds": round(seconds, 1)}))
    else:
        click.echo(f"{dest}: {format_size(installed.size)}, every file is what was exported, in {seconds:.0f} s")
        click.echo(f"try: edgelm parity {dest}")
