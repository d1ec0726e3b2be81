"""Which tokens each expert is calibrated on: its own, and where they are few, some that route near it.

Shape letters: N tokens, E experts, A chosen per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edgelm.quant.calibration.options import CoverageOptions


@dataclass(frozen=True)
class ExpertTokens:
    """One expert's tokens.

    Attributes:
        own: int64 [n], tokens that chose the expert, rising.
        weights: float32 [n], the router's weight of each.
        borrowed: int64 [m], tokens that did not, nearest first; for the moments only.
        starved: there are too few even so.
    """

    own: Tensor
    weights: Tensor
    borrowed: Tensor
    starved: bool

    @property
    def seen(self) -> Tensor:
        """int64 [n + m], all tokens that its moments are made of, its own first."""
        return torch.cat([self.own, self.borrowed])


def assign(
    logits: Tensor, chosen: Tensor, weights: Tensor, coverage: CoverageOptions, needed: int
) -> list[ExpertTokens]:
    """Share the tokens out among the experts.

    Args:
        logits: float32 [N, E] of the router.
        chosen: int64 [N, A], the experts of each token.
        weights: float32 [N, A], theirs.
        coverage: how far an expert may reach for more tokens.
        needed: tokens that are enough.

    Returns:
        One entry an expert.
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
    """For each expert in `wanted`, up to that many tokens that have it among the `extra` next most probable ones."""
    probabilities = logits.softmax(-1)
    # Those chosen are masked by their places, not left out by rank: ties then cannot list a token twice.
    values, experts = probabilities.scatter(1, chosen, -1.0).topk(extra, dim=-1)  # [N, extra]
    found = {}
    for expert, count in wanted.items():
        tokens, column = (experts == expert).nonzero(as_tuple=True)
        best = values[tokens, column].argsort(descending=True, stable=True)[:count]
        found[expert] = tokens[best]
    return found
