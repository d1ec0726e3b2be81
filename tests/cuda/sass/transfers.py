"""Instructions that move values between lanes, and between registers, shared memory and global memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sass.code import LANES, Instruction, SassError
from sass.operands import Get, integer, is_predicate, outputs, pair, predicate, register, u64, writer
from sass.state import Access, Warp

_REDUCE: Mapping[str, Callable[[Any], Any]] = {"MAX": np.max, "MIN": np.min, "SUM": np.sum, "OR": np.bitwise_or.reduce}


def _shuffle(ins: Instruction) -> Callable[[Warp, Any], None]:
    out, ops = outputs(ins)
    kind = ins.opcode.split(".")[1]
    value, by, control = (integer(op) for op in ops)
    write = writer(out)
    lane = np.arange(LANES)

    def run(w: Warp, mask: Any) -> None:
        c = np.broadcast_to(control(w), LANES).astype(np.int64)
        b = np.broadcast_to(by(w), LANES).astype(np.int64) & 31
        clamp, segment = c & 31, c >> 8 & 31
        lowest, highest = lane & segment, (lane & segment) | (clamp & ~segment)
        if kind == "IDX":
            source, valid = lowest | (b & ~segment), None
            valid = source <= highest
        elif kind == "BFLY":
            source = lane ^ b
            valid = source <= highest
        elif kind == "UP":
            source = lane - b
            valid = source >= highest  # of UP the clamp is the lowest lane
        else:
            source = lane + b
            valid = source <= highest
        source = np.where(valid, source, lane)
        write(w, mask, (valid, np.broadcast_to(value(w), LANES)[source]))

    return run


def _vote(ins: Instruction) -> Callable[[Warp, Any], None]:
    name = ins.operands[0]
    with_word = not is_predicate(name)
    out = list(ins.operands[: 2 if with_word else 1])
    get = predicate(ins.operands[-1])
    every, write = ".ALL" in ins.opcode, writer(out)

    def run(w: Warp, mask: Any) -> None:
        found = np.broadcast_to(get(w), LANES) & mask
        word = np.uint32(int((found.astype(np.uint64) << np.arange(LANES, dtype=np.uint64)).sum()))
        flag = np.bool_(bool((found == mask).all()) if every else bool(found.any()))
        write(w, mask, (word, flag) if with_word else (flag,))

    return run


def _reduce(ins: Instruction) -> Callable[[Warp, Any], None]:
    parts = ins.opcode.split(".")
    function = _REDUCE["SUM" if parts[1] not in _REDUCE else parts[1]]
    get, write, signed = integer(ins.operands[1]), writer([ins.operands[0]]), "S32" in parts

    def run(w: Warp, mask: Any) -> None:
        values = np.broadcast_to(get(w), LANES)[mask]
        found = function(values.view(np.int32) if signed else values)
        write(w, mask, (np.uint32(int(found) & 0xFFFFFFFF),))

    return run


_ADDRESS = re.compile(r"(?:desc\[U?R\d+\])?\[([^\]]*)\]")


def _address(token: str, *, wide: bool) -> Get:
    match = _ADDRESS.fullmatch(token)
    if match is None:
        raise SassError(f"not an address: {token}")
    fixed, gets = 0, []
    for term in match[1].split("+"):
        if re.fullmatch(r"-?0x[0-9a-f]+", term):
            fixed += int(term, 16)
        elif scaled := re.fullmatch(r"(U?R\w+)\.X(\d+)", term):
            get, scale = integer(scaled[1]), np.uint64(int(scaled[2]))
            gets.append(lambda w, get=get, scale=scale: u64(get(w)) * scale)
        elif term.endswith(".64") or (wide and term.startswith("R") and not term.endswith(".U32")):
            gets.append(pair(term))
        else:
            get = integer(term)
            gets.append(lambda w, get=get: u64(get(w)))
    offset = np.uint64(fixed & 0xFFFFFFFFFFFFFFFF)

    def address(w: Warp) -> Any:
        total: Any = np.full(LANES, offset)
        for get in gets:
            total = total + get(w)
        return total if wide else total & np.uint64(0xFFFFFFFF)

    return address


def _size(ins: Instruction) -> int:
    sizes = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
    return next((sizes[part] for part in ins.opcode.split(".") if part in sizes), 4)


def _global_load(ins: Instruction) -> Callable[[Warp, Any], None]:
    out, ops = outputs(ins)
    address, nbytes, write = _address(ops[0], wide=True), _size(ins), writer(out)

    def run(w: Warp, mask: Any) -> None:
        at = address(w)
        _record(w, at, nbytes, mask)
        write(w, mask, tuple(w.block.memory.load(at.astype(np.int64), nbytes, mask)))

    return run


def _record(w: Warp, at: Any, nbytes: int, mask: Any) -> None:
    lanes = int(mask.sum())
    if lanes:
        w.trace.loads.append(Access(w.trace.issued, w.current, int(at[mask].min()), lanes * nbytes, lanes))


def _global_store(ins: Instruction) -> Callable[[Warp, Any], None]:
    address, nbytes = _address(ins.operands[0], wide=True), _size(ins)
    words = max(1, nbytes // 4)
    uniform, row = register(ins.operands[1])
    assert not uniform

    def run(w: Warp, mask: Any) -> None:
        values = w.r[[255 if row == 255 else row + i for i in range(words)]]
        w.trace.stored += int(mask.sum()) * nbytes
        w.block.memory.store(address(w).astype(np.int64), values, nbytes, mask)

    return run


def _atomic(ins: Instruction) -> Callable[[Warp, Any], None]:
    if "ADD" not in ins.opcode:
        raise SassError(f"not known: {ins}")
    shared = ins.name == "ATOMS"
    at = 1 if shared else 2
    out = [ins.operands[at - 1]]
    address, value, write = _address(ins.operands[at], wide=not shared), integer(ins.operands[at + 1]), writer(out)

    def run(w: Warp, mask: Any) -> None:
        places, added = address(w).astype(np.int64), np.broadcast_to(value(w), LANES)
        before = np.zeros(LANES, np.uint32)
        for lane in np.flatnonzero(mask).tolist():
            one = np.arange(LANES) == lane
            if shared:
                word = int(places[lane]) // 4
                before[lane] = w.block.shared[word]
                w.block.shared[word] += added[lane]
            else:
                before[lane] = w.block.memory.load(places, 4, one)[0, lane]
                w.block.memory.store(places, (before + added)[None], 4, one)
        write(w, mask, (before,))

    return run


def _shared_load(ins: Instruction) -> Callable[[Warp, Any], None]:
    out, ops = outputs(ins)
    address, nbytes, write = _address(ops[0], wide=False), _size(ins), writer(out)
    signed = any(part in ("S8", "S16") for part in ins.opcode.split("."))

    def run(w: Warp, mask: Any) -> None:
        at = np.where(mask, address(w).astype(np.int64), 0)
        _check_shared(w, ins, at, nbytes)
        if nbytes >= 4:
            write(w, mask, tuple(w.block.shared[at // 4 + i] for i in range(nbytes // 4)))
            return
        found = w.block.bytes.view(np.uint8 if nbytes == 1 else np.uint16)[at // nbytes]
        if signed:
            found = found.view(np.int8 if nbytes == 1 else np.int16).astype(np.int32).view(np.uint32)
        write(w, mask, (found.astype(np.uint32),))

    return run


def _shared_store(ins: Instruction) -> Callable[[Warp, Any], None]:
    address, nbytes = _address(ins.operands[0], wide=False), _size(ins)
    uniform, row = register(ins.operands[1])
    assert not uniform

    def run(w: Warp, mask: Any) -> None:
        at = address(w).astype(np.int64)[mask]
        _check_shared(w, ins, at, nbytes)
        if nbytes >= 4:
            for i in range(nbytes // 4):
                w.block.shared[at // 4 + i] = w.r[255 if row == 255 else row + i][mask]
        else:
            kind: Any = np.uint8 if nbytes == 1 else np.uint16
            w.block.bytes.view(kind)[at // nbytes] = w.r[row][mask].astype(kind)

    return run


def _check_shared(w: Warp, ins: Instruction, at: Any, nbytes: int) -> None:
    if at.size and int(at.max()) + nbytes > w.block.bytes.size:
        raise SassError(f"{w.block.code.kernel}: {ins}: beyond shared memory at {int(at.max()):#x}")


def _copy_to_shared(ins: Instruction) -> Callable[[Warp, Any], None]:
    to, source, nbytes = _address(ins.operands[0], wide=False), _address(ins.operands[1], wide=True), _size(ins)
    valid = predicate(ins.operands[2]) if len(ins.operands) > 2 else None

    def run(w: Warp, mask: Any) -> None:
        read = mask if valid is None else mask & valid(w)
        at = source(w)
        _record(w, at, nbytes, read)
        values = w.block.memory.load(at.astype(np.int64), nbytes, read)
        values = np.where(read, values, np.uint32(0))
        places = to(w).astype(np.int64)[mask]
        _check_shared(w, ins, places, nbytes)
        for i in range(nbytes // 4):
            w.block.shared[places // 4 + i] = values[i][mask]

    return run


TRANSFERS: Mapping[str, Callable[[Instruction], Callable[[Warp, Any], None]]] = {
    "SHFL": _shuffle, "VOTE": _vote, "VOTEU": _vote, "REDUX": _reduce, "CREDUX": _reduce, "LDG": _global_load,
    "LD": _global_load, "STG": _global_store, "ST": _global_store, "ATOMG": _atomic, "ATOMS": _atomic,
    "LDS": _shared_load, "STS": _shared_store, "LDGSTS": _copy_to_shared,
}  # fmt: skip
