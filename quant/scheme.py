"""How one matrix is quantised: the numbers that codes stand for, and how many values share a scale."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from math import gcd
from typing import Any, ClassVar, Self

import numpy as np

from edgelm.errors import RecipeError

MIN_GROUP = 16
"""Smallest group: ONNX Runtime's block-quantised operators want a power of two of at least 16."""

INTEGER_BITS = (3, 4, 5, 6, 8)

FP8_FORMS = {"e4m3": "fp8", "e5m2": "fp8e5m2"}
"""Formats of FP8 by what the names of their schemes start with."""

FORMS = (
    "int3|int4|int5|int6|int8 - g<group>|row - sym|asym (such as int4-g32-sym, int3-g64-asym, int8-row-sym), "
    "fp8-row, fp8-b<block> (such as fp8-b128), and fp8e5m2 in place of fp8"
)
"""The names of schemes, for messages."""

_INTEGER = re.compile(r"int(?P<bits>[34568])-(?:g(?P<group>\d+)|row)-(?P<symmetry>sym|asym)")
_FP8 = re.compile(r"(?P<format>fp8|fp8e5m2)-(?:b(?P<block>\d+)|row)")


class AnyScheme(ABC):
    """What storing, cutting and sizing a quantised matrix has to know; the arithmetic is each scheme's own.

    Attributes:
        bits: of a code. Codes of one row fill its bytes from the lowest bit up.
        group: values per scale along the row, a power of two of at least 16, the last perhaps fewer; None is one scale
            for the whole row.
        scale_dtype: in which the scales are stored.
    """

    bits: int
    group: int | None
    scale_dtype: ClassVar[np.dtype[Any]]

    @property
    @abstractmethod
    def name(self) -> str:
        """As `parse_scheme` reads it."""

    @property
    @abstractmethod
    def has_zeros(self) -> bool:
        """Whether each group stores a zero point, uint8."""

    @abstractmethod
    def with_group(self, group: int | None) -> Self:
        """Return the same scheme with another group."""

    def groups(self, columns: int) -> int:
        """Scales in a row of `columns` values."""
        return 1 if self.group is None else -(-columns // self.group)

    def group_size(self, columns: int) -> int:
        """Values per scale in a row of `columns` values."""
        return columns if self.group is None else self.group

    def code_bytes(self, columns: int) -> int:
        """Bytes of the codes of a row of `columns` values, the last byte perhaps with bits to spare."""
        return -(-columns * self.bits // 8)

    def padded(self, columns: int) -> int:
        """`columns` rounded up to whole groups, or to codes that fill the last byte where a row is one group."""
        unit = 8 // gcd(8, self.bits) if self.group is None else self.group
        return -(-columns // unit) * unit

    def bits_per_weight(self, columns: int) -> float:
        """Storage for each weight in a row of `columns` values, scales and 8-bit zero points included."""
        of_group = 8 * self.scale_dtype.itemsize + (8 if self.has_zeros else 0)
        return self.bits + self.groups(columns) * of_group / columns

    def effective(self, columns: int) -> Self:
        """Return this scheme with a group that divides `columns`: its own, or the largest smaller one that does.

        Where no power of two of at least 16 divides `columns` the group stays, and the last one of a row is shorter.
        """
        if self.group is None:
            return self
        group = min(self.group, columns & -columns)
        return self if group == self.group or group < MIN_GROUP else self.with_group(group)


def _check_group(group: int | None) -> None:
    if group is not None and (group < MIN_GROUP or group & (group - 1)):
        raise RecipeError(f"a group is a power of two of at least {MIN_GROUP}, or the whole row, not {group!r}")


@dataclass(frozen=True)
class Scheme(AnyScheme):
    """Integers: one float16 scale (and, asymmetric, one zero point) for each `group` neighbouring values of a row.

    A weight is `w = (code - zero) * scale` with `code` in 0 .. 2**bits - 1. A symmetric scheme fixes `zero` at
    2**(bits - 1); its scale may be negative, so that the one code more on the negative side serves whichever sign
    holds the largest value.

    Attributes:
        bits: one of `INTEGER_BITS`.
        group: values per scale along the row, a power of two of at least 16; None is one scale for the whole row.
        symmetric: whether the zero point is fixed.

    Raises:
        RecipeError: bits or group is none of these.
    """

    bits: int
    group: int | None
    symmetric: bool = True

    scale_dtype = np.dtype(np.float16)

    def __post_init__(self) -> None:
        if self.bits not in INTEGER_BITS:
            raise RecipeError(f"a scheme of integers has 3, 4, 5, 6 or 8 bits, not {self.bits!r}")
        _check_group(self.group)

    @property
    def name(self) -> str:
        """Such as "int4-g32-sym" or "int8-row-sym"."""
        group = "row" if self.group is None else f"g{self.group}"
        return f"int{self.bits}-{group}-{'sym' if self.symmetric else 'asym'}"

    @property
    def has_zeros(self) -> bool:
        """Whether each group stores a zero point: unless it is symmetric."""
        return not self.symmetric

    def with_group(self, group: int | None) -> Self:
        """Return the same scheme with another group."""
        return replace(self, group=group)

    @property
    def levels(self) -> int:
        """Number of codes, 2**bits."""
        return 1 << self.bits

    @property
    def symmetric_zero(self) -> int:
        """The zero point of the symmetric scheme, 2**(bits - 1)."""
        return 1 << (self.bits - 1)


@dataclass(frozen=True)
class Fp8Scheme(AnyScheme):
    """FP8 (OCP 8-bit floating point, revision 1.0) with one float32 scale for each block of a row.

    A weight is `w = value(code) * scale`, and scale = absmax / largest, so that a block's largest weight becomes the
    format's largest number: 448 of E4M3 (4 bits of exponent, 3 of mantissa), 57344 of E5M2 (5 and 2).

    Attributes:
        group: values per scale along the row, a power of two of at least 16; None is one scale for the whole row.
        form: "e4m3" or "e5m2".

    Raises:
        RecipeError: group or form is none of these.
    """

    group: int | None
    form: str = "e4m3"

    bits = 8
    scale_dtype = np.dtype(np.float32)

    def __post_init__(self) -> None:
        _check_group(self.group)
        if self.form not in FP8_FORMS:
            raise RecipeError(f"FP8 is one of {', '.join(FP8_FORMS)}, not {self.form!r}")

    @property
    def name(self) -> str:
        """Such as "fp8-row", "fp8-b128" or "fp8e5m2-row"."""
        return f"{FP8_FORMS[self.form]}-{'row' if self.group is None else f'b{self.group}'}"

    @property
    def has_zeros(self) -> bool:
        """Never: zero is a code of its own."""
        return False

    def with_group(self, group: int | None) -> Self:
        """Return the same scheme with another block."""
        return replace(self, group=group)


def parse_scheme(name: str) -> AnyScheme:
    """Read a scheme's `name`.

    Raises:
        RecipeError: it is none of `FORMS`, or its group is no power of two of at least 16.
    """
    if match := _INTEGER.fullmatch(name):
        group = match["group"]
        return Scheme(int(match["bits"]), None if group is None else int(group), match["symmetry"] == "sym")
    if match := _FP8.fullmatch(name):
        form = next(form for form, stem in FP8_FORMS.items() if stem == match["format"])
        return Fp8Scheme(None if match["block"] is None else int(match["block"]), form)
    raise RecipeError(f'"{name}" is no scheme: write {FORMS}')
