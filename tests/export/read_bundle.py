"""Read every weight of a bundle with numpy and json alone, as docs/reference/weights.md says.

It shares no code with EdgeLM, and is simple but slow. `read_weights` returns float32 values by the checkpoint's names;
tensors that the export computed have the bundle's own names.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
BITS = {"int3": 3, "int4": 4, "int5": 5, "int6": 6, "int8": 8}
KINDS = {3: "int3", 4: "int4", 5: "int5", 6: "int6", 8: "int8", 9: "split", 16: "fp8",
         17: "float16", 18: "bfloat16", 19: "float32"}  # fmt: skip
BLOCK_BYTES = {"int3": 384, "int4": 512, "int5": 640, "int6": 768, "int8": 1024, "split": 512}
ELEMENTS = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2", "fp8": "u1"}
GPU_COLUMNS = {"int4": 64, "int8": 32, "fp8": 32, "float16": 16, "bfloat16": 16, "float32": 8}


def read_weights(folder: Path) -> dict[str, Array]:
    """Return every tensor of a bundle in float32."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    data = (folder / manifest["graph"]["weights_file"]).read_bytes()
    entries = {entry["name"]: entry for entry in manifest["tensors"]}
    spans = {name: data[e["offset"] : e["offset"] + e["size"]] for name, e in entries.items()}
    found: dict[str, Array] = {}
    for name, entry in entries.items():
        held = entry["contents"]
        layout = held["layout"]
        if layout == "array":
            parts = split(floats(spans[name], held["dtype"]).reshape(held["shape"]), held)
        elif layout == "codes":
            parts = split(portable(name, held, spans, entries), held)
        elif layout == "packed":
            parts = split(packed(data[entry["offset"] :], held["shape"]), held)
        elif layout == "packed-experts":
            parts = experts(spans[name], held)
        elif layout == "gpu":
            parts = split(gpu(spans[name], held), held)
        else:  # scales, zeros and low-nibbles are read with the codes that they belong to
            assert layout in ("scales", "zeros", "low-nibbles"), layout
            continue
        found |= parts or {name: floats(spans[name], held["dtype"]).reshape(held["shape"])}
    return found


def split(values: Array, held: dict[str, Any]) -> dict[str, Array]:
    """Split stacked or interleaved rows [N, K], or those of experts [E, N, K], into the checkpoint's tensors."""
    names, counts = held.get("matrices", []), held.get("rows", [])
    if values.ndim == 1 or not names:
        return dict.fromkeys(names, values)
    outer = values if values.ndim == 3 else values[None]
    each, found, run = len(names) // len(outer), {}, held.get("interleave")
    for e, rows in enumerate(outer):
        if run:
            pairs = rows.reshape(-1, 2, run, rows.shape[1])  # the last run of each is padded
            rows = np.concatenate([pairs[:, i].reshape(-1, rows.shape[1])[: counts[0]] for i in range(2)])
        first = 0
        for name, count in zip(names[e * each : e * each + each], counts[e * each : e * each + each], strict=True):
            found[name] = rows[first : first + count]
            first += count
    return found


def floats(data: bytes, dtype: str) -> Array:
    """Convert elements of a float type to float32."""
    raw = np.frombuffer(data, ELEMENTS[dtype])
    if dtype == "bfloat16":
        return (raw.astype("<u4") << 16).view("<f4")
    if dtype == "fp8":
        exponent, fraction = (raw >> 3 & 15).astype(int), (raw & 7) / 8
        size = np.where(exponent == 0, fraction * 2.0**-6, (1 + fraction) * 2.0 ** (exponent - 7.0))
        return np.where(raw & 128, -size, size).astype("f4")
    return raw.astype("f4")


def weights(codes: Array, scales: Array, zeros: Array | None, bits: int, group: int) -> Array:
    """Return (code - zero) * scale, with a scale per `group` columns, [.., N, G]."""
    which = np.arange(codes.shape[-1]) // group
    zero: Any = 1 << (bits - 1) if zeros is None else zeros[..., which].astype("f4")
    return (codes.astype("f4") - zero) * scales[..., which].astype("f4")


def nibbles(data: bytes, shape: list[int]) -> Array:
    """Unpack rows of 4-bit numbers, the even column in the low nibble."""
    raw = np.frombuffer(data, "u1").reshape(*shape[:-1], -1)
    return np.stack([raw & 15, raw >> 4], axis=-1).reshape(*shape[:-1], -1)[..., : shape[-1]]


def portable(name: str, held: dict[str, Any], spans: dict[str, bytes], entries: dict[str, Any]) -> Array:
    """Read codes with their scales and zero points."""
    stem, bits = name.removesuffix(".qweight"), BITS[held["dtype"]]

    def integers(name: str, shape: list[int]) -> Array:
        return nibbles(spans[name], shape) if bits == 4 else np.frombuffer(spans[name], "u1").reshape(shape)

    by = entries[f"{stem}.scales"]["contents"]
    scales = floats(spans[f"{stem}.scales"], by["dtype"]).reshape(by["shape"])
    zeros = integers(f"{stem}.zeros", by["shape"]) if held.get("zero_points") else None
    return weights(integers(name, held["shape"]), scales, zeros, bits, held["group"])


def packed(data: bytes, shape: list[int]) -> Array:
    """Read a packed matrix: rows in stored order, padding rows of gate and up included."""
    magic, version, number, scale, flags, rows, columns, group, size, low = struct.unpack_from("<4s4B5q", data)
    assert (magic, version, [rows, columns]) == (b"EDLM", 1, list(shape))
    kind, integer = KINDS[number], number < 16
    whole = not integer and group == columns
    span = 32 if group == 16 and not whole else group
    per_record, records = span // group, -(-columns // span)
    tiles = 2 * -(-rows // 64) if flags & 2 else -(-rows // 32)
    scale_bytes, zero_bytes = 32 * (0, 2, 4)[scale], 64 if flags & 1 else 0
    head = per_record * (scale_bytes + zero_bytes)
    element = 1 if integer else np.dtype(ELEMENTS[kind]).itemsize
    code_bytes = span // 32 * BLOCK_BYTES[kind] if integer else 32 * span * element
    stored = np.frombuffer(data, "u1", tiles * records * (head + code_bytes), 64).reshape(tiles, records, -1)
    assert size == (low + tiles * records * span // 32 * 512 if low else 64 + stored.size)

    def of_groups(first: int, step: int, dtype: str) -> Array:
        """Return [rows, groups] from the 32 numbers of each group."""
        width = 32 * np.dtype(dtype).itemsize
        parts = [stored[:, :, first + i * step :][:, :, :width] for i in range(per_record)]
        found = np.stack(parts, axis=2).reshape(tiles, -1, width)
        return np.ascontiguousarray(found).view(dtype).transpose(0, 2, 1).reshape(32 * tiles, -1)

    codes = np.ascontiguousarray(stored[:, :, head:])
    scales = of_groups(0, scale_bytes, "<f2" if scale == 1 else "<f4") if scale else None
    if not integer:
        values = floats(codes.tobytes(), kind).reshape(tiles, records * span, 32)
        values = values.transpose(0, 2, 1).reshape(32 * tiles, -1)[:, :columns]
        found = values if scales is None else values * scales[:, np.arange(columns) // group]
    else:
        blocks = codes.reshape(tiles, records * span // 32, -1)
        lower = np.frombuffer(data, "u1", blocks.size, low).reshape(blocks.shape) if kind == "split" else None
        zeros = of_groups(per_record * scale_bytes, 64, "u1") if flags & 1 else None
        bits = 8 if kind == "split" else BITS[kind]
        columns_of = [column(blocks, kind, k) | (0 if lower is None else column(lower, "int4", k)) for k in range(32)]
        numbers = np.stack(columns_of, axis=-1).transpose(0, 2, 1, 3).reshape(32 * tiles, -1)[:, :columns]
        assert scales is not None
        found = weights(numbers, scales, zeros, bits, group)
    return found if flags & 2 else found[:rows]


def column(blocks: Array, kind: str, k: int) -> Array:
    """Return the codes of column k of every block, one per row [.., 32]."""

    def at(first: int, lowest: int, bits: int) -> Array:
        return blocks[:, :, first + k % 4 :: 4][:, :, :32] >> np.uint8(lowest) & np.uint8((1 << bits) - 1)

    if kind == "int8":
        return at(128 * (k // 4), 0, 8)
    pair = 128 * (k // 16), 2 * (k % 16 // 4), 2
    if kind == "int3":
        return at(*pair) | at(256, k // 4, 1) << np.uint8(2)
    low = at(128 * (k // 8), 4 * (k % 8 // 4), 4)
    if kind == "split":
        return low << np.uint8(4)
    if kind == "int5":
        return low | at(512, k // 4, 1) << np.uint8(4)
    return low if kind == "int4" else low | at(512 + pair[0], *pair[1:]) << np.uint8(4)


def experts(data: bytes, held: dict[str, Any]) -> dict[str, Array]:
    """Read gate, up and down of each expert, found through the table of offsets."""
    magic, version, count, size = struct.unpack_from("<4sB3x2q", data)
    _, width, hidden = held["shape"]
    assert (magic, version, count, size) == (b"EDLX", 1, held["shape"][0], len(data))
    table, found = struct.unpack_from(f"<{2 * count}q", data, 64), {}
    for e in range(count):
        gate, up, down = held["matrices"][3 * e : 3 * e + 3]
        pair = packed(data[table[2 * e] :], [2 * width, hidden])
        found |= split(pair, {"matrices": [gate, up], "rows": [width, width], "interleave": held["interleave"]})
        found[down] = packed(data[table[2 * e + 1] :], [hidden, width])
    return found


def gpu(data: bytes, held: dict[str, Any]) -> Array:
    """Read a blob of the GPU layout, [E, rows with padding, K]."""
    *outer, rows, columns = held["shape"]
    count, kind, group = (outer or [1])[0], held["dtype"], held.get("group", 0)
    blocks, width = -(-rows // 16), GPU_COLUMNS[held["dtype"]]
    end = count * blocks * columns // width * 512
    lanes = np.frombuffer(data, "u1", end).reshape(count, blocks, columns // width, 8, 4, 4, 4)  # .., g, q, word, byte
    element = 1 if kind in ("int4", "int8", "fp8") else np.dtype(ELEMENTS[kind]).itemsize
    codes = np.zeros((count, blocks, 16, columns // width, width, element), "u1")
    for q in range(4):
        for word in range(4):
            for byte in range(0, 4, element):
                for half in range(2 if kind == "int4" else 1):
                    row, k = gpu_place(kind, q, word, 2 * byte + half if kind == "int4" else byte // element)
                    value = lanes[:, :, :, :, q, word, byte : byte + element].swapaxes(2, 3)
                    value = value >> np.uint8(4 * half) & np.uint8(15) if kind == "int4" else value
                    codes[:, :, 8 * row : 8 * row + 8, :, k] = value
    numbers = codes.reshape(count, blocks * 16, columns * element)
    if kind in ELEMENTS:
        values = floats(numbers.tobytes(), kind).reshape(count, blocks * 16, columns)
        if kind != "fp8":
            return values
    dtype = np.dtype("<f4" if kind == "fp8" else "<f2")

    def of_groups(start: int, dtype: Any) -> Array:
        found = np.frombuffer(data, dtype, count * blocks * columns // group * 16, -(-start // 256) * 256)
        return found.reshape(count, blocks, -1, 16).swapaxes(2, 3).reshape(count, blocks * 16, -1)

    scales = of_groups(end, dtype)
    if kind == "fp8":
        return values * scales[:, :, np.arange(columns) // group]
    after = -(-end // 256) * 256 + scales.size * dtype.itemsize
    return weights(numbers, scales, of_groups(after, "u1") if held.get("zero_points") else None, BITS[kind], group)


def gpu_place(kind: str, q: int, word: int, i: int) -> tuple[int, int]:
    """Return whether element i (of int4: nibble i) of a word of lane 4 g + q is in row g or g + 8, and its column."""
    if kind == "float32":
        return word % 2, q + 4 * (word // 2)
    if kind in ("float16", "bfloat16"):
        return word % 2, 2 * q + i + 8 * (word // 2)
    if kind == "int4":
        j = i % 4
        return j % 2, 16 * word + 2 * q + 8 * (j // 2) + i // 4
    return word % 2, 16 * (word // 2) + 2 * q + i % 2 + 8 * (i // 2)
