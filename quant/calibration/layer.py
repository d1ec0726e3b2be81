"""One layer of a calibration: hidden states go through it while its matrices are quantised one after the other.

As GPTQ does it (arXiv 2210.17323, section 4): each matrix is calibrated on inputs that everything quantised before it
has made, and computes with its dequantised weights from then on. Within a layer: q, k and v; o; gate and up; down. An
expert is calibrated on the tokens that the quantised model routes to it.

The float model runs beside it on some of the samples. Where the two part, matrices are calibrated towards what the
float model computes (`methods.drift`), and the router, which stays float, is fitted to the quantised model's states: it
then chooses the experts that the float model's router chooses more often.

Shape letters: S samples, T tokens of each, N = S * T, R samples that the float model sees too, D hidden, F feed-forward
width, n tokens of an expert.

What is kept for all N tokens: the residual stream and one array beside it, [N, D] float32, and as much for the R * T
tokens of the float model; of a dense feed-forward block also its activations [N, F]. All else is made slice by slice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgelm.errors import CheckpointError, EdgeLMError
from edgelm.models.spec import Attention, Block, Decoder, Dense, Matrix, MoE
from edgelm.quant import codec
from edgelm.quant.calibration.coverage import ExpertTokens, assign
from edgelm.quant.calibration.options import CoverageOptions
from edgelm.quant.calibration.report import LayerReport, TensorReport
from edgelm.quant.methods import Moments, calibrate
from edgelm.quant.methods.drift import ROUTER_DAMPING, Drift
from edgelm.quant.recipe import AUTO
from edgelm.quant.source import WeightSource
from edgelm.quant.tensor import QuantTensor
from edgelm.reference.interpreter import Interpreter
from edgelm.reference.layerwise import LayerWeights
from edgelm.slices import slices

SLICE_TOKENS = 8192
"""Tokens at once: enough for matmuls at full speed, and tens of megabytes."""

PAIRED_TOKENS = 16384
"""Tokens that the float model sees too, at least: eight for each column of the published models."""

Floats = NDArray[np.float32]


def aligned(values: Floats) -> Floats:
    """The same values where torch would have put them, on a multiple of 64 bytes.

    Matmuls may add up in another order on other alignments; a run that is resumed must compute the same.
    """
    return cast("Floats", torch.empty(values.shape).copy_(torch.from_numpy(values)).numpy())


class Quantiser:
    """Quantises matrices by their names and keeps what came of it.

    Args:
        weights: the float checkpoint seen through the recipe.
        shares: of the whole run that each matrix takes.
        advance: told that of each when it is done.
    """

    def __init__(self, weights: WeightSource, shares: Mapping[str, float], advance: Callable[[float], None]) -> None:
        self.weights = weights
        self.tensors: dict[str, QuantTensor] = {}
        self.floats: dict[str, Floats] = {}
        self.report = LayerReport()
        self._shares = shares
        self._advance = advance

    def read(self, name: str) -> Floats:
        """A tensor of the checkpoint, float32."""
        return aligned(self.weights.checkpoint.read_float32(name))

    def wants_moments(self, names: Sequence[str]) -> bool:
        """Whether any of the matrices has its quantised values chosen by its inputs."""
        return any(
            self.weights.scheme(name) is not None and self.weights.recipe.rule(name).method != "rtn" for name in names
        )

    def matrix(self, name: str, moments: Moments | None, drift: Drift | None = None) -> Tensor:
        """Quantise a matrix; returns the float32 [N, K] that a device computes with.

        `moments` of its inputs; None rounds to nearest. What the recipe keeps float comes back as it is. `drift` of
        its inputs from the float model's makes up for it, where there are moments.
        """
        weight = self.read(name)
        if moments is not None and drift is not None and self.weights.scheme(name) is not None:
            weight = drift.corrected(torch.from_numpy(weight)).numpy()
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
        self._advance(self._shares.get(name, 0.0))
        return torch.from_numpy(weight)

    def fit(self, name: str, drift: Drift) -> Tensor:
        """A matrix that stays float, fitted to inputs that have drifted; returns the float32 [N, K]."""
        fitted = drift.corrected(torch.from_numpy(self.read(name)), ROUTER_DAMPING)
        self.floats[name] = fitted.numpy()
        self._advance(self._shares.get(name, 0.0))
        return fitted


def paired(samples: int, length: int) -> slice:
    """Which of the samples the float model sees too."""
    return slice(None, None, max(1, samples * length // PAIRED_TOKENS))


def sample_slices(x: Tensor) -> Iterator[slice]:
    """Slices of the samples of [S, T, D]."""
    return slices(len(x), SLICE_TOKENS // x.shape[1])


class LayerStream:
    """Takes all samples through a layer.

    Args:
        decoder: the model.
        index: of the layer.
        read: gives a float32 tensor of the float checkpoint.
        quantiser: takes the matrices.
        coverage: when an expert has seen enough.
        require_coverage: fail where one has not.
    """

    def __init__(
        self,
        decoder: Decoder,
        index: int,
        read: Callable[[str], Floats],
        quantiser: Quantiser,
        coverage: CoverageOptions,
        require_coverage: bool,
    ) -> None:
        self.decoder = decoder
        self.index = index
        self.weights = LayerWeights(decoder, index, read)
        """Float at first; each matrix is replaced by its quantised one on the way. Experts are read one by one."""
        self.run_quantised = Interpreter(decoder, self.weights)
        self.run_exact = Interpreter(decoder, LayerWeights(decoder, index, read))
        self.quantiser = quantiser
        self.coverage = coverage
        self.require_coverage = require_coverage

    def run(self, x: Tensor, reference: Tensor) -> None:
        """Advance the residual stream [S, T, D], and that of the float model [R, T, D], in place.

        Raises:
            EdgeLMError: coverage is required and some expert has too few tokens.
            CheckpointError: the stream ceases to be finite.
        """
        for block in self.decoder.layers[self.index]:
            if isinstance(block.part, Attention):
                self._attention(block, block.part, x, reference)
                continue
            normed, exact = torch.empty_like(x), torch.empty_like(reference)
            for part in sample_slices(x):
                normed[part] = self.run_quantised.norm(block.before, x[part])
            for part in sample_slices(reference):
                exact[part] = self.run_exact.norm(block.before, reference[part])
            if isinstance(block.part, MoE):
                self._moe(block, block.part, x, normed, reference, exact)
            else:
                self._dense(block, block.part, x, normed, reference, exact)
        if not all(torch.isfinite(x[part]).all() for part in sample_slices(x)):
            raise CheckpointError(
                f"the hidden states after layer {self.index} are not finite: some weight is damaged, or the recipe "
                "rounds this layer to uselessness"
            )

    def _quantise(self, matrix: Matrix, moments: Moments | None, drift: Drift | None) -> Tensor:
        """Quantise a matrix, and compute with it from now on."""
        weight = self.quantiser.matrix(matrix.name, moments, drift)
        self.weights.replace(matrix.name, weight)
        return weight

    def _attention(self, block: Block, attention: Attention, x: Tensor, reference: Tensor) -> None:
        run, exact = self.run_quantised, self.run_exact
        pairs = paired(*x.shape[:2])
        drift = Drift()
        for part in sample_slices(reference):
            found, wanted = (run.norm(block.before, stream[part]) for stream in (x[pairs], reference))
            drift.add(found.flatten(0, 1), wanted.flatten(0, 1))
        projections = (attention.q, attention.k, attention.v)
        inputs = (run.norm(block.before, x[part]) for part in sample_slices(x))
        moments = self._moments(projections, inputs)
        for matrix in projections:
            self._quantise(matrix, moments, drift)
        del moments
        mixed = torch.empty(*x.shape[:2], attention.o.columns)  # [S, T, H*Dh]
        for part in sample_slices(x):
            projected = run.project(attention, run.norm(block.before, x[part]))
            mixed[part] = run.attend(attention, *projected, None, self.index)
        drift = Drift()
        for part in sample_slices(reference):
            projected = exact.project(attention, run.norm(block.before, reference[part]))
            wanted = exact.attend(attention, *projected, None, self.index)
            # The stream's own drift before this layer is for o to make up for too.
            apart = self._apart(block, x[pairs][part], reference[part])
            drift.add(mixed[pairs][part].flatten(0, 1), wanted.flatten(0, 1), apart)
            reference[part] += exact.norm(block.after, exact.matmul(attention.o, wanted))
        moments = self._moments([attention.o], (mixed[part] for part in sample_slices(x)))
        self._quantise(attention.o, moments, drift)
        for part in sample_slices(x):
            x[part] += run.norm(block.after, run.matmul(attention.o, mixed[part]))

    @staticmethod
    def _apart(block: Block, x: Tensor, reference: Tensor) -> Tensor | None:
        """How far the streams have parted, [n, D], for the last matrix of a part to make up for.

        A norm stands between that matrix and the stream in a block with `after`: then it cannot.
        """
        return (reference - x).flatten(0, 1) if block.after is None else None

    def _moments(self, matrices: Sequence[Matrix], inputs: Iterator[Tensor]) -> Moments | None:
        """The moments of inputs [..., K] that all of `matrices` have in common; None where none wants them."""
        if not self.quantiser.wants_moments([matrix.name for matrix in matrices]):
            return None
        moments: Moments | None = None
        for part in inputs:
            rows = part.reshape(-1, part.shape[-1])
            moments = Moments.zeros(rows.shape[1]) if moments is None else moments
            moments.add(rows)
        return moments

    def _dense(self, block: Block, dense: Dense, x: Tensor, normed: Tensor, reference: Tensor, exact: Tensor) -> None:
        """Quantise gate, up and down of a dense block and add what they compute; of both models, [S or R, T, D]."""
        pairs = paired(*x.shape[:2])
        pair = (dense.gate, dense.up)
        moments = self._moments(pair, (normed[part] for part in sample_slices(x)))
        drift = self._drift(normed[pairs], exact)
        for matrix in pair:
            self._quantise(matrix, moments, drift)
        del moments
        inner = torch.empty(*x.shape[:2], dense.gate.rows)  # [S, T, F]
        for part in sample_slices(x):
            inner[part] = self.run_quantised.gated(dense, normed[part])
        drift = Drift()
        for part in sample_slices(reference):
            wanted = self.run_exact.gated(dense, exact[part])
            apart = self._apart(block, x[pairs][part], reference[part])
            drift.add(inner[pairs][part].flatten(0, 1), wanted.flatten(0, 1), apart)
            reference[part] += self.run_exact.norm(block.after, self.run_exact.matmul(dense.down, wanted))
        moments = self._moments([dense.down], (inner[part] for part in sample_slices(x)))
        self._quantise(dense.down, moments, drift)
        for part in sample_slices(x):
            x[part] += self.run_quantised.norm(block.after, self.run_quantised.matmul(dense.down, inner[part]))

    def _drift(self, inputs: Tensor, wanted: Tensor) -> Drift:
        """Of inputs [R, T, K] from those of the float model."""
        drift = Drift()
        for part in sample_slices(wanted):
            drift.add(inputs[part].flatten(0, 1), wanted[part].flatten(0, 1))
        return drift

    def _moe(self, block: Block, moe: MoE, x: Tensor, normed: Tensor, reference: Tensor, exact: Tensor) -> None:
        """Fit the router, quantise the experts and add what they compute; of both models, [S or R, T, D]."""
        drift = self._drift(normed[paired(*x.shape[:2])], exact)
        x, normed, reference, exact = (stream.view(-1, stream.shape[-1]) for stream in (x, normed, reference, exact))
        name = moe.router.name
        if self.quantiser.weights.scheme(name) is None:
            self.weights.replace(name, self.quantiser.fit(name, drift))
        else:
            inputs = (normed[part] for part in slices(len(normed), SLICE_TOKENS))
            self._quantise(moe.router, self._moments([moe.router], inputs), drift)
        logits, chosen, weights = _routes(self.run_quantised, moe, normed)
        needed = self.coverage.needed(moe)
        shares = assign(logits, chosen, weights, self.coverage, needed)
        report = self.quantiser.report
        report.tokens = [len(share.own) for share in shares]
        report.borrowed = [len(share.borrowed) for share in shares]
        report.fallbacks = [expert for expert, share in enumerate(shares) if share.starved]
        if report.fallbacks and self.require_coverage:
            raise EdgeLMError(starved_message(self.index, report, needed))
        _, chosen, weights = _routes(self.run_exact, moe, exact)
        # With a norm after the part the outputs of all experts are summed before they are added to the stream.
        sums = (x, reference) if block.after is None else (torch.zeros_like(x), torch.zeros_like(reference))
        for expert, share in enumerate(shares):
            tokens, rank = (chosen == expert).nonzero(as_tuple=True)
            self._exact_expert(sums[1], exact, moe.experts[expert], tokens, weights[tokens, rank])
            self._expert(sums[0], normed, moe.experts[expert], share, drift)
        if block.after is not None:
            for part in slices(len(x), SLICE_TOKENS):
                x[part] += self.run_quantised.norm(block.after, sums[0][part])
            for part in slices(len(reference), SLICE_TOKENS):
                reference[part] += self.run_exact.norm(block.after, sums[1][part])

    def _exact_expert(self, stream: Tensor, normed: Tensor, expert: Dense, tokens: Tensor, weights: Tensor) -> None:
        """Add what an expert of the float model computes for its tokens [n], weighed with `weights` [n]."""
        if not len(tokens):
            return
        once = Interpreter(self.decoder, functools.cache(self.run_exact.read))  # an expert is kept by nobody else
        for part in slices(len(tokens), SLICE_TOKENS):
            out = once.dense(expert, normed[tokens[part]])
            stream.index_add_(0, tokens[part], out.mul_(weights[part, None]))

    def _expert(self, stream: Tensor, normed: Tensor, expert: Dense, share: ExpertTokens, drift: Drift) -> None:
        """Quantise gate, up and down of an expert and add what they compute for its own tokens.

        The drift of gate's and up's inputs is that of all tokens: an expert's own are too few to tell it from noise.
        """
        tokens = share.seen
        count = len(tokens)
        blind = share.starved or not count
        run, pair, parts = self.run_quantised, (expert.gate, expert.up), list(slices(count, SLICE_TOKENS))
        moments = None if blind else self._moments(pair, (normed[tokens[part]] for part in parts))
        for matrix in pair:
            self._quantise(matrix, moments, drift)
        del moments
        inner = torch.empty(len(share.own) if blind else count, expert.gate.rows)  # [n, F]
        for part in slices(len(inner), SLICE_TOKENS):
            inner[part] = run.gated(expert, normed[tokens[part]])
        moments = None if blind else self._moments([expert.down], (inner[part] for part in parts))
        self._quantise(expert.down, moments, None)
        for part in slices(len(share.own), SLICE_TOKENS):
            out = run.matmul(expert.down, inner[part])
            stream.index_add_(0, share.own[part], out.mul_(share.weights[part, None]))
        self.weights.forget(expert)


def _routes(run: Interpreter, moe: MoE, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Router logits [N, E], experts [N, A] and their weights [N, A]."""
    routed = [run.route(moe, normed[part]) for part in slices(len(normed), SLICE_TOKENS)]
    logits, chosen, weights = (torch.cat(parts) for parts in zip(*routed, strict=True))
    return logits, chosen, weights


def starved_message(index: int, report: LayerReport, needed: int) -> str:
    """Name the experts of a layer that saw too few tokens."""
    named = ", ".join(f"{expert} ({report.tokens[expert] + report.borrowed[expert]})" for expert in report.fallbacks)
    return (
        f"layer {index}: {len(report.fallbacks)} expert(s) see fewer than {needed} calibration tokens, with those that "
        f"route near them: {named}. Give more samples or other text, or lower --min-expert-tokens"
    )
