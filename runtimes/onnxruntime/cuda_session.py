"""Sessions of ONNX Runtime on an NVIDIA GPU: what has to be there, said in one line where it is not.

A provider without a kernel hands its nodes to the CPU, silently. Such a node costs two copies over the bus at every
token and computes in another type than was asked for; here it is an error that names it.
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
"""The oldest compute capability whose mixture of experts the provider has."""

# What the provider is linked with; it opens cuDNN and cuFFT when an operator wants them, which none of ours does.
_LIBRARIES = ("libcudart.so.{0}", "libcublas.so.{0}", "libcublasLt.so.{0}", "libcurand.so.10")
_MEMORY = ("out of memory", "Failed to allocate memory", "CUDA failure 2:", "CUBLAS_STATUS_ALLOC_FAILED")
_NO_KERNEL = ("no kernel image is available", "CUDA failure 209:")
ON_HOST = frozenset({"total/Gather", "total_sequence_length_int32/Cast"})
"""Nodes that belong on the CPU: they read the length of the mask, a shape, which attention wants on the host."""
_SHOWN = 4


def problem() -> str | None:
    """Why no bundle for CUDA can be run here, in one line; None where nothing is known to be missing."""
    try:
        require_cuda()
    except EdgeLMError as error:
        return str(error)
    return None


def require_cuda() -> tuple[Any, int]:
    """ONNX Runtime with its CUDA provider, and the number of the GPU to use.

    Raises:
        RuntimeUnavailableError: the package or a library is missing.
        DeviceError: no driver, no GPU, or one that is too old.
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
            f"{'{}.{}'.format(*OLDEST)} or newer: use a bundle for cpu here"
        )
    _preload(ort)
    return ort, index


def _without_provider(version: str) -> str:
    if _installed("onnxruntime") and _installed("onnxruntime-gpu"):
        return (
            "onnxruntime and onnxruntime-gpu are both installed, in one folder, and the one without CUDA is on top: "
            f"pip uninstall onnxruntime onnxruntime-gpu, then {install_hint('cuda')}"
        )
    return (
        f"onnxruntime {version} was built without CUDA: pip uninstall onnxruntime, then {install_hint('cuda')} "
        "(the package onnxruntime-gpu; it runs bundles for cpu as well)"
    )


def _installed(distribution: str) -> bool:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version(distribution)
        return True
    return False


def _preload(ort: Any) -> None:
    """Load CUDA's libraries, those that pip installed first.

    Raises:
        RuntimeUnavailableError: one is missing.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
        ort.preload_dlls()
    major = str(ort.cuda_version).split(".")[0]
    for name in (pattern.format(major) for pattern in _LIBRARIES):
        try:
            ctypes.CDLL(name)
        except OSError as error:
            raise RuntimeUnavailableError(
                f"ONNX Runtime's CUDA provider needs {name}, which cannot be loaded ({error}): "
                f"{install_hint('cuda')} brings CUDA {major}, or put an installed one on LD_LIBRARY_PATH"
            ) from error


@contextlib.contextmanager
def _quiet(ort: Any) -> Iterator[None]:
    """Without ONNX Runtime's own log of what an exception says, or what we say, anyway."""
    ort.set_default_logger_severity(4)
    try:
        yield
    finally:
        ort.set_default_logger_severity(2)


def cuda_session(bundle: Bundle, file: str, threads: int, *, capture: bool = False) -> onnxruntime.InferenceSession:
    """Load one of the bundle's graphs on the GPU, all of it.

    `capture`: have the provider capture the launches of a run and replay them, for run options that do not say
    `gpu_graph_id` -1.

    Raises:
        RuntimeUnavailableError, DeviceError: something is missing here, or a node would run elsewhere.
        BundleError: the graph cannot be loaded.
    """
    ort, index = require_cuda()
    # TF32 would leave the float32 products of the router 10 bits.
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
    """Have a session, of which these are the options, remember where its nodes go."""
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")


def placement(session: onnxruntime.InferenceSession) -> list[Placed]:
    """Every node of a session that was made with `record_placement`."""
    return [
        Placed(node.name, f"{node.domain or 'ai.onnx'}.{node.op_type}", part.ep_name)
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    ]


def check_placement(
    session: onnxruntime.InferenceSession, provider: str, graph: str, allowed: Collection[str] = ON_HOST
) -> None:
    """Refuse a session some of whose nodes another provider runs; `allowed` are names of nodes that it may.

    Raises:
        RuntimeUnavailableError: naming the nodes and their operators.
    """
    nodes = placement(session)
    if not nodes:
        raise RuntimeUnavailableError(
            f"ONNX Runtime does not say where it runs the nodes of {graph}: another version of it is needed"
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
    """What an error of ONNX Runtime's says about the GPU; None where it is about something else."""
    text = "" if error is None else str(error)
    if any(words in text for words in _MEMORY):
        return DeviceMemoryError(
            f"the GPU ran out of memory when {doing}: end what else uses it (nvidia-smi shows it), or use a shorter "
            "context, smaller chunks or a recipe of fewer bits"
        )
    if any(words in text for words in _NO_KERNEL):
        return DeviceError(
            f"this version of onnxruntime-gpu has no code for this GPU, it says when {doing}: install one that has, or "
            "export with --target tensorrt"
        )
    if isinstance(error, Exception) and ("CUDA failure" in text or "CUBLAS failure" in text):
        return DeviceError(f"the GPU failed when {doing}: {first_line(error)}")
    return None
