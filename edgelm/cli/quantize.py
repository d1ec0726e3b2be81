"""`edgelm quantize`: quantise a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelm.cli.common.help import Group, option, verb
from edgelm.cli.common.options import (
    RecipeName,
    calibration_options,
    json_option,
    output_option,
    overwrite_option,
    threads_option,
)
from edgelm.cli.common.recipes import choose_mixed_precision, chosen, in_json, mixed_precision_options, refuse_two

if TYPE_CHECKING:
    from edgelm.quant.calibration import CalibrationOptions

RECIPE_FILE = "recipe.toml"
_OWN, _FOR_VLLM = "edgelm", "compressed-tensors"


@verb(example="edgelm quantize allenai/OLMoE-1B-7B-0924 -o olmoe-int4 --calibration builtin")
@click.argument("checkpoint")
@output_option("Checkpoint folder to write.", required=True)
@option(
    "--recipe",
    type=RecipeName(),
    metavar="NAME|FILE",
    default_text="int4",
    help="How to quantise: int4, int8, fp8, or a TOML file.",
)
@option(
    "--format",
    "layout",
    type=click.Choice((_OWN, _FOR_VLLM)),
    default=_OWN,
    help="Layout of the checkpoint: `compressed-tensors` is for vLLM and transformers. There int4 has groups of 128, "
    "int8 a scale for each row, and embedding, head and routers stay float.",
)
@mixed_precision_options(Group.MIXED)
@calibration_options
@threads_option("Worker threads.", Group.RESOURCES)
@overwrite_option("a checkpoint that EdgeLM wrote,")
@json_option
def quantize(
    checkpoint: str,
    out: Path,
    recipe: str | None,
    layout: str,
    bits: float | None,
    max_size: int | None,
    calibration: CalibrationOptions | None,
    threads: int | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Quantise CHECKPOINT, a folder or a hub id, to a smaller checkpoint.

    `edgelm export` takes the result like any other checkpoint. With --bits or --max-size the folder also holds the
    recipe that was chosen, as recipe.toml.
    """
    refuse_two(recipe, bits, max_size)
    if layout != _OWN and (bits is not None or max_size is not None):
        raise click.UsageError(
            f"--bits and --max-size choose schemes that {layout} does not have: give --recipe with --format {layout}"
        )
    import dataclasses
    import json
    import time

    from edgelm.checkpoint.written import CHECKPOINT
    from edgelm.progress import Bars
    from edgelm.quant.checkpoint import QuantizedSummary, quantize_checkpoint
    from edgelm.sizes import format_size

    progress = Bars()
    start = time.monotonic()
    result = choose_mixed_precision(
        checkpoint,
        out,
        CHECKPOINT,
        bits=bits,
        max_size=max_size,
        calibration=calibration,
        overwrite=overwrite,
        progress=progress,
    )
    # A checkpoint has no .toml files, so this name is free.
    writing: dict[str, Any] = {"format": layout, "threads": threads, "overwrite": overwrite, "progress": progress}
    writing["extra_files"] = None if result is None else {RECIPE_FILE: result.toml}
    plan = chosen(recipe, result, "int4")
    made: QuantizedSummary
    extra: dict[str, Any] = {} if result is None else {"budget": in_json(result)}
    if calibration is None:
        made = quantize_checkpoint(checkpoint, out, plan, **writing)
    else:
        from edgelm.quant.calibration import calibrate_checkpoint

        made = calibrated = calibrate_checkpoint(checkpoint, out, plan, **vars(calibration), **writing)
        extra["calibration"] = dataclasses.asdict(calibrated.report.info)
    seconds = time.monotonic() - start
    if as_json:
        document = {
            "checkpoint": str(made.path),
            "recipe": made.recipe.name,
            "format": layout,
            "bytes": made.stored_bytes,
            "source_bytes": made.source_bytes,
            "bits_per_weight": round(made.bits_per_weight, 3),
            "quantized_tensors": made.quantized_tensors,
            "float_tensors": made.float_tensors,
            "seconds": round(seconds, 1),
        }
        click.echo(json.dumps(document | extra))
    else:
        progress.note(
            f"{made.path}: {made.quantized_tensors:,} tensors quantised, {made.float_tensors:,} kept, "
            f"{format_size(made.source_bytes)} -> {format_size(made.stored_bytes)} "
            f"({made.bits_per_weight:.2f} bits per weight), {made.recipe.name}, in {seconds:.0f} s"
        )
        if result is not None:
            progress.note(f"its recipe, to read and edit: {made.path / RECIPE_FILE}")
        use = f"edgelm export {made.path} -o BUNDLE" if layout == _OWN else f"vllm serve {made.path}"
        progress.note(f"try: {use}")
