"""Executes blocks of a launch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from sass.code import LANES, Code, Instruction, SassError
from sass.control import control_of
from sass.floats import FLOATS
from sass.integers import INTEGERS
from sass.memory import Memory
from sass.operands import outputs, predicate, writer
from sass.state import BLOCK_BARRIER, MARKED, Block, Executable, Launched, Trace, Warp
from sass.transfers import TRANSFERS

_IGNORED = ("NOP", "YIELD", "PREEXIT", "ACQBULK", "LDGDEPBAR", "DEPBAR", "MEMBAR", "ERRBAR", "CGAERRBAR", "CCTL",
            "ENDCOLLECTIVE", "CCTLL", "FENCE", "BMOV")  # fmt: skip

_WIDE = ("IADD", "IADD3", "ISETP", "SEL", "MOV", "LDC", "SHF", "I2F", "F2I")
"""Instructions whose forms for 64 bits are known."""


def _nothing(w: Warp, mask: Any) -> None:
    del w, mask


def _compile(code: Code, ins: Instruction) -> Executable:
    guard = predicate(ins.guard) if ins.guard else None
    control = control_of(code, ins)
    run: Callable[[Warp, Any], None] = _nothing
    if control is None:
        if ins.name == "FCHK":  # no division needs its slow path
            write = writer([ins.operands[0]])
            run = lambda w, mask: write(w, mask, (np.bool_(False),))  # noqa: E731
        elif ins.name in TRANSFERS:
            run = TRANSFERS[ins.name](ins)
        elif ins.name not in _IGNORED:
            run = _computing(ins)
    return Executable(guard, run, control, ins.name in MARKED)


def _computing(ins: Instruction) -> Callable[[Warp, Any], None]:
    known = {**INTEGERS, **FLOATS}
    opcode = ins.opcode.replace("LDCU", "LDC")
    name = opcode.partition(".")[0]
    if name not in known and name.startswith("U"):  # on uniform registers
        name, opcode = name[1:], opcode[1:]
    wide = any(part in ("64", "U64", "S64") for part in opcode.split("."))
    if name not in known or (wide and name not in _WIDE):
        raise SassError("an instruction that is not known")
    operands = (*ins.operands, "RZ") if name == "VIADD" else ins.operands
    ins = Instruction(ins.address, ins.guard, opcode, operands, ins.line)
    out, ops = outputs(ins)
    compute, write = known[name](ins, out, ops), writer(out)
    return lambda w, mask: write(w, mask, compute(w))


def _unknown(ins: Instruction, error: SassError) -> Executable:
    """Fail when the instruction is executed: parts of a kernel that a launch never reaches need not be known."""

    def control(w: Warp, index: int, mask: Any, active: Any) -> Any:
        raise SassError(f"{w.block.code.kernel}: {ins}: {error}")

    return Executable(None, _nothing, control)


@functools.lru_cache(maxsize=64)
def _program(code: Code) -> tuple[Executable, ...]:
    made = []
    for ins in code.instructions:
        try:
            made.append(_compile(code, ins))
        except SassError as error:
            made.append(_unknown(ins, error))
    return tuple(made)


def execute(
    code: Code, launch: Launched, block: tuple[int, int, int], memory: Memory, most: int = 1_000_000
) -> list[Trace]:
    """Execute a block; return a trace of each warp.

    Args:
        code: the kernel.
        launch: the launch.
        block: the block's index.
        memory: global memory, which is changed.
        most: instructions after which a warp is stopped; its trace says that it was cut.

    Raises:
        SassError: the code does what this module does not know.
    """
    state = Block(code, launch, block, memory)
    count = -(-launch.threads // LANES)
    made = [Warp(state, number, _program(code)) for number in range(count)]
    running = [(warp, warp.run(most)) for warp in made]
    with np.errstate(all="ignore"):
        while running:
            running = [(warp, steps) for warp, steps in running if next(steps, BLOCK_BARRIER) is None]
    return [warp.trace for warp in made]


def iterate_blocks(grid: tuple[int, int, int]) -> Iterator[tuple[int, int, int]]:
    """Return all blocks of a grid, x first."""
    for z in range(grid[2]):
        for y in range(grid[1]):
            for x in range(grid[0]):
                yield x, y, z
