"""Runs a program on a device: memory for caches and values, and the kernel launches of a step.

A step has B sequences of T new tokens. Its launches depend on B, T and the size of the caches only: kernels read the
number of cached tokens from device memory. So the launches of each shape are planned once, and those of a decode step
are captured as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.bundle.gpu_layout import aligned
from edgelm.errors import BundleError
from edgelm.runtimes.cuda.device import Device, DeviceInfo, Launch
from edgelm.runtimes.cuda.operators import Operators, Scratch, Step, argmax_launches
from edgelm.runtimes.cuda.program import Node, Program
from edgelm.runtimes.cuda.weights import DeviceWeights

CAPACITY_MULTIPLE = 64
"""The capacity of caches is a multiple of this, which aligns the part of every head."""


@dataclass(frozen=True)
class Sizes:
    """The sizes that memory is reserved for.

    Attributes:
        batch: number of sequences.
        capacity: tokens of each cache; rounded up to `CAPACITY_MULTIPLE`.
        tokens: the largest number of new tokens per step, over all sequences.
        logits: the largest number of positions per step whose logits are computed.
        kv: type of the caches, see `edgelm.bundle.kv_cache`.
    """

    batch: int
    capacity: int
    tokens: int
    logits: int
    kv: str

    @property
    def rounded(self) -> int:
        """The capacity that is allocated."""
        return aligned(self.capacity, CAPACITY_MULTIPLE)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the device besides the weights: `caches`, `values` (with logits), and `workspace` of the kernels."""

    caches: int
    values: int
    workspace: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.caches + self.values + self.workspace


class Layout:
    """Offsets of caches, values and workspace in one block of memory.

    Args:
        program: the program.
        sizes: the sizes to reserve memory for.
        info: the device.
        kept: values that stay until the end of a step. All others share memory once their last reader has run.
    """

    def __init__(self, program: Program, sizes: Sizes, info: DeviceInfo, kept: Iterable[str] = ()) -> None:
        self.program = program
        self.operators = Operators(program, sizes.kv, sizes.rounded, info)
        self.sizes = sizes
        self.offsets: dict[str, int] = {}
        self._end = 0
        self.ids = self._take(4 * sizes.tokens)
        self.lengths = self._take(4 * sizes.batch)
        self.next_ids = self._take(4 * sizes.logits)
        self._caches()
        caches = self._end
        self._values(set(kept) | {"logits"})
        values = self._end
        workspace, counters = self.operators.scratch_bytes(sizes.batch, sizes.tokens)
        self.workspace = self._take(workspace)
        self.counters = self._take(counters)
        self.zeroed = ((0, caches), (self.counters, counters))
        self.plan = MemoryPlan(caches, values - caches, self._end - values)

    @property
    def nbytes(self) -> int:
        """Total bytes."""
        return self._end

    def _take(self, nbytes: int) -> int:
        start = self._end
        self._end = aligned(start + nbytes)
        return start

    def _caches(self) -> None:
        for node in self.program.nodes:
            if node.op == "GroupQueryAttention":
                size = self.operators.cache_bytes(node, self.sizes.batch)
                for name in node.inputs[1:3]:
                    self.offsets[name] = self._take(size)

    def _values(self, kept: set[str]) -> None:
        nodes = self.program.nodes
        last = {name: index for index, node in enumerate(nodes) for name in node.inputs}
        for node in nodes:
            if node.op == "LastToken":  # with one token per row its readers read its input instead
                last[node.inputs[0]] = max(last[node.inputs[0]], last.get(node.outputs[0], 0))
        free: list[tuple[int, int]] = []  # (size, offset)
        held: dict[str, tuple[int, int]] = {}
        for index, node in enumerate(nodes):
            for name in node.outputs:
                if name in self.program.values:
                    rows = self.sizes.logits if _after_head(name) else self.sizes.tokens
                    size = rows * self.program.values[name].row_bytes
                    fitting = [entry for entry in free if entry[0] >= size]
                    if fitting:
                        held[name] = min(fitting)
                        free.remove(held[name])
                    else:
                        held[name] = (size, self._take(size))
                    self.offsets[name] = held[name][1]
            done = [name for name in held if name not in kept and last.get(name, index) <= index]
            free += [held.pop(name) for name in done]


def _after_head(name: str) -> bool:
    return name in ("head_input", "logits")


class Executor:
    """Runs a program; owns its memory on a device.

    Args:
        device: the device, with the kernels of `kernels_of(program, kv)` loaded.
        weights: the program's weights on that device.
        layout: the layout of all other memory.

    Raises:
        DeviceMemoryError: there is not enough memory.
    """

    def __init__(self, device: Device, weights: DeviceWeights, layout: Layout) -> None:
        self.device = device
        self.layout = layout
        self._program = layout.program
        self._weights = weights
        self._base = device.allocate(layout.nbytes)
        # Caches must not hold NaN, and counters must be 0; kernels reset the counters.
        for start, nbytes in layout.zeroed:
            device.fill(self._base + start, 0, nbytes)
        self._planned: dict[tuple[Any, ...], list[Launch]] = {}
        self._graphs: dict[tuple[Any, ...], Callable[[], None]] = {}

    def free(self) -> None:
        """Free the memory."""
        self._graphs.clear()
        self.device.free(self._base)

    def run(
        self,
        ids: NDArray[np.integer[Any]],
        lengths: Sequence[int] | NDArray[np.integer[Any]],
        *,
        first: int = 0,
        all_positions: bool = False,
        greedy: bool = False,
        graph: bool = False,
    ) -> None:
        """Run ids [B, T] on sequences first .. first + B - 1, which have `lengths` [B] cached tokens.

        Args:
            ids: the new tokens.
            lengths: the number of cached tokens of each sequence.
            first: number of the first sequence.
            all_positions: compute the logits of all positions, not only of the last.
            greedy: compute the argmax of the logits on the device.
            graph: capture the launches at the second call, and launch the CUDA graph from then on.
        """
        batch, tokens = ids.shape
        self.device.upload(self._base + self.layout.ids, np.ascontiguousarray(ids, np.int32))
        place = self._base + self.layout.lengths + 4 * first
        self.device.upload(place, np.ascontiguousarray(lengths, np.int32))
        key = (batch, tokens, first, all_positions, greedy)
        if not graph or key not in self._planned:
            # Also the first time before a capture, so that the driver can finish loading the kernels.
            self._start(self._launches(*key))
            return
        if key not in self._graphs:
            launches = self._launches(*key)
            self._graphs[key] = self.device.capture(lambda: self._start(launches))
        self._graphs[key]()

    def value(self, name: str, rows: int) -> NDArray[np.float32]:
        """Return a float32 value of the last step, [rows, width]."""
        value = self._program.values[name]
        assert value.type == "f32", name
        out = np.empty((rows, value.width), np.float32)
        self.device.download(self._base + self.layout.offsets[name], out)
        return out

    def logits(self, out: NDArray[np.float32]) -> None:
        """Copy the last step's logits into `out` [rows, V]."""
        self.device.download(self._base + self.layout.offsets["logits"], out)

    def chosen(self, out: NDArray[np.int32]) -> None:
        """Copy the argmax tokens of a greedy step into `out` [rows]."""
        self.device.download(self._base + self.layout.next_ids, out)

    def _start(self, launches: Sequence[Launch]) -> None:
        for launch in launches:
            self.device.launch(launch)

    def _launches(self, batch: int, tokens: int, first: int, all_positions: bool, greedy: bool) -> list[Launch]:
        key = (batch, tokens, first, all_positions, greedy)
        if key not in self._planned:
            # Otherwise plans for the many lengths of prompts' last chunks would accumulate.
            ends = [old for old in self._planned if old[1] > 1]
            if len(ends) >= 16:
                del self._planned[ends[0]]
            self._planned[key] = self._plan(batch, tokens, first, all_positions, greedy)
        return self._planned[key]

    def _plan(self, batch: int, tokens: int, first: int, all_positions: bool, greedy: bool) -> list[Launch]:
        step = last = Step(batch, tokens)
        renamed: dict[str, str] = {}
        launches: list[Launch] = []
        scratch = Scratch(self._base + self.layout.workspace, self._base + self.layout.counters)
        for node in self._program.nodes:
            now = last if _after_head(node.outputs[0]) else step
            if node.op == "LastToken":
                if all_positions or tokens == 1:
                    renamed[node.outputs[0]] = node.inputs[0]
                    continue
                now, last = step, Step(batch, 1)
            launches += self.layout.operators.launches(node, now, self._addresses(node, first, renamed), scratch)
        if greedy:
            width = self._program.values["logits"].width
            logits = self._base + self.layout.offsets["logits"]
            launches += argmax_launches(logits, self._base + self.layout.next_ids, last.rows, width, scratch.workspace)
        return launches

    def _addresses(self, node: Node, first: int, renamed: Mapping[str, str]) -> dict[str, int]:
        """Return the addresses of a node's inputs and outputs."""
        found = {"": 0}
        for name in filter(None, (*node.inputs, *node.outputs)):
            actual = renamed.get(name, name)
            if actual == "input_ids":
                found[name] = self._base + self.layout.ids
            elif actual == "past_lengths":
                found[name] = self._base + self.layout.lengths + 4 * first
            elif actual in self._program.weights:
                found[name] = self._weights.address(actual)
            elif actual in self.layout.offsets:
                found[name] = self._base + self.layout.offsets[actual]
                if actual.startswith("past_key_values."):
                    found[name] += self.layout.operators.cache_bytes(node, first)
            elif not actual.startswith("present."):
                raise BundleError(f"{node.name} reads {name}, which has no memory: export the bundle again")
        return found
