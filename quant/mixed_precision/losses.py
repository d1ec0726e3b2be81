"""What is collected for each matrix and scheme while the gradients go by."""

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

BELIEF = 4.0
"""Tokens of a layer's average expert that each expert is thought to have seen in addition to its own."""

_WEIGHTS = 1 << 22  # quantised at once: 16 MB of float32


@dataclass(frozen=True)
class Sensitivity:
    """What a unit loses.

    Attributes:
        unit: the matrices.
        losses: for each scheme, under the name that it has with a group that fits, nats a token.
        tokens: that went through it.
    """

    unit: Unit
    losses: Mapping[str, float]
    tokens: int


class Losses:
    """Sums 1/2 error^2 F / tokens over the weights of every matrix, for every scheme.

    Args:
        units: whose matrices.
        schemes: candidates.
        tokens: of all sequences together.

    Raises:
        RecipeError: a scheme fits some matrix with no group.
    """

    def __init__(self, units: Sequence[Unit], schemes: Sequence[AnyScheme], tokens: int) -> None:
        self.tokens = tokens
        # Asked once: finding out reads a dozen files of the system, and there are thousands of matrices.
        self._threads = allowed_cores()
        self._schemes: dict[str, list[AnyScheme]] = {}
        for unit in units:
            fitting = list(dict.fromkeys(unit.effective(scheme) for scheme in schemes))
            self._schemes |= dict.fromkeys(unit.tensors, fitting)
        self._found = {name: dict.fromkeys((s.name for s in fitting), 0.0) for name, fitting in self._schemes.items()}
        self._seen = dict.fromkeys(self._schemes, 0)

    def add(self, name: str, weight: NDArray[np.float32], fisher: NDArray[np.float32], tokens: int = 0) -> None:
        """Add rows [N, K] of a matrix, with F_ii summed over all tokens [N, K], and `tokens` that went through it."""
        for rows in slices(len(weight), _WEIGHTS // weight.shape[1]):
            part, of_part = weight[rows], fisher[rows]
            for scheme in self._schemes[name]:
                error = self.rounded(name, part, scheme)
                error -= part
                np.square(error, out=error)
                self._found[name][scheme.name] += 0.5 * float(np.vdot(error, of_part)) / self.tokens
        self._seen[name] += tokens

    def rounded(self, name: str, weight: NDArray[np.float32], scheme: AnyScheme) -> NDArray[np.float32]:
        """Return a matrix [N, K] as `scheme` has it."""
        return rounded(weight, scheme, name=name, threads=self._threads)

    def add_matmul(self, name: str, weight: Tensor, x: Tensor, gradient: Tensor, groups: Tensor) -> None:
        """Add a matrix [N, K] by what it was given [n, K] and the gradient of what it gave [n, N].

        `groups` [n] are those of the rows, in rising order.
        """
        fisher = torch.zeros_like(weight)
        for rows in runs(groups):
            fisher += (gradient[rows].T @ x[rows]).square_()
        self.add(name, weight.numpy(), fisher.numpy(), len(x))

    def of_units(self, units: Sequence[Unit]) -> list[Sensitivity]:
        """The sums over the matrices of each unit."""
        found = []
        for unit in units:
            names = list(unit.tensors)
            losses = {scheme: sum(self._found[name][scheme] for name in names) for scheme in self._found[names[0]]}
            found.append(Sensitivity(unit, losses, self._seen[names[0]]))
        return _with_belief(found)


def runs(groups: Tensor) -> list[slice]:
    """The runs of equal values in a rising sequence."""
    counts = torch.unique_consecutive(groups, return_counts=True)[1]
    ends = cast("list[int]", counts.cumsum(0).tolist())
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def _with_belief(found: Sequence[Sensitivity]) -> list[Sensitivity]:
    """Experts that few of these tokens chose are chosen by other texts: each gets `BELIEF` average tokens."""
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
            one = replace(one, losses={s: loss + BELIEF * extra[s] for s, loss in one.losses.items()})
        result.append(one)
    return result
