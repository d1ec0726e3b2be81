"""The logits on the device against the references': their distances, and the checks that hold them to the limits.

Letters: N positions, V vocabulary, M recorded tokens. Distances are computed in float64: the logits are float32 and the
differences of interest are small. Limits are in `edgelm.parity.limits`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgelm.parity.limits import LIKELY, LOSS_WARNINGS, Limits
from edgelm.parity.pack import ParityPack, ReferenceRecord
from edgelm.parity.result import Check, FloatLoss, Floats, Mask, at_least, at_most, largest, mean, quantile

_TINY = 1e-300


class Sampled(Protocol):
    """Logits at recorded tokens: a reference's or a device's."""

    @property
    def top_logits(self) -> np.ndarray: ...  # noqa: D102
    @property
    def probe_logits(self) -> np.ndarray: ...  # noqa: D102
    @property
    def logsumexp(self) -> np.ndarray: ...  # noqa: D102


class LogitRecord:
    """The device's logits at the recorded tokens of each position; NaN for positions that were not run."""

    def __init__(self, pack: ParityPack) -> None:
        count, top = pack.top_ids.shape
        self._pack = pack
        self._next_ids = pack.next_ids
        self.top_logits = np.full((count, top), np.nan, np.float32)
        self.probe_logits = np.full((count, len(pack.probe_ids)), np.nan, np.float32)
        self.next_logit = np.full(count, np.nan, np.float32)
        self.logsumexp = np.full(count, np.nan, np.float64)
        self.best = np.full(count, -1, np.int64)
        self.seen = np.zeros(count, dtype=bool)

    def put(self, first: int, logits: NDArray[np.float32]) -> int:
        """Store logits [rows, V] of the positions from `first` on; return the next position."""
        rows = slice(first, first + len(logits))
        self.top_logits[rows] = np.take_along_axis(logits, self._pack.top_ids[rows], axis=1)
        self.probe_logits[rows] = logits[:, self._pack.probe_ids]
        self.next_logit[rows] = np.take_along_axis(logits, self._next_ids[rows, None], axis=1)[:, 0]
        self.logsumexp[rows] = logsumexp(logits)
        self.best[rows] = logits.argmax(axis=1)
        self.seen[rows] = True
        return rows.stop


def logsumexp(logits: ArrayLike) -> Floats:
    """Return log sum exp over the last axis, [..., V] -> [...]."""
    values = np.asarray(logits)
    rows = values.reshape(-1, values.shape[-1])
    found = np.empty(len(rows))
    # In float64, so that every implementation finds the same; row by row, since a copy of [N, 256000] logits is large.
    for index, row in enumerate(rows):
        peak = float(row.max())
        found[index] = np.log(np.exp(row.astype(np.float64) - peak).sum()) + peak
    return found.reshape(values.shape[:-1])


def bucketed_kl(p_logits: ArrayLike, p_lse: ArrayLike, q_logits: ArrayLike, q_lse: ArrayLike) -> Floats:
    """Return KL(P || Q) in nats per position, over the recorded tokens and one bucket for all others.

    `p_logits`, `q_logits` [N, M] are the logits of the same M tokens, `*_lse` [N] the log-sum over the whole
    vocabulary. Merging outcomes can only lose information, so this is a **lower bound** of the true KL (data processing
    inequality); both are equal if the other tokens keep their proportions.
    """
    log_p = np.asarray(p_logits, np.float64) - np.asarray(p_lse, np.float64)[:, None]
    log_q = np.asarray(q_logits, np.float64) - np.asarray(q_lse, np.float64)[:, None]
    p, q = np.exp(log_p), np.exp(log_q)
    rest_p = np.clip(1 - p.sum(axis=1), 0.0, 1.0)
    # A float32 log-sum may put the recorded mass a few 1e-7 above one; a bucket below that is noise, not a zero.
    rest_q = np.clip(1 - q.sum(axis=1), 1e-7, 1.0)
    rest = np.where(rest_p > 1e-7, rest_p * (np.log(np.maximum(rest_p, _TINY)) - np.log(rest_q)), 0.0)
    return np.asarray(np.maximum((p * (log_p - log_q)).sum(axis=1) + rest, 0.0), dtype=np.float64)


def logit_error(
    expected: ArrayLike,
    actual: ArrayLike,
    expected_lse: ArrayLike | None = None,
    actual_lse: ArrayLike | None = None,
    *,
    likely: int | None = None,
) -> Floats:
    """Return the RMS difference of logits [N, M] per position, relative to the standard deviation of the expected ones.

    `likely` takes the difference at that many columns only, those with the largest expected logits; the standard
    deviation is that of all.

    With the log-sums, log-probabilities are compared, so that a constant added to every logit does not count. Unlike
    KL, this also shows errors where the distribution is flat or the token improbable.
    """
    a, b = np.asarray(expected, np.float64), np.asarray(actual, np.float64)
    if expected_lse is not None and actual_lse is not None:
        a = a - np.asarray(expected_lse, np.float64)[:, None]
        b = b - np.asarray(actual_lse, np.float64)[:, None]
    spread = np.maximum(a.std(axis=1), 1e-12)
    squares = (a - b) ** 2
    if likely is not None:
        squares = np.take_along_axis(squares, np.argsort(-a, axis=1)[:, :likely], axis=1)
    return np.asarray(np.sqrt(squares.mean(axis=1)) / spread, dtype=np.float64)


def divergence(expected: Sampled, actual: Sampled, rows: np.ndarray | None = None) -> Floats:
    """Return the bucketed KL(expected || actual) at every position (of `rows`), in nats."""
    chosen = slice(None) if rows is None else rows
    return bucketed_kl(
        expected.top_logits[chosen], expected.logsumexp[chosen], actual.top_logits[chosen], actual.logsumexp[chosen]
    )


def logit_errors(
    expected: Sampled, actual: Sampled, rows: np.ndarray | None = None, *, likely: int | None = None
) -> Floats:
    """Return the relative error of log-probabilities at the recorded tokens and probes, per position (of `rows`).

    `likely` takes that many of them only, those with the largest expected logits.
    """
    chosen = slice(None) if rows is None else rows
    want, got = (
        np.concatenate([record.top_logits[chosen], record.probe_logits[chosen]], axis=1)
        for record in (expected, actual)
    )
    return logit_error(want, got, expected.logsumexp[chosen], actual.logsumexp[chosen], likely=likely)


def agreement(expected: ArrayLike, actual: ArrayLike, where: Mask | None = None) -> float:
    """Return the share of equal entries (under `where`), NaN without entries."""
    same = np.asarray(expected) == np.asarray(actual)
    if where is not None:
        same = same[where]
    return float(same.mean()) if same.size else float("nan")


def perplexity(next_logits: ArrayLike, lse: ArrayLike, where: Mask) -> float:
    """Return exp of the mean of -log p(next token) over the positions `where`; NaN without positions."""
    if not where.any():
        return float("nan")
    loss = np.asarray(lse, np.float64)[where] - np.asarray(next_logits, np.float64)[where]
    return float(np.exp(loss.mean()))


@dataclass(frozen=True)
class GreedyResult:
    """How far a device follows a greedy continuation.

    `prefix` is the number of equal tokens from the start. `clear_differences` is the number of steps with another
    choice although the reference's choice was clear, so that rounding does not explain it. Steps after a difference
    count too: every step is fed the recorded token, whatever the device chose.
    """

    total: int
    prefix: int
    clear_differences: int


def greedy_prefix(expected: ArrayLike, actual: ArrayLike, gap: ArrayLike, near_tie: float) -> GreedyResult:
    """Compare token choices step by step; `gap` is the reference's top-1 minus top-2 logit at each step."""
    different = np.asarray(expected) != np.asarray(actual)
    prefix = int(different.argmax()) if different.any() else len(different)
    return GreedyResult(len(different), prefix, int((different & (np.asarray(gap, np.float64) >= near_tie)).sum()))


def logit_checks(pack: ParityPack, device: LogitRecord, limits: Limits) -> list[Check]:
    """Return the checks of the shipped graph at all positions at once: KL, log-probabilities, top-1, perplexity."""
    want = pack.target
    kl, error = divergence(want, device), logit_errors(want, device)
    clear = want.gap >= limits.clear_gap
    text = pack.has_next
    own = "quantised reference || device"
    ppl = perplexity(device.next_logit, device.logsumexp, text)
    ppl_want = perplexity(want.next_logit, want.logsumexp, text)
    checks = [
        at_most("logits.kl_mean", f"KL({own}), mean, nats", mean(kl), limits.kl_mean),
        at_most("logits.kl_p99", f"KL({own}), 99th percentile, nats", quantile(kl, 0.99), limits.kl_p99),
        at_most("logits.kl_max", f"KL({own}), largest, nats", largest(kl), limits.kl_max, _where(pack, kl)),
        at_most(
            "logits.error",
            "Log-probabilities: relative error against the quantised reference, median",
            quantile(error, 0.5),
            limits.logit_error,
        ),
        at_most(
            "logits.error_p90",
            "Log-probabilities: relative error against the quantised reference, 90th percentile",
            quantile(error, 0.9),
            limits.logit_error_p90,
        ),
        _top1(want, device, clear, limits),
    ]
    if not text.any():
        return [*checks, Check("perplexity", "Perplexity", None, "every prompt is a single token")]
    detail = f"quantised reference {ppl_want:.4g}, device {ppl:.4g}"
    return [
        *checks,
        at_most(
            "perplexity.device",
            "Perplexity of the prompts: |device / quantised reference - 1|",
            abs(ppl / ppl_want - 1),
            limits.perplexity,
            detail,
        ),
    ]


def _top1(want: ReferenceRecord, device: LogitRecord, clear: np.ndarray, limits: Limits) -> Check:
    title = "Most likely token as the quantised reference's, where that is clear"
    everywhere = agreement(want.best, device.best)
    detail = (
        f"{int(clear.sum())} of {len(clear)} positions are clear; over all positions {100 * everywhere:.4g} % agree"
    )
    if not clear.any():
        return Check("logits.top1", title, None, f"no position has a clear first choice; {detail}")
    return at_least("logits.top1", title, agreement(want.best, device.best, clear), limits.top1_clear, detail)


def _where(pack: ParityPack, values: Floats) -> str:
    if np.isnan(values).any():
        return f"{int(np.isnan(values).sum())} positions have logits that are NaN"
    worst = int(values.argmax())
    prompt = next(p for p in pack.prompts if p.start <= worst < p.start + p.fed)
    return f"at token {worst - prompt.start} of the prompt {prompt.name!r}"


def greedy_checks(pack: ParityPack, device: LogitRecord, limits: Limits) -> list[Check]:
    """Return the checks of decoding: prefill, then token by token through the KV cache."""
    continued = [prompt for prompt in pack.prompts if prompt.greedy]
    if not continued:
        return [Check("greedy", "Greedy continuation", None, "the pack has no greedy continuations")]
    want = pack.target
    results = greedy_results(pack, device, limits)
    clear = sum(result.clear_differences for result in results)
    same, total = sum(result.prefix for result in results), sum(result.total for result in results)
    float_same = sum(
        greedy_prefix(
            np.asarray(prompt.greedy), device.best[prompt.greedy_positions], want.gap[prompt.greedy_positions], 0.0
        ).prefix
        for prompt in continued
    )
    detail = (
        f"{same} of {total} tokens as the quantised reference up to the first difference, {float_same} as the float"
    )
    if clear:
        where = [repr(p.name) for p, result in zip(pack.prompts, results, strict=True) if result.clear_differences]
        detail = f"they are in {', '.join(where)}; {detail}"
    rows = np.concatenate(
        [np.arange(prompt.greedy_positions.start, prompt.greedy_positions.stop) for prompt in continued]
    )
    kl = divergence(want, device, rows)
    return [
        at_most(
            "greedy.tokens",
            "Greedy continuation, token by token through the cache: clear choices that differ",
            float(clear),
            float(limits.greedy_clear),
            detail,
        ),
        at_most(
            "greedy.error",
            "Log-probabilities of likely tokens while decoding: relative error against the quantised reference, median",
            quantile(logit_errors(want, device, rows, likely=LIKELY), 0.5),
            limits.decode_error,
        ),
        at_most(
            "greedy.kl",
            "KL(quantised reference || device) while decoding, largest, nats",
            largest(kl),
            limits.kl_max,
            f"{len(rows)} steps fed with the float reference's tokens",
        ),
    ]


def greedy_results(pack: ParityPack, device: LogitRecord, limits: Limits) -> list[GreedyResult]:
    """Return for each prompt how far the device's choices are the quantised reference's along the continuation."""
    want = pack.target
    return [
        greedy_prefix(want.best[steps], device.best[steps], want.gap[steps], limits.clear_gap)
        for steps in (prompt.greedy_positions for prompt in pack.prompts)
    ]


def float_loss(pack: ParityPack, device: LogitRecord, kind: str) -> FloatLoss:
    """Return the loss of the device against the float model; `kind` is the kind of recipe."""
    if pack.quantized is None and kind != "none":
        nan = float("nan")
        return FloatLoss(False, nan, nan, nan, nan, None)
    exact, want, text = pack.reference, pack.target, pack.has_next
    float_ppl, recipe_ppl, device_ppl = (
        perplexity(record.next_logit, record.logsumexp, text) for record in (exact, want, device)
    )
    kl = mean(divergence(exact, device))
    rise = device_ppl / float_ppl - 1
    large = LOSS_WARNINGS[kind]
    over = []
    if not kl < large.kl:
        over.append(f"the mean KL to the float model is {kl:.3g} nats, large from {large.kl:g} on")
    if text.any() and not rise < large.perplexity:
        over.append(f"the perplexity is {100 * rise:+.3g} %, large from {100 * large.perplexity:+g} % on")
    warning = f"{' and '.join(over)} for {kind}" if over else None
    reference = mean(divergence(exact, want))
    return FloatLoss(True, kl, reference, rise, recipe_ppl / float_ppl - 1, warning)


def float_kl(loss: FloatLoss, max_kl: float) -> Check:
    """Return the check of `max_kl`."""
    title = "KL(float reference || device), mean, nats, as --max-kl asks"
    if not loss.known:
        return Check("float_kl", title, False, f"{loss.text}, which --max-kl needs", None, max_kl)
    detail = f"the recipe by itself, by the references: {loss.kl_reference:.3g}"
    return at_most("float_kl", title, loss.kl, max_kl, detail)
