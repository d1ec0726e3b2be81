"""Build the graph that chooses the next token greedily on a GPU, so that the logits need not be copied to the host.

It also writes the token and the new length where the model's graph reads them. It takes the argmax of each row of up to
1024 logits, then the argmax of the rows' maxima. Many small TopK run in parallel; one over 256,000 logits would run in
a single block.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto

from edgelm.export.graph.onnx_builder import GraphBuilder, int64
from edgelm.runtimes.onnxruntime.cuda import ANSWER, LENGTH, NEXT_IDS, NEXT_LENGTH

_ROW = 1024
_EXACT = 1 << 24  # float32 is exact for all integers up to this


def greedy_graph(vocab_size: int) -> onnx.ModelProto:
    """Return the graph for logits of shape [1, 1, vocab_size].

    Inputs: `logits` float32, `length` int64 [1, 1]. Outputs: `next_ids` int64 [1, 1], `next_length` = length + 1, and
    `answer` float32 [1, 2]: the token again, and its logit.
    """
    assert vocab_size <= _EXACT
    row = max(size for size in range(1, _ROW + 1) if vocab_size % size == 0)
    rows = vocab_size // row
    graph = GraphBuilder()
    graph.input("logits", TensorProto.FLOAT, [1, 1, vocab_size])
    graph.input(LENGTH, TensorProto.INT64, [1, 1])
    for name, shape in (("rows", (rows, row)), ("flat", (-1,)), ("line", (1, rows)), ("one", (1,))):
        graph.constant(name, int64(*shape))
    graph.constant("row", np.array([[row]], np.int64))
    graph.constant("step", np.array([[1]], np.int64))
    graph.node("Reshape", ["logits", "rows"], "table")
    graph.node("TopK", ["table", "one"], ["best", "where"], axis=-1)
    graph.node("Reshape", ["best", "line"], "bests")
    graph.node("TopK", ["bests", "one"], ["highest", "line_of_best"], axis=-1)
    graph.node("Reshape", ["where", "flat"], "wheres")
    graph.node("Gather", ["wheres", "line_of_best"], "within", axis=0)
    graph.node("Mul", ["line_of_best", "row"], "before")
    graph.node("Add", ["before", "within"], NEXT_IDS)
    graph.node("Add", [LENGTH, "step"], NEXT_LENGTH)
    graph.node("Cast", [NEXT_IDS], "token", to=TensorProto.FLOAT)
    graph.node("Concat", ["token", "highest"], ANSWER, axis=1)
    graph.output(NEXT_IDS, TensorProto.INT64, [1, 1])
    graph.output(NEXT_LENGTH, TensorProto.INT64, [1, 1])
    graph.output(ANSWER, TensorProto.FLOAT, [1, 2])
    return graph.model("greedy choice")
