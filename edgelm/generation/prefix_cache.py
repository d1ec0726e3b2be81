"""Prefix cache: reuse a runtime's KV cache for the tokens that a new prompt shares with the last one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgelm.generation.sampling import Sampler
from edgelm.runtimes import Runtime


@dataclass(frozen=True)
class _Prefilled:
    """The last prompt that was prefilled, and the logits after it.

    `fresh`: it was computed from its first token on, without reuse of an earlier cache.
    """

    tokens: list[int]
    logits: NDArray[np.float32]
    fresh: bool


class PrefixCache:
    """Runs prompts and continuations on `runtime`, and knows the token of each cached position.

    Of a growing conversation only the new part is computed. A prompt computed in other chunks differs by rounding. That
    may change the choice between two tokens with nearly equal logits.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        # Token ids of the cached positions. Entries beyond the runtime's position are not cached.
        self._cached: list[int] = []
        self._last_prompt: _Prefilled | None = None

    def prefill(
        self, tokens: list[int], *, exact: bool, check: Callable[[], None] = lambda: None
    ) -> tuple[NDArray[np.float32], int]:
        """Prefill `tokens`.

        Args:
            tokens: the prompt.
            exact: logits and cache must equal those of a fresh model to the last bit.
            check: called between chunks; may raise to stop.

        Returns:
            The logits [V] after `tokens`, and the number of tokens that were cached by an earlier call.
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
        # Set before the prefill: if that is interrupted, the runtime's position tells how many tokens are cached.
        self._cached, self._last_prompt = list(tokens), None
        # In the runtime's own chunks, so that the results equal those of a single call.
        for begin in range(common, len(tokens), runtime.chunk):
            check()
            logits = runtime.prefill(tokens[begin : begin + runtime.chunk])
        self._last_prompt = _Prefilled(list(tokens), logits.copy(), fresh=common == 0)
        return logits, common

    def logits_of_last(self, tokens: Sequence[int], rows: int) -> Iterator[NDArray[np.float32]]:
        """Yield the logits after each of the last `rows` tokens, in blocks [n, V]."""
        begin = len(tokens) - rows
        common = min(self._common(tokens), begin)
        self.runtime.truncate(common)
        self._cached, self._last_prompt = list(tokens), None
        if common < begin:
            self.runtime.prefill(tokens[common:begin])
        yield from self.runtime.logits_all(tokens[begin:])

    def _common(self, tokens: Sequence[int]) -> int:
        """Return how many of `tokens` are cached."""
        cached = self._cached[: self.runtime.position]
        pairs = enumerate(zip(cached, tokens, strict=False))
        return next((i for i, (a, b) in pairs if a != b), min(len(cached), len(tokens)))

    def decode_sampled(self, token: int, sampler: Sampler) -> int:
        """Append a token and return the next one, which `sampler` chooses."""
        del self._cached[self.runtime.position :]
        self._cached.append(token)
        return self.runtime.decode_sampled(token, sampler)
