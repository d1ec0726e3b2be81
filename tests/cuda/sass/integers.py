"""Instructions on integers and predicates, and moves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sass.code import LANES, Instruction, SassError
from sass.operands import (
    CONSTANT,
    addend,
    bare_operand,
    high_word,
    integer,
    low_word,
    pair,
    predicate,
    s64,
    u64,
    word,
)
from sass.state import Warp

Compute = Callable[[Warp], tuple[Any, ...]]


def _iadd3(ins: Instruction, out: list[str], ops: list[str]) -> Compute:
    carries = [predicate(op) for op in ops[3:]] if ".X" in ins.opcode else []
    terms = [addend(op) for op in ops[:3]]

    def compute(w: Warp) -> tuple[Any, ...]:
        total = terms[0](w)
        for term in terms[1:]:
            total = total + term(w)
        for carry in carries:
            total = total + u64(np.asarray(carry(w)))
        top = total >> np.uint64(32)
        return (low_word(total), top > 0, top > 1)[: len(out)]

    return compute


def _iadd(ins: Instruction, out: list[str], ops: list[str]) -> Compute:
    if not ins.opcode.endswith(".64"):
        return _iadd3(ins, out, ops)
    if len(out) > 2:
        raise SassError(f"not known: {ins}")
    gets = [pair(op) for op in ops]

    def compute(w: Warp) -> tuple[Any, ...]:
        total = gets[0](w)
        for get in gets[1:]:
            total = total + get(w)
        return low_word(total), high_word(total)

    return compute


def _imad(ins: Instruction, out: list[str], ops: list[str]) -> Compute:
    parts = ins.opcode.split(".")
    unsigned = "U32" in parts
    if "WIDE" in parts or "HI" in parts:
        a, b = integer(ops[0]), integer(ops[1])
        c = pair(ops[2]) if len(ops) > 2 else lambda w: np.uint64(0)
        carry = predicate(ops[3]) if "X" in parts else None
        wide = "WIDE" in parts

        def compute(w: Warp) -> tuple[Any, ...]:
            x, y = a(w), b(w)
            multiplied = u64(x) * u64(y) if unsigned else (s64(x) * s64(y)).view(np.uint64)
            addend = c(w)
            total = multiplied + addend
            over = total < multiplied
            if carry is not None:
                total = total + u64(np.asarray(carry(w)))
            values = (low_word(total), high_word(total)) if wide else (high_word(total),)
            return (*values, over)[: len(out)]

        return compute
    a, b, c = (integer(op) for op in ops[:3])
    carry = predicate(ops[3]) if "X" in parts else None

    def plain(w: Warp) -> tuple[Any, ...]:
        total = a(w) * b(w) + c(w)
        return (total if carry is None else total + np.asarray(carry(w)).astype(np.uint32),)

    return plain


def _lea(ins: Instruction, out: list[str], ops: list[str]) -> Compute:
    parts = ins.opcode.split(".")
    if "HI" not in parts:
        a, b, shift = integer(ops[0]), addend(ops[1]), np.uint32(int(ops[2], 16))

        def compute(w: Warp) -> tuple[Any, ...]:
            total = u64(a(w) << shift) + b(w)
            return (low_word(total), total >> np.uint64(32) > 0)[: len(out)]

        return compute
    extended = "SX32" in parts
    a, b = integer(ops[0]), integer(ops[1])
    c = None if extended else integer(ops[2])
    at = 2 if extended else 3
    places = np.uint64(int(ops[at], 16))
    carry = predicate(ops[at + 1]) if "X" in parts else None

    def high(w: Warp) -> tuple[Any, ...]:
        low = a(w)
        whole = s64(low).view(np.uint64) if c is None else u64(low) | u64(c(w)) << np.uint64(32)
        total = high_word(whole << places) + b(w)
        return (total if carry is None else total + np.asarray(carry(w)).astype(np.uint32),)

    return high


def _shift(ins: Instruction, out: list[str], ops: list[str]) -> Compute:
    parts = ins.opcode.split(".")
    left, high, wrap = "L" in parts[1], "HI" in parts, "W" in parts
    wide, signed = any(p in parts for p in ("U64", "S64")), any(p in parts for p in ("S32", "S64"))
    low, by, top = integer(ops[0]), integer(ops[1]), integer(ops[2])
    most = np.uint32(63 if wide else 32)

    def compute(w: Warp) -> tuple[Any, ...]:
        amount = by(w)
        amount = amount & np.uint32(63 if wide else 31) if wrap else np.minimum(amount, most)
        places = u64(amount)
        value = u64(low(w)) | u64(top(w)) << np.uint64(32)
        if left:
            value = value << places
        elif signed:
            value = (value.view(np.int64) >> places.view(np.int64)).view(np.uint64)
        else:
            value = value >> places
        return (high_word(value) if high else low_word(value),)

    return compute


COMPARE: Mapping[str, Callable[[Any, Any], Any]] = {
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
}


def combiner(parts: Sequence[str]) -> Callable[[Any, Any], Any]:
    return (lambda a, b: a | b) if "OR" in parts else (lambda a, b: a ^ b) if "XOR" in parts else (lambda a, b: a & b)


def _isetp(ins: Instruction, out: list[str], ops: list[str]) -> Compute:
    parts = ins.opcode.split(".")
    compare, combine, signed = COMPARE[parts[1]], combiner(parts), "U32" not in parts and "U64" not in parts
    wide = "U64" in parts or "S64" in parts
    a, b, other = (pair if wide else integer)(ops[0]), (pair if wide else integer)(ops[1]), predicate(ops[2])
    before = predicate(ops[3]) if "EX" in parts else None
    strict = {"LE": "LT", "GE": "GT"}.get(parts[1], parts[1])

    def compute(w: Warp) -> tuple[Any, ...]:
        x, y = np.asarray(a(w)), np.asarray(b(w))
        if signed:
            x, y = x.view(np.int64 if wide else np.int32), y.view(np.int64 if wide else np.int32)
        if before is None:
            found = compare(x, y)
        elif strict == "NE":
            found = (x != y) | before(w)
        elif strict == "EQ":
            found = (x == y) & before(w)
        else:
            found = COMPARE[strict](x, y) | ((x == y) & before(w))
        return combine(found, other(w)), combine(~found, other(w))

    return compute


def _table(lut: int, a: Any, b: Any, c: Any, ones: Any) -> Any:
    """Bitwise function of three operands; bit 4 a + 2 b + c of `lut` is its result."""
    total = a & ~a
    for index in range(8):
        if lut >> index & 1:
            one = (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
            total = total | one
    return total & ones


def _lop3(ins: Instruction, out: list[str], ops: list[str]) -> Compute:
    a, b, c = (integer(op) for op in ops[:3])
    lut, other = int(ops[3], 16), predicate(ops[4])

    def compute(w: Warp) -> tuple[Any, ...]:
        value = _table(lut, a(w), b(w), c(w), np.uint32(0xFFFFFFFF))
        return ((value != 0) | other(w), value) if len(out) > 1 else (value,)

    return compute


def _plop3(ins: Instruction, out: list[str], ops: list[str]) -> Compute:
    a, b, c = (predicate(op) for op in ops[:3])
    luts = int(ops[3], 16), int(ops[4], 16)

    def compute(w: Warp) -> tuple[Any, ...]:
        values = [np.asarray(get(w)) for get in (a, b, c)]
        return tuple(_table(lut, *values, np.bool_(True)) for lut in luts)

    return compute


def _prmt(ins: Instruction, out: list[str], ops: list[str]) -> Compute:
    if len(ins.opcode.split(".")) > 1:
        raise SassError(f"not known: {ins}")
    a, selector, b = (integer(op) for op in ops[:3])

    def compute(w: Warp) -> tuple[Any, ...]:
        source = u64(np.asarray(a(w))) | u64(np.asarray(b(w))) << np.uint64(32)
        chosen = np.asarray(selector(w)).astype(np.uint64)
        total = np.uint64(0) * source
        for i in range(4):
            nibble = chosen >> np.uint64(4 * i) & np.uint64(15)
            byte = source >> ((nibble & np.uint64(7)) * np.uint64(8)) & np.uint64(255)
            byte = np.where(nibble & np.uint64(8), (byte >> np.uint64(7)) * np.uint64(255), byte)
            total = total | byte << np.uint64(8 * i)
        return (low_word(total),)

    return compute


def _minmax(ins: Instruction, out: list[str], ops: list[str]) -> Compute:
    parts = ins.opcode.split(".")
    signed, added = "U32" not in parts, ins.name.startswith("VIADD")
    gets = [integer(op) for op in ops[: 3 if added else 2]]
    lowest, relu = predicate(ops[3 if added else 2]), "RELU" in parts

    def compute(w: Warp) -> tuple[Any, ...]:
        values = [np.asarray(get(w)) for get in gets]
        if added:
            values = [values[0] + values[1], values[2]]
        if signed:
            values = [value.view(np.int32) for value in values]
        found = np.where(lowest(w), np.minimum(*values), np.maximum(*values))
        if relu:
            found = np.maximum(found, 0)
        return (found.view(np.uint32) if signed else found,)

    return compute


def _select(ins: Instruction, out: list[str], ops: list[str]) -> Compute:
    which = predicate(ops[2])
    if ins.opcode.endswith(".64"):
        first, second = pair(ops[0]), pair(ops[1])

        def compute(w: Warp) -> tuple[Any, ...]:
            found = np.where(which(w), first(w), second(w))
            return low_word(found), high_word(found)

        return compute
    a, b = integer(ops[0]), integer(ops[1])
    return lambda w: (np.where(which(w), a(w), b(w)),)


def _move(ins: Instruction, out: list[str], ops: list[str]) -> Compute:
    if len(out) == 2:
        low, high = word(bare_operand(ops[0])[1]) if ops[0] != "SRZ" else word("RZ")
        return lambda w: (low(w), high(w))
    get = integer(ops[0] if ops[0] != "SRZ" else "RZ")
    return lambda w: (get(w),)


def _one_integer(function: Callable[[Any], Any]) -> Callable[..., Compute]:
    def make(ins: Instruction, out: list[str], ops: list[str]) -> Compute:
        get = integer(ops[0])
        return lambda w: (function(np.asarray(get(w))).astype(np.uint32),)

    return make


def _leading(x: Any) -> Any:
    """The position of the highest set bit; all ones if there is none."""
    exponent = np.frexp(x.astype(np.float64))[1].astype(np.int64) - 1
    return np.where(x == 0, -1, exponent).astype(np.int32).view(np.uint32)


def _flo(ins: Instruction, out: list[str], ops: list[str]) -> Compute:
    if "U32" not in ins.opcode:
        raise SassError(f"not known: {ins}")
    get, shift = integer(ops[0]), ".SH" in ins.opcode

    def compute(w: Warp) -> tuple[Any, ...]:
        x = np.asarray(get(w))
        found = _leading(x)
        return (np.where(x == 0, found, np.uint32(31) - found) if shift else found,)

    return compute


def _reversed_bits(x: Any) -> Any:
    total = np.uint32(0) * x
    for i in range(32):
        total = total | (x >> np.uint32(i) & np.uint32(1)) << np.uint32(31 - i)
    return total


_SPECIAL: Mapping[str, Callable[[Warp], Any]] = {
    "SR_TID.X": lambda w: w.tid,
    "SR_TID.Y": lambda w: np.uint32(0),
    "SR_TID.Z": lambda w: np.uint32(0),
    "SR_CTAID.X": lambda w: np.uint32(w.block.block[0]),
    "SR_CTAID.Y": lambda w: np.uint32(w.block.block[1]),
    "SR_CTAID.Z": lambda w: np.uint32(w.block.block[2]),
    "SR_LANEID": lambda w: np.arange(LANES, dtype=np.uint32),
    "SR_LTMASK": lambda w: ((np.uint64(1) << np.arange(LANES, dtype=np.uint64)) - np.uint64(1)).astype(np.uint32),
    "SR_EQMASK": lambda w: (np.uint64(1) << np.arange(LANES, dtype=np.uint64)).astype(np.uint32),
    "SR_CgaCtaId": lambda w: np.uint32(0),
}


def _special(ins: Instruction, out: list[str], ops: list[str]) -> Compute:
    if ops[0] not in _SPECIAL:
        raise SassError(f"not known: {ins}")
    get = _SPECIAL[ops[0]]
    return lambda w: (get(w),)


def _load_constant(ins: Instruction, out: list[str], ops: list[str]) -> Compute:
    match = CONSTANT.fullmatch(ops[0])
    if match is None:
        raise SassError(f"not known: {ins}")
    size = {"U8": 1, "S8": 1, "U16": 2, "64": 8, "128": 16}.get(ins.opcode.rpartition(".")[2], 4)
    bank, terms = int(match[1], 16), match[2].split("+")
    fixed = sum(int(term, 16) for term in terms if term.startswith("0x"))
    moving = [integer(term) for term in terms if not term.startswith("0x")]

    def compute(w: Warp) -> tuple[Any, ...]:
        words = w.block.banks[bank] if bank else w.block.constants
        at = np.uint32(fixed)
        for get in moving:
            at = at + get(w)
        if size < 4:
            return (words.view(np.uint8 if size == 1 else np.uint16)[at // size].astype(np.uint32),)
        return tuple(words[at // 4 + i] for i in range(len(out)))

    return compute


def _pack_predicates(ins: Instruction, out: list[str], ops: list[str]) -> Compute:
    if len(ins.opcode.split(".")) > 1 or ops[0] != "PR":
        raise SassError(f"not known: {ins}")
    get, chosen = integer(ops[1]), np.uint32(int(ops[2], 16))

    def compute(w: Warp) -> tuple[Any, ...]:
        packed = np.bitwise_or.reduce([w.p[i].astype(np.uint32) << np.uint32(i) for i in range(7)])
        return (get(w) & ~chosen | packed & chosen,)

    return compute


INTEGERS: Mapping[str, Callable[[Instruction, list[str], list[str]], Compute]] = {
    "IADD": _iadd, "IADD3": _iadd, "VIADD": _iadd3, "IMAD": _imad, "LEA": _lea, "SHF": _shift, "ISETP": _isetp,
    "LOP3": _lop3, "PLOP3": _plop3, "PRMT": _prmt, "IMNMX": _minmax, "VIMNMX": _minmax, "VIADDMNMX": _minmax,
    "SEL": _select, "MOV": _move, "CS2R": _move, "R2UR": _move, "FLO": _flo, "P2R": _pack_predicates, "S2R": _special,
    "S2UR": _special, "LDC": _load_constant, "IABS": _one_integer(lambda x: np.abs(x.view(np.int32)).view(np.uint32)),
    "POPC": _one_integer(np.bitwise_count), "BREV": _one_integer(_reversed_bits),
}  # fmt: skip
