"""Loads the installed TensorRT: full `tensorrt` or `tensorrt_rtx`, whose Python interfaces are nearly the same.

**Versions.** Full TensorRT from 10.3 on, which JetPack 6 has: the first whose plugins may write into an input, as the
caches need, with the memory functions of `engine.py`. Python names that came later are asked for where they are used
(`builder.py`).

**The link.** TensorRT-RTX's ONNX parser opens `libtensorrt_rtx.so` to get the plugin registry, but its wheel has only
`libtensorrt_rtx.so.1`. Without a file of the former name the process aborts, and setting a library path inside the
process is too late. The parser searches its own folder first (its RPATH is `$ORIGIN`), which the loader takes from the
path that the library was opened with, links unresolved. So `load` opens the wheel's libraries through a folder of links
that has the missing name too. A later import uses the loaded libraries.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import importlib.util
import re
import sys
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from edgelm.errors import RuntimeUnavailableError
from edgelm.installing import install_hint

FULL, RTX = "tensorrt", "tensorrt-rtx"
TITLES = {FULL: "TensorRT", RTX: "TensorRT-RTX"}
_MODULES = {FULL: "tensorrt", RTX: "tensorrt_rtx"}
_RTX_LIBRARY = "libtensorrt_rtx.so"
OLDEST = (10, 3)
"""The oldest version of full TensorRT that can be used."""


def how_to_install(edition: str) -> str:
    """Return the command that installs an edition of TensorRT."""
    more = " (its main library is on NVIDIA's own index; on a Jetson JetPack brings it)" if edition == FULL else ""
    return install_hint(edition) + more


@dataclass(frozen=True)
class Library:
    """An imported TensorRT.

    Attributes:
        edition: `FULL` or `RTX`.
        version: of the package, e.g. "1.7.1.116".
        api: the Python module.
        can_parse: False if the module was imported before EdgeLM loaded it; parsing a graph would then abort the
        process.
    """

    edition: str
    version: str
    api: ModuleType
    can_parse: bool = True

    def older_than(self, *version: int) -> bool:
        """Whether this is full TensorRT of a version before e.g. 10, 15."""
        return self.edition == FULL and _numbers(self.version) < version

    @property
    def sms(self) -> tuple[int, ...]:
        """The compute capabilities that this library can build for without the device; empty for full TensorRT."""
        if self.edition != RTX:
            return ()
        names = (re.fullmatch(r"SM(\d+)", name) for name in dir(self.api.ComputeCapability))
        return tuple(sorted(int(match[1]) for match in names if match))

    def logger(self) -> Any:
        """The logger for all objects of this library; it keeps errors, see `Messages`."""
        return messages(self).logger


class Messages:
    """TensorRT's log. Errors are kept for the next exception; warnings are dropped.

    When a call fails, TensorRT returns None; only the log has the reason.
    """

    def __init__(self, api: ModuleType) -> None:
        self.errors: list[str] = []
        outer = self

        class Log(api.ILogger):  # type: ignore[misc,name-defined]  # the module has no types
            def __init__(self) -> None:
                api.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity in (api.ILogger.ERROR, api.ILogger.INTERNAL_ERROR):
                    outer.errors.append(message.strip())

        self.logger = Log()

    def take(self) -> str:
        """Return the errors since the last call in one line, root cause first; "no reason given" if there are none."""
        # The same failure is reported on several levels, e.g. again when a CUDA error is caught.
        lines = dict.fromkeys(" ".join(line.split()) for line in self.errors)
        self.errors.clear()
        return "; ".join(lines) or "no reason given"


@lru_cache(maxsize=2)
def messages(library: Library) -> Messages:
    """Return the single log of a library: some parts of TensorRT keep the first logger that they get."""
    return Messages(library.api)


def installed() -> dict[str, str]:
    """Return the versions of the installed editions, without importing them."""
    found = {}
    for edition, module in _MODULES.items():
        if importlib.util.find_spec(module) is not None:
            found[edition] = _version(edition)
    return found


def load(edition: str | None = None) -> Library:
    """Import an edition. None: full TensorRT if it is installed, otherwise TensorRT-RTX.

    Raises:
        RuntimeUnavailableError: it is not installed, too old, or cannot be imported; then the message has the loader's
            error.
    """
    if edition is None:
        edition = next(iter(installed()), None)
        if edition is None:
            raise RuntimeUnavailableError(
                f"TensorRT is not installed: {how_to_install(RTX)}, or {how_to_install(FULL)}"
            )
    elif edition not in _MODULES:
        raise RuntimeUnavailableError(f"there is no TensorRT edition {edition!r}; there are: {', '.join(_MODULES)}")
    return _load(edition)


@lru_cache(maxsize=2)
def _load(edition: str) -> Library:
    module = _MODULES[edition]
    if importlib.util.find_spec(module) is None:
        raise RuntimeUnavailableError(f"{edition} is not installed: {how_to_install(edition)}")
    can_parse = edition != RTX or module in sys.modules or _open_through_links()
    if edition == RTX and module in sys.modules:
        can_parse = _finds_itself()
    try:
        api = importlib.import_module(module)
    except (ImportError, OSError) as error:
        raise RuntimeUnavailableError(
            f"{edition} is installed but cannot be imported: {error}; reinstall it: {how_to_install(edition)}"
        ) from error
    library = Library(edition, _version(edition), api, can_parse)
    if library.older_than(*OLDEST):
        least = "{}.{}".format(*OLDEST)
        raise RuntimeUnavailableError(
            f"TensorRT {library.version} is installed, and {least} or newer is needed: caches are updated in place, "
            f"which plugins may do from {least} on; on a Jetson install JetPack 6.1 or newer, elsewhere: "
            f"{how_to_install(FULL)}"
        )
    return library


def _numbers(version: str) -> tuple[int, ...]:
    """Return the numbers at the start of a version, such as (10, 13, 3) of "10.13.3.post1"."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    # A module without a version is none that we know; what it lacks shows where it is used.
    return tuple(map(int, match[0].split("."))) if match else OLDEST


def _version(edition: str) -> str:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(edition)
    # JetPack installs the module without wheel metadata.
    return str(getattr(importlib.import_module(_MODULES[edition]), "__version__", "of unknown version"))


def _open_through_links() -> bool:
    """Load TensorRT-RTX's libraries through links; see the module's docstring. Return whether the parser will find
    them."""
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    if sys.platform != "linux" or spec is None or spec.origin is None:
        return _finds_itself()
    libraries = sorted(Path(spec.origin).parent.glob("*.so*"))
    core = next((path for path in libraries if path.name.startswith(f"{_RTX_LIBRARY}.")), None)
    if core is None:
        return _finds_itself()
    folder = _links()
    for path in libraries:
        (folder / path.name).symlink_to(path)
    if not (folder / _RTX_LIBRARY).exists():
        (folder / _RTX_LIBRARY).symlink_to(core)
    # The parser does not link to the core by name, so the order does not matter to the loader.
    for name in (core.name, *(path.name for path in libraries if path != core)):
        ctypes.CDLL(str(folder / name))
    return True


@lru_cache(maxsize=1)
def _links_owner() -> tempfile.TemporaryDirectory[str]:
    # Kept until the interpreter ends: the parser opens the link at the first plugin.
    return tempfile.TemporaryDirectory(prefix="edgelm-tensorrt-")


def _links() -> Path:
    return Path(_links_owner().name)


def _finds_itself() -> bool:
    """Whether the loader finds the library under the name that the parser uses."""
    if sys.platform != "linux":
        return True  # on Windows the wheel's file has the name that the parser opens
    try:
        ctypes.CDLL(_RTX_LIBRARY)
    except OSError:
        return False
    return True
