"""Looking at, and changing, what a reference model multiplies and what it caches.

A `Hooks` is handed the input of every matmul with the matrix's spec, and the keys and values of every layer before they
are cached. Measuring ranges, collecting inputs for calibration and computing with quantised activations are all such
hooks.

Shape letters: B batch, T new tokens, K key/value heads, Dh head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edgelm.models.spec import Matrix


class Hooks:
    """Does nothing: override what is wanted."""

    def inputs(self, matrix: Matrix, x: Tensor) -> Tensor:
        """Return what `matrix` multiplies in place of its input x [..., columns]; x is not to be changed."""
        del matrix
        return x

    def outputs(self, matrix: Matrix, x: Tensor, y: Tensor) -> None:
        """Called with what `matrix` multiplied, x [..., columns], and what it made, y [..., rows]."""

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

    def inputs(self, matrix: Matrix, x: Tensor) -> Tensor:
        """Let the later rows of x [n, columns] through."""
        rows = self._rows if matrix.expert is None else self._counts[matrix.expert]
        return x if rows == len(x) else torch.cat([x[:rows], self._hooks.inputs(matrix, x[rows:])])

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
