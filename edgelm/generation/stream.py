"""What is generated: one sequence's text as it grows, as a stream and as a result."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

from edgelm.generation.options import Options
from edgelm.generation.prefix_cache import PrefixCache
from edgelm.generation.sampling import Sampler
from edgelm.generation.stop_strings import StopStrings
from edgelm.generation.turns import Turn, TurnLeft

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np
    from numpy.typing import NDArray

    from edgelm.tokenization.tokenizer import Tokenizer

StopReason = Literal["eos", "stop", "length", "interrupted"]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Timings:
    """What one generation took; the consumer's time between two pieces of a stream is not counted.

    `prompt_tokens` were asked for, of which `reused_tokens` were cached by an earlier call and cost nothing.
    `time_to_first_token` starts with the call: tokenisation and the wait for other calls are in it. Seconds.
    """

    prompt_tokens: int
    reused_tokens: int
    decoded_tokens: int
    prefill_seconds: float
    time_to_first_token: float
    decode_seconds: float

    @property
    def prefill_tokens_per_second(self) -> float:
        """Of the tokens that were not reused; 0 where all were."""
        return _rate(self.prompt_tokens - self.reused_tokens, self.prefill_seconds)

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after the first one; 0 where there was none."""
        return _rate(self.decoded_tokens, self.decode_seconds)


def _rate(count: int, seconds: float) -> float:
    return count / seconds if count and seconds > 0 else 0.0


@dataclass(frozen=True)
class Generation:
    """A generated text.

    `tokens` are the ids that were generated, without the end token, with those of a stop string.
    `stop_reason`: "eos" the model ended, "stop" a stop string came, "length" max_tokens or the context was reached,
    "interrupted" the stream was left early.
    """

    text: str
    tokens: tuple[int, ...]
    stop_reason: StopReason
    timings: Timings

    def __repr__(self) -> str:
        return f"Generation({_shown(self.text)}, {len(self.tokens)} tokens, {self.stop_reason!r})"


def _shown(text: str) -> str:
    return repr(text) if len(text) <= 40 else repr(text[:40]) + "..."


class Continuation:
    """What follows one prompt: chooses its tokens, makes text of them and says when it ends.

    Attributes:
        prompt: the prompt's ids.
        options: how to choose and when to end.
        tokens: the ids so far, without the end token.
        reason: why it has ended; None while it has not.
    """

    def __init__(self, prompt: list[int], options: Options, tokenizer: Tokenizer, end_ids: frozenset[int]) -> None:
        self.prompt, self.options = prompt, options
        self.tokens: list[int] = []
        self.reason: StopReason | None = None
        self._text: list[str] = []
        self._end_ids = end_ids
        self._sampler = Sampler(options.sampling, prompt)
        self._pieces, self._stops = tokenizer.detokenizer(), StopStrings(options.stop)

    @property
    def text(self) -> str:
        """All the text so far."""
        return "".join(self._text)

    def choose(self, logits: NDArray[np.float32]) -> int:
        """The token after logits [V]. Raises GenerationError where they are no numbers."""
        return self._sampler.sample(logits)

    def take(self, token: int, *, full: bool) -> str:
        """Append a token; return the text that may be shown now.

        Args:
            token: the one that was chosen; an end token ends the text and is no part of it.
            full: the context has no room for another.
        """
        text, stopped = "", False
        if token in self._end_ids:
            self.reason = "eos"
        else:
            self.tokens.append(token)
            text, stopped = self._stops.push(self._pieces.push(token))
            if not stopped and (full or len(self.tokens) == self.options.max_tokens):
                self.reason = "length"
        if self.reason is not None:
            # What was held back: bytes of a character, the beginning of a stop string.
            more, stopped = self._stops.push(self._pieces.flush())
            text += more if stopped else more + self._stops.flush()
        if stopped:
            self.reason = "stop"
        if text:
            self._text.append(text)
        return text

    def generation(self, timings: Timings) -> Generation:
        """The result so far."""
        return Generation(self.text, tuple(self.tokens), self.reason or "interrupted", timings)


class TextStream(Iterator[str]):
    """Pieces of text as they are generated, for `for` and for `async for`; `generation` tells what there is so far.

    The model belongs to the stream from the first piece until the last, `close`, or garbage collection, and other calls
    wait. `async for` computes in a thread of its own, and a task that is cancelled ends its stream. Leaving a stream
    early is fine; leaving it open is not: see `edgelm.generation.turns`.
    """

    def __init__(self, cache: PrefixCache, answer: Continuation, turn: Turn, *, started: float) -> None:
        """Made by `LanguageModel`; `started`: when the call began."""
        self._cache, self._answer, self._turn = cache, answer, turn
        self._spent = time.perf_counter() - started
        self._resumed = 0.0
        self._token: int | None = None
        self._ended = False
        self._reused = self._decoded = 0
        self._prefill_seconds = self._first_seconds = 0.0
        self._worker: ThreadPoolExecutor | None = None

    def __next__(self) -> str:
        piece = self._advance()
        if piece is None:
            raise StopIteration
        return piece

    def __aiter__(self) -> TextStream:
        return self

    async def __anext__(self) -> str:
        piece = await self.in_worker(self._advance)
        if piece is None:
            raise StopAsyncIteration
        return piece

    def close(self) -> None:
        """Stop generating and let the next call have the model; further iteration ends at once."""
        self._turn.end()
        if not self._turn.computing:
            self._ended = True
        self._dismiss()

    async def aclose(self) -> None:
        """As `close`, without blocking the event loop while a step runs."""
        import asyncio

        await asyncio.to_thread(self.close)

    def __del__(self) -> None:
        if hasattr(self, "_worker"):  # else it was never made
            self.close()

    def __repr__(self) -> str:
        answer = self._answer
        state = answer.reason or ("interrupted" if self._ended else "open" if self._token is not None else "not begun")
        return f"TextStream({state}, {len(answer.prompt)} prompt tokens, {len(answer.tokens)} generated)"

    @property
    def generation(self) -> Generation:
        """The text, tokens and timings so far."""
        decode_seconds = max(0.0, self._spent - self._first_seconds) if self._decoded else 0.0
        return self._answer.generation(
            Timings(
                prompt_tokens=len(self._answer.prompt),
                reused_tokens=self._reused,
                decoded_tokens=self._decoded,
                prefill_seconds=self._prefill_seconds,
                time_to_first_token=self._first_seconds,
                decode_seconds=decode_seconds,
            )
        )

    def drain(self) -> Generation:
        """Go on to the end; return it all."""
        for _ in self:
            pass
        return self.generation

    async def in_worker(self, work: Callable[[], Result]) -> Result:
        """Run `work` in this stream's thread; the stream ends if the task is cancelled meanwhile.

        A thread of its own: one of a pool that all share might wait for a stream whose next step needs the pool.
        """
        import asyncio
        from concurrent.futures import ThreadPoolExecutor

        worker = self._worker = self._worker or ThreadPoolExecutor(1, thread_name_prefix="edgelm-stream")
        self._turn.task = asyncio.current_task()
        try:
            result = await asyncio.get_running_loop().run_in_executor(worker, work)
        except asyncio.CancelledError:
            self._turn.leave()
            self._ended = True
            with contextlib.suppress(RuntimeError):  # closed by another thread meanwhile
                worker.submit(self._turn.end)
            self._dismiss()
            raise
        if self._ended:
            self._dismiss()
        return result

    def _dismiss(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.shutdown(wait=False)

    def _tick(self) -> float:
        """Seconds spent here so far, the consumer's time left out."""
        now = time.perf_counter()
        self._spent += now - self._resumed
        self._resumed = now
        return self._spent

    def _advance(self) -> str | None:
        """The next piece, None at the end."""
        if self._ended:
            return None
        self._resumed = time.perf_counter()
        try:
            self._turn.begin()
        except TurnLeft:
            self._ended = True
            return None
        try:
            while not self._ended:
                text = self._step()
                self._ended = self._answer.reason is not None
                if text:
                    return text
            return None
        except TurnLeft:
            self._ended = True
            return None
        except BaseException:
            self._ended = True
            raise
        finally:
            self._tick()
            if self._ended:
                self._turn.leave()
            self._turn.pause()

    def _step(self) -> str:
        """Compute and take one token."""
        cache, answer = self._cache, self._answer
        self._turn.check()
        if self._token is None:
            started = time.perf_counter()
            exact = answer.options.sampling.seed is not None and not answer.options.reuse
            logits, self._reused = cache.prefill(answer.prompt, exact=exact, check=self._turn.check)
            self._prefill_seconds = time.perf_counter() - started
            self._token = answer.choose(logits)
            self._first_seconds = self._tick()
        else:
            # With nothing else to ask of the logits, they stay on the device.
            plain = answer.options.sampling.plain
            self._token = cache.decode_greedy(self._token) if plain else answer.choose(cache.decode(self._token))
            self._decoded += 1
        return answer.take(self._token, full=cache.runtime.position >= cache.runtime.context_length)
