"""Assign calibration tokens to experts: their own and, if these are few, tokens for which they were nearly chosen.

Shape letters: N tokens, E experts, A chosen per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edgelm.quant.calibration.options import CoverageOptions


@dataclass(frozen=True)
class ExpertTokens:
    """The calibration tokens of one expert.

    Attributes:
        own: Tokens that chose the expert, int64 [n], ascending.
        weights: The router's weight of each, float32 [n].
        borrowed: Tokens that did not choose it, int64 [m], most probable first; used for moments only.
        starved: Whether own and borrowed tokens together are too few.
    """

    own: Tensor
    weights: Tensor
    borrowed: Tensor
    starved: bool

    @property
    def seen(self) -> Tensor:
        """All tokens that its moments are computed from, int64 [n + m], its own first."""
        return torch.cat([self.own, self.borrowed])


def assign(
    logits: Tensor, chosen: Tensor, weights: Tensor, coverage: CoverageOptions, needed: int
) -> list[ExpertTokens]:
    """Assign the calibration tokens to experts.

    Args:
        logits: Router logits, float32 [N, E].
        chosen: Experts of each token, int64 [N, A].
        weights: Their weights, float32 [N, A].
        coverage: How many more experts per token may borrow it.
        needed: Tokens that an expert needs.

    Returns:
        One entry per expert.
    """
    experts, active = logits.shape[1], chosen.shape[1]
    picks = chosen.reshape(-1)
    order = picks.argsort(stable=True)
    counts: list[int] = torch.bincount(picks, minlength=experts).tolist()
    own = torch.split(order // active, counts)
    own_weights = torch.split(weights.reshape(-1)[order], counts)
    few = [expert for expert, count in enumerate(counts) if count < needed]
    extra = min(active * coverage.reach, experts) - active
    borrowed = _near(logits, chosen, extra, {e: needed - counts[e] for e in few}) if few and extra else {}
    nothing = own[0][:0]
    found = []
    for expert, count in enumerate(counts):
        more = borrowed.get(expert, nothing)
        found.append(ExpertTokens(own[expert], own_weights[expert], more, count + len(more) < needed))
    return found


def _near(logits: Tensor, chosen: Tensor, extra: int, wanted: dict[int, int]) -> dict[int, Tensor]:
    """Return, for each expert in `wanted`, up to that many tokens with it among the `extra` next most probable ones."""
    probabilities = logits.softmax(-1)
    # Mask the chosen experts instead of skipping the first ranks, so that ties cannot list a token twice.
    values, experts = probabilities.scatter(1, chosen, -1.0).topk(extra, dim=-1)  # [N, extra]
    found = {}
    for expert, count in wanted.items():
        tokens, column = (experts == expert).nonzero(as_tuple=True)
        best = values[tokens, column].argsort(descending=True, stable=True)[:count]
        found[expert] = tokens[best]
    return found
