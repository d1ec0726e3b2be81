"""`edgelm recipe`: choose the bits of each matrix, and write them as a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgelm.cli.common.help import Group, option, verb
from edgelm.cli.common.options import (
    Whole,
    as_usage,
    given,
    json_option,
    need_export_extra,
    output_option,
    overwrite_option,
)
from edgelm.cli.common.recipes import in_json, in_words, mixed_precision_options

DEFAULT_FILE = "mixed-precision.toml"


@verb(example="edgelm recipe allenai/OLMoE-1B-7B-0924 --bits 4.5 -o olmoe.toml")
@click.argument("checkpoint")
@mixed_precision_options(Group.COMMON)
@output_option("TOML file to write.", metavar="FILE", default_text=DEFAULT_FILE)
@option(
    "--schemes",
    metavar="NAMES",
    default_text="int3 to int8",
    help="Schemes to choose from, for example int3-g32,int4-g32,int8-g128,float.",
)
@option(
    "--calibration",
    "text",
    metavar="TEXT",
    default="builtin",
    help="Text to measure with: a file, a folder, or `builtin` (Python's standard library).",
)
@option("--tokens", type=Whole(min=2), default_text="8192", help="Tokens of that text to measure with.")
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
    """Choose the bits of each matrix of CHECKPOINT, and write a recipe.

    Measures how much quantising each matrix changes the model's output, and spends the bits where they help most.
    `edgelm export` and `edgelm quantize` take the recipe with --recipe.
    """
    if (bits is None) == (max_size is None):
        raise click.UsageError("give --bits or --max-size, one of them")
    import json
    import time

    need_export_extra()
    from edgelm.files import atomic_file
    from edgelm.output_paths import check_output
    from edgelm.progress import Bars
    from edgelm.quant.mixed_precision import mixed_precision_recipe, parse_candidates
    from edgelm.quant.recipe import RECIPE

    with as_usage():
        candidates = None if schemes is None else parse_candidates(schemes)
    out = out or Path(DEFAULT_FILE)
    check_output(out, RECIPE, sources=[checkpoint], overwrite=overwrite)
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
        partial.write_text(result.toml, encoding="utf-8", newline="\n")
    seconds = time.monotonic() - start
    if as_json:
        click.echo(json.dumps(_document(result, out, seconds)))
        return
    click.echo(f"{out}: {in_words(result)}, in {seconds:.0f} s\n\n{_summary(result)}")
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
    return grid(["matrix", "weights", "bits", "KL, nats/token", "schemes"], rows)
