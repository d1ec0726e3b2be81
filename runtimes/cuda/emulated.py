"""The kernels on a CPU: compiled by the C++ compiler with an emulator of a GPU's blocks, for tests and checks.

Everything but the speed and the instructions is what a GPU runs: the same sources, launches and arguments. See
`csrc/cuda/emulator.h` for what it looks out for. Buffers lie in the host's memory between canaries.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.bundle.gpu_layout import ALIGNMENT, aligned
from edgelm.errors import DeviceError
from edgelm.runtimes.cuda.device import Device, DeviceInfo, Launch
from edgelm.runtimes.cuda.kernels.sources import SOURCES, translation_unit

_CANARY = 256
_CANARY_BYTE = 0xA5


class EmulatedDevice(Device):
    """Runs kernels in emulation, one block after another.

    Args:
        capability: the compute capability to be: from (8, 9) on kernels take the instructions for FP8.
        seed: the order of warps: 0 first to last, 1 last to first, other numbers shuffle.
        cache: folder for compiled kernels; default `EDGELM_EMULATOR_CACHE`, else a folder of the user's cache.
        lazy: compile each kernel when it is first launched: of a whole model's, most never are.
    """

    def __init__(
        self, capability: tuple[int, int] = (8, 0), seed: int = 0, cache: Path | None = None, *, lazy: bool = False
    ) -> None:
        self.info = DeviceInfo("emulated", capability, 4, 1 << 34, (13, 0))
        self.seed = seed
        self._cache = cache or Path(os.environ.get("EDGELM_EMULATOR_CACHE") or Path.home() / ".cache/edgelm/emulator")
        self._buffers: dict[int, NDArray[np.uint8]] = {}
        self._launchers: dict[str, Callable[..., bytes | None]] = {}
        self._lazy = lazy
        self._awaited: set[str] = set()

    def allocate(self, nbytes: int) -> int:
        """Reserve memory filled with NaNs."""
        buffer = np.full(nbytes + 2 * _CANARY + ALIGNMENT, 0xFF, np.uint8)
        address = aligned(buffer.ctypes.data + _CANARY)
        start = address - buffer.ctypes.data
        buffer[start - _CANARY : start] = buffer[start + nbytes : start + nbytes + _CANARY] = _CANARY_BYTE
        self._buffers[address] = buffer[start - _CANARY : start + nbytes + _CANARY]
        return address

    def free(self, address: int) -> None:
        """Give memory back, after a look at its canaries."""
        self._check(address, self._buffers[address])
        del self._buffers[address]

    def upload(self, address: int, data: NDArray[Any] | bytes) -> None:
        """Copy."""
        array = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else np.ascontiguousarray(data)
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def download(self, address: int, out: NDArray[Any]) -> None:
        """Copy; `out` must be contiguous."""
        ctypes.memmove(out.ctypes.data, address, out.nbytes)

    def fill(self, address: int, value: int, nbytes: int) -> None:
        """Set bytes."""
        ctypes.memset(address, value, nbytes)

    def load(self, names: Sequence[str]) -> None:
        """Compile kernels, or take them from the cache.

        Raises:
            DeviceError: there is no C++ compiler, or it refuses the sources.
        """
        missing = sorted(set(names) - self._launchers.keys())
        if missing:
            source, _ = translation_unit(missing)
            if self._lazy:
                self._awaited |= set(missing)
            else:
                self.load_source(missing, source)

    def load_source(self, names: Sequence[str], source: str) -> None:
        """Compile `source`, which instantiates the kernels `names` of headers in `SOURCES`. Raises as `load`."""
        launcher = _compiled(source, self.info.capability, self._cache)
        self._launchers |= dict.fromkeys(names, launcher)

    def launch(self, launch: Launch, stream: int = 0) -> None:
        """Run a kernel to its end.

        Raises:
            DeviceError: the kernel was not loaded, or did what it must not.
        """
        del stream
        if launch.kernel not in self._launchers and launch.kernel in self._awaited:
            source, _ = translation_unit([launch.kernel])
            self.load_source([launch.kernel], source)
        if launch.kernel not in self._launchers:
            raise DeviceError(f"the kernel {launch.kernel} was not loaded")
        grid = (ctypes.c_int * 3)(*launch.grid)
        args = ctypes.create_string_buffer(launch.args, len(launch.args))
        problem = self._launchers[launch.kernel](
            launch.kernel.encode(), grid, launch.block, launch.shared, ctypes.addressof(args), len(launch.args),
            self.seed,
        )  # fmt: skip
        if problem is not None:
            raise DeviceError(f"emulated kernel {problem.decode()}")

    def synchronize(self) -> None:
        """Look at every buffer's canaries.

        Raises:
            DeviceError: a kernel wrote beside a buffer.
        """
        for address, buffer in self._buffers.items():
            self._check(address, buffer)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Capture the launches."""
        captured: list[Launch] = []
        run = self.launch
        self.launch = lambda launch, stream=0: captured.append(launch)  # type: ignore[method-assign]  # while capturing
        try:
            work()
        finally:
            self.launch = run  # type: ignore[method-assign]  # as it was

        def replay() -> None:
            for launch in captured:
                self.launch(launch)

        return replay

    def close(self) -> None:
        """Free everything, after a look at the canaries."""
        self.synchronize()
        self._buffers.clear()

    def _check(self, address: int, buffer: NDArray[np.uint8]) -> None:
        nbytes = buffer.size - 2 * _CANARY
        for where, part in (("before", buffer[:_CANARY]), ("behind", buffer[-_CANARY:])):
            if (part != _CANARY_BYTE).any():
                raise DeviceError(f"a kernel wrote {where} the buffer of {nbytes} bytes at {address:#x}")


def _included(source: str) -> list[str]:
    """The texts of the headers that a source includes, and of those that they include: a change to others is none."""
    found: dict[str, str] = {}
    texts = [source]
    while texts:
        for name in re.findall(r'^#include "(.+)"', texts.pop(), re.MULTILINE):
            if name not in found:
                found[name] = (SOURCES / name).read_text(encoding="utf-8")
                texts.append(found[name])
    return list(found.values())


def _compiled(source: str, capability: tuple[int, int], cache: Path) -> Callable[..., bytes | None]:
    fp8 = ["-DEDGELM_HAS_FP8=1"] if capability >= (8, 9) else []
    # -ffp-contract=off: what is fused is written fused. Hidden: what is static in an inline function is otherwise one
    # object in the whole process, which several such libraries, even of different sources, would write to and free.
    command = [
        "-std=c++17",
        "-O2",
        "-ffp-contract=off",
        "-Wall",
        "-Wextra",
        "-fPIC",
        "-shared",
        "-fvisibility=hidden",
        "-DEDGELM_EMULATED",
        *fp8,
    ]
    text = "\0".join([source, *_included(source), *command]).encode()
    library = cache / f"{hashlib.sha256(text).hexdigest()[:32]}.so"
    if not library.is_file():
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
        if compiler is None:
            raise DeviceError("the emulator of GPU kernels needs a C++ compiler: install g++, or name one in CXX")
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            file = Path(folder) / "kernels.cc"
            file.write_text(source, encoding="utf-8")
            output = Path(folder) / "kernels.so"
            call = [compiler, *command, f"-I{SOURCES}", str(file), "-o", str(output)]
            done = subprocess.run(call, capture_output=True, text=True, check=False)
            if done.returncode:
                first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:500])
                raise DeviceError(f"{compiler} refuses the kernels' sources: {first}")
            output.replace(library)
    function: Callable[..., bytes | None] = ctypes.CDLL(str(library)).edgelm_emulated_launch
    function.argtypes = [  # type: ignore[attr-defined]  # a C function
        ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t,
        ctypes.c_uint,
    ]  # fmt: skip
    function.restype = ctypes.c_char_p  # type: ignore[attr-defined]  # likewise
    return function
