"""A runtime's cache across calls: what a new prompt shares with the last one is not computed again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgelm.runtimes import Runtime


@dataclass(frozen=True)
class _Prefilled:
    """The last prompt that went through the runtime; its cache stays as it is until the next one does.

    `fresh`: it was computed from its first token on.
    """

    tokens: list[int]
    logits: NDArray[np.float32]
    fresh: bool


class PrefixCache:
    """Runs a prompt and its continuation on `runtime`, and knows which token each cached position holds.

    A growing conversation only pays for its new part. Numbers that were computed in other pieces differ by rounding,
    which can tip a close choice.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        # The ids behind the cached positions; entries past the runtime's position are not cached.
        self._cached: list[int] = []
        self._last_prompt: _Prefilled | None = None

    def prefill(
        self, tokens: list[int], *, exact: bool, check: Callable[[], None] = lambda: None
    ) -> tuple[NDArray[np.float32], int]:
        """Logits after `tokens`, and how many of them an earlier call had cached.

        `exact`: they and the cache have to be what a fresh model computes, to the last bit. `check` is called between
        chunks and may raise to give the rest up.
        """
        runtime, last = self.runtime, self._last_prompt
        common = self._common(tokens)
        if common == len(tokens):
            if last is not None and last.tokens == tokens and (last.fresh or not exact):
                runtime.truncate(common)
                return last.logits, common
            common -= 1
        if exact:
            common = 0
        runtime.truncate(common)
        # Set before the work: if it is interrupted, the runtime's position says how much of this is cached.
        self._cached, self._last_prompt = list(tokens), None
        # In the runtime's own chunks, so that the numbers are those of one call.
        for begin in range(common, len(tokens), runtime.chunk):
            check()
            logits = runtime.prefill(tokens[begin : begin + runtime.chunk])
        self._last_prompt = _Prefilled(list(tokens), logits.copy(), fresh=common == 0)
        return logits, common

    def logits_of_last(self, tokens: Sequence[int], rows: int) -> Iterator[NDArray[np.float32]]:
        """Logits [n, V], block by block, after each of the last `rows` of `tokens`."""
        begin = len(tokens) - rows
        common = min(self._common(tokens), begin)
        self.runtime.truncate(common)
        self._cached, self._last_prompt = list(tokens), None
        if common < begin:
            self.runtime.prefill(tokens[common:begin])
        yield from self.runtime.logits_all(tokens[begin:])

    def _common(self, tokens: Sequence[int]) -> int:
        """How many of `tokens` are cached."""
        cached = self._cached[: self.runtime.position]
        pairs = enumerate(zip(cached, tokens, strict=False))
        return next((i for i, (a, b) in pairs if a != b), min(len(cached), len(tokens)))

    def decode(self, token: int) -> NDArray[np.float32]:
        """Logits [V] after one more token."""
        self._append(token)
        return self.runtime.decode(token)

    def decode_greedy(self, token: int) -> int:
        """The most likely token after one more; its logits stay on the device."""
        self._append(token)
        return self.runtime.decode_greedy(token)

    def _append(self, token: int) -> None:
        del self._cached[self.runtime.position :]
        self._cached.append(token)
