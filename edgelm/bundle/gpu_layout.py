"""Layout of the weights that the GPU kernels read: tiles in the order of a tensor core operand.

A matrix [N, K] is cut into tiles of 16 rows and `GpuKind.columns` columns. A tile has 512 bytes, which one warp reads
with one load of 16 bytes per lane: lane 4 g + q holds the elements of rows g and g + 8 that mma.m16n8k16 expects there.
The four words of a lane (little-endian), with k counted within the tile:

    float16, bfloat16 (16 columns)  w0: row g, k 2q, 2q+1; w1: row g+8, same; w2: row g, k 2q+8, 2q+9; w3: row g+8, same
    float32 (8 columns)             w0: row g, k q; w1: row g+8, k q; w2: row g, k q+4; w3: row g+8, k q+4
    int8, fp8 (32 columns)          steps s = 0, 1: w[2s]: row g, bytes k 16s + (2q, 2q+1, 2q+8, 2q+9); w[2s+1]: row g+8
    int4 (64 columns)               steps s = 0..3: w[s]: register j has nibbles j and j + 4: j = 0: row g, k 16s + (2q,
                                    2q+1); 1: row g+8, same; 2: row g, k 16s + (2q+8, 2q+9); 3: row g+8, same

The tiles of a block of 16 rows follow each other along K. Codes are unsigned, as in a quantised checkpoint: w = (code -
zero) * scale. Scales (float16 for integers, float32 for fp8) and zero points (uint8) are [N / 16, groups, 16]. In block
t of a SwiGLU matrix, rows 0..7 are rows 8t .. 8t+7 of gate, and rows 8..15 those of up: one lane has both factors of an
output.

A blob is codes | scales | zeros of all its matrices (one, or a layer's experts). Each part starts at a multiple of 256
bytes; in it, matrix e begins at e times the part's stride.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from edgelm.json_dataclass import Range, StrEnum

ROWS = 16
TILE_BYTES = 512
ALIGNMENT = 256
_Size = Annotated[int, Range(1, (1 << 31) - 1)]


class GpuKind(StrEnum):
    """Storage type of the weights."""

    INT4 = "int4"
    INT8 = "int8"
    FP8 = "fp8"
    FLOAT16 = "f16"
    BFLOAT16 = "bf16"
    FLOAT32 = "f32"

    @property
    def label(self) -> str:
        """Name of the type in recipes and options."""
        return {GpuKind.FLOAT16: "float16", GpuKind.BFLOAT16: "bfloat16", GpuKind.FLOAT32: "float32"}.get(
            self, self.value
        )

    @property
    def columns(self) -> int:
        """Columns of a tile."""
        return {GpuKind.INT4: 64, GpuKind.INT8: 32, GpuKind.FP8: 32, GpuKind.FLOAT32: 8}.get(self, 16)

    @property
    def scale_bytes(self) -> int:
        """Bytes of a scale; 0 for kinds without scales."""
        return {GpuKind.INT4: 2, GpuKind.INT8: 2, GpuKind.FP8: 4}.get(self, 0)


@dataclass(frozen=True)
class GpuMatrix:
    """A blob of `count` matrices of one shape and storage type.

    Attributes:
        kind: storage type of the weights.
        rows, columns: N and K. In a SwiGLU matrix N counts the rows of gate and up. K is a multiple of the tile's
            columns.
        group: columns per scale, a multiple of 16 that divides K; K for kinds without scales.
        zeros: whether groups have zero points.
        swiglu: whether gate and up alternate in blocks of 8 rows.
        count: matrices in the blob.
    """

    kind: GpuKind
    rows: _Size
    columns: _Size
    group: _Size
    zeros: bool = False
    swiglu: bool = False
    count: _Size = 1

    def problem(self) -> str:
        """Return what is inconsistent in a description that was read from a file; empty where nothing is."""
        if self.columns % self.kind.columns or self.columns % self.group or (self.swiglu and self.rows % 2):
            return (
                f"{self.rows} rows of {self.columns} columns in groups of {self.group}, which no {self.kind} matrix has"
            )
        return ""

    @property
    def blocks(self) -> int:
        """Blocks of 16 rows; the last is padded with zeros. In a SwiGLU matrix each has 8 of gate and 8 of up."""
        return -(-self.rows // ROWS)

    @property
    def groups(self) -> int:
        """Number of scales in a row."""
        return self.columns // self.group

    @property
    def outputs(self) -> int:
        """Columns of the matmul's output: half the rows for SwiGLU."""
        return self.rows // 2 if self.swiglu else self.rows

    @property
    def codes_stride(self) -> int:
        """Bytes from one matrix's codes to the next's."""
        return self.blocks * (self.columns // self.kind.columns) * TILE_BYTES

    @property
    def scales_stride(self) -> int:
        """Bytes from one matrix's scales to the next's."""
        return self.blocks * self.groups * ROWS * self.kind.scale_bytes

    @property
    def zeros_stride(self) -> int:
        """Bytes from one matrix's zero points to the next's."""
        return self.blocks * self.groups * ROWS if self.zeros else 0

    @property
    def scales_offset(self) -> int:
        """Byte offset of the scales in the blob."""
        return aligned(self.count * self.codes_stride)

    @property
    def zeros_offset(self) -> int:
        """Byte offset of the zero points in the blob."""
        return self.scales_offset + aligned(self.count * self.scales_stride)

    @property
    def nbytes(self) -> int:
        """Bytes of the blob."""
        return self.zeros_offset + aligned(self.count * self.zeros_stride)


def aligned(size: int, multiple: int = ALIGNMENT) -> int:
    """Return `size` rounded up to a multiple."""
    return -(-size // multiple) * multiple
