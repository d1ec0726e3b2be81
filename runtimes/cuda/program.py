"""`program.json` of a bundle: the graph as a list of our operators, for runtimes without ONNX.

    {"format": 1, "nodes": [...], "values": {...}, "weights": {...}, "exact": {...}}

- A node has `op`, `name`, `inputs`, `outputs` and `attrs`, as in the ONNX graph; an absent input is "".
- Values are [batch, tokens, width] in the activations' type or float32, given as `[type, width]`. Nodes also read
  `input_ids` and `past_lengths`, and update the caches `past_key_values.{i}.key` and `.value` in place.
- Weights have `type`, `dims`, and the position of their bytes in the weights file: `offset`, `size`.
- `exact` has attribute values for the debug graph, which otherwise has the same nodes; all its values are float32.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from edgelm.bundle.gpu_layout import GpuKind, GpuMatrix
from edgelm.errors import BundleError
from edgelm.json_dataclass import (
    Count,
    ErrorFactory,
    OneOf,
    Range,
    from_data,
    parse,
    quoted,
    read_bytes,
    require_format,
)

__all__ = ["PROGRAM_FILE", "TYPE_BYTES", "Node", "Program", "Value", "Weight", "matrix_attrs", "matrix_of"]

PROGRAM_FILE = "program.json"
FORMAT = 1
FLOAT32 = "f32"
ACTIVATIONS = ("bf16", "f16", FLOAT32)
TYPE_BYTES = {"f32": 4, "bf16": 2, "f16": 2, "int32": 4, "uint8": 1}

_ERRORS = ErrorFactory(BundleError, "copy or export the bundle again")
_LARGEST = (1 << 31) - 1
_POSITIVE = ("rows", "columns", "group", "count", "num_heads", "head_size", "k")
"""Name endings of integer attributes that must be 1 or more; all others are 0 or more."""
# Of each operator: number of inputs, of required inputs, and of outputs.
_ARITY = {
    "QuantEmbedding": (2, 2, 1), "QuantLinear": (5, 2, 1), "SparseMoE": (5, 4, 2), "GroupQueryAttention": (8, 6, 3),
    "RMSNorm": (3, 2, 1), "LastToken": (1, 1, 1),
}  # fmt: skip

Attribute = int | float | str
ElementType = Annotated[str, OneOf(tuple(TYPE_BYTES))]


@dataclass(frozen=True)
class Node:
    """An operator of the graph. `name` is used in error messages; an input "" is absent."""

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: Mapping[str, Attribute]

    def text(self, key: str) -> str:
        """Return a text attribute. Raises BundleError if it is missing."""
        return str(self._attr(key))

    def integer(self, key: str) -> int:
        """Return a non-negative integer attribute. Raises BundleError if it is missing or of another type."""
        value = self._attr(key)
        low = 1 if key.endswith(_POSITIVE) else 0
        if not isinstance(value, int) or not low <= value <= _LARGEST:
            raise BundleError(
                f"{PROGRAM_FILE}: {key} of {self.name} is {value!r:.60}, expected a whole number from {low} to "
                f"{_LARGEST}: export the bundle again"
            )
        return value

    def number(self, key: str) -> float:
        """Return a number attribute. Raises BundleError if it is missing or of another type."""
        value = self._attr(key)
        if isinstance(value, str):
            raise BundleError(
                f"{PROGRAM_FILE}: {key} of {self.name} is {value!r}, expected a number: export the bundle again"
            )
        return float(value)

    def input(self, index: int) -> str:
        """Return the name of an input, "" if it is absent."""
        return self.inputs[index] if index < len(self.inputs) else ""

    def _attr(self, key: str) -> Attribute:
        if key not in self.attrs:
            raise BundleError(f"{PROGRAM_FILE}: {self.op} {self.name} has no {key}: export the bundle again")
        return self.attrs[key]


@dataclass(frozen=True)
class Value:
    """An intermediate result [batch, tokens, width]."""

    type: ElementType
    width: Annotated[int, Range(1, _LARGEST)]

    @property
    def row_bytes(self) -> int:
        """Bytes per token."""
        return self.width * TYPE_BYTES[self.type]


@dataclass(frozen=True)
class Weight:
    """A tensor in the weights file."""

    type: ElementType
    dims: tuple[Annotated[int, Range(1, _LARGEST)], ...]
    offset: Count
    size: Count

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.dims)


@dataclass(frozen=True)
class _File:
    """The contents of `program.json`."""

    format: int
    nodes: tuple[Node, ...]
    values: dict[str, tuple[ElementType, Annotated[int, Range(1, _LARGEST)]]]
    weights: dict[str, Weight]
    exact: dict[str, Attribute]


@dataclass(frozen=True)
class Program:
    """A bundle's graph as a list of operators."""

    nodes: tuple[Node, ...]
    values: Mapping[str, Value]
    weights: Mapping[str, Weight]
    exact: Mapping[str, Attribute] = field(default_factory=dict)

    @property
    def weight_bytes(self) -> int:
        """Size of the weights file up to the last byte that is used."""
        return max((weight.offset + weight.size for weight in self.weights.values()), default=0)

    def debug(self) -> Program:
        """Return the debug graph: the same nodes with exact matmuls; all values are float32."""
        nodes = tuple(
            dataclasses.replace(node, attrs={key: self.exact.get(key, value) for key, value in node.attrs.items()})
            for node in self.nodes
        )
        values = {name: Value(FLOAT32, value.width) for name, value in self.values.items()}
        return Program(nodes, values, self.weights, self.exact)

    def to_json(self) -> str:
        """Return JSON that `from_json` reads, one line per node."""
        nodes = ",\n  ".join(json.dumps(dataclasses.asdict(node)) for node in self.nodes)
        values = ",\n  ".join(f"{json.dumps(n)}: {json.dumps([v.type, v.width])}" for n, v in self.values.items())
        weights = ",\n  ".join(
            f"{json.dumps(name)}: {json.dumps(dataclasses.asdict(weight))}" for name, weight in self.weights.items()
        )
        return (
            f'{{\n "format": {FORMAT},\n "nodes": [\n  {nodes}\n ],\n "values": {{\n  {values}\n }},\n'
            f' "weights": {{\n  {weights}\n }},\n "exact": {json.dumps(dict(self.exact))}\n}}\n'
        )

    @classmethod
    def from_json(cls, text: str | bytes, where: Path | str) -> Program:
        """Parse and check what `to_json` wrote.

        Raises:
            BundleError: it is damaged, has a newer format, reads a value that no node computes, or has shapes that
                contradict each other.
        """
        data = require_format(parse(text, where, _ERRORS), "format", FORMAT, where, _ERRORS)
        file = from_data(_File, data, where, _ERRORS)
        values = {name: Value(*described) for name, described in file.values.items()}
        found = cls(file.nodes, values, file.weights, file.exact)
        problem = next(found._problems(), None)
        if problem is not None:
            raise _ERRORS.at(where, f"is damaged ({problem})")
        return found

    @classmethod
    def read(cls, path: Path) -> Program:
        """Read a bundle's `program.json`. Raises as `from_json`, and BundleError if it is missing."""
        return cls.from_json(read_bytes(path, _ERRORS), path)

    def _problems(self) -> Iterator[str]:
        known = {"", "input_ids", "past_lengths", *self.weights}
        for node in self.nodes:
            for name in node.inputs:
                if name not in known and not name.startswith("past_key_values."):
                    yield f"{node.name} reads {name}, which no node computes"
            for name in node.outputs:
                if name not in self.values and not name.startswith("present."):
                    yield f"the value {name} of {node.name} has no type"
            known |= set(node.outputs)
        if "logits" not in known or "logits" not in self.values:
            yield "no node computes logits"
        for name, weight in self.weights.items():
            if weight.size != weight.elements * TYPE_BYTES[weight.type]:
                yield f"the weight {name} has {weight.size} bytes for {weight.elements} elements of {weight.type}"
        for node in self.nodes:
            for key, value in node.attrs.items():
                if isinstance(self.exact.get(key, value), str) != isinstance(value, str):
                    yield f"exact.{key} is {self.exact[key]!r:.60}, and {value!r:.60} in {node.name}"
            if node.op in _ARITY:  # `Operators` rejects unknown ones
                yield from self._misfits(node)

    def _misfits(self, node: Node) -> Iterator[str]:
        """Yield a problem for each input or output of a node whose shape contradicts the node's attributes."""
        most, least, results = _ARITY[node.op]
        given = [name for name in node.inputs[:least] if name]
        if len(given) < least or len(node.inputs) > most or not 1 <= len(node.outputs) <= results:
            yield f"{node.name} has {len(node.inputs)} inputs and {len(node.outputs)} outputs, wrong for {node.op}"
            return
        for name, *wanted in self._sizes(node):
            if not name:
                continue
            if name in self.values:
                size = self.values[name].width
            elif name in self.weights:
                weight = self.weights[name]
                size = weight.size if weight.type == "uint8" else weight.elements
            else:
                yield f"{node.name} reads {quoted(name)}, expected a value or a weight"
                continue
            if size not in wanted:
                expected = " or ".join(map(str, dict.fromkeys(wanted)))
                yield f"{node.name} needs {expected} values in {quoted(name)}, which has {size}"

    def _sizes(self, node: Node) -> Iterator[tuple[str, int] | tuple[str, int, int]]:
        """Yield inputs and outputs of a node with their allowed sizes: values per row, or bytes of a blob."""
        inputs, result = node.input, node.outputs[0]
        if node.op == "QuantEmbedding":
            matrix = matrix_of(node)
            yield from ((inputs(1), matrix.nbytes), (result, matrix.columns))
        elif node.op == "QuantLinear":
            matrix = matrix_of(node)
            yield from ((inputs(0), matrix.columns), (inputs(1), matrix.nbytes), (inputs(2), matrix.columns))
            yield from ((inputs(3), matrix.outputs), (inputs(4), matrix.outputs), (result, matrix.outputs))
            if inputs(4) and matrix.swiglu:
                raise _ERRORS.at(PROGRAM_FILE, f"{node.name} adds a bias to a SwiGLU matmul")
        elif node.op == "GroupQueryAttention":
            heads, kv_heads, width = (node.integer(key) for key in ("num_heads", "kv_num_heads", "head_size"))
            yield from ((inputs(0), (heads + 2 * kv_heads) * width), (result, heads * width))
            yield from ((inputs(6), heads * width, width), (inputs(7), kv_heads * width, width))
            for name in (inputs(4), inputs(5)):
                dims = self.weights[name].dims if name in self.weights else ()
                yield name, dims[0] * (width // 2) if dims else -1
        elif node.op == "SparseMoE":
            up, down, experts = matrix_of(node, "gate_up_"), matrix_of(node, "down_"), node.integer("gate_up_count")
            yield from ((inputs(0), up.columns), (inputs(1), experts * up.columns), (inputs(4), up.columns))
            yield from ((inputs(2), up.nbytes), (inputs(3), down.nbytes), (result, down.outputs))
            yield from ((name, experts) for name in node.outputs[1:])
            fit = (up.outputs, up.columns, up.count) == (down.columns, down.rows, down.count)
            if not fit or node.integer("k") > experts:
                raise _ERRORS.at(
                    PROGRAM_FILE, f"gate_up and down of {node.name} have shapes that contradict each other"
                )
        elif node.op == "RMSNorm":
            for name in (inputs(2), result):
                if name in self.values and self.values[name].type != FLOAT32:
                    raise _ERRORS.at(PROGRAM_FILE, f"{node.name} needs float32 in {quoted(name)}")
            width = self.values[result].width
            if width % 2:
                raise _ERRORS.at(PROGRAM_FILE, f"{node.name} norms {width} columns, expected an even number")
            yield from ((name, width) for name in (inputs(0), inputs(1), inputs(2)))
        else:
            yield inputs(0), self.values[result].width


def matrix_attrs(matrix: GpuMatrix, prefix: str = "") -> dict[str, Attribute]:
    """Return a blob's description as attributes whose names begin with `prefix`."""
    return {
        f"{prefix}kind": str(matrix.kind),
        f"{prefix}rows": matrix.rows,
        f"{prefix}columns": matrix.columns,
        f"{prefix}group": matrix.group,
        f"{prefix}zeros": int(matrix.zeros),
        f"{prefix}swiglu": int(matrix.swiglu),
        f"{prefix}count": matrix.count,
    }


def matrix_of(node: Node, prefix: str = "") -> GpuMatrix:
    """Return the description of a blob from a node's attributes.

    Raises:
        BundleError: an attribute is missing, the kind is unknown, or attributes contradict each other.
    """
    kind = node.text(f"{prefix}kind")
    if kind not in list(GpuKind):
        raise BundleError(f"{PROGRAM_FILE}: {node.name} has weights of the kind {kind!r}: upgrade edgelm")
    rows, columns, group, count = (node.integer(f"{prefix}{key}") for key in ("rows", "columns", "group", "count"))
    zeros, swiglu = (bool(node.integer(f"{prefix}{key}")) for key in ("zeros", "swiglu"))
    matrix = GpuMatrix(GpuKind(kind), rows, columns, group, zeros, swiglu, count)
    problem = matrix.problem()
    if problem:
        raise BundleError(f"{PROGRAM_FILE}: {node.name} has {problem}: export the bundle again")
    return matrix
