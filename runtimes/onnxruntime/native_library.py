"""Finds the compiled operators, and reports which of their instruction sets this CPU uses.

The library is one file for every CPU of its architecture: it holds the kernels for each instruction set and chooses one
when it is registered. Nothing here needs ONNX Runtime.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import edgelm.runtimes
from edgelm.errors import RuntimeUnavailableError
from edgelm.system.platforms import LIBRARY_SUFFIX

__all__ = [
    "ISA_VARIABLE",
    "LIBRARY_VARIABLE",
    "CpuKernels",
    "InstructionSet",
    "describe_cpu",
    "library_path",
    "load_library",
]

ABI = 2
LIBRARY = f"_edgelm_ops{LIBRARY_SUFFIX}"
LIBRARY_VARIABLE = "EDGELM_OPS_LIBRARY"
"""Environment variable: path of the library to use in place of the installed one; empty: use none."""
ISA_VARIABLE = "EDGELM_ISA"
"""Environment variable: name of the instruction set to use in place of the best; an error if this CPU lacks it."""


@dataclass(frozen=True)
class InstructionSet:
    """Kernels compiled for one instruction set."""

    name: str
    """The name, as in EDGELM_ISA."""
    available: bool
    missing: str | None
    """Why it cannot run here; None if it can."""


@dataclass(frozen=True)
class CpuKernels:
    """The kernels that the compiled operators use on this machine."""

    library: str | None
    """The library's path; None if there is none, so that only bundles with portable operators run."""
    chosen: str | None
    """The instruction set in use; None without a library, or if EDGELM_ISA names one that cannot be used."""
    forced: bool
    """Whether EDGELM_ISA is set."""
    why: str
    """Why it was chosen, or the error and what to do."""
    instruction_sets: tuple[InstructionSet, ...]
    """All instruction sets in the library, best first."""

    def as_dict(self) -> dict[str, object]:
        """The fields as JSON-ready values."""
        return {**asdict(self), "instruction_sets": [asdict(isa) for isa in self.instruction_sets]}


def library_path() -> Path | None:
    """Return the path of the compiled operators; None if this installation has none.

    Raises:
        RuntimeUnavailableError: EDGELM_OPS_LIBRARY names a file that does not exist.
    """
    named = os.environ.get(LIBRARY_VARIABLE)
    if named is not None:
        path = Path(named)
        if named and not path.is_file():
            raise RuntimeUnavailableError(
                f"{LIBRARY_VARIABLE}={named}: the file does not exist; unset the variable to use the installed library"
            )
        return path.absolute() if named else None
    # An editable install has sources and compiled library in two folders, which are both in this path.
    places = (Path(place) / LIBRARY for place in edgelm.runtimes.__path__)
    return next((place for place in places if place.is_file()), None)


def describe_cpu() -> CpuKernels:
    """Ask the compiled operators which instruction set they use here, and why.

    Raises:
        RuntimeUnavailableError: the library cannot be loaded, or belongs to another version of EdgeLM.
    """
    path = library_path()
    forced = bool(os.environ.get(ISA_VARIABLE))
    if path is None:
        why = (
            "this installation has no compiled operators: bundles with portable operators run, native ones do not; "
            "install a wheel with compiled parts, or install from source with a C++ compiler and without EDGELM_PURE"
        )
        return CpuKernels(None, None, forced, why, ())
    library = _load(path)
    found = []
    for index in range(library.edgelm_isa_count()):
        missing = library.edgelm_isa_missing(index)
        found.append(
            InstructionSet(
                name=library.edgelm_isa_name(index).decode(),
                available=missing is None,
                missing=None if missing is None else missing.decode(),
            )
        )
    reason = ctypes.create_string_buffer(1024)
    chosen = library.edgelm_isa_chosen(reason, len(reason))
    name = found[chosen].name if chosen >= 0 else None
    return CpuKernels(str(path), name, forced, reason.value.decode(errors="replace"), tuple(found))


def load_library() -> ctypes.CDLL | None:
    """Load the compiled operators; None if this installation has none.

    Raises:
        RuntimeUnavailableError: the library cannot be loaded, or belongs to another version of EdgeLM.
    """
    path = library_path()
    return None if path is None else _load(path)


class ExactLogits:
    """Has models compute all logits exactly.

    Otherwise a step of one row computes only the largest logits of a head in split nibbles from all bits, and its row
    would differ from the same row of a larger step.
    """

    def __init__(self) -> None:
        library = load_library()
        assert library is not None, "a native graph was loaded without it"
        self._set = library.edgelm_exact_logits

    def call(self, run: Callable[[], None]) -> None:
        """Call `run`, which runs models in this thread."""
        before = self._set(1)
        try:
            run()
        finally:
            self._set(before)


def kernels_of(ops: str) -> str | None:
    """Return the instruction set that the native operators use here, as EDGELM_ISA names it.

    None for a bundle with another operator set `ops`.
    """
    return describe_cpu().chosen if ops == "native" else None


def _load(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
        abi = library.edgelm_ops_abi()
    except (OSError, AttributeError) as error:
        raise RuntimeUnavailableError(
            f"{path} cannot be loaded as EdgeLM's operators ({error}): install edgelm again"
        ) from error
    if abi != ABI:
        raise RuntimeUnavailableError(
            f"{path} belongs to another version of EdgeLM (interface {abi}, expected {ABI}): install edgelm again"
        )
    # Types as in the header; by default ctypes assumes int.
    library.edgelm_isa_name.argtypes = [ctypes.c_int32]
    library.edgelm_isa_name.restype = ctypes.c_char_p
    library.edgelm_isa_missing.argtypes = [ctypes.c_int32]
    library.edgelm_isa_missing.restype = ctypes.c_char_p
    library.edgelm_isa_chosen.argtypes = [ctypes.c_char_p, ctypes.c_int64]
    library.edgelm_isa_chosen.restype = ctypes.c_int32
    library.edgelm_exact_logits.argtypes = [ctypes.c_int32]
    library.edgelm_exact_logits.restype = ctypes.c_int32
    return library
