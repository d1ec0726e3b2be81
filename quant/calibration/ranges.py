"""Ranges of activations, counted while a reference model runs over calibration text, and the static scales from them.

What a matrix multiplies is counted in one pass and in bounded memory: the largest and the mean magnitude of each
channel, and a histogram of all magnitudes. Bins are the upper 13 bits of the float32 (32 to an octave), so that no
range has to be known before.

Scales are found by the largest magnitude, or by the least squared error over clip ratios: the error of a ratio is taken
from the histogram. Clipping pays where a few values stand far out (arXiv 2004.09602, section 3.3).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgelm.errors import RecipeError
from edgelm.models.spec import Decoder, Matrix
from edgelm.progress import Progress
from edgelm.quant.activations import STATIC, KvScales
from edgelm.quant.reference import activation_kinds
from edgelm.reference.hooks import Hooks
from edgelm.reference.layerwise import LayerwiseReference

if TYPE_CHECKING:
    from edgelm.checkpoint import WeightReader
    from edgelm.quant.source import WeightSource

METHODS = ("absmax", "mse")

_SHIFT = 18
_BINS = 255 << 23 - _SHIFT  # up to infinity
_POINTS = 4  # of each bin that stand for its values
_RATIOS = np.linspace(0.2, 1.0, 65)
_NO_EXPERT = "no expert"
_SEEN_ENOUGH = 32
"""Rows. An expert that saw fewer takes the range of all experts of its layer."""


class InputRange:
    """What was seen of the input [n, K] of a matrix.

    Attributes:
        absmax: float32 [K], largest magnitude of each channel.
        total: float64 [K], sum of magnitudes of each channel.
        counts: int64 [bins], how many magnitudes fell into each.
        tokens: rows seen.
    """

    def __init__(self, columns: int) -> None:
        self.absmax = torch.zeros(columns)
        self.total = torch.zeros(columns, dtype=torch.float64)
        self.counts = torch.zeros(_BINS, dtype=torch.int64)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Count rows [..., K].

        Raises:
            RecipeError: a value is not finite, so no range holds it.
        """
        magnitudes = x.detach().reshape(-1, x.shape[-1]).abs()
        if not len(magnitudes):
            return
        if not torch.isfinite(magnitudes).all():
            raise RecipeError("an activation is not finite: the checkpoint is damaged, or its weights overflow float32")
        self.absmax = torch.maximum(self.absmax, magnitudes.amax(0))
        self.total += magnitudes.sum(0, dtype=torch.float64)
        self.counts += torch.bincount(magnitudes.flatten().view(torch.int32) >> _SHIFT, minlength=_BINS)
        self.tokens += len(magnitudes)

    @property
    def mean(self) -> Tensor:
        """Mean magnitude of each channel, float32 [K]."""
        return (self.total / max(self.tokens, 1)).float()

    @property
    def largest(self) -> float:
        """The largest magnitude seen."""
        return float(self.absmax.max()) if len(self.absmax) else 0.0

    def quantile(self, share: float) -> float:
        """Return the magnitude that `share` of all values do not exceed, to 3 %."""
        counts = self.counts.numpy()
        place = int(np.searchsorted(counts.cumsum(), share * counts.sum()))
        return min(float(_edges(np.array([place + 1]))[0]), self.largest)

    def merged(self, other: InputRange) -> InputRange:
        """Return what both saw."""
        result = InputRange(len(self.absmax))
        result.absmax = torch.maximum(self.absmax, other.absmax)
        result.total = self.total + other.total
        result.counts = self.counts + other.counts
        result.tokens = self.tokens + other.tokens
        return result

    def scale(self, kind: str, method: str = "mse") -> float:
        """Return the scale of a static rounding (a key of `activations.STATIC`); 1 where only zeros were seen.

        Args:
            kind: such as "int8-static".
            method: "absmax": largest magnitude / largest code. "mse": that times the clip ratio of least error.

        Raises:
            RecipeError: no such method.
        """
        if method not in METHODS:
            raise RecipeError(f"ranges are found by {' or '.join(METHODS)}, not {method!r}")
        static = STATIC[kind]
        full = self.largest / static.largest
        if full < 2.0**-100:
            return 1.0
        if method == "absmax":
            return full
        filled = np.flatnonzero(self.counts.numpy())
        points = torch.from_numpy(_points(filled)).flatten()
        weights = self.counts[filled].repeat_interleave(_POINTS).double()
        errors = [
            float((weights * (static.rounding(points, full * float(ratio)) - points).double().square()).sum())
            for ratio in _RATIOS
        ]
        return full * float(_RATIOS[int(np.argmin(errors))])


def _edges(bins: NDArray[np.int64]) -> NDArray[np.float32]:
    return (bins.astype(np.uint32) << np.uint32(_SHIFT)).view(np.float32)


def _points(bins: NDArray[np.int64]) -> NDArray[np.float32]:
    """Float32 [bins, _POINTS]: values spread over each bin."""
    step = (1 << _SHIFT) // _POINTS
    inside = np.arange(_POINTS, dtype=np.uint32) * np.uint32(step) + np.uint32(step // 2)
    return ((bins.astype(np.uint32) << np.uint32(_SHIFT))[:, None] + inside).view(np.float32)


class RangeRecorder(Hooks):
    """Counts what goes by and changes nothing.

    Args:
        decoder: the model that is run.

    Attributes:
        ranges: of each matrix's input, by its name. Matrices that multiply the same rows share one.
        keys, values: float32 [K, Dh] largest magnitudes of each layer's cache.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.ranges: dict[str, InputRange] = {}
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self._last: tuple[Tensor, InputRange] | None = None

    def inputs(self, matrix: Matrix, x: Tensor) -> Tensor:
        """Count the rows of x [..., K]."""
        name = matrix.name
        if self._last is not None and x is self._last[0]:
            # q, k and v (gate and up) multiply the very same rows: counted once.
            self.ranges.setdefault(name, self._last[1])
            return x
        found = self.ranges.setdefault(name, InputRange(x.shape[-1]))
        try:
            found.add(x)
        except RecipeError as error:
            raise RecipeError(f"{name}: {error}") from None
        self._last = (x, found)
        return x

    def cached(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Count keys and values [B, K, T, Dh]."""
        for seen, new in ((self.keys, keys), (self.values, values)):
            largest = new.detach().abs().amax((0, 2))
            seen[layer] = torch.maximum(seen[layer], largest) if layer in seen else largest
        return keys, values

    def kv_scales(self, kind: str, *, channels: bool = False) -> dict[int, KvScales]:
        """Return static scales of every layer's cache.

        Args:
            kind: "int8" or "fp8".
            channels: keys get a scale for each channel, not for the head alone.
        """
        largest = STATIC[f"{kind}-static"].largest
        scales = {}
        for layer, keys in self.keys.items():
            of_keys = keys if channels else keys.amax(-1)
            scales[layer] = KvScales(*(_positive(s / largest) for s in (of_keys, self.values[layer].amax(-1))))
        return scales

    def scales(self, kinds: Mapping[str, str], method: str = "mse") -> dict[str, float]:
        """Return the scale of every matrix whose kind is static.

        The experts of a layer share the scale of gate and up, so that a token is rounded once for all of them; down has
        one for each expert, or, where that saw fewer than 32 rows, the one of all experts together.

        Args:
            kinds: activations of each matrix by its name; what is not static is left out.
            method: see `InputRange.scale`.

        Raises:
            RecipeError: a matrix saw nothing.
        """
        wanted = {name: kind for name, kind in kinds.items() if kind in STATIC}
        together = self._of_all_experts(wanted)
        scales: dict[str, float] = {}
        known: dict[tuple[int, str], float] = {}
        for name, kind in wanted.items():
            found = self.ranges.get(name)
            shared = self._expert_input(name)
            few = found is None or found.tokens < _SEEN_ENOUGH
            if shared in together and (few or shared[1] != "down"):
                found = together[shared]
            if found is None or not found.tokens:
                raise RecipeError(f"no calibration text reached {name}: give more text, or another activations rule")
            if (id(found), kind) not in known:
                known[id(found), kind] = found.scale(kind, method)
            scales[name] = known[id(found), kind]
        return scales

    def _expert_input(self, name: str) -> tuple[int | None, str]:
        """What the experts of a layer have in common: the layer, and which of their two inputs; of others the role."""
        matrix = self.decoder.matrices[name]
        kind = "down" if matrix.role == "down" else "in"
        return (matrix.layer, kind if matrix.expert is not None else _NO_EXPERT)

    def _of_all_experts(self, names: Iterable[str]) -> dict[tuple[int | None, str], InputRange]:
        """The ranges of all experts of a layer together: one for gate and up, one for down."""
        wanted = {shared for name in names if (shared := self._expert_input(name))[1] != _NO_EXPERT}
        result: dict[tuple[int | None, str], InputRange] = {}
        seen: set[tuple[tuple[int | None, str], int]] = set()
        for name, found in self.ranges.items():
            shared = self._expert_input(name)
            # Gate and up of an expert share one range.
            if shared not in wanted or (shared, id(found)) in seen:
                continue
            seen.add((shared, id(found)))
            result[shared] = result[shared].merged(found) if shared in result else found
        return result


def _positive(scale: Tensor) -> Tensor:
    return torch.where(scale < 2.0**-100, torch.ones_like(scale), scale)


def record_ranges(
    decoder: Decoder,
    weights: WeightReader,
    windows: NDArray[np.int64],
    progress: Progress | None = None,
) -> RangeRecorder:
    """Run a model over calibration text, layer by layer from disk, and count its activations.

    Args:
        decoder: the model.
        weights: float ones, or quantised: ranges of what will run.
        windows: int64 [W, T] tokens.
        progress: told of every window and layer.

    Raises:
        RecipeError: an activation is not finite.
    """
    recorder = RangeRecorder(decoder)
    reference = LayerwiseReference(decoder, weights, hooks=recorder)
    final = reference.windows(windows, progress=progress, label="ranges")
    recorder.inputs(decoder.head, torch.from_numpy(final))
    return recorder


def calibrated_scales(
    source: WeightSource, windows: NDArray[np.int64], method: str = "mse", progress: Progress | None = None
) -> dict[str, float]:
    """Return the input scale of every matrix whose activations a recipe has static; runs nothing where none has.

    The ranges are those of the quantised model: what a device will see.

    Args:
        source: a checkpoint and its recipe.
        windows: int64 [W, T] tokens of calibration text.
        method: see `InputRange.scale`. Clipping gave the tiny models' static int8 0.35 and 0.83 of the KL of "absmax",
            and static FP8 the same.
        progress: told of every window and layer.

    Raises:
        RecipeError: no text reached some matrix, or an activation is not finite.
    """
    kinds = activation_kinds(source)
    if not any(kind in STATIC for kind in kinds.values()):
        return {}
    recorder = record_ranges(source.checkpoint.decoder, source.dequantized(), windows, progress)
    return recorder.scales(kinds, method)
