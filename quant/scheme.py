"""Quantisation schemes: the number format of a matrix's codes, and how many values share a scale."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from math import gcd
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from edgelm.errors import RecipeError

if TYPE_CHECKING:
    from typing import Self

MIN_GROUP = 16
"""Smallest group. ONNX Runtime's block-quantised operators need a power of two of at least 16."""

INTEGER_BITS = (3, 4, 5, 6, 8)

FP8_FORMS = {"e4m3": "fp8", "e5m2": "fp8e5m2"}
"""The FP8 formats, each with the start of its schemes' names."""

FORMS = (
    "int3|int4|int5|int6|int8 - g<group>|row - sym|asym (such as int4-g32-sym, int3-g64-asym, int8-row-sym), "
    "fp8-row, fp8-b<block> (such as fp8-b128), and fp8e5m2 in place of fp8"
)
"""The names of all schemes, for messages."""

_INTEGER = re.compile(r"int(?P<bits>[34568])-(?:g(?P<group>\d+)|row)-(?P<symmetry>sym|asym)")
_FP8 = re.compile(r"(?P<format>fp8|fp8e5m2)-(?:b(?P<block>\d+)|row)")


class AnyScheme(ABC):
    """Base of the schemes: what is needed to store, slice and measure a quantised matrix.

    Attributes:
        bits: Bits per code. The codes of a row fill its bytes from the lowest bit up.
        group: Values per scale along the row, a power of two of at least 16; the last group of a row may be shorter.
            None means one scale for the whole row.
        scale_dtype: Type of the stored scales.
    """

    bits: int
    group: int | None
    scale_dtype: ClassVar[np.dtype[Any]]

    @property
    @abstractmethod
    def name(self) -> str:
        """Name of the scheme, which `parse_scheme` reads."""

    @property
    @abstractmethod
    def has_zeros(self) -> bool:
        """Whether each group stores a zero point, uint8."""

    @abstractmethod
    def with_group(self, group: int | None) -> Self:
        """Return the same scheme with another group."""

    def groups(self, columns: int) -> int:
        """Return the number of scales in a row of `columns` values."""
        return 1 if self.group is None else -(-columns // self.group)

    def group_size(self, columns: int) -> int:
        """Return the number of values per scale in a row of `columns` values."""
        return columns if self.group is None else self.group

    def code_bytes(self, columns: int) -> int:
        """Return the bytes of the codes of a row of `columns` values; the last byte may have unused bits."""
        return -(-columns * self.bits // 8)

    def padded(self, columns: int) -> int:
        """Round `columns` up to whole groups, or to codes that fill whole bytes if a row is one group."""
        unit = 8 // gcd(8, self.bits) if self.group is None else self.group
        return -(-columns // unit) * unit

    def bits_per_weight(self, columns: int) -> float:
        """Return the mean bits per weight in a row of `columns` values, with scales and 8-bit zero points."""
        of_group = 8 * self.scale_dtype.itemsize + (8 if self.has_zeros else 0)
        return self.bits + self.groups(columns) * of_group / columns

    def effective(self, columns: int) -> Self:
        """Return this scheme with the largest group, at most its own, that divides `columns`.

        If no power of two of at least 16 divides `columns`, the group stays and the last one of each row is shorter.
        """
        if self.group is None:
            return self
        group = min(self.group, columns & -columns)
        return self if group == self.group or group < MIN_GROUP else self.with_group(group)


def _check_group(group: int | None) -> None:
    if group is not None and (group < MIN_GROUP or group & (group - 1)):
        raise RecipeError(f"the group is {group!r}: give a power of two of at least {MIN_GROUP}, or a whole row")


@dataclass(frozen=True)
class Scheme(AnyScheme):
    """Integer scheme: each group of values in a row shares a float16 scale and, if asymmetric, a zero point.

    A weight is w = (code - zero) * scale with codes 0 .. 2**bits - 1. A symmetric scheme has the fixed zero point
    2**(bits - 1). Its scale may be negative, so that the sign with the larger magnitude can use the additional code of
    the negative side.

    Attributes:
        bits: Bits per code, one of `INTEGER_BITS`.
        group: Values per scale along the row, a power of two of at least 16; None for one scale per row.
        symmetric: Whether the zero point is fixed.

    Raises:
        RecipeError: `bits` or `group` is not one of these.
    """

    bits: int
    group: int | None
    symmetric: bool = True

    scale_dtype = np.dtype(np.float16)

    def __post_init__(self) -> None:
        if self.bits not in INTEGER_BITS:
            raise RecipeError(f"an integer scheme has 3, 4, 5, 6 or 8 bits, not {self.bits!r}")
        _check_group(self.group)

    @property
    def name(self) -> str:
        """Name of the scheme, such as "int4-g32-sym" or "int8-row-sym"."""
        group = "row" if self.group is None else f"g{self.group}"
        return f"int{self.bits}-{group}-{'sym' if self.symmetric else 'asym'}"

    @property
    def has_zeros(self) -> bool:
        """Whether each group stores a zero point: true for asymmetric schemes."""
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
    """FP8 scheme (OCP 8-bit floating point, revision 1.0): each block of a row shares a float32 scale.

    A weight is w = value(code) * scale with scale = absmax / largest. So the largest magnitude of a block becomes the
    format's largest number: 448 in E4M3 (4 exponent bits, 3 mantissa bits), 57344 in E5M2 (5 and 2).

    Attributes:
        group: Values per scale along the row, a power of two of at least 16; None for one scale per row.
        form: "e4m3" or "e5m2".

    Raises:
        RecipeError: `group` or `form` is not one of these.
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
        """Name of the scheme, such as "fp8-row", "fp8-b128" or "fp8e5m2-row"."""
        return f"{FP8_FORMS[self.form]}-{'row' if self.group is None else f'b{self.group}'}"

    @property
    def has_zeros(self) -> bool:
        """Always false: FP8 has a code for zero."""
        return False

    def with_group(self, group: int | None) -> Self:
        """Return the same scheme with another block."""
        return replace(self, group=group)


def parse_scheme(name: str) -> AnyScheme:
    """Parse the name of a scheme, such as "int4-g32-sym" or "fp8-row".

    Raises:
        RecipeError: There is no scheme of that name, or its group is not a power of two of at least 16.
    """
    if match := _INTEGER.fullmatch(name):
        group = match["group"]
        return Scheme(int(match["bits"]), None if group is None else int(group), match["symmetry"] == "sym")
    if match := _FP8.fullmatch(name):
        form = next(form for form, stem in FP8_FORMS.items() if stem == match["format"])
        return Fp8Scheme(None if match["block"] is None else int(match["block"]), form)
    raise RecipeError(f'"{name}" is not a scheme: write {FORMS}')
