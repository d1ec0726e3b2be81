"""Generated text: a continuation as it grows, a stream of its text, and the result with timings."""

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

    from edgelm.tokenization.tokenizer import Tokenizer

StopReason = Literal["eos", "stop", "length", "interrupted"]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Timings:
    """Timings of one generation, in seconds. The time of a stream's consumer is not counted.

    Attributes:
        prompt_tokens: tokens of the prompt.
        reused_tokens: how many of them were in the KV cache of an earlier call, and were not computed.
        decoded_tokens: generated tokens after the first one.
        prefill_seconds: time to compute the prompt.
        time_to_first_token: from the call to the first token, with tokenization and the wait for other calls.
        decode_seconds: from the first token to the last.
    """

    prompt_tokens: int
    reused_tokens: int
    decoded_tokens: int
    prefill_seconds: float
    time_to_first_token: float
    decode_seconds: float

    @property
    def prefill_tokens_per_second(self) -> float:
        """Rate of the prompt tokens that were computed; 0 where all were reused."""
        return _rate(self.prompt_tokens - self.reused_tokens, self.prefill_seconds)

    @property
    def decode_tokens_per_second(self) -> float:
        """Rate of the tokens after the first one; 0 where there are none."""
        return _rate(self.decoded_tokens, self.decode_seconds)


def _rate(count: int, seconds: float) -> float:
    return count / seconds if count and seconds > 0 else 0.0


@dataclass(frozen=True)
class Generation:
    """A generated text.

    Attributes:
        text: the text, without a stop string.
        tokens: the generated token ids, without the end token, but with those of a stop string.
        stop_reason: why it ended. "eos": the model ended it; "stop": a stop string was found; "length": `max_tokens` or
            the context length was reached; "interrupted": the stream was closed early.
        timings: tokens and seconds.
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
    """The continuation of one prompt: converts tokens to text, and decides when it ends.

    Attributes:
        prompt: the prompt's ids.
        options: options of sampling and of the end.
        sampler: chooses the tokens.
        tokens: the ids generated so far, without the end token.
        reason: why it ended; None while it has not.
    """

    def __init__(
        self,
        prompt: list[int],
        options: Options,
        tokenizer: Tokenizer,
        end_ids: frozenset[int],
        shown: frozenset[int] = frozenset(),
    ) -> None:
        self.prompt, self.options = prompt, options
        self.tokens: list[int] = []
        self.reason: StopReason | None = None
        self._text: list[str] = []
        self._end_ids = end_ids
        self.sampler = Sampler(options.sampling, prompt)
        self._pieces, self._stops = tokenizer.detokenizer(shown=shown), StopStrings(options.stop)

    @property
    def text(self) -> str:
        """The text generated so far."""
        return "".join(self._text)

    def take(self, token: int, *, full: bool) -> str:
        """Append a token; return the text that may be shown now.

        Args:
            token: the chosen token; an end token ends the text and is not part of it.
            full: whether the context has no room for another token.
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
            # Add the text held back: bytes of an incomplete character, the beginning of a stop string.
            more, stopped = self._stops.push(self._pieces.flush())
            text += more if stopped else more + self._stops.flush()
        if stopped:
            self.reason = "stop"
        if text:
            self._text.append(text)
        return text

    def generation(self, timings: Timings) -> Generation:
        """Return the result so far."""
        return Generation(self.text, tuple(self.tokens), self.reason or "interrupted", timings)


class TextStream(Iterator[str]):
    """Iterator over text as it is generated, with `for` or `async for`. Returned by `LanguageModel.stream`.

    `generation` is the result so far. The stream occupies the model from its first text until it is exhausted, closed
    or garbage collected, and other calls wait. So close a stream that you leave early. `async for` computes in a
    separate thread; cancelling the task ends the stream.
    """

    def __init__(self, cache: PrefixCache, answer: Continuation, turn: Turn, *, started: float) -> None:
        """Called by `LanguageModel`; `started` is the start time of the call."""
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
        """Stop generating and release the model to the next call. Further iteration ends at once."""
        self._turn.end()
        if not self._turn.computing:
            self._ended = True
        self._dismiss()

    async def aclose(self) -> None:
        """Like `close`, without blocking the event loop while a step runs."""
        import asyncio

        await asyncio.to_thread(self.close)

    def __del__(self) -> None:
        if hasattr(self, "_worker"):  # False if __init__ failed
            self.close()

    def __repr__(self) -> str:
        answer = self._answer
        state = answer.reason or ("interrupted" if self._ended else "open" if self._token is not None else "not begun")
        return f"TextStream({state}, {len(answer.prompt)} prompt tokens, {len(answer.tokens)} generated)"

    @property
    def generation(self) -> Generation:
        """Text, tokens and timings so far."""
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
        """Generate to the end and return the result."""
        for _ in self:
            pass
        return self.generation

    async def in_worker(self, function: Callable[[], Result]) -> Result:
        """Run `function` in this stream's thread. If the task is cancelled meanwhile, the stream ends.

        Each stream has its own thread: in a shared pool all threads might wait for a stream whose next step needs one.
        """
        import asyncio
        from concurrent.futures import ThreadPoolExecutor

        worker = self._worker = self._worker or ThreadPoolExecutor(1, thread_name_prefix="edgelm-stream")
        self._turn.task = asyncio.current_task()
        try:
            result = await asyncio.get_running_loop().run_in_executor(worker, function)
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
        """Return the seconds spent in this stream so far, without the consumer's time."""
        now = time.perf_counter()
        self._spent += now - self._resumed
        self._resumed = now
        return self._spent

    def _advance(self) -> str | None:
        """Return the next text; None at the end."""
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
        """Compute one token and return the text that may be shown now."""
        cache, answer = self._cache, self._answer
        self._turn.check()
        if self._token is None:
            started = time.perf_counter()
            exact = answer.options.sampling.seed is not None and not answer.options.reuse
            logits, self._reused = cache.prefill(answer.prompt, exact=exact, check=self._turn.check)
            self._prefill_seconds = time.perf_counter() - started
            self._token = answer.sampler.sample(logits)
            self._first_seconds = self._tick()
        else:
            self._token = cache.decode_sampled(self._token, answer.sampler)
            self._decoded += 1
        return answer.take(self._token, full=cache.runtime.position >= cache.runtime.context_length)
