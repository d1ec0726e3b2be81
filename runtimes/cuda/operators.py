"""Plans the kernel launches of a program's nodes from their attributes and shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from edgelm.bundle.kv_cache import row_bytes
from edgelm.errors import BundleError, EdgeLMError
from edgelm.runtimes.cuda import sparse_moe
from edgelm.runtimes.cuda.device import DeviceInfo, Launch
from edgelm.runtimes.cuda.kernels import attention, linear
from edgelm.runtimes.cuda.kernels.attention import AttentionBuffers, AttentionShape
from edgelm.runtimes.cuda.kernels.linear import Matmul
from edgelm.runtimes.cuda.kernels.moe import MoeShape
from edgelm.runtimes.cuda.planning import Field
from edgelm.runtimes.cuda.program import PROGRAM_FILE, Node, Program, matrix_of
from edgelm.runtimes.cuda.sparse_moe import SparseMoe, SparseMoeBuffers

KV_CODES = {"float16": "f16", "bfloat16": "bf16", "float32": "f32", "int8": "int8", "fp8": "fp8"}
"""Types of KV caches, and their names in the kernels."""
_ROUNDINGS = {"float": 0.0, "fp8-token": -1.0}
"""The node's `activations`, as `rounding` of `linear.Matmul`."""


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
        kv: type of the caches, one of `KV_CODES`.
        capacity: tokens of each cache.
        info: the device.

    Raises:
        BundleError: the program has an unknown operator.
        EdgeLMError: `kv` is not a type of cache.
    """

    def __init__(self, program: Program, kv: str, capacity: int, info: DeviceInfo) -> None:
        if kv not in KV_CODES:
            raise EdgeLMError(f"kv is {kv!r}: the KV cache can be {', '.join(KV_CODES)}")
        for node in program.nodes:
            if node.op not in _LAUNCHES:
                raise BundleError(
                    f"{PROGRAM_FILE}: {node.name} has the operator {node.op!r}, supported are {', '.join(_LAUNCHES)}: "
                    "upgrade edgelm"
                )
        self.program = program
        self._kv = KV_CODES[kv]
        self._kv_name = kv
        self._capacity = capacity
        self._info = info

    def launches(self, node: Node, step: Step, addresses: Mapping[str, int], scratch: Scratch) -> list[Launch]:
        """Return the launches of a node, given the addresses of its inputs and outputs (0 for an absent one)."""
        return _LAUNCHES[node.op](self, node, step, addresses, scratch)

    def fields(self, node: Node, step: Step, addresses: Mapping[str, int]) -> dict[str, Field]:
        """Return the description of a node that the planning in C++ reads (csrc/cuda/host/node.h)."""
        found: dict[str, Field] = dict(node.attrs)
        if node.op == "GroupQueryAttention":
            found["kv"] = self._kv_name
        for prefix, names in (("input", node.inputs), ("output", node.outputs)):
            for index, name in enumerate(names):
                if name:
                    found[f"{prefix}.{index}"] = tensor_field(addresses[name], *self._tensor(node, name, step))
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
        row = row_bytes(self._kv_name, node.integer("head_size"), "gpu")
        return "uint8", (step.batch, node.integer("kv_num_heads"), self._capacity, row)

    def kernels(self) -> tuple[str, ...]:
        """Return all kernels that steps of this program may launch."""
        return tuple(dict.fromkeys(_kernels(self.program, (self._kv,))))

    def cache_bytes(self, node: Node, batch: int) -> int:
        """Return the bytes of an attention node's key cache for `batch` sequences. The value cache has the same
        size."""
        row = attention.row_bytes(self._kv, node.integer("head_size"))
        return batch * node.integer("kv_num_heads") * self._capacity * row

    def scratch_bytes(self, batch: int, tokens: int) -> tuple[int, int]:
        """Return the bytes of workspace and of counters for steps of up to `tokens` tokens of up to `batch`
        sequences."""
        steps = [Step(1, count) for count in range(1, tokens + 1)]
        steps += [Step(batch, count) for count in range(1, max(1, tokens // batch) + 1)]
        # Attention's workspace does not grow with tokens monotonically; other operators' depends on rows only.
        kinds = {tuple(sorted(node.attrs.items())): node for node in self.program.nodes if node.op in _SCRATCH}
        workspace = linear.argmax_workspace_bytes(max(batch, 1), self.program.values["logits"].width)
        counters = 0
        most = max(steps, key=lambda step: step.rows)
        for node in kinds.values():
            if node.op == "GroupQueryAttention":
                shapes = [self._attention_shape(node, step) for step in steps if step.tokens <= self._capacity]
                sizes = [attention.workspace_bytes(shape, self._info.multiprocessors) for shape in shapes]
                workspace = max(workspace, *sizes)
                counters = max(counters, *(shape.counter_bytes() for shape in shapes if shape.few), 0)
            elif node.op == "SparseMoE":
                workspace = max(
                    workspace, *(sparse_moe.workspace_bytes(_sparse_moe(node, step.rows)) for step in steps)
                )
                counters = max(counters, sparse_moe.COUNTER_BYTES)
            else:
                matmul = self._matmul(node, most.rows, dict.fromkeys((*node.inputs, *node.outputs, ""), 0))
                workspace = max(workspace, linear.workspace_bytes(matmul))
        return workspace, counters

    # -- operators -------------------------------------------------------------------------------------------------

    def _embedding(self, node: Node, step: Step, at: Mapping[str, int], scratch: Scratch) -> list[Launch]:
        del scratch
        ids, table = (at[name] for name in node.inputs)
        return [linear.embedding_launch(ids, matrix_of(node), table, at[node.outputs[0]], step.rows)]

    def _linear(self, node: Node, step: Step, at: Mapping[str, int], scratch: Scratch) -> list[Launch]:
        return linear.matmul_launches(self._matmul(node, step.rows, at), self._info, scratch.workspace)

    def _matmul(self, node: Node, rows: int, at: Mapping[str, int]) -> Matmul:
        return Matmul(
            matrix_of(node), at[node.inputs[1]], at[node.inputs[0]], at[node.outputs[0]], rows,
            activation=node.text("activation"), x_float=self.program.values[node.inputs[0]].type == "f32",
            y_float=node.text("output") == "f32", norm=at[node.input(2)], residual=at[node.input(3)],
            bias=at[node.input(4)], rounding=_rounding(node), epsilon=node.number("epsilon"),
        )  # fmt: skip

    def _attention_shape(self, node: Node, step: Step) -> AttentionShape:
        return AttentionShape(
            step.batch, step.tokens, node.integer("num_heads"), node.integer("kv_num_heads"), node.integer("head_size"),
            self._capacity, self.program.weights[node.inputs[4]].dims[0], node.text("activation"), self._kv,
        )  # fmt: skip

    def _attention(self, node: Node, step: Step, at: Mapping[str, int], scratch: Scratch) -> list[Launch]:
        qkv, keys, values, lengths, cos, sin = (at[name] for name in node.inputs[:6])
        buffers = AttentionBuffers(
            qkv, keys, values, lengths, cos, sin, at[node.outputs[0]], scratch.workspace,
            q_norm=at[node.input(6)], k_norm=at[node.input(7)], counters=scratch.counters,
            q_norm_per_head=self._per_head(node, 6, "num_heads"),
            k_norm_per_head=self._per_head(node, 7, "kv_num_heads"),
        )  # fmt: skip
        launches = attention.attention_launches(
            self._attention_shape(node, step), buffers, self._info.multiprocessors,
            epsilon=node.number("epsilon"), clip=node.number("clip"),
        )  # fmt: skip
        return list(launches)

    def _per_head(self, node: Node, index: int, heads: str) -> bool:
        """Whether a QK-norm weight has the size of one head."""
        weight = self.program.weights.get(node.input(index))
        return weight is not None and weight.elements == node.integer("head_size") and node.integer(heads) > 1

    def _moe(self, node: Node, step: Step, at: Mapping[str, int], scratch: Scratch) -> list[Launch]:
        x, router, gate_up, down, norm = (at[name] for name in node.inputs)
        logits = at[node.outputs[1]] if len(node.outputs) > 1 else 0
        y = at[node.outputs[0]]
        buffers = SparseMoeBuffers(x, norm, router, gate_up, down, y, scratch.workspace, logits, scratch.counters)
        return sparse_moe.moe_launches(_sparse_moe(node, step.rows), buffers, self._info)

    def _rms_norm(self, node: Node, step: Step, at: Mapping[str, int], scratch: Scratch) -> list[Launch]:
        del scratch
        x = self.program.values[node.inputs[0]]
        return [
            linear.rms_norm_launch(
                at[node.inputs[0]], at[node.inputs[1]], at[node.outputs[0]], step.rows, x.width, source=x.type,
                residual=at[node.input(2)], epsilon=node.number("epsilon"),
            )
        ]  # fmt: skip

    def _last_token(self, node: Node, step: Step, at: Mapping[str, int], scratch: Scratch) -> list[Launch]:
        del scratch
        width = self.program.values[node.outputs[0]].width
        return [linear.last_token_launch(at[node.inputs[0]], at[node.outputs[0]], step.batch, step.tokens, width)]


def tensor_field(address: int, kind: str, dims: Iterable[int]) -> str:
    """Return the text of a tensor in `Operators.fields`."""
    return f"{address}:{kind}:{','.join(map(str, dims))}"


def bundle_kernels(program: Program) -> tuple[str, ...]:
    """Return all kernels of a bundle: of its program and its debug program, for any cache and number of tokens."""
    low_precision = tuple(code for code in KV_CODES.values() if code != "f32")
    return tuple(dict.fromkeys([*_kernels(program, low_precision), *_kernels(program.debug(), ("f32",))]))


def _kernels(program: Program, caches: tuple[str, ...]) -> Iterator[str]:
    yield from ("last_token_f32", "top_parts_f32", "top_all_f32")
    for node in program.nodes:
        if node.op == "QuantEmbedding":
            yield f"quant_embedding_{node.text('kind')}_f32"
        elif node.op == "QuantLinear":
            yield from linear.kernels_of(matrix_of(node), node.text("activation"), _rounding(node))
        elif node.op == "SparseMoE":
            yield from sparse_moe.kernels_of(_sparse_moe(node, 1))
        elif node.op == "RMSNorm":
            yield linear.rms_norm_kernel(program.values[node.inputs[0]].type)
        elif node.op == "GroupQueryAttention":
            for cache in caches:
                yield from attention.kernels_for(node.text("activation"), cache, node.integer("head_size"))


def _sparse_moe(node: Node, rows: int) -> SparseMoe:
    gate_up, down = matrix_of(node, "gate_up_"), matrix_of(node, "down_")
    shape = MoeShape(
        rows, gate_up.columns, down.columns, gate_up.count, node.integer("k"), bool(node.integer("normalize")),
        node.text("activation"), node.number("epsilon"),
    )  # fmt: skip
    return SparseMoe(shape, gate_up, down, _rounding(node))


def _rounding(node: Node) -> float:
    kind = node.text("activations")
    if kind not in _ROUNDINGS:
        raise BundleError(
            f"{PROGRAM_FILE}: {node.name} has activations {kind!r}, expected one of {', '.join(_ROUNDINGS)}: "
            "upgrade edgelm"
        )
    return _ROUNDINGS[kind]


_Plan = Callable[[Operators, Node, Step, Mapping[str, int], Scratch], list[Launch]]
_LAUNCHES: Mapping[str, _Plan] = {
    "QuantEmbedding": Operators._embedding,
    "QuantLinear": Operators._linear,
    "GroupQueryAttention": Operators._attention,
    "SparseMoE": Operators._moe,
    "RMSNorm": Operators._rms_norm,
    "LastToken": Operators._last_token,
}
_SCRATCH = ("QuantLinear", "GroupQueryAttention", "SparseMoE")
