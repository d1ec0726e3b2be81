"""The packed layout of matrices that the compiled operators read: what their headers say, and where things lie.

`runtimes/csrc/kernels/layout.h` is the definition; this is the same in Python, for the exporter that writes it and for
whoever wants to know what a bundle holds. Numbers are little-endian.
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
"""Columns of integer codes that are stored together."""
HALF = 16
"""Columns of a group of which two share a record."""
HEADER_BYTES = 64
ALIGNMENT = 64
"""Where a matrix among packed experts may begin."""

RESCORE = 128
"""How many of a head's logits are recomputed from all bits when one token is decoded (split nibbles only)."""

_MATRIX_MAGIC, _EXPERTS_MAGIC, _VERSION = b"EDLM", b"EDLX", 1
_MATRIX = struct.Struct("<4s4B5q16x")
_EXPERTS = struct.Struct("<4sB3x2q40x")
_HAS_ZEROS, _SWIGLU = 1, 2
_MOST = 1 << 40
"""Of rows and columns, as the operators have it."""


class Kind(IntEnum):
    """How a matrix's weights are stored."""

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
        """Whether codes have scales and are multiplied as integers."""
        return self < Kind.FP8

    @property
    def label(self) -> str:
        """Such as "int4" or "int8 in split nibbles"."""
        return {Kind.INT8_SPLIT: "int8 in split nibbles", Kind.FP8: "fp8"}.get(self, self.name.lower())


class Scales(IntEnum):
    """How a matrix's scales are stored."""

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
        kind, scales: how weights and scales are stored.
        zeros: whether each group has zero points.
        swiglu: whether the rows are gate's and then up's, stored in alternating tiles.
        rows, columns: N and K, any numbers.
        group: columns that share a scale: 16 or a multiple of 32, at most K rounded up to 32; K itself, whatever it is,
            of matrices that are no integers and have one scale a row or none.
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
        """Tiles of 32 rows, the last of each part padded."""
        return -(-self.outputs // TILE) * (2 if self.swiglu else 1)

    @property
    def groups(self) -> int:
        """Scales of a row, the last perhaps for fewer columns."""
        return -(-self.columns // self.group)

    @property
    def span(self) -> int:
        """Columns of a record: a group, or two of 16."""
        whole = not self.kind.is_integer and self.group == self.columns
        return BLOCK if self.group == HALF and not whole else self.group

    @property
    def records(self) -> int:
        """Records of a tile, the last padded where K is no multiple of its columns."""
        return -(-self.columns // self.span)

    @property
    def scale_bytes(self) -> int:
        """Bytes of a group's scales in a record."""
        return TILE * _SCALE_BYTES[self.scales]

    @property
    def head_bytes(self) -> int:
        """Bytes of a record before its codes: scales of its one or two groups, then their zero points."""
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
        """Bytes of the header and all records, which is everything but the low nibbles."""
        return HEADER_BYTES + self.tiles * self.records * self.record_bytes

    @property
    def low_bytes(self) -> int:
        """Bytes of the low nibbles."""
        return self.tiles * self.records * (self.span // BLOCK) * 512 if self.kind is Kind.INT8_SPLIT else 0

    @property
    def nbytes(self) -> int:
        """Bytes of everything, the header and the gap before the low nibbles included."""
        return self.low_offset + self.low_bytes if self.kind is Kind.INT8_SPLIT else self.first_bytes

    @property
    def bits_per_weight(self) -> float:
        """Storage of a weight, scales, zero points and padding included."""
        return 8 * (self.first_bytes + self.low_bytes) / (self.rows * self.columns)

    def with_low_offset(self, offset: int) -> PackedMatrix:
        """The same with its low nibbles at `offset`."""
        return replace(self, low_offset=offset)

    def header(self) -> bytes:
        """The first 64 bytes."""
        flags = (_HAS_ZEROS if self.zeros else 0) | (_SWIGLU if self.swiglu else 0)
        return _MATRIX.pack(
            _MATRIX_MAGIC, _VERSION, self.kind, self.scales, flags,
            self.rows, self.columns, self.group, self.nbytes, self.low_offset,
        )  # fmt: skip

    def describe(self) -> str:
        """Such as "int4, groups of 32, SwiGLU [2048, 2048]"."""
        parts = [self.kind.label]
        if self.scales is not Scales.NONE:
            parts.append(f"groups of {self.group}" if self.group < self.columns else "a scale per row")
        if self.zeros:
            parts.append("zero points")
        if self.swiglu:
            parts.append("SwiGLU")
        return f"{', '.join(parts)} [{self.rows}, {self.columns}]"


def stored_group(kind: Kind, group: int | None, columns: int) -> int:
    """The group of a `PackedMatrix` whose rows have a scale for every `group` values; None is one for the row."""
    whole = aligned(columns, BLOCK) if kind.is_integer else columns
    return whole if group is None else min(group, whole)


def parse_matrix(header: bytes, where: str) -> PackedMatrix:
    """Read a packed matrix's header of 64 bytes.

    Raises:
        BundleError: it is none, or contradicts itself.
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
    if min(rows, columns, group) < 1 or max(rows, columns) > _MOST or group > aligned(columns, BLOCK):
        return False
    whole = not matrix.kind.is_integer and group == columns
    return (whole or group == HALF or group % BLOCK == 0) and not (matrix.swiglu and rows % 2)


def experts_header(offsets: list[tuple[int, int]], size: int) -> bytes:
    """The header of packed experts and the table of where each one's gate+up and down begin."""
    head = _EXPERTS.pack(_EXPERTS_MAGIC, _VERSION, len(offsets), size)
    return head + struct.pack(f"<{2 * len(offsets)}q", *(offset for pair in offsets for offset in pair))


def aligned(size: int, multiple: int = ALIGNMENT) -> int:
    """`size` rounded up to where the next matrix may begin, or to another multiple."""
    return -(-size // multiple) * multiple


def read_matrices(stream: BinaryIO, offset: int, where: str) -> list[tuple[int, PackedMatrix]]:
    """The packed matrices of a tensor that begins at `offset`: one, or two an expert; empty if it is not packed.

    Each comes with its place from the tensor's start. Experts come as gate+up of the first, down of the first, and so
    on.

    Raises:
        BundleError: a header contradicts itself, or a matrix begins where none can.
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
