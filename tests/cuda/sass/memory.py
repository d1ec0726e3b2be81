"""Global memory of executed kernels."""

from __future__ import annotations

from typing import Any

import numpy as np

from sass.code import LANES

DEFAULT_WORD = 0x3C003C00
"""Contents of memory that nothing wrote: 1.0 as float16, 0.0078 as float32 or bfloat16."""
_PAGE = 12


class Memory:
    """Global memory: bytes that were written, `DEFAULT_WORD` elsewhere."""

    def __init__(self) -> None:
        self._pages: dict[int, np.ndarray[Any, Any]] = {}

    def write(self, address: int, data: bytes) -> None:
        """Write bytes."""
        for i, byte in enumerate(data):
            self._page((address + i) >> _PAGE)[(address + i) & 4095] = byte

    def read(self, address: int, nbytes: int) -> bytes:
        """Return bytes."""
        default = DEFAULT_WORD.to_bytes(4, "little")
        found = bytearray()
        for at in range(address, address + nbytes):
            page = self._pages.get(at >> _PAGE)
            found.append(default[at & 3] if page is None else int(page[at & 4095]))
        return bytes(found)

    def load(self, addresses: np.ndarray[Any, Any], nbytes: int, lanes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return words [max(1, nbytes / 4), 32] of the given lanes."""
        words = max(1, nbytes // 4)
        default = DEFAULT_WORD if nbytes >= 4 else DEFAULT_WORD & ((1 << 8 * nbytes) - 1)
        out = np.full((words, LANES), default, np.uint32)
        pages = set((addresses[lanes] >> _PAGE).tolist())
        if not self._pages.keys().isdisjoint(pages):
            for lane in np.flatnonzero(lanes).tolist():
                data = self.read(int(addresses[lane]), nbytes)
                out[:, lane] = np.frombuffer(data.ljust(4, b"\0"), "<u4")
        return out

    def store(self, addresses: Any, values: Any, nbytes: int, lanes: np.ndarray[Any, Any]) -> None:
        """Store words [n, 32] of the given lanes."""
        for lane in np.flatnonzero(lanes).tolist():
            data = b"".join(int(word).to_bytes(4, "little") for word in values[:, lane])[:nbytes]
            address = int(addresses[lane])
            page, at = self._page(address >> _PAGE), address & 4095
            page[at : at + nbytes] = np.frombuffer(data, np.uint8)

    def _page(self, number: int) -> np.ndarray[Any, Any]:
        if number not in self._pages:
            self._pages[number] = np.frombuffer(DEFAULT_WORD.to_bytes(4, "little") * 1024, np.uint8).copy()
        return self._pages[number]
