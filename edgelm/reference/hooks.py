"""Looking at, and changing, what a reference model multiplies and what it caches.

A `Hooks` is handed the input of every matrix product under the matrix's name on disk, and the keys and values of every
layer before they are cached. Measuring ranges, collecting inputs for calibration and computing with quantised
activations are all such hooks; without one a model pays an `is None` for each product.

Shape letters as in the model files: B batch, T new tokens, K key/value heads, Dh head width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

_EXPERT = re.compile(r"\.experts\.(\d+)\.")

Inputs = Callable[[Tensor], Tensor]
"""From the input [..., columns] of one matrix to what it multiplies in its place."""

ExpertInputs = Callable[[Tensor, int, str], Tensor]
"""The same for the experts of a layer: (rows [n, columns], expert, "gate_proj" | "up_proj" | "down_proj")."""

Routed = Callable[[Tensor], None]
"""Told the chosen experts [..., A] of a layer before these compute."""

Cached = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From new keys (after RoPE) and values [B, K, T, Dh] to what is cached and attended to in their place."""


class Hooks:
    """Does nothing: override what is wanted."""

    def inputs(self, name: str, x: Tensor) -> Tensor:
        """Return what the matrix `name` multiplies in place of its input x [..., columns]; x is not to be changed."""
        del name
        return x

    def routed(self, layer: int, chosen: Tensor) -> None:
        """Called with the experts [..., A] that layer number `layer` chose, before they compute."""

    def cached(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return what layer number `layer` caches in place of new keys and values [B, K, T, Dh]."""
        del layer
        return keys, values

    def after_layer(self, layer: int) -> None:
        """Called in layer-by-layer runs when all tokens have gone through layer number `layer`."""


class LaterRows(Hooks):
    """Lets `hooks` change the later sequences of a layer-by-layer sweep alone, so that two models share one sweep.

    The experts' rows are in the order of the tokens, so that those of the later sequences are the last.

    Args:
        hooks: what the later sequences go through.
        lengths: tokens of each sequence of the sweep.
        first: the first sequence that goes through `hooks`.
    """

    def __init__(self, hooks: Hooks, lengths: Sequence[int], first: int) -> None:
        self._hooks = hooks
        self._first = first
        self._rows = sum(lengths[:first])
        self._sequence = 0
        self._counts: list[int] = []

    def inputs(self, name: str, x: Tensor) -> Tensor:
        """Let the later rows of x [n, columns] through."""
        expert = _EXPERT.search(name)
        rows = self._rows if expert is None else self._counts[int(expert[1])]
        return x if rows == len(x) else torch.cat([x[:rows], self._hooks.inputs(name, x[rows:])])

    def routed(self, layer: int, chosen: Tensor) -> None:
        """Count the rows that each expert gets of the sequences before."""
        before = chosen.reshape(-1, chosen.shape[-1])[: self._rows]
        self._counts = torch.bincount(before.reshape(-1), minlength=int(chosen.max()) + 1).tolist()
        self._hooks.routed(layer, chosen)

    def cached(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Let those of the later sequences through; a layer attends for one sequence after the other."""
        self._sequence += 1
        return self._hooks.cached(layer, keys, values) if self._sequence > self._first else (keys, values)

    def after_layer(self, layer: int) -> None:
        """Start with the first sequence again."""
        self._sequence = 0
        self._hooks.after_layer(layer)


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
        if hasattr(module, "routed"):
            module.routed = None if hooks is None else (lambda chosen: hooks.routed(index, chosen))
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
