"""ONNX graphs of a single operator, run with ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgelm.runtimes.onnxruntime.native_library import library_path

Array = NDArray[Any]

# Names of inputs and outputs, in order.
INPUTS: dict[str, tuple[str, ...]] = {
    "QuantEmbedding": ("ids", "table"),
    "QuantLinear": ("x", "weights", "norm", "residual", "bias"),
    "SparseMoE": ("x", "router", "experts", "norm", "residual"),
    "RMSNorm": ("x", "weight", "residual"),
    "GroupQueryAttention": (
        *("qkv", "past_key", "past_value", "past_lengths", "cos", "sin"),
        *("q_norm", "k_norm", "new_lengths"),
    ),
}
OUTPUTS: dict[str, dict[str, int]] = {
    "QuantEmbedding": {"y": TensorProto.FLOAT},
    "QuantLinear": {"y": TensorProto.FLOAT},
    "RMSNorm": {"y": TensorProto.FLOAT},
    "SparseMoE": {"y": TensorProto.FLOAT, "router_logits": TensorProto.FLOAT, "chosen": TensorProto.INT64},
    "GroupQueryAttention": {
        "y": TensorProto.FLOAT,
        "present_key": TensorProto.UINT8,
        "present_value": TensorProto.UINT8,
    },
}
# Inputs that are initializers of the graph, unless a test says otherwise.
CONSTANTS = {"weights", "table", "router", "experts", "norm", "weight", "bias", "q_norm", "k_norm", "cos", "sin"}


def session_options(threads: int = 1) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library_path()))
    return options


def session(
    op: str,
    inputs: Mapping[str, Array],
    *,
    constant: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
    threads: int = 1,
    node: str = "the_node",
    label: str | None = None,
    **attributes: Any,
) -> ort.InferenceSession:
    """Return a session of one node. Inputs named in `constant` are initializers; the others are fed, with any shape.

    `node` is the node's name in the graph, `label` its attribute `name`.
    """
    constants = CONSTANTS if constant is None else set(constant)
    names = [name if name in inputs else "" for name in INPUTS[op]]
    while names[-1] == "":
        names.pop()
    all_outputs = OUTPUTS[op]
    wanted = list(all_outputs) if outputs is None else list(outputs)
    the_node = helper.make_node(
        op, names, [name if name in wanted else "" for name in all_outputs], name=node, domain="edgelm", **attributes
    )
    if label is not None:
        the_node.attribute.append(helper.make_attribute("name", label))
    graph = helper.make_graph(
        [the_node],
        "one_operator",
        [
            helper.make_tensor_value_info(
                name,
                helper.np_dtype_to_tensor_dtype(array.dtype),
                [f"{name}_{i}" for i in range(array.ndim)],
            )
            for name, array in inputs.items()
            if name not in constants
        ],
        [helper.make_tensor_value_info(name, all_outputs[name], None) for name in wanted],
        [numpy_helper.from_array(array, name) for name, array in inputs.items() if name in constants],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("edgelm", 1)], ir_version=10
    )
    return ort.InferenceSession(model.SerializeToString(), session_options(threads), providers=["CPUExecutionProvider"])


def feeds(s: ort.InferenceSession, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Return those of `inputs` that the session takes."""
    return {taken.name: inputs[taken.name] for taken in s.get_inputs()}


def run(op: str, inputs: Mapping[str, Array], **options: Any) -> list[Array]:
    """Run one node and return its outputs. Options as in `session`."""
    s = session(op, inputs, **options)
    return [np.asarray(output) for output in s.run(None, feeds(s, inputs))]
