"""Find the first layer in which a device differs from the reference, and the part of it that is wrong.

Layer i takes `hidden.i` through attention, router and experts to `hidden.{i+1}`. Every layer passes on the error
of its input; therefore the error that a layer **adds** is compared. With S the reference's sketches, D
the device's and delta_i = D_i - S_i:

    added(i, p)    = |delta_{i+1} - delta_i| / max(|S_{i+1} - S_i|, floor |S_i|)     error of the layer's own update
    incoming(i, p) = max(|delta_i| / |S_i| at p, its mean over the prompt's positions up to p, 1/8 of its largest there)
    excess(i, p)   = added / (base + gain * incoming)

The incoming error includes earlier positions, because attention mixes them in and may look at a single one. A layer has
diverged if more positions than the limit allows have an excess above 1. A position whose chosen experts differ by a
near-tie does not count in that layer: such a flip changes the output although nothing is wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgelm.parity.limits import LAYER_RULES, Limits
from edgelm.parity.logits import LogitRecord, logit_errors
from edgelm.parity.pack import FloatArray, IntArray, ParityPack, ReferenceRecord
from edgelm.parity.result import Check, Diagnosis, Floats, LayerResult, Mask, at_most, largest, mean, quantile
from edgelm.parity.sketch import relative_error
from edgelm.sizes import format_number


@dataclass(frozen=True)
class DeviceTrace:
    """Results of the device's debug graph at the pack's N positions."""

    norms: FloatArray  # [L + 1, N]
    sketches: FloatArray  # [L + 1, N, 64]
    router: FloatArray | None  # [L, N, E]
    experts: IntArray | None  # [L, N, k]


def choose(router: ArrayLike, k: int) -> NDArray[np.int32]:
    """Return the indices of the k largest router logits [..., E], largest first; of equals the lower index first.

    Softmax is monotone, so this is also the choice by weight.
    """
    return np.argsort(-np.asarray(router, np.float64), axis=-1, kind="stable")[..., :k].astype(np.int32)


def router_margin(router: ArrayLike, k: int) -> Floats:
    """Return the gap of the k-th and the (k+1)-th router logit, [..., E] -> [...], in standard deviations.

    The standard deviation is that of the position's logits, so that one limit serves routers of any temperature. The
    gap is infinite where every expert is chosen.
    """
    logits = np.asarray(router, np.float64)
    if k >= logits.shape[-1]:
        return np.full(logits.shape[:-1], np.inf)
    ordered = -np.sort(-logits, axis=-1)
    spread = np.maximum(logits.std(axis=-1), 1e-12)
    return np.asarray((ordered[..., k - 1] - ordered[..., k]) / spread, dtype=np.float64)


@dataclass(frozen=True)
class Flips:
    """Per position: whether the sets of chosen experts differ, and by how much.

    `severity` is the reference logit of the best dropped expert minus that of the worst added expert, in standard
    deviations. It is near zero for a flip by rounding, and zero where nothing differs.
    """

    changed: Mask
    severity: Floats


def expert_flips(router: ArrayLike, expected: ArrayLike, actual: ArrayLike) -> Flips:
    """Compare chosen experts [N, k] as sets, with the reference's router logits [N, E]."""
    logits = np.asarray(router, np.float64)
    count = logits.shape[-1]
    want, got = _as_sets(expected, count), _as_sets(actual, count)
    dropped, added = want & ~got, got & ~want
    changed: Mask = np.asarray(dropped.any(axis=-1))
    best_dropped = np.where(dropped, logits, -np.inf).max(axis=-1)
    worst_added = np.where(added, logits, np.inf).min(axis=-1)
    spread = np.maximum(logits.std(axis=-1), 1e-12)
    severity = np.zeros(len(logits))
    severity[changed] = (best_dropped[changed] - worst_added[changed]) / spread[changed]
    return Flips(changed, severity)


def _as_sets(chosen: ArrayLike, count: int) -> Mask:
    indices = np.asarray(chosen, dtype=np.int64)
    sets = np.zeros((*indices.shape[:-1], count), dtype=bool)
    np.put_along_axis(sets, indices, True, axis=-1)
    return sets


@dataclass(frozen=True)
class _Suspects:
    """Per position of one layer: whether it is bad, whether it counts, error of the update, error of the input."""

    bad: Mask
    counted: Mask
    moved: Floats
    incoming: Floats


def diagnose(pack: ParityPack, trace: DeviceTrace, limits: Limits) -> Diagnosis:
    """Compare a device's trace with the pack, layer by layer."""
    want = pack.target
    error = relative_error(want.sketches, trace.sketches, want.norms)
    error_float = relative_error(pack.reference.sketches, trace.sketches, pack.reference.norms)
    embedding_error = largest(error[0])
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
        return f"the embedding, rows of token ids {', '.join(str(int(token)) for token in tokens[:8])}"
    return "the embedding, most rows"


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
    scale = np.maximum(np.linalg.norm(update, axis=-1) / np.sqrt(width), LAYER_RULES.floor * want.norms[index])
    added = moved / np.maximum(scale, 1e-30)
    incoming = np.maximum(error[index], _mixed_in(pack, error[index]))
    allowed = limits.layer_base + limits.layer_gain * incoming
    excess = added / allowed

    count = len(pack.ids)
    flips = Flips(np.zeros(count, dtype=bool), np.zeros(count))
    margin = np.full(count, np.inf)
    if want.router is not None and want.experts is not None and trace.experts is not None:
        flips = expert_flips(want.router[index], want.experts[index], trace.experts[index])
        margin = router_margin(want.router[index], want.experts.shape[-1])
    # An error of the input may flip a choice that is otherwise clear: the tolerance grows with it.
    tolerance = limits.router_near_tie + limits.layer_gain * incoming
    severe = flips.changed & ~(flips.severity < tolerance)
    # At near-ties an MoE operator with logits of lower precision may choose other experts.
    clear = margin >= limits.router_near_tie
    counted = ~flips.changed & (clear | ~np.isfinite(excess))
    bad = (counted & ~(excess <= 1)) | severe
    diverged = int(bad.sum()) > limits.bad_positions * count
    same = ~flips.changed
    result = LayerResult(
        layer=index,
        error=quantile(error[index + 1], 0.5),
        error_float=quantile(error_float[index + 1], 0.5),
        added=quantile(added[counted], 0.5),
        worst=largest(excess[counted]) if counted.any() else float("nan"),
        bad=int(bad.sum()),
        diverged=diverged,
        clear=mean(same[clear]),
        near=mean(same[~clear]),
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
    flips = expert_flips(reference.router[index], reference.experts[index], trace.experts[index])
    return mean(~flips.changed)


def _mixed_in(pack: ParityPack, error: Floats) -> Floats:
    """Return the error that attention can bring from earlier positions: their mean, or a share of the largest."""
    result = np.empty_like(error)
    for prompt in pack.prompts:
        rows = error[prompt.positions]
        mean = np.cumsum(rows) / np.arange(1, len(rows) + 1)
        result[prompt.positions] = np.maximum(mean, LAYER_RULES.single * np.maximum.accumulate(rows))
    return result


def _cause(
    pack: ParityPack,
    want: ReferenceRecord,
    trace: DeviceTrace,
    index: int,
    suspects: _Suspects,
) -> str:
    """Name the part of layer `index` that is wrong, as closely as the evidence allows: "PLACE: EVIDENCE"."""
    bad, counted = suspects.bad, suspects.counted
    firsts = np.zeros(len(bad), dtype=bool)
    firsts[[prompt.start for prompt in pack.prompts]] = True
    later = bad[~firsts]
    # A first token attends to itself alone, so errors of queries and keys cannot change it.
    scores = not bad[firsts].any() and later.mean() > 0.5
    attention = "attention scores (rotary embedding, query or key projection or norm, mask)"
    if want.router is None or want.experts is None or trace.router is None:
        if scores:
            return f"layer {index}, {attention}: first positions agree, later ones do not"
        return f"layer {index}, attention or feed-forward"
    moe = f"layer {index}, the MoE block as a whole (routing weights, or gate and up): router logits agree"
    if _before_router(want, trace, index, suspects):
        moe = f"layer {index}, attention, its norms or the router: router logits differ though the input agrees"
    else:
        guilty = guilty_experts(want.experts[index], bad & counted, ~bad & counted)
        if guilty is not None:
            who = f"expert{'s' if len(guilty) > 1 else ''} {', '.join(map(str, guilty))}"
            return f"layer {index}, {who}: only positions that chose {'them' if len(guilty) > 1 else 'it'} are wrong"
    return f"layer {index}, {attention}: first positions agree, later ones do not" if scores else moe


def _before_router(
    want: ReferenceRecord,
    trace: DeviceTrace,
    index: int,
    suspects: _Suspects,
) -> bool:
    """Return whether the router's logits already show the error of the layer's output.

    The router reads the normalised residual stream after attention: an error there changes its logits by about the
    same relative amount. An error of the experts does not change them.
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
    # Routers are less sensitive in some directions, so a hundredth counts if it is above rounding.
    typical, rules = float(np.median(ratio)), LAYER_RULES
    return typical > rules.before_router or (
        typical > rules.before_router_if_seen and float(np.median(seen[bad])) > rules.router_rounding
    )


def guilty_experts(experts: ArrayLike, bad: Mask, good: Mask) -> list[int] | None:
    """Return the few experts that explain the bad positions and not the good ones; None if there is no such set.

    `experts` [N, k] are the experts that both sides chose. An expert is suspect if at least 70 % of the positions that
    used it are bad; not all, since a position that gave it almost no weight stays good. Suspects are taken by greedy
    set cover, the one that explains most unexplained positions first. None if no position is good, or if more than an
    eighth of the experts in use would be needed.
    """
    chosen = np.asarray(experts, dtype=np.int64)
    if not bad.any() or not good.any():
        return None
    count = int(chosen.max()) + 1
    in_bad = np.bincount(chosen[bad].ravel(), minlength=count)
    in_use = in_bad + np.bincount(chosen[good].ravel(), minlength=count)
    suspects = (in_bad > 0) & (in_bad >= LAYER_RULES.suspect * in_use)
    left = bad.copy()
    guilty: list[int] = []
    while left.any():
        explained = np.bincount(chosen[left].ravel(), minlength=count) * suspects
        worst = int(explained.argmax())
        if explained[worst] == 0:
            return None
        guilty.append(worst)
        left &= ~(chosen == worst).any(axis=-1)
    return sorted(guilty) if len(guilty) <= max(2, int((in_use > 0).sum()) // 8) else None


def layer_checks(pack: ParityPack, debug: LogitRecord, diagnosis: Diagnosis, limits: Limits) -> list[Check]:
    """Return the checks of the debug graph: embedding, layers, experts, logits."""
    count = len(pack.ids)
    allowed = limits.bad_positions * count
    checks = [
        at_most(
            "embedding",
            "Embedding: relative error, largest",
            diagnosis.embedding_error,
            limits.embedding_error,
            diagnosis.cause or "" if diagnosis.first == -1 else "",
        )
    ]
    for layer in diagnosis.layers:
        detail = f"added error {layer.added:.3g} (median), worst {format_number(layer.worst, 2)} times the allowed"
        if layer.layer == diagnosis.first:
            detail = f"{diagnosis.cause}; {detail}"
        elif layer.diverged:
            detail = f"its input was wrong already; {detail}"
        title = f"Layer {layer.layer}: positions at which it adds an error of its own"
        checks.append(at_most(f"layer[{layer.layer}]", title, float(layer.bad), allowed, detail, layer.layer))
        if pack.num_experts:
            checks.append(_expert_check(layer.layer, diagnosis, allowed))
    seen = debug.seen
    if seen.any():
        error = logit_errors(pack.target, debug)[seen]
        checks.append(
            at_most(
                "head",
                "Debug graph: relative error of the log-probabilities, median",
                quantile(error, 0.5),
                limits.head_error + limits.layer_gain * _last_error(diagnosis),
            )
        )
    return checks


def _expert_check(index: int, diagnosis: Diagnosis, allowed: float) -> Check:
    layer = diagnosis.layers[index]
    clear = "none" if not layer.clear_count else f"{100 * layer.clear:.4g} % of {layer.clear_count}"
    near = "none" if not layer.near_count else f"{100 * layer.near:.4g} % of {layer.near_count}"
    title = f"Layer {index}: positions with other experts than a near-tie explains"
    detail = f"same experts where the margin is clear: {clear} positions; at near-ties: {near}"
    return at_most(f"experts[{index}]", title, float(layer.severe_flips), allowed, detail, index)


def _last_error(diagnosis: Diagnosis) -> float:
    error = diagnosis.layers[-1].error if diagnosis.layers else diagnosis.embedding_error
    return error if math.isfinite(error) else 0.0
