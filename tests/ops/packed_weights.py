"""Packs weights for the operators' tests, element by element, from the layout's description.

Independent of the exporter's packer, which is compared with it. Every matrix has its exact values beside it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

KINDS = {
    "int3": 3, "int4": 4, "int5": 5, "int6": 6, "int8": 8, "split": 9,
    "fp8": 16, "float16": 17, "bfloat16": 18, "float32": 19,
}  # fmt: skip
INTEGER_KINDS = ("int3", "int4", "int5", "int6", "int8", "split")
FLOAT_KINDS = ("fp8", "float16", "bfloat16", "float32")
_MIDDLE = {"int3": 4, "int4": 8, "int5": 16, "int6": 32, "int8": 128, "split": 128}
_BLOCK_BYTES = {"int3": 384, "int4": 512, "int5": 640, "int6": 768, "int8": 1024, "split": 512}


@dataclass(frozen=True)
class Packed:
    """A packed matrix and its exact values."""

    blob: NDArray[np.uint8]
    dense: NDArray[np.float64]
    """[rows, columns], exact; for SwiGLU gate's rows first."""
    swiglu: bool = False


def fp8_values() -> NDArray[np.float64]:
    """Return the values of all 256 codes of E4M3 (OCP 8-bit floating point)."""
    codes = np.arange(256)
    sign, exponent, fraction = np.where(codes >> 7, -1.0, 1.0), codes >> 3 & 15, codes & 7
    values = np.where(exponent == 0, fraction * 2.0**-9, (8 + fraction) * 2.0 ** (exponent - 10.0))
    return np.where(codes & 127 == 127, np.nan, sign * values)


def random_matrix(
    rng: np.random.Generator,
    kind: str,
    rows: int,
    columns: int,
    *,
    group: int | None = None,
    zeros: bool = False,
    scales: str = "float16",
    swiglu: bool = False,
) -> Packed:
    """Return a random matrix W such that x W^T is about standard normal for standard normal x."""
    group = group or columns
    groups = columns // group
    if kind in FLOAT_KINDS:
        values = rng.standard_normal((rows, columns)) / np.sqrt(columns)
        if kind == "fp8":
            codes = rng.integers(0, 256, (rows, columns)).astype(np.uint8)
            codes = np.where(codes & 127 == 127, 0, codes).astype(np.uint8)
            factors = (rng.uniform(0.5, 2, (rows, groups)) * 0.01 / np.sqrt(columns)).astype(np.float32)
            dense = fp8_values()[codes] * np.repeat(factors, group, axis=1)
            return Packed(pack(kind, codes, group, scales=factors, swiglu=swiglu), dense, swiglu)
        elements: NDArray[np.generic]
        if kind == "bfloat16":
            elements = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
            dense = (elements.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        else:
            elements = values.astype(kind)
            dense = elements.astype(np.float64)
        return Packed(pack(kind, elements, group, swiglu=swiglu), dense, swiglu)
    bits = KINDS[kind] if kind != "split" else 8
    codes = rng.integers(0, 1 << bits, (rows, columns)).astype(np.uint8)
    factors = (rng.uniform(0.5, 2, (rows, groups)) / (1 << bits) * 3 / np.sqrt(columns)).astype(scales)
    points = rng.integers(0, 1 << bits, (rows, groups)).astype(np.uint8) if zeros else None
    offsets = points.astype(np.int64) if points is not None else np.full((rows, groups), _MIDDLE[kind])
    dense = (codes.astype(np.int64) - np.repeat(offsets, group, axis=1)) * np.repeat(
        factors.astype(np.float64), group, axis=1
    )
    return Packed(pack(kind, codes, group, scales=factors, zeros=points, swiglu=swiglu), dense, swiglu)


def pack(
    kind: str,
    elements: NDArray[np.generic],
    group: int,
    *,
    scales: NDArray[np.generic] | None = None,
    zeros: NDArray[np.uint8] | None = None,
    swiglu: bool = False,
) -> NDArray[np.uint8]:
    """Pack `elements` [rows, columns]: codes, or values in their storage type."""
    rows, columns = elements.shape
    parts = np.split(np.arange(rows), 2) if swiglu else [np.arange(rows)]
    tiles = []  # the rows of each tile
    for first in range(0, len(parts[0]), 32):
        tiles += [part[first : first + 32] for part in parts]
    records, low = bytearray(), bytearray()
    for tile in tiles:
        for g in range(columns // group):
            if scales is not None:
                records += _filled(scales[tile, g]).tobytes()
            if zeros is not None:
                records += _filled(zeros[tile, g]).tobytes() + bytes(32)
            codes = elements[tile, g * group : (g + 1) * group]
            if kind in FLOAT_KINDS:
                for k in range(group):
                    records += _filled(codes[:, k]).tobytes()
                continue
            for block in range(0, group, 32):
                high = _filled(codes[:, block : block + 32])
                if kind == "split":
                    low += _block("int4", high & 15)
                    high = high >> 4
                records += _block("int4" if kind == "split" else kind, high)
    low_offset = 64 + len(records) if kind == "split" else 0
    scale_kind = 0 if scales is None else {np.dtype(np.float16): 1, np.dtype(np.float32): 2}[scales.dtype]
    flags = (zeros is not None) + 2 * swiglu
    size = 64 + len(records) + len(low)
    header = struct.pack(
        "<4sBBBB5q16x", b"EDLM", 1, KINDS[kind], scale_kind, flags, rows, columns, group, size, low_offset
    )
    return np.frombuffer(header + bytes(records) + bytes(low), np.uint8)


def _filled(rows: NDArray[np.generic]) -> NDArray[np.generic]:
    """Return a tile's rows, padded with zeros."""
    return np.concatenate([rows, np.zeros((32 - len(rows), *rows.shape[1:]), rows.dtype)])


def _block(kind: str, codes: NDArray[np.uint8]) -> bytes:
    """Pack the codes [32 rows, 32 columns] of a block."""
    out = np.zeros(_BLOCK_BYTES[kind], np.uint8)
    n = np.arange(32)
    for k in range(32):
        code = codes[:, k]
        if kind == "int8":
            out[128 * (k // 4) + 4 * n + k % 4] = code
        elif kind in ("int4", "int5", "int6"):
            out[128 * (k // 8) + 4 * n + k % 4] |= (code & 15) << (4 if k % 8 >= 4 else 0)
            if kind == "int5":
                out[512 + 4 * n + k % 4] |= (code >> 4) << (k // 4)
            elif kind == "int6":
                out[512 + 128 * (k // 16) + 4 * n + k % 4] |= (code >> 4) << (2 * (k % 16 // 4))
        else:
            out[128 * (k // 16) + 4 * n + k % 4] |= (code & 3) << (2 * (k % 16 // 4))
            out[256 + 4 * n + k % 4] |= (code >> 2) << (k // 4)
    return out.tobytes()


def pack_experts(experts: list[tuple[Packed, Packed]]) -> NDArray[np.uint8]:
    """Pack (gate+up, down) of each expert as one layer."""
    body, offsets = bytearray(), []
    start = 64 + 16 * len(experts)
    for expert in experts:
        for matrix in expert:
            body += bytes(-(start + len(body)) % 64)
            offsets.append(start + len(body))
            body += matrix.blob.tobytes()
    header = struct.pack("<4sB3xqq40x", b"EDLX", 1, len(experts), start + len(body))
    return np.frombuffer(header + struct.pack(f"<{len(offsets)}q", *offsets) + bytes(body), np.uint8)
