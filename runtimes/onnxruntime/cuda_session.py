"""Sessions of ONNX Runtime on an NVIDIA GPU, with checks of all requirements and one-line errors.

If a provider lacks a kernel, ONNX Runtime silently runs the node on the CPU. This costs two copies over the bus per
token and computes in another type. Here it is an error that names the node.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import io
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgelm.errors import BundleError, DeviceError, DeviceMemoryError, EdgeLMError, RuntimeUnavailableError
from edgelm.installing import install_hint
from edgelm.runtimes.cuda.driver import chosen_index, find_devices
from edgelm.runtimes.onnxruntime.session import create_session, first_line, import_onnxruntime

if TYPE_CHECKING:
    import onnxruntime  # type: ignore[import-untyped]  # it has no type information

    from edgelm.bundle import Bundle

PROVIDER = "CUDAExecutionProvider"
OLDEST = (7, 5)
"""The lowest compute capability for which the provider has an MoE kernel."""

# Libraries that the provider is linked with. It opens cuDNN and cuFFT only for operators that we do not use.
_LIBRARIES = ("libcudart.so.{0}", "libcublas.so.{0}", "libcublasLt.so.{0}", "libcurand.so.10")
_MEMORY = ("out of memory", "Failed to allocate memory", "CUDA failure 2:", "CUBLAS_STATUS_ALLOC_FAILED")
_NO_KERNEL = ("no kernel image is available", "CUDA failure 209:")
ON_HOST = frozenset({"total/Gather", "total_sequence_length_int32/Cast"})
"""Nodes that must run on the CPU: they read the mask's length, a shape, which attention needs on the host."""
_SHOWN = 4


def problem() -> str | None:
    """Return in one line why no bundle for CUDA can run here; None if nothing is known to be missing."""
    try:
        require_cuda()
    except EdgeLMError as error:
        return str(error)
    return None


def require_cuda() -> tuple[Any, int]:
    """Return ONNX Runtime with its CUDA provider, and the number of the GPU to use.

    Raises:
        RuntimeUnavailableError: the package or a library is missing.
        DeviceError: there is no driver or no GPU, or the GPU is too old.
    """
    ort = import_onnxruntime()
    if PROVIDER not in ort.get_available_providers():
        raise RuntimeUnavailableError(_without_provider(ort.__version__))
    devices = find_devices()
    index = chosen_index(len(devices))
    device = devices[index]
    if device.capability < OLDEST:
        raise DeviceError(
            f"{device.name} has compute capability {'{}.{}'.format(*device.capability)}, ONNX Runtime's kernels need "
            f"{'{}.{}'.format(*OLDEST)} or newer: use a bundle for the target cpu"
        )
    _preload(ort)
    return ort, index


def _without_provider(version: str) -> str:
    if _installed("onnxruntime") and _installed("onnxruntime-gpu"):
        return (
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: "
            f"pip uninstall onnxruntime onnxruntime-gpu, then {install_hint('cuda')}"
        )
    return (
        f"onnxruntime {version} was built without CUDA: pip uninstall onnxruntime, then {install_hint('cuda')} "
        "(the package onnxruntime-gpu, which also runs bundles for the CPU)"
    )


def _installed(distribution: str) -> bool:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version(distribution)
        return True
    return False


def _preload(ort: Any) -> None:
    """Load CUDA's libraries, preferring those that pip installed.

    Raises:
        RuntimeUnavailableError: a library is missing.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the libraries that it does not find
        ort.preload_dlls()
    major = str(ort.cuda_version).split(".")[0]
    for name in (pattern.format(major) for pattern in _LIBRARIES):
        try:
            ctypes.CDLL(name)
        except OSError as error:
            raise RuntimeUnavailableError(
                f"ONNX Runtime's CUDA provider needs {name}, which cannot be loaded ({error}): "
                f"{install_hint('cuda')} installs CUDA {major}, or add an installed one to LD_LIBRARY_PATH"
            ) from error


@contextlib.contextmanager
def _quiet(ort: Any) -> Iterator[None]:
    """Silence ONNX Runtime's log inside, since errors are raised as exceptions."""
    ort.set_default_logger_severity(4)
    try:
        yield
    finally:
        ort.set_default_logger_severity(2)


def cuda_session(bundle: Bundle, file: str, threads: int, *, capture: bool = False) -> onnxruntime.InferenceSession:
    """Load one of the bundle's graphs so that all of it runs on the GPU.

    `capture`: the provider captures the launches of a run as a CUDA graph and replays them, unless the run options set
    `gpu_graph_id` to -1.

    Raises:
        RuntimeUnavailableError, DeviceError: a requirement is missing, or a node would run elsewhere.
        BundleError: the graph cannot be loaded.
    """
    ort, index = require_cuda()
    # TF32 would reduce the router's float32 matmul to 10 bits.
    options = {"device_id": str(index), "use_tf32": "0", "enable_cuda_graph": str(int(capture))}
    try:
        with _quiet(ort):
            session = create_session(bundle, file, threads, record_placement, ((PROVIDER, options),))
    except BundleError as error:
        raise (device_error(error.__cause__, f"loading {file}") or error) from error
    if PROVIDER not in session.get_providers():
        raise RuntimeUnavailableError(
            "ONNX Runtime could not start its CUDA provider and fell back to the CPU: set ORT_LOGGING_LEVEL=1 to "
            "see why, and compare its CUDA version with the driver's (nvidia-smi)"
        )
    session.disable_fallback()
    check_placement(session, PROVIDER, f"{file} of {bundle.path}")
    return session


@dataclass(frozen=True)
class Placed:
    """A node of the optimised graph and the provider that runs it."""

    name: str
    op: str
    provider: str

    def __str__(self) -> str:
        return f"{self.name or 'a node without a name'} ({self.op})"


def record_placement(options: Any) -> None:
    """Set the session option that makes `placement` available."""
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")


def placement(session: onnxruntime.InferenceSession) -> list[Placed]:
    """Return every node of a session that was created with `record_placement`."""
    return [
        Placed(node.name, f"{node.domain or 'ai.onnx'}.{node.op_type}", part.ep_name)
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    ]


def check_placement(
    session: onnxruntime.InferenceSession, provider: str, graph: str, allowed: Collection[str] = ON_HOST
) -> None:
    """Check that a session's nodes run on `provider`, except those whose names are in `allowed`.

    Raises:
        RuntimeUnavailableError: some do not; the message has the nodes and their operators.
    """
    nodes = placement(session)
    if not nodes:
        raise RuntimeUnavailableError(
            f"ONNX Runtime does not report where the nodes of {graph} run: install another version of it"
        )
    elsewhere = [node for node in nodes if node.provider != provider and node.name not in allowed]
    if elsewhere:
        shown = ", ".join(map(str, elsewhere[:_SHOWN]))
        more = f" and {len(elsewhere) - _SHOWN} more" if len(elsewhere) > _SHOWN else ""
        raise RuntimeUnavailableError(
            f"{provider} has no kernel for {len(elsewhere)} of {len(nodes)} nodes of {graph}, which "
            f"{', '.join(sorted({node.provider for node in elsewhere}))} would run instead: {shown}{more}; export the "
            "bundle again with this version of EdgeLM, or install another version of ONNX Runtime"
        )


def device_error(error: BaseException | None, doing: str) -> EdgeLMError | None:
    """Convert an error of ONNX Runtime to one about the GPU; None if it is about something else."""
    text = "" if error is None else str(error)
    if any(words in text for words in _MEMORY):
        return DeviceMemoryError(
            f"the GPU ran out of memory when {doing}: end what else uses it (nvidia-smi shows it), or use a shorter "
            "context, smaller chunks or a recipe with fewer bits"
        )
    if any(words in text for words in _NO_KERNEL):
        return DeviceError(
            f"this version of onnxruntime-gpu has no code for this GPU (when {doing}): install one that has, or "
            "export with --target tensorrt"
        )
    if isinstance(error, Exception) and ("CUDA failure" in text or "CUBLAS failure" in text):
        return DeviceError(f"the GPU failed when {doing}: {first_line(error)}")
    return None
