"""Builds ONNX graphs, whose large weights lie in files beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgelm.export.packing.weights_file import Slot

OPSET = 21
IR_VERSION = 10
MICROSOFT = "com.microsoft"
EDGELM = "edgelm"

Dims = Sequence[int | str]

DEFAULTS: Mapping[str, Mapping[str, int | float]] = {
    "FusedMatMul": {"transA": 0, "alpha": 1.0},
    "GatherBlockQuantized": {"bits": 4, "block_size": 128, "gather_axis": 0, "quantize_axis": 1},
    "GroupQueryAttention": {"rotary_interleaved": 0},
    "MatMulNBits": {"accuracy_level": 0},
    "MoE": {"k": 1, "activation_alpha": 1.0, "activation_beta": 0.0},
    "QMoE": {"k": 1, "activation_alpha": 1.0, "activation_beta": 0.0, "expert_weight_bits": 4, "accuracy_level": 0},
}
"""What ONNX Runtime takes where an attribute is left out, the same in all versions that have the attribute.

Such attributes are not written: an older version refuses a graph that has one it does not know.
`normalize_routing_weights` is not among them, so that every graph of a MoE says whether it renormalises.
"""


class GraphBuilder:
    """Nodes, inputs, outputs and initializers in the order they are added; names are given by the caller or derived.

    Args:
        weights_file: the file of the weights.
        opset: version of ai.onnx.
        ir_version: version of the file format.
    """

    def __init__(self, weights_file: str = "", opset: int = OPSET, ir_version: int = IR_VERSION) -> None:
        self._weights_file = weights_file
        self._opset = opset
        self._ir_version = ir_version
        self._nodes: list[onnx.NodeProto] = []
        self._debug_nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._initializers: dict[str, TensorProto] = {}

    def input(self, name: str, elem_type: int, dims: Dims) -> str:
        """Declare a graph input."""
        self._inputs.append(helper.make_tensor_value_info(name, elem_type, list(dims)))
        return name

    def overridable(self, name: str, default: NDArray[Any]) -> str:
        """Declare an input with a default: an initializer that a caller may feed."""
        self.constant(name, default)
        return self.input(name, helper.np_dtype_to_tensor_dtype(default.dtype), default.shape)

    def output(self, name: str, elem_type: int, dims: Dims) -> str:
        """Declare a graph output."""
        self._outputs.append(helper.make_tensor_value_info(name, elem_type, list(dims)))
        return name

    def node(self, op: str, inputs: Sequence[str], outputs: str | Sequence[str], domain: str = "", **attrs: Any) -> str:
        """Add a node named after its first output; return that output."""
        names = [outputs] if isinstance(outputs, str) else list(outputs)
        if domain == MICROSOFT:
            attrs = {name: value for name, value in attrs.items() if not _is_default(op, name, value)}
        self.add(helper.make_node(op, list(inputs), names, name=f"{names[0]}/{op}", domain=domain, **attrs))
        return names[0]

    def add(self, node: onnx.NodeProto) -> None:
        """Add a node that is made already."""
        self._nodes.append(node)

    def debug_node(self, op: str, inputs: Sequence[str], output: str, **attrs: Any) -> str:
        """Add a node that only an exact graph has, after all others."""
        self._debug_nodes.append(helper.make_node(op, list(inputs), [output], name=f"{output}/{op}", **attrs))
        return output

    def native_node(
        self, op: str, inputs: Sequence[str], outputs: str | Sequence[str], label: str, **attrs: Any
    ) -> str:
        """Add a node of the domain `edgelm`; return its first output.

        ONNX Runtime does not tell an operator its node's name: the attribute `name` is what its errors begin with.
        Optional inputs at the end are left out, those in the middle have empty names.
        """
        used = list(inputs)
        while not used[-1]:
            used.pop()
        first = self.node(op, used, outputs, EDGELM, **attrs)
        self._nodes[-1].attribute.append(helper.make_attribute("name", label))
        return first

    def constant(self, name: str, value: NDArray[Any] | TensorProto) -> str:
        """Add a small initializer stored in the graph itself, unless there is one of its name."""
        if name not in self._initializers:
            made = value if isinstance(value, TensorProto) else numpy_helper.from_array(value)
            made.name = name
            self._initializers[name] = made
        return name

    def external(
        self, name: str, elem_type: int, dims: Sequence[int], offset: int, size: int, file: str | None = None
    ) -> str:
        """Add an initializer whose bytes lie in a file, the weights file unless another is named."""
        assert name not in self._initializers, f"{name} is added twice"
        tensor = TensorProto(name=name, data_type=elem_type, data_location=TensorProto.EXTERNAL)
        tensor.dims.extend(dims)
        for key, value in (("location", file or self._weights_file), ("offset", offset), ("length", size)):
            tensor.external_data.add(key=key, value=str(value))
        self._initializers[name] = tensor
        return name

    def weight(
        self,
        slot: Slot,
        name: str | None = None,
        dims: Sequence[int] | None = None,
        size: int | None = None,
    ) -> str:
        """Add an initializer that lies in a slot of the weights file.

        `name` and `dims` let two views share one slot; with `size` bytes a 1-D uint8 tensor goes on into what follows.
        """
        dims = (size,) if size is not None else slot.dims if dims is None else dims
        # numpy has no bfloat16: such slots are planned as uint16 and declared as what they are.
        bf16 = slot.dtype == np.uint16
        elem_type = TensorProto.BFLOAT16 if bf16 else helper.np_dtype_to_tensor_dtype(slot.dtype)
        return self.external(name or slot.name, elem_type, dims, slot.offset, slot.size if size is None else size)

    def has(self, name: str) -> bool:
        """Whether an initializer of this name exists."""
        return name in self._initializers

    def model(
        self,
        name: str,
        extra_outputs: Sequence[tuple[str, Dims]] = (),
        *,
        exact: Mapping[str, int | float | str] | None = None,
    ) -> onnx.ModelProto:
        """The finished model; `extra_outputs` (float32) are intermediate values that a debug graph also returns.

        `exact` is what attributes are in a debug graph, `EXACT` for CPUs: quantised matmuls then have float32
        activations instead of those they are faster with, and all bits of every weight. So the debug graph differs from
        the reference by float32 rounding only, and a wrong weight stands out.
        """
        outputs = self._outputs + [
            helper.make_tensor_value_info(n, TensorProto.FLOAT, list(d)) for n, d in extra_outputs
        ]
        nodes = self._nodes if exact is None else [_exact(node, exact) for node in self._nodes] + self._debug_nodes
        graph = helper.make_graph(nodes, name, self._inputs, outputs, list(self._initializers.values()))
        domains = sorted({node.domain for node in nodes} - {""})
        opsets = [helper.make_opsetid("", self._opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=self._ir_version, producer_name="edgelm")


EXACT: Mapping[str, int | float | str] = {"accuracy_level": 0, "activations": "float32", "refine": 0}
"""What the attributes of quantised matmuls are in an exact graph for CPUs, whichever operator set has them."""


def _exact(node: onnx.NodeProto, attributes: Mapping[str, int | float | str]) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    del copy.attribute[:]
    for attribute in node.attribute:
        value = attributes.get(attribute.name)
        if value is None:
            copy.attribute.append(attribute)
        elif node.domain != MICROSOFT or not _is_default(node.op_type, attribute.name, value):
            copy.attribute.append(helper.make_attribute(attribute.name, value))
    return copy


def _is_default(op: str, name: str, value: object) -> bool:
    defaults = DEFAULTS.get(op, {})
    return name in defaults and defaults[name] == value


def int64(*values: int) -> NDArray[np.int64]:
    """A 1-D int64 array, the type of ONNX shapes and axes."""
    return np.asarray(values, np.int64)
