"""A loaded model that continues text."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from edgelm.bundle import Bundle
from edgelm.errors import GenerationError
from edgelm.runtimes import Runtime, open_runtime
from edgelm.runtimes.base import checked_tokens, context_full, whole_numbers
from edgelm.sampling import Sampler, Sampling, is_integer
from edgelm.stopping import StopStrings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgelm.chat import ChatTemplate
    from edgelm.tokenizer import Tokenizer

StopReason = Literal["eos", "stop", "length", "interrupted"]
DEFAULT_MAX_TOKENS = 256


@dataclass(frozen=True)
class Options:
    """The keyword arguments of `generate`, `stream`, `chat` and `chat_stream`.

    `max_tokens`: how many tokens to generate at most; None: until the model ends or the context is full.
    `stop`: a string or strings that end the text; they are not part of it.
    `sampling`: see `edgelm.sampling.Sampling`, whose fields are given as keyword arguments too.
    """

    max_tokens: int | None = DEFAULT_MAX_TOKENS
    stop: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """From keyword arguments.

        Raises:
            GenerationError: an unknown name or a value out of range.
        """
        names = [item.name for item in fields(Sampling)]
        valid = ["max_tokens", "stop", *names]
        for name in given:
            if name not in valid:
                raise GenerationError(f"there is no option {name!r}; there are: {', '.join(valid)}")
        max_tokens = given.get("max_tokens", DEFAULT_MAX_TOKENS)
        if max_tokens is not None and (not is_integer(max_tokens) or max_tokens < 1):
            raise GenerationError(
                f"max_tokens is {max_tokens!r:.100}: it has to be an integer, 1 or more, or None for no limit"
            )
        stop = given.get("stop")
        stop = () if stop is None else (stop,) if isinstance(stop, str) else stop
        if isinstance(stop, (bytes, bytearray)) or not isinstance(stop, Iterable):
            raise GenerationError(f"stop is {stop!r:.100}: it has to be a string or a list of strings")
        stop = tuple(stop)
        StopStrings(stop)
        return cls(max_tokens, stop, Sampling(**{name: given[name] for name in names if name in given}))


@dataclass(frozen=True)
class Timings:
    """What one generation took; the consumer's time between two pieces of a stream is not counted.

    `prompt_tokens` were asked for, of which `reused_tokens` were cached by an earlier call and cost nothing.
    `time_to_first_token` starts with the call, tokenisation included. Seconds.
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


class TextStream(Iterator[str]):
    """Pieces of text as they are generated. Leaving it early is fine; `generation` tells what there is so far."""

    def __init__(self, model: LanguageModel, prompt: Sequence[int], options: Options, started: float) -> None:
        self._model = model
        self._prompt = list(prompt)
        self._options = options
        self._spent = time.perf_counter() - started
        self._resumed = time.perf_counter()
        self._text: list[str] = []
        self._tokens: list[int] = []
        self._reason: StopReason = "interrupted"
        self._reused = self._decoded = 0
        self._prefill_seconds = self._first_seconds = 0.0
        self._pieces = self._generate()

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Stop generating; further iteration ends at once."""
        self._pieces.close()  # type: ignore[attr-defined]  # it is a generator

    @property
    def generation(self) -> Generation:
        """The text, tokens and timings so far."""
        decode_seconds = max(0.0, self._spent - self._first_seconds) if self._decoded else 0.0
        timings = Timings(
            prompt_tokens=len(self._prompt),
            reused_tokens=self._reused,
            decoded_tokens=self._decoded,
            prefill_seconds=self._prefill_seconds,
            time_to_first_token=self._first_seconds,
            decode_seconds=decode_seconds,
        )
        return Generation("".join(self._text), tuple(self._tokens), self._reason, timings)

    def _tick(self) -> float:
        """Seconds spent here so far, the consumer's time left out."""
        now = time.perf_counter()
        self._spent += now - self._resumed
        self._resumed = now
        return self._spent

    def _show(self, text: str) -> Iterator[str]:
        if text:
            self._text.append(text)
            self._tick()
            yield text
            self._resumed = time.perf_counter()

    def _generate(self) -> Iterator[str]:
        model, options = self._model, self._options
        self._resumed = time.perf_counter()
        turn = model._take_turn()
        logits, self._reused = model._prefill(self._prompt, exact=options.sampling.seed is not None)
        self._prefill_seconds = time.perf_counter() - self._resumed
        sampler = Sampler(options.sampling, self._prompt)
        pieces, stops = model.tokenizer.detokenizer(), StopStrings(options.stop)
        reason: StopReason | None = None
        token = sampler.sample(logits)
        while reason is None:
            self._tick()
            self._first_seconds = self._first_seconds or self._spent
            if token in model.end_ids:
                reason = "eos"
                break
            self._tokens.append(token)
            text, stopped = stops.push(pieces.push(token))
            yield from self._show(text)
            model._require_turn(turn)
            full = model.runtime.position >= model.runtime.context_length
            if stopped:
                reason = "stop"
            elif full or len(self._tokens) == options.max_tokens:
                reason = "length"
            else:
                # With nothing else to ask of the logits, they stay on the device.
                plain = options.sampling.plain
                token = model._decode_greedy(token) if plain else sampler.sample(model._decode(token))
                self._decoded += 1
                self._tick()
        if reason != "stop":
            text, stopped = stops.push(pieces.flush())
            reason = "stop" if stopped else reason
            yield from self._show(text if stopped else text + stops.flush())
        self._reason = reason
        self._tick()


@dataclass(frozen=True)
class _Prefilled:
    """The last prompt that went through the runtime; its cache stays as it is until the next one does.

    `fresh`: it was computed from its first token on.
    """

    tokens: list[int]
    logits: NDArray[np.float32]
    fresh: bool


class LanguageModel:
    """A bundle that is loaded and ready. Made by `edgelm.load`; one thread at a time may use it.

    The cache of an earlier call is reused as far as the new prompt begins like it, so a growing conversation only pays
    for its new part. Numbers that were computed in other pieces differ by rounding, which can tip a close choice. So
    with a seed, which asks for the same text whatever came before, only a prompt that is repeated as a whole is reused.
    """

    def __init__(self, bundle: Bundle, runtime: Runtime, tokenizer: Tokenizer) -> None:
        self.bundle = bundle
        self.runtime = runtime
        self.tokenizer = tokenizer
        self.end_ids = frozenset(bundle.manifest.tokens.eos_ids)
        self._chat_template: ChatTemplate | None = None
        # The ids behind the cached positions; entries past the runtime's position are not cached.
        self._cached: list[int] = []
        self._last_prompt: _Prefilled | None = None
        self._turn = 0

    def generate(self, prompt: str | Sequence[int], **options: Any) -> Generation:
        """Continue `prompt` (text or token ids) and return the whole text. Options: see `Options` and `Sampling`.

        Raises:
            GenerationError: options or token ids that cannot be used.
            ContextLengthError: the prompt is longer than the context.
        """
        return _drained(self.stream(prompt, **options))

    def stream(self, prompt: str | Sequence[int], **options: Any) -> TextStream:
        """Continue `prompt` piece by piece. A piece never ends within a character. Raises as `generate` does."""
        started = time.perf_counter()
        chosen = Options.of(options)
        if isinstance(prompt, str):
            return self._stream(self.tokenizer.encode(prompt), chosen, started)
        return self._stream(whole_numbers(prompt, "the prompt").tolist(), chosen, started)

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Generation:
        """Answer a conversation of messages `{"role": "user", "content": "..."}` by the model's own chat template.

        A content may be a list of parts `{"type": "text", "text": "..."}` too; see `edgelm.chat.ChatTemplate.render`.

        Raises:
            GenerationError: no chat template, messages it refuses, or options that cannot be used.
            ContextLengthError: the conversation is longer than the context.
        """
        return _drained(self.chat_stream(messages, **options))

    def chat_stream(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> TextStream:
        """Answer a conversation piece by piece. Raises as `chat` does."""
        started = time.perf_counter()
        chosen = Options.of(options)
        # The template writes the special tokens itself, the first one too.
        tokens = self.tokenizer.encode(self.render_chat(messages), add_bos=False)
        return self._stream(tokens, chosen, started)

    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text that the chat template makes of a conversation, ready for the model's answer."""
        if self._chat_template is None:
            from edgelm.chat import ChatTemplate

            self._chat_template = ChatTemplate.from_folder(self.bundle.path, self.tokenizer)
        return self._chat_template.render(messages, add_generation_prompt=True)

    def _stream(self, tokens: list[int], options: Options, started: float) -> TextStream:
        if not tokens:
            raise GenerationError("the prompt is empty and the model has no token to begin with: give some text")
        checked_tokens(tokens, self.runtime.vocab_size)
        runtime = self.runtime
        if len(tokens) > runtime.context_length:
            raise context_full(len(tokens), 0, runtime.context_length, runtime.model_context_length)
        return TextStream(self, tokens, options, started)

    def close(self) -> None:
        """Free the model's memory."""
        self.runtime.close()

    def __enter__(self) -> LanguageModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take_turn(self) -> int:
        self._turn += 1
        return self._turn

    def _require_turn(self, turn: int) -> None:
        if turn != self._turn:
            raise GenerationError(
                "another generation began on this model while this stream was open: finish or close one before the next"
            )

    def _prefill(self, tokens: list[int], *, exact: bool) -> tuple[NDArray[np.float32], int]:
        """Logits after `tokens`, and how many of them an earlier call had cached.

        `exact`: they and the cache have to be what a fresh model computes, to the last bit.
        """
        runtime, last = self.runtime, self._last_prompt
        cached = self._cached[: runtime.position]
        common = next((i for i, (a, b) in enumerate(zip(cached, tokens, strict=False)) if a != b), None)
        common = min(len(cached), len(tokens)) if common is None else common
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
        logits = runtime.prefill(tokens[common:])
        self._last_prompt = _Prefilled(list(tokens), logits.copy(), fresh=common == 0)
        return logits, common

    def _decode(self, token: int) -> NDArray[np.float32]:
        self._append(token)
        return self.runtime.decode(token)

    def _decode_greedy(self, token: int) -> int:
        self._append(token)
        return self.runtime.decode_greedy(token)

    def _append(self, token: int) -> None:
        del self._cached[self.runtime.position :]
        self._cached.append(token)


def _drained(stream: TextStream) -> Generation:
    for _ in stream:
        pass
    return stream.generation


def load(
    path: Path | str,
    *,
    runtime: str | None = None,
    threads: int | None = None,
    context_length: int | None = None,
    kv: str | None = None,
    weight_budget: int | None = None,
    chat: bool = True,
) -> LanguageModel:
    """Load a bundle.

    Args:
        path: the bundle's folder.
        runtime: a name from `edgelm.runtimes.runtimes()`; default: the best one this device has for the bundle.
        threads: default the physical cores this process may use.
        context_length: positions to allocate; default the model's, at most 4096.
        kv: type of the cache of keys and values: "float16" (the default), "float32" or "int8", which halves what a long
            context reads. Bundles with portable operators have float32 alone.
        weight_budget: bytes of weights that may lie in the GPU's memory, for a TensorRT engine that was built to stream
            them; default all.
        chat: conversations are likely: the process that renders chat templates (12 MB) starts meanwhile, if the bundle
            has a template. False: it starts with the first conversation, which then waits for it.

    Raises:
        BundleError: not a bundle, damaged, or of a newer format.
        RuntimeUnavailableError: nothing installed can run it.
        TokenizerError: its tokenizer cannot be read.
        ContextLengthError: the model has no such context length.
        EdgeLMError: no such type of cache.
    """
    from edgelm.template_sandbox import start_for
    from edgelm.tokenizer import Tokenizer

    bundle = Bundle.open(path)
    if chat:
        start_for(bundle.path)
    tokenizer = Tokenizer.from_folder(bundle.path)
    opened = open_runtime(
        bundle, runtime, threads=threads, context_length=context_length, kv=kv, weight_budget=weight_budget
    )
    return LanguageModel(bundle, opened, tokenizer)
