"""Measure the loss of each matrix in each scheme: the expected KL(float || quantised), to second order.

The KL between the next-token distributions before and after a small change d of the weights is d^T F d / 2. F is the
Fisher matrix, the mean of g g^T, where g is the gradient of log p(y | context) with y *drawn from the model* (Martens,
arXiv 1412.1193, section 5). Rounding errors of different weights are nearly independent with mean zero, so d^T F d is
about the sum over weights of error^2 F_ii. (SqueezeLLM, arXiv 2306.07629, weights its clusters in the same way, with
the text's own tokens.) The gradient of an expert is zero for tokens that do not choose it, so F accounts for how often
an expert is chosen and with what weight. The loss of an MoE from swapped experts is added (`routing`).

F_ii is computed as the square of the gradient of a whole group of sequences, all tokens at once. The drawn tokens are
independent, so cross terms of different positions have mean zero, and a few groups are as good as many.

The gradient is computed layer by layer from disk. A forward pass keeps the residual stream between layers; a backward
pass computes each layer again, with gradients. In memory are one layer's attention weights, one expert, one block of
the head, and the residual stream before every layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgelm.checkpoint import Checkpoint
from edgelm.models.spec import Block, Matrix, MoE
from edgelm.progress import Advance, Progress, Silent
from edgelm.quant.mixed_precision.losses import Losses, Sensitivity, runs
from edgelm.quant.mixed_precision.routing import Margin, Swaps
from edgelm.quant.mixed_precision.units import find_units
from edgelm.quant.scheme import AnyScheme, Scheme
from edgelm.reference.hooks import Hooks
from edgelm.reference.interpreter import Interpreter
from edgelm.reference.kv_cache import Trace
from edgelm.reference.layerwise import HEAD_BLOCK_BYTES, LayerWeights, embedding_rows, head_weights

Ints = NDArray[np.int64]

GROUPS = 16
"""Largest number of groups of sequences, whose gradients are squared separately."""

_NOISY_SHARE = 4  # one in this many sequences measures the noise of the routers' inputs


@dataclass(frozen=True)
class Measured:
    """Measured losses.

    Attributes:
        units: Losses of each unit in each scheme.
        swaps: Constant to add to any sum of these, in nats per token (`routing`); 0 for a dense model.
    """

    units: list[Sensitivity]
    swaps: float


def measure(
    checkpoint: Checkpoint,
    windows: Sequence[Ints],
    schemes: Sequence[AnyScheme],
    *,
    nominal: AnyScheme | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Measured:
    """Measure the loss of every unit of a float checkpoint in every scheme.

    Args:
        checkpoint: The float checkpoint.
        windows: Token ids, all of the same length.
        schemes: Candidates. A group that does not divide a row is replaced by a smaller one.
        nominal: A scheme with about the bits that will be chosen, which determines how often experts are swapped. None
            for int4 in groups of 32.
        seed: Seed of the random numbers.
        progress: Gets every layer and the head.

    Raises:
        CheckpointError: A weight is not finite.
    """
    sweep = _Sweep(checkpoint, windows, schemes, nominal or Scheme(4, 32), seed)
    return sweep.run(progress or Silent())


class _Sweep:
    def __init__(
        self,
        checkpoint: Checkpoint,
        windows: Sequence[Ints],
        schemes: Sequence[AnyScheme],
        nominal: AnyScheme,
        seed: int,
    ) -> None:
        self.checkpoint = checkpoint
        self.decoder = checkpoint.decoder
        self.units = find_units(self.decoder)
        self.head = self.decoder.head.name
        self.ids = torch.from_numpy(np.stack(windows))  # [B, T]
        batch, length = self.ids.shape
        self.losses = Losses(self.units, schemes, batch * length)
        # The group of each token, [N]. Neighbouring sequences share a group.
        self.groups = (torch.arange(batch) * min(GROUPS, batch) // batch).repeat_interleave(length)
        self.random = torch.Generator().manual_seed(seed)
        self.nominal = nominal
        self.noise: dict[int, float] = {}
        self.constant = 0.0

    def run(self, progress: Progress) -> Measured:
        """Run the forward pass, the head and the backward pass."""
        layers = self.decoder.num_layers
        # The backward pass of a layer, with its matrices in every scheme, takes about four times as long as forward.
        with progress.task("sensitivity", 5 * layers + 4, unit="steps") as advance:
            streams = self._forward(advance)
            gradient = self._head(streams.pop())
            advance(4)
            for index in reversed(range(layers)):
                gradient = self._layer(index, streams.pop(), gradient)
                advance(4)
            self._embedding(gradient)
        return Measured(self.losses.of_units(self.units), self.constant / self.ids.numel())

    # -- forward -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _forward(self, advance: Advance) -> list[Tensor]:
        """Return the residual stream [B, T, D] before each layer and after the last."""
        rows, places = embedding_rows(self.decoder, self.checkpoint.read_float32, self.ids.numpy())
        streams = [torch.from_numpy(rows[places])]
        noisy = streams[0][: -(-len(self.ids) // _NOISY_SHARE)]
        for index in range(self.decoder.num_layers):
            trace, quantised = Trace(), Trace()
            streams.append(self._layer_from_disk(index).layer(index, streams[-1], None, trace))
            # The noisy stream is needed as long as a router of this or a later layer has a choice.
            if any(self._chooses(moe) for moe in map(self.decoder.moe, range(index, self.decoder.num_layers))):
                noisy = self._layer_from_disk(index, self._read_quantised).layer(index, noisy, None, quantised)
            moe = self.decoder.moe(index)
            if self._chooses(moe):
                logits = trace.router_logits[0][: len(noisy)].flatten(0, 1)
                margin = Margin.of(logits, moe.k)
                self.noise[index] = margin.noise(quantised.router_logits[0].flatten(0, 1))
            advance(1)
        return streams

    @staticmethod
    def _chooses(moe: MoE | None) -> TypeGuard[MoE]:
        """Return whether experts can be swapped, which needs more experts than are active."""
        return moe is not None and len(moe.experts) > moe.k

    def _layer_from_disk(
        self, index: int, read: Callable[[str], NDArray[np.float32]] | None = None, hooks: Hooks | None = None
    ) -> Interpreter:
        weights = LayerWeights(self.decoder, index, read or self.checkpoint.read_float32)
        return Interpreter(self.decoder, weights, hooks)

    def _read_quantised(self, name: str) -> NDArray[np.float32]:
        weight = self.checkpoint.read_float32(name)
        matrix = self.decoder.matrices.get(name)
        if matrix is None or matrix.role == "router":
            return weight
        return self.losses.rounded(name, weight, self.nominal)

    # -- head ----------------------------------------------------------------------------------------------------------

    def _head(self, stream: Tensor) -> Tensor:
        """Draw tokens and measure the head; return the gradient of log p(drawn) by the residual stream, [B, T, D].

        The head itself needs no drawn tokens, as the Fisher matrix of the logits is diag(p) - p p^T.
        """
        leaf = stream.requires_grad_()
        run = Interpreter(self.decoder, lambda name: torch.from_numpy(self.checkpoint.read_float32(name)))
        final = run.norm(self.decoder.norm, leaf).flatten(0, 1)  # [N, D]
        x = final.detach()
        total, drawn = self._draw(x)
        by_final, squares = torch.zeros_like(x), x.square()
        for start, weight in self._head_blocks():
            p = (x @ weight.T - total[:, None]).exp_()  # [N, rows of the block]
            fisher = (p * (1 - p)).T @ squares
            inside = ((drawn >= start) & (drawn < start + len(weight))).nonzero()[:, 0]
            p.neg_()[inside, drawn[inside] - start] += 1
            by_final += p @ weight
            self.losses.add(self.head, weight.numpy(), fisher.numpy(), len(x) if start == 0 else 0)
        return torch.autograd.grad(final, leaf, by_final)[0]

    def _head_blocks(self) -> Iterator[tuple[int, Tensor]]:
        size = HEAD_BLOCK_BYTES // (4 * max(self.decoder.hidden_size, self.ids.numel()))
        for rows, weight in head_weights(self.decoder, self.checkpoint.read_float32, size):
            yield rows.start, weight

    def _draw(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log of the softmax's denominator, [N], and drawn tokens, [N]: argmax of logit + Gumbel noise."""
        total = torch.full((len(x),), -torch.inf)
        best, drawn = total.clone(), torch.zeros(len(x), dtype=torch.int64)
        for start, weight in self._head_blocks():
            logits = x @ weight.T
            total = torch.logaddexp(total, logits.logsumexp(-1))
            noise = torch.empty_like(logits).exponential_(generator=self.random).log_().neg_()
            value, place = (logits + noise).max(-1)
            drawn = torch.where(value > best, place + start, drawn)
            best = torch.maximum(value, best)
        return total, drawn

    # -- backward ------------------------------------------------------------------------------------------------------

    def _layer(self, index: int, stream: Tensor, gradient: Tensor) -> Tensor:
        """Measure a layer's matrices; return the gradient by its input."""
        run = self._layer_from_disk(index)
        blocks = self.decoder.layers[index]
        streams = [stream]
        with torch.no_grad():
            for block in blocks[:-1]:
                streams.append(run.block(block, streams[-1]))
        for block in reversed(blocks):
            gradient = self._block(run, block, streams.pop().detach().requires_grad_(), gradient)
        return gradient

    def _block(self, run: Interpreter, block: Block, x: Tensor, gradient: Tensor) -> Tensor:
        """Measure a block's matrices; return the gradient by its input x [B, T, D]."""
        normed = run.norm(block.before, x)
        leaf = normed.detach().requires_grad_()
        if isinstance(block.part, MoE):
            by_output = gradient
            if block.after is not None:
                with torch.no_grad():
                    made = run.moe(block.part, leaf)
                made.requires_grad_()
                by_output = torch.autograd.grad(run.norm(block.after, made), made, gradient)[0]
            by_leaf = self._moe(run, block.part, leaf, by_output)
        else:
            watched = self._watched(run, self.groups)
            out = run.norm(block.after, watched.part(block.part, leaf, block.layer, None, None))
            by_leaf = torch.autograd.grad(out, leaf, gradient)[0]
        if block.before is None:
            return gradient + by_leaf
        return gradient + torch.autograd.grad(normed, x, by_leaf)[0]

    def _watched(self, run: Interpreter, groups: Tensor) -> Interpreter:
        """Return an interpreter that measures every matmul; `groups` are the groups of the rows."""
        return Interpreter(run.decoder, run.read, _Watch(self.losses, run, groups))

    def _moe(self, run: Interpreter, moe: MoE, x: Tensor, gradient: Tensor) -> Tensor:
        """Measure a MoE, with one expert in memory at a time; return the gradient by x [B, T, D]."""
        flat, by_output = x.detach().flatten(0, 1), gradient.flatten(0, 1)  # [N, D]
        logits, chosen, shares = (part.flatten(0, 1) for part in run.route(moe, x))  # [N, E], [N, A], [N, A]
        margin = Margin.of(logits.detach(), moe.k) if self._chooses(moe) else None
        by_shares, by_x, by_next = torch.zeros_like(shares), torch.zeros_like(flat), torch.zeros(len(flat))
        for index, expert in enumerate(moe.experts):
            tokens, place = (chosen == index).nonzero(as_tuple=True)
            refused = tokens[:0] if margin is None else (margin.next == index).nonzero()[:, 0]
            if len(tokens) + len(refused) == 0:
                continue
            once = Interpreter(self.decoder, functools.cache(run.read))  # caches this expert's weights only
            by_next[refused] = (once.dense(expert, flat[refused]) * by_output[refused]).sum(-1)
            if len(tokens) == 0:
                continue
            rows, by_row = flat[tokens].requires_grad_(), by_output[tokens]
            output = self._watched(once, self.groups[tokens]).dense(expert, rows)
            by_shares[tokens, place] = (output.detach() * by_row).sum(-1)
            by_down = by_row * shares.detach()[tokens, place, None]
            by_x.index_add_(0, tokens, torch.autograd.grad(output, rows, by_down)[0])
        by_logits = torch.zeros_like(logits)
        if margin is not None:
            assert moe.router.layer is not None
            by_logits = self._swaps(moe.router.layer, margin, shares.detach(), by_shares, by_next, by_logits)
        return by_x.view_as(x) + torch.autograd.grad((shares, logits), x, (by_shares, by_logits))[0]

    def _swaps(
        self, index: int, margin: Margin, shares: Tensor, by_shares: Tensor, by_next: Tensor, by_logits: Tensor
    ) -> Tensor:
        """Add the loss from swapped experts to the gradient by the router's logits, [N, E]."""
        last = shares[:, -1]
        change = last * (-margin.gap).exp() * by_next - last * by_shares[:, -1]
        swaps = Swaps.of(margin.gap, change, self.noise[index])
        self.constant += swaps.constant
        seed = swaps.seed * (2 * torch.randint(0, 2, (len(last),), generator=self.random) - 1)
        by_logits.scatter_(1, margin.last[:, None], seed[:, None])
        return by_logits.scatter_(1, margin.next[:, None], -seed[:, None])

    def _embedding(self, gradient: Tensor) -> None:
        """Measure the embedding from the gradient of the rows looked up, [B, T, D]; unused rows have no loss."""
        table, found = embedding_rows(self.decoder, self.checkpoint.read_float32, self.ids.numpy())
        flat, places = gradient.flatten(0, 1), torch.from_numpy(found).flatten()
        fisher = torch.zeros(table.shape)
        for rows in runs(self.groups):
            fisher += torch.zeros_like(fisher).index_add_(0, places[rows], flat[rows]).square_()
        tokens = 0 if self.decoder.tied else len(flat)
        self.losses.add(self.decoder.embed.name, table, fisher.numpy(), tokens)


class _Watch(Hooks):
    """Hooks that measure every matmul once the gradient of its output is known."""

    def __init__(self, losses: Losses, run: Interpreter, groups: Tensor) -> None:
        self._losses = losses
        self._run = run
        self._groups = groups

    def outputs(self, matrix: Matrix, x: Tensor, y: Tensor) -> None:
        """Measure `matrix`, which computed y [B, T, rows] from x [B, T, columns], once the gradient of y is known."""
        weight, rows = self._run.read(matrix.name).float(), x.detach().flatten(0, -2)

        def measured(gradient: Tensor) -> None:
            self._losses.add_matmul(matrix.name, weight, rows, gradient.flatten(0, -2), self._groups)

        y.register_hook(measured)  # type: ignore[no-untyped-call]  # torch has no types for it
