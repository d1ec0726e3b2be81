"""Write safetensors files with numpy alone: the header first, then tensors in any order, whole or in parts."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.checkpoint.safetensors import NUMPY_DTYPES


@dataclass(frozen=True)
class TensorSpec:
    """Type (the format's name, "BF16") and shape of a tensor to write."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return math.prod(self.shape) * NUMPY_DTYPES[self.dtype].itemsize


def float32_to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round float32 to the nearest bfloat16, ties to even, as bit patterns; NaN stays NaN. Any shape."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + (((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF))) >> np.uint32(16)
    result = rounded.astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():
        result[nan] = ((bits[nan] >> np.uint32(16)) | np.uint32(0x40)).astype(np.uint16)
    return result


def _encode_header(tensors: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None) -> tuple[bytes, list[str]]:
    # The largest element types first, as in the reference implementation, so that every tensor is aligned to its type.
    order = sorted(tensors, key=lambda name: -NUMPY_DTYPES[tensors[name].dtype].itemsize)
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name in order:
        spec = tensors[name]
        header[name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [position, position + spec.nbytes],
        }
        position += spec.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8), order


class SafetensorsWriter:
    """Writer of one safetensors file. Tensors are written in any order, whole or by rows, by several threads.

    The constructor writes the header, with the tensors in the order of `tensors`, largest element types first. `close`,
    or the end of a `with` block without an exception, checks that every byte was written. Writing is not atomic: write
    into an `edgelm.files.atomic_directory`.

    Raises:
        ValueError: a dtype is unknown, or a tensor has the reserved name `__metadata__`.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = None
    ) -> None:
        for name, spec in tensors.items():
            if spec.dtype not in NUMPY_DTYPES or name == "__metadata__":
                raise ValueError(f"tensor {name!r} of dtype {spec.dtype!r} cannot be written")
        header, order = _encode_header(tensors, metadata)
        self.path = path
        self.tensors = dict(tensors)
        self._offsets: dict[str, int] = {}
        position = 8 + len(header)
        for name in order:
            self._offsets[name] = position
            position += tensors[name].nbytes
        self._left = {name: spec.nbytes for name, spec in tensors.items()}
        self._lock = threading.Lock()
        self._file = path.open("wb", buffering=0)
        try:
            self._write_at(np.frombuffer(len(header).to_bytes(8, "little") + header, np.uint8), 0)
            self._file.truncate(position)
        except BaseException:
            self._file.close()
            raise

    def _write_at(self, data: NDArray[Any], offset: int) -> None:
        view = data.reshape(-1).view(np.uint8).data
        done = 0
        while done < len(view):
            if hasattr(os, "pwrite"):
                done += os.pwrite(self._file.fileno(), view[done : done + (1 << 30)], offset + done)
            else:
                with self._lock:
                    self._file.seek(offset + done)
                    done += self._file.write(view[done:]) or 0

    def write(self, name: str, array: NDArray[Any]) -> None:
        """Write a whole tensor. Its shape and numpy dtype must be the declared ones (bfloat16 as uint16)."""
        if array.shape != self.tensors[name].shape:
            raise ValueError(f"tensor {name!r}: shape {array.shape}, declared {self.tensors[name].shape}")
        self._put(name, array, 0)

    def write_rows(self, name: str, start: int, array: NDArray[Any]) -> None:
        """Write rows `start ..` of a tensor's first axis. Each row must be written exactly once."""
        shape = self.tensors[name].shape
        if not shape or array.shape[1:] != shape[1:] or not 0 <= start <= start + array.shape[0] <= shape[0]:
            raise ValueError(f"tensor {name!r}: rows {start}.. of shape {array.shape} do not fit into {shape}")
        row_bytes = self.tensors[name].nbytes // shape[0] if shape[0] else 0
        self._put(name, array, start * row_bytes)

    def write_flat(self, name: str, start: int, array: NDArray[Any]) -> None:
        """Write a one-dimensional `array` to the values `start ..` of a tensor in C order. Write each exactly once."""
        count = math.prod(self.tensors[name].shape)
        if array.ndim != 1 or not 0 <= start <= start + array.size <= count:
            raise ValueError(f"tensor {name!r}: values {start}.. of shape {array.shape} do not fit into {count}")
        self._put(name, array, start * array.itemsize)

    def _put(self, name: str, array: NDArray[Any], offset: int) -> None:
        declared = NUMPY_DTYPES[self.tensors[name].dtype]
        if array.dtype != declared:
            raise ValueError(f"tensor {name!r}: dtype {array.dtype}, declared {self.tensors[name].dtype} ({declared})")
        with self._lock:
            if array.nbytes > self._left[name]:
                raise ValueError(f"tensor {name!r}: more was written than it holds")
            self._left[name] -= array.nbytes
        self._write_at(np.ascontiguousarray(array), self._offsets[name] + offset)

    def close(self) -> None:
        """Close the file.

        Raises:
            ValueError: a tensor was not written in full.
        """
        self._file.close()
        unwritten = [name for name, left in self._left.items() if left]
        if unwritten:
            raise ValueError(
                f"{self.path}: {len(unwritten)} tensors not written in full, the first is {unwritten[0]!r}"
            )

    def __enter__(self) -> SafetensorsWriter:
        """Close the file at the end of the block."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Close the file; check that it is complete, unless the block raised an exception."""
        if kind is None:
            self.close()
        else:
            self._file.close()


def plan_shards(tensors: Mapping[str, TensorSpec], shard_bytes: int | None) -> list[list[str]]:
    """Assign tensors to shards, in order, of at most `shard_bytes` each; a larger tensor gets a shard of its own."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in tensors.items():
        if shard_bytes is not None and shards[-1] and filled + spec.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += spec.nbytes
    return shards


class ShardedWriter:
    """Writer of a checkpoint's weights: one `model.safetensors`, or shards and their index.

    Files are named as transformers names them. The interface is that of `SafetensorsWriter`.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, TensorSpec],
        shard_bytes: int | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.tensors = dict(tensors)
        shards = plan_shards(tensors, shard_bytes)
        count = len(shards)
        files = (
            ["model.safetensors"]
            if count == 1
            else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        )
        self.files = files
        self._weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        self._writers: dict[str, SafetensorsWriter] = {}
        try:
            for file, names in zip(files, shards, strict=True):
                specs = {name: tensors[name] for name in names}
                self._writers[file] = SafetensorsWriter(folder / file, specs, metadata or {"format": "pt"})
        except BaseException:
            self._abandon()
            raise

    def write(self, name: str, array: NDArray[Any]) -> None:
        """See `SafetensorsWriter.write`."""
        self._writers[self._weight_map[name]].write(name, array)

    def write_rows(self, name: str, start: int, array: NDArray[Any]) -> None:
        """See `SafetensorsWriter.write_rows`."""
        self._writers[self._weight_map[name]].write_rows(name, start, array)

    def write_flat(self, name: str, start: int, array: NDArray[Any]) -> None:
        """See `SafetensorsWriter.write_flat`."""
        self._writers[self._weight_map[name]].write_flat(name, start, array)

    def _abandon(self) -> None:
        for writer in self._writers.values():
            writer._file.close()

    def close(self) -> None:
        """Close every shard, check that all was written, and write the index where there are several."""
        try:
            for writer in self._writers.values():
                writer.close()
        finally:
            self._abandon()
        if len(self.files) > 1:
            total = sum(spec.nbytes for spec in self.tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(self._weight_map.items()))}
            (self.folder / "model.safetensors.index.json").write_text(
                json.dumps(index, indent=2) + "\n", encoding="utf-8", newline="\n"
            )

    def __enter__(self) -> ShardedWriter:
        """Close the files at the end of the block."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Close the files; check that they are complete, unless the block raised an exception."""
        if kind is None:
            self.close()
        else:
            self._abandon()


def write_sharded(
    folder: Path,
    tensors: Mapping[str, TensorSpec],
    blocks: Callable[[str], Iterable[NDArray[Any]]],
    shard_bytes: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Sequence[str]:
    """Write all `tensors` into `folder`.

    Args:
        folder: where to write.
        tensors: types and shapes.
        blocks: yields the consecutive blocks of rows of a tensor; of a scalar, one array.
        shard_bytes: largest size of a shard; None for a single file.
        metadata: the files' metadata.

    Returns:
        The names of the weight files.
    """
    with ShardedWriter(folder, tensors, shard_bytes, metadata) as writer:
        for name, spec in tensors.items():
            row = 0
            for block in blocks(name):
                if spec.shape:
                    writer.write_rows(name, row, block)
                    row += block.shape[0]
                else:
                    writer.write(name, block)
    return writer.files
