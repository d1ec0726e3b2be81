"""Collect the loss of each matrix in each scheme during the backward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgelm.devices import allowed_cores
from edgelm.quant.codec import rounded
from edgelm.quant.mixed_precision.units import Unit
from edgelm.quant.scheme import AnyScheme
from edgelm.slices import slices

PRIOR_TOKENS = 4.0
"""Average tokens of the layer's experts that are added to each expert's own, as a prior."""

_WEIGHTS = 1 << 22  # weights quantised at once: 16 MB in float32


@dataclass(frozen=True)
class Sensitivity:
    """Measured losses of a unit.

    Attributes:
        unit: The unit.
        losses: Loss in nats per token, by the name of the effective scheme.
        tokens: Tokens that passed through the unit.
    """

    unit: Unit
    losses: Mapping[str, float]
    tokens: int


class Losses:
    """Sums 1/2 error^2 F / tokens over the weights of every matrix, for every scheme.

    Args:
        units: The units whose matrices are measured.
        schemes: Candidates.
        tokens: Tokens of all sequences together.
    """

    def __init__(self, units: Sequence[Unit], schemes: Sequence[AnyScheme], tokens: int) -> None:
        self.tokens = tokens
        # Called once, because it reads a dozen files of the system and there are thousands of matrices.
        self._threads = allowed_cores()
        self._schemes: dict[str, list[AnyScheme]] = {}
        for unit in units:
            fitting = list(dict.fromkeys(unit.effective(scheme) for scheme in schemes))
            self._schemes |= dict.fromkeys(unit.tensors, fitting)
        self._found = {name: dict.fromkeys((s.name for s in fitting), 0.0) for name, fitting in self._schemes.items()}
        self._seen = dict.fromkeys(self._schemes, 0)

    def add(self, name: str, weight: NDArray[np.float32], fisher: NDArray[np.float32], tokens: int = 0) -> None:
        """Add the loss of rows of a matrix [N, K], with F_ii summed over all tokens [N, K], and its tokens."""
        for rows in slices(len(weight), _WEIGHTS // weight.shape[1]):
            part, of_part = weight[rows], fisher[rows]
            for scheme in self._schemes[name]:
                error = self.rounded(name, part, scheme)
                error -= part
                np.square(error, out=error)
                self._found[name][scheme.name] += 0.5 * float(np.vdot(error, of_part)) / self.tokens
        self._seen[name] += tokens

    def rounded(self, name: str, weight: NDArray[np.float32], scheme: AnyScheme) -> NDArray[np.float32]:
        """Return a matrix [N, K] quantised with `scheme` and dequantised."""
        return rounded(weight, scheme, name=name, threads=self._threads)

    def add_matmul(self, name: str, weight: Tensor, x: Tensor, gradient: Tensor, groups: Tensor) -> None:
        """Add the loss of a matrix [N, K] from its input [n, K] and the gradient of its output [n, N].

        `groups` [n] are the groups of the rows, in ascending order.
        """
        fisher = torch.zeros_like(weight)
        for rows in runs(groups):
            fisher += (gradient[rows].T @ x[rows]).square_()
        self.add(name, weight.numpy(), fisher.numpy(), len(x))

    def of_units(self, units: Sequence[Unit]) -> list[Sensitivity]:
        """Return the losses of each unit, summed over its matrices."""
        found = []
        for unit in units:
            names = list(unit.tensors)
            losses = {scheme: sum(self._found[name][scheme] for name in names) for scheme in self._found[names[0]]}
            found.append(Sensitivity(unit, losses, self._seen[names[0]]))
        return _with_prior(found)


def runs(groups: Tensor) -> list[slice]:
    """Return the slices of equal values in an ascending sequence."""
    counts = torch.unique_consecutive(groups, return_counts=True)[1]
    ends = cast("list[int]", counts.cumsum(0).tolist())
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def _with_prior(found: Sequence[Sensitivity]) -> list[Sensitivity]:
    """Add the loss of `PRIOR_TOKENS` average tokens to each expert, since other text may choose other experts."""
    layers: dict[tuple[str, int | None], list[Sensitivity]] = {}
    for one in found:
        if one.unit.expert is not None:
            layers.setdefault((one.unit.kind, one.unit.layer), []).append(one)
    average: dict[tuple[str, int | None], dict[str, float]] = {}
    for key, peers in layers.items():
        tokens = max(1, sum(peer.tokens for peer in peers))
        average[key] = {s: sum(peer.losses[s] for peer in peers) / tokens for s in peers[0].losses}
    result = []
    for one in found:
        extra = average.get((one.unit.kind, one.unit.layer))
        if one.unit.expert is not None and extra is not None:
            one = replace(one, losses={s: loss + PRIOR_TOKENS * extra[s] for s, loss in one.losses.items()})
        result.append(one)
    return result
