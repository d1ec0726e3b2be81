"""Builds the program that GPU runtimes read (`edgelm.runtimes.cuda.program`): a graph of our operators without ONNX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edgelm.export.packing.weights_file import Slot
from edgelm.runtimes.cuda.program import Attribute, Node, Program, Value, Weight

_TYPES = {np.dtype(np.float32): "f32", np.dtype(np.uint8): "uint8"}


class ProgramBuilder:
    """Nodes, values and weights in the order they are added."""

    def __init__(self) -> None:
        self._nodes: list[Node] = []
        self._values: dict[str, Value] = {}
        self._weights: dict[str, Weight] = {}

    def value(self, name: str, kind: str, width: int) -> str:
        """Declare a result of the next node, [batch, tokens, width]."""
        self._values[name] = Value(kind, width)
        return name

    def native_node(
        self, op: str, inputs: Sequence[str], outputs: str | Sequence[str], label: str, **attrs: Attribute
    ) -> str:
        """Add a node; return its first result.

        `label` is what errors call it. Optional inputs at the end are left out, those in the middle have empty names.
        """
        used = list(inputs)
        while not used[-1]:
            used.pop()
        names = (outputs,) if isinstance(outputs, str) else tuple(outputs)
        # In the order and with the precision that attributes have in ONNX.
        kept = {key: float(np.float32(v)) if isinstance(v, float) else v for key, v in sorted(attrs.items())}
        self._nodes.append(Node(op, label, tuple(used), names, kept))
        return names[0]

    def weight(self, slot: Slot) -> str:
        """Add a weight that lies in a slot of the weights file."""
        assert slot.name not in self._weights, f"{slot.name} is added twice"
        self._weights[slot.name] = Weight(_TYPES[slot.dtype], slot.dims, slot.offset, slot.size)
        return slot.name

    def has(self, name: str) -> bool:
        """Whether a weight of this name exists."""
        return name in self._weights

    def program(self, exact: Mapping[str, Attribute]) -> Program:
        """The finished program; `exact` is what attributes are in its debug form."""
        return Program(tuple(self._nodes), self._values, self._weights, exact)
