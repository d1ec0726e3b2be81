"""`program.json` of a bundle: the graph as a list of our operators, for runtimes that need no ONNX.

    {"format": 1, "nodes": [...], "values": {...}, "weights": {...}, "exact": {...}}

- A node has `op`, `name`, `inputs`, `outputs` and `attrs`, as the graph's; an input that is left out is "".
- Values are [batch, tokens, width] in the activations' type or float32: `[type, width]`. Beside them nodes read
  `input_ids` and `past_lengths` and read and write the caches `past_key_values.{i}.key` and `.value`, in place.
- Weights say `type`, `dims`, and where their bytes lie in the weights file: `offset`, `size`.
- `exact` has the attributes' values in the debug graph, which is otherwise the same: all of its values are float32.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgelm.errors import BundleError
from edgelm.gpu_weights import GpuKind, GpuMatrix

__all__ = ["PROGRAM_FILE", "TYPE_BYTES", "Node", "Program", "Value", "Weight", "matrix_attrs", "matrix_of"]

PROGRAM_FILE = "program.json"
FORMAT = 1
FLOAT32 = "f32"
ACTIVATIONS = ("bf16", "f16", FLOAT32)
TYPE_BYTES = {"f32": 4, "bf16": 2, "f16": 2, "int32": 4, "uint8": 1}

Attribute = int | float | str


@dataclass(frozen=True)
class Node:
    """One operator. `name` is what errors call it; an input of "" is left out."""

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: Mapping[str, Attribute]

    def text(self, key: str) -> str:
        """A text attribute. Raises BundleError where it is missing."""
        return str(self._attr(key))

    def whole(self, key: str) -> int:
        """A whole number. Raises BundleError where it is missing or something else."""
        value = self._attr(key)
        if not isinstance(value, int):
            raise BundleError(f"{PROGRAM_FILE}: {key} of {self.name} is {value!r}: export the bundle again")
        return value

    def number(self, key: str) -> float:
        """A number. Raises BundleError where it is missing or something else."""
        value = self._attr(key)
        if isinstance(value, str):
            raise BundleError(f"{PROGRAM_FILE}: {key} of {self.name} is {value!r}: export the bundle again")
        return float(value)

    def input(self, index: int) -> str:
        """The name of an input, "" where it is left out."""
        return self.inputs[index] if index < len(self.inputs) else ""

    def _attr(self, key: str) -> Attribute:
        if key not in self.attrs:
            raise BundleError(f"{PROGRAM_FILE}: {self.op} {self.name} has no {key}: export the bundle again")
        return self.attrs[key]


@dataclass(frozen=True)
class Value:
    """An intermediate result [batch, tokens, width]."""

    type: str
    width: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one token."""
        return self.width * TYPE_BYTES[self.type]


@dataclass(frozen=True)
class Weight:
    """Where a tensor lies in the weights file."""

    type: str
    dims: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class Program:
    """A bundle's graph."""

    nodes: tuple[Node, ...]
    values: Mapping[str, Value]
    weights: Mapping[str, Weight]
    exact: Mapping[str, Attribute] = field(default_factory=dict)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights file that are used, counted from its start."""
        return max((weight.offset + weight.size for weight in self.weights.values()), default=0)

    def debug(self) -> Program:
        """The debug graph: the same nodes with exact products; all values are float32."""
        nodes = tuple(
            dataclasses.replace(node, attrs={key: self.exact.get(key, value) for key, value in node.attrs.items()})
            for node in self.nodes
        )
        values = {name: Value(FLOAT32, value.width) for name, value in self.values.items()}
        return Program(nodes, values, self.weights, self.exact)

    def to_json(self) -> str:
        """What `from_json` reads back, a line a node."""
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
    def from_json(cls, text: str, where: Path | str) -> Program:
        """Parse and check what `to_json` wrote.

        Raises:
            BundleError: it is damaged, of a newer format, or uses a value that nothing makes.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            if data["format"] != FORMAT:
                raise BundleError(f"{where} has format {data['format']}, this EdgeLM reads {FORMAT}: upgrade edgelm")
            found = cls(
                tuple(_node(entry) for entry in data["nodes"]),
                {str(name): Value(_type(kind), int(width)) for name, (kind, width) in data["values"].items()},
                {
                    str(name): Weight(
                        _type(entry["type"]),
                        tuple(int(dim) for dim in entry["dims"]),
                        int(entry["offset"]),
                        int(entry["size"]),
                    )
                    for name, entry in data["weights"].items()
                },
                dict(data["exact"]),
            )
            problem = next(found._problems(), None)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BundleError(f"{where} is damaged ({error!r}): copy or export the bundle again") from error
        if problem is not None:
            raise BundleError(f"{where} is damaged ({problem}): copy or export the bundle again")
        return found

    @classmethod
    def read(cls, path: Path) -> Program:
        """Read a bundle's file. Raises as `from_json`, and BundleError where it is missing."""
        try:
            return cls.from_json(path.read_text(encoding="utf-8"), path)
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError(f"{path} cannot be read ({error}): copy or export the bundle again") from error

    def _problems(self) -> Iterator[str]:
        known = {"", "input_ids", "past_lengths", *self.weights}
        for node in self.nodes:
            for name in node.inputs:
                if name not in known and not name.startswith("past_key_values."):
                    yield f"{node.name} reads {name}, which nothing makes"
            for name in node.outputs:
                if name not in self.values and not name.startswith("present."):
                    yield f"the value {name} of {node.name} has no type"
            known |= set(node.outputs)
        if "logits" not in known:
            yield "nothing makes logits"
        for name, weight in self.weights.items():
            if weight.offset < 0 or weight.size <= 0:
                yield f"the weight {name} has {weight.size} bytes at {weight.offset}"


def matrix_attrs(matrix: GpuMatrix, prefix: str = "") -> dict[str, Attribute]:
    """A blob's description as attributes, whose names begin with `prefix`."""
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
    """The blob that attributes describe.

    Raises:
        BundleError: one is missing, or there is no such kind.
    """
    kind = node.text(f"{prefix}kind")
    if kind not in list(GpuKind):
        raise BundleError(f"{PROGRAM_FILE}: {node.name} has weights of the kind {kind!r}: upgrade edgelm")
    rows, columns, group, count = (node.whole(f"{prefix}{key}") for key in ("rows", "columns", "group", "count"))
    zeros, swiglu = (bool(node.whole(f"{prefix}{key}")) for key in ("zeros", "swiglu"))
    return GpuMatrix(GpuKind(kind), rows, columns, group, zeros, swiglu, count)


def _node(entry: Mapping[str, Any]) -> Node:
    attrs = dict(entry["attrs"])
    for key, value in attrs.items():
        if not isinstance(value, int | float | str):
            raise ValueError(f"{key} of {entry['name']} is {value!r}")
    inputs, outputs = (tuple(str(name) for name in entry[key]) for key in ("inputs", "outputs"))
    return Node(str(entry["op"]), str(entry["name"]), inputs, outputs, attrs)


def _type(name: str) -> str:
    if name not in TYPE_BYTES:
        raise ValueError(f"there is no type {name!r}")
    return name
