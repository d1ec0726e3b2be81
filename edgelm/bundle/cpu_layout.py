"""Packed layout of the matrices that the native CPU operators read: headers, records and offsets.

`runtimes/csrc/kernels/layout.h` defines the layout. This module is the same in Python, for the exporter and for
`edgelm inspect`. Numbers are little-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import BinaryIO

from edgelm.errors import BundleError

TILE = 32
"""Rows of a tile."""
BLOCK = 32
"""Columns of a block of integer codes."""
HALF = 16
"""Group size of which two groups share one record."""
HEADER_BYTES = 64
ALIGNMENT = 64
"""Alignment in bytes of a matrix among packed experts."""

RESCORE = 128
"""Number of a head's logits that are rescored with all bits when one token is decoded (split nibbles only)."""

_MATRIX_MAGIC, _EXPERTS_MAGIC, _VERSION = b"EDLM", b"EDLX", 1
_MATRIX = struct.Struct("<4s4B5q16x")
_EXPERTS = struct.Struct("<4sB3x2q40x")
_HAS_ZEROS, _SWIGLU = 1, 2
_MAX_SIZE = 1 << 40
"""Most rows and columns; the operators have the same limit."""


class Kind(IntEnum):
    """Storage type of a matrix's weights."""

    INT3 = 3
    INT4 = 4
    INT5 = 5
    INT6 = 6
    INT8 = 8
    INT8_SPLIT = 9
    FP8 = 16
    FLOAT16 = 17
    BFLOAT16 = 18
    FLOAT32 = 19

    @property
    def is_integer(self) -> bool:
        """Whether the weights are integer codes with scales, multiplied in integer arithmetic."""
        return self < Kind.FP8

    @property
    def label(self) -> str:
        """Name in messages, such as "int4" or "int8 in split nibbles"."""
        return {Kind.INT8_SPLIT: "int8 in split nibbles", Kind.FP8: "fp8"}.get(self, self.name.lower())


class Scales(IntEnum):
    """Storage type of a matrix's scales."""

    NONE = 0
    FLOAT16 = 1
    FLOAT32 = 2


# Bytes of 32 rows and 32 columns; of split nibbles: one half of them.
_BLOCK_BYTES = {
    Kind.INT3: 384, Kind.INT4: 512, Kind.INT5: 640, Kind.INT6: 768, Kind.INT8: 1024, Kind.INT8_SPLIT: 512
}  # fmt: skip
_ELEMENT_BYTES = {Kind.FP8: 1, Kind.FLOAT16: 2, Kind.BFLOAT16: 2, Kind.FLOAT32: 4}
_SCALE_BYTES = {Scales.NONE: 0, Scales.FLOAT16: 2, Scales.FLOAT32: 4}


@dataclass(frozen=True)
class PackedMatrix:
    """The shape and layout of a packed matrix.

    Attributes:
        kind, scales: storage types of weights and scales.
        zeros: whether each group has zero points.
        swiglu: whether the matrix holds the rows of gate, then those of up, stored in alternating tiles.
        rows, columns: N and K, of any size.
        group: columns that share a scale: 16 or a multiple of 32, at most K rounded up to 32. For non-integer matrices
            with one scale per row or none, it is K.
        low_offset: for INT8_SPLIT where the low nibbles begin, from the header's start; else 0.
    """

    kind: Kind
    scales: Scales
    zeros: bool
    swiglu: bool
    rows: int
    columns: int
    group: int
    low_offset: int = 0

    @property
    def outputs(self) -> int:
        """Columns of the matmul's result: half the rows for SwiGLU."""
        return self.rows // 2 if self.swiglu else self.rows

    @property
    def tiles(self) -> int:
        """Tiles of 32 rows; the last one of gate and of up is padded."""
        return -(-self.outputs // TILE) * (2 if self.swiglu else 1)

    @property
    def groups(self) -> int:
        """Number of scales in a row; the last group may have fewer columns."""
        return -(-self.columns // self.group)

    @property
    def span(self) -> int:
        """Columns of a record: one group, or two groups of 16."""
        whole = not self.kind.is_integer and self.group == self.columns
        return BLOCK if self.group == HALF and not whole else self.group

    @property
    def records(self) -> int:
        """Records in a tile; the last is padded where K is not a multiple of `span`."""
        return -(-self.columns // self.span)

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales of one group in a record."""
        return TILE * _SCALE_BYTES[self.scales]

    @property
    def head_bytes(self) -> int:
        """Bytes in a record before its codes: the scales of its one or two groups, then their zero points."""
        return (self.scale_bytes + (2 * TILE if self.zeros else 0)) * (self.span // self.group)

    @property
    def code_bytes(self) -> int:
        """Bytes of a record's codes; of split nibbles, the high ones."""
        if self.kind.is_integer:
            return self.span // BLOCK * _BLOCK_BYTES[self.kind]
        return self.span * TILE * _ELEMENT_BYTES[self.kind]

    @property
    def record_bytes(self) -> int:
        """Bytes of a record."""
        return self.head_bytes + self.code_bytes

    @property
    def first_bytes(self) -> int:
        """Bytes of the header and all records, without the low nibbles of split nibbles."""
        return HEADER_BYTES + self.tiles * self.records * self.record_bytes

    @property
    def low_bytes(self) -> int:
        """Bytes of the low nibbles."""
        return self.tiles * self.records * (self.span // BLOCK) * 512 if self.kind is Kind.INT8_SPLIT else 0

    @property
    def nbytes(self) -> int:
        """Bytes of the whole matrix, with the header and the gap before the low nibbles."""
        return self.low_offset + self.low_bytes if self.kind is Kind.INT8_SPLIT else self.first_bytes

    @property
    def bits_per_weight(self) -> float:
        """Bits stored per weight, with scales, zero points and padding."""
        return 8 * (self.first_bytes + self.low_bytes) / (self.rows * self.columns)

    def with_low_offset(self, offset: int) -> PackedMatrix:
        """Return the same matrix with its low nibbles at `offset`."""
        return replace(self, low_offset=offset)

    def header(self) -> bytes:
        """Return the header, 64 bytes."""
        flags = (_HAS_ZEROS if self.zeros else 0) | (_SWIGLU if self.swiglu else 0)
        return _MATRIX.pack(
            _MATRIX_MAGIC, _VERSION, self.kind, self.scales, flags,
            self.rows, self.columns, self.group, self.nbytes, self.low_offset,
        )  # fmt: skip

    def describe(self) -> str:
        """Return a description such as "int4, groups of 32, SwiGLU [2048, 2048]"."""
        parts = [self.kind.label]
        if self.scales is not Scales.NONE:
            parts.append(f"groups of {self.group}" if self.group < self.columns else "a scale per row")
        if self.zeros:
            parts.append("zero points")
        if self.swiglu:
            parts.append("SwiGLU")
        return f"{', '.join(parts)} [{self.rows}, {self.columns}]"


def stored_group(kind: Kind, group: int | None, columns: int) -> int:
    """Return `PackedMatrix.group` for a scale per `group` values; None means one scale per row."""
    whole = aligned(columns, BLOCK) if kind.is_integer else columns
    return whole if group is None else min(group, whole)


def parse_matrix(header: bytes, where: str) -> PackedMatrix:
    """Parse the header of a packed matrix, 64 bytes; `where` names the tensor in errors.

    Raises:
        BundleError: it is not such a header, or its fields contradict each other.
    """
    broken = f"{where} is no packed matrix"
    if len(header) < HEADER_BYTES or header[:4] != _MATRIX_MAGIC:
        raise BundleError(f"{broken}: it does not begin with {_MATRIX_MAGIC.decode()}; export the bundle again")
    _, version, kind, scales, flags, rows, columns, group, size, low_offset = _MATRIX.unpack(header[:HEADER_BYTES])
    if version != _VERSION:
        raise BundleError(
            f"{where} has layout version {version}, this EdgeLM reads {_VERSION}: export the bundle again"
        )
    try:
        matrix = PackedMatrix(
            Kind(kind),
            Scales(scales),
            bool(flags & _HAS_ZEROS),
            bool(flags & _SWIGLU),
            rows,
            columns,
            group,
            low_offset,
        )
    except ValueError as error:
        raise BundleError(f"{broken}: {error}; export the bundle again") from error
    if not _possible(matrix) or size != matrix.nbytes:
        raise BundleError(f"{broken}: its shape, group and size contradict each other; export the bundle again")
    return matrix


def _possible(matrix: PackedMatrix) -> bool:
    rows, columns, group = matrix.rows, matrix.columns, matrix.group
    if min(rows, columns, group) < 1 or max(rows, columns) > _MAX_SIZE or group > aligned(columns, BLOCK):
        return False
    whole = not matrix.kind.is_integer and group == columns
    return (whole or group == HALF or group % BLOCK == 0) and not (matrix.swiglu and rows % 2)


def experts_header(offsets: list[tuple[int, int]], size: int) -> bytes:
    """Return the header of packed experts, with the table of the byte offsets of each expert's gate+up and down."""
    head = _EXPERTS.pack(_EXPERTS_MAGIC, _VERSION, len(offsets), size)
    return head + struct.pack(f"<{2 * len(offsets)}q", *(offset for pair in offsets for offset in pair))


def aligned(size: int, multiple: int = ALIGNMENT) -> int:
    """Return `size` rounded up to a multiple, by default to the alignment of a matrix."""
    return -(-size // multiple) * multiple


def read_matrices(stream: BinaryIO, offset: int, where: str) -> list[tuple[int, PackedMatrix]]:
    """Read the headers of the packed matrices in the tensor at byte `offset`.

    Returns:
        (offset from the tensor's start, matrix) for each: one matrix, or gate+up and down of each expert in turn; empty
        where the tensor is not packed.

    Raises:
        BundleError: a header contradicts itself, or a matrix begins at an invalid offset.
    """
    stream.seek(offset)
    header = stream.read(HEADER_BYTES)
    if header[:4] == _MATRIX_MAGIC:
        return [(0, parse_matrix(header, where))]
    if header[:4] != _EXPERTS_MAGIC:
        return []
    broken = f"{where} has a header of packed experts that cannot be: export the bundle again"
    if len(header) < HEADER_BYTES:
        raise BundleError(broken)
    _, version, count, size = _EXPERTS.unpack(header)
    if version != _VERSION or not 0 < count < 1 << 20 or size < HEADER_BYTES + 16 * count:
        raise BundleError(broken)
    table = stream.read(16 * count)
    if len(table) < 16 * count:
        raise BundleError(broken)
    found = []
    for number, place in enumerate(struct.unpack(f"<{2 * count}q", table)):
        part = f"{where}: {('gate_up', 'down')[number % 2]} of expert {number // 2}"
        if place % ALIGNMENT or not HEADER_BYTES <= place < size:
            raise BundleError(
                f"{part} begins at byte {place} of {size}, not at a multiple of {ALIGNMENT} within: export the bundle "
                "again"
            )
        stream.seek(offset + place)
        found.append((place, parse_matrix(stream.read(HEADER_BYTES), part)))
    return found
