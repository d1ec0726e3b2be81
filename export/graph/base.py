"""What the layers of every operator set are built from: the graph, the planned weights and the checkpoint's tensors."""

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
"""numpy has no bfloat16: its bits are kept as uint16."""

MAX_TABLE_BYTES = 1 << 30
"""Of the RoPE tables: two million positions of heads of 128."""


class WeightGraph(Protocol):
    """What takes the weights of layers: a graph in ONNX or a program."""

    def has(self, name: str) -> bool:
        """Whether there is a weight of this name."""

    def weight(self, slot: Slot) -> str:
        """Add the weight that lies in a slot of the weights file; return its name."""


class LayerOps:
    """Adds layers to a graph and plans their weights.

    Args:
        graph: the graph to add to.
        plan: where weights are planned.
        source: the checkpoint's tensors, for shapes and schemes; values are read when they are written.
        dtype: how matrices that stay unquantised are stored: "float32", "float16" or "bfloat16". Arithmetic is float32.
    """

    def __init__(self, graph: WeightGraph, plan: WeightsPlan, source: WeightSource, dtype: str) -> None:
        self.graph = graph
        self.plan = plan
        self.source = source
        self.dtype = dtype
        self._tables: dict[Rope, tuple[str, str]] = {}
        self.vectors = "float32"
        """The type of norms' weights and biases."""
        self.rounded: dict[str, int] = {}
        """Matrices whose inputs the device rounds to int8, and in blocks of how many columns."""

    def held(self, *names: str) -> Held:
        """The matrices `names` with their rows, for the manifest."""
        return {name: self.source.shape(name)[0] for name in names}

    def pieces(self, names: Sequence[str], rows: slice) -> Iterator[tuple[str, slice]]:
        """Where rows of matrices that are stacked come from: a matrix's name, and which of its rows."""
        first = 0
        for name in names:
            count = self.source.shape(name)[0]
            start, stop = max(rows.start - first, 0), min(rows.stop - first, count)
            if start < stop:
                yield name, slice(start, stop)
            first += count

    def vector(self, name: str, layer: int | None) -> str:
        """A vector of the checkpoint (a norm's weight), or a small matrix that stays float32 (a router's)."""
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
        """A float32 tensor that is computed here (the rotary tables)."""
        slot = self.plan.slot(name, value.shape, np.float32, None)
        self.plan.job([slot], lambda source, writers, advance: writers[0].append(value))
        return self.graph.weight(slot)

    def stacked_vector(self, names: Sequence[str], stem: str, layer: int | None) -> str:
        """Vectors of the checkpoint (biases of matrices that are one matmul) as one."""
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
        """The biases of matrices that are one matmul named `out`; "" where they have none."""
        names = [matrix.bias for matrix in matrices if matrix.bias is not None]
        if not names:
            return ""
        assert len(names) == len(matrices), "all of them have a bias or none"
        return self.stacked_vector(names, f"{out}.bias", matrices[0].layer)

    def rotary(self, rope: Rope | None, length: int, head_dim: int) -> tuple[str, str]:
        """The cos and sin tables [length, head_dim / 2] of rotary positions, one pair for all layers that share it.

        A layer without RoPE has a table of angles of zero.

        Raises:
            CheckpointError: they would take more than a gigabyte.
        """
        rope = rope or Rope((0.0,) * (head_dim // 2))
        if rope in self._tables:
            return self._tables[rope]
        nbytes = 4 * length * head_dim
        if nbytes > MAX_TABLE_BYTES:
            raise CheckpointError(
                f"config.json: max_position_embeddings {length} needs tables of positions of {format_size(nbytes)} (at "
                f"most {format_size(MAX_TABLE_BYTES)}): lower it to the context that the device is to hold"
            )
        cos, sin = rotary_tables(rope, length)
        stem = f"rope.{len(self._tables)}" if self._tables else "rope"
        self._tables[rope] = (self.computed(f"{stem}.cos", cos), self.computed(f"{stem}.sin", sin))
        return self._tables[rope]


def stored_as(values: NDArray[np.float32], dtype: str, name: str) -> NDArray[np.generic]:
    """Round float32 to the storage type: nearest, ties to even; bfloat16 as its bits.

    Raises:
        ExportError: a value does not fit into float16.
    """
    if dtype == "float32":
        return values
    if dtype == "bfloat16":
        return float32_to_bf16(values)
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.isfinite(half).all():
        raise ExportError(f"{name} has values beyond float16's range (65504): export it as bfloat16 or float32")
    return half


def rotary_tables(rope: Rope, length: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """cos and sin [length, head_dim / 2] of rotate-half RoPE, equal to the reference's to the last bit."""
    from edgelm.reference.interpreter import half_rotary_table

    cos, sin = half_rotary_table(rope, 0, length)
    return cos.numpy(), sin.numpy()
