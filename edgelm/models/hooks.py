"""Looking at, and changing, what a reference model multiplies and what it caches.

A `Hooks` is handed the input of every matrix product under the matrix's name on disk, and the keys and values of every
layer before they are cached. Measuring ranges, collecting inputs for calibration and computing with quantised
activations are all such hooks; without one a model pays an `is None` for each product.

Shape letters as in the model files: B batch, T new tokens, K key/value heads, Dh head width.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

Inputs = Callable[[Tensor], Tensor]
"""From the input [..., columns] of one matrix to what it multiplies in its place."""

ExpertInputs = Callable[[Tensor, int, str], Tensor]
"""The same for the experts of a layer: (rows [n, columns], expert, "gate_proj" | "up_proj" | "down_proj")."""

Cached = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From new keys (after RoPE) and values [B, K, T, Dh] to what is cached and attended to in their place."""


class Hooks:
    """Does nothing: override what is wanted."""

    def inputs(self, name: str, x: Tensor) -> Tensor:
        """Return what the matrix `name` multiplies in place of its input x [..., columns]; x is not to be changed."""
        del name
        return x

    def cached(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return what layer number `layer` caches in place of new keys and values [B, K, T, Dh]."""
        del layer
        return keys, values

    def after_layer(self, layer: int) -> None:
        """Called in layer-by-layer runs when all tokens have gone through layer number `layer`."""


def hook_layer(layer: nn.Module, index: int, hooks: Hooks | None) -> None:
    """Let the products and the cache of one layer of either family go through `hooks`; None takes them away."""
    prefix = f"model.layers.{index}"

    def inputs_of(name: str) -> Inputs | None:
        return None if hooks is None else lambda x: hooks.inputs(name, x)

    def inputs_of_experts(path: str) -> ExpertInputs | None:
        if hooks is None:
            return None
        return lambda x, expert, matrix: hooks.inputs(f"{prefix}.{path}.experts.{expert}.{matrix}.weight", x)

    for path, module in layer.named_modules():
        # Each family has classes of its own; what can be hooked is known by the attribute.
        if hasattr(module, "inputs"):
            module.inputs = inputs_of(f"{prefix}.{path}.weight")
        if hasattr(module, "expert_inputs"):
            module.expert_inputs = inputs_of_experts(path)
        if hasattr(module, "cached"):
            cached = None if hooks is None else (lambda keys, values: hooks.cached(index, keys, values))
            module.cached = cached


def head_name(tied: bool) -> str:
    """Name of the matrix that makes the logits: the embedding's where it is tied."""
    return "model.embed_tokens.weight" if tied else "lm_head.weight"


def hook_model(module: nn.Module, hooks: Hooks | None) -> None:
    """Let a whole model in memory (`Family.module_class`) go through `hooks`; None takes them away.

    The layers are `module.layers`; what the head multiplies comes under `head_name`.
    """
    layers = module.layers
    assert isinstance(layers, nn.ModuleList)
    for index, layer in enumerate(layers):
        hook_layer(layer, index, hooks)
    name = head_name(module.lm_head is None)
    module.head_inputs = None if hooks is None else (lambda x: hooks.inputs(name, x))  # type: ignore[assignment]
