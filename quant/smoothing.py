"""Smoothing: scale channels between neighbouring weights so that a model is easier to quantise.

The scaled model computes the same function. For any positive s, one number per channel, W x = (W diag(s)) (x / s). The
division by s is folded into the weight that produces x, which is exact up to float rounding:

    norm weight -> q, k, v          norm weight -> gate and up (all experts, and the router, so choices do not change)
    rows of v   -> columns of o     rows of up  -> columns of down (per expert)
    final norm  -> head, unless it is tied

The query heads of one KV head share the scales of its values. v -> o is left out if clip_qkv clips v. The norms of
OLMoE's queries and keys come after the matmuls and do not change.

s is chosen from a grid of alpha, by the error of the outputs on calibration inputs with weights rounded to nearest:

    activations    s = max|x|**alpha / max|W|**(1 - alpha)    SmoothQuant, arXiv 2211.10438, section 4
    weights        s = mean|x|**alpha                          AWQ, arXiv 2306.00978, section 3.2

No scaling is always one of the candidates. With `powers_of_two` the scales are rounded to powers of two. They change
only exponents, so weights stay in bfloat16 and the function stays the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from edgelm.errors import RecipeError
from edgelm.models.spec import Attention, Decoder, Dense, Matrix, MoE
from edgelm.progress import Progress
from edgelm.quant import codec
from edgelm.quant.activations import DYNAMIC, STATIC
from edgelm.quant.recipe import AUTO, FLOAT, Recipe
from edgelm.quant.scaled_checkpoint import Scaling, SmoothedCheckpoint, SmoothingChoice
from edgelm.quant.scheme import AnyScheme, Fp8Scheme
from edgelm.quant.source import refuse_quantized
from edgelm.reference.hooks import Hooks
from edgelm.reference.layerwise import LayerwiseReference

if TYPE_CHECKING:
    from edgelm.checkpoint import Checkpoint

TARGETS = ("activations", "weights")
ALPHAS = tuple(float(alpha) for alpha in np.linspace(0, 1, 11))
ROWS = 512
"""Input rows of a matrix kept to measure the error with; `ROWS_OF_EXPERT` for a matrix of an expert."""
ROWS_OF_EXPERT = 64
_ENOUGH = 8
_SMALLEST = 2.0**-20  # smallest magnitude of a channel relative to the largest; smaller ones count as this


@dataclass(frozen=True)
class Fold:
    """Weights that share scales s [C]: `producer` is divided by s along its first axis, columns of `consumers` times s.

    Attributes:
        producer: A norm's weight [C], or a matrix [C, ...].
        consumers: Matrices [..., C], or [..., C * group] if heads share scales.
        heads: (KV heads, query heads per KV head) if `producer` makes values. C is then KV heads * head size.
    """

    producer: str
    consumers: tuple[str, ...]
    heads: tuple[int, int] | None = None

    def spread(self, s: Tensor) -> Tensor:
        """Expand scales [C] to the columns of the consumers."""
        if self.heads is None:
            return s
        kv, group = self.heads
        return s.view(kv, 1, -1).expand(kv, group, -1).reshape(-1)

    def gathered(self, columns: Tensor) -> Tensor:
        """Reduce a value per column of the consumers to the maximum per channel, [C]."""
        if self.heads is None:
            return columns
        kv, group = self.heads
        return columns.view(kv, group, -1).amax(1).reshape(-1)


def layer_folds(decoder: Decoder, index: int) -> list[Fold]:
    """Return all folds of one layer.

    They are the norm before a part, if any, with the matrices that read it; v with o, unless v has a bias or is
    clipped; and up with down.
    """
    folds = []
    for block in decoder.layers[index]:
        part = block.part
        dense = part.experts if isinstance(part, MoE) else (part,) if isinstance(part, Dense) else ()
        if isinstance(part, Attention):
            readers = [part.q.name, part.k.name, part.v.name]
        else:
            readers = [matrix.name for network in dense for matrix in (network.gate, network.up)]
        router = [part.router.name] if isinstance(part, MoE) else []
        if block.before is not None:
            folds.append(Fold(block.before.name, (*readers, *router)))
        if isinstance(part, Attention) and part.clip is None and part.v.bias is None:
            heads = (part.kv_heads, part.heads // part.kv_heads)
            folds.append(Fold(part.v.name, (part.o.name,), heads))
        folds += [Fold(network.up.name, (network.down.name,)) for network in dense]
    return folds


def head_folds(decoder: Decoder) -> list[Fold]:
    """Return the fold of the final norm and the head. A tied head has none, as the embedding would change with it."""
    return [] if decoder.tied else [Fold(decoder.norm.name, (decoder.head.name,))]


class InputSample:
    """Statistics of a matrix's input: magnitudes of the first half of the rows, and random rows of the second half.

    Scales are computed from the magnitudes and their error is measured on the rows. With the same rows for both, every
    channel would fill the whole range, and other text would be clipped.

    Attributes:
        absmax: Largest magnitude per channel, float32 [K].
        total: Sum of magnitudes per channel, float64 [K].
        tokens: Number of rows seen, in both halves.
        rows: Kept rows, [at most `limit`, K].
    """

    def __init__(self, columns: int, limit: int) -> None:
        self.absmax = torch.zeros(columns)
        self.total = torch.zeros(columns, dtype=torch.float64)
        self.tokens = 0
        self.rows = torch.zeros(0, columns)
        self._limit = limit
        self._lots = torch.zeros(0)
        self._generator = torch.Generator().manual_seed(columns)

    def add(self, x: Tensor) -> None:
        """Add rows [..., K] to the statistics."""
        x = x.detach().reshape(-1, x.shape[-1])
        if not len(x):
            return
        self.tokens += len(x)
        first, x = x[: (len(x) + 1) // 2], x[(len(x) + 1) // 2 :]
        magnitudes = first.abs()
        self.absmax = torch.maximum(self.absmax, magnitudes.amax(0))
        self.total += magnitudes.sum(0, dtype=torch.float64)
        # Each row gets a random number, and the rows with the largest numbers are kept: a uniform sample.
        lots = torch.cat([self._lots, torch.rand(len(x), generator=self._generator)])
        self._lots, kept = lots.topk(min(self._limit, len(lots)))
        old = len(self.rows)
        rows = torch.empty(len(kept), x.shape[1])
        from_old = kept < old
        rows[from_old], rows[~from_old] = self.rows[kept[from_old]], x[kept[~from_old] - old]
        self.rows = rows


class _Watcher(Hooks):
    """Hooks that collect statistics of each matrix's input in a layer and run the search after the layer."""

    def __init__(self, search: _Search, decoder: Decoder) -> None:
        self.seen: dict[str, InputSample] = {}
        self._search = search
        self._decoder = decoder
        self._last: tuple[Tensor, InputSample] | None = None

    def inputs(self, matrix: Matrix, x: Tensor) -> Tensor:
        if self._last is not None and x is self._last[0]:
            self.seen.setdefault(matrix.name, self._last[1])
            return x
        limit = ROWS if matrix.expert is None else ROWS_OF_EXPERT
        found = self.seen.setdefault(matrix.name, InputSample(x.shape[-1], limit))
        found.add(x)
        self._last = (x, found)
        return x

    def after_layer(self, layer: int) -> None:
        self._search.run(layer_folds(self._decoder, layer), self.seen)
        self.seen, self._last = {}, None


def _candidates(
    fold: Fold, target: str, seen: Sequence[InputSample], weights: Sequence[Tensor]
) -> Iterator[tuple[Any, Any]]:
    """Yield (alpha, scales [C]) for each alpha; magnitudes are maxima over consumers and over heads that share."""
    if target == "activations":
        x = fold.gathered(torch.stack([s.absmax for s in seen]).amax(0))
    else:
        x = fold.gathered(torch.stack([s.total for s in seen]).sum(0).float())
    w = fold.gathered(torch.stack([w.abs().amax(0) for w in weights]).amax(0))
    if not x.max() or not w.max():
        return
    x, w = x.clamp_min(float(x.max()) * _SMALLEST), w.clamp_min(float(w.max()) * _SMALLEST)
    for alpha in ALPHAS:
        s = x**alpha / w ** (1 - alpha) if target == "activations" else x**alpha
        # Divide by the geometric mean, so that norms and rows keep their order of magnitude.
        yield alpha, s / s.log().mean().exp()


class _Search:
    """Chooses the scales of folds by the error of the consumers' outputs."""

    def __init__(
        self, checkpoint: Checkpoint, recipe: Recipe, target: str, powers_of_two: bool, threads: int | None
    ) -> None:
        self.checkpoint = checkpoint
        self.recipe = recipe.for_model(checkpoint.decoder)
        self.target = target
        self.powers_of_two = powers_of_two
        self.threads = threads
        self.scaling: dict[str, Scaling] = {}
        self.choices: list[SmoothingChoice] = []

    def run(self, folds: Sequence[Fold], seen: Mapping[str, InputSample]) -> None:
        """Choose the scales of each fold from the inputs of its consumers."""
        for fold in folds:
            quantised = [name for name in fold.consumers if name in seen and self._scheme(name) is not None]
            # Experts with hardly any tokens are not scaled.
            if sum(len(seen[name].rows) for name in quantised) < _ENOUGH:
                continue
            weights = [torch.from_numpy(self.checkpoint.read_float32(name)) for name in quantised]
            inputs = [seen[name] for name in quantised]
            before = self._error(fold, quantised, inputs, weights, None)
            best: tuple[float, float | None, Tensor | None] = (before, None, None)
            for alpha, s in _candidates(fold, self.target, inputs, weights):
                rounded = torch.exp2(s.log2().round()) if self.powers_of_two else s
                error = self._error(fold, quantised, inputs, weights, rounded)
                if error < best[0]:
                    best = (error, alpha, rounded)
            self.choices.append(SmoothingChoice(fold.producer, best[1], before, best[0]))
            if best[2] is not None:
                self._fold(fold, best[2])

    def _fold(self, fold: Fold, s: Tensor) -> None:
        one = Scaling()
        producer = self.scaling.get(fold.producer, one)
        self.scaling[fold.producer] = producer.over_rows(1 / s)
        for name in fold.consumers:
            self.scaling[name] = self.scaling.get(name, one).times_columns(fold.spread(s))

    def _scheme(self, name: str) -> AnyScheme | None:
        return self.recipe.scheme_for(name, self.checkpoint.shape(name))

    def _activations(self, name: str, scheme: AnyScheme) -> str:
        kind = self.recipe.activations_for(name)
        if self.target == "weights":
            return FLOAT
        if kind in (AUTO, FLOAT):
            return "fp8-token" if isinstance(scheme, Fp8Scheme) else "int8-token"
        return kind

    def _error(
        self,
        fold: Fold,
        names: Sequence[str],
        inputs: Sequence[InputSample],
        weights: Sequence[Tensor],
        s: Tensor | None,
    ) -> float:
        """Return the squared error of the outputs relative to their square, averaged over roles (q, k, v, ...)."""
        spread = None if s is None else fold.spread(s)
        error: dict[str, float] = {}
        size: dict[str, float] = {}
        for name, seen, weight in zip(names, inputs, weights, strict=True):
            scheme = self._scheme(name)
            assert scheme is not None
            x, absmax = seen.rows, seen.absmax
            if not len(x):
                continue
            exact = F.linear(x, weight)
            scaled = weight
            if spread is not None:
                x, absmax, scaled = x / spread, absmax / spread, weight * spread
            kind = self._activations(name, scheme)
            if kind in DYNAMIC:
                x = DYNAMIC[kind](x)
            elif kind in STATIC:
                x = STATIC[kind].rounding(x, max(float(absmax.max()) / STATIC[kind].largest, 1e-30))
            rounded = codec.rounded(scaled.numpy(), scheme, name=name, threads=self.threads)
            found = F.linear(x, torch.from_numpy(rounded))
            what = self.checkpoint.decoder.matrices[name].role
            # The kept rows represent all tokens of the matrix.
            share = seen.tokens / len(x)
            error[what] = error.get(what, 0.0) + share * float((found - exact).double().square().sum())
            size[what] = size.get(what, 0.0) + share * float(exact.double().square().sum())
        return float(np.mean([error[what] / size[what] if size[what] else 0.0 for what in error] or [0.0]))


@torch.no_grad()
def smooth(
    checkpoint: Checkpoint,
    windows: NDArray[np.int64],
    recipe: Recipe,
    target: str = "activations",
    *,
    powers_of_two: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> SmoothedCheckpoint:
    """Smooth a float checkpoint: scale it so that it computes the same and is easier to quantise with `recipe`.

    The model runs once over the text, layer by layer, with the inputs of one layer in memory. The result is a view of
    the checkpoint, for `WeightSource`, for calibration, or for `SmoothedCheckpoint.write`.

    Args:
        checkpoint: The float checkpoint.
        windows: Tokens of the calibration text, int64 [W, T].
        recipe: Schemes of the weights. For the target "activations" also the activation types; "auto" and "float"
            count as int8 per token there, or FP8 per token with FP8 weights.
        target: "activations" moves outliers of activations into the weights (SmoothQuant). "weights" protects weights
            with large inputs (AWQ).
        powers_of_two: Use only powers of two as scales, which change only exponents.
        threads: Threads for quantising; None for every core that this process may use.
        progress: Gets every window and layer.

    Returns:
        The scaled view of the checkpoint.

    Raises:
        RecipeError: There is no such target, or the checkpoint is quantised already.
    """
    if target not in TARGETS:
        raise RecipeError(f"there is no smoothing for {target!r}: give {' or '.join(TARGETS)}")
    refuse_quantized(checkpoint)
    search = _Search(checkpoint, recipe, target, powers_of_two, threads)
    decoder = checkpoint.decoder
    reference = LayerwiseReference(decoder, checkpoint)
    watcher = _Watcher(search, decoder)
    reference.hooks = watcher
    final = torch.from_numpy(reference.windows(windows, progress=progress, label="smoothing"))
    for fold in head_folds(decoder):
        watcher.inputs(decoder.head, final)
        search.run([fold], watcher.seen)
    return SmoothedCheckpoint(checkpoint, MappingProxyType(search.scaling), tuple(search.choices))
