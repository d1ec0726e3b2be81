"""What is kept of a model's layers to compare them with another's: sketches, norms, and who was routed where.

The residual streams of all layers would be gigabytes; sketches of 64 numbers a token (`edgelm.parity.sketch`) tell
distances to 9 %, and medians over thousands of tokens to far less.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgelm.evaluation.result import LayerError
from edgelm.parity.sketch import SKETCH_WIDTH, relative_error, sign_matrix, sketch


class Trail:
    """The residual streams of N tokens after the embedding (index 0) and L layers, and the experts of each layer."""

    def __init__(self, layers: int, tokens: int, width: int, active: int) -> None:
        """`width`: of the residual stream; `active`: experts chosen for a token, 0 for a dense model."""
        self._signs = sign_matrix(width)
        self.norms = np.zeros((layers + 1, tokens), np.float32)
        self.sketches = np.zeros((layers + 1, tokens, SKETCH_WIDTH), np.float32)
        self.experts = np.zeros((layers, tokens, active), np.int32) if active else None

    def put(self, layer: int, first: int, hidden: NDArray[np.float32]) -> None:
        """Take the stream [n, D] of the tokens from `first` on after `layer`; -1 is the embedding."""
        rows = slice(first, first + len(hidden))
        self.norms[layer + 1, rows] = np.linalg.norm(hidden, axis=-1)
        self.sketches[layer + 1, rows] = sketch(hidden, self._signs)

    def put_experts(self, layer: int, first: int, chosen: NDArray[np.integer]) -> None:
        """Take the experts [n, A] that the tokens from `first` on were given to."""
        assert self.experts is not None
        self.experts[layer, first : first + len(chosen)] = np.sort(chosen, axis=-1)

    def errors_of(self, target: Trail) -> tuple[LayerError, ...]:
        """Compare another model's trail over the same tokens with this one, the float model's."""
        found = []
        for index in range(len(self.norms)):
            error = relative_error(self.sketches[index], target.sketches[index], self.norms[index])
            same = None
            if index and self.experts is not None and target.experts is not None:
                same = float((self.experts[index - 1] == target.experts[index - 1]).all(axis=-1).mean())
            found.append(LayerError(index - 1, float(np.median(error)), same))
        return tuple(found)
