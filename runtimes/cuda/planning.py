"""Calls the launch planning in C++ (csrc/cuda/host), which runtimes and TensorRT plugins share.

A call names a function and gives it named fields; the answer is bytes: a text, numbers, or launches.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import edgelm.runtimes
from edgelm.errors import BundleError, DeviceError, EdgeLMError
from edgelm.runtimes.cuda.device import Launch
from edgelm.system.platforms import LIBRARY_SUFFIX

LIBRARY = f"libedgelm_plugins{LIBRARY_SUFFIX}"
LIBRARY_VARIABLE = "EDGELM_PLUGINS_LIBRARY"
"""Environment variable: path of the library to use in place of the installed one."""
Field = str | int | float

_HEAD = struct.Struct("<7I")
_ERRORS: Mapping[int, type[EdgeLMError]] = {1: DeviceError, 2: BundleError}


def library_path() -> Path:
    """Return the path of the library of launch planning and TensorRT plugins.

    Raises:
        DeviceError: this installation has no compiled parts, or EDGELM_PLUGINS_LIBRARY names a file that does not
            exist.
    """
    named = os.environ.get(LIBRARY_VARIABLE)
    if named:
        if not Path(named).is_file():
            raise DeviceError(
                f"{LIBRARY_VARIABLE}={named}: the file does not exist; unset the variable to use the installed library"
            )
        return Path(named).absolute()
    # An editable install has sources and compiled library in two folders, which are both in this path.
    for folder in edgelm.runtimes.__path__:
        path = Path(folder) / LIBRARY
        if path.is_file():
            return path
    raise DeviceError(f"{LIBRARY} is missing: install edgelm from a wheel of this platform, or with a C++ compiler")


def call(function: str, fields: Mapping[str, Field], library: Path | None = None) -> bytes:
    """Call a function of the installed library, or of the one in the file `library`.

    Raises:
        DeviceError: the kernels cannot compute this.
        BundleError: the fields come from a bundle that is damaged.
    """
    text = "".join(f"{name}={int(value) if isinstance(value, bool) else value}\n" for name, value in fields.items())
    if text.count("\n") != len(fields) or "\0" in text:
        raise BundleError("a name or value has a line end or a NUL character: copy or export the bundle again")
    answer, size = ctypes.c_void_p(), ctypes.c_size_t()
    status = _function(library or library_path())(
        function.encode(), text.encode(), ctypes.byref(answer), ctypes.byref(size)
    )
    found = ctypes.string_at(answer, size.value) if answer.value else b""
    if status:
        raise _ERRORS.get(status, EdgeLMError)(found.decode(errors="replace"))
    return found


def launches(function: str, fields: Mapping[str, Field]) -> list[Launch]:
    """Call a function that returns launches. Raises as `call`."""
    return list(_launches(call(function, fields)))


def _launches(data: bytes) -> Iterator[Launch]:
    at = 0
    while at < len(data):
        name, x, y, z, block, shared, args = _HEAD.unpack_from(data, at)
        at += _HEAD.size
        kernel = data[at : at + name].decode()
        yield Launch(kernel, (x, y, z), block, shared, data[at + name : at + name + args])
        at += name + args


@functools.lru_cache(maxsize=64)
def _function(library: Path) -> ctypes._NamedFuncPointer:
    function = ctypes.CDLL(str(library)).edgelm_gpu_call
    function.argtypes = [
        ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_size_t),
    ]  # fmt: skip
    function.restype = ctypes.c_int
    return function
