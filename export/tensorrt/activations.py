"""What the products of a bundle for GPUs multiply: a recipe's `activations` as the kernels have them.

FP8 weights meet FP8 with a scale for each token where the recipe asks for it, or else A (bfloat16 or float16), which
all other weights meet. A calibrated scale for all tokens is coarser and saves nothing here: the kernel that rounds a
token reads it anyway. Integers meet A: tensor cores have no product of int8 whose scales change along the columns.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgelm.errors import ExportError
from edgelm.quant.recipe import AUTO, STATIC_ACTIVATIONS
from edgelm.quant.scheme import Fp8Scheme
from edgelm.quant.source import WeightSource

FLOAT = "float"
FP8 = "fp8-token"
_FP8_ASKED = ("fp8-token", "fp8-static")


def of_product(source: WeightSource, names: Sequence[str]) -> str:
    """What a product with these matrices, stacked, multiplies: float where one of them asks for it."""
    return FP8 if all(_asked(source, name) == FP8 for name in names) else FLOAT


def of_experts(source: WeightSource, names: Sequence[str], layer: int) -> str:
    """What the experts of a layer multiply, which are one operator.

    Raises:
        ExportError: the recipe has it differently for some of them.
    """
    first = _asked(source, names[0])
    for name in names:
        if _asked(source, name) != first:
            raise ExportError(
                f"the recipe has {first} activations for {names[0]} and {_asked(source, name)} for {name}: the experts "
                f"of layer {layer} are one operator here, so write one rule for all of them"
            )
    return first


def static_scale(source: WeightSource, names: Sequence[str]) -> dict[str, float]:
    """The attribute `input_scale` of a product: the calibrated scale of its inputs, if the recipe asks for one.

    Our kernels have no use for it; a product that TensorRT computes itself has (`edgelm.export.tensorrt.linear`). The
    matrices of a product have the same inputs, so that their scales differ by what calibration saw alone: the largest
    clips nothing that one of them saw.
    """
    if not all(source.recipe.rule(name).activations in STATIC_ACTIVATIONS for name in names):
        return {}
    scales = [scale for name in names if (scale := source.input_scale(name)) is not None]
    return {"input_scale": float(max(scales))} if len(scales) == len(names) else {}


def about(source: WeightSource) -> str | None:
    """What a user should know whose recipe asks for activations that are others here; None where there are none."""
    asked = {
        rule.activations
        for name in source.shapes
        if source.scheme(name) is not None and (rule := source.recipe.rule(name)).activations != AUTO
    }
    instead = {
        "int8-token": "float",
        "int8-static": "float (int8-static where TensorRT computes a product itself)",
        "fp8-static": "fp8-token, finer than one scale for all (fp8-static where TensorRT computes a product itself)",
    }
    said = "; ".join(f"in place of {kind}: {instead[kind]}" for kind in instead if kind in asked)
    return f"a GPU's bundle multiplies, {said}" if said else None


def _asked(source: WeightSource, name: str) -> str:
    asked = source.recipe.rule(name).activations or AUTO
    return FP8 if isinstance(source.scheme(name), Fp8Scheme) and asked in _FP8_ASKED else FLOAT


assert set(STATIC_ACTIVATIONS) <= {"int8-static", "fp8-static"}
