"""`check_parity`: does this bundle, on this device, compute what the reference computed?

Needs only what running a bundle needs. With a checkpoint the reference is computed anew, which needs torch.
"""

from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgelm.bundle import Bundle
from edgelm.bundle.kv_cache import KV_TYPES, require_type
from edgelm.errors import EdgeLMError, ParityError, TokenizerError
from edgelm.installing import install_hint
from edgelm.parity import checks as verdict
from edgelm.parity import metrics
from edgelm.parity.device_run import DeviceRun, run_device
from edgelm.parity.diagnose import Diagnosis
from edgelm.parity.limits import LIMITS, Limits, kind_of, widened
from edgelm.parity.noise import rounding_limits
from edgelm.parity.pack import ParityPack, ReferenceRecord
from edgelm.parity.result import Check, FloatLoss, ParityReport, PromptResult, Speed
from edgelm.progress import Progress, Silent

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
    """Run the bundle's golden prompts on this device and judge the outcome.

    Args:
        bundle: an opened bundle or its folder.
        runtime: which runtime to use; None picks the best one here.
        threads: for the runtime; None is its default.
        kv: type of the cache of keys and values, for runtimes that have a choice; None is the runtime's default.
        checkpoint: compute the reference anew from this checkpoint (needs torch) and compare the stored pack with it.
        integrity: hash every file first. Without it only the arithmetic is judged.
        max_kl: fail if the mean KL(float reference || device) is above this, in nats. None: what the recipe lost
            against the float model is reported and no check counts it.
        progress: where to report to.

    Raises:
        BundleError: the folder is no bundle, or ONNX Runtime cannot load its graph.
        ParityError: the bundle has no readable parity pack, there are no limits for its recipe, or `max_kl` is no
            number of nats.
        EdgeLMError: no runtime here, or the checkpoint cannot be used.
    """
    progress = progress or Silent()
    if max_kl is not None and not 0 <= max_kl < math.inf:
        raise ParityError(f"max_kl is {max_kl}: give a number of nats, 0 or more")
    if not isinstance(bundle, Bundle):
        bundle = Bundle.open(bundle)
    fixed, kind = limits_for(bundle)
    checks: list[Check] = []
    if integrity:
        checks.append(verdict.integrity(bundle.verify(progress)))
    pack = ParityPack.load(bundle.file(PACK_FOLDER))
    fit = _fits(bundle, pack)
    if fit:
        raise ParityError(f"the parity pack of {bundle.path} is another model's ({fit}): export the bundle again")
    limits, notes = _limits(bundle, pack, fixed, kv)
    reference = "from the parity pack, " + ", ".join(f"{key} {value}" for key, value in pack.made_with.items())
    if checkpoint is not None:
        stored, pack = pack, _recompute(bundle, pack, checkpoint, progress)
        checks.append(verdict.same_pack(stored, pack))
        reference = f"computed now from {checkpoint}"
    tokenizer, checks_of_it = _tokenizer(bundle, pack)
    checks += checks_of_it
    run = run_device(bundle, pack, runtime, threads, progress, kv)
    found, diagnosis = verdict.judge(pack, run, limits)
    checks += found
    loss = verdict.float_loss(pack, run.at_once, kind)
    if max_kl is not None:
        checks.append(verdict.float_kl(loss, max_kl))
    return _report(bundle, pack, run, diagnosis, checks, kind, limits, reference, notes + run.notes, tokenizer, loss)


def limits_for(bundle: Bundle) -> tuple[Limits, str]:
    """The limits that a bundle is judged by, and the kind of recipe they are for."""
    manifest = bundle.manifest
    kind = kind_of(manifest.recipe.toml)
    # What the graphs compute in, the shipped one and the debug graph: on a GPU not float32, except where it is our own.
    narrow = manifest.dtype if manifest.target != "cpu" and manifest.dtype != "float32" else "float32"
    debug = narrow if manifest.target == "cuda" else "float32"
    return widened(LIMITS[kind], narrow, debug), kind


def _limits(bundle: Bundle, pack: ParityPack, fixed: Limits, kv: str | None) -> tuple[Limits, list[str]]:
    """The limits as the pack's rounded record has them, where it says how this device rounds; and what to tell."""
    rounded = pack.rounded
    if rounded is None or bundle.manifest.target != "cpu":
        return fixed, []
    derived = rounding_limits(pack, fixed)
    notes = []
    if kv is not None and KV_TYPES.index(require_type(kv)) > KV_TYPES.index(rounded.kv):
        # A coarser cache than the one that was simulated: no limit may be narrower than the fixed ones.
        wider = {item.name: max(getattr(derived, item.name), getattr(fixed, item.name)) for item in fields(Limits)}
        derived = replace(derived, **{**wider, "top1_clear": min(derived.top1_clear, fixed.top1_clear)})
        notes.append(f"limits are wide: the cache is {kv}, coarser than the {rounded.kv} that they were made for")
    if derived.logit_error > fixed.logit_error:
        notes.append(
            "this model amplifies rounding: that of activations and cache alone moves the log-probabilities so far "
            "that the shipped graph can be held to little; the layers, in float32, are held as closely as ever"
        )
    return derived, notes


def _fits(bundle: Bundle, pack: ParityPack) -> str:
    """What contradicts between the manifest and the pack, empty when nothing does."""
    model = bundle.manifest.model
    if pack.num_layers != model.num_layers:
        return f"{pack.num_layers} layers, the manifest says {model.num_layers}"
    if pack.num_experts != model.num_experts:
        return f"{pack.num_experts} experts, the manifest says {model.num_experts}"
    best = [record.best for record in (pack.reference, pack.quantized) if record is not None]
    if max(int(ids.max()) for ids in (pack.top_ids, pack.probe_ids, pack.ids, *best)) >= model.vocab_size:
        return f"token ids beyond the vocabulary of {model.vocab_size}"
    return ""


def _recompute(bundle: Bundle, pack: ParityPack, checkpoint: Path | str, progress: Progress) -> ParityPack:
    try:
        from edgelm.parity.reference import live_pack
    except ImportError as error:
        raise EdgeLMError(
            f"computing the reference anew needs {error.name}: {install_hint('export')}, or leave --checkpoint out"
        ) from error
    return live_pack(bundle, pack, checkpoint, progress)


def _tokenizer(bundle: Bundle, pack: ParityPack) -> tuple[Tokenizer | None, list[Check]]:
    from edgelm.tokenization.tokenizer import Tokenizer

    try:
        tokenizer = Tokenizer.from_folder(bundle.path)
    except TokenizerError as error:
        return None, [Check("tokenizer", "Tokenizer: loads", False, str(error))]
    return tokenizer, verdict.tokenizer(tokenizer, pack)


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
) -> ParityReport:
    from edgelm.devices import describe

    want, device = pack.target, run.at_once
    kl = verdict.divergence(want, device)
    kl_float = verdict.divergence(pack.reference, device)
    clear = want.gap >= limits.clear_gap
    manifest = bundle.manifest
    greedy = verdict.greedy_results(pack, run, limits)
    text = pack.has_next
    first, cause = verdict.first_divergence(diagnosis, checks)
    return ParityReport(
        bundle=str(bundle.path),
        passed=verdict.passed(checks),
        kind=kind,
        checks=checks,
        kl_mean=metrics.mean(kl),
        kl_p99=metrics.quantile(kl, 0.99),
        kl_max=metrics.largest(kl),
        float_kl_mean=metrics.mean(kl_float),
        quantization_kl_mean=metrics.mean(verdict.divergence(pack.reference, want)),
        float_loss=loss,
        logit_error=metrics.mean(verdict.logit_errors(want, device)),
        top1=metrics.agreement(want.best, device.best),
        top1_clear=metrics.agreement(want.best, device.best, clear),
        top1_float=metrics.agreement(pack.reference.best, device.best),
        perplexity_float=metrics.perplexity(pack.reference.next_logit, pack.reference.logsumexp, text),
        perplexity_quantized=metrics.perplexity(want.next_logit, want.logsumexp, text),
        perplexity=metrics.perplexity(device.next_logit, device.logsumexp, text),
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
    )


def _prompts(
    pack: ParityPack,
    run: DeviceRun,
    kl: metrics.Floats,
    kl_float: metrics.Floats,
    tokenizer: Tokenizer | None,
    limits: Limits,
) -> list[PromptResult]:
    want: ReferenceRecord = pack.target
    same = want.best == run.at_once.best
    results = []
    for prompt in pack.prompts:
        rows, steps = prompt.positions, prompt.greedy_positions
        chosen = [int(token) for token in run.decoded.best[steps]]
        compared = metrics.greedy_prefix(want.best[steps], np.asarray(chosen), want.gap[steps], limits.clear_gap)
        # From its first own choice on the device was still fed the reference's tokens: what it would write ends there.
        fed = metrics.greedy_prefix(np.asarray(prompt.greedy), np.asarray(chosen), want.gap[steps], limits.clear_gap)
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
