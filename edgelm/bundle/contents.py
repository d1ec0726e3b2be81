"""What a tensor of the weights file holds: the part of the manifest by which others can read the weights.

docs/reference/bundle.md defines every value here. Nothing in EdgeLM computes by it: graphs and packed headers say the same again.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Annotated, Any

from edgelm.json_dataclass import Count, Range

_Size = Annotated[int, Range(1, 2**63 - 1)]


class Layout(StrEnum):
    """How a tensor's bytes are to be read."""

    ARRAY = "array"
    """Elements of `dtype`, row after row."""
    CODES = "codes"
    """Portable: codes, row after row."""
    SCALES = "scales"
    """Portable: the scales of the codes beside it."""
    ZEROS = "zeros"
    """Portable: the zero points of the codes beside it."""
    PACKED = "packed"
    """Native: a packed matrix (`edgelm.bundle.cpu_layout`)."""
    PACKED_EXPERTS = "packed-experts"
    """Native: a table and two packed matrices an expert."""
    LOW_NIBBLES = "low-nibbles"
    """Native: the low nibbles of a packed int8 matrix whose high nibbles lie before it."""
    GPU = "gpu"
    """TensorRT: tiles in the order of a tensor core's operand (`edgelm.bundle.gpu_layout`)."""


@dataclass(frozen=True)
class Contents:
    """What a tensor holds.

    Attributes:
        layout: how its bytes are to be read.
        dtype: of the values: "float32", "float16", "bfloat16", "fp8" or "int3" .. "int8"; "mixed" for experts that
            differ, whose packed headers say the type of each.
        shape: of the values, without padding; of packed experts [experts, expert's width, hidden size].
        group: neighbouring values of a row that share a scale; None where there are none, or experts differ.
        zero_points: whether each group stores a zero point.
        interleave: rows of gate and of up alternate in runs of this many; None where matrices are stacked.
        matrices: the checkpoint's tensors in it, in order; none for what the export computed.
        rows: of each of `matrices`; for a vector its length.
    """

    layout: Layout
    dtype: str
    shape: tuple[_Size, ...]
    group: _Size | None = None
    zero_points: bool = False
    interleave: _Size | None = None
    matrices: tuple[str, ...] = ()
    rows: tuple[Count, ...] = ()

    def to_data(self) -> dict[str, Any]:
        """The fields that differ from their defaults, for JSON."""
        return {item.name: value for item in fields(self) if (value := getattr(self, item.name)) != item.default}
