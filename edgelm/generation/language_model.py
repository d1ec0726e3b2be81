"""A loaded model that continues text."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Unpack

from edgelm.bundle import Bundle
from edgelm.errors import (
    ContextLengthError,
    GenerationError,
    GenerationTypeError,
    GenerationValueError,
    TokenizerError,
)
from edgelm.generation.batched import decode_together, positions
from edgelm.generation.options import GenerateOptions, Options
from edgelm.generation.prefix_cache import PrefixCache
from edgelm.generation.sampling import is_integer
from edgelm.generation.stream import Continuation, Generation, TextStream
from edgelm.generation.turns import Turn, Turns
from edgelm.runtimes import Runtime, open_runtime
from edgelm.runtimes.base import checked_tokens, context_full, whole_numbers

if TYPE_CHECKING:
    from edgelm.tokenization.chat_template import ChatTemplate
    from edgelm.tokenization.tokenizer import Tokenizer


DEFAULT_BATCH = 8


class LanguageModel:
    """A bundle that is loaded and ready. Made by `edgelm.load`.

    Any number of threads may use it: calls have the model one after the other, in the order in which they came. A
    stream has it from its first piece until it is exhausted, closed or garbage collected; a thread that has one open
    gets a GenerationError for another call, since it would wait for itself.

    The cache of an earlier call is reused as far as the new prompt begins like it: see `PrefixCache`. With a seed,
    which asks for the same text whatever came before, only a prompt that is repeated as a whole is reused, unless the
    option `reuse` says that the same calls came before.
    """

    def __init__(self, bundle: Bundle, runtime: Runtime, tokenizer: Tokenizer) -> None:
        self.bundle = bundle
        self.runtime = runtime
        self.tokenizer = tokenizer
        self.end_ids = frozenset(bundle.manifest.tokens.eos_ids)
        self._chat_template: ChatTemplate | None = None
        self.cache = PrefixCache(runtime)
        self._turns = Turns()

    def generate(self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> Generation:
        """Continue `prompt` (text or token ids) and return the whole text. Options: see `Options` and `Sampling`.

        Raises:
            GenerationTypeError: an unknown option, or one of the wrong type; a prompt that is neither text nor ids.
            GenerationValueError: an option that is out of range.
            GenerationError: a prompt without tokens, or with ids outside the vocabulary.
            ContextLengthError: the prompt is longer than the context.
            EdgeLMError: the model was closed.
        """
        return self.stream(prompt, **options).drain()

    def stream(self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> TextStream:
        """Continue `prompt` piece by piece. A piece never ends within a character. Raises as `generate` does."""
        started = time.perf_counter()
        chosen = Options.of(options)
        return self._stream(self._tokens(prompt), chosen, started)

    def generate_many(
        self,
        prompts: Iterable[str | Sequence[int]],
        *,
        batch: int = DEFAULT_BATCH,
        each: Sequence[GenerateOptions] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> list[Generation]:
        """Continue many prompts, up to `batch` of them together; the results are in their order.

        Decoding together reads the weights once for all. Each result is what `generate` gives for that prompt with a
        seed: on the CPU the same numbers to the last bit, save that int4 bundles whose head is split compute all its
        logits exactly here, and only the likeliest in `generate`. The same token is the best one; a draw may tip.
        Runtimes without batches (portable operators, TensorRT) run the prompts one after the other.

        Memory: `batch` caches of the longest prompt with its max_tokens each, at most of the model's context length,
        freed at the end. The weights and the cache of `generate` are shared and untouched.

        Args:
            prompts: texts or lists of token ids.
            batch: how many decode together. As sequences end, others take their places.
            each: options for each prompt, which replace those for all.
            options: for all prompts; see `Options` and `Sampling`.

        Raises:
            GenerationTypeError, GenerationValueError, GenerationError, ContextLengthError: as `generate`, naming the
                prompt, before any is run.
        """
        started = time.perf_counter()
        answers = self._answers(prompts, each, options)
        if not is_integer(batch) or batch < 1:
            kind = GenerationValueError if is_integer(batch) else GenerationTypeError
            raise kind(f"batch is {batch!r:.100}: it has to be an integer, 1 or more")
        turn, runtime = Turn(self._turns), self.runtime
        rows = min(int(batch), len(answers))
        opened = None
        if rows > 1:
            turn.begin()
            try:
                opened = runtime.open_batch(rows, positions(answers, runtime.context_length))
                if opened is not None:
                    with opened:
                        return decode_together(
                            opened, answers, turn,
                            context_length=runtime.context_length, chunk=runtime.chunk, started=started,
                        )  # fmt: skip
            finally:
                turn.leave()
                turn.pause()
        return [TextStream(self.cache, answer, Turn(self._turns), started=started).drain() for answer in answers]

    def _answers(
        self,
        prompts: Iterable[str | Sequence[int]],
        each: Sequence[GenerateOptions] | None,
        options: GenerateOptions,
    ) -> list[Continuation]:
        """What is to follow each prompt, every option and length checked. Raises as `generate_many`."""
        if isinstance(prompts, (str, bytes, bytearray, Mapping)) or not isinstance(prompts, Iterable):
            raise GenerationTypeError(f"prompts is {prompts!r:.100}: it has to be a list of prompts")
        given = list(prompts)
        if each is not None and len(each) != len(given):
            raise GenerationValueError(f"each has options for {len(each)} prompts, and there are {len(given)}")
        answers = []
        for index, prompt in enumerate(given):
            try:
                chosen = Options.of({**options, **(each[index] if each else {})})
                answers.append(self._continuation(self._tokens(prompt), chosen))
            except (GenerationError, ContextLengthError, TokenizerError) as error:
                raise type(error)(f"prompt {index}: {error}") from error
        return answers

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Unpack[GenerateOptions]) -> Generation:
        """Answer a conversation of messages `{"role": "user", "content": "..."}` by the model's own chat template.

        A content may be a list of parts `{"type": "text", "text": "..."}` too; see
        `edgelm.tokenization.chat_template.ChatTemplate.render`.

        Raises:
            GenerationError: no chat template, messages it refuses, or options that cannot be used.
            ContextLengthError: the conversation is longer than the context.
        """
        return self.chat_stream(messages, **options).drain()

    def chat_stream(self, messages: Sequence[Mapping[str, Any]], **options: Unpack[GenerateOptions]) -> TextStream:
        """Answer a conversation piece by piece. Raises as `chat` does."""
        started = time.perf_counter()
        chosen = Options.of(options)
        return self._stream(self.chat_tokens(messages), chosen, started)

    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text that the chat template makes of a conversation, ready for the model's answer."""
        if self._chat_template is None:
            from edgelm.tokenization.chat_template import ChatTemplate

            self._chat_template = ChatTemplate.from_folder(self.bundle.path, self.tokenizer)
        return self._chat_template.render(messages, add_generation_prompt=True)

    def chat_tokens(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The ids of that text: the prompt of `chat`."""
        # The template writes the special tokens itself, the first one too.
        return self.tokenizer.encode(self.render_chat(messages), add_bos=False)

    async def generate_async(self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> Generation:
        """As `generate`, without blocking the event loop; cancelling the task stops the generation."""
        import asyncio

        stream = await asyncio.to_thread(self.stream, prompt, **options)
        return await stream.in_worker(stream.drain)

    async def chat_async(self, messages: Sequence[Mapping[str, Any]], **options: Unpack[GenerateOptions]) -> Generation:
        """As `chat`, without blocking the event loop; cancelling the task stops the generation."""
        import asyncio

        stream = await asyncio.to_thread(self.chat_stream, messages, **options)
        return await stream.in_worker(stream.drain)

    def _tokens(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        ids: list[int] = whole_numbers(prompt, "the prompt").tolist()
        return ids

    def _stream(self, tokens: list[int], options: Options, started: float) -> TextStream:
        return TextStream(self.cache, self._continuation(tokens, options), Turn(self._turns), started=started)

    def _continuation(self, tokens: list[int], options: Options) -> Continuation:
        self._turns.require_open()
        if not tokens:
            raise GenerationError("the prompt is empty and the model has no token to begin with: give some text")
        checked_tokens(tokens, self.runtime.vocab_size)
        runtime = self.runtime
        if len(tokens) > runtime.context_length:
            raise context_full(len(tokens), 0, runtime.context_length, runtime.model_context_length)
        return Continuation(tokens, options, self.tokenizer, self.end_ids)

    def close(self) -> None:
        """Free the model's memory. Calls of other threads end with an EdgeLMError; the step that runs is waited for."""
        self._turns.close()
        self.runtime.close()

    def __repr__(self) -> str:
        manifest, runtime = self.bundle.manifest, self.runtime
        return (
            f"LanguageModel({str(self.bundle.path)!r}: {manifest.model.name}, {manifest.recipe.name}, {runtime.name}, "
            f"{runtime.context_length} positions)"
        )

    def __enter__(self) -> LanguageModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def load(
    path: Path | str,
    *,
    runtime: str | None = None,
    threads: int | None = None,
    context_length: int | None = None,
    kv: str | None = None,
    weight_memory: int | None = None,
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
        weight_memory: bytes of weights that may lie in the GPU's memory, for a TensorRT engine that was built to stream
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
    from edgelm.tokenization.template_sandbox import start_for
    from edgelm.tokenization.tokenizer import Tokenizer

    bundle = Bundle.open(path)
    if chat:
        start_for(bundle.path)
    tokenizer = Tokenizer.from_folder(bundle.path)
    opened = open_runtime(
        bundle, runtime, threads=threads, context_length=context_length, kv=kv, weight_memory=weight_memory
    )
    return LanguageModel(bundle, opened, tokenizer)
