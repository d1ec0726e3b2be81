"""Converts matrices from a bundle's tiles to rows, the layout that TensorRT's own matmuls take.

An engine has its own copy of these, so a bundle stores only the tiles: the file of rows is written when an engine is
built and deleted afterwards. Needs only numpy, since full TensorRT builds on the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from edgelm.bundle.gpu_layout import ROWS, TILE_BYTES, GpuKind, GpuMatrix
from edgelm.errors import BundleError
from edgelm.json_dataclass import Count, OneOf, quoted

ALIGNMENT = 4096
_HALF = ROWS // 2
_BLOCK_BYTES = 16 << 20
_ALL, _GATE, _UP = "all", "gate", "up"


@dataclass(frozen=True)
class Rows:
    """A tensor in the file of rows.

    Attributes:
        name: its name in the graph.
        matrix: the blob's format; it must have one matrix.
        source: offset of the blob in the bundle's weights file.
        part: "all" rows, or of a SwiGLU matrix "gate" or "up".
        what: "values" [N, K]: float16 or bfloat16 bits, int8 or FP8; or "scales" [N] float32, one per row.
        offset: offset in the file of rows.
    """

    name: str
    matrix: GpuMatrix
    source: Count
    part: Annotated[str, OneOf((_ALL, _GATE, _UP))]
    what: Annotated[str, OneOf(("values", "scales"))]
    offset: Count

    def check(self, where: Path) -> None:
        """Raise BundleError unless the blob has one matrix with this part."""
        problem = self.matrix.problem()
        if problem or self.matrix.count != 1 or (self.part != _ALL) != self.matrix.swiglu:
            raise BundleError(
                f"{where}: {quoted(self.name)} is not a row-major matrix ({problem}): export the bundle again"
            )

    @property
    def rows(self) -> int:
        """N, the number of rows."""
        return self.matrix.rows if self.part == _ALL else self.matrix.outputs

    @property
    def dims(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return (self.rows, self.matrix.columns) if self.what == "values" else (self.rows,)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        if self.what == "scales":
            return 4 * self.rows
        return self.rows * self.matrix.columns * (1 if self.matrix.kind in (GpuKind.INT8, GpuKind.FP8) else 2)


def parts_of(matrix: GpuMatrix) -> tuple[str, ...]:
    """Return the names of the matrices that a blob interleaves."""
    return (_GATE, _UP) if matrix.swiglu else (_ALL,)


def write(entries: list[Rows], weights: Path, out: Path) -> None:
    """Write the file of rows, block by block.

    Raises:
        BundleError: the weights file is shorter than the entries say.
    """
    data = np.memmap(weights, np.uint8, "r")
    with out.open("wb") as stream:
        for entry in entries:
            if entry.source + entry.matrix.nbytes > data.size:
                raise BundleError(
                    f"{weights} is too short, it ends within {entry.name}: copy or export the bundle again"
                )
            blob = data[entry.source : entry.source + entry.matrix.nbytes]
            stream.seek(entry.offset)
            for block in blocks(entry, blob):
                stream.write(block)


def blocks(entry: Rows, blob: NDArray[np.uint8]) -> Iterator[memoryview]:
    """Yield a tensor's bytes in order, in blocks of some megabytes."""
    matrix = entry.matrix
    if entry.what == "scales":
        yield np.ascontiguousarray(_scales(entry, blob)).data
        return
    tiles = matrix.columns // matrix.kind.columns
    block_bytes = tiles * TILE_BYTES
    step = max(1, _BLOCK_BYTES // block_bytes)
    left = entry.rows
    for start in range(0, matrix.blocks, step):
        count = min(step, matrix.blocks - start)
        codes = blob[start * block_bytes : (start + count) * block_bytes]
        rows = _selected(_untiled(codes.reshape(count, tiles, TILE_BYTES), matrix.kind), entry.part)[:left]
        left -= len(rows)
        yield np.ascontiguousarray(rows).view(np.uint8).data


def _untiled(tiles: NDArray[np.uint8], kind: GpuKind) -> NDArray[Any]:
    """Convert [blocks, tiles, 512] bytes to [blocks, 16, K] values: 16-bit patterns, signed codes, or FP8."""
    count, along, _ = tiles.shape
    if kind in (GpuKind.FLOAT16, GpuKind.BFLOAT16):
        # g, q, half of the columns, half of the rows, neighbours
        words = tiles.view(np.uint16).reshape(count, along, _HALF, 4, 2, 2, 2)
        return words.transpose(0, 5, 2, 1, 4, 3, 6).reshape(count, ROWS, along * kind.columns)
    # g, q, step of 16 columns, half of the rows, half of the columns, neighbours
    lanes = tiles.reshape(count, along, _HALF, 4, 2, 2, 2, 2)
    found = lanes.transpose(0, 5, 2, 1, 4, 6, 3, 7).reshape(count, ROWS, along * kind.columns)
    # Convert unsigned codes with zero point 128 to signed ones.
    return found if kind is GpuKind.FP8 else found ^ np.uint8(0x80)


def _selected(rows: NDArray[Any], part: str) -> NDArray[Any]:
    """Return the rows [N, X] of one part of [blocks, 16, X]."""
    chosen = {_ALL: slice(0, ROWS), _GATE: slice(0, _HALF), _UP: slice(_HALF, ROWS)}[part]
    return rows[:, chosen].reshape(-1, rows.shape[2])


def _scales(entry: Rows, blob: NDArray[np.uint8]) -> NDArray[np.float32]:
    matrix = entry.matrix
    kind = np.float32 if matrix.kind is GpuKind.FP8 else np.float16
    raw = blob[matrix.scales_offset : matrix.scales_offset + matrix.scales_stride].view(kind)
    rows = _selected(raw.reshape(matrix.blocks, ROWS, 1), entry.part)
    # A row of zeros may have scale 0, which TensorRT does not allow.
    return np.maximum(rows[: entry.rows, 0].astype(np.float32), np.finfo(np.float32).tiny)
