"""Plan and write the weights file.

The place of every tensor is planned before the first byte is written. So the graph, the file's size and the memory
needed are known first, and the jobs that write the tensors can run in any order and in parallel. Each job holds one
block in memory. Tensors start at page boundaries, because ONNX Runtime maps them from the file.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.bundle import TensorEntry
from edgelm.bundle.contents import Contents
from edgelm.export.packing import contents as contents_of
from edgelm.progress import Advance
from edgelm.quant.source import WeightSource

PAGE = 4096
# Matrices are read and quantised in blocks of about this many weights. A block is large enough that the fixed costs of
# a kernel call do not matter, and small in memory: 16 MiB in float32.
BLOCK_WEIGHTS = 4 << 20


@dataclass(frozen=True)
class Slot:
    """Place and contents of a tensor in the weights file; `offset` and `size` are in bytes."""

    name: str
    dims: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int
    size: int
    layer: int | None
    contents: Contents


class SlotWriter:
    """Writes the bytes of a slot's tensor, in order."""

    def __init__(self, slot: Slot, descriptor: int, lock: threading.Lock) -> None:
        self.slot = slot
        self.written = 0
        self.crc32 = 0
        self._descriptor = descriptor
        self._lock = lock

    def append(self, block: NDArray[Any]) -> None:
        """Write the next rows; their dtype must be the slot's."""
        assert block.dtype == self.slot.dtype, (self.slot.name, block.dtype, self.slot.dtype)
        data = np.ascontiguousarray(block).reshape(-1).view(np.uint8).data
        self.crc32 = zlib.crc32(data, self.crc32)
        assert self.written + len(data) <= self.slot.size, f"{self.slot.name} is larger than planned"
        while data:
            count = self._write_some(data, self.slot.offset + self.written)
            self.written += count
            data = data[count:]

    def _write_some(self, data: memoryview, offset: int) -> int:
        if hasattr(os, "pwrite"):
            return os.pwrite(self._descriptor, data, offset)
        with self._lock:  # Windows has no pwrite
            os.lseek(self._descriptor, offset, os.SEEK_SET)
            return os.write(self._descriptor, data[: 1 << 30])


Fill = Callable[[WeightSource, Sequence[SlotWriter], Advance], None]
"""Function that writes the slots of a job. Arguments: the weights, a writer per slot, and a progress callback, which
takes the bytes read from the source."""


@dataclass(frozen=True)
class Job:
    """Writes some slots with one function."""

    slots: tuple[Slot, ...]
    run: Fill


class WeightsPlan:
    """Collects slots and jobs while the graph is built; `write` then writes the file."""

    def __init__(self) -> None:
        self.slots: dict[str, Slot] = {}
        self.jobs: list[Job] = []
        self.size = 0

    def slot(
        self, name: str, dims: Sequence[int], dtype: Any, layer: int | None, contents: Contents | None = None
    ) -> Slot:
        """Reserve page-aligned space for a tensor; without `contents` it is described as a plain array."""
        assert name not in self.slots, f"{name} is planned twice"
        dtype = np.dtype(dtype)
        size = int(np.prod(dims, dtype=np.int64)) * dtype.itemsize
        contents = contents or contents_of.array(dims, dtype)
        slot = Slot(name, tuple(int(d) for d in dims), dtype, self.size, size, layer, contents)
        self.slots[name] = slot
        self.size = -(-(self.size + size) // PAGE) * PAGE
        return slot

    def job(self, slots: Sequence[Slot], run: Fill) -> None:
        """Add the job that writes `slots`."""
        self.jobs.append(Job(tuple(slots), run))

    def write(self, path: Path, source: WeightSource, threads: int, advance: Advance) -> tuple[TensorEntry, ...]:
        """Run all jobs on `threads` threads and write the file `path`.

        Args:
            path: The file, which must not exist.
            source: The weights, with the schemes that the slots were planned for.
            threads: Number of worker threads.
            advance: Called with the bytes read from the source.

        Returns:
            The manifest's tensor table, in file order.
        """
        entries: dict[str, TensorEntry] = {}
        stop = threading.Event()
        lock, file_lock = threading.Lock(), threading.Lock()

        def checked_advance(amount: float) -> None:
            # Every job calls this often, so it also ends the job after an interruption or another job's failure.
            if stop.is_set():
                raise _StoppedError
            with lock:
                advance(amount)

        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o644)
        try:
            os.ftruncate(descriptor, self.size)

            def run(job: Job) -> None:
                writers = [SlotWriter(slot, descriptor, file_lock) for slot in job.slots]
                job.run(source, writers, checked_advance)
                for writer in writers:
                    slot = writer.slot
                    assert writer.written == slot.size, f"{slot.name}: {writer.written} of {slot.size} bytes written"
                    entries[slot.name] = TensorEntry(
                        slot.name, slot.offset, slot.size, writer.crc32, slot.layer, slot.contents
                    )

            with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="export") as pool:
                futures = [pool.submit(run, job) for job in self.jobs]
                try:
                    done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                    failed = [future for future in done if future.exception() is not None]
                except BaseException:
                    stop.set()
                    pool.shutdown(wait=True, cancel_futures=True)
                    raise
                if failed:
                    stop.set()
                    pool.shutdown(wait=True, cancel_futures=True)
                    failed[0].result()
        finally:
            os.close(descriptor)
        return tuple(entries[name] for name in self.slots)


class _StoppedError(Exception):
    """Raised inside a job because another failed or the user interrupted; never reaches the caller."""
