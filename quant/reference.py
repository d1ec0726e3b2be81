"""The quantised reference: a PyTorch model with quantised weights, rounded activations and a rounded KV cache.

Arithmetic is float32, so it computes what a device computes, up to the order of sums. `reference_module` returns a
whole model in memory. `QuantizedActivations` are hooks for an existing model or a layer-by-layer run.
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
    """Return the rounding of each quantised matrix's input, by matrix name; matrices with float inputs are left out.

    Args:
        source: The checkpoint and its recipe.
        recipe: Recipe whose activations are used; None for the source's own.
        auto: Rounding that "auto" means: "float", "int8-b32" (the native CPU operators), or another key of
            `activations.DYNAMIC` or `STATIC`.

    Raises:
        RecipeError: There is no such rounding.
    """
    kinds: dict[str, str] = {}
    for name, asked in source.activations(recipe).items():
        kind = auto if asked == AUTO else asked
        if kind != FLOAT and kind not in DYNAMIC and kind not in STATIC:
            raise RecipeError(f"there are no activations {kind!r}: give {', '.join((FLOAT, *DYNAMIC, *STATIC))}")
        if kind != FLOAT:
            kinds[name] = kind
    return kinds


class QuantizedActivations(Hooks):
    """Hooks that round the inputs of matmuls and the KV cache.

    Args:
        kinds: Rounding by matrix name, a key of `activations.DYNAMIC` or `STATIC`. Other inputs stay float.
        scales: Scales of the static roundings, by matrix name.
        kv: Type of the cache: "float32", "float16", "int8" or "fp8".
        kv_scales: Calibrated scales of the cache, by layer; None for one scale per head and token.

    Raises:
        RecipeError: A matrix with a static rounding has no scale.
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
                f"{missing[0]} has {self.kinds[missing[0]]} activations, but the checkpoint has no calibrated scale "
                'for it: calibrate, or choose "int8-token" or "fp8-token" in the recipe'
            )

    def inputs(self, matrix: Matrix, x: Tensor) -> Tensor:
        """Round x [..., K], the input of `matrix`."""
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
    """Return the hooks for a recipe's `activations` and `kv`, or None if it rounds neither.

    Args:
        source: The checkpoint and its recipe.
        recipe: Recipe to use; None for the source's own.
        scales: Calibrated scales by matrix; None for those of the checkpoint (`<stem>.input_scale`).
        kv_scales: Calibrated scales of the cache by layer; None for one scale per head and token.
        auto: Rounding of activations that "auto" means.
        auto_kv: Type of the cache that "auto" means.

    Raises:
        RecipeError: A static scale is missing, or there is no such rounding.
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
    """Return the whole model in memory, with quantised weights, activations and cache.

    Args:
        source: The checkpoint and its recipe.
        recipe: Recipe whose activations and cache are used; None for the source's own.
        hooks: Hooks instead of those of `quantized_activations`.
        options: Keyword arguments of `quantized_activations`.

    Raises:
        RecipeError: As `quantized_activations`.
    """
    module = ReferenceModel(source.checkpoint.decoder)
    module.load_weights(source.dequantized().read_float32)
    module.hooks = hooks or quantized_activations(source, recipe, **options)
    module.eval().requires_grad_(False)
    return module
