"""Times the compiled kernels on matrices and caches of given shapes, without a bundle and without ONNX Runtime.

The compiled operators run the same kernels in the same tasks. Weights lie in memory of small pages, as those of a
mapped file do.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgelm.bundle.cpu_layout import ALIGNMENT, PackedMatrix, aligned
from edgelm.bundle.kv_cache import require_type
from edgelm.errors import EdgeLMError, RuntimeUnavailableError
from edgelm.runtimes.onnxruntime.native_library import load_library

_CACHES = ("float32", "float16", "int8", "fp8")  # CacheKind of kernels/attention/attention.h
_FILLING = 0x3C  # a normal number in every type, and codes like any other
_MOST_PASSES, _FEWEST_PASSES = 200, 3
_PROBLEMS = {
    1: "EDGELM_ISA names kernels that this CPU cannot run: unset it",
    2: "the kernels refuse these shapes",
    3: "there is not enough memory, or no further thread can be started",
}


@dataclass(frozen=True)
class MatmulWork:
    """`matrices` matmuls of one shape in one parallel region, each with `tokens` rows of activations.

    Attributes:
        matrix: how the weights are stored.
        tokens: rows.
        matrices: how many.
        high_only: of split nibbles, read the high ones alone.
        int8: round activations to int8.
    """

    matrix: PackedMatrix
    tokens: int
    matrices: int = 1
    high_only: bool = False
    int8: bool = True

    @property
    def stride(self) -> int:
        """Bytes from one matrix to the next."""
        return aligned(self.matrix.nbytes, ALIGNMENT)

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices."""
        return self.stride * self.matrices


@dataclass(frozen=True)
class AttentionWork:
    """Attention of `tokens` new tokens over a cache of type `kv` that has `past` tokens already."""

    kv: str
    heads: int
    kv_heads: int
    head_dim: int
    past: int
    tokens: int


Work = MatmulWork | AttentionWork


class _Op(ctypes.Structure):
    # As in csrc/ort/measure.h.
    _fields_ = (
        ("weights", ctypes.c_void_p),
        *(
            (name, ctypes.c_int64)
            for name in (
                "stride", "matrices", "tokens", "high_only", "floats", "cache", "heads", "kv_heads", "head_dim", "past"
            )
        ),
    )  # fmt: skip


class Measurement:
    """Works that are timed one after another, as often as the time allows.

    Args:
        works: what to run, in this order.
        threads: CPU threads.

    Raises:
        RuntimeUnavailableError: this installation has no compiled operators, or those of an older version.
    """

    def __init__(self, works: Sequence[Work], threads: int) -> None:
        library = load_library()
        function = None if library is None else getattr(library, "edgelm_measure", None)
        if function is None:
            raise RuntimeUnavailableError(
                "this installation has no compiled operators that can be timed: install edgelm again"
            )
        function.argtypes = [
            ctypes.POINTER(_Op), ctypes.c_int64, ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(ctypes.c_double)
        ]  # fmt: skip
        function.restype = ctypes.c_int32
        self._function = function
        self._threads = threads
        self._count = len(works)
        self._memory = mmap.mmap(-1, max(1, sum(work.nbytes for work in works if isinstance(work, MatmulWork))))
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without huge pages
                self._memory.madvise(mmap.MADV_NOHUGEPAGE)
        self._bytes = np.frombuffer(self._memory, np.uint8)
        self._bytes[:] = _FILLING
        self._ops = (_Op * len(works))()
        place = 0
        for op, work in zip(self._ops, works, strict=True):
            op.tokens = work.tokens
            if isinstance(work, MatmulWork):
                place = self._matmul(op, work, place)
            else:
                op.cache = _CACHES.index(require_type(work.kv))
                op.heads, op.kv_heads, op.head_dim = work.heads, work.kv_heads, work.head_dim
                op.past = work.past

    def _matmul(self, op: _Op, work: MatmulWork, place: int) -> int:
        header = np.frombuffer(work.matrix.header(), np.uint8)
        for index in range(work.matrices):
            start = place + index * work.stride
            self._bytes[start : start + header.size] = header
        op.weights = self._bytes.ctypes.data + place
        op.stride, op.matrices, op.cache = work.stride, work.matrices, -1
        op.high_only, op.floats = int(work.high_only), int(not work.int8)
        return place + work.nbytes

    def passes(self, count: int) -> list[tuple[float, ...]]:
        """Run all works `count` times; return the seconds of each work, pass by pass.

        Raises:
            EdgeLMError: they cannot be run.
        """
        seconds = (ctypes.c_double * (count * self._count))()
        status = self._function(self._ops, self._count, self._threads, count, seconds)
        if status:
            raise EdgeLMError(f"the kernels cannot be timed: {_PROBLEMS.get(status, status)}")
        times = np.array(seconds).reshape(count, self._count)
        return [tuple(map(float, row)) for row in times]

    def run(self, seconds: float) -> list[tuple[float, ...]]:
        """Run all works for about `seconds`, after one pass that is not counted; return as `passes`."""
        once = sum(self.passes(2)[1])
        return self.passes(max(_FEWEST_PASSES, min(_MOST_PASSES, round(seconds / max(once, 1e-6)))))


def medians(passes: Sequence[Sequence[float]]) -> list[float]:
    """Return the median seconds of each work over all passes."""
    return [statistics.median(times) for times in zip(*passes, strict=True)]
