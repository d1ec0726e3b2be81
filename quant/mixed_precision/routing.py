"""Estimate the loss from swapped experts: quantisation noise makes a router choose another expert.

Gradients do not include this loss. At a token, let m > 0 be the gap between the router's logits of the last chosen and
the first other expert, and let the noise of the gap be normal with variance V. A swap has the probability
Phi(-m / sqrt(V)) and costs J nats, half the square of its change of log p(drawn token). So the token's expected loss is
E = J Phi(-m / sqrt(V)). Summed over tokens it grows like sqrt(V), not like V. With little noise it dominates the loss,
and the Fisher matrix does not contain it.

E is linearised at V0, the noise of quantising to about the wanted bits: E(V) = E(V0) + E'(V0) (V - V0). The slope
enters the gradients as a random sign times sqrt(2 E'(V0)) at the two logits. Its expected square adds E'(V0) V to every
weight's loss. The rest is a constant.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_SMALLEST = 1e-6  # least noise of a gap, for layers in which quantisation makes none


@dataclass(frozen=True)
class Margin:
    """The last chosen and the first other expert, int64 [N] each, and the gap between their logits, [N]."""

    last: Tensor
    next: Tensor
    gap: Tensor

    @classmethod
    def of(cls, logits: Tensor, active: int) -> Margin:
        """Find them in router logits [N, E], with `active` experts per token."""
        values, experts = logits.topk(active + 1, dim=-1)
        return cls(experts[:, -2], experts[:, -1], values[:, -2] - values[:, -1])

    def noise(self, noisy: Tensor) -> float:
        """Return the root mean square difference of the gap in other logits [N, E] of the same tokens."""
        at = [noisy.gather(1, experts[:, None])[:, 0] for experts in (self.last, self.next)]
        return max(_SMALLEST, float((at[0] - at[1] - self.gap).square().mean().sqrt()))


@dataclass(frozen=True)
class Swaps:
    """The loss from swapped experts at one router.

    Attributes:
        constant: E(V0) - E'(V0) V0, summed over the tokens, in nats.
        seed: sqrt(2 E'(V0)) of each token, [N].
    """

    constant: float
    seed: Tensor

    @classmethod
    def of(cls, gap: Tensor, change: Tensor, noise: float) -> Swaps:
        """Linearise the loss at the noise V0.

        Args:
            gap: m, [N].
            change: Change of log p(drawn token) if the two experts are swapped, [N]; J is half its square.
            noise: sqrt(V0).
        """
        cost, z = 0.5 * change.square(), gap / noise
        slope = cost * torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi) * z / (2 * noise**2)
        constant = (cost * torch.special.ndtr(-z) - slope * noise**2).sum()
        return cls(float(constant), (2 * slope).sqrt())
