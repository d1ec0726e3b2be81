"""What TensorRT has to know of our operators: shapes and types of results, and which input a result lies in.

Pure data and functions of it, without TensorRT: tests and the plugins read the same table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from edgelm.errors import EdgeLMError
from edgelm.json_dataclass import ErrorFactory, Range, from_data, parse, require_format

PREFIX = "EdgeLM"
"""Of plugins' names. TensorRT's parser keeps names such as GroupQueryAttention to itself, whatever their domain."""
NAMESPACE = "edgelm"
VERSION = "1"
MARK = '{"edgelm_plugin": 1, '
"""How the serialised form of a plugin begins; engines are searched for it."""

_PLUGIN = "a plugin of this engine"
_ERRORS = ErrorFactory(EdgeLMError, "build the engine again with `edgelm build BUNDLE`")

Value = int | float | str


@dataclass(frozen=True)
class Dim:
    """A dimension of a result that is one of an input: axis `axis` of input `input` of the operator's full list."""

    input: int
    axis: int


Term = int | Dim | tuple[Dim, ...]
"""A dimension of a result: a constant, an input's, or the product of several of these."""


@dataclass(frozen=True)
class _Text:
    """A plugin's serialised form, but for its mark."""

    name: str
    op: str
    present: tuple[Annotated[int, Range(0, 1)], ...]
    results: tuple[tuple[str, Annotated[int, Range(1, (1 << 31) - 1)]], ...]
    attrs: dict[str, Value]


@dataclass(frozen=True)
class PluginSpec:
    """One node as a plugin keeps it, and as it lies in an engine.

    Attributes:
        name: the node's label, e.g. "layers.3.attn".
        op: operator of the domain `edgelm`.
        attrs: the node's attributes.
        present: for each input of the operator's list whether the node has it. TensorRT takes no empty inputs, so a
            plugin gets those that are present, in order. Inputs behind its end are absent.
        results: element type ("f32", "f16", "bf16") and width, the last dimension, of the results that are
            used; caches, which lie in their inputs, are not among them.
    """

    name: str
    op: str
    attrs: Mapping[str, Value] = field(default_factory=dict)
    present: tuple[bool, ...] = ()
    results: tuple[tuple[str, int], ...] = ()

    @property
    def outputs(self) -> int:
        """How many results the plugin has, caches included."""
        return len(self.results) + len(OPERATORS[self.op].aliases)

    def to_text(self) -> str:
        """One line of JSON that begins with `MARK`."""
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
            EdgeLMError: it is something else, or of an operator that this version lacks.
        """
        data = require_format(parse(text, _PLUGIN, _ERRORS), "edgelm_plugin", 1, _PLUGIN, _ERRORS)
        read = from_data(_Text, data, _PLUGIN, _ERRORS, ignored=("edgelm_plugin",))
        found = cls(read.name, read.op, read.attrs, tuple(map(bool, read.present)), read.results)
        if found.op not in OPERATORS:
            raise EdgeLMError(
                f"{found.name}: the engine has the operator {found.op}, this EdgeLM has {', '.join(OPERATORS)}: "
                "upgrade edgelm, or build the engine again"
            )
        return found

    def spread(self, given: Sequence[Any]) -> list[Any]:
        """The plugin's inputs at their places in the operator's list, None where one is absent."""
        queue = list(given)
        if len(queue) != sum(self.present):
            raise EdgeLMError(
                f"{self.name}: {self.op} takes {sum(self.present)} inputs here, it was given {len(queue)}"
            )
        return [queue.pop(0) if there else None for there in self.present]


@dataclass(frozen=True)
class Operator:
    """What is the same for all nodes of an operator.

    Attributes:
        inputs: names of its inputs in order; those behind `required` may be absent.
        required: how many must be there.
        listed: of how many `PluginSpec.present` speaks even where they are absent; default: all. Those behind were
            added later: engines without them stay as they were.
        shapes: the dimensions of its results before the last, which is the width that the spec says.
        aliases: results that are an input written in place: result -> input. They come after the others.
    """

    inputs: tuple[str, ...]
    required: int
    shapes: tuple[tuple[Term, ...], ...]
    aliases: Mapping[int, int] = field(default_factory=dict)
    listed: int | None = None

    def present(self, inputs: Sequence[str]) -> tuple[bool, ...]:
        """`PluginSpec.present` of a node with these inputs."""
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
    """The dimensions of a node's results, caches included."""
    operator = OPERATORS[spec.op]
    found = [(*before, width) for (_, width), before in zip(spec.results, operator.shapes, strict=False)]
    caches = (tuple(Dim(place, axis) for axis in range(_CACHE_RANK)) for place in operator.aliases.values())
    return [*found, *caches]


def output_types(spec: PluginSpec, types: Sequence[str]) -> list[str]:
    """Element types of a node's results for those of the inputs that it has."""
    places = spec.spread(types)
    return [kind for kind, _ in spec.results] + [str(places[i]) for i in OPERATORS[spec.op].aliases.values()]
