"""Read safetensors files with numpy alone, one tensor (or some rows of one) at a time.

The format (https://huggingface.co/docs/safetensors): eight bytes with the little-endian length of a JSON header, the
header, then the tensors' bytes back to back. Data is read with `pread`, not memory-mapped: mapped pages count as
resident memory, and an export with a memory limit must control what it holds. bfloat16 is returned as uint16, since
numpy has no such type.
"""

from __future__ import annotations

import math
import os
import stat
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.checkpoint.jsonfile import parse_json_object
from edgelm.errors import CheckpointError

# Limits per file. The largest published checkpoints have 140 000 tensors in 60 files, and headers of a few hundred KB.
MAX_TENSORS = 100_000
MAX_HEADER_BYTES = 32 << 20
MAX_HEADER_COMMAS = 12 * MAX_TENSORS  # five to seven a tensor, and the metadata's
MAX_COUNT = 1 << 62  # limit of a tensor's bytes and values: numpy counts in 64 bits, even where an axis is empty
READ_BYTES = 512 << 10  # bytes converted at a time; they fit into a core's cache together with the result

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
    # numpy has no 8-bit floats: they are returned as their bytes.
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
    "F8_E4M3FNUZ": np.dtype("u1"),
    "F8_E5M2FNUZ": np.dtype("u1"),
    "F8_E8M0": np.dtype("u1"),
}
# Masks of the exponent bits. Infinities and NaNs have them all set, and no other value has.
_EXPONENTS: dict[str, np.unsignedinteger[Any]] = {
    "BF16": np.uint16(0x7F80),
    "F16": np.uint16(0x7C00),
    "F32": np.uint32(0x7F800000),
    "F64": np.uint64(0x7FF0000000000000),
}
FLOAT_DTYPES = tuple(_EXPONENTS)


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's entry in a file. `offset` counts from the start of the file; `dtype` is the format's name, "BF16"."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def bf16_to_float32(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Convert bfloat16 bit patterns of any shape to float32, exactly."""
    wide = bits.astype(np.uint32)
    np.left_shift(wide, np.uint32(16), out=wide)
    return wide.view(np.float32)


def as_float32(values: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Convert stored floats of type `dtype` to float32. Only float64 is rounded, to nearest."""
    if dtype == "BF16":
        return bf16_to_float32(values)
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(np.float32)


def first_not_finite(values: NDArray[Any], dtype: str) -> int | None:
    """Return the flat index of the first infinity or NaN in stored floats of any shape; None where all are finite."""
    exponent = _EXPONENTS[dtype]
    bits = np.ascontiguousarray(values).reshape(-1).view(exponent.dtype)
    step = READ_BYTES // bits.itemsize
    for start in range(0, bits.size, step):
        found = bits[start : start + step] & exponent
        if found.max() == exponent:
            return start + int(np.argmax(found == exponent))
    return None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_COUNT


def _parse_entry(path: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where}: its header entry is not an object; fetch the file again")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in NUMPY_DTYPES:
        raise CheckpointError(f"{where}: unknown dtype {dtype!r}, known are {', '.join(NUMPY_DTYPES)}")
    fine = isinstance(shape, list) and len(shape) <= 32 and all(map(_is_count, shape))
    if not isinstance(shape, list) or not fine or math.prod(size or 1 for size in shape) * 8 >= MAX_COUNT:
        raise CheckpointError(f"{where}: its shape {str(shape)[:80]} is not a list of sizes; fetch the file again")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise CheckpointError(
            f"{where}: its data_offsets {str(offsets)[:80]} are not two offsets; fetch the file again"
        )
    begin, end = offsets
    expected = math.prod(shape) * NUMPY_DTYPES[dtype].itemsize
    if end - begin != expected:
        raise CheckpointError(
            f"{where}: {end - begin} bytes at {begin} to {end}, but {dtype} of shape {tuple(shape)} takes {expected}; "
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
            f"{path}: {file_size - position} bytes after the last tensor belong to no tensor; fetch the file again"
        )


def _parse_header(path: Path, text: bytes, file_size: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    if not text.startswith(b"{"):
        raise CheckpointError(f"{path}: the header does not begin with '{{': not a safetensors file, or damaged")
    # Check the number of entries first: parsing takes a hundred times as long, and fifty times the memory.
    entries, commas = text.count(b"{") - 1, text.count(b",")
    if entries > MAX_TENSORS + 1 or commas > MAX_HEADER_COMMAS:
        raise CheckpointError(
            f"{path}: its header describes some {max(entries, commas // 7)} tensors (at most {MAX_TENSORS} are read "
            "from one file): damaged, or not a model's checkpoint"
        )
    header = parse_json_object(text, f"{path}: header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: header: __metadata__ is not a map of strings; fetch the file again")
    data_start = 8 + len(text)
    tensors = {name: _parse_entry(path, name, entry, data_start) for name, entry in header.items()}
    _check_layout(path, tensors.values(), data_start, file_size)
    return tensors, metadata


class SafetensorsFile:
    """An open safetensors file. Several threads may read at once.

    Raises:
        CheckpointError: the file is missing, truncated or garbled, or its header is inconsistent.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._descriptor = -1
        try:
            # Reading a FIFO or a device could block or never end.
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
                "not a safetensors file, or damaged"
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
        """Fill a contiguous array with the file's bytes from `offset` on."""
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

    def _rows(self, tensor: str | TensorInfo, rows: slice | None) -> tuple[TensorInfo, tuple[int, ...], int]:
        """Return the tensor's entry, the shape of the requested rows, and the file offset of their first byte."""
        info = self.tensors[tensor] if isinstance(tensor, str) else tensor
        if rows is None:
            return info, info.shape, info.offset
        if not info.shape:
            raise ValueError(f"tensor {info.name!r} is a scalar and has no rows")
        start, stop, step = rows.indices(info.shape[0])
        if step != 1:
            raise ValueError(f"tensor {info.name!r}: rows are read with step 1, not {step}")
        row_bytes = info.nbytes // info.shape[0] if info.shape[0] else 0
        return info, (max(stop - start, 0), *info.shape[1:]), info.offset + start * row_bytes

    def read_raw(self, tensor: str | TensorInfo, rows: slice | None = None, *, finite: bool = False) -> NDArray[Any]:
        """Return a tensor, or the given rows of its first axis, as stored; bfloat16 as uint16.

        Args:
            tensor: its name, or an entry that describes any part of the file, whose name is then used for errors only.
            rows: rows to read, with step 1; None for all.
            finite: raise an error for infinities and NaNs in floats.

        Raises:
            KeyError: there is no such tensor.
            CheckpointError: the file cannot be read, or a value is not finite.
        """
        info, shape, offset = self._rows(tensor, rows)
        result = np.empty(shape, NUMPY_DTYPES[info.dtype])
        check = finite and info.dtype in _EXPONENTS
        for part, start in self._blocks(result.reshape(-1), offset):
            if check:
                self._check_finite(part, info, (offset - info.offset) // result.itemsize + start)
        return result

    def read_float32(
        self, tensor: str | TensorInfo, rows: slice | None = None, *, finite: bool = False
    ) -> NDArray[np.float32]:
        """Return a tensor, or the given rows of its first axis, as float32. Only float64 is rounded, to nearest.

        Args:
            tensor: as `read_raw`.
            rows: rows to read, with step 1; None for all.
            finite: raise an error for infinities and NaNs.

        Raises:
            KeyError: there is no such tensor.
            CheckpointError: it is not of a float type, the file cannot be read, or a value is not finite, before or
                after it is rounded.
        """
        info, shape, offset = self._rows(tensor, rows)
        if info.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{self.path}: tensor {info.name!r} is {info.dtype}, expected {', '.join(FLOAT_DTYPES)}"
            )
        if info.dtype == "F32":
            return self.read_raw(info, rows, finite=finite)
        result = np.empty(shape, np.float32)
        flat, dtype = result.reshape(-1), NUMPY_DTYPES[info.dtype]
        first = (offset - info.offset) // dtype.itemsize
        raw = np.empty(min(flat.size, READ_BYTES // dtype.itemsize), dtype)
        for start in range(0, flat.size, max(raw.size, 1)):
            part = raw[: min(raw.size, flat.size - start)]
            self.read_into(part, offset + start * dtype.itemsize)
            if finite:
                self._check_finite(part, info, first + start)
            out = flat[start : start + part.size]
            if info.dtype == "BF16":
                wide = out.view(np.uint32)
                wide[:] = part
                np.left_shift(wide, np.uint32(16), out=wide)
            else:
                out[:] = as_float32(part, info.dtype)
                if finite and info.dtype == "F64":
                    self._check_finite(out, info, first + start, " once it is rounded to float32")
        return result

    def _blocks(self, flat: NDArray[Any], offset: int) -> Iterator[tuple[NDArray[Any], int]]:
        """Fill `flat` from the file's `offset` on; yield each part after it was read, and its start in `flat`."""
        step = READ_BYTES // flat.itemsize
        for start in range(0, flat.size, step):
            part = flat[start : start + step]
            self.read_into(part, offset + start * flat.itemsize)
            yield part, start

    def _check_finite(self, part: NDArray[Any], info: TensorInfo, start: int, when: str = "") -> None:
        """Raise `CheckpointError` if a value of `part` is not finite. `start` is the flat index of `part` in `info`."""
        place = first_not_finite(part, "F32" if when else info.dtype)
        if place is not None:
            value = as_float32(part[place : place + 1], "F32" if when else info.dtype)[0]
            index = ", ".join(str(int(i)) for i in np.unravel_index(start + place, info.shape))
            raise CheckpointError(
                f"{self.path}: tensor {info.name!r} holds {value} at [{index}]{when}: weights must be finite numbers, "
                "so the checkpoint is damaged, or its training failed; fetch it again or take another"
            )

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
        """Close the file when the object is deleted."""
        if hasattr(self, "_descriptor"):
            self.close()
