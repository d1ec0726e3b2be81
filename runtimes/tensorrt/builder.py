"""From a bundle's graph for TensorRT to an engine; needs TensorRT and numpy, no GPU where TensorRT-RTX builds.

The parser maps the weights from the file and the engine is written as it is built, so neither is in memory as a whole.
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
from edgelm.runtimes.tensorrt.engine_info import PYTHON, EngineInfo, count_operators, plugins_in, sm_names
from edgelm.runtimes.tensorrt.library import RTX, TITLES, Library, messages
from edgelm.runtimes.tensorrt.plugins import Host, serving

Shape = tuple[int, ...]


@dataclass(frozen=True)
class BuildOptions:
    """How to build.

    Attributes:
        sms: compute capabilities, each two or three digits, e.g. (86, 89); TensorRT-RTX makes one engine for all.
            Empty: of the device at hand, the only ones that full TensorRT builds for.
        max_batch: sequences that decode together at most.
        chunk: tokens of a prefill step at most.
        weight_streaming: let weights stay in host memory at run time.
    """

    sms: tuple[int, ...] = ()
    max_batch: int = 32
    chunk: int = 512
    weight_streaming: bool = False

    def __post_init__(self) -> None:
        for name in ("max_batch", "chunk"):
            if getattr(self, name) < 1:
                raise ExportError(f"{name} is {getattr(self, name)}: give 1 or more")


@dataclass(frozen=True)
class GraphShape:
    """What an engine has to be told of a graph besides the graph."""

    context_length: Annotated[int, Range(1, (1 << 31) - 1)]
    kv: Annotated[str, OneOf((*KV_TYPES, "bfloat16"))]
    linears: Annotated[str, OneOf(("engine", "plugin"))] = "plugin"
    attention: Annotated[str, OneOf(("engine", "plugin"))] = "plugin"


def check_sms(library: Library, sms: Sequence[int]) -> None:
    """Refuse compute capabilities that this TensorRT does not build for.

    Raises:
        ExportError: says which do, and how the others get their engine.
    """
    if library.edition == RTX:
        wrong = [sm for sm in sms if sm not in library.sms]
        if wrong or not sms:
            named = sm_names(wrong) or "no device"
            raise ExportError(
                f"TensorRT-RTX builds for SM {', '.join(map(str, library.sms))}, not for {named}: for others full "
                "TensorRT builds on the device itself, with `edgelm build BUNDLE`"
            )


def build_engine(
    library: Library, graph: Path, out: Path, shape: GraphShape, options: BuildOptions, host: Host, sms: tuple[int, ...]
) -> EngineInfo:
    """Build the engine of `graph` into the file `out`.

    `graph` is a file that `edgelm.export.tensorrt.graph.parser_graph` made, with its weights beside it; `sms` is what
    the description is to say: of TensorRT-RTX the options' own, of full TensorRT the device at hand.

    Raises:
        ExportError: the parser or the builder refuses, with its reasons.
    """
    if not library.can_parse:
        raise ExportError(
            "tensorrt_rtx was imported before EdgeLM could make its library known under the name that its parser "
            "opens: build in a process of its own, for example with `edgelm build`"
        )
    start = time.monotonic()
    messages(library).take()
    host.take_failure()
    with serving(library, host):
        _build(library, graph, out, shape, options, host, sms)
    specs = plugins_in(out)
    return EngineInfo(
        file=out.name,
        flavour=library.edition,
        version=library.version,
        sms=sms,
        plugins=PYTHON,
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
    library: Library, graph: Path, out: Path, shape: GraphShape, options: BuildOptions, host: Host, sms: tuple[int, ...]
) -> None:
    """Write the engine's file; see `build_engine`."""
    api = library.api
    log = messages(library)
    builder = api.Builder(log.logger)
    network = builder.create_network(_strongly_typed(api))
    parser = api.OnnxParser(network, log.logger)
    if not parser.parse_from_file(str(graph)):
        reasons = [_reason(parser.get_error(i)) for i in range(parser.num_errors)]
        raise _refused(library, host, f"cannot read {graph.name}", "; ".join(reasons) or log.take())
    config = builder.create_builder_config()
    config.profiling_verbosity = api.ProfilingVerbosity.DETAILED
    if library.edition == RTX:
        check_sms(library, options.sms)
        config.num_compute_capabilities = len(options.sms)
        for i, sm in enumerate(options.sms):
            config.set_compute_capability(getattr(api.ComputeCapability, f"SM{sm}"), i)
    # Results that lie in an input: the caches.
    config.set_preview_feature(api.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    if options.weight_streaming:
        config.set_flag(api.BuilderFlag.WEIGHT_STREAMING)
    inputs = {network.get_input(i).name: tuple(network.get_input(i).shape) for i in range(network.num_inputs)}
    for ranges in profiles(inputs, shape, options):
        profile = builder.create_optimization_profile()
        for name, (low, best, high) in ranges.items():
            profile.set_shape(name, low, best, high)
        config.add_optimization_profile(profile)
    with out.open("wb") as stream:
        done = builder.build_serialized_network_to_stream(network, config, _writer(api, stream.write, host))
    # What a callback raises does not always stop TensorRT.
    if not done or host.failed:
        out.unlink()
        raise _refused(library, host, f"cannot build {graph.name} for {sm_names(sms) or 'this device'}", log.take())


def profiles(
    inputs: dict[str, Shape], shape: GraphShape, options: BuildOptions
) -> list[dict[str, tuple[Shape, Shape, Shape]]]:
    """The ranges of the inputs' shapes: first decoding (one token of up to `max_batch` sequences), then a chunk of one.

    The first dimension is sequences; that of ids [B, T] behind it tokens, that of a cache [B, G, C, R] positions.
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


def _writer(api: Any, write: Callable[[bytes], int], host: Host) -> Any:
    class Writer(api.IStreamWriter):  # type: ignore[misc]  # the module has no types
        def __init__(self) -> None:
            api.IStreamWriter.__init__(self)

        def write(self, data: bytes) -> int:
            try:
                return int(write(data))
            except OSError as error:  # the disk is full: said after the build has failed
                host.note(error)
                return 0

    return Writer()


def _reason(error: Any) -> str:
    node = error.node_name()
    return f"{node}: {error.desc()}" if node else str(error.desc())


def _refused(library: Library, host: Host, what: str, reasons: str) -> EdgeLMError | OSError:
    """The error to raise: what failed in a callback of ours says more than what TensorRT makes of it."""
    failure = host.take_failure()
    if isinstance(failure, EdgeLMError | OSError):
        return failure
    if failure is not None:
        raise failure  # a bug of ours, with its traceback
    return ExportError(f"{TITLES[library.edition]} {library.version} {what}: {reasons}")
