"""Evaluate several candidates against one float model on one text."""

from __future__ import annotations

import importlib.util
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgelm.bundle.kv_cache import KV_TYPES
from edgelm.corpus import BUILTIN, read_corpus, windows
from edgelm.devices import describe
from edgelm.errors import EdgeLMError
from edgelm.evaluation import bundles, distances
from edgelm.evaluation.distances import Comparison, Predictions
from edgelm.evaluation.result import (
    Estimate,
    EvaluationReport,
    ExpertErrors,
    LayerError,
    ReferenceResult,
    Speed,
    TargetResult,
    TextResult,
)
from edgelm.evaluation.targets import BundleTarget, Target, WeightTarget, open_targets, weight_count
from edgelm.installing import install_hint
from edgelm.progress import Progress, Silent
from edgelm.tokenization.tokenizer import Tokenizer
from edgelm.version import __version__

if TYPE_CHECKING:
    from edgelm.checkpoint import Checkpoint
    from edgelm.evaluation.experts import ExpertProbe
    from edgelm.evaluation.reference import WeightModel

FLOAT32_CACHE = "float32"


@dataclass(frozen=True)
class EvalOptions:
    """Options of `evaluate`.

    Attributes:
        text: a file, a folder, or "builtin": files of the standard library that are held out from calibration.
        tokens: tokens to evaluate, rounded down to whole windows.
        length: tokens of a window. Each window begins with an empty KV cache.
        layers: also measure the error of every layer and expert.
        speed: also measure the speed of bundles on this machine.
        kv: types of KV cache to run bundles with; empty for the bundle's own. If given, float32 is measured too.
        runtime: runtime of bundles; None for the best one here.
        threads: threads for bundles; None for the runtime's default.
    """

    text: str | Path = BUILTIN
    tokens: int = 16384
    length: int = 256
    layers: bool = False
    speed: bool = True
    kv: tuple[str, ...] = ()
    runtime: str | None = None
    threads: int | None = None

    def check(self) -> None:
        """Check the options.

        Raises:
            EdgeLMError: an option is out of range.
        """
        if self.length < 2:
            raise EdgeLMError(f"length is {self.length}: a window needs 2 tokens or more")
        if self.tokens < self.length:
            raise EdgeLMError(f"tokens is {self.tokens}, less than one window of {self.length}: give more")
        for kv in self.kv:
            if kv not in KV_TYPES:
                raise EdgeLMError(f"kv is {kv!r}: the KV cache can be {', '.join(KV_TYPES)}")

    @property
    def caches(self) -> tuple[str | None, ...]:
        """Types of KV cache to run, float32 first: the others are compared with it."""
        others = tuple(dict.fromkeys(kv for kv in self.kv if kv != FLOAT32_CACHE))
        return (FLOAT32_CACHE, *others) if self.kv else (None,)


def evaluate(
    targets: Sequence[str | Path],
    checkpoint: str | Path | None = None,
    options: EvalOptions | None = None,
    progress: Progress | None = None,
) -> EvaluationReport:
    """Measure every target on the same windows of text.

    Args:
        targets: bundles, (quantised) checkpoints, and recipes (a preset's name or a TOML file).
        checkpoint: the float model, a folder or a hub id. Without it, only the perplexity of bundles and checkpoints
            is measured.
        options: text, number of tokens, and what to measure.
        progress: where to report progress.

    Raises:
        EdgeLMError: an option is invalid; the text is missing or too short; a target does not exist, is another model,
            or has another tokenizer; torch or a runtime is needed and missing.
        CheckpointError, BundleError, RecipeError: a target or the float model cannot be read, or is damaged.
    """
    options, progress, started = options or EvalOptions(), progress or Silent(), time.monotonic()
    options.check()
    opened = _open_checkpoint(checkpoint, progress)
    found = open_targets(targets, opened)
    if any(isinstance(target, WeightTarget) for target in found):
        _need_torch("a checkpoint")
    for target in found:
        if isinstance(target, BundleTarget) and target.bundle.manifest.ops == "portable" and options.kv:
            raise EdgeLMError(
                f"{target.given} has portable operators, whose KV cache is always float32: leave --kv out"
            )
    evaluation = _Evaluation(found, opened, options, progress)
    results = [result for target in found for result in evaluation.results(target)]
    return EvaluationReport(
        model=evaluation.model,
        text=evaluation.text,
        reference=evaluation.reference(),
        targets=tuple(results),
        device=describe().as_dict(),
        versions=_versions(),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        seconds=round(time.monotonic() - started, 1),
        notes=tuple(evaluation.notes),
    )


def _open_checkpoint(checkpoint: str | Path | None, progress: Progress) -> Checkpoint | None:
    if checkpoint is None:
        return None
    _need_torch("a float checkpoint")
    from edgelm.checkpoint import Checkpoint
    from edgelm.quant.source import stored_recipe

    opened = Checkpoint.open(checkpoint, progress)
    if stored_recipe(opened.config) is not None:
        raise EdgeLMError(f"{opened.path} is quantised: --checkpoint takes the float model it was made from")
    opened.check_tensors(opened.decoder.tensor_shapes)
    return opened


def _need_torch(what: str) -> None:
    if importlib.util.find_spec("torch") is None:
        raise EdgeLMError(f"evaluating {what} needs torch: {install_hint('export')}; bundles alone do not")


class _Evaluation:
    """The text, the float model's results on it, and the measurement of each target."""

    def __init__(
        self, targets: Sequence[Target], checkpoint: Checkpoint | None, options: EvalOptions, progress: Progress
    ) -> None:
        self._options, self._progress, self._checkpoint = options, progress, checkpoint
        self.notes: list[str] = []
        tokenizer = targets[0].tokenizer() if checkpoint is None else Tokenizer.from_folder(checkpoint.path)
        self._windows, self.text = self._make_windows(tokenizer)
        self._reference_files = {} if checkpoint is None else dict(checkpoint.hashes(progress))
        self._weight_targets = [target for target in targets if isinstance(target, WeightTarget)]
        # Before the long work, since this raises for damaged files and for targets that cannot be computed.
        self._files = {target.name: target.hashes(progress) for target in targets}
        self._hooks = {target.name: target.hooks() for target in self._weight_targets}
        self._probe: ExpertProbe | None = None
        self._float: WeightModel | None = None
        self.model = Path(targets[0].given).name
        if checkpoint is None:
            self.notes.append("perplexity alone: KL and agreement need the float model, --checkpoint")
        else:
            self.model = checkpoint.source_id
            self._float = self._run_float(checkpoint)
        self._float_predictions: Predictions | None = None

    def _make_windows(self, tokenizer: Tokenizer) -> tuple[list[NDArray[np.int64]], TextResult]:
        options = self._options
        corpus = read_corpus(options.text, held_out=True)
        counted = _CountingTokenizer(tokenizer)
        count = options.tokens // options.length
        # One token more per window: the target of the last prediction.
        found = windows(counted, corpus.documents, count, options.length + 1)
        if counted.tokens < count * (options.length + 1):
            self.notes.append(
                f"the text has {counted.tokens} tokens, so {count} windows of {options.length} overlap and the "
                "standard errors are too small"
            )
        name = f"{corpus.name}, held out" if options.text == BUILTIN else corpus.name
        return found, TextResult(name, corpus.sha256, count, options.length, count * options.length)

    def _run_float(self, checkpoint: Checkpoint) -> WeightModel:
        from edgelm.evaluation.experts import ExpertProbe
        from edgelm.evaluation.reference import WeightModel

        if self._options.layers and checkpoint.decoder.num_experts:
            sources = [target.source for target in self._weight_targets]
            self._probe = ExpertProbe(checkpoint.decoder, checkpoint, sources)
        return WeightModel(
            checkpoint.decoder,
            checkpoint,
            self._windows,
            layers=self._options.layers,
            probe=self._probe,
            progress=self._progress,
        )

    def reference(self) -> ReferenceResult | None:
        """Return the float model's own results."""
        if self._checkpoint is None or self._float is None:
            return None
        if self._float_predictions is None:
            self._float_predictions = self._float.predictions()
        loss = self._by_window(self._float_predictions.loss)
        tokens = None
        if self._probe is not None:
            tokens = tuple(tuple(int(count) for count in row) for row in self._probe.tokens)
        tensors = self._checkpoint.tensors.values()
        return ReferenceResult(
            checkpoint=self._checkpoint.source_id,
            stored_bytes=sum(info.nbytes for info in tensors),
            weights=weight_count({info.name: tuple(info.shape) for info in tensors}),
            loss=distances.estimate(loss),
            perplexity=distances.perplexity(loss),
            expert_tokens=tokens,
            files=self._reference_files,
        )

    def results(self, target: Target) -> list[TargetResult]:
        """Return one result for each type of KV cache of a bundle; one result for other targets."""
        return [self._weights(target)] if isinstance(target, WeightTarget) else self._bundle(target)

    def _weights(self, target: WeightTarget) -> TargetResult:
        from edgelm.evaluation.reference import WeightModel

        layers = self._options.layers and self._float is not None
        checkpoint, weights = target.source.checkpoint, target.source.dequantized()
        model = WeightModel(
            checkpoint.decoder,
            weights,
            self._windows,
            layers=layers,
            progress=self._progress,
            label=target.name,
            hooks=self._hooks[target.name],
        )
        measured: Comparison | Predictions
        measured = model.predictions() if self._float is None else self._float.compare(model, self._progress)
        errors = None
        if self._float is not None and self._float.sketches is not None and model.sketches is not None:
            errors = self._float.sketches.errors_of(model.sketches)
        experts = None if self._probe is None else self._probe.errors(self._weight_targets.index(target))
        return self._result(target, target.name, measured, "PyTorch reference, float32", layers=errors, experts=experts)

    def _bundle(self, target: BundleTarget) -> list[TargetResult]:
        options, manifest = self._options, target.bundle.manifest
        ids = np.stack(self._windows)[:, :-1]
        runs: list[tuple[str, str, Comparison | Predictions]] = []
        for kv in options.caches:
            with bundles.open_for(target.bundle, options.length, options.runtime, options.threads, kv) as runtime:
                cache = kv or manifest.graph.kv_dtype
                blocks = bundles.logits_of(runtime, ids, self._progress, f"{target.name}, {cache} cache")
                if self._float is not None:
                    measured: Comparison | Predictions = self._float.compare_logits(blocks)
                else:
                    measured = Predictions(np.stack(self._windows)[:, 1:].reshape(-1))
                    first = 0
                    for block in blocks:
                        measured.add(0, block, first)
                        first += len(block)
                runs.append((cache, runtime.name, measured))
        layers = self._bundle_layers(target, ids, runs[0][1])
        base = next((run for cache, _, run in runs if cache == FLOAT32_CACHE), None)
        results = []
        for (cache, name, measured), kv in zip(runs, options.caches, strict=True):
            speed = None
            if options.speed:
                self._progress.note(f"measuring the speed of {target.name}")
                speed = bundles.measure_speed(target.bundle, options.runtime, options.threads, kv)
            lost = None
            if options.kv and cache != FLOAT32_CACHE and isinstance(measured, Comparison):
                assert isinstance(base, Comparison)
                lost = distances.estimate(self._by_window(measured.kl - base.kl))
            label = f"{target.name}, {cache} cache" if options.kv else target.name
            arithmetic = f"{name}, {manifest.ops} operators, {cache} cache"
            results.append(
                self._result(target, label, measured, arithmetic, kv=cache, kv_loss=lost, speed=speed, layers=layers)
            )
        return results

    def _bundle_layers(
        self, target: BundleTarget, ids: NDArray[np.int64], runtime: str
    ) -> tuple[LayerError, ...] | None:
        if self._float is None or self._float.sketches is None:
            return None
        sketches = bundles.trace_layers(target.bundle, ids, runtime, self._options.threads, self._progress)
        return None if sketches is None else self._float.sketches.errors_of(sketches)

    def _by_window(self, values: distances.Floats) -> distances.Floats:
        return values.reshape(len(self._windows), -1)

    def _result(
        self,
        target: Target,
        name: str,
        measured: Comparison | Predictions,
        arithmetic: str,
        *,
        kv: str | None = None,
        kv_loss: Estimate | None = None,
        speed: Speed | None = None,
        layers: tuple[LayerError, ...] | None = None,
        experts: ExpertErrors | None = None,
    ) -> TargetResult:
        notes = target.notes(self._reference_files)
        if self._probe is not None and isinstance(target, BundleTarget):
            notes.append(
                "errors of experts are measured for checkpoints and recipes: evaluate what the bundle was exported from"
            )
        kl = None
        predictions = measured
        if isinstance(measured, Comparison):
            self._float_predictions = measured.reference
            predictions = measured.target
            kl = distances.divergence(self._by_window(measured.kl), measured.reference.best == measured.target.best)
        assert isinstance(predictions, Predictions)
        loss = self._by_window(predictions.loss)
        if not np.isfinite(loss).all():
            notes.append(f"{int((~np.isfinite(loss)).sum())} of {loss.size} tokens have logits that are no numbers")
        weights = None
        if self._checkpoint is not None:
            weights = weight_count({name: tuple(info.shape) for name, info in self._checkpoint.tensors.items()})
        elif isinstance(target, WeightTarget):
            weights = weight_count(target.source.shapes)
        return TargetResult(
            name=name,
            target=target.given,
            kind=target.kind,
            recipe=target.recipe,
            arithmetic=arithmetic,
            kv=kv,
            stored_bytes=target.stored_bytes,
            bits_per_weight=None if weights is None else 8 * target.stored_bytes / weights,
            loss=distances.estimate(loss),
            perplexity=distances.perplexity(loss),
            kl=kl,
            kv_loss=kv_loss,
            speed=speed,
            layers=layers,
            experts=experts,
            files=self._files[target.name],
            notes=tuple(notes),
        )


class _CountingTokenizer:
    """A tokenizer that counts the tokens it encodes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.tokens = 0

    @property
    def bos_id(self) -> int | None:
        return self._tokenizer.bos_id

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        ids = self._tokenizer.encode(text, add_bos=add_bos)
        self.tokens += len(ids)
        return ids


def _versions() -> dict[str, str]:
    """Return the versions of EdgeLM, Python and the libraries used."""
    found = {"edgelm": __version__, "python": platform.python_version(), "numpy": np.__version__}
    for name in ("torch", "onnxruntime"):
        module = sys.modules.get(name)
        if module is not None:
            found[name] = str(module.__version__)
    return found
