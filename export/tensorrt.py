"""What a bundle for `tensorrt` holds besides its program: TensorRT's graph, and engines where they can be built here.

    model.tensorrt.onnx    the graph for TensorRT's parser; its weights are the bundle's own file
    model.tensorrt.json    matrices that have to be in rows, see `edgelm.runtimes.tensorrt.rowmajor`
    engines/               engines, each with its description

The first two are all that `edgelm build` needs on a device, with TensorRT and numpy and without onnx or torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from edgelm.bundle import ModelInfo
from edgelm.errors import ExportError
from edgelm.export.tensorrt_graph import ParserGraph, cache_kind, cache_row_bytes
from edgelm.export.tensorrt_linear import EngineLinears
from edgelm.runtimes.cuda.program import Program
from edgelm.runtimes.tensorrt.rowmajor import Rows

PLUGIN, ENGINE = "plugin", "engine"
WHO = (ENGINE, PLUGIN)
_FP8_SM = 89


@dataclass(frozen=True)
class GraphOptions:
    """Who computes what.

    Attributes:
        linears: "engine": TensorRT's own products where it has them, see `tensorrt_linear`; "plugin": ours.
        attention: "plugin": ours; "engine": TensorRT's own, see `tensorrt_attention`.
        fp8: whether FP8 products may be the engine's, which has them from SM 89 on.
    """

    linears: str = ENGINE
    attention: str = PLUGIN
    fp8: bool = True

    def __post_init__(self) -> None:
        for name in ("linears", "attention"):
            if getattr(self, name) not in WHO:
                raise ExportError(f"{name} is {getattr(self, name)!r}: it can be {' or '.join(WHO)}")


@dataclass(frozen=True)
class TensorRtGraph:
    """A graph for TensorRT's parser, and what has to be unpacked for it."""

    model: onnx.ModelProto
    rows: list[Rows]
    kv: str


def fp8_products(sms: tuple[int, ...]) -> bool:
    """Whether all these devices have FP8 products."""
    return all(sm >= _FP8_SM for sm in sms)


def tensorrt_graph(program: Program, info: ModelInfo, weights_file: str, options: GraphOptions) -> TensorRtGraph:
    """TensorRT's graph of a program.

    Raises:
        ExportError: a node that is no operator of ours, or caches of a type that an engine cannot have.
    """
    graph = ParserGraph(program, weights_file)
    linears = EngineLinears(graph, fp8=options.fp8)
    for node in program.nodes:
        if options.linears == ENGINE and linears.takes(node):
            linears.add(node)
        else:
            graph.plugin(node)
    return TensorRtGraph(graph.model(info, cache_row_bytes(program)), linears.rows, cache_kind(program))
