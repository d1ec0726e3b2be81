"""Write a quantised checkpoint, in which quantised values and scales replace the matrices that a recipe quantises.

A quantised `a.b.weight` becomes `a.b.qweight`, `a.b.scales` and, if asymmetric, `a.b.zeros`, with the layout of
`QuantTensor`. If the codes of a row do not fill the last byte, `a.b.columns` holds K. config.json gets a
`quantization_config` with the recipe. `WeightSource` reads such a checkpoint.
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
from edgelm.quant.formats.edgelm import COLUMNS, INPUT_SCALE, stored_arrays
from edgelm.quant.recipe import Recipe
from edgelm.quant.scheme import AnyScheme
from edgelm.quant.source import FORMAT_VERSION, METHOD, WeightSource, float_source, part_name
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
        threads: Blocks in work at once; None for one per core.
        shard_bytes: Largest size of a weight file; None for a single file.
        overwrite: Replace a checkpoint that EdgeLM wrote at `out`, once the new one is complete.
        extra_files: Further files to write, contents by name.
        progress: Gets the bytes read.

    Returns:
        Path, sizes and number of tensors.

    Raises:
        CheckpointError: `source` is incomplete or damaged, or a weight is not finite.
        RecipeError: `source` is quantised already, the recipe does not suit its tensors, or it has static activations,
            which need calibration.
        EdgeLMError: `out` cannot be used (`edgelm.output_paths.check_output`), or the disk is full.
    """
    progress = progress or Silent()
    prepare_output(out, CHECKPOINT, sources=[source], overwrite=overwrite)
    with Checkpoint.open(source, progress) as checkpoint:
        weights = float_source(checkpoint, recipe)
        _refuse_static(weights)
        stored_specs(weights)  # raises before the folder is made
        with atomic_directory(out, CHECKPOINT, sources=[checkpoint.path], overwrite=overwrite) as folder:
            summary = write_quantized(weights, folder, threads=threads, shard_bytes=shard_bytes, progress=progress)
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
    threads: int | None,
    shard_bytes: int | None,
    progress: Progress,
    input_scales: Mapping[str, float] | None = None,
) -> QuantizedSummary:
    """Write the quantised tensors, the recipe and the small files of a checkpoint into `folder`.

    Args:
        weights: A float checkpoint and its recipe.
        folder: An existing, empty folder.
        threads: Blocks in work at once; None for one per core.
        shard_bytes: Largest size of a weight file; None for a single file.
        progress: Gets the bytes of the source that are done.
        input_scales: Input scales of matrices with static activations (`calibration.ranges.calibrated_scales`).

    Raises:
        EdgeLMError: As `quantize_checkpoint`.
    """
    checkpoint = weights.checkpoint
    scales = {part_name(name, INPUT_SCALE): scale for name, scale in (input_scales or {}).items()}
    specs = stored_specs(weights) | {key: TensorSpec("F32", ()) for key in scales}
    schemes = {name: weights.scheme(name) for name in checkpoint.tensors}
    total = sum(info.nbytes for info in checkpoint.tensors.values())
    copy_companions(checkpoint.path, folder)
    _write_config(checkpoint, folder, weights.recipe)
    with (
        ShardedWriter(folder, specs, shard_bytes) as writer,
        progress.task("quantising", total) as advance,
    ):
        for done in _run(_jobs(weights, schemes, writer), allowed_cores() if threads is None else threads):
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


def stored_specs(weights: WeightSource) -> dict[str, TensorSpec]:
    """Return types and shapes of the tensors in the quantised checkpoint.

    Raises:
        RecipeError: A tensor that the recipe quantises cannot be stored quantised.
    """
    checkpoint = weights.checkpoint
    specs = {
        key: spec for name in checkpoint.tensors for key, spec in _specs(checkpoint, name, weights.scheme(name)).items()
    }
    return specs | {name: TensorSpec("F32", array.shape) for name, array in weights.replaced.items()}


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _specs(checkpoint: Checkpoint, name: str, scheme: AnyScheme | None) -> dict[str, TensorSpec]:
    info = checkpoint.tensors[name]
    if scheme is None:
        return {name: TensorSpec(info.dtype, info.shape)}
    if not name.endswith(".weight"):
        raise RecipeError(
            f'{name} cannot be stored quantised, because it does not end in ".weight": keep it float by a rule'
        )
    rows, columns = info.shape
    specs = {
        part_name(name, "qweight"): TensorSpec("U8", (rows, scheme.code_bytes(columns))),
        part_name(name, "scales"): TensorSpec(f"F{8 * scheme.scale_dtype.itemsize}", (rows, scheme.groups(columns))),
    }
    if scheme.has_zeros:
        specs[part_name(name, "zeros")] = TensorSpec("U8", (rows, scheme.groups(columns)))
    if columns * scheme.bits % 8:
        specs[part_name(name, COLUMNS)] = TensorSpec("I64", (1,))
    taken = [key for key in specs if key in checkpoint.tensors]
    if taken:
        raise RecipeError(
            f"{checkpoint.path} already has a tensor {taken[0]}, a name that the quantised {name} needs: keep {name} "
            "float by a rule"
        )
    return specs


def _jobs(
    weights: WeightSource, schemes: dict[str, AnyScheme | None], writer: ShardedWriter
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
        for part in slices(rows, _BLOCK_BYTES * rows // max(info.nbytes, 1)):
            yield partial(_copy_rows if scheme is None else _quantize_rows, weights, writer, name, part)


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


def _quantize_rows(weights: WeightSource, writer: ShardedWriter, name: str, rows: slice) -> int:
    found = weights.quantized(name, rows)
    for key, array in stored_arrays(name, found).items():
        writer.write_rows(key, rows.start, array)
    info = weights.checkpoint.tensors[name]
    if rows.start == 0 and (key := part_name(name, COLUMNS)) in writer.tensors:
        writer.write(key, np.array([info.shape[1]], np.int64))
    return info.nbytes // info.shape[0] * found.shape[0]


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


def _write_config(checkpoint: Checkpoint, folder: Path, recipe: Recipe) -> None:
    entry = {"quant_method": METHOD, "format_version": FORMAT_VERSION, "recipe": recipe.to_toml()}
    config = {**checkpoint.config, "quantization_config": entry}
    (folder / _CONFIG).write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n"
    )
