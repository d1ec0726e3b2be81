"""The state of a warp and a block, and what was recorded of a warp."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sass.code import LANES, Code, SassError
from sass.memory import Memory


@dataclass
class Access:
    """A load from global memory by a warp.

    Attributes:
        issued: how many instructions the warp had issued before it.
        index: of the instruction.
        first: the lowest address.
        nbytes: bytes of all lanes.
        lanes: number of lanes.
    """

    issued: int
    index: int
    first: int
    nbytes: int
    lanes: int


@dataclass
class Trace:
    """What a warp executed.

    Attributes:
        counts: how often it issued each instruction of the code.
        loads: its loads and asynchronous copies from global memory, in order.
        marks: how many instructions had been issued before each execution of an instruction of `MARKED`, and its index.
        mmas: the part of `marks` that are mma instructions, without their indices; filled in by the caller.
        cut: it issued as many instructions as it was allowed to, and has not ended.
    """

    block: tuple[int, int, int]
    warp: int
    counts: np.ndarray[Any, Any]
    loads: list[Access] = field(default_factory=list)
    marks: list[tuple[int, int]] = field(default_factory=list)
    issued: int = 0
    stored: int = 0
    cut: bool = False
    mmas: list[int] = field(default_factory=list)


MARKED = ("HMMA", "QMMA", "BAR", "ACQBULK", "PREEXIT", "I2F")


@dataclass(eq=False)
class Barrier:
    """A convergence barrier: the lanes that take part, and those that wait."""

    members: np.ndarray[Any, Any]
    arrived: np.ndarray[Any, Any]


class Block:
    def __init__(self, code: Code, launch: Launched, block: tuple[int, int, int], memory: Memory) -> None:
        self.code, self.launch, self.block, self.memory = code, launch, block, memory
        self.shared = np.full((1024 + launch.shared) // 4 + 64, 0x7FC0FFFF, np.uint32)
        self.bytes = self.shared.view(np.uint8)
        self.constants = launch.constants(code.sm, code.arguments)
        self.banks = {bank: np.frombuffer(data + bytes(-len(data) % 4), "<u4") for bank, data in code.constants.items()}


@dataclass(frozen=True)
class Launched:
    """The launch to execute: blocks, threads of a block, bytes of shared memory, argument bytes."""

    grid: tuple[int, int, int]
    threads: int
    shared: int
    args: bytes

    def constants(self, sm: int, offset: int) -> np.ndarray[Any, Any]:
        """Return the words of bank 0 of constants; `offset` is that of the arguments."""
        bank = bytearray(offset + len(self.args) + 64)
        sizes = np.array([self.threads, 1, 1, *self.grid], "<u4").tobytes()
        threads_at, grid_at = (0, 12) if sm < 100 else (0x360, 0x370)
        bank[threads_at : threads_at + 12] = sizes[:12]
        bank[grid_at : grid_at + 12] = sizes[12:]
        bank[offset : offset + len(self.args)] = self.args
        bank += bytes(-len(bank) % 4)
        return np.frombuffer(bytes(bank), "<u4")


class Warp:
    def __init__(self, block: Block, number: int, executable: Sequence[Executable]) -> None:
        self.block, self.number, self.executable = block, number, executable
        self.r = np.zeros((260, LANES), np.uint32)
        self.u = np.zeros(260, np.uint32)
        self.p = np.zeros((10, LANES), bool)
        self.up = np.zeros(10, bool)
        self.p[7] = self.up[7] = True
        threads = np.arange(number * LANES, (number + 1) * LANES)
        self.live = threads < block.launch.threads
        self.tid = threads.astype(np.uint32)
        self.barriers: dict[str, list[Barrier]] = {}
        self.ready: list[tuple[int, np.ndarray[Any, Any]]] = [(0, self.live.copy())]
        self.waiting: list[tuple[int, np.ndarray[Any, Any], Barrier]] = []
        self.meeting: Barrier | None = None
        self.current = 0
        self.trace = Trace(block.block, number, np.zeros(len(executable), np.int64))

    # -- control -------------------------------------------------------------------------------------------------------

    def run(self, most: int) -> Generator[None, None, None]:
        """Execute until all lanes have exited or `most` instructions; stop at each barrier of the block."""
        trace, counts = self.trace, self.trace.counts
        while self.ready:
            index, mask = self._take()
            while True:
                if trace.issued >= most:
                    trace.cut = True
                    return
                executable = self.executable[index]
                counts[index] += 1
                self.current = index
                if executable.mark:
                    trace.marks.append((trace.issued, index))
                active = mask if executable.guard is None else mask & executable.guard(self)
                if executable.control is None:
                    if executable.guard is None or active.any():
                        executable.run(self, active)
                    trace.issued += 1
                    index += 1
                    continue
                following = executable.control(self, index, mask, active)
                trace.issued += 1
                if following is BLOCK_BARRIER:
                    yield
                    index += 1
                elif following is None:
                    break
                else:
                    index, mask = following
        if self.waiting:
            raise SassError(f"{self.block.code.kernel}: lanes wait for lanes that never come")

    def _take(self) -> tuple[int, np.ndarray[Any, Any]]:
        index = min(entry[0] for entry in self.ready)
        mask = np.zeros(LANES, bool)
        for entry in self.ready:
            if entry[0] == index:
                mask |= entry[1]
        self.ready = [entry for entry in self.ready if entry[0] != index]
        return index, mask

    def exit(self, lanes: np.ndarray[Any, Any]) -> None:
        """End lanes, and release barriers that wait for nothing else."""
        self.live = self.live & ~lanes
        for barrier in {id(entry[2]): entry[2] for entry in self.waiting}.values():
            self.release(barrier)

    def release(self, barrier: Barrier) -> None:
        """Let lanes go on if all members of the barrier that have not exited are there."""
        if (barrier.members & self.live & ~barrier.arrived).any():
            return
        self.ready += [entry[:2] for entry in self.waiting if entry[2] is barrier]
        self.waiting = [entry for entry in self.waiting if entry[2] is not barrier]
        if self.meeting is barrier:
            self.meeting = None
        for kept in self.barriers.values():
            kept[:] = [one for one in kept if one is not barrier]


BLOCK_BARRIER: Any = object()


@dataclass
class Executable:
    guard: Callable[[Warp], Any] | None
    run: Callable[[Warp, Any], None]
    control: Callable[[Warp, int, Any, Any], Any] | None = None
    mark: bool = False
