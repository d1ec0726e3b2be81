"""`LayerOps`, the common base of the graph builders: it adds weights to a graph and plans the weights file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgelm.checkpoint.writer import float32_to_bf16
from edgelm.errors import CheckpointError, ExportError
from edgelm.export.packing.contents import Held, array
from edgelm.export.packing.weights_file import Slot, SlotWriter, WeightsPlan
from edgelm.models.spec import Matrix, Rope
from edgelm.progress import Advance
from edgelm.quant.source import WeightSource
from edgelm.sizes import format_size

STORAGE: Mapping[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
}
"""numpy types by name. numpy has no bfloat16, so its bits are kept as uint16."""

MAX_TABLE_BYTES = 1 << 30
"""Limit of the RoPE tables' size: two million positions with a head size of 128."""


class WeightGraph(Protocol):
    """The part of a graph builder that takes weights; implemented for ONNX graphs and for programs."""

    def has(self, name: str) -> bool:
        """Return whether the graph has a weight of this name."""

    def weight(self, slot: Slot) -> str:
        """Add the weight of a slot of the weights file; return its name."""


class LayerOps:
    """Add layers to a graph and plan their weights.

    Args:
        graph: Graph to add to.
        plan: Plan of the weights file.
        source: Weights. Building needs only their shapes and schemes; values are read when the file is written.
        dtype: Type of unquantised matrices: "float32", "float16" or "bfloat16". Arithmetic is float32.
    """

    def __init__(self, graph: WeightGraph, plan: WeightsPlan, source: WeightSource, dtype: str) -> None:
        self.graph = graph
        self.plan = plan
        self.source = source
        self.dtype = dtype
        self._tables: dict[Rope, tuple[str, str]] = {}
        self.vectors = "float32"
        """Type of norm weights and biases."""
        self.rounded: dict[str, int] = {}
        """Matrices whose inputs the device rounds to int8, each with its block size in columns."""

    def held(self, *names: str) -> Held:
        """Return the number of rows of each matrix, for the manifest."""
        return {name: self.source.shape(name)[0] for name in names}

    def row_ranges(self, names: Sequence[str], rows: slice) -> Iterator[tuple[str, slice]]:
        """Yield, for a range of rows of stacked matrices, each matrix in it and the range of that matrix's own rows."""
        first = 0
        for name in names:
            count = self.source.shape(name)[0]
            start, stop = max(rows.start - first, 0), min(rows.stop - first, count)
            if start < stop:
                yield name, slice(start, stop)
            first += count

    def vector(self, name: str, layer: int | None) -> str:
        """Add a norm's weight, or a small matrix that is not quantised (a router's); return its name."""
        if self.graph.has(name):
            return name
        shape, dtype = self.source.shape(name), STORAGE[self.vectors]
        slot = self.plan.slot(name, shape, dtype, layer, array(shape, dtype, self.held(name)))

        def fill(source: WeightSource, writers: Sequence[SlotWriter], advance: Advance) -> None:
            writers[0].append(stored_as(source.float32(name), self.vectors, name))
            advance(source.nbytes(name))

        self.plan.job([slot], fill)
        return self.graph.weight(slot)

    def computed(self, name: str, value: NDArray[np.float32]) -> str:
        """Add a float32 tensor that the exporter computes, such as a RoPE table; return its name."""
        slot = self.plan.slot(name, value.shape, np.float32, None)
        self.plan.job([slot], lambda source, writers, advance: writers[0].append(value))
        return self.graph.weight(slot)

    def stacked_vector(self, names: Sequence[str], stem: str, layer: int | None) -> str:
        """Add the concatenation of vectors, such as the biases of stacked matrices; return its name."""
        if self.graph.has(stem):
            return stem
        size, dtype = sum(self.source.shape(name)[0] for name in names), STORAGE[self.vectors]
        slot = self.plan.slot(stem, (size,), dtype, layer, array((size,), dtype, self.held(*names)))

        def fill(source: WeightSource, writers: Sequence[SlotWriter], advance: Advance) -> None:
            for name in names:
                writers[0].append(stored_as(source.float32(name), self.vectors, name))
                advance(source.nbytes(name))

        self.plan.job([slot], fill)
        return self.graph.weight(slot)

    def bias(self, matrices: Sequence[Matrix], out: str) -> str:
        """Add the biases of the stacked matrices of the matmul `out`; return their name, or "" without biases."""
        names = [matrix.bias for matrix in matrices if matrix.bias is not None]
        if not names:
            return ""
        assert len(names) == len(matrices), "either all stacked matrices have a bias or none"
        return self.stacked_vector(names, f"{out}.bias", matrices[0].layer)

    def rotary(self, rope: Rope | None, length: int, head_dim: int) -> tuple[str, str]:
        """Add the cos and sin tables of RoPE, each [length, head_dim / 2]; return their names.

        Layers with the same RoPE share the tables. For a layer without RoPE all angles are zero.

        Raises:
            CheckpointError: The tables would be larger than `MAX_TABLE_BYTES`.
        """
        rope = rope or Rope((0.0,) * (head_dim // 2))
        if rope in self._tables:
            return self._tables[rope]
        nbytes = 4 * length * head_dim
        if nbytes > MAX_TABLE_BYTES:
            raise CheckpointError(
                f"config.json: max_position_embeddings {length} needs RoPE tables of {format_size(nbytes)}, the limit "
                f"is {format_size(MAX_TABLE_BYTES)}: lower it to the context length that you need"
            )
        cos, sin = rotary_tables(rope, length)
        stem = f"rope.{len(self._tables)}" if self._tables else "rope"
        self._tables[rope] = (self.computed(f"{stem}.cos", cos), self.computed(f"{stem}.sin", sin))
        return self._tables[rope]


def stored_as(values: NDArray[np.float32], dtype: str, name: str) -> NDArray[np.generic]:
    """Round float32 values to the storage type: to nearest, ties to even. bfloat16 is returned as uint16 bits.

    Raises:
        ExportError: A value is out of float16's range; the message names the tensor `name`.
    """
    if dtype == "float32":
        return values
    if dtype == "bfloat16":
        return float32_to_bf16(values)
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.isfinite(half).all():
        raise ExportError(f"{name} has values beyond float16's range (65504): export with --dtype bf16 or fp32")
    return half


def rotary_tables(rope: Rope, length: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return cos and sin of rotate-half RoPE, each [length, head_dim / 2], bit for bit those of the reference."""
    from edgelm.reference.interpreter import half_rotary_table

    cos, sin = half_rotary_table(rope, 0, length)
    return cos.numpy(), sin.numpy()
