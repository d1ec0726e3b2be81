"""How much each matrix loses in each scheme: the expected KL(float || quantised), to second order.

The KL between the model's next-token distribution before and after a small change d of the weights is d^T F d / 2, F
the Fisher matrix: the mean of g g^T, g the gradient of log p(y | context) with y *drawn from the model* (Martens, arXiv
1412.1193, section 5). Rounding errors of different weights are nearly independent and have no sign in common, so of
d^T F d remains the sum over weights of error^2 F_ii (SqueezeLLM weighs its clusters so, arXiv 2306.07629, with the
text's own tokens). An expert's gradient is zero for tokens that do not choose it: how often it is chosen, and by how
much it counts when it is, are in F already. What a mixture loses when experts are swapped comes on top (`routing`).

F_ii is the square of the gradient of a whole group of sequences, all tokens at once: the drawn tokens are independent,
so what different positions add to each other has mean zero, and a few groups serve as well as many.

The gradient is computed layer by layer from disk: one sweep forward keeps the residual stream between layers, one back
computes each layer again with its gradients. In memory: one layer's attention weights, one expert, one block of the
head, and the residual stream before every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from edgelm.checkpoint import Checkpoint
from edgelm.progress import Advance, Progress, Silent
from edgelm.quant.mixed_precision.losses import Losses, Sensitivity, slices
from edgelm.quant.mixed_precision.routing import Margin, Swaps
from edgelm.quant.mixed_precision.units import EMBEDDING, HEAD, find_units
from edgelm.quant.scheme import AnyScheme, Scheme
from edgelm.reference.kv_cache import Trace
from edgelm.reference.layerwise import HEAD_BLOCK_BYTES

Ints = NDArray[np.int64]

GROUPS = 16
"""Gradients that are squared apart, at most one a sequence."""

_NOISY_SHARE = 4  # of the sequences, one in so many says how noisy the routers' inputs get


@dataclass(frozen=True)
class Measured:
    """What quantisation loses.

    Attributes:
        units: by unit and scheme.
        swaps: nats a token to be added to any sum of these: the constant of `routing`; 0 for a dense model.
    """

    units: list[Sensitivity]
    swaps: float


def measure(
    checkpoint: Checkpoint,
    windows: Sequence[Ints],
    schemes: Sequence[AnyScheme],
    *,
    about: AnyScheme | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Measured:
    """Measure every unit of a float checkpoint.

    Args:
        checkpoint: of either family.
        windows: token ids, all of one length.
        schemes: candidates; a group that does not fit a matrix shrinks for it.
        about: a scheme of about the bits that will be chosen: how often experts are swapped depends on it. None is
            int4 in groups of 32.
        seed: of what is drawn.
        progress: told of every layer and of the head.

    Raises:
        RecipeError: a scheme fits some matrix with no group.
        CheckpointError: a weight is not finite.
    """
    sweep = _Sweep(checkpoint, windows, schemes, about or Scheme(4, 32), seed)
    return sweep.run(progress or Silent())


class _Sweep:
    def __init__(
        self,
        checkpoint: Checkpoint,
        windows: Sequence[Ints],
        schemes: Sequence[AnyScheme],
        about: AnyScheme,
        seed: int,
    ) -> None:
        self.checkpoint = checkpoint
        self.config = checkpoint.family.config_class.from_dict(checkpoint.config)
        self.units = find_units({name: info.shape for name, info in checkpoint.tensors.items()})
        self.head = HEAD if HEAD in checkpoint.tensors else EMBEDDING
        self.ids = torch.from_numpy(np.stack(windows))  # [B, T]
        batch, length = self.ids.shape
        self.losses = Losses(self.units, schemes, batch * length)
        # Group of each token [N]: neighbouring sequences share one.
        self.groups = (torch.arange(batch) * min(GROUPS, batch) // batch).repeat_interleave(length)
        self.random = torch.Generator().manual_seed(seed)
        self.about = about
        self.mixture = hasattr(self.config, "num_experts")
        # Where every expert is always chosen there is nothing to swap.
        self.refuses = self.mixture and self.config.num_experts > self.config.num_experts_per_tok
        self.noise: dict[int, float] = {}
        self.constant = 0.0

    def run(self, progress: Progress) -> Measured:
        """Forward, head, and back."""
        layers = self.config.num_hidden_layers
        # A layer backwards, with its matrices in every scheme, takes about four times as long as forwards.
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
        """The residual stream [B, T, D] before each layer and after the last."""
        wanted, places = self._used()
        rows = torch.from_numpy(self._rows(wanted))
        streams = [rows[places].view(*self.ids.shape, -1)]
        noisy = streams[0][: -(-len(self.ids) // _NOISY_SHARE)]
        for index in range(self.config.num_hidden_layers):
            trace, quantised = Trace(), Trace()
            streams.append(self._module(index)(streams[-1], None, index, trace))
            if self.refuses:
                noisy = self._module(index, self._read_quantised)(noisy, None, index, quantised)
                logits = trace.router_logits[0][: len(noisy)].flatten(0, 1)
                margin = Margin.of(logits, self.config.num_experts_per_tok)
                self.noise[index] = margin.noise(quantised.router_logits[0].flatten(0, 1))
            advance(1)
        return streams

    def _module(self, index: int, read: Callable[[str], NDArray[np.float32]] | None = None) -> Any:
        layer = self.checkpoint.family.layer_from_disk(self.config, index, read or self.checkpoint.read_float32)
        return layer.requires_grad_(False)

    def _read_quantised(self, name: str) -> NDArray[np.float32]:
        weight = self.checkpoint.read_float32(name)
        if weight.ndim != 2 or name.endswith(".mlp.gate.weight"):
            return weight
        return self.losses.rounded(name, weight, self.about)

    def _used(self) -> tuple[Ints, Tensor]:
        """The tokens that occur, and which of them each token [N] is."""
        wanted, places = np.unique(self.ids.numpy(), return_inverse=True)
        return wanted, torch.from_numpy(places).flatten()

    def _rows(self, wanted: Ints) -> NDArray[np.float32]:
        read = self.checkpoint.read_float32
        return np.concatenate([read(EMBEDDING, slice(int(i), int(i) + 1)) for i in wanted])

    # -- head ----------------------------------------------------------------------------------------------------------

    def _head(self, stream: Tensor) -> Tensor:
        """Draw tokens; measure the head; return the gradient of log p(drawn) by the residual stream [B, T, D].

        For the head itself nothing need be drawn: the Fisher matrix of the logits is diag(p) - p p^T.
        """
        norm = self.checkpoint.family.norm_class(self.config.hidden_size, self.config.rms_norm_eps)
        norm.requires_grad_(False).weight.copy_(torch.from_numpy(self.checkpoint.read_float32("model.norm.weight")))
        leaf = stream.requires_grad_()
        final = norm(leaf).flatten(0, 1)  # [N, D]
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
        rows, columns = self.checkpoint.shape(self.head)
        step = max(1, HEAD_BLOCK_BYTES // (4 * max(columns, self.ids.numel())))
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            yield start, torch.from_numpy(self.checkpoint.read_float32(self.head, part))

    def _draw(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Log of the softmax's denominator [N], and a token [N] drawn from it: the largest of logit + Gumbel noise."""
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

    # -- back ----------------------------------------------------------------------------------------------------------

    def _layer(self, index: int, stream: Tensor, gradient: Tensor) -> Tensor:
        """Measure a layer's matrices; return the gradient by what goes into it."""
        layer = self._module(index)
        prefix = f"model.layers.{index}"
        before = stream.requires_grad_()
        with ExitStack() as hooks:
            self._watch(hooks, layer.self_attn, f"{prefix}.self_attn")
            after = before + layer.self_attn(layer.input_layernorm(before), None, index)
            middle = after.detach().requires_grad_()
            normed = layer.post_attention_layernorm(middle)
            leaf = normed.detach().requires_grad_()
            if self.mixture:
                by_normed = self._mixture(index, layer.mlp, leaf, gradient)
            else:
                self._watch(hooks, layer.mlp, f"{prefix}.mlp")
                by_normed = torch.autograd.grad(layer.mlp(leaf), leaf, gradient)[0]
            by_middle = gradient + torch.autograd.grad(normed, middle, by_normed)[0]
            return torch.autograd.grad(after, before, by_middle)[0]

    def _watch(self, hooks: ExitStack, module: Any, prefix: str) -> None:
        """Let every product in a module be measured when the gradient of its output is known."""

        def watch(name: str, product: Any) -> None:
            def hook(_module: Any, inputs: tuple[Tensor], output: Tensor) -> None:
                x, weight = inputs[0].detach().flatten(0, -2), product.weight.detach().float()

                def measured(gradient: Tensor) -> None:
                    self.losses.add_product(name, weight, x, gradient.flatten(0, -2), self.groups)

                output.register_hook(measured)  # type: ignore[no-untyped-call]  # torch has no types there

            hooks.callback(product.register_forward_hook(hook).remove)

        for name, child in module.named_children():
            if child.weight.ndim == 2:  # norms have vectors
                watch(f"{prefix}.{name}.weight", child)

    def _mixture(self, index: int, mlp: Any, x: Tensor, gradient: Tensor) -> Tensor:
        """Measure a mixture, one expert in memory at a time; the gradient by x [B, T, D]."""
        flat, by_output = x.detach().flatten(0, 1), gradient.flatten(0, 1)  # [N, D]
        logits, chosen, shares = (part.flatten(0, 1) for part in mlp.route(x))  # [N, E], [N, A], [N, A]
        margin = Margin.of(logits.detach(), chosen.shape[1]) if self.refuses else None
        by_shares, by_x, by_next = torch.zeros_like(shares), torch.zeros_like(flat), torch.zeros(len(flat))
        for expert in range(self.config.num_experts):
            tokens, place = (chosen == expert).nonzero(as_tuple=True)
            refused = tokens[:0] if margin is None else (margin.next == expert).nonzero()[:, 0]
            if len(tokens) + len(refused) == 0:
                continue
            weights = [weight.float() for weight in mlp.outside_experts[expert]]
            by_next[refused] = (_expert(flat[refused], *weights)[-1] * by_output[refused]).sum(-1)
            if len(tokens) == 0:
                continue
            rows = flat[tokens].requires_grad_()
            gate, up, inner, output = _expert(rows, *weights)
            by_row = by_output[tokens]
            by_shares[tokens, place] = (output.detach() * by_row).sum(-1)
            by_down = by_row * shares.detach()[tokens, place, None]
            by_rows, by_gate, by_up = torch.autograd.grad(output, (rows, gate, up), by_down)
            by_x.index_add_(0, tokens, by_rows)
            inputs, outputs = (rows.detach(), rows.detach(), inner.detach()), (by_gate, by_up, by_down)
            for matrix, weight, given, wanted in zip(("gate", "up", "down"), weights, inputs, outputs, strict=True):
                name = f"model.layers.{index}.mlp.experts.{expert}.{matrix}_proj.weight"
                self.losses.add_product(name, weight, given, wanted, self.groups[tokens])
        by_logits = torch.zeros_like(logits)
        if margin is not None:
            by_logits = self._swaps(index, margin, shares.detach(), by_shares, by_next, by_logits)
        return by_x.view_as(x) + torch.autograd.grad((shares, logits), x, (by_shares, by_logits))[0]

    def _swaps(
        self, index: int, margin: Margin, shares: Tensor, by_shares: Tensor, by_next: Tensor, by_logits: Tensor
    ) -> Tensor:
        """Add what the cost of swaps adds to the gradient by the router's logits [N, E]."""
        last = shares[:, -1]
        change = last * (-margin.gap).exp() * by_next - last * by_shares[:, -1]
        swaps = Swaps.of(margin.gap, change, self.noise[index])
        self.constant += swaps.constant
        seed = swaps.seed * (2 * torch.randint(0, 2, (len(last),), generator=self.random) - 1)
        by_logits.scatter_(1, margin.last[:, None], seed[:, None])
        return by_logits.scatter_(1, margin.next[:, None], -seed[:, None])

    def _embedding(self, gradient: Tensor) -> None:
        """The table by the gradient [B, T, D] of what was looked up; rows that no token reads lose nothing here."""
        wanted, places = self._used()
        flat = gradient.flatten(0, 1)
        fisher = torch.zeros(len(wanted), flat.shape[1])
        for rows in slices(self.groups):
            fisher += torch.zeros_like(fisher).index_add_(0, places[rows], flat[rows]).square_()
        tokens = 0 if self.head == EMBEDDING else len(flat)
        self.losses.add(EMBEDDING, self._rows(wanted), fisher.numpy(), tokens)


def _expert(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What gate, up, their product and down give for rows [n, D]."""
    of_gate, of_up = F.linear(x, gate), F.linear(x, up)
    inner = F.silu(of_gate) * of_up
    return of_gate, of_up, inner, F.linear(inner, down)
