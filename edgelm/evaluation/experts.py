"""Quantisation error of each expert of an MoE layer: the error of its output on the tokens routed to it.

Inputs and routing are those of the float model, so the error of an expert contains no errors of earlier layers. It is
computed while the float model runs, since the inputs are not kept.
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
    """Sums of the squared outputs, and of the squared errors of several targets, by layer and expert."""

    def __init__(self, decoder: Decoder, reference: WeightReader, targets: Sequence[WeightSource]) -> None:
        layers, experts = decoder.num_layers, decoder.num_experts
        self._decoder = decoder
        self._reference = reference
        self._targets = targets
        self.tokens = np.zeros((layers, experts), np.int64)
        """Number of tokens routed to each expert, int64 [L, E]."""
        self._energy = np.zeros((layers, experts))
        self._error = np.zeros((len(targets), layers, experts))

    @torch.no_grad()
    def add(self, layer: int, inputs: Tensor, chosen: Tensor) -> None:
        """Add the inputs [n, D] of an MoE layer and the experts [n, A] that the float model selected for them."""
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
                # A recipe that keeps an expert float leaves it unchanged. Another checkpoint may have other floats.
                changed = source.checkpoint is not self._reference or any(source.scheme(name) for name in names)
                if changed:
                    found = _expert(x, source.dequantized(), names)
                    self._error[number, layer, expert] += float((found - expected).double().square().sum())

    def errors(self, number: int) -> ExpertErrors:
        """Return the errors of the experts of target `number`."""
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
