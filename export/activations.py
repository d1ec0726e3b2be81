"""What the products of a bundle for processors multiply: a recipe's `activations` as the operators can have them.

Weights of integers meet int8 with a scale for every block of a row, or float32; all other weights meet float32. A scale
for each token, or one calibrated for all, would be coarser than a block's and gains nothing here, so int8-token and
int8-static become int8 in blocks; FP8 activations are for processors that multiply FP8, and become float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgelm.errors import ExportError
from edgelm.quant.recipe import ACTIVATIONS, AUTO, FLOAT, STATIC_ACTIVATIONS
from edgelm.quant.scheme import Scheme
from edgelm.quant.source import WeightSource

INT8 = "int8"
FLOAT32 = "float32"

_OF_INTEGERS: Mapping[str, str] = {
    AUTO: INT8,
    FLOAT: FLOAT32,
    "int8-token": INT8,
    "int8-static": INT8,
    "fp8-token": FLOAT32,
    "fp8-static": FLOAT32,
}
assert tuple(_OF_INTEGERS) == ACTIVATIONS


def of_product(source: WeightSource, names: Sequence[str]) -> str:
    """What a product with these matrices, stacked, multiplies: float32 where the recipe has it for one of them."""
    return FLOAT32 if FLOAT32 in _asked(source, names).values() else INT8


def of_experts(source: WeightSource, names: Sequence[str], layer: int) -> str:
    """What the experts of a layer multiply, which are one operator.

    Raises:
        ExportError: the recipe has it differently for some of them.
    """
    asked = _asked(source, names)
    first = next(iter(asked), "")
    for name, kind in asked.items():
        if kind != asked[first]:
            raise ExportError(
                f"the recipe has {asked[first]} activations for {first} and {kind} for {name}: the experts of layer "
                f"{layer} are one operator here, so write one rule for all of them"
            )
    return asked.get(first, INT8)


def rounded(source: WeightSource, names: Sequence[str], kind: str, block: int) -> dict[str, int]:
    """Matrices of a matmul with activations `kind` that multiply int8, and in blocks of how many columns."""
    return {name: block for name in names if kind == INT8 and isinstance(source.scheme(name), Scheme)}


def about_static(source: WeightSource) -> str | None:
    """What a user who asked for static activations should know of a processor's; None where nobody did."""
    kinds = {source.recipe.rule(name).activations for name in source.static_inputs}
    if not kinds:
        return None
    instead = {
        "int8-static": "int8 in blocks (float32 with FP8 weights), finer than one scale for all",
        "fp8-static": "float32 in place of FP8",
    }
    said = "; ".join(f"{kind}: {instead[kind]}" for kind in STATIC_ACTIVATIONS if kind in kinds)
    return f"static activations are for other devices, a processor's bundle needs no scales of them: it has {said}"


def _asked(source: WeightSource, names: Sequence[str]) -> dict[str, str]:
    """Matrices of integers, which alone leave a choice."""
    integers = [name for name in names if isinstance(source.scheme(name), Scheme)]
    return {name: _OF_INTEGERS[source.recipe.rule(name).activations or AUTO] for name in integers}
