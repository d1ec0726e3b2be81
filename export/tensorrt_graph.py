"""The graph that TensorRT's parser reads: a pass over the graph in our operators.

- Nodes of the domain `edgelm` become plugins: the operator's name with a prefix (the parser keeps names such as
  GroupQueryAttention to itself), absent inputs left out (it takes no empty ones), and one attribute, the text of a
  `PluginSpec`.
- Bytes become int8: TensorRT widens constants of uint8, and its plugins take int8 as what it is.
- ids and lengths become int32, which engines have; shapes stay int64.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx
from onnx import TensorProto, helper

from edgelm.errors import ExportError
from edgelm.export.graph import EDGELM
from edgelm.runtimes.tensorrt.operators import NAMESPACE, OPERATORS, PREFIX, PluginSpec, Value
from edgelm.runtimes.tensorrt.plugins import FIELD

OPSET = 24
IR_VERSION = 11
_NARROW = {TensorProto.UINT8: TensorProto.INT8, TensorProto.INT64: TensorProto.INT32}


def parser_graph(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of `model` for TensorRT's parser; `model` stays as it is.

    Raises:
        ExportError: a node of the domain `edgelm` that is no operator of ours, or with more or fewer inputs.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    del made.opset_import[:]
    made.opset_import.extend([helper.make_opsetid("", OPSET), helper.make_opsetid(EDGELM, 1)])
    made.ir_version = IR_VERSION
    graph = made.graph
    for value in (*graph.input, *graph.output, *graph.value_info):
        tensor = value.type.tensor_type
        tensor.elem_type = _NARROW.get(tensor.elem_type, tensor.elem_type)
    used_by_plugins = {name for node in graph.node if node.domain == EDGELM for name in node.input}
    for weight in graph.initializer:
        if weight.data_type == TensorProto.UINT8 and weight.name in used_by_plugins:
            weight.data_type = TensorProto.INT8
    kept = [plugin_node(node) if node.domain == EDGELM else node for node in graph.node]
    del graph.node[:]
    graph.node.extend(kept)
    return made


def plugin_node(node: onnx.NodeProto) -> onnx.NodeProto:
    """The plugin of one node of the domain `edgelm`.

    Raises:
        ExportError: it is no operator of ours, or has more or fewer inputs than one.
    """
    operator = OPERATORS.get(node.op_type)
    attrs = _attributes(node)
    name = str(attrs.pop("name", node.name))
    if operator is None:
        raise ExportError(f"{name}: the TensorRT plugins have no operator {node.op_type}; they have {list(OPERATORS)}")
    present = tuple(bool(given) for given in node.input) + (False,) * (len(operator.inputs) - len(node.input))
    if len(present) > len(operator.inputs) or not all(present[: operator.required]):
        raise ExportError(
            f"{name}: {node.op_type} takes {', '.join(operator.inputs)}, of which the first {operator.required} must "
            f"be there; the node has {list(node.input)}"
        )
    outputs = [output for output in node.output if output]
    if list(node.output)[: len(outputs)] != outputs:
        raise ExportError(f"{name}: a result of {node.op_type} is left out before one that is used")
    spec = PluginSpec(name, node.op_type, attrs, present, len(outputs))
    return helper.make_node(
        f"{PREFIX}{node.op_type}",
        [given for given in node.input if given],
        outputs,
        name=name,
        domain=NAMESPACE,
        **{FIELD: spec.to_text()},
    )


def _attributes(node: onnx.NodeProto) -> dict[str, Value]:
    found: dict[str, Value] = {}
    for attribute in node.attribute:
        value = helper.get_attribute_value(attribute)
        if isinstance(value, bytes):
            value = value.decode()
        if not isinstance(value, int | float | str):
            raise ExportError(f"{node.name}: the attribute {attribute.name} is a list, which plugins do not take")
        found[attribute.name] = value
    return found


def plugins_of(model: onnx.ModelProto) -> Iterable[PluginSpec]:
    """The plugins of a graph that `parser_graph` made, in order."""
    for node in model.graph.node:
        if node.domain == NAMESPACE:
            yield PluginSpec.from_text(str(_attributes(node)[FIELD]))
