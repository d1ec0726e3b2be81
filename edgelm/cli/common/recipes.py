"""The recipe of a verb: one that the user names, or a mixed-precision recipe for --bits or --max-size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgelm.cli.common.help import Group, option
from edgelm.cli.common.options import Number, Size, need_export_extra

if TYPE_CHECKING:
    from edgelm.output_paths import OutputKind
    from edgelm.progress import Progress
    from edgelm.quant.calibration import CalibrationOptions
    from edgelm.quant.mixed_precision import MixedPrecision
    from edgelm.quant.recipe import Recipe

Command = TypeVar("Command", bound=Callable[..., Any])


def mixed_precision_options(group: Group) -> Callable[[Command], Command]:
    """--bits and --max-size, under the heading `group`."""

    def decorate(command: Command) -> Command:
        command = option(
            "--max-size",
            group=group,
            type=Size(),
            metavar="SIZE",
            help="Largest size of the bundle's weights file, for example 3.2GB. Give this or --bits.",
        )(command)
        return option(
            "--bits",
            group=group,
            type=Number(0, 32, min_open=True),
            help="Mean number of bits of a weight, scales included, for example 4.5.",
        )(command)

    return decorate


def refuse_two(recipe: str | None, bits: float | None, max_size: int | None) -> None:
    """Check that at most one of --recipe, --bits and --max-size was given.

    Raises:
        click.UsageError: more than one was given.
    """
    if sum(value is not None for value in (recipe, bits, max_size)) > 1:
        raise click.UsageError("give only one of --recipe, --bits and --max-size")


def choose_mixed_precision(
    checkpoint: str,
    out: Path,
    kind: OutputKind,
    *,
    reference: str | None = None,
    bits: float | None,
    max_size: int | None,
    calibration: CalibrationOptions | None,
    overwrite: bool,
    progress: Progress,
) -> MixedPrecision | None:
    """Choose the recipe for --bits or --max-size, measured with the text of --calibration.

    Returns:
        None where neither option was given.

    Raises:
        EdgeLMError: the output cannot be written to `out`, or no recipe is that small.
    """
    if bits is None and max_size is None:
        return None
    need_export_extra()
    from edgelm.corpus import BUILTIN
    from edgelm.output_paths import check_output
    from edgelm.quant.mixed_precision import TOKENS, mixed_precision_recipe
    from edgelm.sizes import format_size

    # Check the output first: measuring takes minutes.
    check_output(out, kind, sources=[checkpoint, reference], overwrite=overwrite)
    # Use no more tokens than the calibration does.
    tokens = TOKENS if calibration is None else min(TOKENS, calibration.samples * calibration.length)
    result = mixed_precision_recipe(
        checkpoint,
        bits=bits,
        max_size=max_size,
        text=BUILTIN if calibration is None else calibration.text,
        tokens=tokens,
        name=f"bits-{bits:g}" if max_size is None else f"size-{''.join(format_size(max_size).split())}",
        progress=progress,
    )
    progress.note(f"chosen: {in_words(result)}")
    return result


def chosen(recipe: str | None, result: MixedPrecision | None, default: str) -> Recipe:
    """Return the mixed-precision recipe if there is one, else the named recipe, else the default.

    Raises:
        RecipeError: there is no recipe of that name.
    """
    from edgelm.quant.recipe import Recipe

    return result.recipe if result is not None else Recipe.load(recipe or default)


def in_words(result: MixedPrecision) -> str:
    """Return a one-line summary of the recipe: bits, size, expected loss."""
    from edgelm.sizes import format_size

    return (
        f"{result.bits:.2f} bits per weight, a weights file of {format_size(result.file_bytes)}, expected KL "
        f"{result.predicted:.1e} nats per token (lowest possible with these schemes: {result.bound:.1e})"
    )


def in_json(result: MixedPrecision) -> dict[str, Any]:
    """Return the same for a JSON document."""
    return {
        "bits": round(result.bits, 4),
        "bytes": result.nbytes,
        "file_bytes": result.file_bytes,
        "predicted_kl": result.predicted,
        "bound_kl": result.bound,
        "text": result.text,
        "tokens": result.tokens,
        "notes": list(result.notes),
    }
