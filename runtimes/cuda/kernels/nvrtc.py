"""Compiles CUDA C++ with NVRTC, NVIDIA's compiler library. Neither nvcc nor a GPU nor a driver is needed.

Its version matters: a driver loads the cubins of its own major version of CUDA and of older ones, and the PTX of its
own version and of older ones. So each target is compiled by the oldest installed version that supports it. EdgeLM pins
two wheels, which one process can use side by side:

- `nvidia-cuda-nvrtc-cu12` 12.6 for SM 80 to 90 and for PTX: the version of JetPack 6. Its cubins load on every driver
  of CUDA 12 and later (525, of 2022, and newer). Its PTX loads from 12.6 on, so on every driver that knows a device
  without a cubin: those of SM 100 and 120 begin with 12.8. A later 12.x would add SM 100 and 120, but NVIDIA promises
  cubins of a newer minor version for desktop drivers only, and JetPack 6 is a main target.
- `nvidia-cuda-nvrtc` 13.0 for SM 100, 110 and 120: the first version that knows SM 110 (Thor).
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

__all__ = ["LIBRARY_VARIABLE", "PTX_TARGET", "SMS", "Compiled", "Nvrtc", "compile_kernels", "installed", "load"]

SMS = (80, 86, 87, 89, 90, 100, 110, 120)
"""Devices that cubins are compiled for: A100; RTX 30; Orin; RTX 40, L4, L40; H100, H200; B200; Thor; RTX 50."""
PTX_TARGET = "compute_80"
"""PTX for all other devices; their drivers compile it when a bundle is loaded."""
LIBRARY_VARIABLE = "EDGELM_NVRTC"
"""Environment variable: path of the NVRTC library that compiles for every target, in place of the installed ones."""
OLDEST = (12, 4)
"""The first version whose PTX has matmuls of FP8 for SM 89. Older libraries are ignored."""

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
        compiler: version of the NVRTC that compiled it.
    """

    target: str
    image: bytes
    argument_bytes: dict[str, int]
    pdl: frozenset[str]
    resources: dict[str, Resources]
    log: str
    compiler: tuple[int, int]


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
        ExportError: the source has an error, lacks a kernel, or no installed NVRTC supports the target.
        DeviceError: NVRTC is not installed.
    """
    nvrtc = load(target)
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
    return Compiled(target, image, arguments, _pdl_kernels(ptx.decode(errors="replace")), used, log, nvrtc.version)


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
        """The version, e.g. 13.0."""
        return "{}.{}".format(*self.version)

    def supports(self, target: str) -> bool:
        """Whether it compiles for `target`, such as `sm_86` or `compute_80`."""
        match = re.fullmatch(r"(?:sm|compute)_(\d+)", target)
        return match is not None and int(match[1]) in self.sms

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


def load(target: str) -> Nvrtc:
    """Load the library that compiles for a target; see the module's docstring.

    Raises:
        DeviceError: there is none or it cannot be loaded; the message says how to install it.
        ExportError: none supports the target; the message has the SMs that are supported.
    """
    found = installed()
    for library in found:
        if library.supports(target):
            return library
    known = ", ".join(f"{one.version_text} does for SM {', '.join(map(str, one.sms))} ({one.path})" for one in found)
    missing = f"; {install_hint('gpu-export')}" if target in (*(f"sm_{sm}" for sm in SMS), PTX_TARGET) else ""
    raise ExportError(f"no NVRTC here compiles for {target}: {known}{missing}")


def installed() -> tuple[Nvrtc, ...]:
    """Return the libraries of this installation, best first: of wheels before those of the system, then older ones.

    If `LIBRARY_VARIABLE` is set, this is the library that it names.

    Raises:
        DeviceError: there is none or it cannot be loaded; the message says how to install it.
    """
    return _installed(os.environ.get(LIBRARY_VARIABLE))


@functools.lru_cache(maxsize=4)
def _installed(named: str | None) -> tuple[Nvrtc, ...]:
    if named:
        try:
            return (Nvrtc(str(Path(named).absolute())),)
        except (OSError, AttributeError) as error:
            raise DeviceError(
                f"{LIBRARY_VARIABLE}={named}: not an NVRTC library that this machine can load ({error})"
            ) from error
    found: dict[tuple[int, int], Nvrtc] = {}
    why = []
    for places in candidates():
        mine = []
        for place in places:
            try:
                mine.append(Nvrtc(place))
            except (OSError, AttributeError) as error:
                why.append(str(error))
        for library in sorted(mine, key=lambda one: one.version):
            if library.version >= OLDEST:
                found.setdefault(library.version, library)
            else:
                least = "{}.{}".format(*OLDEST)
                why.insert(0, f"{library.path} is of version {library.version_text}, and {least} or newer is needed")
    if found:
        return tuple(found.values())
    raise DeviceError(
        f"NVRTC, which compiles the GPU kernels, was not found ({why[0] if why else 'no wheel'}): "
        f"{install_hint('gpu-export')}"
    )


def candidates() -> tuple[list[str], list[str]]:
    """Return possible paths of NVRTC: in wheels, then known to the system's loader or in the toolkit's folder."""
    spec = importlib.util.find_spec("nvidia")  # a namespace package of many wheels; nothing is imported
    places = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec is not None else []
    wheels = [str(path) for place in places for path in sorted(place.glob("*/lib/libnvrtc.so.[0-9]*"))]
    system = [f"{folder}libnvrtc.so.{major}" for folder in ("", "/usr/local/cuda/lib64/") for major in (12, 13)]
    return wheels, system


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
