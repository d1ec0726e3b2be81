"""Reads operands: functions that get a source's value from a warp, and write results to it.

A value is a word for each lane, or one of all lanes (uniform registers, constants, immediates).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from sass.code import Instruction, SassError
from sass.state import Warp

Get = Callable[[Warp], Any]
WORDS = {"64": 2, "128": 4}
REGISTER = re.compile(r"(U?)R(\d+|Z)")
_PREDICATE = re.compile(r"(U?)P(\d|T)")
CONSTANT = re.compile(r"c\[(0x[0-9a-f]+)\]\[([^\]]*)\]")
_IMMEDIATE = re.compile(r"-?0x[0-9a-f]+")
_SPECIAL_FLOATS = {"+INF": np.inf, "-INF": -np.inf, "INF": np.inf, "+QNAN": np.nan, "-QNAN": np.nan, "QNAN": np.nan}


def register(token: str) -> tuple[bool, int]:
    match = REGISTER.fullmatch(token)
    if match is None:
        raise SassError(f"not a register: {token}")
    return bool(match[1]), 255 if match[2] == "Z" else int(match[2])


def predicate(token: str) -> Get:
    negate = token.startswith("!")
    match = _PREDICATE.fullmatch(token.lstrip("!"))
    if match is None:
        raise SassError(f"not a predicate: {token}")
    row, uniform = 7 if match[2] == "T" else int(match[2]), bool(match[1])
    if uniform:
        return (lambda w: ~w.up[row]) if negate else (lambda w: w.up[row])
    return (lambda w: ~w.p[row]) if negate else (lambda w: w.p[row])


def is_predicate(token: str) -> bool:
    return _PREDICATE.fullmatch(token.lstrip("!")) is not None


def word(token: str) -> tuple[Get, Get]:
    """Return getters of the low and the high word of a register pair, constant or immediate."""
    if match := REGISTER.fullmatch(token):
        uniform, row = register(token)
        high = 255 if row == 255 else row + 1
        if uniform:
            return (lambda w: w.u[row]), (lambda w: w.u[high])
        return (lambda w: w.r[row]), (lambda w: w.r[high])
    if match := CONSTANT.fullmatch(token):
        bank, at = int(match[1], 16), match[2]
        if not _IMMEDIATE.fullmatch(at):
            raise SassError(f"an operand that is not known: {token}")
        index = int(at, 16) // 4
        if bank:
            return (lambda w: w.block.banks[bank][index]), (lambda w: w.block.banks[bank][index + 1])
        return (lambda w: w.block.constants[index]), (lambda w: w.block.constants[index + 1])
    if _IMMEDIATE.fullmatch(token):
        value = int(token, 16)
        low, top = np.uint32(value & 0xFFFFFFFF), np.uint32(0xFFFFFFFF if value < 0 else 0)
        return (lambda w: low), (lambda w: top)
    raise SassError(f"an operand that is not known: {token}")


def bare_operand(token: str) -> tuple[str, str]:
    """Return the prefix (-, ~, |) and the token without it and without .reuse and .64."""
    token = re.sub(r"\.(reuse|64|U32|32)\b", "", token)
    match = re.fullmatch(r"([-~]?\|?)(.*?)\|?", token)
    assert match is not None
    if match[1] == "-" and re.match(r"0x|\d|INF|QNAN", match[2]):
        return "", token
    return match[1], match[2]


def integer(token: str) -> Get:
    prefix, bare = bare_operand(token)
    get = word(bare)[0]
    if prefix == "-":
        return lambda w: np.uint32(0) - get(w)
    if prefix == "~":
        return lambda w: ~get(w)
    if prefix:
        raise SassError(f"an operand that is not known: {token}")
    return get


def byte(token: str) -> Get:
    match = re.fullmatch(r"(U?R\w+?)(?:\.B([0-3]))?", token)
    if match is None:
        raise SassError(f"not a byte: {token}")
    get, shift = word(match[1])[0], np.uint32(8 * int(match[2] or 0))
    return lambda w: get(w) >> shift & np.uint32(255)


def addend(token: str) -> Get:
    """A term of a sum with carry, as uint64: -x is 2^32 - x."""
    prefix, bare = bare_operand(token)
    get = word(bare)[0]
    if prefix == "-":
        return lambda w: np.uint64(1 << 32) - u64(get(w))
    if prefix == "~":
        return lambda w: u64(~get(w))
    return lambda w: u64(get(w))


def pair(token: str) -> Get:
    prefix, bare = bare_operand(token)
    low, high = word(bare)
    get: Get = lambda w: u64(low(w)) | u64(high(w)) << np.uint64(32)  # noqa: E731
    if prefix == "-":
        return lambda w: np.uint64(0) - get(w)
    if prefix == "~":
        return lambda w: ~get(w)
    return get


def number(token: str) -> Get:
    prefix, bare = bare_operand(token)
    half = re.fullmatch(r"(\w+)\.H([01])_H[01]", bare)
    if half:
        get = word(half[1])[0]
        shift = np.uint32(16 * int(half[2]))
        base: Get = lambda w: (get(w) >> shift & np.uint32(0xFFFF)).astype(np.uint16).view(np.float16).astype("f4")  # noqa: E731
    elif REGISTER.fullmatch(bare) or CONSTANT.fullmatch(bare) or bare.startswith("0x"):
        read = word(bare)[0]
        base = lambda w: read(w).view(np.float32)  # noqa: E731
    else:
        value = np.float32(_SPECIAL_FLOATS[bare] if bare in _SPECIAL_FLOATS else float(bare))
        base = lambda w: value  # noqa: E731
    if "|" in prefix:
        inner = base
        base = lambda w: np.abs(inner(w))  # noqa: E731
    if prefix.startswith("-"):
        return lambda w: -base(w)
    return base


def u64(x: Any) -> Any:
    return x.astype(np.uint64)


def s64(x: Any) -> Any:
    return x.view(np.int32).astype(np.int64)


def low_word(x: Any) -> Any:
    return (x & np.uint64(0xFFFFFFFF)).astype(np.uint32)


def high_word(x: Any) -> Any:
    return (x >> np.uint64(32)).astype(np.uint32)


def bits(x: Any) -> Any:
    return np.asarray(x, np.float32).view(np.uint32)


def outputs(ins: Instruction) -> tuple[list[str], list[str]]:
    """Split the operands into results and sources; a wide result has a token for each register."""
    ops = list(ins.operands)
    name = ins.name
    count = 1
    if name in ("ISETP", "FSETP", "PLOP3"):
        return ops[:2], ops[2:]
    if name in ("LOP3", "SHFL") and is_predicate(ops[0]):
        return ops[:2], ops[2:]
    if name == "VIMNMX" and len(ops) == 6:  # from SM 100 on two predicates follow, PT in all code seen
        return ops[:1], ops[3:]
    if name in ("VOTE", "FCHK") or name.startswith("ATOM"):
        return ops[:2], ops[2:]
    while name in ("IADD3", "LEA", "IMAD") and is_predicate(ops[count]) and not ops[count].startswith("!"):
        count += 1
    out, rest = ops[:count], ops[count:]
    if ins.opcode == "IADD3.64":
        out = [op for op in out if op not in ("PT", "UPT")]
    words = _words_of(ins)
    if words > 1:
        uniform, row = register(out[0])
        prefix = "UR" if uniform else "R"
        out = [*(out[0] if row == 255 else f"{prefix}{row + i}" for i in range(words)), *out[1:]]
    return out, rest


def _words_of(ins: Instruction) -> int:
    """How many registers the first result has."""
    parts = ins.opcode.split(".")
    if ins.name in ("LDC", "LDG", "LDS", "LD", "LDL"):
        return next((WORDS[part] for part in parts if part in WORDS), 1)
    if ins.name == "IMAD":
        return 2 if "WIDE" in parts else 1
    if ins.name == "CS2R":
        return 1 if "32" in parts else 2
    if ins.name == "F2I":
        return 2 if "U64" in parts or "S64" in parts else 1
    if ins.name in ("HMMA", "LDSM", "QMMA"):
        if ins.name == "LDSM":
            return int(parts[-1]) if parts[-1].isdigit() else 1
        return 4 if "F32" in parts else 2
    return 2 if ins.name in ("MOV", "IADD", "IADD3", "SEL") and "64" in parts else 1


def writer(out: list[str]) -> Callable[[Warp, Any, tuple[Any, ...]], None]:
    """Return the function that writes results under a mask."""
    places: list[tuple[str, int]] = []
    for token in out:
        if is_predicate(token):
            uniform, row = token.startswith("U"), token[-1]
            places.append(("up" if uniform else "p", 8 if row == "T" else int(row)))
        else:
            is_uniform, number = register(token)
            places.append(("u" if is_uniform else "r", 256 if number == 255 else number))

    def write(w: Warp, mask: Any, values: tuple[Any, ...]) -> None:
        for (kind, row), value in zip(places, values, strict=True):
            if kind == "r":
                np.copyto(w.r[row], value, where=mask)
            elif kind == "p":
                np.copyto(w.p[row], value, where=mask)
            elif mask.any():
                if np.ndim(value):
                    value = value[int(np.argmax(mask))]
                (w.u if kind == "u" else w.up)[row] = value

    return write
