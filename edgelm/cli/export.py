"""`edgelm export`: a checkpoint to a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelm.cli.common.options import (
    ENGINE_PARAMETERS,
    PATH,
    RecipeName,
    Size,
    as_usage,
    calibration_options,
    chosen_sms,
    engine_options,
    json_option,
    need_export_extra,
    output_option,
    overwrite_option,
    threads_option,
    was_given,
)
from edgelm.cli.common.recipes import choose_mixed_precision, in_json, mixed_precision_options, refuse_two

if TYPE_CHECKING:
    from edgelm.quant.calibration import CalibrationOptions


@click.command()
@click.argument("checkpoint")
@output_option("Bundle folder to write.")
@click.option("--recipe", type=RecipeName(), help="int4 (default), int8, fp8, none, or a TOML file.")
@mixed_precision_options
@click.option(
    "--target",
    default="cpu",
    show_default=True,
    type=click.Choice(["cpu", "cuda", "tensorrt"]),
    help="What the bundle is for: ONNX Runtime on the CPU or on a GPU, or TensorRT with our kernels on a GPU.",
)
@click.option(
    "--ops",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "native", "portable"]),
    help="Operators: EdgeLM's own, or ONNX Runtime's, which need nothing of EdgeLM's to run: `edgelm inspect` says the "
    "oldest ONNX Runtime that has them right; auto is native where they are installed.",
)
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "fp32", "fp16", "bf16"]),
    help="Type of the matrices that the recipe keeps in float, and on a GPU of all values; auto is the checkpoint's, "
    "or fp16 for quantised bundles on a GPU.",
)
@click.option(
    "--sm",
    "sms",
    metavar="SM,...",
    callback=chosen_sms,
    help="With --target tensorrt: the GPUs to compile kernels for, for example 86,89 [the GPU here, or all].",
)
@engine_options
@calibration_options
@click.option(
    "--reference",
    metavar="CHECKPOINT",
    help="The float checkpoint that a quantised one was made from: parity then compares with it.",
)
@click.option("--max-ram", type=Size(), metavar="SIZE", help="Resident memory not to exceed, for example 3GB.")
@click.option("--parity-prompts", type=PATH, help="Golden prompts.")
@click.option("--greedy-tokens", type=click.IntRange(min=0), help="Golden greedy tokens per prompt.")
@threads_option("Worker threads [physical cores allowed].")
@overwrite_option("an existing bundle")
@json_option
def export(
    checkpoint: str,
    out: Path,
    recipe: str | None,
    bits: float | None,
    max_size: int | None,
    target: str,
    ops: str,
    dtype: str,
    sms: tuple[int, ...] | None,
    engine: dict[str, Any],
    calibration: CalibrationOptions | None,
    reference: str | None,
    max_ram: int | None,
    parity_prompts: Path | None,
    greedy_tokens: int | None,
    threads: int | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Export CHECKPOINT (a folder or a hub id) to a bundle.

    With --bits or --max-size the recipe is chosen by what each matrix loses. With --calibration an interrupted run goes
    on where it was when the same command is given again.
    """
    refuse_two(recipe, bits, max_size)
    if target != "tensorrt" and (others := was_given(*ENGINE_PARAMETERS)):
        raise click.UsageError(f"{', '.join(others)}: of use with --target tensorrt only, here it is {target}")
    import json
    import time

    need_export_extra()
    from edgelm.bundle import BUNDLE
    from edgelm.export import ExportOptions, export_bundle
    from edgelm.export.registry import check_request
    from edgelm.export.tensorrt.options import EngineOptions
    from edgelm.parity.golden import GoldenOptions
    from edgelm.progress import Bars
    from edgelm.sizes import format_size

    golden = None
    if parity_prompts is not None or greedy_tokens is not None:
        golden = GoldenOptions.from_arguments(parity_prompts, greedy_tokens)
    with as_usage():
        options = ExportOptions(
            target=target,
            ops=ops,
            dtype=dtype,
            sms=sms,
            engines=EngineOptions(**engine),
            max_ram=max_ram,
            threads=threads,
            overwrite=overwrite,
            golden=golden,
            reference=reference,
        )
        check_request(options)
    progress = Bars()
    start = time.monotonic()
    if bits is not None or max_size is not None:
        _refuse_portable(ops)
    result = choose_mixed_precision(
        checkpoint,
        out,
        BUNDLE,
        reference=reference,
        bits=bits,
        max_size=max_size,
        calibration=calibration,
        overwrite=overwrite,
        progress=progress,
    )
    chosen = recipe if result is None else result.recipe
    bundle = export_bundle(checkpoint, out, recipe=chosen, options=options, calibration=calibration, progress=progress)
    seconds = time.monotonic() - start
    if as_json:
        summary = {"bundle": str(bundle.path), "bytes": bundle.size, "seconds": round(seconds, 1)}
        extra = {} if result is None else {"budget": in_json(result)}
        click.echo(json.dumps(summary | {"recipe": bundle.manifest.recipe.name, **extra}))
    else:
        progress.note(f"{bundle.path}: {format_size(bundle.size)}, {bundle.manifest.recipe.name}, in {seconds:.0f} s")
        if result is not None:
            asked = f"--bits {bits:g}" if max_size is None else f"--max-size {max_size}"
            progress.note(
                "the recipe stands in its manifest.json; as a file to edit, with what each matrix costs: "
                f"edgelm recipe {checkpoint} {asked} -o FILE"
            )
        progress.note(f"try: edgelm run {bundle.path} 'Once upon a time'   and   edgelm parity {bundle.path}")


def _refuse_portable(ops: str) -> None:
    """Refuse --bits and --max-size for portable operators, which lack most of the schemes that these choose from.

    Raises:
        click.UsageError: portable operators were asked for.
        ExportError: this installation has no others.
    """
    from edgelm.errors import ExportError
    from edgelm.runtimes.onnxruntime.native_library import library_path

    if ops == "portable" or (ops == "auto" and library_path() is None):
        why = (
            "--bits and --max-size choose among schemes that only native operators have: export with --ops native, or "
            "have a recipe chosen from others (edgelm recipe --schemes int4-g32,int8-g32) and pass it with --recipe"
        )
        raise click.UsageError(why) if ops == "portable" else ExportError(why)
