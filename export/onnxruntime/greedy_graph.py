"""The graph that chooses the next token on a GPU, so that one number comes back instead of a vocabulary of logits.

It also puts the token and the new length where the model's graph reads them. It takes the maxima of rows and then the
maximum of those: each is a small top-1, many of which run at once, where one over 256,000 logits would be one block's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgelm.export.graph.onnx_builder import IR_VERSION, OPSET, int64
from edgelm.runtimes.onnxruntime.cuda import ANSWER, LENGTH, NEXT_IDS, NEXT_LENGTH

_ROW = 1024
_EXACT = 1 << 24  # up to here float32 has every integer


def greedy_graph(vocab_size: int) -> onnx.ModelProto:
    """The graph for logits of [1, 1, vocab_size].

    Inputs: `logits` float32, `length` int64 [1, 1]. Outputs: `next_ids` int64 [1, 1], `next_length` = length + 1, and
    `answer` float32 [1, 2]: the token again, and its logit.
    """
    assert vocab_size <= _EXACT
    row = max(size for size in range(1, _ROW + 1) if vocab_size % size == 0)
    rows = vocab_size // row
    constants = {"rows": int64(rows, row), "flat": int64(-1), "line": int64(1, rows), "one": int64(1)}
    constants |= {"row": np.array([[row]], np.int64), "step": np.array([[1]], np.int64)}
    nodes: list[tuple[str, list[str], list[str], dict[str, Any]]] = [
        ("Reshape", ["logits", "rows"], ["table"], {}),
        ("TopK", ["table", "one"], ["best", "where"], {"axis": -1}),
        ("Reshape", ["best", "line"], ["bests"], {}),
        ("TopK", ["bests", "one"], ["highest", "line_of_best"], {"axis": -1}),
        ("Reshape", ["where", "flat"], ["wheres"], {}),
        ("Gather", ["wheres", "line_of_best"], ["within"], {"axis": 0}),
        ("Mul", ["line_of_best", "row"], ["before"], {}),
        ("Add", ["before", "within"], [NEXT_IDS], {}),
        ("Add", [LENGTH, "step"], [NEXT_LENGTH], {}),
        ("Cast", [NEXT_IDS], ["token"], {"to": TensorProto.FLOAT}),
        ("Concat", ["token", "highest"], [ANSWER], {"axis": 1}),
    ]
    graph = helper.make_graph(
        [helper.make_node(op, ins, outs, f"{outs[0]}/{op}", **attributes) for op, ins, outs, attributes in nodes],
        "greedy choice",
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 1, vocab_size]),
            helper.make_tensor_value_info(LENGTH, TensorProto.INT64, [1, 1]),
        ],
        [
            helper.make_tensor_value_info(NEXT_IDS, TensorProto.INT64, [1, 1]),
            helper.make_tensor_value_info(NEXT_LENGTH, TensorProto.INT64, [1, 1]),
            helper.make_tensor_value_info(ANSWER, TensorProto.FLOAT, [1, 2]),
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", OPSET)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="edgelm")
