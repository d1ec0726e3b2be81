"""Runtimes whose KV cache can be saved and loaded as bytes.

The bytes depend on the model's shape and the type of the cache only, not on the capacity or the layout in memory: layer
by layer keys, then values, head by head, position by position. libedgelm writes the same (`Runtime::write_cache`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import GenerationError
from edgelm.runtimes.base import Runtime


class SavableRuntime(Runtime):
    """A runtime that can save its KV cache.

    Attributes:
        kv: type of the cache, see `edgelm.bundle.kv_cache`.
    """

    kv: str

    @abstractmethod
    def saved_bytes(self, length: int) -> int:
        """Return the number of bytes of the cache of `length` tokens."""

    def save_cache(self, length: int) -> Iterator[NDArray[np.uint8]]:
        """Yield the cache of the first `length` tokens as arrays of bytes, `saved_bytes(length)` in all.

        Raises:
            GenerationError: `length` is negative or more than is cached.
        """
        self._require_open()
        if not 0 <= length <= self._position:
            raise GenerationError(f"cannot save {length} cached tokens: give 0 to {self._position}, as many are cached")
        yield from self._saved(length)

    def load_cache(self, length: int, read: Callable[[int], NDArray[np.uint8]]) -> None:
        """Replace the cache by that of `length` tokens, whose bytes `read(count)` returns piece by piece.

        If `read` raises, nothing is cached.

        Raises:
            ContextLengthError: `length` is more than the context; nothing was changed.
        """
        self._require_open()
        self._require_room(length, 0)
        self._position = 0
        self._load(length, read)
        self._position = length

    @abstractmethod
    def _saved(self, length: int) -> Iterator[NDArray[np.uint8]]:
        """Yield what `save_cache` yields; `length` was checked."""

    @abstractmethod
    def _load(self, length: int, read: Callable[[int], NDArray[np.uint8]]) -> None:
        """Read what `_saved` yielded into the cache. The caller updates the position."""
