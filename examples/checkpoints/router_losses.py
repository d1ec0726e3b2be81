"""The losses with which a router is trained, beside the loss of the next token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def load_balancing_loss(router_logits: Sequence[Tensor], active: int, *, pooled: bool = False) -> Tensor:
    """E * sum over experts of (share of tokens that chose it) * (mean probability of it): A when balanced, more if not.

    That is transformers' scale. A form that is 1 when balanced divides by A, and a coefficient for it is A times the
    one for this.

    Args:
        router_logits: one [..., E] a layer.
        active: A, experts chosen per token.
        pooled: average both factors over all layers before multiplying, as transformers does. The default multiplies
            layer by layer and averages then (equations 4-6 of arXiv 2101.03961, as OLMoE was trained): pooled, a layer
            may collapse as long as another one makes up for it.
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
    """Mean over tokens and layers of logsumexp(router logits)^2 (equation 5 of arXiv 2202.08906): keeps them small."""
    return torch.stack([logits.logsumexp(-1).square().mean() for logits in router_logits]).mean()
