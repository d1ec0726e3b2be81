"""Our operators as TensorRT plugins: one class for all, told by its `PluginSpec` which node it is.

A plugin serialises to its spec and nothing else, so an engine is complete without our kernels: they come from the
bundle (cubins of the device, or PTX) when the engine is loaded, and the engine's own `Host` launches them. The caches
are results that lie in their inputs (`get_aliased_input`), which makes TensorRT write them in place.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any, TypeVar

import numpy as np

from edgelm.errors import DeviceError, EdgeLMError
from edgelm.runtimes.tensorrt.library import Library
from edgelm.runtimes.tensorrt.plugin_spec import (
    NAMESPACE,
    OPERATORS,
    PREFIX,
    VERSION,
    Dim,
    PluginSpec,
    Term,
    output_types,
    result_terms,
)

FIELD = "spec"
Result = TypeVar("Result")


class Host:
    """What runs the nodes of one engine's plugins: the kernels of a bundle on a device.

    Every plugin belongs to the host that was at work (`serving`) when TensorRT made it, and so do its clones: engines
    of several models live in one process. A host sizes nodes or runs them; see `edgelm.runtimes.tensorrt.host`.
    """

    def __init__(self) -> None:
        self._failure: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Whether a callback has raised since the failure was last taken."""
        return self._failure is not None

    def note(self, error: BaseException) -> None:
        """Keep the first exception of a callback. TensorRT reports none of it to its caller."""
        self._failure = self._failure or error

    def take_failure(self) -> BaseException | None:
        """The first failure of a callback, once."""
        failure, self._failure = self._failure, None
        return failure

    def workspace(self, spec: PluginSpec, shapes: Sequence[Sequence[int]], types: Sequence[str]) -> int:
        """Bytes of scratch memory of the node for inputs of at most these shapes, and of these types."""
        raise DeviceError(f"{spec.name}: this process runs an engine, it does not build one")

    def run(
        self,
        spec: PluginSpec,
        shapes: Sequence[tuple[int, ...]],
        types: Sequence[str],
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
        stream: int,
    ) -> None:
        """Launch the node on a stream; addresses of the inputs that it has and of the results."""
        raise DeviceError(f"{spec.name}: this process builds engines, it cannot run one")


# TensorRT keeps no reference to what is registered with it. And where Python frees plugins, a process that has built
# engines aborts now and then when it makes others: all of them, some kB each, stay.
_KEPT: list[Any] = []
# Whom plugins belong to that TensorRT makes now; it makes them itself, without arguments of ours.
_SERVING: list[Host] = []
_LOCK = threading.RLock()


@contextlib.contextmanager
def serving(library: Library, host: Host) -> Iterator[None]:
    """Make our operators known to TensorRT; the plugins that it makes until the end of this belong to `host`.

    One thread at a time makes plugins; running them needs no lock.
    """
    with _LOCK:
        _register_once(library)
        _SERVING.append(host)
        try:
            yield
        finally:
            _SERVING.pop()


@lru_cache(maxsize=2)
def _register_once(library: Library) -> None:
    registry = library.api.get_plugin_registry()
    for op in OPERATORS:
        made = creator_class(library.api)(op)
        if not registry.register_creator(made, NAMESPACE):
            raise EdgeLMError(f"{library.edition} {library.version} refuses the plugin {PREFIX}{op}")
        _KEPT.append(made)


def element_types(api: ModuleType) -> dict[Any, str]:
    """TensorRT's element types by our names."""
    names = {"FLOAT": "f32", "HALF": "f16", "BF16": "bf16", "INT8": "int8", "INT32": "int32", "UINT8": "uint8"}
    return {getattr(api.DataType, name): ours for name, ours in names.items()}


def _noted(method: Callable[..., Result]) -> Callable[..., Result]:
    """Keep what a plugin's callback raises: TensorRT prints it and fails without a reason, or goes on as if with 0."""

    @functools.wraps(method)
    def call(plugin: Any, *args: Any) -> Result:
        try:
            return method(plugin, *args)
        except BaseException as error:
            plugin.host.note(error)
            raise

    return call


@lru_cache(maxsize=2)
def creator_class(api: ModuleType) -> type[Any]:
    """The class of creators; one creator for each operator."""

    class Creator(api.IPluginCreatorV3One):  # type: ignore[misc,name-defined]  # the module has no types
        def __init__(self, op: str) -> None:
            api.IPluginCreatorV3One.__init__(self)
            self.name = f"{PREFIX}{op}"
            self.plugin_namespace = NAMESPACE
            self.plugin_version = VERSION
            empty = api.PluginField(FIELD, np.array([], np.int8), api.PluginFieldType.CHAR)
            self.field_names = api.PluginFieldCollection([empty])

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            """A plugin of a node of a graph, or of an engine."""
            del phase
            assert _SERVING, "plugins are made while `serving` a host"
            host = _SERVING[-1]
            try:
                text = next((bytes(np.asarray(f.data, np.int8)) for f in fields if f.name == FIELD), b"")
                if not text:
                    raise EdgeLMError(f"{name}: the plugin {self.name} has no field {FIELD!r}")
                return plugin_class(api)(PluginSpec.from_text(text.rstrip(b"\0").decode()), host)
            except BaseException as error:
                host.note(error)
                raise

    return Creator


@lru_cache(maxsize=2)
def plugin_class(api: ModuleType) -> type[Any]:
    """The class of plugins for a TensorRT module."""
    names = element_types(api)
    types = {ours: theirs for theirs, ours in names.items()}

    class Plugin(api.IPluginV3, api.IPluginV3OneCore, api.IPluginV3OneBuildV2, api.IPluginV3OneRuntime):  # type: ignore[misc,name-defined]
        def __init__(self, spec: PluginSpec, host: Host) -> None:
            for base in (api.IPluginV3, api.IPluginV3OneCore, api.IPluginV3OneBuildV2, api.IPluginV3OneRuntime):
                base.__init__(self)
            self.spec = spec
            self.host = host
            self.plugin_name = f"{PREFIX}{spec.op}"
            self.plugin_namespace = NAMESPACE
            self.plugin_version = VERSION
            self.num_outputs = spec.outputs
            self._places = [i for i, there in enumerate(spec.present) if there]
            self._text = np.frombuffer(spec.to_text().encode(), np.int8).copy()
            _KEPT.append(self)

        def get_capability_interface(self, kind: Any) -> Any:
            """The class has all of them."""
            del kind
            return self

        def clone(self) -> Any:
            """Another plugin of the same node and host."""
            return Plugin(self.spec, self.host)

        # -- building ----------------------------------------------------------------------------------------------

        @_noted
        def get_output_data_types(self, inputs: Sequence[Any]) -> list[Any]:
            """Types of the results."""
            return [types[name] for name in output_types(self.spec, [names[given] for given in inputs])]

        @_noted
        def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], builder: Any) -> list[Any]:
            """Shapes of the results, as TensorRT's expressions."""
            del shape_inputs
            places = self.spec.spread(inputs)

            def expression(term: Term) -> Any:
                if isinstance(term, int):
                    return builder.constant(term)
                dims = (term,) if isinstance(term, Dim) else term
                found = [places[dim.input][dim.axis] for dim in dims]
                return functools.reduce(lambda a, b: builder.operation(api.DimensionOperation.PROD, a, b), found)

            results = []
            for shape in result_terms(self.spec):
                result = api.DimsExprs(len(shape))
                for axis, term in enumerate(shape):
                    result[axis] = expression(term)
                results.append(result)
            return results

        def get_aliased_input(self, output: int) -> int:
            """The input that a result lies in, -1 for one of its own."""
            place = OPERATORS[self.spec.op].aliases.get(output)
            return -1 if place is None else self._places.index(place)

        @_noted
        def supports_format_combination(self, position: int, tensors: Sequence[Any], inputs: int) -> bool:
            """Row-major everywhere, and results of the types that the node has."""
            tensor = tensors[position].desc
            if tensor.format != api.TensorFormat.LINEAR:
                return False
            if position < inputs:
                return tensor.type in names
            wanted = output_types(self.spec, [names[t.desc.type] for t in tensors[:inputs]])
            return names.get(tensor.type) == wanted[position - inputs]

        def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            """Nothing depends on it."""

        def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
            """Scratch memory for the largest shapes of a profile."""
            del outputs
            shapes = [tuple(tensor.max) for tensor in inputs]
            try:
                return self.host.workspace(self.spec, shapes, [names[tensor.desc.type] for tensor in inputs])
            except Exception as error:  # raised by the builder when it has looked at the host
                self.host.note(error)
                return 0

        def get_valid_tactics(self) -> list[int]:
            """None besides the default: the launch code chooses by shape."""
            return []

        # -- running -----------------------------------------------------------------------------------------------

        def get_fields_to_serialize(self) -> Any:
            """The spec's text."""
            return api.PluginFieldCollection([api.PluginField(FIELD, self._text, api.PluginFieldType.CHAR)])

        def set_tactic(self, tactic: int) -> None:
            """There is one."""

        def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            """Shapes come with every call."""

        def attach_to_context(self, context: Any) -> Any:
            """A plugin of its own for each execution context."""
            del context
            return self.clone()

        @_noted
        def enqueue(
            self,
            input_descriptions: Sequence[Any],
            output_descriptions: Sequence[Any],
            inputs: Sequence[int],
            outputs: Sequence[int],
            workspace: int,
            stream: int,
        ) -> None:
            """Launch the node's kernels."""
            del output_descriptions
            for result, place in OPERATORS[self.spec.op].aliases.items():
                if result < len(outputs) and outputs[result] != inputs[self._places.index(place)]:
                    raise DeviceError(
                        f"{self.spec.name}: TensorRT gave the cache another place to write than to read, which would "
                        "lose it: this version of TensorRT cannot be used; use the runtime cuda-kernels"
                    )
            self.host.run(
                self.spec,
                [tuple(d.dims) for d in input_descriptions],
                [names[d.type] for d in input_descriptions],
                inputs,
                outputs,
                workspace,
                stream,
            )

    return Plugin
