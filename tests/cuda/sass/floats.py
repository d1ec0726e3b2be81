"""Instructions on floats. Those whose results are data alone give a constant."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sass.code import Instruction, SassError
from sass.integers import COMPARE, Compute, combiner
from sass.memory import DEFAULT_WORD
from sass.operands import _SPECIAL_FLOATS, bits, byte, high_word, integer, low_word, number, pair, predicate, s64
from sass.state import Warp


def _fsetp(ins: Instruction, out: list[str], ops: list[str]) -> Compute:
    parts = ins.opcode.split(".")
    combine, kind = combiner(parts), parts[1]
    a, b, other = number(ops[0]), number(ops[1]), predicate(ops[2])

    def compute(w: Warp) -> tuple[Any, ...]:
        x, y = np.asarray(a(w)), np.asarray(b(w))
        nan = np.isnan(x) | np.isnan(y)
        if kind in ("NAN", "NUM"):
            found = nan if kind == "NAN" else ~nan
        elif kind.endswith("U") and kind != "U":
            found = nan | COMPARE[kind[:-1]](x, y)
        else:
            found = COMPARE[kind](x, y) & ~nan
        return combine(found, other(w)), combine(~found, other(w))

    return compute


def _fselect(ins: Instruction, out: list[str], ops: list[str]) -> Compute:
    a, b, which = number(ops[0]), number(ops[1]), predicate(ops[2])
    return lambda w: (bits(np.where(which(w), a(w), b(w))),)


def _floats(function: Callable[..., Any], count: int) -> Callable[..., Compute]:
    def make(ins: Instruction, out: list[str], ops: list[str]) -> Compute:
        gets = [number(op) for op in ops[:count]]
        return lambda w: (bits(function(*(get(w) for get in gets))),)

    return make


def _fminmax(ins: Instruction, out: list[str], ops: list[str]) -> Compute:
    a, b, lowest = number(ops[0]), number(ops[1]), predicate(ops[2])
    return lambda w: (bits(np.where(lowest(w), np.fmin(a(w), b(w)), np.fmax(a(w), b(w)))),)


_MUFU: Mapping[str, Callable[[Any], Any]] = {
    "RCP": lambda x: np.float32(1) / x,
    "RSQ": lambda x: np.float32(1) / np.sqrt(x),
    "SQRT": np.sqrt,
    "EX2": np.exp2,
    "LG2": np.log2,
    "TANH": np.tanh,
}


def _mufu(ins: Instruction, out: list[str], ops: list[str]) -> Compute:
    kind = ins.opcode.split(".")[1]
    if kind not in _MUFU:
        raise SassError(f"not known: {ins}")
    get, function = number(ops[0]), _MUFU[kind]
    return lambda w: (bits(function(np.asarray(get(w), np.float32))),)


def _to_float(ins: Instruction, out: list[str], ops: list[str]) -> Compute:
    parts = ins.opcode.split(".")
    if any(part in parts for part in ("F64", "F16", "S64", "S8", "U16", "S16")):
        raise SassError(f"not known: {ins}")
    wide = "U64" in parts
    get = pair(ops[0]) if wide else byte(ops[0]) if "U8" in parts else integer(ops[0])
    # I2F.RP of a register whose sign was removed; I2FP.F32.S32 converts with a sign.
    signed, up = not (wide or "U32" in parts or "U8" in parts), "RP" in parts

    def compute(w: Warp) -> tuple[Any, ...]:
        value = np.asarray(get(w))
        exact = s64(value).astype(np.float64) if signed else value.astype(np.float64)
        found = exact.astype(np.float32)
        if up:
            found = np.where(found.astype(np.float64) < exact, np.nextafter(found, np.float32(np.inf)), found)
        return (bits(found),)

    return compute


def _to_integer(ins: Instruction, out: list[str], ops: list[str]) -> Compute:
    parts = ins.opcode.split(".")
    if "TRUNC" not in parts and len(parts) > 1 and parts[1] not in ("U32", "S32", "NTZ", "FTZ"):
        raise SassError(f"not known: {ins}")
    get, wide, signed = number(ops[0]), "U64" in parts, not ("U32" in parts or "U64" in parts)
    limits = (0.0, 2.0**64 - 2048) if wide else (-(2.0**31), 2.0**31 - 1) if signed else (0.0, 2.0**32 - 1)
    rounded = np.trunc if "TRUNC" in parts else np.rint

    def compute(w: Warp) -> tuple[Any, ...]:
        value = np.nan_to_num(np.asarray(get(w), np.float64), nan=0.0, posinf=limits[1], neginf=limits[0])
        whole = np.clip(rounded(value), *limits)
        if wide:
            both = whole.astype(np.uint64)
            return low_word(both), high_word(both)
        return ((whole.astype(np.int64).astype(np.int32).view(np.uint32) if signed else whole.astype(np.uint32)),)

    return compute


def _half_fma(ins: Instruction, out: list[str], ops: list[str]) -> Compute:
    """As a move of a constant (0 * 0 + two halves); otherwise a constant result."""
    if len(ops) == 4 and ops[0].lstrip("-") == "RZ" and ops[1].lstrip("-") == "RZ":
        high, low = (int(np.float16(_SPECIAL_FLOATS.get(op) or float(op)).view(np.uint16)) for op in ops[2:])
        value = np.uint32(high << 16 | low)
        return lambda w: (value,)
    return constant_result(ins, out, ops)


def constant_result(ins: Instruction, out: list[str], ops: list[str]) -> Compute:
    values = tuple(np.uint32(DEFAULT_WORD) for _ in out)
    return lambda w: values


def _three(ins: Instruction, out: list[str], ops: list[str]) -> Compute:
    gets, lowest = [number(op) for op in ops[:3]], predicate(ops[3])

    def compute(w: Warp) -> tuple[Any, ...]:
        a, b, c = (get(w) for get in gets)
        return (bits(np.where(lowest(w), np.fmin(np.fmin(a, b), c), np.fmax(np.fmax(a, b), c))),)

    return compute


def _half_add(ins: Instruction, out: list[str], ops: list[str]) -> Compute:
    """As a conversion of a half (-0 + x, in float32); otherwise a constant result."""
    if not ins.opcode.startswith("HADD2.F32") or ops[0] != "-RZ":
        return constant_result(ins, out, ops)
    get = number(ops[1])
    return lambda w: (bits(get(w)),)


FLOATS: Mapping[str, Callable[[Instruction, list[str], list[str]], Compute]] = {
    "FSETP": _fsetp, "FSEL": _fselect, "FADD": _floats(lambda a, b: a + b, 2), "FMUL": _floats(lambda a, b: a * b, 2),
    "FFMA": _floats(lambda a, b, c: a * b + c, 3), "FMNMX": _fminmax, "FMNMX3": _three, "MUFU": _mufu, "I2F": _to_float,
    "I2FP": _to_float, "F2I": _to_integer, "HFMA2": _half_fma, "HADD2": _half_add,
    **dict.fromkeys(("HMMA", "QMMA", "F2FP", "HMUL2", "LDSM"), constant_result),
}  # fmt: skip
"""`constant_result` stands for mma instructions and conversions: data that no branch or address depends on."""
