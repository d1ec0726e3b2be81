"""Write TensorRT's graph into a bundle, and build the engines that can be built on this machine.

    model.tensorrt.onnx    the graph for TensorRT's parser; its weights are in the bundle's weights file
    model.tensorrt.json    matrices that must be stored row by row, see `edgelm.runtimes.tensorrt.rowmajor`
    engines/               engines, each with its description

The first two are all that `edgelm build` needs on a device; it needs TensorRT and numpy there, but no onnx or torch.
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
from edgelm.runtimes.cuda.driver import chosen_device
from edgelm.runtimes.cuda.program import Program
from edgelm.runtimes.tensorrt.build import GRAPH_FILE, RECIPE_FILE, GraphRecipe, build_into
from edgelm.runtimes.tensorrt.builder import BuildOptions, GraphShape
from edgelm.runtimes.tensorrt.library import RTX, installed, load

FP8_SM = 89
"""The first compute capability with FP8 matmuls."""


@dataclass(frozen=True)
class TensorRtGraph:
    """A graph for TensorRT's parser, with the facts about it that the engine builder needs."""

    model: onnx.ModelProto
    recipe: GraphRecipe


def tensorrt_graph(
    program: Program, info: ModelInfo, weights_file: str, options: EngineOptions, sms: Sequence[int]
) -> TensorRtGraph:
    """Build TensorRT's graph of a program, for devices of these compute capabilities.

    Raises:
        BundleError: A node is not one of our operators.
        ExportError: An engine cannot have caches of this type.
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
    """Check, before hours of quantising, that engines can be built at the end.

    Raises:
        RuntimeUnavailableError: `options.build` asks for engines and TensorRT is not installed, or it cannot be
            imported.
        ExportError: An option has an impossible value.
    """
    _build_options(options)
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
    """Write TensorRT's graph into a bundle's folder, and build the engines that can be built on this machine.

    Args:
        folder: The bundle's folder, with its weights file.
        program: The bundle's program.
        info: Shapes of the model.
        weights_file: Name of the weights file.
        options: Options of engines.
        sms: Compute capabilities that the bundle is for.
        progress: Gets a note that names the devices on which `edgelm build` must run.

    Raises:
        ExportError: TensorRT refuses the graph, or `options.build` asks for engines and TensorRT is not installed.
    """
    made = tensorrt_graph(program, info, weights_file, options, sms)
    (folder / GRAPH_FILE).write_bytes(made.model.SerializeToString())
    (folder / RECIPE_FILE).write_text(made.recipe.to_json(), encoding="utf-8", newline="\n")
    if options.build is False:
        return
    versions = installed()
    build = _build_options(options)
    built: set[int] = set()
    for edition in versions:
        library = load(edition)
        here = set(library.sms) if edition == RTX else _device()
        mine = tuple(sorted((set(sms) & here) - built))
        if mine:
            build_into(folder, weights_file, library, build, mine, progress)
            built |= set(mine)
    left = sorted(set(sms) - built)
    if left:
        progress.note(
            f"no engine for {', '.join(f'SM {sm}' for sm in left)}: run `edgelm build BUNDLE` on such a device. "
            "Without an engine the bundle runs with the runtime cuda-kernels"
        )


def _build_options(options: EngineOptions) -> BuildOptions:
    return BuildOptions((), options.max_batch, options.chunk, options.weight_streaming, options.embed_plugins)


def _device() -> set[int]:
    """Return the compute capability of the GPU that full TensorRT builds for, if there is one."""
    try:
        return {chosen_device().sm}
    except DeviceError:
        return set()
