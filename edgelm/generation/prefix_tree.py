"""Prefix cache of many sequences: the KV caches of prompts, so that a prefix that several share is computed once.

The caches are copied: 1,000 tokens of OLMoE are 131 MB, which takes a few per cent of the time to compute them.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgelm.runtimes import SequenceBatch

BLOCK = 32
"""Tokens of a block, a multiple of every runtime's `SequenceBatch.block_tokens`."""


class BlockStore(Protocol):
    """Keeps blocks beyond the life of the process."""

    def load(self, key: bytes, nbytes: int) -> NDArray[np.uint8] | None:
        """Return the cache of the block `key`, of `nbytes` bytes; None if it is not there."""

    def save(self, key: bytes, data: NDArray[np.uint8]) -> None:
        """Keep the cache of a block, now or a little later. `data` does not change meanwhile."""


@dataclass
class _Block:
    """The cache of a block of tokens after those of its parent; `key` identifies all tokens up to its end."""

    key: bytes
    data: NDArray[np.uint8]


class PrefixTree:
    """Caches of prompts as a tree over token ids: a node has a block of tokens, its ancestors those before it.

    A prompt's nodes are found by hashes, each of a block's tokens and its parent's hash. If memory is short, the nodes
    that were not used for the longest time go first, and never a node before those that follow it.

    Args:
        root: identifies what computes the caches: model, weights, type of the cache, arithmetic.
        most_bytes: bytes of all caches.
        store: where blocks are looked for that are not in memory, and where new ones are kept as well.

    Attributes:
        nbytes: bytes of the caches in memory.
        loaded_tokens: tokens whose cache came from the store.
    """

    def __init__(self, root: bytes, most_bytes: int, store: BlockStore | None = None) -> None:
        self._root, self._most_bytes, self._store = hashlib.sha256(root).digest(), most_bytes, store
        # Least recently used first. A use of a block counts for its ancestors too, just after it: so the first one has
        # no descendants.
        self._blocks: OrderedDict[bytes, _Block] = OrderedDict()
        self.nbytes = self.loaded_tokens = 0

    def __len__(self) -> int:
        """Return the number of blocks in memory."""
        return len(self._blocks)

    def restore(self, batch: SequenceBatch, row: int, tokens: Sequence[int], most: int, unit: int = BLOCK) -> int:
        """Write the cache of the longest known prefix of `tokens` to a sequence that is empty.

        Args:
            batch: the sequences.
            row: the sequence.
            tokens: the prompt.
            most: the prefix has at most as many tokens,
            unit: and a multiple of these, itself a multiple of `BLOCK`.

        Returns:
            The number of its tokens.
        """
        path: list[_Block] = []
        nbytes = batch.copied_bytes(BLOCK)
        for key in self._keys(tokens[: most // unit * unit]):
            block = self._blocks.get(key) or self._load(key, nbytes)
            if block is None:
                break
            path.append(block)
        del path[len(path) // (unit // BLOCK) * (unit // BLOCK) :]
        for index, block in enumerate(path):
            batch.write_cache(row, index * BLOCK, (index + 1) * BLOCK, block.data)
        self._use(path)
        return len(path) * BLOCK

    def keep(self, batch: SequenceBatch, row: int, tokens: Sequence[int]) -> None:
        """Keep the cache of a prompt that a sequence begins with, in whole blocks, where it is not known yet."""
        path = []
        for index, key in enumerate(self._keys(tokens)):
            block = self._blocks.get(key)
            if block is None:
                if batch.copied_bytes(BLOCK) * (index + 1) > self._most_bytes:
                    break  # the path alone is too long
                block = _Block(key, batch.read_cache(row, index * BLOCK, (index + 1) * BLOCK))
                if self._store is not None:
                    self._store.save(key, block.data)
            path.append(block)
        self._use(path)

    def _keys(self, tokens: Sequence[int]) -> list[bytes]:
        """Return the keys of the whole blocks of `tokens`."""
        keys, key = [], self._root
        ids = np.asarray(tokens[: len(tokens) // BLOCK * BLOCK], "<i8").reshape(-1, BLOCK)
        for block in ids:
            key = hashlib.sha256(key + block.tobytes()).digest()
            keys.append(key)
        return keys

    def _load(self, key: bytes, nbytes: int) -> _Block | None:
        data = None if self._store is None else self._store.load(key, nbytes)
        if data is None:
            return None
        self.loaded_tokens += BLOCK
        return _Block(key, data)

    def _use(self, path: list[_Block]) -> None:
        """Take note that the blocks of a path, from the root on, were used; forget old ones if memory is short."""
        for block in reversed(path):
            if block.key not in self._blocks:
                self._blocks[block.key] = block
                self.nbytes += block.data.nbytes
            self._blocks.move_to_end(block.key)
        while self.nbytes > self._most_bytes:
            _, oldest = self._blocks.popitem(last=False)
            self.nbytes -= oldest.data.nbytes
