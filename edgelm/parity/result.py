"""What a parity check found: every single check with its limit, and the curves behind them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Check:
    """One quantity that the parity check judges.

    `passed` is None where there was nothing to judge, which `detail` explains. `value` and `limit` are numbers to read
    side by side; `better` says which way: "lower" passes at or below the limit, "higher" at or above.
    """

    name: str
    title: str
    passed: bool | None
    detail: str
    value: float | None = None
    limit: float | None = None
    better: str = "lower"
    layer: int | None = None


def mean(values: ArrayLike) -> float:
    """The mean, NaN for an empty array."""
    array = np.asarray(values, np.float64)
    return float(array.mean()) if array.size else float("nan")


def quantile(values: ArrayLike, q: float) -> float:
    """A quantile, NaN for an empty array."""
    array = np.asarray(values, np.float64)
    return float(np.quantile(array, q)) if array.size else float("nan")


def largest(values: ArrayLike) -> float:
    """The maximum, NaN for an empty array (and NaN where any value is NaN, so that a broken device cannot pass)."""
    array = np.asarray(values, np.float64)
    return float(array.max()) if array.size else float("nan")


def at_most(name: str, title: str, value: float, limit: float, detail: str = "", layer: int | None = None) -> Check:
    """A check that passes at or below its limit. NaN fails: it means that the device computed no number."""
    return Check(name, title, value <= limit, detail, value, limit, "lower", layer)


def at_least(name: str, title: str, value: float, limit: float, detail: str = "", layer: int | None = None) -> Check:
    """A check that passes at or above its limit; NaN fails."""
    return Check(name, title, value >= limit, detail, value, limit, "higher", layer)


def passed(checks: Sequence[Check]) -> bool:
    """Whether none failed; one that had nothing to judge fails nothing."""
    return all(check.passed is not False for check in checks)


@dataclass(frozen=True)
class FloatLoss:
    """What the bundle lost on this device against the float model. No check counts it, unless `max_kl` asks for one.

    `kl` is the mean KL(float reference || device) in nats, `kl_reference` the same of the quantised reference: what the
    recipe costs by itself. `perplexity` and `perplexity_reference` are perplexities over the float reference's, minus
    1; NaN where every prompt is a single token. `known` is false where the checkpoint was quantised already and the
    float model was not given at export: all are NaN then. `warning` says that the loss is large for the recipe's kind.
    """

    known: bool
    kl: float
    kl_reference: float
    perplexity: float
    perplexity_reference: float
    warning: str | None

    @property
    def text(self) -> str:
        """One line for people."""
        if not self.known:
            return "not known: the checkpoint was quantised already and the export had no --reference"
        line = f"mean KL(float model || device) {self.kl:.3g} nats (the recipe by itself {self.kl_reference:.3g})"
        if math.isnan(self.perplexity_reference):
            return line
        return (
            f"{line}, perplexity {100 * self.perplexity:+.2g} % (the recipe {100 * self.perplexity_reference:+.2g} %)"
        )


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


@dataclass(frozen=True)
class PromptResult:
    """One golden prompt on the device; the lists have one number per fed position."""

    name: str
    text: str
    length: int
    kl: list[float]
    kl_float: list[float]
    top1_same: list[bool]
    greedy: list[int]
    greedy_float: list[int]
    greedy_prefix: int
    greedy_text: str


@dataclass(frozen=True)
class Speed:
    """Times of this check's own runs; `edgelm bench` measures properly."""

    load_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float


@dataclass
class ParityReport:
    """The outcome and everything behind it. `kl_*` compare the device with the quantised reference, in nats."""

    bundle: str
    passed: bool
    kind: str
    checks: list[Check]
    kl_mean: float
    kl_p99: float
    kl_max: float
    float_kl_mean: float
    quantization_kl_mean: float
    float_loss: FloatLoss
    logit_error: float
    top1: float
    top1_clear: float
    top1_float: float
    perplexity_float: float
    perplexity_quantized: float
    perplexity: float
    greedy_prefix: int
    greedy_total: int
    positions: int
    first_diverged_layer: int | None
    cause: str | None
    diagnosis: Diagnosis | None
    prompts: list[PromptResult]
    speed: Speed | None
    threads: int
    runtime: str
    device: dict[str, object]
    model: dict[str, object]
    recipe: str
    source: str
    files: dict[str, dict[str, object]]
    reference: str
    tools: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def failures(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if check.passed is False]

    @property
    def sentence(self) -> str:
        """The outcome in one plain sentence: what was asked, the answer, how many checks, and where it first fails."""
        total, failed = sum(check.passed is not None for check in self.checks), len(self.failures)
        if not failed:
            return f"This device computes what the PyTorch reference computes: {total} of {total} checks passed."
        kinds = {check.name.split(".")[0] for check in self.failures}
        if kinds == {"integrity"}:
            what = "The bundle's files are not those that were exported, though the device computes the reference"
        elif kinds <= {"integrity", "tokenizer"}:
            what = "The bundle's tokenizer is not the one that was exported"
        elif kinds == {"float_kl"}:
            what = "This device computes the quantised reference, but that has lost more than --max-kl allows"
        elif kinds == {"pack"}:
            what = "The bundle's parity pack is not what this checkpoint gives"
        else:
            what = "This device does not compute what the PyTorch reference computes"
        where = {None: "", -1: ", first in the embedding"}.get(
            self.first_diverged_layer, f", first in layer {self.first_diverged_layer}"
        )
        return f"{what}: {failed} of {total} checks failed{where}."

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; numbers that are not finite become null, which JSON has no other word for."""
        return {"format": "edgelm-parity", "format_version": 1, **json_ready(asdict(self))}


def json_ready(value: Any) -> Any:
    """Plain lists and dicts; numbers that are not finite become null, which JSON has no other word for."""
    if isinstance(value, dict):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
