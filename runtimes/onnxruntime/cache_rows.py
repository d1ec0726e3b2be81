"""Rows of tokens in a native KV cache, as csrc/capi/runtime/onnxruntime/cache_rows.cc has them.

In memory, the cache of a head is in tiles of 16 tokens, of which the last of a cache may be smaller; the order of the
bytes of a tile is that of csrc/kernels/attention/attention_cache_impl.h. A saved cache has row after row, so that it
can be loaded into a cache of another capacity.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.bundle.kv_cache import row_bytes

TILE = 16
_SCALE_BYTES = {"int8": 4, "fp8": 2}
_UNIT = {"float32": np.uint32, "float16": np.uint16}
"""What is moved as a whole; a byte for the other types."""


class CacheRows:
    """The keys, or the values, of one layer: H heads of `capacity` tokens.

    Args:
        kv: type of the cache, one of `edgelm.bundle.kv_cache.KV_TYPES`.
        head_dim: values of a head.
        capacity: tokens that the cache has room for.
    """

    def __init__(self, kv: str, head_dim: int, capacity: int) -> None:
        self._kv, self._head_dim, self._capacity = kv, head_dim, capacity
        self._unit = np.dtype(_UNIT.get(kv, np.uint8))
        self._width = row_bytes(kv, head_dim) // self._unit.itemsize

    def pack(self, memory: NDArray[np.uint8], length: int, *, keys: bool) -> NDArray[np.uint8]:
        """Return the rows [H, length, bytes of a row] of the first `length` tokens of `memory`, bytes [H, ...]."""
        heads, width = len(memory), self._width
        units = memory.reshape(heads, -1).view(self._unit)
        rows = np.empty((heads, length, width), self._unit)
        tiles, rest = divmod(length, TILE)
        if tiles:
            order = _order(self._kv, self._head_dim, TILE, keys)
            whole = units[:, : tiles * TILE * width].reshape(heads, tiles, TILE * width)
            rows[:, : tiles * TILE] = whole.take(order, axis=2).reshape(heads, tiles * TILE, width)
        if rest:
            rows[:, tiles * TILE :] = units[:, self._last(tiles, rest, keys=keys)].reshape(heads, rest, width)
        return rows.view(np.uint8)

    def unpack(self, memory: NDArray[np.uint8], rows: NDArray[np.uint8], *, keys: bool) -> None:
        """Write rows [H, length, bytes of a row] to the first `length` tokens of `memory`, bytes [H, ...]."""
        heads, length, width = len(memory), rows.shape[1], self._width
        units = memory.reshape(heads, -1).view(self._unit)
        given = rows.view(self._unit)
        tiles, rest = divmod(length, TILE)
        if tiles:
            inverse = _order(self._kv, self._head_dim, TILE, keys).argsort()
            whole = given[:, : tiles * TILE].reshape(heads, tiles, TILE * width)
            units[:, : tiles * TILE * width] = whole.take(inverse, axis=2).reshape(heads, -1)
        if rest:
            units[:, self._last(tiles, rest, keys=keys)] = given[:, tiles * TILE :].reshape(heads, -1)

    def _last(self, tiles: int, tokens: int, *, keys: bool) -> NDArray[np.intp]:
        """Return the places, in units, of the rows of the first `tokens` tokens after `tiles` whole tiles."""
        size = min(self._capacity - tiles * TILE, TILE)
        order = _order(self._kv, self._head_dim, size, keys)
        return tiles * TILE * self._width + order[: tokens * self._width]


@cache
def _order(kv: str, head_dim: int, tokens: int, keys: bool) -> NDArray[np.intp]:
    """Return, for each unit of the rows of a tile of `tokens` tokens, its place in the tile."""
    slot, d = np.arange(tokens)[:, None], np.arange(head_dim)[None, :]
    places: NDArray[Any]
    if kv == "int8" and keys:
        four = d // 4 * 4
        places = tokens * four + (head_dim - four).clip(max=4) * slot + d - four
    elif kv == "int8":
        four = slot // 4 * 4
        places = head_dim * four + (tokens - four).clip(max=4) * d + slot - four
    else:
        places = d * tokens + slot if keys else slot * head_dim + d
    size = _SCALE_BYTES.get(kv, 0)
    scales = tokens * head_dim + size * slot + np.arange(size)[None, :]
    return np.hstack([places, scales]).reshape(-1)
