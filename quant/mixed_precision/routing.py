"""What it costs that noise makes a router choose another expert, which no gradient sees.

At a token, let m > 0 be the gap of the router's logits between the last expert chosen and the first one not, and let
the noise of that gap be normal with variance V. A swap happens with the probability Phi(-m / sqrt(V)) and costs J nats,
half the square of what it changes in log p(drawn token), so a token loses E = J Phi(-m / sqrt(V)). Summed over tokens
this grows like sqrt(V), not like V: it is most of what remains when the noise gets small, and no Fisher matrix has it.

It is linearised at the noise V0 that quantisation to about the bits wanted makes: E(V) = E(V0) + E'(V0) (V - V0). The
slope goes into the gradients as a random sign times sqrt(2 E'(V0)) at the two logits, whose expected square then adds
E'(V0) V to every weight's loss; the rest is a constant.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_SMALLEST = 1e-6  # noise of a gap, where quantisation makes none


@dataclass(frozen=True)
class Margin:
    """The last expert chosen and the first not, int64 [N] each, and the gap of their logits [N]."""

    last: Tensor
    next: Tensor
    gap: Tensor

    @classmethod
    def of(cls, logits: Tensor, active: int) -> Margin:
        """Find them in logits [N, E], with `active` experts a token."""
        values, experts = logits.topk(active + 1, dim=-1)
        return cls(experts[:, -2], experts[:, -1], values[:, -2] - values[:, -1])

    def noise(self, noisy: Tensor) -> float:
        """Root mean square of what the gap differs by in other logits [N, E] of the same tokens."""
        at = [noisy.gather(1, experts[:, None])[:, 0] for experts in (self.last, self.next)]
        return max(_SMALLEST, float((at[0] - at[1] - self.gap).square().mean().sqrt()))


@dataclass(frozen=True)
class Swaps:
    """The cost of swaps at one router.

    Attributes:
        constant: E(V0) - E'(V0) V0 summed over the tokens, nats.
        seed: [N], sqrt(2 E'(V0)) of each token.
    """

    constant: float
    seed: Tensor

    @classmethod
    def of(cls, gap: Tensor, change: Tensor, noise: float) -> Swaps:
        """Linearise.

        Args:
            gap: m, [N].
            change: of log p(drawn) if the two experts are swapped, [N]; J is half its square.
            noise: sqrt(V0).
        """
        cost, z = 0.5 * change.square(), gap / noise
        slope = cost * torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi) * z / (2 * noise**2)
        constant = (cost * torch.special.ndtr(-z) - slope * noise**2).sum()
        return cls(float(constant), (2 * slope).sqrt())
