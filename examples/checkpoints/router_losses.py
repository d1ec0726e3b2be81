"""Router losses, which are added to the next-token loss in training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def load_balancing_loss(router_logits: Sequence[Tensor], active: int, *, pooled: bool = False) -> Tensor:
    """Return E * sum over experts of (share of tokens that chose it) * (its mean probability).

    It is A for balanced routing and larger otherwise. This is the scale of transformers. Where the loss is scaled to 1
    for balanced routing, the coefficient is A times the one for this scale.

    Args:
        router_logits: Router logits of each layer, [..., E].
        active: A, the number of experts chosen per token.
        pooled: Average both factors over all layers before they are multiplied, as transformers does. Then one layer
            may collapse if another compensates. By default they are multiplied per layer and averaged afterwards
            (equations 4-6 of arXiv 2101.03961, as in OLMoE's training).
    """
    shares, means = [], []
    for logits in router_logits:
        probabilities = logits.reshape(-1, logits.shape[-1]).softmax(-1)  # [N, E]
        chosen = probabilities.topk(active, dim=-1).indices
        counts = torch.bincount(chosen.reshape(-1), minlength=probabilities.shape[1])
        shares.append(counts / len(probabilities))
        means.append(probabilities.mean(0))
    share, mean = torch.stack(shares), torch.stack(means)  # [L, E]
    if pooled:
        share, mean = share.mean(0, keepdim=True), mean.mean(0, keepdim=True)
    return share.shape[1] * (share * mean).sum(-1).mean()


def router_z_loss(router_logits: Sequence[Tensor]) -> Tensor:
    """Return the mean of logsumexp(router logits)^2 (equation 5 of arXiv 2202.08906), which keeps logits small."""
    return torch.stack([logits.logsumexp(-1).square().mean() for logits in router_logits]).mean()
