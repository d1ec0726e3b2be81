"""The reference model of a recipe: quantised weights, activations rounded, the cache rounded; float32 arithmetic.

This is what a device computes, but for the order of sums. `reference_module` gives a whole model in memory, and
`QuantizedActivations` are the hooks for one that exists already or for a layer-by-layer run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from edgelm.errors import RecipeError
from edgelm.models.spec import Matrix
from edgelm.quant.activations import DYNAMIC, STATIC, KvScales, round_cache
from edgelm.quant.recipe import AUTO, FLOAT, Recipe
from edgelm.quant.source import WeightSource
from edgelm.reference.hooks import Hooks
from edgelm.reference.module import ReferenceModel


def activation_kinds(source: WeightSource, recipe: Recipe | None = None, *, auto: str = FLOAT) -> dict[str, str]:
    """Return how the input of each quantised matrix is rounded, by its name; inputs that stay float are left out.

    A matrix that the recipe keeps in float multiplies floats.

    Args:
        source: the checkpoint and its recipe.
        recipe: asked for the activations in place of the source's own.
        auto: what "auto" stands for: "float", "int8-b32" (the native CPU operators), or any key of DYNAMIC, STATIC.

    Raises:
        RecipeError: there is no such kind.
    """
    kinds: dict[str, str] = {}
    for name, asked in source.activations(recipe).items():
        kind = auto if asked == AUTO else asked
        if kind != FLOAT and kind not in DYNAMIC and kind not in STATIC:
            raise RecipeError(f"no activations {kind}: give {', '.join((FLOAT, *DYNAMIC, *STATIC))}")
        if kind != FLOAT:
            kinds[name] = kind
    return kinds


class QuantizedActivations(Hooks):
    """Rounds what matrices multiply and what is cached.

    Args:
        kinds: of each matrix by its name, a key of `activations.DYNAMIC` or `STATIC`; others stay float.
        scales: of the static ones.
        kv: type of the cache: "float32", "float16", "int8", "fp8".
        kv_scales: calibrated scales of the cache by layer; None is a scale for each head and token.

    Raises:
        RecipeError: a static matrix has no scale.
    """

    def __init__(
        self,
        kinds: Mapping[str, str],
        scales: Mapping[str, float] | None = None,
        *,
        kv: str = "float32",
        kv_scales: Mapping[int, KvScales] | None = None,
    ) -> None:
        self.kinds = dict(kinds)
        self.scales = dict(scales or {})
        self.kv = kv
        self.kv_scales = kv_scales
        missing = [name for name, kind in self.kinds.items() if kind in STATIC and name not in self.scales]
        if missing:
            raise RecipeError(
                f"{missing[0]} has {self.kinds[missing[0]]} activations, whose scale is calibrated, and none is known: "
                'calibrate, or choose "int8-token" or "fp8-token" in the recipe'
            )

    def inputs(self, matrix: Matrix, x: Tensor) -> Tensor:
        """Round x [..., K] as `matrix` has it."""
        kind = self.kinds.get(matrix.name)
        if kind is None:
            return x
        if kind in DYNAMIC:
            return DYNAMIC[kind](x)
        return STATIC[kind].rounding(x, self.scales[matrix.name])

    def cached(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Round keys and values [B, K, T, Dh] to the cache's type."""
        return round_cache(keys, values, self.kv, None if self.kv_scales is None else self.kv_scales[layer])


def quantized_activations(
    source: WeightSource,
    recipe: Recipe | None = None,
    *,
    scales: Mapping[str, float] | None = None,
    kv_scales: Mapping[int, KvScales] | None = None,
    auto: str = FLOAT,
    auto_kv: str = "float32",
) -> QuantizedActivations | None:
    """Return the hooks of a recipe's `activations` and `kv`, None where it rounds neither.

    Args:
        source: the checkpoint and its recipe.
        recipe: asked in place of the source's own.
        scales: calibrated, by matrix; None are those that the checkpoint holds (`<stem>.input_scale`).
        kv_scales: calibrated, by layer; None is a scale for each head and token.
        auto: what activations of "auto" are.
        auto_kv: what a cache of "auto" is.

    Raises:
        RecipeError: a static scale is missing, or there is no such kind.
    """
    recipe = recipe or source.recipe
    kinds = activation_kinds(source, recipe, auto=auto)
    kv = auto_kv if recipe.kv == AUTO else recipe.kv
    if not kinds and kv == "float32":
        return None
    if scales is None:
        stored = {name: source.input_scale(name) for name in kinds}
        scales = {name: scale for name, scale in stored.items() if scale is not None}
    return QuantizedActivations(kinds, scales, kv=kv, kv_scales=kv_scales)


@torch.no_grad()
def reference_module(
    source: WeightSource, recipe: Recipe | None = None, *, hooks: Hooks | None = None, **options: Any
) -> ReferenceModel:
    """Return the whole model in memory, its logits those of quantised weights, activations and cache.

    Args:
        source: the checkpoint and its recipe.
        recipe: asked for activations and cache in place of the source's own.
        hooks: in place of those of `quantized_activations`.
        options: of `quantized_activations`.

    Raises:
        RecipeError: as there.
    """
    module = ReferenceModel(source.checkpoint.decoder)
    module.load_weights(source.dequantized().read_float32)
    module.hooks = hooks or quantized_activations(source, recipe, **options)
    module.eval().requires_grad_(False)
    return module
