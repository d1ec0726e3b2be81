"""Calibrate a whole checkpoint: text to hidden states, through every layer, to quantised values.

Where the recipe has static activations, the quantised model runs over the text once more for their scales.

In memory at any time: the residual stream of all samples, that of some of them in the float model, an array beside
each, one layer's attention weights, the weights and moments of one expert. A layer that is done is on the disk.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgelm.checkpoint import Checkpoint, SafetensorsFile
from edgelm.checkpoint.written import CHECKPOINT
from edgelm.corpus import BUILTIN, Corpus, read_corpus, windows
from edgelm.devices import allowed_cores
from edgelm.errors import EdgeLMError
from edgelm.files import atomic_directory, prepare_output, require_disk_space
from edgelm.models.spec import Decoder
from edgelm.progress import Advance, Progress, Silent
from edgelm.quant import codec
from edgelm.quant.calibration.layer import LayerStream, Quantiser, aligned, paired, sample_slices
from edgelm.quant.calibration.options import LENGTH, SAMPLES, CalibrationOptions, CoverageOptions
from edgelm.quant.calibration.ranges import calibrated_scales
from edgelm.quant.calibration.report import CalibrationReport, LayerReport
from edgelm.quant.calibration.resume import CalibratedSource, ResumeFolder, open_resume, resume_place
from edgelm.quant.checkpoint import SHARD_BYTES, QuantizedSummary, stored_specs, write_extra_files, write_quantized
from edgelm.quant.methods import Moments
from edgelm.quant.methods.drift import Drift
from edgelm.quant.recipe import Recipe
from edgelm.quant.scaled_checkpoint import SmoothedCheckpoint
from edgelm.quant.smoothing import smooth
from edgelm.quant.source import WeightSource, float_source
from edgelm.reference.interpreter import Interpreter
from edgelm.reference.layerwise import embedding_rows
from edgelm.tokenization.tokenizer import Tokenizer

FORMAT = "edgelm-calibration 3"
"""Of the resume folder; another number makes a new start."""


@dataclass(frozen=True)
class CalibratedSummary(QuantizedSummary):
    """What a calibrated checkpoint came to, and how."""

    report: CalibrationReport


def calibrate_checkpoint(
    source: str | Path,
    out: str | Path,
    recipe: Recipe,
    *,
    text: str | Path = BUILTIN,
    samples: int = SAMPLES,
    length: int = LENGTH,
    coverage: CoverageOptions | None = None,
    require_coverage: bool = False,
    smoothing: str | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    extra_files: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> CalibratedSummary:
    """Quantise the checkpoint `source` into the folder `out` by what the model computes for a text.

    The result has the format of `quantize_checkpoint`, with `calibration.json` beside and, of matrices whose
    activations the recipe has static, the scales of these (`<stem>.input_scale`). Interrupted, it keeps what is
    done in `<out>.calibrating`, and the same call goes on at the layer it was in and ends in the same bytes.

    Args:
        source: float checkpoint, a folder or a hub id.
        out: folder to write.
        recipe: must quantise something.
        text: a UTF-8 file, a folder of them, or "builtin".
        samples: windows of text.
        length: tokens of each.
        coverage: when an expert has seen enough tokens; None is the default.
        require_coverage: fail where an expert has not, in place of rounding it to nearest.
        smoothing: scale the float weights first: for "activations" or for "weights"; None does not.
        threads: of the arithmetic; None is one for each core. Other numbers may add up in another order.
        overwrite: replace a checkpoint that EdgeLM wrote at `out` once the new one is complete.
        extra_files: files to write beside it, their contents by their names.
        progress: gets the work done, and a line for each layer.

    Raises:
        CheckpointError: `source` is incomplete or damaged, or some weight is not finite.
        RecipeError: `source` is already quantised, or the recipe does not fit its tensors.
        EdgeLMError: there is no text or too little, `out` cannot be used (`edgelm.output_paths.check_output`), coverage
            is required and missing, or the disk is full.
    """
    progress = progress or Silent()
    options = CalibrationOptions(text, samples, length, coverage or CoverageOptions(), require_coverage, smoothing)
    out = Path(out)
    prepare_output(out, CHECKPOINT, sources=[source], overwrite=overwrite)
    with (
        Checkpoint.open(source, progress) as checkpoint,
        calibrated(
            checkpoint, recipe, options, out, threads=threads, progress=progress, copies=2, input_scales=True
        ) as (weights, report),
        atomic_directory(out, CHECKPOINT, sources=[checkpoint.path], overwrite=overwrite) as folder,
    ):
        summary = write_quantized(
            weights,
            folder,
            threads=threads,
            shard_bytes=SHARD_BYTES,
            progress=progress,
            input_scales=weights.input_scales,
        )
        report.write(folder)
        write_extra_files(folder, extra_files)
    return CalibratedSummary(**(vars(summary) | {"path": out, "report": report}))


@contextlib.contextmanager
def calibrated(
    checkpoint: Checkpoint,
    recipe: Recipe,
    options: CalibrationOptions,
    out: Path,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
    copies: int = 1,
    input_scales: bool = False,
) -> Iterator[tuple[CalibratedSource, CalibrationReport]]:
    """Calibrate, or go on calibrating, in a folder beside `out`; yields the result to be written to `out`.

    The folder is removed when the block ends without an error.

    Args:
        checkpoint: float.
        recipe: must quantise something.
        options: what to calibrate with.
        out: what is to be made of it.
        threads: of the arithmetic; None is one for each core.
        progress: gets the work done, and a line for each layer.
        copies: how many times the quantised tensors need space on the disk of `out`, those in the folder included.
        input_scales: find those of static activations too, on the quantised model.

    Raises:
        As `calibrate_checkpoint`.
    """
    progress = progress or Silent()
    weights = float_source(checkpoint, recipe)
    decoder = checkpoint.decoder
    weights.check_tensors(decoder.tensor_shapes)
    stored = sum(spec.nbytes for spec in stored_specs(weights).values())
    corpus = read_corpus(options.text)
    ids = _windows(checkpoint, corpus, options)
    stream_bytes = 4 * ids.size * decoder.hidden_size
    require_disk_space(out, copies * stored + 4 * stream_bytes)
    asked = _asked(checkpoint, recipe, corpus, ids, options)
    with open_resume(resume_place(out, checkpoint.path), asked, progress) as resume, contextlib.ExitStack() as stack:
        with _threads(threads):
            if options.smoothing is not None:
                checkpoint = stack.enter_context(
                    _smoothed(checkpoint, recipe, options.smoothing, ids, resume, progress)
                )
                weights = WeightSource(checkpoint, recipe, threads=1)
            run = _Run(weights, decoder, options, resume, progress)
            layers, head = run.all(ids)
            files = [stack.enter_context(SafetensorsFile(path)) for path in resume.files(len(layers))]
            made = CalibratedSource(checkpoint, recipe, files, threads=1)
            if input_scales and made.static_inputs:
                quantised = CalibratedSource(checkpoint, recipe, files, threads=threads)
                made.input_scales = calibrated_scales(quantised, ids, progress=progress)
        moes = [moe for moe in map(decoder.moe, range(decoder.num_layers)) if moe is not None]
        report = CalibrationReport(
            text=corpus.name,
            sha256=corpus.sha256,
            samples=options.samples,
            length=options.length,
            min_tokens=max(map(options.coverage.needed, moes), default=0),
            layers=layers,
            head=head,
            smoothing=options.smoothing,
        )
        yield made, report


def _smoothed(
    checkpoint: Checkpoint,
    recipe: Recipe,
    target: str,
    ids: np.ndarray[Any, Any],
    resume: ResumeFolder,
    progress: Progress,
) -> SmoothedCheckpoint:
    """The checkpoint with the scales that an interrupted run found, or with new ones."""
    kept = resume.load_smoothing()
    if kept is not None:
        progress.note(f"{resume.path}: the weights are smoothed already")
        return SmoothedCheckpoint(checkpoint, kept)
    began = time.monotonic()
    found = smooth(checkpoint, ids, recipe, target, threads=torch.get_num_threads(), progress=progress)
    resume.save_smoothing(found.scaling)
    scaled = [choice for choice in found.choices if choice.alpha is not None]
    gained = 1 - np.mean([choice.after / choice.before for choice in scaled]) if scaled else 0.0
    progress.note(
        f"smoothed for {target}: {len(scaled)} of {len(found.choices)} places scaled, the squared error of rounding "
        f"to nearest less by {gained:.0%} there; {time.monotonic() - began:.0f} s"
    )
    return found


def _windows(checkpoint: Checkpoint, corpus: Corpus, options: CalibrationOptions) -> np.ndarray[Any, Any]:
    """Token ids int64 [S, T]."""
    decoder = checkpoint.decoder
    if options.length > decoder.context_length:
        raise EdgeLMError(
            f"samples of {options.length} tokens are longer than the model's context of "
            f"{decoder.context_length}: give a smaller --sample-length"
        )
    tokenizer = Tokenizer.from_folder(checkpoint.path)
    ids = np.stack(windows(tokenizer, corpus.documents, options.samples, options.length))
    if ids.min() < 0 or ids.max() >= decoder.vocab_size:
        raise EdgeLMError(
            f"{checkpoint.path}: the tokenizer gives token {ids.max()}, the model's table has {decoder.vocab_size} "
            "rows: this is another model's tokenizer"
        )
    return ids


def _asked(
    checkpoint: Checkpoint, recipe: Recipe, corpus: Corpus, ids: np.ndarray[Any, Any], options: CalibrationOptions
) -> dict[str, Any]:
    """What the result depends on, by the words of a note about a folder that was left by another run."""
    stats = {path.name: path.stat() for path in checkpoint.files}
    smoothing = {} if options.smoothing is None else {"smoothing": options.smoothing}
    return {
        "format": FORMAT,
        "checkpoint": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()],
        "config.json": checkpoint.config,
        "recipe": recipe.to_toml(),
        "text": corpus.sha256,
        "samples": options.samples,
        "sample length": options.length,
        "tokens": hashlib.sha256(ids.tobytes()).hexdigest(),
        "coverage": [options.coverage.min_tokens, options.coverage.reach],
        **smoothing,
    }


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or allowed_cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Run:
    """The way through the layers."""

    def __init__(
        self,
        weights: WeightSource,
        decoder: Decoder,
        options: CalibrationOptions,
        resume: ResumeFolder,
        progress: Progress,
    ) -> None:
        self.weights = weights
        self.decoder = decoder
        self.options = options
        self.resume = resume
        self.progress = progress
        self.layers = decoder.num_layers
        self.shares = _shares(decoder, options.samples * options.length)

    @torch.no_grad()
    def all(self, ids: np.ndarray[Any, Any]) -> tuple[list[LayerReport], LayerReport]:
        """Do what is left to do; returns the reports of the layers and of the head."""
        head = self.resume.head_report()
        start = self.resume.next_layer() or 0
        if head is None:
            with self.progress.task("calibrating", sum(self.shares.values()), unit="work") as advance:
                if start:
                    self.progress.note(f"{self.resume.path}: going on with layer {start} of {self.layers}")
                    advance(sum(share for name, share in self.shares.items() if self._layer_of(name) < start))
                    x, reference = self.resume.load_streams(start)
                else:
                    x, reference = self._embed(ids)
                for index in range(start, self.layers):
                    self._layer(index, x, reference, advance)
                head = self._head(x, reference, advance)
        return [self.resume.layer_report(index) for index in range(self.layers)], head

    def _embed(self, ids: np.ndarray[Any, Any]) -> tuple[Tensor, Tensor]:
        """Rows [S, T, D] of the embedding as the device will have it, and [R, T, D] as the float model has it."""
        name = self.decoder.embed.name
        scheme = self.weights.scheme(name)
        exact, places = embedding_rows(self.decoder, self.weights.checkpoint.read_float32, ids)
        rows = exact
        if scheme is not None:
            rows = codec.rounded(rows, scheme, name=name, threads=1)
        where = torch.from_numpy(places)
        return torch.from_numpy(aligned(rows))[where], torch.from_numpy(aligned(exact))[where[paired(*ids.shape)]]

    def _layer(self, index: int, x: Tensor, reference: Tensor, advance: Advance) -> None:
        began = time.monotonic()
        quantiser = Quantiser(self.weights, self.shares, advance)
        stream = LayerStream(
            self.decoder, index, quantiser.read, quantiser, self.options.coverage, self.options.require_coverage
        )
        stream.run(x, reference)
        self.resume.save_layer(index, quantiser.tensors, quantiser.floats, quantiser.report)
        self.resume.save_streams(index + 1, x, reference)
        self._say(index, quantiser.report, time.monotonic() - began)

    def _head(self, x: Tensor, reference: Tensor, advance: Advance) -> LayerReport:
        """Quantise the head by the normed states; a tied one is the embedding, which is looked up before all else."""
        quantiser = Quantiser(self.weights, self.shares, advance)
        if not self.decoder.tied:
            head = self.decoder.head.name
            moments, drift = None, Drift()
            if quantiser.wants_moments([head]):
                run = Interpreter(self.decoder, lambda name: torch.from_numpy(quantiser.read(name)))
                norm = functools.partial(run.norm, self.decoder.norm)
                moments = Moments.zeros(self.decoder.hidden_size)
                for part in sample_slices(x):
                    moments.add(norm(x[part]).flatten(0, 1))
                pairs = paired(*x.shape[:2])
                for part in sample_slices(reference):
                    drift.add(norm(x[pairs][part]).flatten(0, 1), norm(reference[part]).flatten(0, 1))
            quantiser.matrix(head, moments, drift)
        self.resume.save_head(quantiser.tensors, quantiser.report)
        return quantiser.report

    def _layer_of(self, name: str) -> float:
        """The layer a matrix belongs to; beyond all of them for those outside."""
        layer = self.decoder.matrices[name].layer
        return math.inf if layer is None else layer

    def _say(self, index: int, report: LayerReport, seconds: float) -> None:
        parts = [f"layer {index} ({index + 1} of {self.layers})"]
        if report.mean_error is not None:
            parts.append(f"mean relative error {report.mean_error:.2e}")
        if report.tokens:
            least = min(range(len(report.tokens)), key=report.tokens.__getitem__)
            parts.append(f"expert {least} was chosen least, for {report.tokens[least]} tokens")
        self.progress.note(f"{', '.join(parts)}; {seconds:.0f} s")
        for expert in report.fallbacks:
            seen, near = report.tokens[expert], report.borrowed[expert]
            self.progress.note(
                f"layer {index}, expert {expert} saw too few tokens to be calibrated, {seen} and {near} that route "
                "near it: it is rounded to nearest"
            )


def _shares(decoder: Decoder, tokens: int) -> dict[str, float]:
    """Multiplications that each matrix takes, roughly: moments, matmul, and correcting its columns."""
    found = {}
    for name, matrix in decoder.matrices.items():
        if matrix is decoder.embed:
            continue
        rows, columns = matrix.rows, matrix.columns
        moe = None if matrix.expert is None or matrix.layer is None else decoder.moe(matrix.layer)
        seen = tokens if moe is None else tokens * moe.k / len(moe.experts)
        matmul = 0 if matrix.layer is None else seen * columns * rows
        found[name] = float(matmul + seen * columns * columns / 2 + columns * columns * (rows + columns))
    return found
