"""Describes a program's nodes to the launch planning in C++ (csrc/cuda/host/node.h), which returns their launches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from edgelm.bundle.kv_cache import GPU_KV_TYPES, row_bytes
from edgelm.errors import BundleError, EdgeLMError
from edgelm.runtimes.cuda import planning
from edgelm.runtimes.cuda.device import DeviceInfo, Launch
from edgelm.runtimes.cuda.kernels import sampling
from edgelm.runtimes.cuda.planning import Field
from edgelm.runtimes.cuda.program import PROGRAM_FILE, Node, Program


@dataclass(frozen=True)
class Step:
    """The size of a step: `batch` sequences of `tokens` new tokens each."""

    batch: int
    tokens: int

    @property
    def rows(self) -> int:
        """Total number of new tokens."""
        return self.batch * self.tokens


@dataclass(frozen=True)
class Scratch:
    """Addresses of memory that nodes share. Between nodes `workspace` is undefined and `counters` are zeros."""

    workspace: int
    counters: int


class Operators:
    """Plans the launches of a program's nodes.

    Args:
        program: the program.
        kv: type of the caches, one of `GPU_KV_TYPES`.
        capacity: tokens of each cache.
        info: the device.

    Raises:
        EdgeLMError: `kv` is not a type of cache.
    """

    def __init__(self, program: Program, kv: str, capacity: int, info: DeviceInfo) -> None:
        if kv not in GPU_KV_TYPES:
            raise EdgeLMError(f"kv is {kv!r}: the KV cache can be {', '.join(GPU_KV_TYPES)}")
        self.program = program
        self._kv = kv
        self._capacity = capacity
        self._device: dict[str, Field] = device_fields(info)

    def launches(
        self, node: Node, step: Step, addresses: Mapping[str, int], scratch: Scratch, prefetch: tuple[int, int] = (0, 0)
    ) -> list[Launch]:
        """Return the launches of a node, given the addresses of its inputs and outputs. `prefetch`: address and bytes
        of the weights that the next node reads, of which attention may request a part for the L2 cache.

        Raises:
            BundleError: the program is damaged or of a later version of EdgeLM.
            DeviceError: the kernels cannot compute the node.
        """
        fields = self._fields(node, step, addresses)
        fields |= {"workspace": scratch.workspace, "counters": scratch.counters}
        if node.op == "GroupQueryAttention":
            fields |= {"prefetch": prefetch[0], "prefetch_bytes": prefetch[1]}
        try:
            return planning.launches("node_launches", {**fields, **self._device})
        except BundleError as error:
            raise _damaged(error) from error

    def kernels(self) -> tuple[str, ...]:
        """Return all kernels that steps of this program may launch. Raises as `launches`."""
        return tuple(dict.fromkeys(self._kernels()))

    def cache_bytes(self, node: Node, batch: int) -> int:
        """Return the bytes of an attention node's key cache for `batch` sequences. The value cache has the same
        size."""
        return batch * node.integer("kv_num_heads") * self._capacity * self._row_bytes(node)

    def token_bytes(self, node: Node) -> tuple[int, int]:
        """Return the bytes of the codes of one head and token in an attention node's cache, and of their scale. In
        memory, the scales of a head are behind all of its codes."""
        scale = 4 if self._kv in ("int8", "fp8") else 0
        return self._row_bytes(node) - scale, scale

    def scratch_bytes(self, batch: int, tokens: int) -> tuple[int, int]:
        """Return the bytes of workspace and of counters for steps of up to `tokens` tokens of up to `batch`
        sequences. Raises as `launches`."""
        width = self.program.values["logits"].width
        sizes = [(argmax_workspace_bytes(max(batch, 1), width), 0)]
        for node in self._kinds():
            fields = {**self._fields(node, Step(1, 1)), **self._device, "batch": batch, "tokens": tokens}
            workspace, counters = _answer("node_scratch", fields).split()
            sizes.append((int(workspace), int(counters)))
        return max(size for size, _ in sizes), max(size for _, size in sizes)

    def _kernels(self) -> Iterator[str]:
        yield from (launch.kernel for launch in argmax_launches(0, 0, 1, 1, 0))
        for node in self._kinds():
            yield from _answer("node_kernels", self._fields(node, Step(1, 1))).splitlines()

    def _kinds(self) -> Iterable[Node]:
        """Return one node of those that differ only in names."""
        found: dict[object, Node] = {}
        for node in self.program.nodes:
            fields = self._fields(node, Step(1, 1))
            found.setdefault(tuple((name, fields[name]) for name in fields if name != "name"), node)
        return found.values()

    def _fields(self, node: Node, step: Step, addresses: Mapping[str, int] | None = None) -> dict[str, Field]:
        """Return the description of a node; its addresses are 0 if sizes suffice."""
        found: dict[str, Field] = dict(node.attrs)
        if node.op == "GroupQueryAttention":
            found["kv"] = self._kv
        results = [name for name in node.outputs if name in self.program.values]  # without the caches
        for prefix, names in (("input", node.inputs), ("output", results)):
            for index, name in enumerate(names):
                if name:
                    address = 0 if addresses is None else addresses[name]
                    found[f"{prefix}.{index}"] = tensor_field(address, *self._tensor(node, name, step))
        return {**found, "op": node.op, "name": node.name}

    def _tensor(self, node: Node, name: str, step: Step) -> tuple[str, Sequence[int]]:
        """Return type and dimensions of an input or output."""
        program = self.program
        if name in program.weights:
            return program.weights[name].type, program.weights[name].dims
        if name in program.values:
            return program.values[name].type, (step.batch, step.tokens, program.values[name].width)
        if name == "past_lengths":
            return "int32", (step.batch,)
        if name == "input_ids":
            return "int32", (step.batch, step.tokens)
        return "uint8", (step.batch, node.integer("kv_num_heads"), self._capacity, self._row_bytes(node))

    def _row_bytes(self, node: Node) -> int:
        return row_bytes(self._kv, node.integer("head_size"), "gpu")


def device_fields(info: DeviceInfo) -> dict[str, Field]:
    """Return the fields that describe a device."""
    return {"sm": info.sm, "multiprocessors": info.multiprocessors}


def tensor_field(address: int, kind: str, dims: Iterable[int]) -> str:
    """Return the text of a node's tensor: address on the device, element type and dimensions."""
    return f"{address}:{kind}:{','.join(map(str, dims))}"


def argmax_launches(x: int, ids: int, rows: int, columns: int, workspace: int) -> list[Launch]:
    """Return the launches of a row-wise argmax. Of equal values the first is chosen; NaN never is.

    Args:
        x: address of float32 [rows, columns].
        ids: of int32 [rows], which receives the indices; -1 if all values are NaN.
        rows: number of rows.
        columns: number of columns.
        workspace: of `argmax_workspace_bytes`, aligned to 256.
    """
    return planning.launches("argmax", {"x": x, "ids": ids, "rows": rows, "columns": columns, "workspace": workspace})


def argmax_workspace_bytes(rows: int, columns: int) -> int:
    """Return the bytes of scratch memory that `argmax_launches` needs."""
    return int(planning.call("argmax_workspace", {"rows": rows, "columns": columns}))


def bundle_kernels(program: Program) -> tuple[str, ...]:
    """Return all kernels of a bundle: of its program and its debug program, for any cache and number of tokens."""
    any_device = DeviceInfo("", (8, 0), 1, 0, (0, 0))  # kernels do not depend on it
    found: list[str] = []
    for kv in GPU_KV_TYPES:
        run = program.debug() if kv == "float32" else program
        found += Operators(run, kv, 0, any_device).kernels()
    return tuple(dict.fromkeys([*found, *sampling.kernels()]))


def _answer(function: str, fields: Mapping[str, Field]) -> str:
    try:
        return planning.call(function, fields).decode()
    except BundleError as error:
        raise _damaged(error) from error


def _damaged(error: BundleError) -> BundleError:
    return BundleError(f"{PROGRAM_FILE}: {error}")
