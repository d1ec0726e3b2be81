"""Build the program that GPU runtimes read (`edgelm.runtimes.cuda.program`): a graph of our operators, without ONNX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edgelm.export.packing.weights_file import Slot
from edgelm.runtimes.cuda.program import Attribute, Node, Program, Value, Weight

_TYPES = {np.dtype(np.float32): "f32", np.dtype(np.uint8): "uint8"}


class ProgramBuilder:
    """Collects the nodes, values and weights of a program."""

    def __init__(self) -> None:
        self._nodes: list[Node] = []
        self._values: dict[str, Value] = {}
        self._weights: dict[str, Weight] = {}

    def value(self, name: str, kind: str, width: int) -> str:
        """Declare a result of the next node: type `kind`, shape [batch, tokens, width]; return its name."""
        self._values[name] = Value(kind, width)
        return name

    def native_node(
        self, op: str, inputs: Sequence[str], outputs: str | Sequence[str], label: str, **attrs: Attribute
    ) -> str:
        """Add a node; return the name of its first result.

        `label` names the node in errors. Optional inputs have empty names; those at the end are dropped.
        """
        used = list(inputs)
        while not used[-1]:
            used.pop()
        names = (outputs,) if isinstance(outputs, str) else tuple(outputs)
        # The order and the precision (float32) of attributes in ONNX.
        kept = {key: float(np.float32(v)) if isinstance(v, float) else v for key, v in sorted(attrs.items())}
        self._nodes.append(Node(op, label, tuple(used), names, kept))
        return names[0]

    def weight(self, slot: Slot) -> str:
        """Add the weight of a slot of the weights file; return its name."""
        assert slot.name not in self._weights, f"{slot.name} is added twice"
        self._weights[slot.name] = Weight(_TYPES[slot.dtype], slot.dims, slot.offset, slot.size)
        return slot.name

    def has(self, name: str) -> bool:
        """Return whether the program has a weight of this name."""
        return name in self._weights

    def program(self, exact: Mapping[str, Attribute]) -> Program:
        """Return the finished program; `exact` holds the attributes that its debug form replaces."""
        return Program(tuple(self._nodes), self._values, self._weights, exact)
