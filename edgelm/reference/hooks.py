"""Hooks of the reference model: observe or replace the inputs of matmuls, and the keys and values that are cached.

A `Hooks` gets the input of every matmul with the matrix's spec, and the keys and values of every layer before they are
cached. They serve to measure ranges, to collect inputs for calibration, and to compute with quantised activations.

Shape letters: B batch, T new tokens, K key/value heads, Dh head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edgelm.models.spec import Matrix


class Hooks:
    """Base class of hooks. Its methods do nothing; override those needed."""

    def inputs(self, matrix: Matrix, x: Tensor) -> Tensor:
        """Return the input for `matrix` in place of x [..., columns], which must not be changed."""
        del matrix
        return x

    def outputs(self, matrix: Matrix, x: Tensor, y: Tensor) -> None:
        """Called with the input x [..., columns] and the output y [..., rows] of `matrix`, before its bias."""

    def routed(self, layer: int, chosen: Tensor) -> None:
        """Called with the experts [..., A] selected in a layer, before they compute."""

    def cached(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values to cache in a layer in place of the new ones, [B, K, T, Dh] each."""
        del layer
        return keys, values

    def after_layer(self, layer: int) -> None:
        """Called in layer-by-layer runs when all tokens have been through a layer."""


class LaterRows(Hooks):
    """Applies `hooks` to the later sequences of a layer-by-layer run only, so that two models share one run.

    The rows of an expert are in the order of the tokens, so those of the later sequences come last.

    Args:
        hooks: the hooks to apply.
        lengths: tokens of each sequence.
        first: the first sequence to which they apply.
    """

    def __init__(self, hooks: Hooks, lengths: Sequence[int], first: int) -> None:
        self._hooks = hooks
        self._first = first
        self._rows = sum(lengths[:first])
        self._sequence = 0
        self._counts: list[int] = []

    def inputs(self, matrix: Matrix, x: Tensor) -> Tensor:
        """Apply the hooks to the later rows of x [n, columns]."""
        rows = self._rows if matrix.expert is None else self._counts[matrix.expert]
        return x if rows == len(x) else torch.cat([x[:rows], self._hooks.inputs(matrix, x[rows:])])

    def routed(self, layer: int, chosen: Tensor) -> None:
        """Count the rows that each expert gets from the earlier sequences."""
        before = chosen.reshape(-1, chosen.shape[-1])[: self._rows]
        self._counts = torch.bincount(before.reshape(-1), minlength=int(chosen.max()) + 1).tolist()
        self._hooks.routed(layer, chosen)

    def cached(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the hooks to the later sequences. In each layer, this is called for one sequence after the other."""
        self._sequence += 1
        return self._hooks.cached(layer, keys, values) if self._sequence > self._first else (keys, values)

    def after_layer(self, layer: int) -> None:
        """Begin to count the sequences again for the next layer."""
        self._sequence = 0
        self._hooks.after_layer(layer)
