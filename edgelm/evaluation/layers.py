"""Compare the layers of two models by sketches and norms of the residual stream, and by the selected experts.

The residual streams of all layers would take gigabytes. Sketches of 64 numbers per token (`edgelm.parity.sketch`) give
distances with an error of 9 %; the median over thousands of tokens is far more accurate.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgelm.evaluation.result import LayerError
from edgelm.parity.sketch import SKETCH_WIDTH, relative_error, sign_matrix, sketch


class LayerSketches:
    """Sketches of the residual streams of N tokens after the embedding (index 0) and L layers, and their experts.

    Attributes:
        norms: float32 [L + 1, N].
        sketches: float32 [L + 1, N, 64].
        experts: int32 [L, N, A], sorted; None for a dense model.
    """

    def __init__(self, layers: int, tokens: int, width: int, active: int) -> None:
        """`width`: of the residual stream; `active`: experts selected per token, 0 for a dense model."""
        self._signs = sign_matrix(width)
        self.norms = np.zeros((layers + 1, tokens), np.float32)
        self.sketches = np.zeros((layers + 1, tokens, SKETCH_WIDTH), np.float32)
        self.experts = np.zeros((layers, tokens, active), np.int32) if active else None

    def put(self, layer: int, first: int, hidden: NDArray[np.float32]) -> None:
        """Store the residual stream [n, D] after `layer` (-1: the embedding) of the tokens from `first` on."""
        rows = slice(first, first + len(hidden))
        self.norms[layer + 1, rows] = np.linalg.norm(hidden, axis=-1)
        self.sketches[layer + 1, rows] = sketch(hidden, self._signs)

    def put_experts(self, layer: int, first: int, chosen: NDArray[np.integer]) -> None:
        """Store the experts [n, A] selected in `layer` for the tokens from `first` on."""
        assert self.experts is not None
        self.experts[layer, first : first + len(chosen)] = np.sort(chosen, axis=-1)

    def errors_of(self, target: LayerSketches) -> tuple[LayerError, ...]:
        """Compare the sketches of another model over the same tokens with this one, of the float model."""
        found = []
        for index in range(len(self.norms)):
            error = relative_error(self.sketches[index], target.sketches[index], self.norms[index])
            same = None
            if index and self.experts is not None and target.experts is not None:
                same = float((self.experts[index - 1] == target.experts[index - 1]).all(axis=-1).mean())
            found.append(LayerError(index - 1, float(np.median(error)), same))
        return tuple(found)
