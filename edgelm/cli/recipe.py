"""`edgelm recipe`: bits where they matter, as a recipe to read, edit, and quantise with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgelm.cli.common.options import as_usage, given, json_option, need_export_extra, output_option, overwrite_option
from edgelm.cli.common.recipes import in_json, in_words, mixed_precision_options


@click.command()
@click.argument("checkpoint")
@mixed_precision_options
@output_option("TOML file to write [mixed-precision.toml].", required=False)
@click.option(
    "--calibration", "text", default="builtin", show_default=True, help="Text to measure with: a file or a folder."
)
@click.option("--tokens", type=click.IntRange(min=2), help="Tokens to measure with [8192].")
@click.option("--schemes", metavar="NAMES", help="To choose from, for example int3-g32,int4-g32,int8-g128,float.")
@overwrite_option("an existing recipe")
@json_option
def recipe(
    checkpoint: str,
    bits: float | None,
    max_size: int | None,
    out: Path | None,
    text: str,
    tokens: int | None,
    schemes: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Measure which matrices of CHECKPOINT (a folder or a hub id) lose most, and give them more bits than others.

    The result is a recipe for `edgelm quantize` and `edgelm export`.
    """
    if (bits is None) == (max_size is None):
        raise click.UsageError("give either --bits or --max-size")
    import json
    import time

    need_export_extra()
    from edgelm.files import atomic_file
    from edgelm.places import check_place
    from edgelm.progress import Bars
    from edgelm.quant.mixed_precision import mixed_precision_recipe, parse_candidates
    from edgelm.quant.recipe import RECIPE

    with as_usage():
        candidates = None if schemes is None else parse_candidates(schemes)
    out = out or Path("mixed-precision.toml")
    check_place(out, RECIPE, sources=[checkpoint], overwrite=overwrite)
    progress = Bars()
    start = time.monotonic()
    result = mixed_precision_recipe(
        checkpoint,
        bits=bits,
        max_size=max_size,
        text=text,
        name=out.stem,
        progress=progress,
        **given(tokens=tokens, schemes=candidates),
    )
    with atomic_file(out, RECIPE, sources=[checkpoint], overwrite=overwrite) as partial:
        partial.write_text(result.toml, encoding="utf-8")
    seconds = time.monotonic() - start
    if as_json:
        click.echo(json.dumps(_document(result, out, seconds)))
        return
    click.echo(_summary(result))
    progress.note(f"{out}: {in_words(result)}, in {seconds:.0f} s")
    progress.note(f"try: edgelm export {checkpoint} -o BUNDLE --recipe {out}")


def _document(result: Any, out: Path, seconds: float) -> dict[str, Any]:
    from edgelm.quant.mixed_precision.recipe_toml import table

    return {"recipe": str(out), **in_json(result), "kinds": table(result.choices), "seconds": round(seconds, 1)}


def _summary(result: Any) -> str:
    from edgelm.cli.common.output import grid
    from edgelm.quant.mixed_precision.recipe_toml import table

    rows = []
    for row in table(result.choices):
        schemes = ", ".join(f"{count} x {scheme}" for scheme, count in list(row["schemes"].items())[:4])  # type: ignore[attr-defined]
        rows.append([str(row["kind"]), f"{row['weights']:,}", f"{row['bits']:.2f}", f"{row['loss']:.1e}", schemes])
    return grid(["", "weights", "bits", "nats a token", "schemes"], rows)
