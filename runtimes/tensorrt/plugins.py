"""Our operators as TensorRT plugins: one class for all, whose `PluginSpec` describes the node.

A plugin serialises to its spec only, so an engine is complete without our kernels: these come from the bundle (cubins
for the device, or PTX) when the engine is loaded, and the engine's `Host` launches them. The caches are outputs that
alias their inputs (`get_aliased_input`), so TensorRT updates them in place.
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
    """Sizes or runs the nodes of one engine's plugins, with a bundle's kernels on a device.

    A plugin and its clones belong to the host that was active (`serving`) when TensorRT created it, since a process may
    have engines of several models. See `edgelm.runtimes.tensorrt.host`.
    """

    def __init__(self) -> None:
        self._failure: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Whether a callback has raised since `take_failure`."""
        return self._failure is not None

    def note(self, error: BaseException) -> None:
        """Keep the first exception of a callback, which TensorRT does not report to its caller."""
        self._failure = self._failure or error

    def take_failure(self) -> BaseException | None:
        """Return the first exception of a callback and forget it."""
        failure, self._failure = self._failure, None
        return failure

    def workspace(self, spec: PluginSpec, shapes: Sequence[Sequence[int]], types: Sequence[str]) -> int:
        """Return the node's bytes of scratch memory for inputs of at most these shapes and of these types."""
        raise DeviceError(f"{spec.name}: this process runs an engine and cannot build one")

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
        """Launch the node on a stream, given the addresses of its inputs and outputs."""
        raise DeviceError(f"{spec.name}: this process builds engines and cannot run one")


# TensorRT keeps no reference to registered objects. And if Python frees plugins after a build, creating others
# sometimes aborts the process. So all plugins are kept, some kB each.
_KEPT: list[Any] = []
# The host of plugins that TensorRT creates now; it creates them itself, without arguments from us.
_SERVING: list[Host] = []
_LOCK = threading.RLock()


@contextlib.contextmanager
def serving(library: Library, host: Host) -> Iterator[None]:
    """Register our operators with TensorRT. Plugins that it creates inside belong to `host`.

    Only one thread at a time may create plugins. Running them needs no lock.
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
            raise EdgeLMError(
                f"{library.edition} {library.version} refuses the plugin {PREFIX}{op}: install another version"
            )
        _KEPT.append(made)


def element_types(api: ModuleType) -> dict[Any, str]:
    """Return our names of TensorRT's element types."""
    names = {"FLOAT": "f32", "HALF": "f16", "BF16": "bf16", "INT8": "int8", "INT32": "int32", "UINT8": "uint8"}
    return {getattr(api.DataType, name): ours for name, ours in names.items()}


def _noted(method: Callable[..., Result]) -> Callable[..., Result]:
    """Decorate a plugin's callback to keep its exception, which TensorRT only prints before it fails or continues with
    0."""

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
    """Return the class of plugin creators; there is one creator per operator."""

    class Creator(api.IPluginCreatorV3One):  # type: ignore[misc,name-defined]  # the module has no types
        def __init__(self, op: str) -> None:
            api.IPluginCreatorV3One.__init__(self)
            self.name = f"{PREFIX}{op}"
            self.plugin_namespace = NAMESPACE
            self.plugin_version = VERSION
            empty = api.PluginField(FIELD, np.array([], np.int8), api.PluginFieldType.CHAR)
            self.field_names = api.PluginFieldCollection([empty])

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            """Create the plugin of a node of a graph or of an engine."""
            del phase
            assert _SERVING, "plugins must be created inside `serving`"
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
    """Return the class of plugins for a TensorRT module."""
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
            """Return self, which has all capabilities."""
            del kind
            return self

        def clone(self) -> Any:
            """Return another plugin of the same node and host."""
            return Plugin(self.spec, self.host)

        # -- building ----------------------------------------------------------------------------------------------

        @_noted
        def get_output_data_types(self, inputs: Sequence[Any]) -> list[Any]:
            """Return the types of the outputs."""
            return [types[name] for name in output_types(self.spec, [names[given] for given in inputs])]

        @_noted
        def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], builder: Any) -> list[Any]:
            """Return the shapes of the outputs, as TensorRT's expressions."""
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
            """Return the input that an output aliases, or -1."""
            place = OPERATORS[self.spec.op].aliases.get(output)
            return -1 if place is None else self._places.index(place)

        @_noted
        def supports_format_combination(self, position: int, tensors: Sequence[Any], inputs: int) -> bool:
            """Allow only row-major tensors, and outputs of the node's types."""
            tensor = tensors[position].desc
            if tensor.format != api.TensorFormat.LINEAR:
                return False
            if position < inputs:
                return tensor.type in names
            wanted = output_types(self.spec, [names[t.desc.type] for t in tensors[:inputs]])
            return names.get(tensor.type) == wanted[position - inputs]

        def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            """Do nothing: the plugin does not depend on it."""

        def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
            """Return the bytes of scratch memory for the largest shapes of a profile."""
            del outputs
            shapes = [tuple(tensor.max) for tensor in inputs]
            try:
                return self.host.workspace(self.spec, shapes, [names[tensor.desc.type] for tensor in inputs])
            except Exception as error:  # the builder raises it later
                self.host.note(error)
                return 0

        def get_valid_tactics(self) -> list[int]:
            """Return no tactics besides the default: the launch code chooses by shape."""
            return []

        # -- running -----------------------------------------------------------------------------------------------

        def get_fields_to_serialize(self) -> Any:
            """Return the spec's text."""
            return api.PluginFieldCollection([api.PluginField(FIELD, self._text, api.PluginFieldType.CHAR)])

        def set_tactic(self, tactic: int) -> None:
            """Do nothing: there is one tactic."""

        def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            """Do nothing: shapes come with every call."""

        def attach_to_context(self, context: Any) -> Any:
            """Return a clone for each execution context."""
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
                        f"{self.spec.name}: TensorRT did not alias the cache's output with its input, so updates would "
                        "be lost: use another version of TensorRT, or the runtime cuda-kernels"
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
