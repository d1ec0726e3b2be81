"""Calibrate one layer: quantise its matrices one after the other while hidden states pass through it.

As in GPTQ (arXiv 2210.17323, section 4), each matrix is calibrated on inputs computed by the already quantised
matrices before it, and then computes with its own dequantised weights. The order within a layer is q, k and v; o; gate
and up; down. An expert is calibrated on the tokens that the quantised model routes to it.

The float model runs beside it on some of the samples. Matrices are calibrated to reproduce the float model's outputs
from the quantised model's inputs (`methods.drift`). The router, which stays float, is refitted in the same way, so that
it more often chooses the experts that the float model chooses.

Shape letters: S samples, T tokens per sample, N = S * T, R samples that the float model sees too, D hidden size, F
feed-forward width, n tokens of an expert.

In memory for all N tokens: the residual stream and one more array, float32 [N, D]; the same for the R * T tokens of the
float model; in a dense layer also its activations [N, F]. Everything else is computed slice by slice.
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
"""Tokens per slice: enough for matmuls at full speed, and tens of megabytes."""

PAIRED_TOKENS = 16384
"""Least number of tokens that the float model sees too: eight per column of the published models."""

Floats = NDArray[np.float32]


def aligned(values: Floats) -> Floats:
    """Copy values into memory that torch allocates, aligned to 64 bytes.

    With other alignments a matmul may sum in another order, but a resumed run must compute the same.
    """
    return cast("Floats", torch.empty(values.shape).copy_(torch.from_numpy(values)).numpy())


class Quantiser:
    """Quantises matrices by name and keeps the results.

    Args:
        weights: The float checkpoint and its recipe.
        shares: Work of each matrix, for progress.
        advance: Called with the work of a matrix when it is done.
    """

    def __init__(self, weights: WeightSource, shares: Mapping[str, float], advance: Callable[[float], None]) -> None:
        self.weights = weights
        self.tensors: dict[str, QuantTensor] = {}
        self.floats: dict[str, Floats] = {}
        self.report = LayerReport()
        self._shares = shares
        self._advance = advance

    def read(self, name: str) -> Floats:
        """Return a tensor of the checkpoint in float32."""
        return aligned(self.weights.checkpoint.read_float32(name))

    def wants_moments(self, names: Sequence[str]) -> bool:
        """Return whether any of the matrices is quantised with a method that needs moments of its inputs."""
        return any(
            self.weights.scheme(name) is not None and self.weights.recipe.rule(name).method != "rtn" for name in names
        )

    def matrix(self, name: str, moments: Moments | None, drift: Drift | None = None) -> Tensor:
        """Quantise a matrix; return its dequantised values, float32 [N, K].

        Args:
            name: Name of the matrix. If the recipe keeps it float, its own values are returned.
            moments: Moments of its inputs; None rounds to nearest.
            drift: Drift of its inputs from the float model's, to compensate; used only with moments.
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
        """Refit a float matrix to inputs that have drifted; return its new values, float32 [N, K]."""
        fitted = drift.corrected(torch.from_numpy(self.read(name)), ROUTER_DAMPING)
        self.floats[name] = fitted.numpy()
        self._advance(self._shares.get(name, 0.0))
        return fitted


def paired(samples: int, length: int) -> slice:
    """Return the samples that the float model sees too."""
    return slice(None, None, max(1, samples * length // PAIRED_TOKENS))


def sample_slices(x: Tensor) -> Iterator[slice]:
    """Yield slices of the samples of x [S, T, D]."""
    return slices(len(x), SLICE_TOKENS // x.shape[1])


class LayerStream:
    """Passes all samples through one layer and quantises it.

    Args:
        decoder: Spec of the model.
        index: Index of the layer.
        read: Read a float32 tensor of the float checkpoint by name.
        quantiser: Quantises the matrices.
        coverage: Tokens that each expert needs.
        require_coverage: Fail if an expert has too few.
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
        """Float weights at first; each matrix is replaced once it is quantised. Experts are read one by one."""
        self.run_quantised = Interpreter(decoder, self.weights)
        self.run_exact = Interpreter(decoder, LayerWeights(decoder, index, read))
        self.quantiser = quantiser
        self.coverage = coverage
        self.require_coverage = require_coverage

    def run(self, x: Tensor, reference: Tensor) -> None:
        """Quantise the layer; advance the residual streams of both models, [S, T, D] and [R, T, D], in place.

        Raises:
            EdgeLMError: Coverage is required and an expert has too few tokens.
            CheckpointError: The residual stream is no longer finite.
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
                f"the hidden states after layer {self.index} are not finite: a weight is damaged, or the recipe is too "
                "coarse for this layer"
            )

    def _quantise(self, matrix: Matrix, moments: Moments | None, drift: Drift | None) -> Tensor:
        """Quantise a matrix and use the result from now on."""
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
            # o also compensates the drift of the residual stream itself.
            apart = self._apart(block, x[pairs][part], reference[part])
            drift.add(mixed[pairs][part].flatten(0, 1), wanted.flatten(0, 1), apart)
            reference[part] += exact.norm(block.after, exact.matmul(attention.o, wanted))
        moments = self._moments([attention.o], (mixed[part] for part in sample_slices(x)))
        self._quantise(attention.o, moments, drift)
        for part in sample_slices(x):
            x[part] += run.norm(block.after, run.matmul(attention.o, mixed[part]))

    @staticmethod
    def _apart(block: Block, x: Tensor, reference: Tensor) -> Tensor | None:
        """Return the difference of the residual streams, [n, D], which the last matrix of a part compensates.

        In a block with a norm `after` it cannot, as the norm lies between: None.
        """
        return (reference - x).flatten(0, 1) if block.after is None else None

    def _moments(self, matrices: Sequence[Matrix], inputs: Iterator[Tensor]) -> Moments | None:
        """Return the moments of the inputs [..., K] that all `matrices` share; None if none of them needs moments."""
        if not self.quantiser.wants_moments([matrix.name for matrix in matrices]):
            return None
        moments: Moments | None = None
        for part in inputs:
            rows = part.reshape(-1, part.shape[-1])
            moments = Moments.zeros(rows.shape[1]) if moments is None else moments
            moments.add(rows)
        return moments

    def _dense(self, block: Block, dense: Dense, x: Tensor, normed: Tensor, reference: Tensor, exact: Tensor) -> None:
        """Quantise gate, up and down of a dense block; add their output to both streams, [S, T, D] and [R, T, D]."""
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
        """Return the drift of inputs [R, T, K] from those of the float model."""
        drift = Drift()
        for part in sample_slices(wanted):
            drift.add(inputs[part].flatten(0, 1), wanted[part].flatten(0, 1))
        return drift

    def _moe(self, block: Block, moe: MoE, x: Tensor, normed: Tensor, reference: Tensor, exact: Tensor) -> None:
        """Refit the router, quantise the experts, and add their output to both streams, [S, T, D] and [R, T, D]."""
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
        # If there is a norm after the part, the experts' outputs are summed before they are added to the stream.
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
        """Add the output of a float expert for its tokens [n], weighted with `weights` [n]."""
        if not len(tokens):
            return
        once = Interpreter(self.decoder, functools.cache(self.run_exact.read))  # caches this expert's weights only
        for part in slices(len(tokens), SLICE_TOKENS):
            out = once.dense(expert, normed[tokens[part]])
            stream.index_add_(0, tokens[part], out.mul_(weights[part, None]))

    def _expert(self, stream: Tensor, normed: Tensor, expert: Dense, share: ExpertTokens, drift: Drift) -> None:
        """Quantise gate, up and down of an expert and add its output for its own tokens.

        The drift of gate's and up's inputs is measured on all tokens, as an expert's own are too few to tell it from
        noise.
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
    """Return router logits [N, E], chosen experts [N, A] and their weights [N, A]."""
    routed = [run.route(moe, normed[part]) for part in slices(len(normed), SLICE_TOKENS)]
    logits, chosen, weights = (torch.cat(parts) for parts in zip(*routed, strict=True))
    return logits, chosen, weights


def starved_message(index: int, report: LayerReport, needed: int) -> str:
    """Return a message that names the experts of a layer with too few tokens."""
    named = ", ".join(f"{expert} ({report.tokens[expert] + report.borrowed[expert]})" for expert in report.fallbacks)
    return (
        f"layer {index}: {len(report.fallbacks)} expert(s) have fewer than {needed} calibration tokens, borrowed ones "
        f"included: {named}. Give more samples or other text, or lower --min-expert-tokens"
    )
