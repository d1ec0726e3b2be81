"""`export_bundle`: from a checkpoint and a recipe to a bundle that is complete or absent."""

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
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgelm.bundle import (
    BUNDLE,
    MANIFEST,
    Bundle,
    CalibrationInfo,
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
from edgelm.export.memory import plan_memory
from edgelm.export.options import ExportOptions
from edgelm.export.plan import WEIGHTS_FILE, Plan, make_plan
from edgelm.export.registry import TARGETS, check_request
from edgelm.files import atomic_directory, need_disk, prepare_place
from edgelm.models.rope import FIELDS as ROPE_FIELDS
from edgelm.parity.golden import DeviceRounding, GoldenOptions, golden_tokens, make_pack
from edgelm.parity.reference import references
from edgelm.progress import Advance, Progress, Silent
from edgelm.quant.calibration import CalibrationOptions, CalibrationReport, calibrated
from edgelm.quant.recipe import Recipe
from edgelm.quant.source import WeightSource, stored_recipe
from edgelm.tokenization.chat_template import template_notes
from edgelm.tokenization.tokenizer import Tokenizer
from edgelm.version import __version__

# What an interpreter, a tokenizer or a template needs besides the tokenizer's own files.
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
    """Export a checkpoint (folder, hub id, or one that is open) to the bundle folder `out`.

    `recipe` is a preset's name, a TOML file or a `Recipe`; None is int4, or the recipe that a quantised checkpoint
    brings. The weights are read, quantised and written block by block and the reference runs layer by layer, so
    memory does not grow with the model's depth. With `calibration` the codes are chosen by what the model does with a
    text, see `edgelm.quant.calibration.calibrate_checkpoint`; what an interrupted run has done lies in
    `<out>.calibrating`, and the same call goes on from there.

    Raises:
        EdgeLMError: the checkpoint, the recipe or an option cannot be used, or memory or disk do not suffice. Nothing
            is left at `out` then, and what was there before stays.
    """
    options = options or ExportOptions()
    check_request(options)
    progress = progress or Silent()
    out = Path(out)
    given = checkpoint.path if isinstance(checkpoint, Checkpoint) else checkpoint
    prepare_place(out, BUNDLE, sources=[given, options.reference], overwrite=options.overwrite)
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint.open(checkpoint, progress=progress)
    chosen = _recipe(recipe, checkpoint)
    _created()  # to be refused at once, if at all
    TARGETS[options.target].check(options)
    original = None if options.reference is None else _original(checkpoint, options.reference, progress)
    if calibration is None:
        # The export's own threads each work on a tensor, so the kernel inside takes one.
        source = WeightSource(checkpoint, chosen, threads=1)
        report = CalibrationReport.read(checkpoint.path) if source.is_stored_quantized else None
        return _export(source, out, options, None if report is None else report.info, original, progress)
    if chosen is None:
        raise ExportError(f"{checkpoint.path} is already quantised: calibration starts from the float checkpoint")
    # What cannot be exported is to be refused before hours of calibration.
    _prepare(WeightSource(checkpoint, chosen, threads=1), out, options, Silent())
    with calibrated(checkpoint, chosen, calibration, out, threads=options.threads, progress=progress, copies=2) as (
        source,
        report,
    ):
        # Of a smoothed checkpoint, too, the float reference is the one that was given.
        return _export(source, out, options, report.info, checkpoint, progress)


def _export(
    source: WeightSource,
    out: Path,
    options: ExportOptions,
    calibration: CalibrationInfo | None,
    original: Checkpoint | None,
    progress: Progress,
) -> Bundle:
    """Write the bundle of the weights that `source` gives; `original` is the float checkpoint that they were made from,
    None where it is `source`'s own or unknown.
    """
    note = TARGETS[options.target].about(source)
    if note is not None:
        progress.note(note)
    tokenizer, golden, plan, threads = _prepare(source, out, options, progress)
    checkpoint = source.checkpoint
    sources = [checkpoint.path, None if original is None else original.path]
    with atomic_directory(out, BUNDLE, sources=sources, overwrite=options.overwrite) as folder:
        tensors, hashes = _write_weights(plan, checkpoint, folder, threads, progress)
        for name, content in plan.graphs.files.items():
            (folder / name).write_bytes(content)
        _copy_texts(checkpoint.path, tokenizer, folder)
        plan.graphs.finish(folder, plan, options, progress)
        reference, quantised = references(source, plan.dtype, original)
        blocks = plan.graphs.rounded
        rounding = None if blocks is None else DeviceRounding(blocks, plan.graphs.kv)
        pack = make_pack(reference, quantised, checkpoint.decoder, tokenizer, golden, progress, rounding, threads)
        pack.save(folder / "parity")
        _write_manifest(
            folder, plan, source.recipe, checkpoint.source_id, tensors, hashes, options, calibration, progress
        )
    return Bundle.open(out)


def _prepare(
    source: WeightSource, out: Path, options: ExportOptions, progress: Progress
) -> tuple[Tokenizer, GoldenOptions, Plan, int]:
    """Everything that can be refused before the first byte is written; and how many threads memory allows."""
    checkpoint = source.checkpoint
    decoder = checkpoint.decoder
    source.check_tensors(decoder.tensor_shapes)
    tokenizer = Tokenizer.from_folder(checkpoint.path)
    if tokenizer.vocab_size > decoder.vocab_size:
        raise ExportError(
            f"{checkpoint.path}: the tokenizer has {tokenizer.vocab_size} tokens, the model's table only "
            f"{decoder.vocab_size} rows: this is another model's tokenizer"
        )
    for note in [*tokenizer.notes, *template_notes(checkpoint.path)]:
        progress.note(note)
    golden = options.golden or GoldenOptions().resolved(decoder)
    target = TARGETS[options.target]
    plan = make_plan(checkpoint, source, tokenizer, options, target, progress)
    threads = options.threads or allowed_cores()
    memory = plan_memory(
        plan.info, decoder.feed_forward_width, golden_tokens(golden, tokenizer, decoder), threads, options.max_ram
    )
    need_disk(out, plan.graphs.weights.size + (64 << 20))
    return tokenizer, golden, plan, memory.threads


def _original(checkpoint: Checkpoint, reference: str | Path, progress: Progress) -> Checkpoint:
    """The float checkpoint `reference`, of which `checkpoint` is said to be the quantised form."""
    if checkpoint.config.get("quantization_config") is None:
        raise ExportError(f"{checkpoint.path} is a float checkpoint and its own reference: leave --reference out")
    original = Checkpoint.open(reference, progress=progress)
    if original.config.get("quantization_config") is not None:
        raise ExportError(f"{original.path} is quantised: --reference takes the float checkpoint")
    if checkpoint.decoder != original.decoder:
        read = {"architectures", *checkpoint.family.keys, *ROPE_FIELDS}
        fields = sorted(key for key in read if checkpoint.config.get(key) != original.config.get(key))
        raise ExportError(
            f"{original.path} is not what {checkpoint.path} was made from: config.json differs in {', '.join(fields)}"
        )
    original.check_tensors(original.decoder.tensor_shapes)
    return original


def _recipe(recipe: str | Path | Recipe | None, checkpoint: Checkpoint) -> Recipe | None:
    """None stays None for a quantised checkpoint, which brings its own, and is int4 for any other."""
    if recipe is None:
        return None if stored_recipe(checkpoint.config) is not None else Recipe.load("int4")
    return recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)


def _write_weights(
    plan: Plan, checkpoint: Checkpoint, folder: Path, threads: int, progress: Progress
) -> tuple[tuple[TensorEntry, ...], Mapping[str, Any]]:
    # The source's hashes are taken on the side: they are bound by the digest, the quantiser by its arithmetic.
    stop = threading.Event()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="hash") as pool:
        hashes: Future[Mapping[str, Any]] = pool.submit(checkpoint.hashes, _Stoppable(stop))
        try:
            with progress.task("quantising", plan.source_bytes) as advance:
                tensors = plan.graphs.weights.write(folder / WEIGHTS_FILE, threads, advance)
        except BaseException:
            # Leaving the pool waits for its thread, which would read on to the end of a large checkpoint.
            stop.set()
            raise
        return tensors, hashes.result()


class _Stoppable(Progress):
    """Reports nothing, and ends the work at its next report once `stop` is set."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop

    @contextlib.contextmanager
    def task(self, label: str, total: float, *, unit: str = "bytes") -> Iterator[Advance]:
        """Yield what raises when the work is to end."""
        del label, total, unit

        def advance(amount: float) -> None:
            if self._stop.is_set():
                raise CancelledError

        yield advance


def _copy_texts(source: Path, tokenizer: Tokenizer, folder: Path) -> None:
    names = {path.name: path for path in tokenizer.files}
    names |= {name: source / name for name in _COPIED if (source / name).is_file()}
    for name, path in sorted(names.items()):
        shutil.copyfile(path, folder / name)


def _write_manifest(
    folder: Path,
    plan: Plan,
    recipe: Recipe,
    source_id: str,
    tensors: tuple[TensorEntry, ...],
    hashes: Mapping[str, Any],
    options: ExportOptions,
    calibration: CalibrationInfo | None,
    progress: Progress,
) -> None:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {}
    with progress.task("hashing", sum(path.stat().st_size for path in paths)) as advance:
        for path in paths:
            files[path.relative_to(folder).as_posix()] = FileInfo(path.stat().st_size, sha256_of(path, advance))
    manifest = Manifest(
        model=plan.info,
        target=options.target,
        ops=plan.ops,
        dtype=plan.dtype,
        recipe=RecipeInfo(recipe.name, recipe.to_toml()),
        graph=GraphInfo(plan.graphs.file, plan.graphs.debug_file, WEIGHTS_FILE, plan.graphs.kv),
        tokens=plan.tokens,
        source=SourceInfo(source_id, {name: FileInfo(**info) for name, info in hashes.items()}),
        files=files,
        tensors=tensors,
        tools={**_tool_versions(), **TARGETS[options.target].tools()},
        calibration=calibration,
        requires=plan.graphs.requires,
        created=_created(),
    )
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def _created() -> str | None:
    """The time of SOURCE_DATE_EPOCH, None without it: two exports of one checkpoint are to be equal byte for byte.

    Raises:
        ExportError: it is no number of seconds.
    """
    given = os.environ.get("SOURCE_DATE_EPOCH")
    if not given:
        return None
    try:
        return datetime.datetime.fromtimestamp(int(given), datetime.UTC).isoformat(timespec="seconds")
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
