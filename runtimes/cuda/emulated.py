"""Emulation of the GPU kernels on the CPU, for tests and checks: compiled with a C++ compiler and csrc/cuda/emulator.h.

Sources, launches and arguments are those of a GPU; speed and instructions are not. `csrc/cuda/emulator.h` lists what it
detects. Buffers are in host memory, with canaries before and behind them.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.bundle.gpu_layout import ALIGNMENT, aligned
from edgelm.devices import allowed_cores
from edgelm.errors import DeviceError
from edgelm.runtimes.cuda.device import Device, DeviceInfo, Launch
from edgelm.runtimes.cuda.kernels.sources import SOURCES, translation_unit

_CANARY = 256
_CANARY_BYTE = 0xA5


class EmulatedDevice(Device):
    """Runs emulated kernels, one block after another.

    Args:
        capability: the compute capability to emulate; from (8, 9) on kernels use FP8 instructions.
        seed: the order of warps: 0: first to last, 1: last to first, other numbers: shuffled.
        cache: folder for compiled kernels; default `EDGELM_EMULATOR_CACHE`, otherwise a folder in the user's cache.
        lazy: compile each kernel when it is first launched, since a model launches few of its kernels.
    """

    def __init__(
        self, capability: tuple[int, int] = (8, 0), seed: int = 0, cache: Path | None = None, *, lazy: bool = False
    ) -> None:
        self.info = DeviceInfo("emulated", capability, 4, 1 << 34, (13, 0))
        self.seed = seed
        self._cache = cache or _default_cache()
        self._buffers: dict[int, NDArray[np.uint8]] = {}
        self._launchers: dict[str, tuple[Callable[..., bytes | None], Callable[[], Any]]] = {}
        self.prefetched: tuple[int, int] | None = None
        """The lowest and the highest address that the last launch requested for the L2 cache."""
        self._lazy = lazy
        self._awaited: set[str] = set()
        self._captured: list[Callable[[], object]] | None = None

    def allocate(self, nbytes: int) -> int:
        """Allocate memory filled with NaNs."""
        buffer = np.full(nbytes + 2 * _CANARY + ALIGNMENT, 0xFF, np.uint8)
        address = aligned(buffer.ctypes.data + _CANARY)
        start = address - buffer.ctypes.data
        buffer[start - _CANARY : start] = buffer[start + nbytes : start + nbytes + _CANARY] = _CANARY_BYTE
        self._buffers[address] = buffer[start - _CANARY : start + nbytes + _CANARY]
        return address

    def free(self, address: int) -> None:
        """Check the canaries and free the memory."""
        self._check(address, self._buffers[address])
        del self._buffers[address]

    def upload(self, address: int, data: NDArray[Any] | bytes) -> None:
        """Copy to the buffer."""
        array = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else np.ascontiguousarray(data)
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def download(self, address: int, out: NDArray[Any]) -> None:
        """Copy from the buffer into `out`, which must be contiguous."""
        ctypes.memmove(out.ctypes.data, address, out.nbytes)

    def pinned(self, nbytes: int) -> NDArray[np.uint8]:
        """Return ordinary memory."""
        return np.zeros(nbytes, np.uint8)

    def unpin(self, pinned: NDArray[np.uint8]) -> None:
        """Do nothing."""

    def start_upload(self, address: int, pinned: NDArray[Any]) -> None:
        """Copy to the buffer, or capture the copy."""
        self._start(lambda: ctypes.memmove(address, pinned.ctypes.data, pinned.nbytes))

    def start_download(self, pinned: NDArray[Any], address: int) -> None:
        """Copy from the buffer, or capture the copy."""
        self._start(lambda: ctypes.memmove(pinned.ctypes.data, address, pinned.nbytes))

    def _start(self, work: Callable[[], object]) -> None:
        if self._captured is None:
            work()
        else:
            self._captured.append(work)

    def wait(self) -> None:
        """Do nothing: every operation ends before it returns."""

    def fill(self, address: int, value: int, nbytes: int) -> None:
        """Set `nbytes` bytes to `value`."""
        ctypes.memset(address, value, nbytes)

    def load(self, names: Sequence[str]) -> None:
        """Compile kernels, or load them from the cache.

        Raises:
            DeviceError: there is no C++ compiler, or it rejects the sources.
        """
        missing = sorted(set(names) - self._launchers.keys())
        if missing:
            units = _units(missing)
            if self._lazy:
                self._awaited |= set(missing)
            else:
                self._load(missing, units)

    def load_source(self, names: Sequence[str], source: str) -> None:
        """Compile `source`, which instantiates the kernels `names` of headers in `SOURCES`. Raises as `load`."""
        self._load(names, [source])

    def _load(self, names: Sequence[str], sources: Sequence[str]) -> None:
        library = _library(sources, self.info.capability, self._cache)
        self._launchers |= dict.fromkeys(names, (launcher(library), _prefetches(library)))

    def launch(self, launch: Launch, stream: int = 0) -> None:
        """Run a kernel to its end.

        Raises:
            DeviceError: the kernel was not loaded, or the emulator found an error in it.
        """
        del stream
        if self._captured is not None:
            self._captured.append(lambda: self.launch(launch))
            return
        if launch.kernel not in self._launchers and launch.kernel in self._awaited:
            self._load([launch.kernel], _units([launch.kernel]))
        if launch.kernel not in self._launchers:
            raise DeviceError(f"the kernel {launch.kernel} was not loaded: call load() first")
        grid = (ctypes.c_int * 3)(*launch.grid)
        args = ctypes.create_string_buffer(launch.args, len(launch.args))
        run, prefetches = self._launchers[launch.kernel]
        problem = run(
            launch.kernel.encode(), grid, launch.block, launch.shared, ctypes.addressof(args), len(launch.args),
            self.seed,
        )  # fmt: skip
        if problem is not None:
            raise DeviceError(f"emulated kernel {problem.decode()}")
        lowest, highest = prefetches()[:2]
        self.prefetched = (lowest, highest) if lowest else None
        if self.prefetched and not any(
            start <= lowest and highest < start + buffer.size - 2 * _CANARY for start, buffer in self._buffers.items()
        ):
            raise DeviceError(f"{launch.kernel} prefetched {lowest:#x} to {highest:#x}, which is in no buffer")

    def synchronize(self) -> None:
        """Check the canaries of all buffers.

        Raises:
            DeviceError: a kernel wrote outside a buffer.
        """
        for address, buffer in self._buffers.items():
            self._check(address, buffer)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Capture the launches and started copies of `work`."""
        captured: list[Callable[[], object]] = []
        self._captured = captured
        try:
            work()
        finally:
            self._captured = None

        def replay() -> None:
            for one in captured:
                one()

        return replay

    def close(self) -> None:
        """Check the canaries and free everything."""
        self.synchronize()
        self._buffers.clear()

    def _check(self, address: int, buffer: NDArray[np.uint8]) -> None:
        nbytes = buffer.size - 2 * _CANARY
        for where, part in (("before", buffer[:_CANARY]), ("behind", buffer[-_CANARY:])):
            if (part != _CANARY_BYTE).any():
                raise DeviceError(f"a kernel wrote {where} the buffer of {nbytes} bytes at {address:#x}")


def _included(source: str) -> list[str]:
    """Return the texts of all headers that a source includes, directly or not. They are part of the cache key."""
    found: dict[str, str] = {}
    texts = [source]
    while texts:
        for name in re.findall(r'^#include "(.+)"', texts.pop(), re.MULTILINE):
            if name not in found:
                found[name] = (SOURCES / name).read_text(encoding="utf-8")
                texts.append(found[name])
    return list(found.values())


def compiled_library(names: Sequence[str], capability: tuple[int, int], cache: Path | None = None) -> Path:
    """Return a shared library of emulated kernels, compiled or from the cache.

    Args:
        names: of the kernels.
        capability, cache: as in `EmulatedDevice`.

    Raises:
        DeviceError: there is no C++ compiler, or it rejects the sources.
    """
    return _library(_units(names), capability, cache or _default_cache())


def _units(names: Iterable[str]) -> list[str]:
    """Return a translation unit for each kernel."""
    return [translation_unit([name])[0] for name in sorted(names)]


def launcher(library: Path) -> Callable[..., bytes | None]:
    """Return the function of a library that launches its kernels; it returns None, or an error's text."""
    function: Callable[..., bytes | None] = ctypes.CDLL(str(library)).edgelm_emulated_launch
    function.argtypes = [  # type: ignore[attr-defined]  # a C function
        ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t,
        ctypes.c_uint,
    ]  # fmt: skip
    function.restype = ctypes.c_char_p  # type: ignore[attr-defined]  # a C function
    return function


def _prefetches(library: Path) -> Callable[[], Any]:
    """Return the function of a library that returns the addresses which the last launch prefetched."""
    function: Callable[[], Any] = ctypes.CDLL(str(library)).edgelm_emulated_prefetches
    function.restype = ctypes.POINTER(ctypes.c_void_p)  # type: ignore[attr-defined]  # a C function
    return function


def _default_cache() -> Path:
    return Path(os.environ.get("EDGELM_EMULATOR_CACHE") or Path.home() / ".cache/edgelm/emulator")


# -O1: with -O2 compiling takes half as long again, and kernels run no faster.
# -ffp-contract=off: only explicit fma() is fused. -fvisibility=hidden: a library's kernels see their own scheduler, not
# that of another library in the process.
_FLAGS = (
    "-std=c++17",
    "-O1",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-fPIC",
    "-fvisibility=hidden",
    "-DEDGELM_EMULATED",
)
_BLOCKS = '#include "emulator_blocks.h"\n'


def _library(sources: Sequence[str], capability: tuple[int, int], cache: Path) -> Path:
    """Link the kernels of several translation units. Each is compiled once, whatever the library that it is in."""
    fp8 = ["-DEDGELM_HAS_FP8=1"] if capability >= (8, 9) else []
    units = {_key([_BLOCKS, *_included(_BLOCKS), *_FLAGS]): (_BLOCKS, [*_FLAGS])}
    for source in sources:
        units[_key([source, *_included(source), *_FLAGS, *fp8])] = (source, [*_FLAGS, *fp8])
    library = cache / f"{_key(units)}.so"
    if not library.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        objects = [cache / f"{key}.o" for key in units]
        missing = [(file, *units[file.stem]) for file in objects if not file.is_file()]
        with ThreadPoolExecutor(allowed_cores()) as pool:
            for _ in pool.map(lambda one: _compile([*one[2], "-c"], one[0], one[1]), missing):
                pass
        _compile(["-shared", *map(str, objects)], library)
    return library


def _key(texts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:32]


def _compile(options: Sequence[str], output: Path, source: str | None = None) -> None:
    """Run the compiler with these options; the output appears when it is complete."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise DeviceError("the emulator of GPU kernels needs a C++ compiler: install g++, or set CXX to one")
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        made = Path(folder) / output.name
        call = [compiler, *options, "-o", str(made)]
        if source is not None:
            file = Path(folder) / "kernels.cc"
            file.write_text(source, encoding="utf-8", newline="\n")
            call += [f"-I{SOURCES}", str(file)]
        done = subprocess.run(call, capture_output=True, text=True, check=False)
        if done.returncode:
            first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:500])
            raise DeviceError(f"{compiler} cannot compile the emulated kernels: {first}")
        made.replace(output)
