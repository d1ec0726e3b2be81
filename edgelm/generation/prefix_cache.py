"""Prefix cache: reuse a runtime's KV cache for the tokens that a new prompt shares with the last one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgelm.generation.sampling import Sampler
from edgelm.runtimes import Runtime


@dataclass(frozen=True)
class Prefilled:
    """The last prompt that was prefilled, and the logits after it. `fresh`: these are the bits of a fresh model."""

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
        self._last_prompt: Prefilled | None = None
        self._fresh = 0

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
            # Whole chunks of a fresh computation: the rest is then computed in the chunks of a fresh model.
            common = min(common, self._fresh) // runtime.chunk * runtime.chunk
        fresh = common % runtime.chunk == 0 and common <= self._fresh
        self._truncate(common)
        # Set before the prefill: if that is interrupted, the runtime's position tells how many tokens are cached.
        self._cached, self._last_prompt = list(tokens), None
        # In the runtime's own chunks, so that the results equal those of a single call.
        for begin in range(common, len(tokens), runtime.chunk):
            check()
            logits = runtime.prefill(tokens[begin : begin + runtime.chunk])
        if fresh:
            self._fresh = len(tokens) // runtime.chunk * runtime.chunk
        self._last_prompt = Prefilled(list(tokens), logits.copy(), fresh)
        return logits, common

    @property
    def cached(self) -> list[int]:
        """A list of the tokens of the cached positions."""
        return self._cached[: self.runtime.position]

    @property
    def last_prompt(self) -> Prefilled | None:
        """The last prompt, whose tokens are the first of the cached ones; None if its logits are not known."""
        return self._last_prompt

    @property
    def fresh_tokens(self) -> int:
        """How many of the cached tokens, in whole chunks, have the bits that a fresh model has for any prompt that
        begins with them."""
        return self._fresh

    def replace(self, cached: list[int], last_prompt: Prefilled | None, fresh_tokens: int) -> None:
        """Take over the tokens of a runtime whose cache was replaced or emptied."""
        self._cached, self._last_prompt, self._fresh = cached, last_prompt, fresh_tokens

    def logits_of_last(self, tokens: Sequence[int], rows: int) -> Iterator[NDArray[np.float32]]:
        """Yield the logits after each of the last `rows` tokens, in blocks [n, V]."""
        begin = len(tokens) - rows
        common = min(self._common(tokens), begin)
        self._truncate(common)
        self._cached, self._last_prompt = list(tokens), None
        if common < begin:
            self.runtime.prefill(tokens[common:begin])
        yield from self.runtime.logits_all(tokens[begin:])

    def _truncate(self, length: int) -> None:
        """Keep `length` cached tokens, before those behind them are replaced."""
        self.runtime.truncate(length)
        self._fresh = min(self._fresh, length) // self.runtime.chunk * self.runtime.chunk

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
