"""Where a device leaves the reference: the first diverged layer, and which part of it.

Layer i takes `hidden.i` through attention, router and experts to `hidden.{i+1}`. Errors that come in are carried on by
any layer, healthy or not; what is judged is therefore the error a layer **adds**. With S the reference's sketches, D
the device's and delta_i = D_i - S_i:

    added(i, p)    = |delta_{i+1} - delta_i| / max(|S_{i+1} - S_i|, FLOOR |S_i|)     error of the layer's own update
    incoming(i, p) = max(|delta_i| / |S_i| at p, its mean over the prompt's positions up to p, 1/8 of its largest there)
    excess(i, p)   = added / (base + gain * incoming)

The incoming error counts the earlier positions too because attention mixes them in, and may look at a single one. A
layer has diverged when more positions than the limit allows have excess above 1. A position whose chosen experts differ
by a near-tie does not count in that layer: such a flip changes the output without anything being wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgelm.parity import metrics
from edgelm.parity.limits import Limits
from edgelm.parity.metrics import Floats, Mask
from edgelm.parity.pack import FloatArray, IntArray, ParityPack, ReferenceRecord

# Updates below a hundredth of the residual stream are measured against the stream: where one position carries a huge
# activation, the stream's own rounding would otherwise look like an error of the update.
FLOOR = 1e-2
# How much of one earlier position's error counts. Times a gain of 8 it is all of it.
SINGLE = 1 / 8
# Float32 rounding moves router logits by about 1e-6.
ROUTER_ROUNDING = 1e-5


@dataclass(frozen=True)
class DeviceTrace:
    """What the device's debug graph computed at the pack's N positions."""

    norms: FloatArray  # [L + 1, N]
    sketches: FloatArray  # [L + 1, N, 64]
    router: FloatArray | None  # [L, N, E]
    experts: IntArray | None  # [L, N, k]


@dataclass(frozen=True)
class LayerResult:
    """One layer's numbers; arrays over positions are summarised, NaN where there is nothing to summarise.

    `error` and `error_float` are the relative error of the layer's output against the quantised and the float
    reference (median over positions), `added` the median error of its update, `worst` the largest excess. `clear` and
    `near` are the share of positions with the reference's very experts, where its margin was clear and where it was a
    near-tie; `clear_count` the number of clear positions. `same_float` is the share of positions with the float
    reference's experts: what quantisation changed in the routing. NaN for a dense model.
    """

    layer: int
    error: float
    error_float: float
    added: float
    worst: float
    bad: int
    diverged: bool
    clear: float
    near: float
    clear_count: int
    near_count: int
    same_float: float
    severe_flips: int


@dataclass(frozen=True)
class _Suspects:
    """Per position of one layer: bad; counted (no other experts); how far its update moved; the error that came in."""

    bad: Mask
    counted: Mask
    moved: Floats
    incoming: Floats


@dataclass(frozen=True)
class Diagnosis:
    """The layers in order, the embedding's error, and the first place that is wrong.

    `first`: layer index, -1 for the embedding, None when no layer has diverged.
    """

    layers: tuple[LayerResult, ...]
    embedding_error: float
    first: int | None
    cause: str | None
    experts_seen: int
    experts_total: int


def diagnose(pack: ParityPack, trace: DeviceTrace, limits: Limits) -> Diagnosis:
    """Compare a device's trace with the pack, layer by layer."""
    want = pack.target
    error = metrics.relative_error(want.sketches, trace.sketches, want.norms)
    error_float = metrics.relative_error(pack.reference.sketches, trace.sketches, pack.reference.norms)
    embedding_error = metrics.largest(error[0])
    first: int | None = None
    cause: str | None = None
    if not embedding_error <= limits.embedding_error:
        first, cause = -1, _embedding_cause(pack, error[0], limits)
    layers = []
    for index in range(pack.num_layers):
        result, suspects = _layer(pack, want, trace, index, error, error_float, limits)
        if first is None and result.diverged:
            first, cause = index, _cause(pack, want, trace, index, suspects)
        layers.append(result)
    seen = 0
    if want.experts is not None:
        seen = sum(len(np.unique(want.experts[index])) for index in range(pack.num_layers))
    return Diagnosis(tuple(layers), embedding_error, first, cause, seen, pack.num_experts * pack.num_layers)


def _embedding_cause(pack: ParityPack, error: Floats, limits: Limits) -> str:
    bad = ~(error <= limits.embedding_error)
    tokens = np.unique(pack.ids[bad])
    if len(tokens) * 4 <= len(np.unique(pack.ids)):
        return f"embedding: the rows of token ids {', '.join(str(int(token)) for token in tokens[:8])}"
    return "embedding: most rows"


def _layer(
    pack: ParityPack,
    want: ReferenceRecord,
    trace: DeviceTrace,
    index: int,
    error: Floats,
    error_float: Floats,
    limits: Limits,
) -> tuple[LayerResult, _Suspects]:
    before = trace.sketches[index].astype(np.float64) - want.sketches[index]
    after = trace.sketches[index + 1].astype(np.float64) - want.sketches[index + 1]
    update = want.sketches[index + 1].astype(np.float64) - want.sketches[index]
    width = update.shape[-1]
    moved = np.linalg.norm(after - before, axis=-1) / np.sqrt(width)
    scale = np.maximum(np.linalg.norm(update, axis=-1) / np.sqrt(width), FLOOR * want.norms[index])
    added = moved / np.maximum(scale, 1e-30)
    incoming = np.maximum(error[index], _mixed_in(pack, error[index]))
    allowed = limits.layer_base + limits.layer_gain * incoming
    excess = added / allowed

    count = len(pack.ids)
    flips = metrics.Flips(np.zeros(count, dtype=bool), np.zeros(count))
    margin = np.full(count, np.inf)
    if want.router is not None and want.experts is not None and trace.experts is not None:
        flips = metrics.expert_flips(want.router[index], want.experts[index], trace.experts[index])
        margin = metrics.router_margin(want.router[index], want.experts.shape[-1])
    # An error that came in may tip a choice that would be clear otherwise: the tolerance grows with it.
    tolerance = limits.router_near_tie + limits.layer_gain * incoming
    severe = flips.changed & ~(flips.severity < tolerance)
    # Where the choice was open, a mixture that reads narrower logits than the router's may have made another, unseen.
    clear = margin >= limits.router_near_tie
    counted = ~flips.changed & (clear | ~np.isfinite(excess))
    bad = (counted & ~(excess <= 1)) | severe
    diverged = int(bad.sum()) > limits.bad_positions * count
    same = ~flips.changed
    result = LayerResult(
        layer=index,
        error=metrics.quantile(error[index + 1], 0.5),
        error_float=metrics.quantile(error_float[index + 1], 0.5),
        added=metrics.quantile(added[counted], 0.5),
        worst=metrics.largest(excess[counted]) if counted.any() else float("nan"),
        bad=int(bad.sum()),
        diverged=diverged,
        clear=metrics.mean(same[clear]),
        near=metrics.mean(same[~clear]),
        clear_count=int(clear.sum()),
        near_count=int((~clear).sum()),
        same_float=_same_as_float(pack, trace, index),
        severe_flips=int(severe.sum()),
    )
    return result, _Suspects(bad, counted, moved, incoming)


def _same_as_float(pack: ParityPack, trace: DeviceTrace, index: int) -> float:
    reference = pack.reference
    if reference.router is None or reference.experts is None or trace.experts is None:
        return float("nan")
    flips = metrics.expert_flips(reference.router[index], reference.experts[index], trace.experts[index])
    return metrics.mean(~flips.changed)


def _mixed_in(pack: ParityPack, error: Floats) -> Floats:
    """What attention can bring from a prompt's positions so far: their mean, or much of one that it looks at."""
    result = np.empty_like(error)
    for prompt in pack.prompts:
        rows = error[prompt.positions]
        mean = np.cumsum(rows) / np.arange(1, len(rows) + 1)
        result[prompt.positions] = np.maximum(mean, SINGLE * np.maximum.accumulate(rows))
    return result


def _cause(
    pack: ParityPack,
    want: ReferenceRecord,
    trace: DeviceTrace,
    index: int,
    suspects: _Suspects,
) -> str:
    """Name the part of layer `index` that is wrong, as narrowly as the evidence allows."""
    bad, counted = suspects.bad, suspects.counted
    firsts = np.zeros(len(bad), dtype=bool)
    firsts[[prompt.start for prompt in pack.prompts]] = True
    later = bad[~firsts]
    # A first token attends to itself alone: whatever turns or scales queries and keys cannot change it.
    scores = not bad[firsts].any() and later.mean() > 0.5
    attention = "attention scores (rotary embedding, query or key projection or norm, mask)"
    if want.router is None or want.experts is None or trace.router is None:
        if scores:
            return f"layer {index}: {attention}: first positions agree, later ones do not"
        return f"layer {index}: attention or feed-forward"
    mixture = f"layer {index}: the mixture of experts as a whole (routing weights, or gate and up): router logits agree"
    if _before_router(want, trace, index, suspects):
        mixture = f"layer {index}: attention, its norms or the router: router logits differ though the input agrees"
    else:
        guilty = metrics.guilty_experts(want.experts[index], bad & counted, ~bad & counted)
        if guilty is not None:
            who = f"expert{'s' if len(guilty) > 1 else ''} {', '.join(map(str, guilty))}"
            return f"layer {index}: {who}: only positions that chose {'them' if len(guilty) > 1 else 'it'} are wrong"
    return f"layer {index}: {attention}: first positions agree, later ones do not" if scores else mixture


def _before_router(
    want: ReferenceRecord,
    trace: DeviceTrace,
    index: int,
    suspects: _Suspects,
) -> bool:
    """Whether the router already saw the disturbance that the layer's output shows.

    The router reads the normalised residual stream after attention: a disturbance there changes its logits by about
    the same relative amount. What happens in the experts leaves them untouched.
    """
    assert want.router is not None
    assert trace.router is not None
    bad = suspects.bad
    expected, actual = want.router[index].astype(np.float64), trace.router[index].astype(np.float64)
    norms = np.maximum(np.linalg.norm(expected, axis=-1), 1e-30)
    seen = np.linalg.norm(actual - expected, axis=-1) / norms
    disturbance = np.maximum(suspects.moved / np.maximum(want.norms[index], 1e-30), 1e-30)
    ratio = (seen - 2 * suspects.incoming)[bad] / disturbance[bad]
    if np.isnan(seen[bad]).mean() > 0.5:
        return True
    # Routers are less sensitive in some directions than in others, so a hundredth counts, if it is above rounding.
    return bool(np.median(ratio) > 0.3) or bool(np.median(ratio) > 0.01 and np.median(seen[bad]) > ROUTER_ROUNDING)
