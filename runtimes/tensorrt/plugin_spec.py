"""Descriptions of our operators for TensorRT: shapes and types of outputs, and outputs that alias an input.

Pure data and functions on it, without TensorRT, shared by tests and plugins.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from edgelm.errors import EdgeLMError
from edgelm.json_dataclass import ErrorFactory, Range, from_data, parse, require_format

PREFIX = "EdgeLM"
"""Prefix of plugin names. TensorRT's parser reserves names such as GroupQueryAttention, whatever their domain."""
NAMESPACE = "edgelm"
VERSION = "1"
MARK = '{"edgelm_plugin": 1, '
"""The start of a plugin's serialised form; engines are searched for it."""

_PLUGIN = "a plugin of this engine"
_ERRORS = ErrorFactory(EdgeLMError, "build the engine again with `edgelm build BUNDLE`")

Value = int | float | str


@dataclass(frozen=True)
class Dim:
    """A dimension of an output that equals axis `axis` of input `input`, counted in the operator's full list."""

    input: int
    axis: int


Term = int | Dim | tuple[Dim, ...]
"""A dimension of an output: a constant, an input's dimension, or a product of several of these."""


@dataclass(frozen=True)
class _Text:
    """A plugin's serialised form without its mark."""

    name: str
    op: str
    present: tuple[Annotated[int, Range(0, 1)], ...]
    results: tuple[tuple[str, Annotated[int, Range(1, (1 << 31) - 1)]], ...]
    attrs: dict[str, Value]


@dataclass(frozen=True)
class PluginSpec:
    """A node as a plugin, and as it is serialised in an engine.

    Attributes:
        name: the node's label, e.g. "layers.3.attn".
        op: operator of the domain `edgelm`.
        attrs: the node's attributes.
        present: for each input in the operator's list, whether the node has it. TensorRT allows no empty inputs, so a
            plugin gets those that are present, in order. Inputs beyond the end of `present` are absent.
        results: element type ("f32", "f16", "bf16") and width (last dimension) of the outputs that are used, without
            the caches, which alias their inputs.
    """

    name: str
    op: str
    attrs: Mapping[str, Value] = field(default_factory=dict)
    present: tuple[bool, ...] = ()
    results: tuple[tuple[str, int], ...] = ()

    @property
    def outputs(self) -> int:
        """The number of outputs of the plugin, caches included."""
        return len(self.results) + len(OPERATORS[self.op].aliases)

    def to_text(self) -> str:
        """Return one line of JSON that begins with `MARK`."""
        fields = {
            "name": self.name,
            "op": self.op,
            "present": [int(there) for there in self.present],
            "results": [list(result) for result in self.results],
            "attrs": dict(sorted(self.attrs.items())),
        }
        return MARK + json.dumps(fields)[1:]

    @classmethod
    def from_text(cls, text: str) -> PluginSpec:
        """Parse what `to_text` wrote.

        Raises:
            EdgeLMError: it is not a plugin's text, or its operator is unknown.
        """
        data = require_format(parse(text, _PLUGIN, _ERRORS), "edgelm_plugin", 1, _PLUGIN, _ERRORS)
        read = from_data(_Text, data, _PLUGIN, _ERRORS, ignored=("edgelm_plugin",))
        found = cls(read.name, read.op, read.attrs, tuple(map(bool, read.present)), read.results)
        if found.op not in OPERATORS:
            raise EdgeLMError(
                f"{found.name}: the engine has the operator {found.op}, this EdgeLM supports {', '.join(OPERATORS)}: "
                "upgrade edgelm, or build the engine again"
            )
        return found

    def spread(self, given: Sequence[Any]) -> list[Any]:
        """Return the plugin's inputs in the order of the operator's list, None for absent ones."""
        queue = list(given)
        if len(queue) != sum(self.present):
            raise EdgeLMError(f"{self.name}: {self.op} has {len(queue)} inputs, expected {sum(self.present)}")
        return [queue.pop(0) if there else None for there in self.present]


@dataclass(frozen=True)
class Operator:
    """Properties that all nodes of an operator share.

    Attributes:
        inputs: names of its inputs in order; those after the first `required` may be absent.
        required: number of required inputs.
        listed: number of inputs that `PluginSpec.present` always lists; default: all. Inputs after these were added
        later:
            engines without them stay unchanged.
        shapes: dimensions of its outputs without the last, which is the width in the spec.
        aliases: outputs that are an input written in place: output -> input. They come after the others.
    """

    inputs: tuple[str, ...]
    required: int
    shapes: tuple[tuple[Term, ...], ...]
    aliases: Mapping[int, int] = field(default_factory=dict)
    listed: int | None = None

    def present(self, inputs: Sequence[str]) -> tuple[bool, ...]:
        """Return `PluginSpec.present` of a node with these inputs."""
        listed = len(self.inputs) if self.listed is None else self.listed
        used = max((i + 1 for i, name in enumerate(inputs) if name), default=0)
        return tuple(i < len(inputs) and bool(inputs[i]) for i in range(max(listed, used)))


_BATCH, _TOKENS = Dim(0, 0), Dim(0, 1)
_ROWS = (_BATCH, _TOKENS)
_CACHE_RANK = 4

OPERATORS: dict[str, Operator] = {
    "QuantEmbedding": Operator(("ids", "table"), 2, (_ROWS,)),
    "QuantLinear": Operator(("x", "weights", "norm", "residual", "bias"), 2, (_ROWS,), listed=4),
    "SparseMoE": Operator(("x", "router", "gate_up", "down", "norm"), 5, (_ROWS, ((_BATCH, _TOKENS),))),
    "GroupQueryAttention": Operator(
        ("qkv", "key_cache", "value_cache", "past_lengths", "cos", "sin", "q_norm", "k_norm"), 6, (_ROWS,), {1: 1, 2: 2}
    ),
    "RMSNorm": Operator(("x", "weight", "residual"), 2, (_ROWS,)),
    "LastToken": Operator(("x", "new_lengths"), 1, ((_BATCH, 1),)),
}


def result_terms(spec: PluginSpec) -> list[tuple[Term, ...]]:
    """Return the dimensions of a node's outputs, caches included."""
    operator = OPERATORS[spec.op]
    found = [(*before, width) for (_, width), before in zip(spec.results, operator.shapes, strict=False)]
    caches = (tuple(Dim(place, axis) for axis in range(_CACHE_RANK)) for place in operator.aliases.values())
    return [*found, *caches]


def output_types(spec: PluginSpec, types: Sequence[str]) -> list[str]:
    """Return the element types of a node's outputs, given those of its inputs."""
    places = spec.spread(types)
    return [kind for kind, _ in spec.results] + [str(places[i]) for i in OPERATORS[spec.op].aliases.values()]
