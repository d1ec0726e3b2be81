"""One layer of a calibration: hidden states go through it while its matrices are quantised one after the other.

As GPTQ does it (arXiv 2210.17323, section 4): each matrix is calibrated on inputs that everything quantised before it
has made, and computes with its dequantised weights from then on. Within a layer: q, k and v; o; gate and up; down. An
expert is calibrated on the tokens that the quantised model routes to it.

Shape letters: S samples, T tokens of each, N = S * T, D hidden, F feed-forward width, n tokens of an expert.

What is kept for all N tokens: the residual stream and one array beside it, [N, D] float32 each; of a dense
feed-forward block also its activations [N, F]. All else is made slice by slice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from edgelm.errors import CheckpointError, EdgeLMError
from edgelm.quant import codec
from edgelm.quant.calibration.coverage import ExpertTokens, assign
from edgelm.quant.calibration.options import CoverageOptions
from edgelm.quant.calibration.report import LayerReport, TensorReport
from edgelm.quant.methods import Moments, calibrate
from edgelm.quant.recipe import AUTO
from edgelm.quant.source import WeightSource
from edgelm.quant.tensor import QuantTensor

SLICE_TOKENS = 8192
"""Tokens in work at once: enough for matrix products at full speed, and tens of megabytes."""

Floats = NDArray[np.float32]


def aligned(values: Floats) -> Floats:
    """The same values where torch would have put them, on a multiple of 64 bytes.

    Matrix products may add up in another order on other alignments; a run that is resumed must compute the same.
    """
    return cast("Floats", torch.empty(values.shape).copy_(torch.from_numpy(values)).numpy())


class Quantiser:
    """Quantises matrices by their names and keeps what came of it.

    Args:
        weights: the float checkpoint seen through the recipe.
        work: how much of the whole each matrix is.
        advance: told that of each when it is done.
    """

    def __init__(self, weights: WeightSource, work: Mapping[str, float], advance: Callable[[float], None]) -> None:
        self.weights = weights
        self.tensors: dict[str, QuantTensor] = {}
        self.report = LayerReport()
        self._work = work
        self._advance = advance

    def read(self, name: str) -> Floats:
        """A tensor of the checkpoint, float32."""
        return aligned(self.weights.checkpoint.read_float32(name))

    def wants_moments(self, names: Sequence[str]) -> bool:
        """Whether any of the matrices has its codes chosen by its inputs."""
        return any(
            self.weights.scheme(name) is not None and self.weights.recipe.rule(name).method != "rtn" for name in names
        )

    def matrix(self, name: str, moments: Moments | None) -> Tensor:
        """Quantise a matrix; returns the float32 [N, K] that a device computes with.

        `moments` of its inputs; None rounds to nearest. What the recipe keeps float comes back as it is.
        """
        weight = self.read(name)
        scheme = self.weights.scheme(name)
        if scheme is not None:
            method = "rtn" if moments is None else self.weights.recipe.rule(name).method or AUTO
            made = calibrate(weight, scheme, moments, method=method, name=name)
            self.tensors[name] = made.tensor
            measured = moments is not None
            self.report.tensors[name] = TensorReport(
                made.tensor.scheme.name,
                made.method,
                float(made.error) if measured else None,
                {key: float(value) for key, value in made.errors.items()} if measured else {},
            )
            weight = aligned(codec.dequantize(made.tensor, threads=torch.get_num_threads()))
        self._advance(self._work.get(name, 0.0))
        return torch.from_numpy(weight)


class LayerStream:
    """Takes all samples through a layer.

    Args:
        config: of the model.
        index: of the layer.
        layer: its module, with float weights; experts are read one by one.
        quantiser: takes the matrices.
        coverage: when an expert has seen enough.
        require_coverage: fail where one has not.
    """

    def __init__(
        self,
        config: Any,
        index: int,
        layer: Any,
        quantiser: Quantiser,
        coverage: CoverageOptions,
        require_coverage: bool,
    ) -> None:
        self.config = config
        self.index = index
        self.layer = layer
        self.quantiser = quantiser
        self.coverage = coverage
        self.require_coverage = require_coverage
        self.prefix = f"model.layers.{index}"

    def run(self, x: Tensor) -> None:
        """Advance the residual stream [S, T, D] through the layer, in place, quantising on the way.

        Raises:
            EdgeLMError: coverage is required and some expert has too few tokens.
            CheckpointError: the stream ceases to be finite.
        """
        self._attention(x)
        stream = x.view(-1, x.shape[-1])  # [N, D]
        normed = torch.empty_like(stream)
        for part in slices(len(stream)):
            normed[part] = self.layer.post_attention_layernorm(stream[part])
        if getattr(self.config, "num_experts", 0):
            self._mixture(stream, normed)
        else:
            self._feed_forward(stream, normed, f"{self.prefix}.mlp", None)
        if not all(torch.isfinite(stream[part]).all() for part in slices(len(stream))):
            raise CheckpointError(
                f"the hidden states after layer {self.index} are not finite: some weight is damaged, or the recipe "
                "rounds this layer to uselessness"
            )

    def _attention(self, x: Tensor) -> None:
        attention, norm = self.layer.self_attn, self.layer.input_layernorm
        prefix = f"{self.prefix}.self_attn"
        samples = list(slices(len(x), max(1, SLICE_TOKENS // x.shape[1])))
        names = [f"{prefix}.{matrix}_proj.weight" for matrix in "qkv"]
        moments = self._moments(names, (norm(x[part]) for part in samples))
        for name, module in zip(names, (attention.q_proj, attention.k_proj, attention.v_proj), strict=True):
            module.weight.data = self.quantiser.matrix(name, moments)
        del moments
        mixed = torch.empty(*x.shape[:2], attention.o_proj.weight.shape[1])  # [S, T, H*Dh]
        for part in samples:
            mixed[part] = attention.attend(*attention.project(norm(x[part])), None, self.index)
        name = f"{prefix}.o_proj.weight"
        attention.o_proj.weight.data = self.quantiser.matrix(name, self._moments([name], (mixed[p] for p in samples)))
        for part in samples:
            x[part] += attention.o_proj(mixed[part])

    def _moments(self, names: Sequence[str], inputs: Iterator[Tensor]) -> Moments | None:
        """The moments of inputs [..., K] that all the matrices `names` have in common; None where none wants them."""
        if not self.quantiser.wants_moments(names):
            return None
        moments: Moments | None = None
        for part in inputs:
            rows = part.reshape(-1, part.shape[-1])
            moments = Moments.zeros(rows.shape[1]) if moments is None else moments
            moments.add(rows)
        return moments

    def _mixture(self, stream: Tensor, normed: Tensor) -> None:
        mlp = self.layer.mlp
        name = f"{self.prefix}.mlp.gate.weight"
        router = self._moments([name], (normed[part] for part in slices(len(normed))))
        mlp.gate.weight.data = self.quantiser.matrix(name, router)
        routed = [mlp.route(normed[part]) for part in slices(len(normed))]
        logits, chosen, weights = (torch.cat(parts) for parts in zip(*routed, strict=True))
        needed = self.coverage.threshold(max(self.config.hidden_size, self.config.intermediate_size))
        shares = assign(logits, chosen, weights, self.coverage, needed)
        report = self.quantiser.report
        report.tokens = [len(share.own) for share in shares]
        report.borrowed = [len(share.borrowed) for share in shares]
        report.fallbacks = [expert for expert, share in enumerate(shares) if share.starved]
        if report.fallbacks and self.require_coverage:
            raise EdgeLMError(starved_message(self.index, report, needed))
        for expert, share in enumerate(shares):
            self._feed_forward(stream, normed, f"{self.prefix}.mlp.experts.{expert}", share)

    def _feed_forward(self, stream: Tensor, normed: Tensor, prefix: str, share: ExpertTokens | None) -> None:
        """Quantise gate, up and down of an expert (or of a dense block: no `share`) and add what they compute."""
        tokens = None if share is None else share.seen
        count = len(normed) if tokens is None else len(tokens)
        own = count if share is None else len(share.own)
        blind = share is not None and (share.starved or not count)

        def picked(part: slice) -> Tensor:
            return normed[part] if tokens is None else normed[tokens[part]]

        pair = [f"{prefix}.{matrix}_proj.weight" for matrix in ("gate", "up")]
        moments = None if blind else self._moments(pair, (picked(part) for part in slices(count)))
        gate, up = (self.quantiser.matrix(name, moments) for name in pair)
        del moments
        inner = torch.empty(own if blind else count, len(gate))  # [n, F]
        for part in slices(len(inner)):
            rows = picked(part)
            inner[part] = F.silu(F.linear(rows, gate)) * F.linear(rows, up)
        name = f"{prefix}.down_proj.weight"
        down = self.quantiser.matrix(
            name, None if blind else self._moments([name], (inner[part] for part in slices(count)))
        )
        for part in slices(own):
            out = F.linear(inner[part], down)
            if share is None:
                stream[part] += out
            else:
                stream.index_add_(0, share.own[part], out.mul_(share.weights[part, None]))


def slices(count: int, size: int | None = None) -> Iterator[slice]:
    """Cut 0 .. count into slices of `size`, or of `SLICE_TOKENS`."""
    size = SLICE_TOKENS if size is None else size
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def starved_message(index: int, report: LayerReport, needed: int) -> str:
    """Name the experts of a layer that saw too few tokens."""
    named = ", ".join(f"{expert} ({report.tokens[expert] + report.borrowed[expert]})" for expert in report.fallbacks)
    return (
        f"layer {index}: {len(report.fallbacks)} expert(s) see fewer than {needed} calibration tokens, with those that "
        f"route near them: {named}. Give more samples or other text, or lower --min-expert-tokens"
    )
