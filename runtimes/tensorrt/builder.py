"""Builds an engine from a bundle's graph for TensorRT. Needs TensorRT and numpy; with TensorRT-RTX no GPU.

The parser maps the weights file and the engine is written as it is built, so neither must fit into memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from edgelm.bundle.kv_cache import KV_TYPES
from edgelm.errors import EdgeLMError, ExportError
from edgelm.json_dataclass import OneOf, Range
from edgelm.runtimes.tensorrt.engine_info import EMBEDDED, LIBRARY, EngineInfo, count_operators, plugins_in, sm_names
from edgelm.runtimes.tensorrt.library import RTX, TITLES, Library, messages
from edgelm.runtimes.tensorrt.plugins import PluginLibrary

Shape = tuple[int, ...]

_OWN_ATTENTION = (10, 15)
"""The first full TensorRT that updates a cache in place by itself (IKVCacheUpdateLayer)."""


@dataclass(frozen=True)
class BuildOptions:
    """Options of an engine build.

    Attributes:
        sms: compute capabilities as numbers, e.g. (86, 89); TensorRT-RTX builds one engine for all. Empty: the local
            device, the only one that full TensorRT can build for.
        max_batch: the largest number of sequences that decode together.
        chunk: the largest number of tokens per prefill step.
        weight_streaming: allow weights to stay in host memory at run time.
        embed_plugins: store the library of plugins in the engine too.
    """

    sms: tuple[int, ...] = ()
    max_batch: int = 32
    chunk: int = 512
    weight_streaming: bool = False
    embed_plugins: bool = False

    def __post_init__(self) -> None:
        for name in ("max_batch", "chunk"):
            if getattr(self, name) < 1:
                raise ExportError(f"{name} is {getattr(self, name)}: give 1 or more")


@dataclass(frozen=True)
class GraphShape:
    """Properties of a graph that its engine's description needs."""

    context_length: Annotated[int, Range(1, (1 << 31) - 1)]
    kv: Annotated[str, OneOf((*KV_TYPES, "bfloat16"))]
    linears: Annotated[str, OneOf(("engine", "plugin"))] = "plugin"
    attention: Annotated[str, OneOf(("engine", "plugin"))] = "plugin"


def check_sms(library: Library, sms: Sequence[int]) -> None:
    """Check that this TensorRT can build for these compute capabilities.

    Raises:
        ExportError: it cannot; the message says for which it can, and what to do for others.
    """
    if library.edition == RTX:
        wrong = [sm for sm in sms if sm not in library.sms]
        if wrong or not sms:
            named = sm_names(wrong) or "no device"
            raise ExportError(
                f"TensorRT-RTX builds for SM {', '.join(map(str, library.sms))}, not for {named}: for these full "
                "TensorRT builds on the device itself, with `edgelm build BUNDLE`"
            )


def build_engine(
    library: Library,
    graph: Path,
    out: Path,
    shape: GraphShape,
    options: BuildOptions,
    plugins: PluginLibrary,
    sms: tuple[int, ...],
) -> EngineInfo:
    """Build the engine of `graph` into the file `out`.

    `graph` is a file that `edgelm.export.tensorrt.graph.ParserGraph` wrote, with its weights in the same folder. `sms`
    goes into the description: the options' own for TensorRT-RTX, the local device for full TensorRT.

    Raises:
        ExportError: the parser or the builder fails; the message has its reasons.
    """
    if shape.attention == "engine" and library.older_than(*_OWN_ATTENTION):
        raise ExportError(
            f"{graph.name} has TensorRT's own attention, whose cache needs TensorRT {'{}.{}'.format(*_OWN_ATTENTION)}, "
            f"and {library.version} is installed: export the bundle again without --attention engine"
        )
    if not library.can_parse:
        raise ExportError(
            "tensorrt_rtx was imported before EdgeLM could load its library under the name that its parser opens: "
            "build in a new process, for example with `edgelm build`"
        )
    start = time.monotonic()
    messages(library).take()
    plugins.take_failure()
    _build(library, graph, out, shape, options, plugins, sms)
    specs = plugins_in(out)
    return EngineInfo(
        file=out.name,
        flavour=library.edition,
        version=library.version,
        sms=sms,
        plugins=EMBEDDED if options.embed_plugins else LIBRARY,
        max_batch=options.max_batch,
        chunk=options.chunk,
        context_length=shape.context_length,
        kv=shape.kv,
        weight_streaming=options.weight_streaming,
        operators=count_operators(specs),
        seconds=round(time.monotonic() - start, 1),
        linears=shape.linears,
        attention=shape.attention,
    )


def _build(
    library: Library,
    graph: Path,
    out: Path,
    shape: GraphShape,
    options: BuildOptions,
    plugins: PluginLibrary,
    sms: tuple[int, ...],
) -> None:
    """Build and write the engine's file; see `build_engine`."""
    api = library.api
    log = messages(library)
    builder = api.Builder(log.logger)
    plugins.load_into(builder.get_plugin_registry(), f"{TITLES[library.edition]} {library.version}")
    network = builder.create_network(_strongly_typed(api))
    parser = api.OnnxParser(network, log.logger)
    if not parser.parse_from_file(str(graph)):
        reasons = [_reason(parser.get_error(i)) for i in range(parser.num_errors)]
        raise _refused(library, plugins, f"cannot read {graph.name}", _unread(library, reasons) or log.take())
    config = builder.create_builder_config()
    config.profiling_verbosity = api.ProfilingVerbosity.DETAILED
    if library.edition == RTX:
        check_sms(library, options.sms)
        config.num_compute_capabilities = len(options.sms)
        for i, sm in enumerate(options.sms):
            config.set_compute_capability(getattr(api.ComputeCapability, f"SM{sm}"), i)
    # Outputs that alias an input: the caches.
    config.set_preview_feature(api.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    if options.weight_streaming:
        config.set_flag(api.BuilderFlag.WEIGHT_STREAMING)
    if options.embed_plugins:
        config.plugins_to_serialize = [str(plugins.path)]
    inputs = {network.get_input(i).name: tuple(network.get_input(i).shape) for i in range(network.num_inputs)}
    for ranges in profiles(inputs, shape, options):
        profile = builder.create_optimization_profile()
        for name, (low, best, high) in ranges.items():
            profile.set_shape(name, low, best, high)
        config.add_optimization_profile(profile)
    if not _write(api, builder, network, config, out):
        out.unlink()
        raise _refused(library, plugins, f"cannot build {graph.name} for {sm_names(sms) or 'this device'}", log.take())


def _write(api: Any, builder: Any, network: Any, config: Any, out: Path) -> bool:
    """Build the engine and write it into a file; return whether TensorRT built it.

    Raises:
        OSError: the file cannot be written; it is removed.
    """
    errors: list[OSError] = []
    try:
        with out.open("wb") as stream:
            # TensorRT writes by itself from 10.13 on. Older versions return the engine, which takes its size in memory.
            if hasattr(builder, "build_serialized_network_to_stream"):
                writer = _writer(api, stream.write, errors)
                done = builder.build_serialized_network_to_stream(network, config, writer)
            else:
                plan = builder.build_serialized_network(network, config)
                done = plan is not None
                if done:
                    stream.write(plan)
    except OSError as error:
        errors.append(error)
    if errors:
        out.unlink()
        raise errors[0]
    return bool(done)


def profiles(
    inputs: dict[str, Shape], shape: GraphShape, options: BuildOptions
) -> list[dict[str, tuple[Shape, Shape, Shape]]]:
    """Return the ranges of input shapes: first decoding (one token of up to `max_batch` sequences), then one chunk.

    Variable dimensions: B of all inputs, T of ids [B, T], C of caches [B, G, C, R].
    """
    context, chunk = shape.context_length, min(options.chunk, shape.context_length)
    steps = (((1, 1, options.max_batch), (1, 1, 1)), ((1, 1, 1), (1, chunk, chunk)))
    capacity = (min(64, context), context, context)
    made = []
    for batch, tokens in steps:
        ranges = {}
        for name, dims in inputs.items():
            three = []
            for i in range(3):
                known = list(dims)
                for axis, dim in enumerate(dims):
                    if dim < 0:
                        known[axis] = batch[i] if axis == 0 else tokens[i] if len(dims) == 2 else capacity[i]
                three.append(tuple(known))
            ranges[name] = (three[0], three[1], three[2])
        made.append(ranges)
    return made


def _strongly_typed(api: Any) -> int:
    return 1 << int(api.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def _writer(api: Any, write: Callable[[bytes], int], errors: list[OSError]) -> Any:
    class Writer(api.IStreamWriter):  # type: ignore[misc]  # the module has no types
        def __init__(self) -> None:
            api.IStreamWriter.__init__(self)

        def write(self, data: bytes) -> int:
            try:
                return int(write(data))
            except OSError as error:  # e.g. the disk is full: raised after the build has failed
                errors.append(error)
                return 0

    return Writer()


def _reason(error: Any) -> str:
    node = error.node_name()
    return f"{node}: {error.desc()}" if node else str(error.desc())


def _unread(library: Library, reasons: Sequence[str]) -> str:
    """Return the parser's reasons; for an older TensorRT also how to export a graph without ONNX's newer operators."""
    if reasons and library.older_than(11):
        reasons = [*reasons, "an older TensorRT reads bundles that were exported with --matmul plugin"]
    return "; ".join(reasons)


def _refused(library: Library, plugins: PluginLibrary, what: str, reasons: str) -> EdgeLMError:
    """Return the error to raise: that of a plugin, which says more than TensorRT's message, or a new one."""
    failure = plugins.take_failure()
    return failure or ExportError(f"{TITLES[library.edition]} {library.version} {what}: {reasons}")
