"""Calibrate a whole checkpoint: pass hidden states of a text through every layer and quantise it.

If the recipe has static activations, the quantised model runs over the text once more for their scales.

In memory at any time: the residual streams of the quantised model (all samples) and the float model (some samples), one
more array for each, the attention weights of one layer, and the weights and moments of one expert. Finished layers are
on disk.
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
from edgelm.quant.formats import layout_of
from edgelm.quant.formats.edgelm import METHOD, OWN
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
"""Format of the resume folder. A folder of another format is not resumed."""


@dataclass(frozen=True)
class CalibratedSummary(QuantizedSummary):
    """Summary of a calibrated checkpoint; `report` says how each matrix was quantised."""

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
    format: str = METHOD,  # noqa: A002 the name of the command's option
    threads: int | None = None,
    overwrite: bool = False,
    extra_files: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> CalibratedSummary:
    """Quantise a checkpoint with calibration text, and write the result to a folder.

    The result has the format of `quantize_checkpoint`, plus `calibration.json` and the input scales of matrices with
    static activations (`<stem>.input_scale`). An interrupted run keeps finished layers in `<out>.calibrating`. The same
    call resumes there and writes the same bytes.

    Args:
        source: Float checkpoint, a folder or a hub id.
        out: Folder to write.
        recipe: How to quantise. It must quantise at least one tensor.
        text: Calibration text: a UTF-8 file, a folder of them, or "builtin".
        samples: Number of windows of text.
        length: Tokens per window.
        coverage: Tokens that each expert needs; None for the default.
        require_coverage: Fail if an expert has too few tokens, instead of rounding it to nearest.
        smoothing: Scale the float weights first, for "activations" or for "weights"; None for no smoothing.
        format: How to store the result, one of `edgelm.quant.formats.LAYOUTS`.
        threads: Threads of the arithmetic; None for one per core. Another number may change the order of sums.
        overwrite: Replace a checkpoint that EdgeLM wrote at `out`, once the new one is complete.
        extra_files: Further files to write, contents by name.
        progress: Gets the work done, and a note per layer.

    Returns:
        Path, sizes, and the report of the calibration.

    Raises:
        CheckpointError: `source` is incomplete or damaged, or a weight is not finite.
        RecipeError: `source` is quantised already, or the recipe does not suit its tensors or the format.
        EdgeLMError: There is no such format, no text or too little, `out` cannot be used
            (`edgelm.output_paths.check_output`), coverage is required and missing, or the disk is full.
    """
    progress = progress or Silent()
    options = CalibrationOptions(text, samples, length, coverage or CoverageOptions(), require_coverage, smoothing)
    out, layout = Path(out), layout_of(format)
    prepare_output(out, CHECKPOINT, sources=[source], overwrite=overwrite)
    with contextlib.ExitStack() as stack:
        checkpoint = stack.enter_context(Checkpoint.open(source, progress))
        recipe = layout.adapted(recipe, checkpoint.decoder)
        layout.check(float_source(checkpoint, recipe))
        weights, report = stack.enter_context(
            calibrated(
                checkpoint, recipe, options, out, threads=threads, progress=progress, copies=2, input_scales=True
            )
        )
        folder = stack.enter_context(atomic_directory(out, CHECKPOINT, sources=[checkpoint.path], overwrite=overwrite))
        summary = write_quantized(
            weights,
            folder,
            layout=layout,
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
    """Calibrate, or resume, with a resume folder beside `out`; yield the quantised source and the report.

    The resume folder is removed when the block ends without an error.

    Args:
        checkpoint: The float checkpoint.
        recipe: How to quantise. It must quantise at least one tensor.
        options: Options of calibration.
        out: Path of the output that the caller will write.
        threads: Threads of the arithmetic; None for one per core.
        progress: Gets the work done, and a note per layer.
        copies: Copies of the quantised tensors that need space on the disk of `out`, the resume folder's included.
        input_scales: Also find the scales of static activations, on the quantised model.

    Raises:
        EdgeLMError: As `calibrate_checkpoint`.
    """
    progress = progress or Silent()
    weights = float_source(checkpoint, recipe)
    decoder = checkpoint.decoder
    weights.check_tensors(decoder.tensor_shapes)
    OWN.check(weights)  # the resume folder has our layout
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
    """Return the smoothed checkpoint, with the scales of the interrupted run or new ones."""
    kept = resume.load_smoothing()
    if kept is not None:
        progress.note(f"{resume.path}: resuming with smoothed weights")
        return SmoothedCheckpoint(checkpoint, kept)
    began = time.monotonic()
    found = smooth(checkpoint, ids, recipe, target, threads=torch.get_num_threads(), progress=progress)
    resume.save_smoothing(found.scaling)
    scaled = [choice for choice in found.choices if choice.alpha is not None]
    gained = 1 - np.mean([choice.after / choice.before for choice in scaled]) if scaled else 0.0
    progress.note(
        f"smoothed for {target}: {len(scaled)} of {len(found.choices)} groups of weights scaled, whose squared error "
        f"(rounded to nearest) fell by {gained:.0%}; {time.monotonic() - began:.0f} s"
    )
    return found


def _windows(checkpoint: Checkpoint, corpus: Corpus, options: CalibrationOptions) -> np.ndarray[Any, Any]:
    """Return the token ids of the samples, int64 [S, T]."""
    decoder = checkpoint.decoder
    if options.length > decoder.context_length:
        raise EdgeLMError(
            f"samples of {options.length} tokens are longer than the model's context of {decoder.context_length}: give "
            "a smaller --sample-length"
        )
    tokenizer = Tokenizer.from_folder(checkpoint.path)
    ids = np.stack(windows(tokenizer, corpus.documents, options.samples, options.length))
    if ids.min() < 0 or ids.max() >= decoder.vocab_size:
        raise EdgeLMError(
            f"{checkpoint.path}: the tokenizer gives token {ids.max()}, but the model's embedding has only "
            f"{decoder.vocab_size} rows: this is another model's tokenizer. Copy the model's own files into the folder"
        )
    return ids


def _asked(
    checkpoint: Checkpoint, recipe: Recipe, corpus: Corpus, ids: np.ndarray[Any, Any], options: CalibrationOptions
) -> dict[str, Any]:
    """Return everything that the result depends on, by names for messages."""
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
    """A run over all layers."""

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
        """Quantise the layers and the head that are not finished; return the reports of all layers and of the head."""
        head = self.resume.head_report()
        start = self.resume.next_layer() or 0
        if head is None:
            with self.progress.task("calibrating", sum(self.shares.values()), unit="work") as advance:
                if start:
                    self.progress.note(f"{self.resume.path}: resuming at layer {start} of {self.layers}")
                    advance(sum(share for name, share in self.shares.items() if self._layer_of(name) < start))
                    x, reference = self.resume.load_streams(start)
                else:
                    x, reference = self._embed(ids)
                for index in range(start, self.layers):
                    self._layer(index, x, reference, advance)
                head = self._head(x, reference, advance)
        return [self.resume.layer_report(index) for index in range(self.layers)], head

    def _embed(self, ids: np.ndarray[Any, Any]) -> tuple[Tensor, Tensor]:
        """Return the embedded tokens: [S, T, D] with the quantised embedding, [R, T, D] with the float one."""
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
        """Quantise the head. A tied head is the embedding, whose quantised values were used from the start."""
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
        """Return the layer of a matrix; infinity for a matrix outside the layers."""
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
                f"layer {index}, expert {expert} has too few tokens to be calibrated ({seen}, and {near} borrowed): it "
                "is rounded to nearest"
            )


def _shares(decoder: Decoder, tokens: int) -> dict[str, float]:
    """Return the approximate number of multiplications per matrix: moments, matmul, and correcting its columns."""
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
