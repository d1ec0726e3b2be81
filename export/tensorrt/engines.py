"""What a bundle for `tensorrt` holds besides its program: TensorRT's graph, and engines where they can be built here.

    model.tensorrt.onnx    the graph for TensorRT's parser; its weights are the bundle's own file
    model.tensorrt.json    matrices that have to be in rows, see `edgelm.runtimes.tensorrt.rowmajor`
    engines/               engines, each with its description

The first two are all that `edgelm build` needs on a device, with TensorRT and numpy and without onnx or torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto

from edgelm.bundle import ModelInfo
from edgelm.errors import DeviceError
from edgelm.export.tensorrt.attention import CACHE_TYPES, EngineAttention
from edgelm.export.tensorrt.graph import ParserGraph, cache_kind, cache_row_bytes
from edgelm.export.tensorrt.linear import EngineMatmuls
from edgelm.export.tensorrt.options import ENGINE, EngineOptions
from edgelm.progress import Progress
from edgelm.runtimes.base import DEFAULT_CONTEXT_LENGTH
from edgelm.runtimes.cuda.driver import find_devices
from edgelm.runtimes.cuda.program import Program
from edgelm.runtimes.tensorrt.build import GRAPH_FILE, RECIPE_FILE, GraphRecipe, build_into
from edgelm.runtimes.tensorrt.builder import BuildOptions, GraphShape
from edgelm.runtimes.tensorrt.library import RTX, installed, load

FP8_SM = 89
"""The first devices that multiply FP8."""


@dataclass(frozen=True)
class TensorRtGraph:
    """A graph for TensorRT's parser, and what an engine's builder has to know besides."""

    model: onnx.ModelProto
    recipe: GraphRecipe


def tensorrt_graph(
    program: Program, info: ModelInfo, weights_file: str, options: EngineOptions, sms: Sequence[int]
) -> TensorRtGraph:
    """TensorRT's graph of a program, for these devices.

    Raises:
        ExportError: a node that is no operator of ours, or caches of a type that an engine cannot have.
    """
    graph = ParserGraph(program, weights_file)
    matmuls = EngineMatmuls(graph, fp8=all(sm >= FP8_SM for sm in sms))
    kv = cache_kind(program)
    attention = EngineAttention(graph, kv) if options.attention == ENGINE else None
    for node in program.nodes:
        if options.matmul == ENGINE and matmuls.takes(node):
            matmuls.add(node)
        elif attention is not None and node.op == "GroupQueryAttention":
            attention.add(node)
        else:
            graph.plugin(node)
    positions = info.context_length
    if attention is None:
        graph.declare(info, TensorProto.INT8, cache_row_bytes(program))
    else:
        positions = min(positions, DEFAULT_CONTEXT_LENGTH)
        graph.declare(info, CACHE_TYPES[kv], info.head_dim, positions)
    shape = GraphShape(positions, kv, options.matmul, options.attention)
    return TensorRtGraph(graph.model(info.name), GraphRecipe(shape, matmuls.has_fp8, matmuls.rows))


def check_engines(options: EngineOptions) -> None:
    """Refuse before hours of quantising what cannot be built at the end.

    Raises:
        RuntimeUnavailableError: engines are asked for, and there is no TensorRT; or it cannot be imported.
        ExportError: an option makes no sense.
    """
    BuildOptions((), options.max_batch, options.chunk, options.weight_streaming)
    if options.build or (options.build is None and installed()):
        load()


def add_engines(
    folder: Path,
    program: Program,
    info: ModelInfo,
    weights_file: str,
    options: EngineOptions,
    sms: tuple[int, ...],
    progress: Progress,
) -> None:
    """Write TensorRT's graph into a bundle's folder, whose weights are there, and the engines that can be built here.

    Args:
        folder: the bundle's.
        program: its program.
        info: the model's shapes.
        weights_file: the weights' name in it.
        options: how.
        sms: the devices that the bundle is for.
        progress: is told which devices have to finish with `edgelm build`.

    Raises:
        ExportError: TensorRT refuses the graph, or there is none and `options.build` asks for engines.
    """
    made = tensorrt_graph(program, info, weights_file, options, sms)
    (folder / GRAPH_FILE).write_bytes(made.model.SerializeToString())
    (folder / RECIPE_FILE).write_text(made.recipe.to_json(), encoding="utf-8")
    if options.build is False:
        return
    versions = installed()
    build = BuildOptions((), options.max_batch, options.chunk, options.weight_streaming)
    built: set[int] = set()
    for edition in versions:
        library = load(edition)
        here = set(library.sms) if edition == RTX else _devices()
        mine = tuple(sorted((set(sms) & here) - built))
        if mine:
            build_into(folder, weights_file, library, build, mine, progress)
            built |= set(mine)
    left = sorted(set(sms) - built)
    if left:
        progress.note(
            f"no engine for {', '.join(f'SM {sm}' for sm in left)}: TensorRT builds it on such a device, with "
            "`edgelm build BUNDLE`; without one the bundle runs with the runtime cuda-kernels"
        )


def _devices() -> set[int]:
    """The compute capabilities of the GPUs here."""
    try:
        return {device.sm for device in find_devices()}
    except DeviceError:
        return set()
