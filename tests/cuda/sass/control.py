"""Branches, and barriers at which the lanes of a warp or the warps of a block meet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from sass.code import LANES, Code, Instruction, SassError, target
from sass.operands import integer, is_predicate, predicate
from sass.state import BLOCK_BARRIER, Barrier, Warp

_Control = Callable[[Warp, int, Any, Any], Any]


def _branch(code: Code, ins: Instruction) -> _Control:
    to = target(code, ins.operands[-1])
    conditions = [predicate(op) for op in ins.operands[:-1] if is_predicate(op)]
    if ".DIV" in ins.opcode:  # to code for lanes that have not met: here they meet first
        return _meet
    if ".CONV" in ins.opcode:  # past a WARPSYNC, if the lanes have met
        return lambda w, index, mask, active: (to if (mask == w.live).all() else index + 1, mask)

    def control(w: Warp, index: int, mask: Any, active: Any) -> Any:
        taken = active
        for condition in conditions:
            taken = taken & condition(w)
        if not taken.any():
            return index + 1, mask
        rest = mask & ~taken
        if not rest.any():
            return to, mask
        w.ready += [(to, taken), (index + 1, rest)]
        return None

    return control


def _meet(w: Warp, index: int, mask: Any, active: Any) -> Any:
    """Wait until all lanes have come to such an instruction."""
    if active.any() and w.meeting is None:
        w.meeting = Barrier(w.live.copy(), np.zeros(LANES, bool))
    return _arrive(w, w.meeting, index, mask, active) if w.meeting is not None else (index + 1, mask)


def _arrive(w: Warp, barrier: Barrier, index: int, mask: Any, active: Any) -> Any:
    if not active.any():
        return index + 1, mask
    rest = mask & ~active
    if rest.any():
        w.ready.append((index + 1, rest))
    barrier.arrived |= active
    w.waiting.append((index + 1, active, barrier))
    w.release(barrier)
    return None


def _return(ins: Instruction) -> _Control:
    get = integer(ins.operands[0].split()[0])

    def control(w: Warp, index: int, mask: Any, active: Any) -> Any:
        to = np.broadcast_to(get(w), LANES)
        for address in np.unique(to[active]).tolist():
            w.ready.append((int(address) // 16, active & (to == address)))
        if (mask & ~active).any():
            w.ready.append((index + 1, mask & ~active))

    return control


def _exit(w: Warp, index: int, mask: Any, active: Any) -> Any:
    w.exit(active)
    rest = mask & ~active
    return (index + 1, rest) if rest.any() else None


def _open_barrier(ins: Instruction) -> _Control:
    name = ins.operands[0]

    def control(w: Warp, index: int, mask: Any, active: Any) -> Any:
        kept = w.barriers.setdefault(name, [])
        for one in list(kept):  # of an earlier pass of a loop, in which other lanes may still be
            one.members = one.members & ~mask
            w.release(one)
        kept.append(Barrier(mask.copy(), np.zeros(LANES, bool)))
        return index + 1, mask

    return control


def _barrier_of(w: Warp, name: str, mask: Any) -> Barrier:
    found = [one for one in w.barriers.get(name, []) if (one.members & mask).any()]
    if len(found) != 1:
        raise SassError(f"{w.block.code.kernel}: {len(found)} convergence barriers {name} hold the lanes")
    return found[0]


def _wait_barrier(ins: Instruction) -> _Control:
    name = ins.operands[0]
    return lambda w, index, mask, active: _arrive(w, _barrier_of(w, name, mask), index, mask, active)


def _leave_barrier(ins: Instruction) -> _Control:
    name = ins.operands[-1]
    conditions = [predicate(op) for op in ins.operands[:-1]]

    def control(w: Warp, index: int, mask: Any, active: Any) -> Any:
        for condition in conditions:
            active = active & condition(w)
        if active.any():
            barrier = _barrier_of(w, name, active)
            barrier.members = barrier.members & ~active
            w.release(barrier)
        return index + 1, mask

    return control


def _block_barrier(w: Warp, index: int, mask: Any, active: Any) -> Any:
    del w, index, mask, active
    return BLOCK_BARRIER


def control_of(code: Code, ins: Instruction) -> _Control | None:
    """Return what an instruction does to the flow of control; None for one that the next always follows."""
    name = ins.name
    if name in ("BRA", "CALL"):
        return _branch(code, ins)
    if name == "EXIT":
        return _exit
    if name == "WARPSYNC" and ".COLLECTIVE" not in ins.opcode:
        return _meet
    if name == "BAR" and ".SYNC" in ins.opcode:
        return _block_barrier
    made = {"RET": _return, "BSSY": _open_barrier, "BSYNC": _wait_barrier, "BREAK": _leave_barrier}.get(name)
    return None if made is None else made(ins)
