"""Synthetic parity pack and device in which every number can be set, so that single checks can fail.

At every position two tokens have almost all probability; all others are unlikely and far apart. So a small change of
the two changes the KL and hardly the error of the log-probabilities, and a change of the others does the opposite.

Letters: N positions, V vocabulary, L layers, E experts.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from edgelm.parity.device_run import DeviceRun
from edgelm.parity.diagnose import DeviceTrace, choose
from edgelm.parity.limits import Limits
from edgelm.parity.logits import LogitRecord
from edgelm.parity.pack import GoldenPrompt, ParityPack, ReferenceRecord, TokenizerPrint

VOCAB, TOP, PROBES, LAYERS, EXPERTS, CHOSEN = 160, 64, 64, 3, 8, 2
PROMPTS, LENGTH, STEPS = 6, 60, 8
FED = LENGTH + STEPS - 1
COUNT = PROMPTS * FED
ALL = np.arange(COUNT)
FIRST, SECOND = 3, 4  # the two likely tokens of every position
NEXT = -7.0  # logit of the text's next token, about one in a thousand


@dataclass
class Device:
    """Results of a device. Initially they equal the pack's target to the last bit; faults change them in place."""

    at_once: np.ndarray  # [N, V]
    decoded: np.ndarray  # [N, V]
    debug: np.ndarray  # [N, V]
    sketches: np.ndarray  # [L + 1, N, 64]
    experts: np.ndarray | None  # [L, N, k]

    def run(self, pack: ParityPack) -> DeviceRun:
        """Return the results in the form of `run_device`."""
        records = [LogitRecord(pack) for _ in range(3)]
        at_once, decoded, debug = records
        at_once.put(0, self.at_once.astype(np.float32))
        debug.put(0, self.debug.astype(np.float32))
        for prompt in pack.prompts:
            rows = prompt.greedy_positions
            if prompt.greedy:
                decoded.put(rows.start, self.decoded[rows].astype(np.float32))
        norms, router = pack.target.norms, pack.target.router
        return DeviceRun(*records, trace=DeviceTrace(norms, self.sketches.astype(np.float32), router, self.experts))


@dataclass
class Scene:
    """A pack, its limits, and a device; and the logits [N, V] of both references in float64."""

    limits: Limits
    target: np.ndarray
    exact: np.ndarray
    pack: ParityPack
    device: Device
    clear: np.ndarray = field(repr=False)  # [N] where the target's choice is clear


def make_scene(limits: Limits, dense: bool) -> Scene:
    """Return a copy of a scene (see `_scene`), which may be changed."""
    return copy.deepcopy(_scene(limits, dense))


@functools.cache
def _scene(limits: Limits, dense: bool) -> Scene:
    """Make a pack of `PROMPTS` prompts, and a device that computes its target.

    The gap between the two likely tokens is alternately 2 % above and 2 % below the limit of a clear choice. The float
    reference is another model, so that a wrong comparison with it fails.
    """
    rng = np.random.default_rng(5)
    logits = rng.uniform(-14, 0, (COUNT, VOCAB)) - 10.7  # a log-sum near zero has a small rounding error in float32
    gap = limits.clear_gap * np.where(np.arange(COUNT) % 2, 1.02, 0.98)
    logits[:, FIRST], logits[:, SECOND] = gap / 2 - 0.7, -gap / 2 - 0.7
    starts = range(0, COUNT, FED)
    # The float reference continues with the second likely token, which the target does not choose.
    prompts = tuple(
        GoldenPrompt(f"p{i}", f"text {i}", f"text {i}", start, LENGTH, (SECOND,) * STEPS)
        for i, start in enumerate(starts)
    )
    ids = rng.integers(SECOND + 1, VOCAB, COUNT).astype(np.int32)
    for prompt in prompts:
        ids[prompt.start + LENGTH : prompt.start + FED] = SECOND
    pack = ParityPack(
        prompts=prompts,
        ids=ids,
        top_ids=np.zeros((COUNT, TOP), np.int32),
        probe_ids=np.linspace(SECOND + 1, VOCAB - 1, PROBES).astype(np.int32),
        reference=None,  # type: ignore[arg-type]  # filled in below: a record needs the pack's tokens
        quantized=None,
        tokenizer=TokenizerPrint(VOCAB, "ab" * 32),
    )
    text = np.flatnonzero(pack.has_next)
    logits[text, pack.next_ids[text]] = NEXT
    exact = logits + 1
    exact[:, SECOND] += 2 * limits.clear_gap + 0.5
    pack = replace(pack, top_ids=np.argsort(-exact, axis=1)[:, :TOP].astype(np.int32))
    hidden = np.cumsum(rng.standard_normal((LAYERS + 1, COUNT, 64)), axis=0).astype(np.float32)
    router = None if dense else rng.standard_normal((LAYERS, COUNT, EXPERTS)).astype(np.float32)
    pack = replace(
        pack,
        reference=record_of(pack, exact, hidden + 0.1, None if router is None else router[..., ::-1].copy()),
        quantized=record_of(pack, logits, hidden, router),
    )
    experts = pack.target.experts
    # A constant added to all logits changes no probability.
    device = Device(
        logits + 0.5, logits + 0.5, logits + 0.5, hidden.copy(), None if experts is None else experts.copy()
    )
    return Scene(limits, logits, exact, pack, device, gap > limits.clear_gap)


def record_of(pack: ParityPack, logits: np.ndarray, hidden: np.ndarray, router: np.ndarray | None) -> ReferenceRecord:
    """Return the record in a pack of a reference with logits [N, V], sketches and router logits [L, N, E]."""
    record = LogitRecord(pack)
    record.put(0, logits.astype(np.float32))
    ordered = np.sort(logits, axis=1)
    return ReferenceRecord(
        top_logits=record.top_logits,
        logsumexp=record.logsumexp.astype(np.float32),
        probe_logits=record.probe_logits,
        next_logit=record.next_logit,
        best=record.best.astype(np.int32),
        gap=(ordered[:, -1] - ordered[:, -2]).astype(np.float32),
        norms=(np.linalg.norm(hidden, axis=-1) / 8).astype(np.float32),
        sketches=hidden,
        router=router,
        experts=None if router is None else choose(router, CHOSEN),
    )


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return the log-softmax over the last axis in float64."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Return KL(P || Q) of logits [..., V] over the whole vocabulary."""
    log_p, log_q = log_softmax(p), log_softmax(q)
    return (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)


def solve(value: Callable[[np.ndarray], np.ndarray], wanted: np.ndarray, most: np.ndarray) -> np.ndarray:
    """Return the sizes between 0 and `most` at which the increasing function `value` is `wanted`."""
    low, high = np.zeros_like(most), most
    assert (value(high) > wanted).all()
    for _ in range(20):
        middle = (low + high) / 2
        small = value(middle) < wanted
        low, high = np.where(small, middle, low), np.where(small, high, middle)
    return high


def diverge(scene: Scene, where: str, rows: np.ndarray, nats: float) -> None:
    """Set KL(target || device) at these rows; the choice, the log-sum and all other tokens stay."""
    target = scene.target[rows]
    p = np.exp(target)

    def moved(share):
        logits = target.copy()
        logits[:, FIRST] = np.log(p[:, FIRST] + share)
        logits[:, SECOND] = np.log(p[:, SECOND] - share)
        return logits

    share = solve(lambda share: kl(target, moved(share)), np.full(len(rows), nats), p[:, SECOND] * (1 - 1e-12))
    getattr(scene.device, where)[rows] = moved(share) + 0.5


def recorded(scene: Scene, rows: np.ndarray) -> np.ndarray:
    """Return the columns [rows, 128] that a pack records."""
    probes = np.broadcast_to(scene.pack.probe_ids, (len(rows), len(scene.pack.probe_ids)))
    return np.concatenate([scene.pack.top_ids[rows], probes], axis=1)


def blur(scene: Scene, where: str, rows: np.ndarray, error: float, likely: int | None = None) -> None:
    """Set the relative error of the log-probabilities at these rows, by changing unlikely recorded tokens.

    `likely`: the error is that of this many most likely recorded tokens, and only these are changed.
    """
    target, columns = scene.target[rows], recorded(scene, rows)
    want = np.take_along_axis(log_softmax(target), columns, axis=1)
    counted = np.argsort(np.argsort(-want, axis=1, kind="stable"), axis=1) < (likely or columns.shape[1])
    free = np.zeros_like(target, dtype=bool)
    np.put_along_axis(free, np.where(counted, columns, FIRST), True, axis=1)
    free[np.arange(len(rows)), scene.pack.next_ids[rows]] = False
    free[:, [FIRST, SECOND]] = False

    def moved(shift):
        return target - np.where(free, shift[:, None], 0.0)

    def measured(shift):
        got = np.take_along_axis(log_softmax(moved(shift)), columns, axis=1)
        squares = np.where(counted, (got - want) ** 2, 0.0).sum(axis=1) / counted.sum(axis=1)
        return np.sqrt(squares) / want.std(axis=1)

    getattr(scene.device, where)[rows] = moved(
        solve(measured, np.full(len(rows), error), np.full(len(rows), 50 * error))
    )


def flip(scene: Scene, where: str, rows: np.ndarray) -> None:
    """Make the second token slightly more likely than the first."""
    both = np.exp(scene.target[rows][:, [FIRST, SECOND]]).sum(axis=1)
    logits = getattr(scene.device, where)
    logits[rows, FIRST] = np.log(both / 2) + 0.5
    logits[rows, SECOND] = np.log(both / 2) + 0.5 + 1e-5


def disturb(scene: Scene, layer: int, rows: np.ndarray, size: np.ndarray) -> None:
    """Change the device's sketches from `layer` on (0: the embedding) by hidden states with the norms `size`."""
    direction = np.random.default_rng(layer).standard_normal((len(rows), 64))
    direction *= 8 / np.linalg.norm(direction, axis=1, keepdims=True)
    scene.device.sketches[layer:, rows] += (direction * size[:, None]).astype(np.float32)
