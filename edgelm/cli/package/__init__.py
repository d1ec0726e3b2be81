"""`edgelm package`: write a kit, one file to check and run a bundle on a machine without a network."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from edgelm.cli.common.help import option, verb
from edgelm.cli.common.options import BUNDLE, PATH, as_usage, json_option, output_option, overwrite_option
from edgelm.system.platforms import PLATFORMS


class Pythons(click.ParamType[tuple[str, ...]]):
    """Versions of Python 3, as "3.11,3.13"."""

    name = "versions"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Return the versions."""
        if isinstance(value, tuple):
            return value
        found = tuple(part.strip() for part in value.split(","))
        if not all(re.fullmatch(r"3\.\d{1,2}", one) for one in found):
            self.fail(f"{value!r} is no list of versions of Python: write for example 3.11,3.13", param, ctx)
        return found


class _PlatformName(click.Choice[str]):
    """A platform. Where it is missing, the error is one line; click writes a line for each choice."""

    def get_missing_message(self, param: click.Parameter, ctx: click.Context | None) -> str:
        """Return what to give."""
        return f"Choose from {', '.join(self.choices)}."


@verb(example="edgelm package olmoe -o olmoe-kit.tar.zst --for linux-aarch64")
@click.argument("bundle", type=BUNDLE)
@output_option(
    "The kit: a file that ends with .tar.zst, .tar.gz, .tar or .zip, or a folder.", metavar="KIT", required=True
)
@option(
    "--for",
    "platform",
    metavar="PLATFORM",
    type=_PlatformName(list(PLATFORMS)),
    required=True,
    help="linux-aarch64 (Raspberry Pi, Jetson), linux-x86_64, macos-arm64 or windows-x86_64.",
)
@option("--c", "c", is_flag=True, help="Take the C library and a parity program, which need no Python.")
@option(
    "--python",
    "pythons",
    metavar="VERSIONS",
    type=Pythons(),
    default_text="those of the platform's systems, such as 3.11,3.13",
    help="Versions of Python to take packages for.",
)
@option(
    "--dist",
    metavar="DIR",
    type=PATH,
    default_text="dist here, else in the checkout",
    help="Folder with EdgeLM's own wheels and C libraries, which `make wheels` makes.",
)
@option(
    "--wheels",
    metavar="DIR",
    type=PATH,
    default_text="downloaded with pip, and cached",
    help="Folder with the wheels of all other packages.",
)
@overwrite_option("an existing kit")
@json_option
def package(
    bundle: Path,
    out: Path,
    platform: str,
    c: bool,
    pythons: tuple[str, ...] | None,
    dist: Path | None,
    wheels: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write a kit: BUNDLE and what runs it on a device offline.

    Unpack it there and type `sh check.sh`: it checks every file, runs the parity check, and its exit code is 0 only if
    that passed. It needs Python alone, without pip; with --c a shell alone.
    """
    import json
    import time

    from edgelm.kit import archives
    from edgelm.kit.package import document
    from edgelm.kit.package import package as write
    from edgelm.progress import Bars
    from edgelm.sizes import format_size

    with as_usage():
        archives.suffix_of(out)
    if c and pythons:
        raise click.UsageError("--python: not with --c, which takes no Python packages")
    start = time.monotonic()
    result = write(
        bundle, out, platform=platform, c=c, pythons=pythons or (), dist=dist, wheels=wheels,
        overwrite=overwrite, progress=Bars(),
    )  # fmt: skip
    seconds = time.monotonic() - start
    if as_json:
        click.echo(json.dumps({**document(result), "seconds": round(seconds, 1)}))
        return
    what = f"Python {', '.join(result.pythons)}" if result.pythons else "the C library"
    click.echo(
        f"{out}: {format_size(result.bytes)} ({format_size(result.unpacked_bytes)} unpacked), {result.files} files, "
        f"for {platform} with {what}, in {seconds:.0f} s"
    )
    click.echo("there: unpack it, then  " + ("check" if platform.startswith("windows-") else "sh check.sh"))
