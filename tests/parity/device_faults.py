"""Faults of a synthetic device (synthetic.py). Each one brings a single check near its limit."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from edgelm.parity.check import judge
from edgelm.parity.limits import LIKELY

from .synthetic import ALL, CHOSEN, COUNT, Scene, blur, disturb, diverge, flip

INSIDE, OUTSIDE = 0.98, 1.02
"""Size of a check's value relative to its limit."""


def failures(scene: Scene) -> set[str]:
    """Return the names of the checks that fail."""
    found, _ = judge(scene.pack, scene.device.run(scene.pack), scene.limits)
    return {item.name for item in found if item.passed is False}


def judged(scene: Scene, name: str):
    """Return the check of that name."""
    found, _ = judge(scene.pack, scene.device.run(scene.pack), scene.limits)
    return next(item for item in found if item.name == name)


def steps(scene: Scene) -> np.ndarray:
    """Return the rows that choose greedy tokens."""
    return np.concatenate([ALL[prompt.greedy_positions] for prompt in scene.pack.prompts])


def kl_mean(scene: Scene, size: float) -> None:
    # A quarter of the positions, so that the median does not change.
    rows = ALL[::4]
    diverge(scene, "at_once", rows, size * scene.limits.kl_mean * COUNT / len(rows))


def kl_p99(scene: Scene, size: float) -> None:
    # The worst hundredth of the positions does not count.
    diverge(scene, "at_once", ALL[10:13], 5 * scene.limits.kl_p99)
    diverge(scene, "at_once", ALL[20:23], size * scene.limits.kl_p99)


def kl_max(scene: Scene, size: float) -> None:
    diverge(scene, "at_once", ALL[77:78], size * scene.limits.kl_max)


def error(scene: Scene, size: float) -> None:
    # Nearly half of the positions may exceed the median.
    blur(scene, "at_once", ALL[: COUNT // 2 - 2], 2.5 * scene.limits.logit_error)
    blur(scene, "at_once", ALL[COUNT // 2 - 2 :], size * scene.limits.logit_error)


def error_p90(scene: Scene, size: float) -> None:
    # Nearly a tenth may exceed the ninth decile; the median is far below.
    blur(scene, "at_once", ALL[:38], 2 * scene.limits.logit_error_p90)
    blur(scene, "at_once", ALL[38:50], size * scene.limits.logit_error_p90)


def top1(scene: Scene, size: float) -> None:
    # Unclear choices may change.
    flip(scene, "at_once", ALL[~scene.clear][:1])
    allowed = math.floor((1 - scene.limits.top1_clear) * scene.clear.sum())
    flip(scene, "at_once", ALL[scene.clear][: allowed + (size > 1)])


def perplexity_above(scene: Scene, size: float) -> None:
    rows = np.flatnonzero(scene.pack.has_next)
    scene.device.at_once[rows, scene.pack.next_ids[rows]] -= math.log1p(size * scene.limits.perplexity)


def perplexity_below(scene: Scene, size: float) -> None:
    rows = np.flatnonzero(scene.pack.has_next)
    scene.device.at_once[rows, scene.pack.next_ids[rows]] -= math.log1p(-size * scene.limits.perplexity)


def greedy_tokens(scene: Scene, size: float) -> None:
    # Also after a difference that does not count, since every step gets the recorded token.
    rows = ALL[scene.pack.prompts[2].greedy_positions]
    clear = scene.clear[rows]
    flip(scene, "decoded", rows[~clear])
    flip(scene, "decoded", rows[clear][2 : 3 + scene.limits.greedy_clear - (size < 1)])


def greedy_error(scene: Scene, size: float) -> None:
    rows = steps(scene)
    blur(scene, "decoded", rows[:20], 3 * scene.limits.decode_error, LIKELY)
    blur(scene, "decoded", rows[20:], size * scene.limits.decode_error, LIKELY)


def greedy_kl(scene: Scene, size: float) -> None:
    diverge(scene, "decoded", steps(scene)[5:6], size * scene.limits.kl_max)


def embedding(scene: Scene, size: float) -> None:
    rows = ALL[100:101] if size > 1 else ALL
    disturb(scene, 0, rows, size * scene.limits.embedding_error * scene.pack.target.norms[0, rows])


def layer(scene: Scene, size: float) -> None:
    rows = ALL[100:101] if size > 1 else ALL
    want = scene.pack.target
    update = np.linalg.norm((want.sketches[2] - want.sketches[1])[rows], axis=1) / 8
    disturb(scene, 2, rows, size * scene.limits.layer_base * update)


def experts(scene: Scene, size: float) -> None:
    """In layer 1 of one position, replace the last selected expert by the first that was not selected."""
    want = scene.pack.target
    router = want.router[1, 50]
    order = np.argsort(-router)
    last, out = order[CHOSEN - 1], order[CHOSEN]
    for _ in range(20):  # iterate, since the unit of the error, the spread, depends on the logit itself
        router[out] = router[last] - size * scene.limits.router_near_tie * router.std()
    scene.device.experts[1, 50, CHOSEN - 1] = out


def head(scene: Scene, size: float) -> None:
    blur(scene, "debug", ALL[: COUNT // 2 - 2], 50 * scene.limits.head_error)
    blur(scene, "debug", ALL[COUNT // 2 - 2 :], size * scene.limits.head_error)


# For each check: the changes that bring it to its limit, and the checks that fail beyond it. That is the check alone,
# except for experts, where a clear change makes the layer wrong as well.
Fault = Callable[[Scene, float], None]
JUDGED: dict[str, tuple[tuple[Fault, ...], frozenset[str]]] = {
    "logits.kl_mean": ((kl_mean,), frozenset({"logits.kl_mean"})),
    "logits.kl_p99": ((kl_p99,), frozenset({"logits.kl_p99"})),
    "logits.kl_max": ((kl_max,), frozenset({"logits.kl_max"})),
    "logits.error": ((error,), frozenset({"logits.error"})),
    "logits.error_p90": ((error_p90,), frozenset({"logits.error_p90"})),
    "logits.top1": ((top1,), frozenset({"logits.top1"})),
    "perplexity.device": ((perplexity_above, perplexity_below), frozenset({"perplexity.device"})),
    "greedy.tokens": ((greedy_tokens,), frozenset({"greedy.tokens"})),
    "greedy.error": ((greedy_error,), frozenset({"greedy.error"})),
    "greedy.kl": ((greedy_kl,), frozenset({"greedy.kl"})),
    "embedding": ((embedding,), frozenset({"embedding"})),
    "layer": ((layer,), frozenset({"layer[1]"})),
    "experts": ((experts,), frozenset({"experts[1]", "layer[1]"})),
    "head": ((head,), frozenset({"head"})),
}
