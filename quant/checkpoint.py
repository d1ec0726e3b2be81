"""Write a quantised checkpoint, in which quantised values and scales replace the matrices that a recipe quantises.

In our own layout a quantised `a.b.weight` becomes `a.b.qweight`, `a.b.scales` and, if asymmetric, `a.b.zeros`, with the
layout of `QuantTensor`. If the codes of a row do not fill the last byte, `a.b.columns` holds K. config.json gets a
`quantization_config` with the recipe. `edgelm.quant.formats.LAYOUTS` has the others. `WeightSource` reads all of them.
"""

from __future__ import annotations

import json
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from edgelm.checkpoint import Checkpoint, ShardedWriter, TensorSpec
from edgelm.checkpoint.written import CHECKPOINT, FILE_LIST
from edgelm.devices import allowed_cores
from edgelm.errors import RecipeError
from edgelm.files import atomic_directory, prepare_output
from edgelm.progress import Progress, Silent
from edgelm.quant.formats import Layout, layout_of
from edgelm.quant.formats.edgelm import INPUT_SCALE, METHOD, OWN
from edgelm.quant.recipe import Recipe
from edgelm.quant.scheme import AnyScheme
from edgelm.quant.source import WeightSource, float_source, part_name
from edgelm.slices import slices

SHARD_BYTES = 5_000_000_000
"""Largest size of a weight file, the usual limit on the Hugging Face hub."""

_BLOCK_BYTES = 16 << 20
_CONFIG = "config.json"
_INDEX_SUFFIX = ".index.json"
# The small files of a checkpoint are copied; the same weights in other formats are not.
_COMPANION_SUFFIXES = (".json", ".model", ".txt", ".jinja", ".tiktoken", ".md")
_COMPANION_NAMES = ("LICENSE", "NOTICE")


@dataclass(frozen=True)
class QuantizedSummary:
    """Summary of a written checkpoint.

    Attributes:
        path: Its folder.
        recipe: The recipe.
        quantized_tensors: Number of quantised tensors.
        float_tensors: Number of other tensors.
        source_bytes: Bytes of the source's tensors.
        stored_bytes: Bytes of the written tensors.
        weights: Number of weights.
    """

    path: Path
    recipe: Recipe
    quantized_tensors: int
    float_tensors: int
    source_bytes: int
    stored_bytes: int
    weights: int

    @property
    def bits_per_weight(self) -> float:
        """Mean stored bits per weight, over quantised and float tensors."""
        return 8 * self.stored_bytes / self.weights


def quantize_checkpoint(
    source: str | Path,
    out: str | Path,
    recipe: Recipe,
    *,
    format: str = METHOD,  # noqa: A002 the name of the command's option
    threads: int | None = None,
    shard_bytes: int | None = SHARD_BYTES,
    overwrite: bool = False,
    extra_files: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> QuantizedSummary:
    """Quantise a checkpoint, each weight to the nearest value, and write the result to a folder.

    Rows are read, quantised and written in blocks, so memory use stays at tens of megabytes. The folder appears only
    when it is complete.

    Args:
        source: Float checkpoint, a folder or a hub id.
        out: Folder to write.
        recipe: How to quantise. It must quantise at least one tensor.
        format: How to store the result, one of `edgelm.quant.formats.LAYOUTS`.
        threads: Blocks in work at once; None for one per core.
        shard_bytes: Largest size of a weight file; None for a single file.
        overwrite: Replace a checkpoint that EdgeLM wrote at `out`, once the new one is complete.
        extra_files: Further files to write, contents by name.
        progress: Gets the bytes read.

    Returns:
        Path, sizes and number of tensors.

    Raises:
        CheckpointError: `source` is incomplete or damaged, or a weight is not finite.
        RecipeError: `source` is quantised already, the recipe does not suit its tensors or the format, or it has static
            activations, which need calibration.
        EdgeLMError: `out` cannot be used (`edgelm.output_paths.check_output`), there is no such format, or the disk is
            full.
    """
    progress = progress or Silent()
    layout = layout_of(format)
    prepare_output(out, CHECKPOINT, sources=[source], overwrite=overwrite)
    with Checkpoint.open(source, progress) as checkpoint:
        weights = float_source(checkpoint, layout.adapted(recipe, checkpoint.decoder))
        layout.check(weights)
        _refuse_static(weights)
        stored_specs(weights, layout)  # raises before the folder is made
        with atomic_directory(out, CHECKPOINT, sources=[checkpoint.path], overwrite=overwrite) as folder:
            summary = write_quantized(
                weights, folder, layout=layout, threads=threads, shard_bytes=shard_bytes, progress=progress
            )
            write_extra_files(folder, extra_files)
    return replace(summary, path=Path(out))


def _refuse_static(weights: WeightSource) -> None:
    static = weights.static_inputs
    if static:
        kind = weights.recipe.activations_for(static[0])
        raise RecipeError(
            f'the recipe "{weights.recipe.name}" has {kind} activations for {static[0]} ({len(static)} in all), which '
            'need calibration: quantise with --calibration, or choose "int8-token" or "fp8-token" in the recipe'
        )


def write_quantized(
    weights: WeightSource,
    folder: Path,
    *,
    layout: Layout = OWN,
    threads: int | None,
    shard_bytes: int | None,
    progress: Progress,
    input_scales: Mapping[str, float] | None = None,
) -> QuantizedSummary:
    """Write the quantised tensors, the recipe and the small files of a checkpoint into `folder`.

    Args:
        weights: A float checkpoint and its recipe.
        folder: An existing, empty folder.
        layout: How to store them; it has checked `weights`.
        threads: Blocks in work at once; None for one per core.
        shard_bytes: Largest size of a weight file; None for a single file.
        progress: Gets the bytes of the source that are done.
        input_scales: Input scales of matrices with static activations (`calibration.ranges.calibrated_scales`).

    Raises:
        EdgeLMError: As `quantize_checkpoint`.
    """
    checkpoint = weights.checkpoint
    scales = {part_name(name, INPUT_SCALE): scale for name, scale in (input_scales or {}).items()}
    specs = stored_specs(weights, layout) | {key: TensorSpec("F32", ()) for key in scales}
    schemes = {name: weights.scheme(name) for name in checkpoint.tensors}
    total = sum(info.nbytes for info in checkpoint.tensors.values())
    copy_companions(checkpoint.path, folder)
    _write_config(checkpoint, folder, layout.settings(weights))
    with (
        ShardedWriter(folder, specs, shard_bytes) as writer,
        progress.task("quantising", total) as advance,
    ):
        for done in _run(_jobs(weights, layout, schemes, writer), allowed_cores() if threads is None else threads):
            advance(done)
        for key, scale in scales.items():
            writer.write(key, np.array(scale, np.float32))
    return QuantizedSummary(
        path=folder,
        recipe=weights.recipe,
        quantized_tensors=sum(scheme is not None for scheme in schemes.values()),
        float_tensors=sum(scheme is None for scheme in schemes.values()),
        source_bytes=total,
        stored_bytes=sum(spec.nbytes for spec in specs.values()),
        weights=sum(_count(info.shape) for info in checkpoint.tensors.values()),
    )


def stored_specs(weights: WeightSource, layout: Layout = OWN) -> dict[str, TensorSpec]:
    """Return types and shapes of the tensors in the quantised checkpoint.

    Raises:
        RecipeError: The checkpoint has a tensor with the name of a part of a quantised one.
    """
    checkpoint = weights.checkpoint
    specs: dict[str, TensorSpec] = {}
    for name, info in checkpoint.tensors.items():
        scheme = weights.scheme(name)
        if scheme is None:
            specs[name] = TensorSpec(info.dtype, info.shape)
            continue
        rows, columns = info.shape
        parts = layout.parts(name, (rows, columns), scheme)
        taken = [key for key in parts if key in checkpoint.tensors]
        if taken:
            raise RecipeError(
                f"{checkpoint.path} already has a tensor {taken[0]}, a name that the quantised {name} needs: keep "
                f"{name} float by a rule"
            )
        specs |= parts
    return specs | {name: TensorSpec("F32", array.shape) for name, array in weights.replaced.items()}


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _jobs(
    weights: WeightSource, layout: Layout, schemes: dict[str, AnyScheme | None], writer: ShardedWriter
) -> Iterator[Callable[[], int]]:
    for name, scheme in schemes.items():
        info = weights.checkpoint.tensors[name]
        if name in weights.replaced:
            yield partial(_write_replaced, weights, writer, name)
            continue
        if not info.shape:
            yield partial(_copy_whole, weights, writer, name)
            continue
        rows = info.shape[0]
        count = _BLOCK_BYTES * rows // max(info.nbytes, 1)
        if scheme is None:
            for part in slices(rows, count):
                yield partial(_copy_rows, weights, writer, name, part)
            continue
        for part in slices(rows, max(layout.row_unit, count // layout.row_unit * layout.row_unit)):
            yield partial(_quantize_rows, weights, layout, writer, name, part)


def _copy_whole(weights: WeightSource, writer: ShardedWriter, name: str) -> int:
    values = weights.checkpoint.read_raw(name)
    writer.write(name, values)
    return values.nbytes


def _write_replaced(weights: WeightSource, writer: ShardedWriter, name: str) -> int:
    writer.write(name, weights.replaced[name])
    return weights.checkpoint.tensors[name].nbytes


def _copy_rows(weights: WeightSource, writer: ShardedWriter, name: str, rows: slice) -> int:
    values = weights.checkpoint.read_raw(name, rows)
    writer.write_rows(name, rows.start, values)
    return values.nbytes


def _quantize_rows(weights: WeightSource, layout: Layout, writer: ShardedWriter, name: str, rows: slice) -> int:
    found = weights.quantized(name, rows)
    info = weights.checkpoint.tensors[name]
    count, columns = info.shape
    for key, start, array in layout.blocks(name, (count, columns), rows.start, found):
        writer.write_rows(key, start, array)
    return info.nbytes // count * found.shape[0]


def _run(jobs: Iterable[Callable[[], int]], threads: int) -> Iterator[int]:
    """Run jobs on threads, a few ahead, and yield their results in order; the first error stops the rest."""
    with ThreadPoolExecutor(max(1, threads), thread_name_prefix="quantise") as pool:
        pending: deque[Future[int]] = deque()
        try:
            for job in jobs:
                pending.append(pool.submit(job))
                if len(pending) > 2 * threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def write_extra_files(folder: Path, extra_files: Mapping[str, str] | None) -> None:
    """Write small files into a checkpoint's folder; they must not exist."""
    for name, text in (extra_files or {}).items():
        with (folder / name).open("x", encoding="utf-8") as stream:
            stream.write(text)


def copy_companions(source: Path, folder: Path) -> None:
    """Copy a checkpoint's small files except config.json: tokenizer, template, licence."""
    for path in sorted(source.iterdir()):
        wanted = path.suffix in _COMPANION_SUFFIXES or path.name.startswith(_COMPANION_NAMES)
        written = path.name in (_CONFIG, FILE_LIST) or path.name.endswith(_INDEX_SUFFIX)
        if path.is_file() and wanted and not written:
            shutil.copyfile(path, folder / path.name)


def _write_config(checkpoint: Checkpoint, folder: Path, settings: Mapping[str, object]) -> None:
    config = {**checkpoint.config, "quantization_config": settings}
    (folder / _CONFIG).write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n"
    )
