"""How one matrix is quantised: bits, group and symmetry."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from edgelm.errors import RecipeError

MIN_GROUP = 16
"""Smallest group: ONNX Runtime's block-quantised operators want a power of two of at least 16."""

_NAME = re.compile(r"int(?P<bits>[48])-(?:g(?P<group>\d+)|row)-(?P<symmetry>sym|asym)")


@dataclass(frozen=True)
class Scheme:
    """One scale (and, asymmetric, one zero point) for each `group` neighbouring values of a matrix row.

    A weight is `w = (code - zero) * scale` with `code` in 0 .. 2**bits - 1. A symmetric scheme fixes `zero` at
    2**(bits - 1); its scale may be negative, so that the one code more on the negative side serves whichever sign
    holds the largest value.

    Attributes:
        bits: 4 or 8.
        group: values per scale along the row, a power of two of at least 16; None is one scale for the whole row.
        symmetric: whether the zero point is fixed.

    Raises:
        RecipeError: bits or group is none of these.
    """

    bits: int
    group: int | None
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise RecipeError(f"a scheme has 4 or 8 bits, not {self.bits!r}")
        if self.group is not None and (self.group < MIN_GROUP or self.group & (self.group - 1)):
            raise RecipeError(
                f"a group is a power of two of at least {MIN_GROUP}, or the whole row, not {self.group!r}"
            )

    @property
    def name(self) -> str:
        """Such as "int4-g32-sym" or "int8-row-sym"; `parse` reads it."""
        group = "row" if self.group is None else f"g{self.group}"
        return f"int{self.bits}-{group}-{'sym' if self.symmetric else 'asym'}"

    @classmethod
    def parse(cls, name: str) -> Scheme:
        """Read a `name`.

        Raises:
            RecipeError: `name` is not of the form int4|int8 - g<group>|row - sym|asym.
        """
        match = _NAME.fullmatch(name)
        if match is None:
            raise RecipeError(
                f'"{name}" is no scheme: write e.g. int4-g32-sym, int4-g64-asym, int8-g128-sym, int8-row-sym'
            )
        group = match["group"]
        return cls(int(match["bits"]), None if group is None else int(group), match["symmetry"] == "sym")

    @property
    def levels(self) -> int:
        """Number of codes, 2**bits."""
        return 1 << self.bits

    @property
    def symmetric_zero(self) -> int:
        """The zero point of the symmetric scheme, 2**(bits - 1)."""
        return 1 << (self.bits - 1)

    def groups(self, columns: int) -> int:
        """Scales in a row of `columns` values."""
        return 1 if self.group is None else -(-columns // self.group)

    def group_size(self, columns: int) -> int:
        """Values per scale in a row of `columns` values."""
        return columns if self.group is None else self.group

    def bits_per_weight(self, columns: int) -> float:
        """Storage for each weight in a row of `columns` values, float16 scales and 8-bit zero points included."""
        return self.bits + self.groups(columns) * (16 + (0 if self.symmetric else 8)) / columns

    def effective(self, columns: int, name: str = "the tensor") -> Scheme:
        """Return this scheme with a group that divides `columns`: its own, or the largest smaller one that does.

        Raises:
            RecipeError: no power of two of at least 16 divides `columns`, or two 4-bit codes do not fill a byte.
        """
        if self.bits == 4 and columns % 2:
            raise RecipeError(f"{name} has rows of {columns} values: 4-bit codes need an even number; keep it float")
        if self.group is None:
            return self
        group = min(self.group, columns & -columns)
        if group < MIN_GROUP:
            raise RecipeError(
                f"{name} has rows of {columns} values, which no group of {MIN_GROUP} or a larger power of two divides: "
                f"use {replace(self, group=None).name}, or keep it float"
            )
        return self if group == self.group else replace(self, group=group)
