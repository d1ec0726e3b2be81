"""What quantising costs each expert of an MoE layer: its output's error on the tokens that the float model gives it.

Weights only: inputs and routing are the float model's, so that an expert answers for itself and not for what the
layers before it did. Computed during the float model's own sweep, since its inputs are not kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edgelm.checkpoint import WeightReader
from edgelm.evaluation.result import ExpertError, ExpertErrors
from edgelm.models.spec import Decoder
from edgelm.quant.source import WeightSource

WORST = 10


class ExpertProbe:
    """Sums, for every layer and expert, the squared outputs and the squared errors of several targets."""

    def __init__(self, decoder: Decoder, reference: WeightReader, targets: Sequence[WeightSource]) -> None:
        layers, experts = decoder.num_layers, decoder.num_experts
        self._decoder = decoder
        self._reference = reference
        self._targets = targets
        self.tokens = np.zeros((layers, experts), np.int64)
        """How many tokens each expert got, [L, E]."""
        self._energy = np.zeros((layers, experts))
        self._error = np.zeros((len(targets), layers, experts))

    @torch.no_grad()
    def add(self, layer: int, inputs: Tensor, chosen: Tensor) -> None:
        """Take the inputs [n, D] of an MoE layer and the experts [n, A] that the float model chose for them."""
        self.tokens[layer] += torch.bincount(chosen.flatten(), minlength=self.tokens.shape[1]).numpy()
        if not self._targets:
            return
        part = self._decoder.moe(layer)
        assert part is not None
        for expert in np.unique(chosen.numpy()).tolist():
            x = inputs[(chosen == expert).any(-1)]
            names = [matrix.name for matrix in part.experts[expert].matrices]
            expected = _expert(x, self._reference, names)
            self._energy[layer, expert] += float(expected.double().square().sum())
            for number, source in enumerate(self._targets):
                # A recipe that keeps an expert float changes nothing; another checkpoint's floats may be others.
                changed = source.checkpoint is not self._reference or any(source.scheme(name) for name in names)
                if changed:
                    found = _expert(x, source.dequantized(), names)
                    self._error[number, layer, expert] += float((found - expected).double().square().sum())

    def errors(self, number: int) -> ExpertErrors:
        """What became of the experts of target `number`."""
        relative = self._error[number] / np.maximum(self._energy, np.finfo(np.float64).tiny)
        seen = self.tokens > 0
        order = [index for index in np.argsort(-relative, axis=None, kind="stable") if seen.flat[index]][:WORST]
        places = [divmod(int(index), relative.shape[1]) for index in order]
        return ExpertErrors(
            error=tuple(
                tuple(float(value) if there else None for value, there in zip(row, row_seen, strict=True))
                for row, row_seen in zip(relative, seen, strict=True)
            ),
            worst=tuple(
                ExpertError(layer, expert, float(relative[layer, expert]), int(self.tokens[layer, expert]))
                for layer, expert in places
                if relative[layer, expert] > 0
            ),
        )


def _expert(x: Tensor, weights: WeightReader, names: Sequence[str]) -> Tensor:
    gate, up, down = (torch.from_numpy(weights.read_float32(name)) for name in names)
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
