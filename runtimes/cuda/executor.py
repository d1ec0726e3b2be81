"""Runs a program on a device: memory for caches and values, and the kernel launches of a step.

A step has B sequences of T new tokens. Its launches depend on B, T and the size of the caches only: kernels read the
number of cached tokens from device memory. So the launches of each shape are planned once, and those of a decode step
are captured as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.bundle.gpu_layout import aligned
from edgelm.errors import BundleError
from edgelm.runtimes.cuda.device import Device, DeviceInfo, Launch
from edgelm.runtimes.cuda.kernels import sampling
from edgelm.runtimes.cuda.operators import Operators, Scratch, Step, argmax_launches
from edgelm.runtimes.cuda.program import Node, Program
from edgelm.runtimes.cuda.weights import DeviceWeights

_Key = tuple[int, int, int, bool, str]  # batch, tokens, first, all_positions, choice: "", "greedy" or "sampled"
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
        samples: reserve memory for sampling on the device, see `edgelm.runtimes.cuda.sampling`.
    """

    batch: int
    capacity: int
    tokens: int
    logits: int
    kv: str
    samples: bool = False

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
        self.sampling = sampling.sizes(program.values["logits"].width) if sizes.samples else None
        """What sampling needs for each sequence; None if tokens are not sampled on the device."""
        # The inputs of a step, in one piece, ids last: a decode step has few of them, and one copy takes all.
        self.lengths = self._take(4 * sizes.batch)
        self.how = self._take(sampling.ROW.itemsize * sizes.batch) if self.sampling else 0
        self.ids = self._take(4 * sizes.tokens)
        self.next_ids = self._take(4 * sizes.logits)
        self._caches()
        caches = self._end
        self._values(set(kept) | {"logits"})
        self.results = self._take(self.sampling.result * sizes.batch) if self.sampling else 0
        self.seen = self._take(self.sampling.seen * sizes.batch) if self.sampling else 0
        values = self._end
        workspace, counters = self.operators.scratch_bytes(sizes.batch, sizes.tokens)
        self.workspace = self._take(max(workspace, self.sampling.workspace * sizes.batch if self.sampling else 0))
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
        device: the device, with the kernels of `kernels_of(program, kv)` loaded, and those of sampling if the layout
            has memory for it.
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
        self._planned: dict[_Key, list[Launch]] = {}
        self._graphs: dict[_Key, Callable[[], None]] = {}
        batch, start = layout.sizes.batch, layout.lengths
        self._inputs = device.pinned(layout.ids - start + 4 * layout.sizes.tokens)
        self._lengths = self._inputs[: 4 * batch].view(np.int32)
        how = self._inputs[layout.how - start :][: sampling.ROW.itemsize * batch if layout.sampling else 0]
        self._how = how.view(sampling.ROW)
        self._ids = self._inputs[layout.ids - start :].view(np.int32)
        self._chosen = device.pinned(4 * layout.sizes.logits)
        self._results = device.pinned(layout.sampling.result * batch if layout.sampling else 0)
        self._pending = False

    def free(self) -> None:
        """Free the memory."""
        self._wait()
        self._graphs.clear()
        self.device.free(self._base)
        for pinned in (self._inputs, self._chosen, self._results):
            self.device.unpin(pinned)

    def run(
        self,
        ids: NDArray[np.integer[Any]],
        lengths: Sequence[int] | NDArray[np.integer[Any]],
        *,
        first: int = 0,
        all_positions: bool = False,
        greedy: bool = False,
        sampled: NDArray[Any] | None = None,
        graph: bool = False,
    ) -> None:
        """Run ids [B, T] on sequences first .. first + B - 1, which have `lengths` [B] cached tokens.

        Args:
            ids: the new tokens.
            lengths: the number of cached tokens of each sequence.
            first: number of the first sequence.
            all_positions: compute the logits of all positions, not only of the last.
            greedy: compute the argmax of the logits on the device.
            sampled: what to find out of the logits, `sampling.ROW` [B], for sequences from the first on, T = 1.
            graph: capture the step at the second call, and launch the CUDA graph from then on.
        """
        batch, tokens = ids.shape
        assert sampled is None or (self.layout.sampling is not None and first == 0 and tokens == 1 and graph)
        key = (batch, tokens, first, all_positions, "greedy" if greedy else "sampled" if sampled is not None else "")
        if not graph:
            self.device.upload(self._base + self.layout.ids, np.ascontiguousarray(ids, np.int32))
            place = self._base + self.layout.lengths + 4 * first
            self.device.upload(place, np.ascontiguousarray(lengths, np.int32))
            self._start(key)
            return
        self._wait()  # the last step may still read the inputs
        self._ids[: ids.size] = ids.reshape(-1)
        self._lengths[first : first + batch] = lengths
        if sampled is not None:
            self._how[:batch] = sampled
        self._pending = True
        if key not in self._planned:
            # The first time without a capture, so that the driver can finish loading the kernels.
            self._step(key)
            return
        if key not in self._graphs:
            self._graphs[key] = self.device.capture(lambda: self._step(key))
        self._graphs[key]()

    def decode_launches(self, batch: int, choice: str = "greedy") -> list[Launch]:
        """Return the launches of a step of `batch` sequences that choose "greedy" or "sampled" tokens, or "" none."""
        return self._launches((batch, 1, 0, False, choice))

    def value(self, name: str, rows: int) -> NDArray[np.float32]:
        """Return a float32 value of the last step, [rows, width]."""
        value = self._program.values[name]
        assert value.type == "f32", name
        out = np.empty((rows, value.width), np.float32)
        self.device.download(self._base + self.layout.offsets[name], out)
        self._pending = False
        return out

    def logits(self, out: NDArray[np.float32], first: int = 0) -> None:
        """Copy the last step's logits into `out`, from the logit number `first` of [rows, V] on."""
        self.device.download(self._base + self.layout.offsets["logits"] + 4 * first, out)
        self._pending = False

    def chosen(self, out: NDArray[np.int32]) -> None:
        """Copy the argmax tokens of the last step, which was greedy, into `out` [rows]."""
        self._wait()
        out[:] = self._chosen.view(np.int32)[: out.size]

    def results(self, rows: int) -> NDArray[np.uint8]:
        """Return the results of the last step, which had `sampled`: a buffer [rows, result], until the next step."""
        self._wait()
        return self._results.reshape(self.layout.sizes.batch, -1)[:rows]

    def set_seen(self, row: int, words: NDArray[np.uint32]) -> None:
        """Set the bits of the tokens of sequence `row` that are penalised in sampling."""
        assert self.layout.sampling is not None
        assert words.nbytes == self.layout.sampling.seen
        self.device.upload(self._base + self.layout.seen + row * words.nbytes, words)

    def cache_parts(self, length: int, *, row: int = 0, begin: int = 0) -> Iterator[tuple[int, int]]:
        """Yield the parts of a sequence's cache that hold `length` tokens from `begin` on, as addresses and bytes:
        layer by layer keys, then values, of each head the codes, then the scales if there are any."""
        capacity = self.layout.sizes.rounded
        for node in self._program.nodes:
            if node.op == "GroupQueryAttention" and length:
                codes, scale = self.layout.operators.token_bytes(node)
                for name in node.inputs[1:3]:
                    at = self._base + self.layout.offsets[name] + self.layout.operators.cache_bytes(node, row)
                    for _ in range(node.integer("kv_num_heads")):
                        yield at + begin * codes, length * codes
                        if scale:
                            yield at + capacity * codes + begin * scale, length * scale
                        at += capacity * (codes + scale)

    def _wait(self) -> None:
        """Wait for the copies of the last step."""
        if self._pending:
            self._pending = False
            self.device.wait()

    def _step(self, key: _Key) -> None:
        """Start a step whose inputs are in pinned memory."""
        batch, tokens, *_ = key
        used = self.layout.ids - self.layout.lengths + 4 * batch * tokens
        self.device.start_upload(self._base + self.layout.lengths, self._inputs[:used])
        self._start(key)

    def _start(self, key: _Key) -> None:
        """Start a step's launches, and the copies of what it chooses."""
        for launch in self._launches(key):
            self.device.launch(launch)
        batch, tokens, _, all_positions, choice = key
        if choice == "greedy":
            rows = batch * tokens if all_positions else batch
            self.device.start_download(self._chosen[: 4 * rows], self._base + self.layout.next_ids)
            self._pending = True
        elif choice == "sampled":
            assert self.layout.sampling is not None
            used = batch * self.layout.sampling.result
            self.device.start_download(self._results[:used], self._base + self.layout.results)

    def _launches(self, key: _Key) -> list[Launch]:
        if key not in self._planned:
            # Otherwise plans for the many lengths of prompts' last chunks would accumulate.
            ends = [old for old in self._planned if old[1] > 1]
            if len(ends) >= 16:
                del self._planned[ends[0]]
            self._planned[key] = self._plan(*key)
        return self._planned[key]

    def _plan(self, batch: int, tokens: int, first: int, all_positions: bool, choice: str) -> list[Launch]:
        step = last = Step(batch, tokens)
        renamed: dict[str, str] = {}
        launches: list[Launch] = []
        scratch = Scratch(self._base + self.layout.workspace, self._base + self.layout.counters)
        for index, node in enumerate(self._program.nodes):
            now = last if _after_head(node.outputs[0]) else step
            if node.op == "LastToken":
                if all_positions or tokens == 1:
                    renamed[node.outputs[0]] = node.inputs[0]
                    continue
                now, last = step, Step(batch, 1)
            addresses = self._addresses(node, first, renamed)
            launches += self.layout.operators.launches(node, now, addresses, scratch, self._next_weights(index))
        width, at = self._program.values["logits"].width, self.layout
        logits = self._base + at.offsets["logits"]
        if choice == "greedy":
            launches += argmax_launches(logits, self._base + at.next_ids, last.rows, width, scratch.workspace)
        elif choice == "sampled":
            how, seen, results = (self._base + offset for offset in (at.how, at.seen, at.results))
            launches += sampling.sampling_launches(logits, how, seen, results, batch, width, scratch.workspace)
        return launches

    def _next_weights(self, index: int) -> tuple[int, int]:
        """Return address and bytes of the matrix that a node's output is multiplied with by the next node, or zeros."""
        nodes = self._program.nodes
        if index + 1 == len(nodes) or nodes[index + 1].op != "QuantLinear":
            return 0, 0
        x, weights = nodes[index + 1].inputs[:2]
        if x not in nodes[index].outputs:
            return 0, 0
        return self._weights.address(weights), self._program.weights[weights].size

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
