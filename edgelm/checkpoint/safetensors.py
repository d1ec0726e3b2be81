"""Reading and writing safetensors files with numpy alone, one tensor (or some rows of one) at a time.

The format (https://huggingface.co/docs/safetensors): eight bytes with the little-endian length of a JSON header, the
header, then the tensors' bytes back to back. Data is read with `pread`, never memory-mapped: mapped pages count as
resident memory, and an export under a memory limit must know what it holds. bfloat16, which numpy lacks, is handed
out as uint16.
"""

from __future__ import annotations

import json
import math
import os
import stat
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.checkpoint.jsonfile import parse_json_object
from edgelm.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
READ_BYTES = 8 << 20

NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
FLOAT_DTYPES = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `offset` counts from the start of the file, `dtype` is the format's name for it."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor to be written looks like."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return math.prod(self.shape) * NUMPY_DTYPES[self.dtype].itemsize


def bf16_to_float32(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Widen bfloat16 bit patterns, exactly; any shape."""
    wide = bits.astype(np.uint32)
    np.left_shift(wide, np.uint32(16), out=wide)
    return wide.view(np.float32)


def float32_to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round float32 to the nearest bfloat16, ties to even, as bit patterns; NaN stays NaN. Any shape."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + (((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF))) >> np.uint32(16)
    result = rounded.astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():
        result[nan] = ((bits[nan] >> np.uint32(16)) | np.uint32(0x40)).astype(np.uint16)
    return result


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _parse_entry(path: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where}: its header entry is not an object; fetch the file again")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in NUMPY_DTYPES:
        raise CheckpointError(f"{where}: unknown dtype {dtype!r}, known are {', '.join(NUMPY_DTYPES)}")
    if not isinstance(shape, list) or not all(map(_is_count, shape)) or len(shape) > 32:
        raise CheckpointError(f"{where}: its shape {str(shape)[:80]} is not a list of sizes; fetch the file again")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise CheckpointError(
            f"{where}: its data_offsets {str(offsets)[:80]} are not two offsets; fetch the file again"
        )
    begin, end = offsets
    expected = math.prod(shape) * NUMPY_DTYPES[dtype].itemsize
    if end - begin != expected:
        raise CheckpointError(
            f"{where}: {end - begin} bytes at {begin}..{end}, but {dtype} of shape {tuple(shape)} takes {expected}; "
            "fetch the file again"
        )
    return TensorInfo(name, path, dtype, tuple(shape), data_start + begin, end - begin)


def _check_layout(path: Path, tensors: Iterable[TensorInfo], data_start: int, file_size: int) -> None:
    position = data_start
    for info in sorted(tensors, key=lambda t: (t.offset, t.offset + t.nbytes)):
        if info.offset < position:
            raise CheckpointError(f"{path}: tensor {info.name!r} overlaps the one before it; fetch the file again")
        if info.offset > position:
            raise CheckpointError(
                f"{path}: {info.offset - position} bytes before tensor {info.name!r} belong to no tensor; "
                "fetch the file again"
            )
        position += info.nbytes
        if position > file_size:
            raise CheckpointError(
                f"{path}: truncated: tensor {info.name!r} ends at byte {position}, the file has {file_size}; "
                "fetch the file again"
            )
    if position != file_size:
        raise CheckpointError(
            f"{path}: {file_size - position} bytes behind the last tensor belong to no tensor; fetch the file again"
        )


def _parse_header(path: Path, text: bytes, file_size: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    if not text.startswith(b"{"):
        raise CheckpointError(f"{path}: the header does not begin with '{{': not a safetensors file, or garbled")
    header = parse_json_object(text, f"{path}: header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: header: __metadata__ is not a map of strings; fetch the file again")
    data_start = 8 + len(text)
    tensors = {name: _parse_entry(path, name, entry, data_start) for name, entry in header.items()}
    _check_layout(path, tensors.values(), data_start, file_size)
    return tensors, metadata


class SafetensorsFile:
    """An open safetensors file. Reads may come from several threads at once.

    Raises:
        CheckpointError: the file is missing, truncated, garbled, or describes its tensors inconsistently.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._descriptor = -1
        try:
            # A FIFO or device behind the name would block or never end.
            if not stat.S_ISREG(path.stat().st_mode):
                raise CheckpointError(f"{path}: not a regular file")
            self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            size = os.fstat(self._descriptor).st_size
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be opened ({error.strerror or error})") from error
        try:
            self.tensors, self.metadata = self._read_header(size)
        except BaseException:
            self.close()
            raise

    def _read_header(self, size: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
        if size < 8:
            raise CheckpointError(f"{self.path}: truncated: {size} bytes are too few for a safetensors file")
        length = int(np.frombuffer(self._read_bytes(0, 8), "<u8")[0])
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{self.path}: claims a header of {length} bytes (at most {MAX_HEADER_BYTES}): "
                "not a safetensors file, or garbled"
            )
        if 8 + length > size:
            raise CheckpointError(
                f"{self.path}: truncated: its header has {length} bytes, the file {size}; fetch the file again"
            )
        return _parse_header(self.path, bytes(self._read_bytes(8, length)), size)

    def _read_bytes(self, offset: int, count: int) -> NDArray[np.uint8]:
        buffer = np.empty(count, np.uint8)
        self.read_into(buffer, offset)
        return buffer

    def read_into(self, buffer: NDArray[Any], offset: int) -> None:
        """Fill a contiguous array with the bytes at `offset` of the file."""
        view = buffer.reshape(-1).view(np.uint8).data
        done = 0
        while done < len(view):
            try:
                count = self._read_some(view[done : done + (1 << 30)], offset + done)
            except OSError as error:
                raise CheckpointError(f"{self.path}: cannot be read ({error.strerror or error})") from error
            if count <= 0:
                raise CheckpointError(f"{self.path}: ends at byte {offset + done}: it was truncated while it was read")
            done += count

    def _read_some(self, view: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._descriptor, [view], offset)
        with self._lock:  # Windows has no pread
            os.lseek(self._descriptor, offset, os.SEEK_SET)
            data = os.read(self._descriptor, len(view))
        view[: len(data)] = data
        return len(data)

    def _rows(self, name: str, rows: slice | None) -> tuple[TensorInfo, tuple[int, ...], int]:
        """The tensor, the shape asked for and the file offset of its first byte."""
        info = self.tensors[name]
        if rows is None:
            return info, info.shape, info.offset
        if not info.shape:
            raise ValueError(f"tensor {name!r} is a scalar and has no rows")
        start, stop, step = rows.indices(info.shape[0])
        if step != 1:
            raise ValueError(f"tensor {name!r}: rows are read with step 1, not {step}")
        row_bytes = info.nbytes // info.shape[0] if info.shape[0] else 0
        return info, (max(stop - start, 0), *info.shape[1:]), info.offset + start * row_bytes

    def read_raw(self, name: str, rows: slice | None = None) -> NDArray[Any]:
        """The tensor, or the given rows of its first axis, as stored; bfloat16 as uint16.

        Raises:
            KeyError: no such tensor. CheckpointError: the file cannot be read.
        """
        info, shape, offset = self._rows(name, rows)
        result = np.empty(shape, NUMPY_DTYPES[info.dtype])
        self.read_into(result, offset)
        return result

    def read_float32(self, name: str, rows: slice | None = None) -> NDArray[np.float32]:
        """The tensor, or the given rows of its first axis, as float32. bfloat16 and float16 widen exactly.

        Raises:
            KeyError: no such tensor. CheckpointError: it is not of a float type, or the file cannot be read.
        """
        info, shape, offset = self._rows(name, rows)
        if info.dtype not in FLOAT_DTYPES:
            raise CheckpointError(f"{self.path}: tensor {name!r} is {info.dtype}, expected {', '.join(FLOAT_DTYPES)}")
        result = np.empty(shape, np.float32)
        if info.dtype == "F32":
            self.read_into(result, offset)
            return result
        flat, itemsize = result.reshape(-1), 2
        raw = np.empty(min(flat.size, READ_BYTES // itemsize), NUMPY_DTYPES[info.dtype])
        for start in range(0, flat.size, max(raw.size, 1)):
            part = raw[: min(raw.size, flat.size - start)]
            self.read_into(part, offset + start * itemsize)
            out = flat[start : start + part.size]
            if info.dtype == "BF16":
                np.left_shift(part, np.uint32(16), out=out.view(np.uint32), dtype=np.uint32)
            else:
                out[:] = part
        return result

    def close(self) -> None:
        """Close the file; reads after that fail."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> SafetensorsFile:
        """Close the file at the end of the block."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Close the file."""
        self.close()

    def __del__(self) -> None:
        """Close the file when nobody holds it any more."""
        if hasattr(self, "_descriptor"):
            self.close()


def _encode_header(tensors: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None) -> tuple[bytes, list[str]]:
    # Wide types first, as the reference implementation lays them out, so that every tensor is aligned to its type.
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
    """Writes one safetensors file whose tensors come one by one, in any order, whole or by rows.

    The header is written at once from `tensors` (in their order, wide types first). Writes may come from several
    threads. `close`, or the end of a `with` block that raised nothing, checks that every byte was written. The file
    appears in place: write into an `edgelm.files.atomic_directory`.

    Raises:
        ValueError: an unknown dtype or a tensor name the format reserves.
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
        """Write a whole tensor; its numpy dtype must be the declared one (bfloat16 as uint16)."""
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
        """Write values `start ..` of a tensor in C order, `array` being one-dimensional. Each exactly once."""
        count = math.prod(self.tensors[name].shape)
        if array.ndim != 1 or not 0 <= start <= start + array.size <= count:
            raise ValueError(f"tensor {name!r}: values {start}.. of shape {array.shape} do not fit into {count}")
        self._put(name, array, start * array.itemsize)

    def _put(self, name: str, array: NDArray[Any], offset: int) -> None:
        declared = NUMPY_DTYPES[self.tensors[name].dtype]
        if array.dtype != declared:
            raise ValueError(f"tensor {name!r}: dtype {array.dtype}, declared {self.tensors[name].dtype} ({declared})")
        with self._lock:
            self._left[name] -= array.nbytes
            if self._left[name] < 0:
                raise ValueError(f"tensor {name!r}: more was written than it holds")
        self._write_at(np.ascontiguousarray(array), self._offsets[name] + offset)

    def close(self) -> None:
        """Close the file.

        Raises:
            ValueError: some tensor was not written in full.
        """
        self._file.close()
        unwritten = [name for name, left in self._left.items() if left]
        if unwritten:
            raise ValueError(
                f"{self.path}: {len(unwritten)} tensors not written in full, the first is {unwritten[0]!r}"
            )

    def __enter__(self) -> SafetensorsWriter:
        """Close at the end of the block."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Close and check, unless an error is already under way."""
        if kind is None:
            self.close()
        else:
            self._file.close()


def plan_shards(tensors: Mapping[str, TensorSpec], shard_bytes: int | None) -> list[list[str]]:
    """Fill shards in the tensors' order with at most `shard_bytes` each (a larger tensor gets one of its own)."""
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
    """Writes a checkpoint's weights into `folder`: one `model.safetensors`, or shards and their index.

    Names and index are as transformers writes them. The interface is `SafetensorsWriter`'s.
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
        for writer in self._writers.values():
            writer.close()
        if len(self.files) > 1:
            total = sum(spec.nbytes for spec in self.tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(self._weight_map.items()))}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def __enter__(self) -> ShardedWriter:
        """Close at the end of the block."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Close and check, unless an error is already under way."""
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
    """Write all `tensors`; `blocks(name)` yields consecutive row blocks of each (a scalar: the one array).

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
