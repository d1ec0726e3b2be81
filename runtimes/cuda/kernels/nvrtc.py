"""Compiles CUDA C++ with NVRTC, NVIDIA's compiler library. Neither nvcc nor a GPU nor a driver is needed.

The library comes from the wheel `nvidia-cuda-nvrtc`. Its version matters: a driver rejects PTX and cubins of a newer
CUDA than its own, so EdgeLM pins the oldest version that supports every target device (13.0).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgelm.errors import DeviceError, ExportError
from edgelm.installing import install_hint
from edgelm.runtimes.cuda.kernels.cubin import Resources, resources

__all__ = ["LIBRARY_VARIABLE", "PTX_TARGET", "SMS", "Compiled", "Nvrtc", "compile_kernels", "load"]

SMS = (80, 86, 87, 89, 90, 100, 110, 120)
"""Devices that cubins are compiled for: A100; RTX 30; Orin; RTX 40, L4, L40; H100, H200; B200; Thor; RTX 50."""
PTX_TARGET = "compute_80"
"""PTX for all other devices; their drivers compile it when a bundle is loaded."""
LIBRARY_VARIABLE = "EDGELM_NVRTC"
"""Environment variable: path of the NVRTC library to use in place of the installed one."""

_SUCCESS, _COMPILATION = 0, 6
# The PTX declaration of a kernel whose only parameter is a struct.
_PTX_ENTRY = re.compile(r"\.entry\s+([A-Za-z_$][\w$]*)\s*\(\s*\.param\s+\.align\s+\d+\s+\.b8\s+\w+\[(\d+)\]\s*\)")
# All options that change the arithmetic are explicit. Kernels call approximate functions by name.
_OPTIONS = ("-std=c++17", "--fmad=true", "--ftz=false", "--prec-div=true", "--prec-sqrt=true")


@dataclass(frozen=True)
class Compiled:
    """A compiled translation unit for one target.

    Attributes:
        target: `sm_86` (image is a cubin) or `compute_80` (image is PTX text).
        image: the bytes that the driver loads.
        argument_bytes: bytes of each kernel's parameters, by name of the kernel.
        pdl: the kernels that support programmatic dependent launch (from SM 90 on): they execute griddepcontrol.wait,
            so they may start before the previous kernel has ended.
        resources: resources of each kernel; empty for PTX, whose registers are not assigned yet.
        log: the compiler's warnings.
    """

    target: str
    image: bytes
    argument_bytes: dict[str, int]
    pdl: frozenset[str]
    resources: dict[str, Resources]
    log: str


def compile_kernels(
    source: str, headers: Mapping[str, str], target: str, names: Sequence[str], *, options: Sequence[str] = ()
) -> Compiled:
    """Compile a translation unit.

    Args:
        source: CUDA C++.
        headers: the texts that it may include, by the name in `#include "..."`.
        target: `sm_86` for a cubin, `compute_80` for PTX.
        names: the kernels that the source defines, all with C linkage.
        options: more options of NVRTC.

    Raises:
        ExportError: the source has an error, lacks a kernel, or this NVRTC does not support the target.
        DeviceError: NVRTC is not installed.
    """
    nvrtc = load()
    nvrtc.check_target(target)
    flags = [*_OPTIONS, f"--gpu-architecture={target}", *options]
    with nvrtc.program(source, headers) as program:
        status = nvrtc.call("nvrtcCompileProgram", program, len(flags), _strings(flags), allowed=(_COMPILATION,))
        log = nvrtc.text("nvrtcGetProgramLog", program).decode(errors="replace").strip()
        if status == _COMPILATION:
            raise ExportError(f"{_first_error(log)} ({_naming(names)} for {target}, by NVRTC {nvrtc.version_text})")
        ptx = nvrtc.text("nvrtcGetPTX", program)  # also available for a cubin
        if target.startswith("compute_"):
            image, used = ptx, {}
            arguments = {name: int(size) for name, size in _PTX_ENTRY.findall(image.decode(errors="replace"))}
        else:
            image = nvrtc.text("nvrtcGetCUBIN", program)
            used = resources(image)
            arguments = {name: one.argument_bytes for name, one in used.items()}
    missing = [name for name in names if name not in arguments]
    if missing:
        raise ExportError(f"the source compiled for {target} but has no {_naming(missing)}")
    return Compiled(target, image, arguments, _pdl_kernels(ptx.decode(errors="replace")), used, log)


class Nvrtc:
    """The loaded library. Several threads may compile at the same time."""

    def __init__(self, path: str) -> None:
        """Load the library.

        Raises:
            OSError: the library does not exist or cannot be loaded.
        """
        folder = Path(path).parent
        # NVRTC opens libnvrtc-builtins by its bare name, which is not searched for in the wheel's folder. Load it
        # first.
        for builtins in sorted(folder.glob("libnvrtc-builtins.so.*")) if os.sep in path else ():
            ctypes.CDLL(str(builtins))
        self._library = ctypes.CDLL(path)
        self.path = path
        major, minor = ctypes.c_int(), ctypes.c_int()
        self.call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = (major.value, minor.value)
        count = ctypes.c_int()
        self.call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        known = (ctypes.c_int * count.value)()
        self.call("nvrtcGetSupportedArchs", known)
        self.sms = tuple(known)
        """All SMs that it supports."""

    @property
    def version_text(self) -> str:
        """The version, e.g. 13.0: the CUDA version that a driver must support to load the images."""
        return "{}.{}".format(*self.version)

    def check_target(self, target: str) -> None:
        """Raise ExportError, with the supported SMs, if `target` is not one of them."""
        match = re.fullmatch(r"(?:sm|compute)_(\d+)", target)
        if match is None or int(match[1]) not in self.sms:
            known = ", ".join(map(str, self.sms))
            raise ExportError(
                f"NVRTC {self.version_text} does not compile for {target}, only for SM {known} ({self.path})"
            )

    def call(self, function: str, *args: object, allowed: tuple[int, ...] = ()) -> int:
        """Call a function of the library.

        Raises:
            DeviceError: it returned an error that is not in `allowed`.
        """
        status = int(getattr(self._library, function)(*args))
        if status != _SUCCESS and status not in allowed:
            self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
            said = self._library.nvrtcGetErrorString(status).decode()
            raise DeviceError(
                f"{function} of {self.path} failed: {said}; install it again: {install_hint('gpu-export')}"
            )
        return status

    @contextlib.contextmanager
    def program(self, source: str, headers: Mapping[str, str]) -> Iterator[ctypes.c_void_p]:
        """Create a program from source text; destroy it afterwards."""
        program = ctypes.c_void_p()
        texts, names = _strings(list(headers.values())), _strings(list(headers))
        self.call(
            "nvrtcCreateProgram", ctypes.byref(program), source.encode(), b"edgelm.cu", len(headers), texts, names
        )
        try:
            yield program
        finally:
            self.call("nvrtcDestroyProgram", ctypes.byref(program))

    def text(self, function: str, program: ctypes.c_void_p) -> bytes:
        """Return the result of a pair of functions (NAMESize, NAME), without the terminating zero."""
        size = ctypes.c_size_t()
        self.call(f"{function}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self.call(function, program, buffer)
        return buffer.raw if function == "nvrtcGetCUBIN" else buffer.raw.rstrip(b"\0")


def load() -> Nvrtc:
    """Load the library of this installation.

    Raises:
        DeviceError: it is missing or cannot be loaded; the message says how to install it.
    """
    return _load(os.environ.get(LIBRARY_VARIABLE))


@functools.lru_cache(maxsize=4)
def _load(named: str | None) -> Nvrtc:
    if named:
        try:
            return Nvrtc(str(Path(named).absolute()))
        except (OSError, AttributeError) as error:
            raise DeviceError(
                f"{LIBRARY_VARIABLE}={named}: not an NVRTC library that this machine can load ({error})"
            ) from error
    why = []
    for place in candidates():
        try:
            return Nvrtc(place)
        except (OSError, AttributeError) as error:
            why.append(str(error))
    raise DeviceError(
        f"NVRTC, which compiles the GPU kernels, was not found ({why[0] if why else 'no wheel'}): "
        f"{install_hint('gpu-export')}"
    )


def candidates() -> list[str]:
    """Return possible paths of NVRTC, best first: in wheels, known to the system's loader, in the toolkit's folder."""
    spec = importlib.util.find_spec("nvidia")  # a namespace package of many wheels; nothing is imported
    places = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec is not None else []
    wheels = [str(path) for place in places for path in sorted(place.glob("*/lib/libnvrtc.so.[0-9]*"))]
    versions = ("13", "12")
    return [
        *sorted(wheels, key=lambda path: versions.index(v) if (v := path.rpartition(".")[2]) in versions else 9),
        *(f"libnvrtc.so.{version}" for version in versions),
        *(f"/usr/local/cuda/lib64/libnvrtc.so.{version}" for version in versions),
    ]


def _strings(texts: Sequence[str]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * len(texts))(*(text.encode() for text in texts))


def _pdl_kernels(ptx: str) -> frozenset[str]:
    entries = re.split(r"\.entry\s+", ptx)[1:]
    return frozenset(re.split(r"\W", text, maxsplit=1)[0] for text in entries if "griddepcontrol.wait" in text)


def _first_error(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return next((line for line in lines if re.search(r"\b(error|fatal)\b", line)), lines[0] if lines else "no log")


def _naming(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return f"kernel{'s' * (len(names) > 1)} {shown}" + (f" and {len(names) - 4} more" if len(names) > 4 else "")
