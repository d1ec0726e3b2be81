"""Description of a tensor in the weights file: the part of the manifest with which other tools can read the weights.

docs/reference/weights.md defines the values. EdgeLM itself does not need them: graphs and packed headers hold the same.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any

from edgelm.json_dataclass import Count, Range, StrEnum

_Size = Annotated[int, Range(1, 2**63 - 1)]


class Layout(StrEnum):
    """Layout of a tensor's bytes."""

    ARRAY = "array"
    """Elements of `dtype` in row-major order."""
    CODES = "codes"
    """Portable: codes in row-major order."""
    SCALES = "scales"
    """Portable: scales of the codes stored next to it."""
    ZEROS = "zeros"
    """Portable: zero points of the codes stored next to it."""
    PACKED = "packed"
    """Native: a packed matrix (`edgelm.bundle.cpu_layout`)."""
    PACKED_EXPERTS = "packed-experts"
    """Native: a table of offsets, and two packed matrices per expert."""
    LOW_NIBBLES = "low-nibbles"
    """Native: low nibbles of the packed int8 matrix whose high nibbles are stored before it."""
    GPU = "gpu"
    """TensorRT: tiles in the order of a tensor core operand (`edgelm.bundle.gpu_layout`)."""


@dataclass(frozen=True)
class Contents:
    """Contents of a tensor.

    Attributes:
        layout: layout of its bytes.
        dtype: type of the values: "float32", "float16", "bfloat16", "fp8" or "int3" .. "int8"; "mixed" for experts of
            different types, which their packed headers name.
        shape: shape of the values, without padding; of packed experts [experts, expert width, hidden size].
        group: consecutive values of a row that share a scale; None where there are no scales, or experts differ.
        zero_points: whether each group has a zero point.
        interleave: rows of gate and of up alternate in runs of this many; None where the matrices are stacked.
        matrices: names of the checkpoint's tensors in it, in order; empty for tensors that the export computed.
        rows: number of rows of each of `matrices`; the length of a vector.
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
        """Return the fields that differ from their defaults, for JSON."""
        return {item.name: value for item in fields(self) if (value := getattr(self, item.name)) != item.default}
