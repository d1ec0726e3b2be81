"""List of all runtimes, and the choice of one for a bundle. To add one: an entry in `_ENTRIES` and a module."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from edgelm.devices import thread_problem
from edgelm.errors import ArgumentTypeError, ArgumentValueError, DeviceError, RuntimeUnavailableError
from edgelm.generation.sampling import is_integer
from edgelm.installing import install_hint
from edgelm.runtimes.base import Runtime, SequenceBatch

if TYPE_CHECKING:
    from edgelm.bundle import Bundle
    from edgelm.runtimes.tracing import TracingModel


@dataclass(frozen=True)
class RuntimeEntry:
    """A runtime: its name, classes, targets and requirements.

    Attributes:
        name: the name for users.
        classes: for each operator set that it supports, the subclass of `Runtime` as "module:class". It is imported
            when needed, and called with the bundle and the options that were given. Its `batch_class` and
            `tracing_class`, if any, are called in the same way (the former also with the number of sequences).
        targets: targets of the bundles that it runs.
        requires: the Python package that it needs.
        options: names of its options.
        summary: one line for users.
        extras: extras of EdgeLM that install the package, any of them.
        instead: packages that can replace `requires`.
        compatibility: a module with `compatible(bundle) -> bool`, imported without the package. If no runtime is named,
            an entry that is not compatible is skipped when there is another.
        only_by_name: it is chosen only if it is named.
        checking: a module with `problem() -> str | None`: why it cannot run here although its package is installed.
    """

    name: str
    classes: Mapping[str, str]
    targets: tuple[str, ...]
    requires: str
    options: tuple[str, ...]
    summary: str
    extras: tuple[str, ...] = ()
    instead: tuple[str, ...] = ()
    compatibility: str = ""
    only_by_name: bool = False
    checking: str = ""

    @property
    def package(self) -> str | None:
        """The installed package that it uses; None if there is none."""
        return next((name for name in (self.requires, *self.instead) if importlib.util.find_spec(name)), None)

    @property
    def available(self) -> bool:
        """Whether the package that it needs is installed."""
        return self.package is not None

    @property
    def install(self) -> str:
        """The command that installs its requirements."""
        return " or ".join(map(install_hint, self.extras)) or install_hint()

    def problem(self) -> str | None:
        """Return why it cannot run here although its package is installed; None if no problem is known."""
        if not self.available or not self.checking:
            return None
        why: str | None = importlib.import_module(self.checking).problem()
        return why

    def compatible(self, bundle: Bundle) -> bool:
        """Whether it can run this bundle on this device, as far as is known without loading it."""
        return not self.compatibility or bool(importlib.import_module(self.compatibility).compatible(bundle))


_ENTRIES = (
    RuntimeEntry(
        name="onnxruntime-cpu",
        classes={
            "native": "edgelm.runtimes.onnxruntime.native:NativeRuntime",
            "portable": "edgelm.runtimes.onnxruntime.portable:PortableRuntime",
        },
        targets=("cpu",),
        requires="onnxruntime",
        extras=("cpu",),
        options=("threads", "context_length", "chunk", "kv"),
        summary="ONNX Runtime on the CPU",
    ),
    RuntimeEntry(
        name="onnxruntime-cuda",
        classes={"portable": "edgelm.runtimes.onnxruntime.cuda:OnnxCudaRuntime"},
        targets=("cuda",),
        requires="onnxruntime",
        extras=("cuda",),
        options=("threads", "context_length", "chunk", "kv"),
        summary="ONNX Runtime's CUDA provider on an NVIDIA GPU",
        checking="edgelm.runtimes.onnxruntime.cuda_session",
    ),
    RuntimeEntry(
        name="tensorrt",
        classes={"gpu": "edgelm.runtimes.tensorrt.runtime:TensorRtRuntime"},
        targets=("tensorrt",),
        requires="tensorrt",
        instead=("tensorrt_rtx",),
        extras=("tensorrt-rtx", "tensorrt"),
        options=("context_length", "chunk", "kv", "weight_memory"),
        summary="TensorRT or TensorRT-RTX with our plugins on an NVIDIA GPU",
        compatibility="edgelm.runtimes.tensorrt.engine",
    ),
    RuntimeEntry(
        name="cuda-kernels",
        classes={"gpu": "edgelm.runtimes.cuda.model:CudaRuntime"},
        targets=("tensorrt",),
        requires="numpy",
        options=("threads", "context_length", "chunk", "kv"),
        summary="EdgeLM's own kernels on an NVIDIA GPU; needs only the driver",
    ),
    RuntimeEntry(
        name="cuda-emulated",
        classes={"gpu": "edgelm.runtimes.cuda.model:EmulatedRuntime"},
        targets=("tensorrt",),
        requires="numpy",
        options=("threads", "context_length", "chunk", "kv"),
        summary="the same kernels emulated on the CPU, for checks; thousands of times slower",
        only_by_name=True,
    ),
)


def runtimes() -> tuple[RuntimeEntry, ...]:
    """Return all runtimes, best first, available here or not."""
    return _ENTRIES


def engine_of(name: str) -> str | None:
    """Return the package that the loaded runtime `name` computes with, and its version, such as "onnxruntime 1.31.1".

    None for EdgeLM's own kernels, and where no bundle was opened with it.
    """
    entry = next(entry for entry in _ENTRIES if entry.name == name)
    if entry.requires == "numpy":
        return None
    for package in (entry.requires, *entry.instead):
        version = getattr(sys.modules.get(package), "__version__", None)
        if version is not None:
            return f"{package} {version}"
    return None


def _choose(bundle: Bundle, name: str | None) -> RuntimeEntry:
    target = bundle.manifest.target
    if name is not None:
        entry = next((entry for entry in _ENTRIES if entry.name == name), None)
        if entry is None:
            valid = ", ".join(entry.name for entry in _ENTRIES)
            raise RuntimeUnavailableError(f"there is no runtime {name!r}; there are: {valid}")
        if target not in entry.targets:
            raise RuntimeUnavailableError(
                f"{bundle.path} was exported for {target}, but {name} runs {', '.join(entry.targets)}: "
                f"export with --target {entry.targets[0]}, or leave the choice of runtime out"
            )
        candidates = [entry]
    else:
        candidates = [entry for entry in _ENTRIES if target in entry.targets and not entry.only_by_name]
        if not candidates:
            known = sorted({target for entry in _ENTRIES for target in entry.targets})
            raise RuntimeUnavailableError(
                f"{bundle.path} was exported for {target}, which no runtime here runs (they run {', '.join(known)})"
            )
    found = [entry for entry in candidates if entry.available]
    if len(found) > 1:
        # The last one is not asked: if it cannot run the bundle, its own error message says more.
        return next((entry for entry in found[:-1] if entry.compatible(bundle)), found[-1])
    if found:
        return found[0]
    ways = " or ".join(f"{entry.install} (for {entry.name})" for entry in candidates)
    raise RuntimeUnavailableError(f"nothing installed can run {bundle.path}: {ways}")


def _runtime_class(entry: RuntimeEntry, bundle: Bundle) -> type[Runtime]:
    ops = bundle.manifest.ops
    if ops not in entry.classes:
        raise RuntimeUnavailableError(
            f"{bundle.path} has {ops} operators, but {entry.name} runs {', '.join(entry.classes)}: upgrade edgelm, or "
            "export the bundle again"
        )
    module, _, name = entry.classes[ops].partition(":")
    found: type[Runtime] = getattr(importlib.import_module(module), name)
    return found


def open_tracing(bundle: Bundle, name: str, *, threads: int | None = None) -> TracingModel | None:
    """Load the debug graph into the runtime `name`; None if it does not support it. Raises as `open_runtime`."""
    if threads is not None:
        _check_option("threads", threads)
    tracing: Callable[..., TracingModel] | None = _runtime_class(_choose(bundle, name), bundle).tracing_class
    return None if tracing is None else tracing(bundle, threads=threads)


def open_batch(bundle: Bundle, batch: int, name: str | None = None, **options: int | str | None) -> SequenceBatch:
    """Load `bundle` for `batch` sequences that decode together; options and errors as in `open_runtime`.

    Raises:
        RuntimeUnavailableError: also if the bundle's operators run only one sequence at a time.
    """
    _check_option("batch", batch)
    entry = _choose(bundle, name)
    batch_class: Callable[..., SequenceBatch] | None = _runtime_class(entry, bundle).batch_class
    if batch_class is None:
        raise RuntimeUnavailableError(
            f"{bundle.path} has {bundle.manifest.ops} operators, with which {entry.name} runs one sequence at a time: "
            "export with --ops native"
        )
    given = _given(entry, options)
    with _gpu_explained(bundle):
        return batch_class(bundle, batch, **given)


@contextlib.contextmanager
def _gpu_explained(bundle: Bundle) -> Iterator[None]:
    """For a bundle for a GPU, mention this in errors about missing requirements.

    Raises:
        RuntimeUnavailableError, DeviceError: as raised inside.
    """
    try:
        yield
    except (RuntimeUnavailableError, DeviceError) as error:
        if bundle.manifest.target == "cpu" or type(error) not in (RuntimeUnavailableError, DeviceError):
            raise
        raise type(error)(f"{bundle.path} was exported for an NVIDIA GPU: {error}") from error


def _given(entry: RuntimeEntry, options: Mapping[str, int | str | None]) -> dict[str, int | str]:
    known = {option for other in _ENTRIES for option in other.options}
    for option, value in options.items():
        if option not in entry.options and (value is not None or option not in known):
            raise ArgumentTypeError(f"{entry.name} has no option {option!r}; it has: {', '.join(entry.options)}")
        if value is not None:
            _check_option(option, value)
    given = {option: value for option, value in options.items() if value is not None}
    return {option: value if isinstance(value, str) else int(value) for option, value in given.items()}


def _check_option(option: str, value: object) -> None:
    """Check an option's type and range, which are the same for every runtime.

    Raises:
        ArgumentTypeError, ArgumentValueError: the value is not allowed.
    """
    if option == "kv":
        if not isinstance(value, str):
            raise ArgumentTypeError(f"kv is {value!r:.60}: it has to be the name of a type, e.g. int8")
        return
    # The model checks its context length itself.
    least, most = (-math.inf, math.inf) if option == "context_length" else (1, 2**63 - 1)
    right_type = is_integer(value)
    if not right_type or not least <= cast("int", value) <= most:
        kind = ArgumentValueError if right_type else ArgumentTypeError
        raise kind(f"{option} is {value!r:.60}: it has to be an integer, 1 or more")
    why = thread_problem(cast("int", value)) if option == "threads" else None
    if why is not None:
        raise ArgumentValueError(why)


def open_runtime(bundle: Bundle, name: str | None = None, **options: int | str | None) -> Runtime:
    """Load `bundle` into the runtime `name`, or the best available one for the bundle's target.

    Options that are None have the runtime's default. `threads`: CPU threads, default the physical cores that this
    process may use. `context_length`: positions to allocate, default the model's, at most 4096. `chunk`: tokens per
    prefill step. `kv`: type of the KV cache, for bundles with native operators one of
    `edgelm.bundle.kv_cache.KV_TYPES`, default the bundle's. `weight_memory`: bytes of weights that a TensorRT engine
    may keep in the GPU's memory.

    Raises:
        RuntimeUnavailableError: the runtime does not exist, cannot run this bundle, or its package is not installed.
        ArgumentTypeError: the runtime does not have an option, or an option has the wrong type.
        ArgumentValueError: an option is out of range.
        BundleError: the graph cannot be loaded.
    """
    entry = _choose(bundle, name)
    runtime_class: Callable[..., Runtime] = _runtime_class(entry, bundle)
    given = _given(entry, options)
    with _gpu_explained(bundle):
        return runtime_class(bundle, **given)
