"""Turns measurements into checks: one function per subject, each giving lines that pass or fail."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from edgelm.parity import metrics
from edgelm.parity.device_run import DeviceRun, LogitRecord
from edgelm.parity.diagnose import Diagnosis, diagnose
from edgelm.parity.limits import LOSS_WARNINGS, SAME_PACK, Limits
from edgelm.parity.metrics import Floats
from edgelm.parity.pack import ParityPack, ReferenceRecord
from edgelm.parity.result import Check, FloatLoss
from edgelm.sizes import format_number

if TYPE_CHECKING:
    from edgelm.tokenization.tokenizer import Tokenizer


class Sampled(Protocol):
    """Logits at recorded tokens: a reference's or a device's."""

    @property
    def top_logits(self) -> np.ndarray: ...  # noqa: D102
    @property
    def probe_logits(self) -> np.ndarray: ...  # noqa: D102
    @property
    def logsumexp(self) -> np.ndarray: ...  # noqa: D102


def divergence(expected: Sampled, actual: Sampled, rows: np.ndarray | None = None) -> Floats:
    """Bucketed KL(expected || actual) at every position (of `rows`), in nats."""
    chosen = slice(None) if rows is None else rows
    return metrics.bucketed_kl(
        expected.top_logits[chosen], expected.logsumexp[chosen], actual.top_logits[chosen], actual.logsumexp[chosen]
    )


def logit_errors(
    expected: Sampled, actual: Sampled, rows: np.ndarray | None = None, *, likely: int | None = None
) -> Floats:
    """Relative error of the log-probabilities at the recorded tokens and the probes, per position (of `rows`).

    `likely`: at so many of them only, those that are most likely as expected.
    """
    chosen = slice(None) if rows is None else rows
    want, got = (
        np.concatenate([record.top_logits[chosen], record.probe_logits[chosen]], axis=1)
        for record in (expected, actual)
    )
    return metrics.logit_error(want, got, expected.logsumexp[chosen], actual.logsumexp[chosen], likely=likely)


def at_most(name: str, title: str, value: float, limit: float, detail: str = "", layer: int | None = None) -> Check:
    """A check that passes at or below its limit. NaN fails: it means that the device computed no number."""
    return Check(name, title, value <= limit, detail, value, limit, "lower", layer)


def at_least(name: str, title: str, value: float, limit: float, detail: str = "", layer: int | None = None) -> Check:
    """A check that passes at or above its limit; NaN fails."""
    return Check(name, title, value >= limit, detail, value, limit, "higher", layer)


def judge(pack: ParityPack, run: DeviceRun, limits: Limits) -> tuple[list[Check], Diagnosis | None]:
    """Every check of what a device computed; and where it left the reference, None where it was not traced."""
    checks = logits(pack, run, limits) + greedy(pack, run, limits)
    if run.trace is None:
        return checks, None
    diagnosis = diagnose(pack, run.trace, limits)
    return checks + layers(pack, run, diagnosis, limits), diagnosis


def passed(checks: Sequence[Check]) -> bool:
    """Whether none failed; one that had nothing to judge fails nothing."""
    return all(check.passed is not False for check in checks)


def integrity(problems: Sequence[str]) -> Check:
    """Every file as it was exported."""
    detail = "; ".join(problems[:8]) or "every file has the hash it was exported with"
    return Check("integrity", "Files: hashes", not problems, detail)


def tokenizer(tokenizer: Tokenizer, pack: ParityPack) -> list[Check]:
    """The bundle's tokenizer gives the pack's ids, reads them back, and has its vocabulary."""
    wrong, unread = [], []
    for prompt in pack.prompts:
        ids = pack.ids[prompt.start : prompt.start + prompt.length].tolist()
        encoded = tokenizer.encode(prompt.text)
        if encoded[: prompt.length] != ids:
            wrong.append(prompt.name)
        if tokenizer.decode(ids) != prompt.decoded:
            unread.append(prompt.name)
    checks = [
        Check(
            "tokenizer.encode",
            "Tokenizer: same ids for the prompts",
            not wrong,
            f"other ids for: {', '.join(wrong)}" if wrong else f"{len(pack.prompts)} prompts",
        ),
        Check(
            "tokenizer.decode",
            "Tokenizer: same text for the ids",
            not unread,
            f"other text for: {', '.join(unread)}" if unread else f"{len(pack.prompts)} prompts",
        ),
    ]
    if pack.tokenizer is not None:
        size, known = tokenizer.vocab_size, pack.tokenizer
        same = size == known.vocab_size and tokenizer.fingerprint() == known.sha256
        detail = f"{size:,} tokens"
        if size != known.vocab_size:
            detail = f"{size:,} tokens, the checkpoint's tokenizer had {known.vocab_size:,}"
        elif not same:
            detail = "some ids stand for other texts, some texts have other ids, or special ids differ"
        checks.append(Check("tokenizer.vocabulary", "Tokenizer: same vocabulary", same, detail))
    return checks


def same_pack(stored: ParityPack, live: ParityPack) -> Check:
    """The pack in the bundle is what the checkpoint gives now, up to rounding of another machine's matrix products."""
    title = "Parity pack: as recomputed from the checkpoint"
    if stored.ids.shape != live.ids.shape or not np.array_equal(stored.ids, live.ids):
        return Check("pack", title, False, "the tokens differ: other prompts, tokenizer or greedy continuation")
    worst = 0.0
    for a, b in ((stored.reference, live.reference), (stored.target, live.target)):
        if a.sketches.shape != b.sketches.shape:
            return Check("pack", title, False, "the pack is of another model")
        errors = metrics.relative_error(b.sketches, a.sketches, b.norms)
        worst = max(worst, metrics.quantile(errors, 0.99), metrics.quantile(logit_errors(b, a), 0.99))
    detail = "99th percentile over positions and layers of the relative difference"
    return at_most("pack", title, worst, SAME_PACK, detail)


def logits(pack: ParityPack, run: DeviceRun, limits: Limits) -> list[Check]:
    """The shipped graph's logits against both references."""
    want, device = pack.target, run.at_once
    kl, error = divergence(want, device), logit_errors(want, device)
    clear = want.gap >= limits.clear_gap
    text = pack.has_next
    own = "quantised reference || device"
    ppl = metrics.perplexity(device.next_logit, device.logsumexp, text)
    ppl_want = metrics.perplexity(want.next_logit, want.logsumexp, text)
    checks = [
        at_most("logits.kl_mean", f"KL({own}), mean, nats", metrics.mean(kl), limits.kl_mean),
        at_most("logits.kl_p99", f"KL({own}), 99th percentile, nats", metrics.quantile(kl, 0.99), limits.kl_p99),
        at_most("logits.kl_max", f"KL({own}), largest, nats", metrics.largest(kl), limits.kl_max, _where(pack, kl)),
        at_most(
            "logits.error",
            "Log-probabilities: relative error against the quantised reference, median",
            metrics.quantile(error, 0.5),
            limits.logit_error,
        ),
        at_most(
            "logits.error_p90",
            "Log-probabilities: relative error against the quantised reference, 90th percentile",
            metrics.quantile(error, 0.9),
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


def float_loss(pack: ParityPack, device: LogitRecord, kind: str) -> FloatLoss:
    """What the device lost against the float model; `kind` is the recipe's."""
    if pack.quantized is None and kind != "none":
        nan = float("nan")
        return FloatLoss(False, nan, nan, nan, nan, None)
    exact, want, text = pack.reference, pack.target, pack.has_next
    perplexities = [metrics.perplexity(record.next_logit, record.logsumexp, text) for record in (exact, want, device)]
    kl = metrics.mean(divergence(exact, device))
    perplexity = perplexities[2] / perplexities[0] - 1
    large = LOSS_WARNINGS[kind]
    over = []
    if not kl < large.kl:
        over.append(f"the mean KL to the float model is {kl:.3g} nats, large from {large.kl:g} on")
    if text.any() and not perplexity < large.perplexity:
        over.append(f"the perplexity is {100 * perplexity:+.3g} %, large from {100 * large.perplexity:+g} % on")
    warning = f"{' and '.join(over)} for {kind}" if over else None
    reference = metrics.mean(divergence(exact, want))
    return FloatLoss(True, kl, reference, perplexity, perplexities[1] / perplexities[0] - 1, warning)


def float_kl(loss: FloatLoss, max_kl: float) -> Check:
    """The check that `max_kl` asks for."""
    title = "KL(float reference || device), mean, nats, as --max-kl asks"
    if not loss.known:
        return Check("float_kl", title, False, f"{loss.text}, which --max-kl needs", None, max_kl)
    detail = f"the recipe by itself, by the references: {loss.kl_reference:.3g}"
    return at_most("float_kl", title, loss.kl, max_kl, detail)


def _top1(want: ReferenceRecord, device: LogitRecord, clear: np.ndarray, limits: Limits) -> Check:
    title = "Most likely token as the quantised reference's, where that is clear"
    everywhere = metrics.agreement(want.best, device.best)
    detail = (
        f"{int(clear.sum())} of {len(clear)} positions are clear; over all positions {100 * everywhere:.4g} % agree"
    )
    if not clear.any():
        return Check("logits.top1", title, None, f"no position has a clear first choice; {detail}")
    return at_least("logits.top1", title, metrics.agreement(want.best, device.best, clear), limits.top1_clear, detail)


def _where(pack: ParityPack, values: Floats) -> str:
    if np.isnan(values).any():
        return f"{int(np.isnan(values).sum())} positions have logits that are no numbers"
    worst = int(values.argmax())
    prompt = next(p for p in pack.prompts if p.start <= worst < p.start + p.fed)
    return f"at token {worst - prompt.start} of the prompt {prompt.name!r}"


def greedy(pack: ParityPack, run: DeviceRun, limits: Limits) -> list[Check]:
    """The graph as it is used: prefill, then token by token through the cache."""
    continued = [prompt for prompt in pack.prompts if prompt.greedy]
    if not continued:
        return [Check("greedy", "Greedy continuation", None, "the pack has no greedy continuations")]
    want, device = pack.target, run.decoded
    results = greedy_results(pack, run, limits)
    clear = sum(result.clear_differences for result in results)
    same, total = sum(result.prefix for result in results), sum(result.total for result in results)
    float_same = sum(
        metrics.greedy_prefix(
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
            metrics.quantile(logit_errors(want, device, rows, likely=metrics.LIKELY), 0.5),
            limits.decode_error,
        ),
        at_most(
            "greedy.kl",
            "KL(quantised reference || device) while decoding, largest, nats",
            metrics.largest(kl),
            limits.kl_max,
            f"{len(rows)} steps fed with the float reference's tokens",
        ),
    ]


def greedy_results(pack: ParityPack, run: DeviceRun, limits: Limits) -> list[metrics.GreedyResult]:
    """For each prompt, how far the device chooses as the quantised reference along the recorded continuation."""
    want, device = pack.target, run.decoded
    return [
        metrics.greedy_prefix(want.best[steps], device.best[steps], want.gap[steps], limits.clear_gap)
        for steps in (prompt.greedy_positions for prompt in pack.prompts)
    ]


def layers(pack: ParityPack, run: DeviceRun, diagnosis: Diagnosis, limits: Limits) -> list[Check]:
    """The debug graph, layer by layer, and its logits."""
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
            detail = f"what came in was wrong already; {detail}"
        title = f"Layer {layer.layer}: positions at which it adds an error of its own"
        checks.append(at_most(f"layer[{layer.layer}]", title, float(layer.bad), allowed, detail, layer.layer))
        if pack.num_experts:
            checks.append(_experts(layer.layer, diagnosis, allowed))
    seen = run.debug.seen
    if seen.any():
        error = logit_errors(pack.target, run.debug)[seen]
        checks.append(
            at_most(
                "head",
                "Debug graph: relative error of the log-probabilities, median",
                metrics.quantile(error, 0.5),
                limits.head_error + limits.layer_gain * _last_error(diagnosis),
            )
        )
    return checks


def _last_error(diagnosis: Diagnosis) -> float:
    error = diagnosis.layers[-1].error if diagnosis.layers else diagnosis.embedding_error
    return error if math.isfinite(error) else 0.0


def _experts(index: int, diagnosis: Diagnosis, allowed: float) -> Check:
    layer = diagnosis.layers[index]
    clear = "none" if not layer.clear_count else f"{100 * layer.clear:.4g} % of {layer.clear_count}"
    near = "none" if not layer.near_count else f"{100 * layer.near:.4g} % of {layer.near_count}"
    title = f"Layer {index}: positions with other experts than a near-tie explains"
    detail = f"same experts where the margin is clear: {clear} positions; at near-ties: {near}"
    return at_most(f"experts[{index}]", title, float(layer.severe_flips), allowed, detail, index)


def first_divergence(diagnosis: Diagnosis | None, checks: Sequence[Check]) -> tuple[int | None, str | None]:
    """The first layer that is wrong (-1: the embedding) and what is known about the cause."""
    failed = {check.name for check in checks if check.passed is False}
    if diagnosis is not None and diagnosis.first is not None:
        return diagnosis.first, diagnosis.cause
    if "head" in failed:
        return None, "final norm or output head: every layer agrees, the logits do not"
    if any(name.startswith(("logits.", "perplexity.device")) for name in failed):
        if diagnosis is None:
            return None, None
        return None, (
            "the shipped graph only: the debug graph, which reads the same weights, agrees in every layer; the shipped "
            "graph differs from it, or a kernel that only it uses is wrong on this device"
        )
    if any(name.startswith("greedy.") for name in failed):
        return None, (
            "decoding only: the same graph agrees where it computes all positions at once, so the cache (a row, a "
            "position) or a kernel for single tokens is wrong on this device"
        )
    return None, None
