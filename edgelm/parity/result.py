"""What a parity check found: every check with its limit, the curves behind them, and a summary of a few lines."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgelm.sizes import format_number

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Check:
    """One check of the parity check.

    `passed` is None where nothing could be checked; `detail` says why. `value` passes at or below `limit` if `better`
    is "lower", at or above it if `better` is "higher".
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
    """Return the mean, NaN for an empty array."""
    array = np.asarray(values, np.float64)
    return float(array.mean()) if array.size else float("nan")


def quantile(values: ArrayLike, q: float) -> float:
    """Return a quantile, NaN for an empty array."""
    array = np.asarray(values, np.float64)
    return float(np.quantile(array, q)) if array.size else float("nan")


def largest(values: ArrayLike) -> float:
    """Return the maximum, NaN for an empty array or if any value is NaN, so that a broken device cannot pass."""
    array = np.asarray(values, np.float64)
    return float(array.max()) if array.size else float("nan")


def at_most(name: str, title: str, value: float, limit: float, detail: str = "", layer: int | None = None) -> Check:
    """Return a check that passes at or below its limit. NaN fails: the device computed no number."""
    return Check(name, title, value <= limit, detail, value, limit, "lower", layer)


def at_least(name: str, title: str, value: float, limit: float, detail: str = "", layer: int | None = None) -> Check:
    """Return a check that passes at or above its limit; NaN fails."""
    return Check(name, title, value >= limit, detail, value, limit, "higher", layer)


def passed(checks: Sequence[Check]) -> bool:
    """Return whether no check failed; a check without a result does not fail."""
    return all(check.passed is not False for check in checks)


@dataclass(frozen=True)
class FloatLoss:
    """Loss of the bundle on this device against the float model; a check only with `max_kl`.

    `kl` is the mean KL(float reference || device) in nats, `kl_reference` the same for the quantised reference: the
    cost of the recipe alone. `perplexity` and `perplexity_reference` are ratios to the float reference's perplexity,
    minus 1; NaN if every prompt is a single token. `known` is false, and all numbers are NaN, if the checkpoint was
    quantised already and the float model was not given at export. `warning` is set if the loss is large for the kind of
    recipe.
    """

    known: bool
    kl: float
    kl_reference: float
    perplexity: float
    perplexity_reference: float
    warning: str | None

    @property
    def text(self) -> str:
        """The loss in one line for people."""
        if not self.known:
            return "not known: the checkpoint was quantised already and the export had no --reference"
        line = f"mean KL {self.kl:.3g} nats (recipe alone {self.kl_reference:.3g})"
        if math.isnan(self.perplexity_reference):
            return line
        recipe = f"recipe alone {100 * self.perplexity_reference:+.2g} %"
        return f"{line}, perplexity {100 * self.perplexity:+.2g} % ({recipe})"


@dataclass(frozen=True)
class LayerResult:
    """Results of one layer, summarised over positions; NaN where there is nothing to summarise.

    `error` and `error_float` are the relative error of the layer's output against the quantised and the float
    reference (median over positions), `added` the median error of its update, `worst` the largest excess. `clear` and
    `near` are the share of positions with the reference's very experts, where its margin was clear and where it was a
    near-tie; `clear_count` the number of clear positions. `same_float` is the share of positions with the float
    reference's experts: the effect of quantisation on the routing. NaN for a dense model.
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
    """Results of the layers in order, the error of the embedding, and the first place that differs.

    `first` is a layer's index, -1 for the embedding, None if no layer differs. `cause` is "PLACE: EVIDENCE".
    """

    layers: tuple[LayerResult, ...]
    embedding_error: float
    first: int | None
    cause: str | None
    experts_seen: int
    experts_total: int


@dataclass(frozen=True)
class PromptResult:
    """Results of one parity prompt on the device; the lists have one number per position."""

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
    """Speed of the short runs of this check; `edgelm bench` measures properly."""

    load_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float


@dataclass
class ParityReport:
    """The result of a parity check. `kl_*` compare the device with the quantised reference, in nats.

    Attributes:
        ops, kv: the bundle's operator set, and the type of the KV cache.
        isa: the instruction set of the native operators' kernels, as EDGELM_ISA names it; None without them.
        engine: the package that computed and its version, "onnxruntime 1.31.1"; None for EdgeLM's own kernels.
        resident_peak: peak resident memory of the process in bytes, before the debug graph was loaded; None where the
            system does not say.
        created: the time in UTC.
        made_by: what made the report and its version, "edgelm 0.2.0" or "libedgelm 0.2.0".
    """

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
    ops: str = ""
    kv: str = ""
    isa: str | None = None
    engine: str | None = None
    resident_peak: int | None = None
    created: str = ""
    made_by: str = ""

    @property
    def failures(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if check.passed is False]

    @property
    def place(self) -> str:
        """Where the device first differs from the reference, such as "layer 2, expert 7"; empty where not known."""
        return (self.cause or "").partition(": ")[0]

    @property
    def evidence(self) -> str:
        """What tells that `place` is the cause; empty where nothing does."""
        return (self.cause or "").partition(": ")[2]

    @property
    def sentence(self) -> str:
        """The result in one plain sentence: whether the device computes the same model, and where it first differs."""
        failed = len(self.failures)
        kinds = {check.name.split(".")[0] for check in self.failures}
        if not failed:
            kl = next((check for check in self.checks if check.name == "logits.kl_mean"), None)
            known = kl is not None and kl.value is not None and kl.limit is not None
            numbers = f": mean KL {kl.value:.2g} nats, limit {kl.limit:.2g}" if kl is not None and known else ""
            return f"This device computes the same model as the reference{numbers}."
        if kinds == {"integrity"}:
            return "The bundle's files are damaged, though this device still computes the same model as the reference."
        if kinds <= {"integrity", "tokenizer"}:
            return "The bundle's tokenizer is not the one that was exported."
        if kinds == {"float_kl"}:
            if not self.float_loss.known:
                return (
                    "This device computes the same model as the reference, but the loss of quantisation is unknown, so "
                    "--max-kl cannot be checked."
                )
            return (
                "This device computes the same model as the reference, but quantisation lost more than --max-kl allows."
            )
        if kinds == {"pack"}:
            return "The bundle's parity pack is not what this checkpoint gives."
        where = f"it first differs in {self.place}" if self.place else f"{failed} checks failed"
        return f"This device does NOT compute the same model as the reference: {where}."

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON document; numbers that are not finite become null."""
        return {"format": "edgelm-parity", "format_version": 1, **json_ready(asdict(self))}


def json_ready(value: Any) -> Any:
    """Return plain lists and dicts; numbers that are not finite become null."""
    if isinstance(value, dict):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


GROUPS = {
    "files": ("integrity",),
    "tokenizer": ("tokenizer",),
    "parity pack": ("pack",),
    "logits": ("logits", "perplexity"),
    "decoding": ("greedy",),
    "layers": ("embedding", "layer", "experts", "head"),
}
"""Lines of the summary, with the beginnings of the checks' names that each stands for."""

SHORT = {
    "logits.kl_mean": "mean KL, nats:",
    "logits.kl_p99": "99th percentile of the KL, nats:",
    "logits.kl_max": "largest KL, nats:",
    "logits.error": "error of the log-probabilities, median:",
    "logits.error_p90": "error of the log-probabilities, 90th percentile:",
    "logits.top1": "share of clear positions with the same most probable token:",
    "perplexity.device": "change of the perplexity:",
    "greedy.tokens": "clear choices that differ:",
    "greedy.error": "error of the log-probabilities, median:",
    "greedy.kl": "largest KL, nats:",
    "embedding": "error of the embedding:",
    "head": "error of the log-probabilities after the last layer:",
    "pack": "difference to the pack computed now:",
}
MOST = 3
"""Failed checks that one line names."""


@dataclass(frozen=True)
class Line:
    """A line of the summary: `passed` is None where nothing was checked; `text` says what was found."""

    passed: bool | None
    name: str
    text: str


def summary_lines(report: ParityReport) -> list[Line]:
    """One line for each group of checks, for the cost of quantisation and for the speed."""
    lines = [line for name in GROUPS if (line := _group(name, report)) is not None]
    lines.append(_quantisation(report))
    if report.speed is not None:
        speed = report.speed
        prefill, decode = (format_number(rate) for rate in (speed.prefill_tokens_per_s, speed.decode_tokens_per_s))
        where = f"{report.runtime}, {report.threads} threads"
        lines.append(Line(None, "speed", f"prefill {prefill}, decode {decode} tokens/s ({where})"))
    return lines


def counted(report: ParityReport) -> str:
    """How many checks passed or failed, and which limits they were held to."""
    total, failed = sum(check.passed is not None for check in report.checks), len(report.failures)
    found = f"{failed} of {total} checks FAILED" if failed else f"all {total} checks passed"
    return f"{found}, with the limits for {report.kind}"


def _group(name: str, report: ParityReport) -> Line | None:
    checks = [check for check in report.checks if re.split(r"[.\[]", check.name)[0] in GROUPS[name]]
    failed = [check for check in checks if check.passed is False]
    if not checks:
        return None
    if failed:
        more = f"; {len(failed) - MOST} more" if len(failed) > MOST else ""
        return Line(False, name, "; ".join(_failure(check, report) for check in failed[:MOST]) + more)
    if all(check.passed is None for check in checks):
        return Line(None, name, checks[0].detail)
    return Line(True, name, _success(name, report, checks))


def _failure(check: Check, report: ParityReport) -> str:
    """A failed check in a few words."""
    if check.value is None or check.limit is None or math.isnan(check.value):
        return check.detail or f"{SHORT.get(check.name, f'{check.title}:')} not a number"
    count = f"{check.value:.0f} of {report.positions} positions"
    if check.name.startswith("layer["):
        return f"layer {check.layer} adds an error of its own at {count}"
    if check.name.startswith("experts["):
        return f"layer {check.layer} chooses other experts at {count}"
    return f"{SHORT.get(check.name, f'{check.title}:')} {check.value:.3g}, limit {check.limit:.3g}"


def _success(name: str, report: ParityReport, checks: list[Check]) -> str:
    """What a group of passed checks found, in a few words."""
    if name == "tokenizer":
        return "same token ids, same text, same vocabulary"
    if name == "logits":
        clear = "" if math.isnan(report.top1_clear) else f", {100 * report.top1_clear:.4g} % of the clear ones"
        same = f"the same at {100 * report.top1:.4g} % of positions{clear}"
        return f"mean KL {report.kl_mean:.2g} nats; most probable token {same}"
    if name == "decoding":
        different = next((check.value for check in checks if check.name == "greedy.tokens"), 0)
        choices = f"{different:.0f} clear choices differ" if different else "every clear choice is the same"
        return f"{report.greedy_total} greedy tokens through the KV cache: {choices}"
    if name == "layers" and report.diagnosis is not None:
        return f"the embedding and all {len(report.diagnosis.layers)} layers agree"
    return checks[0].detail


def _quantisation(report: ParityReport) -> Line:
    """What quantisation cost: no check, unless --max-kl makes it one."""
    check = next((check for check in report.checks if check.name == "float_kl"), None)
    if check is None:
        return Line(None, "quantisation", f"cost: {report.float_loss.text}")
    return Line(check.passed, "quantisation", f"cost: {report.float_loss.text}; --max-kl is {check.limit:g}")
