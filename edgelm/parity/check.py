"""`check_parity`: check that this device computes the same model as the reference.

It needs only what running a bundle needs. With a checkpoint the reference is computed anew, which needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgelm.bundle import Bundle
from edgelm.bundle.kv_cache import KV_TYPES, require_type
from edgelm.errors import EdgeLMError, ParityError, TokenizerError
from edgelm.installing import install_hint
from edgelm.parity.device_run import DeviceRun, run_device
from edgelm.parity.diagnose import diagnose, layer_checks
from edgelm.parity.limits import LIMITS, SAME_PACK, Limits, kind_of, loosened
from edgelm.parity.logits import (
    agreement,
    divergence,
    float_kl,
    float_loss,
    greedy_checks,
    greedy_prefix,
    greedy_results,
    logit_checks,
    logit_errors,
    perplexity,
)
from edgelm.parity.noise import rounding_limits
from edgelm.parity.pack import ParityPack, ReferenceRecord
from edgelm.parity.result import (
    Check,
    Diagnosis,
    FloatLoss,
    Floats,
    ParityReport,
    PromptResult,
    Speed,
    at_most,
    largest,
    mean,
    passed,
    quantile,
)
from edgelm.parity.sketch import relative_error
from edgelm.progress import Progress, Silent
from edgelm.version import __version__

if TYPE_CHECKING:
    from edgelm.tokenization.tokenizer import Tokenizer

PACK_FOLDER = "parity"


def check_parity(
    bundle: Bundle | Path | str,
    *,
    runtime: str | None = None,
    threads: int | None = None,
    kv: str | None = None,
    checkpoint: Path | str | None = None,
    integrity: bool = True,
    max_kl: float | None = None,
    progress: Progress | None = None,
) -> ParityReport:
    """Run the prompts of a bundle's parity pack on this device, and compare the results with the reference.

    Args:
        bundle: an opened bundle or its folder.
        runtime: name of the runtime; None for the best one here.
        threads: threads of the runtime; None for its default.
        kv: type of the KV cache, if the runtime has a choice; None for the runtime's default.
        checkpoint: compute the reference again from this checkpoint (needs torch), and compare the stored pack with it.
        integrity: first check the hash of every file. False checks the arithmetic only.
        max_kl: fail if the mean KL(float model || device) is above this, in nats per token. None: the loss of the
            recipe against the float model is reported, but not checked.
        progress: where to report progress.

    Returns:
        The report, with the result of every check; a failed check does not raise.

    Raises:
        BundleError: the folder is not a bundle, or its graph cannot be loaded.
        ParityError: the bundle has no readable parity pack, there are no limits for its recipe, or `max_kl` is not a
            number of nats.
        EdgeLMError: no runtime here can run the bundle, or the checkpoint cannot be used.

    Example::

        report = edgelm.check_parity("bundle/")
        print(report.passed)
    """
    progress = progress or Silent()
    if max_kl is not None and not 0 <= max_kl < math.inf:
        raise ParityError(f"max_kl is {max_kl}: give a number of nats, 0 or more")
    if not isinstance(bundle, Bundle):
        bundle = Bundle.open(bundle)
    fixed, kind = limits_for(bundle)
    checks: list[Check] = []
    if integrity:
        checks.append(integrity_check(bundle.verify(progress)))
    pack = ParityPack.load(bundle.file(PACK_FOLDER))
    problem = _incompatible(bundle, pack)
    if problem:
        raise ParityError(
            f"the parity pack of {bundle.path} belongs to another model ({problem}): export the bundle again"
        )
    limits, notes = _limits(bundle, pack, fixed, kv)
    reference = "from the parity pack, " + ", ".join(f"{key} {value}" for key, value in pack.made_with.items())
    if checkpoint is not None:
        stored, pack = pack, _recompute(bundle, pack, checkpoint, progress)
        checks.append(same_pack(stored, pack))
        reference = f"computed now from {checkpoint}"
    tokenizer, checks_of_it = _tokenizer(bundle, pack)
    checks += checks_of_it
    run = run_device(bundle, pack, runtime, threads, progress, kv)
    found, diagnosis = judge(pack, run, limits)
    checks += found
    loss = float_loss(pack, run.at_once, kind)
    if max_kl is not None:
        checks.append(float_kl(loss, max_kl))
    return _report(
        bundle, pack, run, diagnosis, checks, kind, limits, reference, notes + run.notes, tokenizer, loss, kv
    )


def limits_for(bundle: Bundle) -> tuple[Limits, str]:
    """Return the limits for a bundle, and the kind of recipe that they are for."""
    manifest = bundle.manifest
    kind = kind_of(manifest.recipe.toml)
    # Data types in which the shipped graph and the debug graph compute: on a GPU float32 only in our own debug graph.
    shipped = manifest.dtype if manifest.target != "cpu" and manifest.dtype != "float32" else "float32"
    debug = shipped if manifest.target == "cuda" else "float32"
    return loosened(LIMITS[kind], shipped, debug), kind


def judge(pack: ParityPack, run: DeviceRun, limits: Limits) -> tuple[list[Check], Diagnosis | None]:
    """Return every check of what a device computed, and the diagnosis by layers (None if it was not traced)."""
    checks = logit_checks(pack, run.at_once, limits) + greedy_checks(pack, run.decoded, limits)
    if run.trace is None:
        return checks, None
    diagnosis = diagnose(pack, run.trace, limits)
    return checks + layer_checks(pack, run.debug, diagnosis, limits), diagnosis


def _limits(bundle: Bundle, pack: ParityPack, fixed: Limits, kv: str | None) -> tuple[Limits, list[str]]:
    """Return the limits derived from the pack's simulated rounding, if it has one, and notes for the report."""
    rounded = pack.rounded
    if rounded is None or bundle.manifest.target != "cpu":
        return fixed, []
    derived = rounding_limits(pack, fixed)
    notes = []
    if kv is not None and KV_TYPES.index(require_type(kv)) > KV_TYPES.index(rounded.kv):
        # A coarser cache than the one that was simulated: no limit may be tighter than the fixed ones.
        wider = {item.name: max(getattr(derived, item.name), getattr(fixed, item.name)) for item in fields(Limits)}
        derived = replace(derived, **{**wider, "top1_clear": min(derived.top1_clear, fixed.top1_clear)})
        notes.append(f"limits are wide: the KV cache is {kv}, coarser than the {rounded.kv} that they were made for")
    if derived.logit_error > fixed.logit_error:
        notes.append(
            "this model amplifies rounding: rounding activations and KV cache alone changes the log-probabilities so "
            "much that the limits of the logits are wide; those of the layers, in float32, are as tight as usual"
        )
    return derived, notes


def _incompatible(bundle: Bundle, pack: ParityPack) -> str:
    """Return what the manifest and the pack disagree about; empty if nothing."""
    model = bundle.manifest.model
    if pack.num_layers != model.num_layers:
        return f"{pack.num_layers} layers, the manifest says {model.num_layers}"
    if pack.num_experts != model.num_experts:
        return f"{pack.num_experts} experts, the manifest says {model.num_experts}"
    best = [record.best for record in (pack.reference, pack.quantized) if record is not None]
    if max(int(ids.max()) for ids in (pack.top_ids, pack.probe_ids, pack.ids, *best)) >= model.vocab_size:
        return f"token ids beyond the vocabulary of {model.vocab_size}"
    return ""


def integrity_check(problems: Sequence[str]) -> Check:
    """Return the check of the files' hashes."""
    detail = "; ".join(problems[:8]) or "every file has the hash it was exported with"
    return Check("integrity", "Files: hashes", not problems, detail)


def tokenizer_checks(tokenizer: Tokenizer, pack: ParityPack) -> list[Check]:
    """Return the checks that the tokenizer encodes and decodes the prompts as at export, and has the same tokens."""
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
            detail = "some ids decode to other texts, some texts have other ids, or special ids differ"
        checks.append(Check("tokenizer.vocabulary", "Tokenizer: same vocabulary", same, detail))
    return checks


def same_pack(stored: ParityPack, recomputed: ParityPack) -> Check:
    """Return the check that the stored pack equals the recomputed one, up to the rounding of another machine."""
    title = "Parity pack: as recomputed from the checkpoint"
    if stored.ids.shape != recomputed.ids.shape or not np.array_equal(stored.ids, recomputed.ids):
        return Check("pack", title, False, "the tokens differ: other prompts, tokenizer or greedy continuation")
    worst = 0.0
    for a, b in ((stored.reference, recomputed.reference), (stored.target, recomputed.target)):
        if a.sketches.shape != b.sketches.shape:
            return Check("pack", title, False, "the pack belongs to another model")
        errors = relative_error(b.sketches, a.sketches, b.norms)
        worst = max(worst, quantile(errors, 0.99), quantile(logit_errors(b, a), 0.99))
    detail = "99th percentile over positions and layers of the relative difference"
    return at_most("pack", title, worst, SAME_PACK, detail)


def _recompute(bundle: Bundle, pack: ParityPack, checkpoint: Path | str, progress: Progress) -> ParityPack:
    try:
        from edgelm.parity.reference import recomputed_pack
    except ImportError as error:
        raise EdgeLMError(
            f"computing the reference anew needs {error.name}: {install_hint('export')}, or leave --checkpoint out"
        ) from error
    return recomputed_pack(bundle, pack, checkpoint, progress)


def _tokenizer(bundle: Bundle, pack: ParityPack) -> tuple[Tokenizer | None, list[Check]]:
    from edgelm.tokenization.tokenizer import Tokenizer

    try:
        tokenizer = Tokenizer.from_folder(bundle.path)
    except TokenizerError as error:
        return None, [Check("tokenizer", "Tokenizer: loads", False, str(error))]
    return tokenizer, tokenizer_checks(tokenizer, pack)


def first_divergence(diagnosis: Diagnosis | None, checks: Sequence[Check]) -> tuple[int | None, str | None]:
    """Return the first wrong layer (-1: the embedding) and the cause, "PLACE: EVIDENCE"; None where not known."""
    failed = {check.name for check in checks if check.passed is False}
    if diagnosis is not None and diagnosis.first is not None:
        return diagnosis.first, diagnosis.cause
    if "head" in failed:
        return None, "the final norm or output head: every layer agrees, the logits do not"
    if any(name.startswith(("logits.", "perplexity.device")) for name in failed):
        if diagnosis is None:
            return None, None
        return None, (
            "the shipped graph: the debug graph, which reads the same weights, agrees in every layer, so a kernel "
            "that only the shipped graph uses is wrong on this device"
        )
    if any(name.startswith("greedy.") for name in failed):
        return None, (
            "decoding with the KV cache: the same graph agrees where it computes all positions at once, so the cache "
            "or a kernel for single tokens is wrong on this device"
        )
    return None, None


def _report(
    bundle: Bundle,
    pack: ParityPack,
    run: DeviceRun,
    diagnosis: Diagnosis | None,
    checks: list[Check],
    kind: str,
    limits: Limits,
    reference: str,
    notes: list[str],
    tokenizer: Tokenizer | None,
    loss: FloatLoss,
    kv_type: str | None,
) -> ParityReport:
    from edgelm.devices import describe

    want, device = pack.target, run.at_once
    kl = divergence(want, device)
    kl_float = divergence(pack.reference, device)
    clear = want.gap >= limits.clear_gap
    manifest = bundle.manifest
    greedy = greedy_results(pack, run.decoded, limits)
    text = pack.has_next
    first, cause = first_divergence(diagnosis, checks)
    return ParityReport(
        bundle=str(bundle.path),
        passed=passed(checks),
        kind=kind,
        checks=checks,
        kl_mean=mean(kl),
        kl_p99=quantile(kl, 0.99),
        kl_max=largest(kl),
        float_kl_mean=mean(kl_float),
        quantization_kl_mean=mean(divergence(pack.reference, want)),
        float_loss=loss,
        logit_error=mean(logit_errors(want, device)),
        top1=agreement(want.best, device.best),
        top1_clear=agreement(want.best, device.best, clear),
        top1_float=agreement(pack.reference.best, device.best),
        perplexity_float=perplexity(pack.reference.next_logit, pack.reference.logsumexp, text),
        perplexity_quantized=perplexity(want.next_logit, want.logsumexp, text),
        perplexity=perplexity(device.next_logit, device.logsumexp, text),
        greedy_prefix=sum(result.prefix for result in greedy),
        greedy_total=sum(result.total for result in greedy),
        positions=len(pack.ids),
        first_diverged_layer=first,
        cause=cause,
        diagnosis=diagnosis,
        prompts=_prompts(pack, run, kl, kl_float, tokenizer, limits),
        speed=Speed(
            run.load_s,
            run.prefill_tokens / run.prefill_s if run.prefill_s else float("nan"),
            run.decode_tokens / run.decode_s if run.decode_tokens else float("nan"),
        ),
        threads=run.threads,
        runtime=run.runtime,
        device=describe().as_dict(),
        model=vars(manifest.model).copy(),
        recipe=manifest.recipe.name,
        source=manifest.source.id,
        files={name: {"size": info.size, "sha256": info.sha256} for name, info in manifest.files.items()},
        reference=reference,
        tools=dict(manifest.tools),
        notes=notes,
        ops=manifest.ops,
        kv=kv_type or manifest.graph.kv_dtype,
        isa=run.isa,
        engine=run.engine,
        resident_peak=run.resident_peak,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        made_by=f"edgelm {__version__}",
    )


def _prompts(
    pack: ParityPack,
    run: DeviceRun,
    kl: Floats,
    kl_float: Floats,
    tokenizer: Tokenizer | None,
    limits: Limits,
) -> list[PromptResult]:
    want: ReferenceRecord = pack.target
    same = want.best == run.at_once.best
    results = []
    for prompt in pack.prompts:
        rows, steps = prompt.positions, prompt.greedy_positions
        chosen = [int(token) for token in run.decoded.best[steps]]
        compared = greedy_prefix(want.best[steps], np.asarray(chosen), want.gap[steps], limits.clear_gap)
        # From its first own choice on the device was still fed the reference's tokens: what it would write ends there.
        fed = greedy_prefix(np.asarray(prompt.greedy), np.asarray(chosen), want.gap[steps], limits.clear_gap)
        own = chosen[: fed.prefix + 1]
        results.append(
            PromptResult(
                name=prompt.name,
                text=prompt.text,
                length=prompt.length,
                kl=[float(value) for value in kl[rows]],
                kl_float=[float(value) for value in kl_float[rows]],
                top1_same=[bool(value) for value in same[rows]],
                greedy=chosen,
                greedy_float=list(prompt.greedy),
                greedy_prefix=compared.prefix,
                greedy_text="" if tokenizer is None else tokenizer.decode(own),
            )
        )
    return results
