"""The installed TensorRT: full `tensorrt` or `tensorrt_rtx`, whose Python interfaces are nearly the same.

**The link.** TensorRT-RTX's ONNX parser opens `libtensorrt_rtx.so` to reach the registry of plugins, and its wheel has
only `libtensorrt_rtx.so.1`: without a file of that name the process aborts, and a library path set from within comes
too late. The parser searches beside itself first (its RPATH is `$ORIGIN`), and the loader takes the folder from the
path under which a library was opened, links unresolved. So `load` opens the wheel's libraries through a folder of
links that has the missing name too; a later import finds them loaded.
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


def how_to_install(edition: str) -> str:
    """The command that installs a TensorRT."""
    more = " (its main library is on NVIDIA's own index; on a Jetson JetPack brings it)" if edition == FULL else ""
    return install_hint(edition) + more


@dataclass(frozen=True)
class Library:
    """A TensorRT that was imported.

    Attributes:
        edition: `FULL` or `RTX`.
        version: of the package, e.g. "1.7.1.116".
        api: the module.
        can_parse: False where another import came first, after which parsing a graph would abort the process.
    """

    edition: str
    version: str
    api: ModuleType
    can_parse: bool = True

    @property
    def sms(self) -> tuple[int, ...]:
        """The compute capabilities that this library builds for without such a device; empty for full TensorRT."""
        if self.edition != RTX:
            return ()
        names = (re.fullmatch(r"SM(\d+)", name) for name in dir(self.api.ComputeCapability))
        return tuple(sorted(int(match[1]) for match in names if match))

    def logger(self) -> Any:
        """The logger of everything that is made with this library; keeps what went wrong, see `Messages`."""
        return messages(self).logger


class Messages:
    """TensorRT's log: errors are kept for the exception that is raised next, warnings are dropped.

    TensorRT returns None where something failed and says why only here.
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
        """What went wrong since the last call, the root first, in one line; "no reason given" if nothing was said."""
        # The same failure is reported on several levels, as that a CUDA error was caught.
        lines = dict.fromkeys(" ".join(line.split()) for line in self.errors)
        self.errors.clear()
        return "; ".join(lines) or "no reason given"


@lru_cache(maxsize=2)
def messages(library: Library) -> Messages:
    """The one log of a library: TensorRT keeps the first logger it is given for some of its parts."""
    return Messages(library.api)


def installed() -> dict[str, str]:
    """Versions of the editions that are installed, without importing them."""
    found = {}
    for edition, module in _MODULES.items():
        if importlib.util.find_spec(module) is not None:
            found[edition] = _version(edition)
    return found


def load(edition: str | None = None) -> Library:
    """Import a edition; None is full TensorRT where it is installed, else TensorRT-RTX.

    Raises:
        RuntimeUnavailableError: it is not installed, or cannot be imported (what the loader says is in the message).
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
    return Library(edition, _version(edition), api, can_parse)


def _version(edition: str) -> str:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(edition)
    # JetPack installs the module without the metadata of a wheel.
    return str(getattr(importlib.import_module(_MODULES[edition]), "__version__", "of unknown version"))


def _open_through_links() -> bool:
    """Load TensorRT-RTX's libraries under links; see the module's docstring. Whether the parser will find them."""
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
    # The parser needs nothing of the core by name, so the order does not matter to the loader.
    for name in (core.name, *(path.name for path in libraries if path != core)):
        ctypes.CDLL(str(folder / name))
    return True


@lru_cache(maxsize=1)
def _links_owner() -> tempfile.TemporaryDirectory[str]:
    # Kept until the interpreter ends: the parser opens the link when it meets the first plugin.
    return tempfile.TemporaryDirectory(prefix="edgelm-tensorrt-")


def _links() -> Path:
    return Path(_links_owner().name)


def _finds_itself() -> bool:
    """Whether the loader finds the library under the name that the parser uses."""
    if sys.platform != "linux":
        return True  # the parser's name is that of the wheel's file there
    try:
        ctypes.CDLL(_RTX_LIBRARY)
    except OSError:
        return False
    return True
