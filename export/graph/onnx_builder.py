"""Build ONNX graphs whose large weights are in a separate file."""

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
"""ONNX Runtime's defaults of attributes, by operator. They are the same in all versions that have the attribute.

An attribute with its default value is not written, because older versions refuse a graph with an attribute that they
do not know. `normalize_routing_weights` is not listed, so every MoE node states whether it renormalises.
"""


class GraphBuilder:
    """Collects the nodes, inputs, outputs and initializers of an ONNX graph.

    Args:
        weights_file: Name of the weights file.
        opset: Opset version of ai.onnx.
        ir_version: Version of the ONNX file format.
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
        """Declare a graph input; return its name."""
        self._inputs.append(helper.make_tensor_value_info(name, elem_type, list(dims)))
        return name

    def overridable(self, name: str, default: NDArray[Any]) -> str:
        """Declare an optional input: an initializer that a caller may replace; return its name."""
        self.constant(name, default)
        return self.input(name, helper.np_dtype_to_tensor_dtype(default.dtype), default.shape)

    def output(self, name: str, elem_type: int, dims: Dims) -> str:
        """Declare a graph output; return its name."""
        self._outputs.append(helper.make_tensor_value_info(name, elem_type, list(dims)))
        return name

    def node(self, op: str, inputs: Sequence[str], outputs: str | Sequence[str], domain: str = "", **attrs: Any) -> str:
        """Add a node, named after its first output; return the name of that output."""
        names = [outputs] if isinstance(outputs, str) else list(outputs)
        if domain == MICROSOFT:
            attrs = {name: value for name, value in attrs.items() if not _is_default(op, name, value)}
        self.add(helper.make_node(op, list(inputs), names, name=f"{names[0]}/{op}", domain=domain, **attrs))
        return names[0]

    def add(self, node: onnx.NodeProto) -> None:
        """Add a finished node."""
        self._nodes.append(node)

    def debug_node(self, op: str, inputs: Sequence[str], output: str, **attrs: Any) -> str:
        """Add a node to the debug graph only, after all others; return the name of its output."""
        self._debug_nodes.append(helper.make_node(op, list(inputs), [output], name=f"{output}/{op}", **attrs))
        return output

    def native_node(
        self, op: str, inputs: Sequence[str], outputs: str | Sequence[str], label: str, **attrs: Any
    ) -> str:
        """Add a node of the domain `edgelm`; return the name of its first output.

        ONNX Runtime does not tell an operator the name of its node, so `label` is stored as the attribute `name`;
        errors start with it. Optional inputs have empty names; those at the end are dropped.
        """
        used = list(inputs)
        while not used[-1]:
            used.pop()
        first = self.node(op, used, outputs, EDGELM, **attrs)
        self._nodes[-1].attribute.append(helper.make_attribute("name", label))
        return first

    def constant(self, name: str, value: NDArray[Any] | TensorProto) -> str:
        """Add a small initializer, stored in the graph itself, unless the name exists; return the name."""
        if name not in self._initializers:
            made = value if isinstance(value, TensorProto) else numpy_helper.from_array(value)
            made.name = name
            self._initializers[name] = made
        return name

    def external(
        self, name: str, elem_type: int, dims: Sequence[int], offset: int, size: int, file: str | None = None
    ) -> str:
        """Add an initializer whose bytes are in `file`, by default the weights file; return its name."""
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
        """Add an initializer for a slot of the weights file; return its name.

        `name` and `dims` replace the slot's own, so that two initializers can share one slot. With `size` the
        initializer is a 1-D uint8 tensor of that many bytes, which may continue into the next slot.
        """
        dims = (size,) if size is not None else slot.dims if dims is None else dims
        # numpy has no bfloat16: such slots are planned as uint16 and declared as bfloat16.
        bf16 = slot.dtype == np.uint16
        elem_type = TensorProto.BFLOAT16 if bf16 else helper.np_dtype_to_tensor_dtype(slot.dtype)
        return self.external(name or slot.name, elem_type, dims, slot.offset, slot.size if size is None else size)

    def has(self, name: str) -> bool:
        """Return whether the graph has an initializer of this name."""
        return name in self._initializers

    def model(
        self,
        name: str,
        extra_outputs: Sequence[tuple[str, Dims]] = (),
        *,
        exact: Mapping[str, int | float | str] | None = None,
    ) -> onnx.ModelProto:
        """Return the finished model.

        Args:
            name: Name of the graph.
            extra_outputs: Names and shapes of intermediate float32 values that the model also returns.
            exact: Attributes to replace in a debug graph; `EXACT` for CPUs. Quantised matmuls then use float32
                activations and all bits of every weight, so that the debug graph differs from the reference by float32
                rounding only, and a wrong weight is visible.
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
"""Attributes of quantised matmuls in a debug graph for CPUs, for both operator sets."""


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
    """Return a 1-D int64 array, the type of ONNX shapes and axes."""
    return np.asarray(values, np.int64)
