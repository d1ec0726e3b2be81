"""`edgelm install`: copy a bundle to where an app loads it."""

from __future__ import annotations

from pathlib import Path

import click

from edgelm.cli.common.help import verb
from edgelm.cli.common.options import BUNDLE, PATH, json_option, overwrite_option


@verb(example="edgelm install olmoe /opt/my-app/model")
@click.argument("bundle", type=BUNDLE)
@click.argument("dest", type=PATH)
@overwrite_option("the bundle at DEST")
@json_option
def install(bundle: Path, dest: Path, overwrite: bool, as_json: bool) -> None:
    """Copy BUNDLE to the folder DEST and check every file's hash.

    DEST is replaced in one step: it is the old bundle or the new one, even after a crash or a loss of power. Programs
    that run the old bundle keep it until they load again. Do not copy files over a bundle in use yourself: programs map
    them into memory, and crash if a file becomes shorter.
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
