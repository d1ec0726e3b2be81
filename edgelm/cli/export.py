"""`edgelm export`: export a checkpoint to a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelm.cli.common.help import Group, option, verb
from edgelm.cli.common.options import (
    ENGINE_PARAMETERS,
    PATH,
    RecipeName,
    Size,
    Whole,
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


@verb(example="edgelm export allenai/OLMoE-1B-7B-0924 -o olmoe --recipe int4")
@click.argument("checkpoint")
@output_option("Bundle folder to write.", required=True)
@option(
    "--recipe",
    type=RecipeName(),
    metavar="NAME|FILE",
    default_text="int4",
    help="How to quantise: int4, int8, fp8, none (keep floats), or a TOML file. A quantised CHECKPOINT keeps its own.",
)
@option(
    "--target",
    default="cpu",
    type=click.Choice(["cpu", "cuda", "tensorrt"]),
    help="Device to export for: `cpu` and `cuda` run in ONNX Runtime, `tensorrt` in TensorRT with our kernels on an "
    "NVIDIA GPU.",
)
@option(
    "--reference",
    group=Group.PARITY,
    metavar="CHECKPOINT",
    help="Float checkpoint that a quantised CHECKPOINT was made from. Parity then measures the loss against it.",
)
@option(
    "--parity-prompts",
    group=Group.PARITY,
    metavar="FILE",
    type=PATH,
    default_text="built-in prompts",
    help="Prompts to store with the logits of the reference.",
)
@option(
    "--greedy-tokens",
    group=Group.PARITY,
    type=Whole(min=0),
    default_text="16, or 8 for a big model",
    help="Tokens that the reference generates for each prompt.",
)
@mixed_precision_options(Group.MIXED)
@calibration_options
@threads_option("Worker threads.", Group.RESOURCES)
@option(
    "--max-ram",
    group=Group.RESOURCES,
    type=Size(),
    metavar="SIZE",
    default_text="no limit",
    help="Limit on resident memory, for example 3GB.",
)
@option(
    "--ops",
    group=Group.EXPERT,
    default="auto",
    type=click.Choice(["auto", "native", "portable"]),
    help="Operator set: `native` is EdgeLM's own, `portable` is ONNX Runtime's, which runs without EdgeLM's library. "
    "`auto` is native where the library is installed.",
)
@option(
    "--dtype",
    group=Group.EXPERT,
    default="auto",
    type=click.Choice(["auto", "fp32", "fp16", "bf16"]),
    help="Data type of the matrices that stay float, and on a GPU of all values. `auto` is the checkpoint's, or fp16 "
    "for quantised bundles on a GPU.",
)
@option(
    "--sm",
    "sms",
    group=Group.TENSORRT,
    metavar="SM,...",
    callback=chosen_sms,
    default_text="the GPU here, or all supported ones",
    help="Compute capabilities of the GPUs to compile kernels for, for example 86,89.",
)
@engine_options
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
    """Export CHECKPOINT, a folder or a hub id, to a bundle that a device can run."""
    refuse_two(recipe, bits, max_size)
    if target != "tensorrt" and (others := was_given(*ENGINE_PARAMETERS)):
        raise click.UsageError(f"{', '.join(others)}: only for --target tensorrt, but the target is {target}")
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
                "the recipe is in manifest.json; to get it as a file with the cost of each matrix: "
                f"edgelm recipe {checkpoint} {asked} -o FILE"
            )
        if target == "tensorrt" and not _has_gpu():
            progress.note(f"copy it to a machine with the GPU, then: edgelm parity {bundle.path.name}")
        else:
            progress.note(f"try: edgelm run {bundle.path} 'Once upon a time'   and   edgelm parity {bundle.path}")


def _has_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU and a driver for it."""
    from edgelm.errors import DeviceError
    from edgelm.runtimes.cuda.driver import find_devices

    try:
        return bool(find_devices())
    except DeviceError:
        return False


def _refuse_portable(ops: str) -> None:
    """Refuse --bits and --max-size for portable operators, which lack most of the schemes that these choose from.

    Raises:
        click.UsageError: portable operators were asked for.
        ExportError: this installation has only portable operators.
    """
    from edgelm.errors import ExportError
    from edgelm.runtimes.onnxruntime.native_library import library_path

    if ops == "portable" or (ops == "auto" and library_path() is None):
        why = (
            "--bits and --max-size choose among schemes that only native operators have: export with --ops native, or "
            "have a recipe chosen from others (edgelm recipe --schemes int4-g32,int8-g32) and pass it with --recipe"
        )
        raise click.UsageError(why) if ops == "portable" else ExportError(why)
