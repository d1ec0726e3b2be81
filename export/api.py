"""`export_bundle`: export a checkpoint, quantised by a recipe, to a bundle."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import shutil
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgelm.bundle import (
    BUNDLE,
    MANIFEST,
    Bundle,
    FileInfo,
    GraphInfo,
    Manifest,
    RecipeInfo,
    SourceInfo,
    TensorEntry,
    sha256_of,
)
from edgelm.checkpoint import Checkpoint
from edgelm.devices import allowed_cores
from edgelm.errors import ExportError
from edgelm.export.memory import fitting_threads
from edgelm.export.options import ExportOptions
from edgelm.export.plan import WEIGHTS_FILE, ExportJob, float_dtype, make_plan
from edgelm.export.registry import TARGETS, check_request
from edgelm.files import atomic_directory, prepare_output, require_disk_space
from edgelm.models.rope import FIELDS as ROPE_FIELDS
from edgelm.parity.golden import DeviceRounding, GoldenOptions, golden_tokens, make_pack
from edgelm.parity.reference import references
from edgelm.progress import Advance, Progress, Silent
from edgelm.quant.calibration import CalibrationOptions, CalibrationReport, calibrated
from edgelm.quant.recipe import Recipe
from edgelm.quant.source import WeightSource, stored_recipe
from edgelm.tokenization import description
from edgelm.tokenization.chat_template import template_notes
from edgelm.tokenization.tokenizer import Tokenizer
from edgelm.version import __version__

# Files of the checkpoint that a bundle has besides the tokenizer's own.
_COPIED = ("config.json", "generation_config.json", "chat_template.jinja", "chat_template.json")


def export_bundle(
    checkpoint: str | Path | Checkpoint,
    out: str | Path,
    *,
    recipe: str | Path | Recipe | None = None,
    options: ExportOptions | None = None,
    calibration: CalibrationOptions | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Export a checkpoint to a bundle: quantise it, write graph and weights, and compute the parity pack.

    Weights are read, quantised and written block by block, and the PyTorch reference runs layer by layer. Memory use
    therefore does not grow with the number of layers.

    Args:
        checkpoint: Folder, hub id or open checkpoint. Its weights may be float or quantised.
        out: Folder of the bundle.
        recipe: Preset name, TOML file or `Recipe`. None is "int4", or the stored recipe of a quantised checkpoint.
        options: Target, operator set, limits; None for `ExportOptions()`.
        calibration: Choose the quantised values from activations on a calibration text, as `calibrate_checkpoint` of
            `edgelm.quant.calibration` does. An interrupted run leaves its work in the folder `<out>.calibrating`, and
            the same call resumes it. None rounds each weight to the nearest value.
        progress: Where progress and notes are reported; None for nowhere.

    Returns:
        The bundle, open.

    Raises:
        EdgeLMError: The checkpoint, the recipe or an option cannot be used, or memory or disk space is too small. Then
            nothing new is left at `out`, and a bundle that was there before stays.

    Example::

        from edgelm.export import export_bundle

        bundle = export_bundle("checkpoint/", "bundle/", recipe="int4")
    """
    options = options or ExportOptions()
    check_request(options)
    progress = progress or Silent()
    out = Path(out)
    given = checkpoint.path if isinstance(checkpoint, Checkpoint) else checkpoint
    prepare_output(out, BUNDLE, sources=[given, options.reference], overwrite=options.overwrite)
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint.open(checkpoint, progress=progress)
    chosen = _recipe(recipe, checkpoint)
    _created()  # refuses a wrong SOURCE_DATE_EPOCH before the long work
    TARGETS[options.target].check(options)
    original = None if options.reference is None else _original(checkpoint, options.reference, progress)
    # The export runs one thread per tensor, so each quantisation kernel uses one thread.
    source = WeightSource(checkpoint, chosen, threads=1)
    if calibration is None:
        job = _prepare(source, original, out, options, progress)
        report = CalibrationReport.read(checkpoint.path) if source.is_stored_quantized else None
        return _export(job if report is None else replace(job, calibration=report.info))
    if chosen is None:
        raise ExportError(
            f"{checkpoint.path} is already quantised: calibrate the float checkpoint that it was made from"
        )
    # Checks that can fail run before hours of calibration. The float reference of a smoothed checkpoint, too, is the
    # checkpoint that was given.
    job = _prepare(source, checkpoint, out, options, progress)
    with calibrated(checkpoint, chosen, calibration, out, threads=options.threads, progress=progress, copies=2) as (
        source,
        report,
    ):
        if float_dtype(source, options, TARGETS[options.target]) != job.plan.dtype:
            # Smoothing has turned most values that stay float into float32.
            job = _prepare(source, checkpoint, out, options, Silent())
        return _export(replace(job, source=source, calibration=report.info))


def _prepare(
    source: WeightSource, original: Checkpoint | None, out: Path, options: ExportOptions, progress: Progress
) -> ExportJob:
    """Plan the export and run every check that is possible before the first byte is written."""
    checkpoint, target = source.checkpoint, TARGETS[options.target]
    decoder = checkpoint.decoder
    source.check_tensors(decoder.tensor_shapes)
    tokenizer = Tokenizer.from_folder(checkpoint.path)
    if tokenizer.vocab_size > decoder.vocab_size:
        raise ExportError(
            f"{checkpoint.path}: the tokenizer has {tokenizer.vocab_size} tokens, but the model's embedding only "
            f"{decoder.vocab_size} rows: this is another model's tokenizer. Copy the model's own files into the folder"
        )
    for note in [*target.notes(source), *tokenizer.notes, *template_notes(checkpoint.path)]:
        progress.note(f"note: {note}")
    golden = options.golden or GoldenOptions().resolved(decoder)
    plan = make_plan(source, tokenizer, options, target, progress)
    job = ExportJob(source, original, out, options, progress, tokenizer, golden, plan)
    _threads(job)
    require_disk_space(out, plan.graphs.weights.size + (64 << 20))
    return job


def _threads(job: ExportJob) -> int:
    """Return how many threads the memory limit allows."""
    decoder, options = job.source.checkpoint.decoder, job.options
    tokens = golden_tokens(job.golden, job.tokenizer, decoder)
    asked = options.threads or allowed_cores()
    return fitting_threads(job.plan.info, decoder.feed_forward_width, tokens, asked, options.max_ram)


def _export(job: ExportJob) -> Bundle:
    """Write the bundle; it appears at `job.out` only when it is complete."""
    checkpoint, graphs, threads = job.source.checkpoint, job.plan.graphs, _threads(job)
    sources = [checkpoint.path, None if job.original is None else job.original.path]
    with atomic_directory(job.out, BUNDLE, sources=sources, overwrite=job.options.overwrite) as folder:
        tensors, hashes = _write_weights(job, folder, threads)
        for name, content in graphs.files.items():
            (folder / name).write_bytes(content)
        _copy_text_files(checkpoint.path, job.tokenizer, folder)
        graphs.finish(folder, job)
        reference, quantised = references(job.source, job.plan.dtype, job.original)
        rounding = None if graphs.rounded is None else DeviceRounding(graphs.rounded, graphs.kv)
        pack = make_pack(
            reference, quantised, checkpoint.decoder, job.tokenizer, job.golden, job.progress, rounding, threads
        )
        pack.save(folder / "parity")
        _write_manifest(job, folder, tensors, hashes)
    return Bundle.open(job.out)


def _original(checkpoint: Checkpoint, reference: str | Path, progress: Progress) -> Checkpoint:
    """Open the float checkpoint `reference` and check that `checkpoint` can be its quantised form."""
    if checkpoint.config.get("quantization_config") is None:
        raise ExportError(f"{checkpoint.path} is a float checkpoint and its own reference: leave --reference out")
    original = Checkpoint.open(reference, progress=progress)
    if original.config.get("quantization_config") is not None:
        raise ExportError(f"{original.path} is quantised: --reference takes the float checkpoint")
    if checkpoint.decoder != original.decoder:
        read = {"architectures", *checkpoint.family.keys, *ROPE_FIELDS}
        fields = sorted(key for key in read if checkpoint.config.get(key) != original.config.get(key))
        raise ExportError(
            f"{checkpoint.path} was not made from {original.path}: config.json differs in {', '.join(fields)}. Give "
            "the float checkpoint that was quantised"
        )
    original.check_tensors(original.decoder.tensor_shapes)
    return original


def _recipe(recipe: str | Path | Recipe | None, checkpoint: Checkpoint) -> Recipe | None:
    """Load the recipe. None is int4 for a float checkpoint, and stays None for one with a stored recipe."""
    if recipe is None:
        return None if stored_recipe(checkpoint.config) is not None else Recipe.load("int4")
    return recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)


def _write_weights(job: ExportJob, folder: Path, threads: int) -> tuple[tuple[TensorEntry, ...], Mapping[str, Any]]:
    # Hash the checkpoint in a second thread meanwhile. It uses resources that quantising leaves free.
    stop, checkpoint = threading.Event(), job.source.checkpoint
    size = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="hash") as pool:
        hashes: Future[Mapping[str, Any]] = pool.submit(checkpoint.hashes, _Stoppable(stop))
        try:
            with job.progress.task("quantising", size) as advance:
                tensors = job.plan.graphs.weights.write(folder / WEIGHTS_FILE, job.source, threads, advance)
        except BaseException:
            # Leaving the `with` waits for the hashing thread, which would read the whole checkpoint otherwise.
            stop.set()
            raise
        return tensors, hashes.result()


class _Stoppable(Progress):
    """A silent progress that raises CancelledError at the next report once `stop` is set."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop

    @contextlib.contextmanager
    def task(self, label: str, total: float, *, unit: str = "bytes") -> Iterator[Advance]:
        """Yield a function that raises CancelledError once `stop` is set."""
        del label, total, unit

        def advance(amount: float) -> None:
            if self._stop.is_set():
                raise CancelledError

        yield advance


def _copy_text_files(source: Path, tokenizer: Tokenizer, folder: Path) -> None:
    names = {path.name: path for path in tokenizer.files}
    names |= {name: source / name for name in _COPIED if (source / name).is_file()}
    for name, path in sorted(names.items()):
        shutil.copyfile(path, folder / name)
    description.write(tokenizer, source, folder / description.FILE)


def _write_manifest(job: ExportJob, folder: Path, tensors: tuple[TensorEntry, ...], hashes: Mapping[str, Any]) -> None:
    plan, recipe, target = job.plan, job.source.recipe, TARGETS[job.options.target]
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {}
    with job.progress.task("hashing", sum(path.stat().st_size for path in paths)) as advance:
        for path in paths:
            files[path.relative_to(folder).as_posix()] = FileInfo(path.stat().st_size, sha256_of(path, advance))
    manifest = Manifest(
        model=plan.info,
        target=target.name,
        ops=plan.ops,
        dtype=plan.dtype,
        recipe=RecipeInfo(recipe.name, recipe.to_toml()),
        graph=GraphInfo(plan.graphs.file, plan.graphs.debug_file, WEIGHTS_FILE, plan.graphs.kv),
        tokens=plan.tokens,
        source=SourceInfo(job.source.checkpoint.source_id, {name: FileInfo(**info) for name, info in hashes.items()}),
        files=files,
        tensors=tensors,
        tools={**_tool_versions(), **target.tools(job.options)},
        calibration=job.calibration,
        requires=plan.graphs.requires,
        created=_created(),
    )
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8", newline="\n")


def _created() -> str | None:
    """Return the time of SOURCE_DATE_EPOCH; None if it is not set, so that two exports are equal byte for byte.

    Raises:
        ExportError: It is not a number of seconds.
    """
    given = os.environ.get("SOURCE_DATE_EPOCH")
    if not given:
        return None
    try:
        return datetime.datetime.fromtimestamp(int(given), datetime.timezone.utc).isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError) as error:
        raise ExportError(
            f"SOURCE_DATE_EPOCH is {given!r}: give the seconds since 1970 as a whole number, or unset it"
        ) from error


def _tool_versions() -> dict[str, str]:
    import torch

    return {
        "edgelm": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "onnx": onnx.__version__,
        "torch": torch.__version__,
        "tokenizers": importlib.metadata.version("tokenizers"),
    }
