"""The loaded model: generate text, stream it, chat, and generate for many prompts at once."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from edgelm.bundle import Bundle
from edgelm.errors import (
    ContextLengthError,
    GenerationError,
    GenerationTypeError,
    GenerationValueError,
    TokenizerError,
)
from edgelm.generation.options import GenerateOptions, Options
from edgelm.generation.prefix_cache import PrefixCache
from edgelm.generation.sampling import is_integer
from edgelm.generation.scheduler import ScheduledSequence, Scheduler, positions
from edgelm.generation.session_file import load_session, save_session
from edgelm.generation.stream import Continuation, Generation, TextStream
from edgelm.generation.turns import Turn, Turns
from edgelm.runtimes import Runtime, SequenceBatch, open_runtime
from edgelm.runtimes.base import checked_tokens, context_full, whole_numbers

if TYPE_CHECKING:
    from typing import Unpack

    from edgelm.tokenization.chat_template import ChatTemplate
    from edgelm.tokenization.tokenizer import Tokenizer


DEFAULT_BATCH = 8


class LanguageModel:
    """A loaded bundle, which generates text. Returned by `edgelm.load`; close it, or use it in a `with` block.

    Several threads may use it: calls run one after the other, in the order of arrival. A stream occupies the model from
    its first text until it is exhausted, closed or garbage collected. While a thread has a stream open, another call
    from that thread raises `GenerationError`, since it would wait for itself.

    The KV cache of the last call is reused for the common prefix of the prompts. With a `seed` the text must not depend
    on earlier calls, so only what has the bits of a fresh model is reused, unless the option `reuse` is set: an
    identical prompt, and whole prefill steps (512 tokens on a CPU).

    Attributes:
        bundle: the bundle.
        runtime: the runtime that computes the logits.
        tokenizer: the bundle's tokenizer.
        end_ids: tokens that end a text.

    Example::

        with edgelm.load("bundle/") as model:
            print(model.generate("Once upon a time", max_tokens=64).text)
    """

    def __init__(self, bundle: Bundle, runtime: Runtime, tokenizer: Tokenizer) -> None:
        self.bundle = bundle
        self.runtime = runtime
        self.tokenizer = tokenizer
        self.end_ids = frozenset(bundle.manifest.tokens.eos_ids)
        self._chat_template: ChatTemplate | None = None
        self._tool_template: ChatTemplate | None = None
        self.cache = PrefixCache(runtime)
        self._turns = Turns()

    def generate(self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> Generation:
        """Generate a continuation of `prompt` and return it when it is complete.

        Args:
            prompt: text, or token ids.
            **options: see `edgelm.GenerateOptions`. The default is greedy decoding of at most 256 tokens.

        Returns:
            The generated text, its token ids, the reason why it ended, and timings.

        Raises:
            GenerationTypeError: an option is unknown or of a wrong type, or the prompt is neither text nor ids.
            GenerationValueError: an option is out of range.
            GenerationError: the prompt has no tokens, or ids outside the vocabulary.
            ContextLengthError: the prompt is longer than the context.
            EdgeLMError: the model was closed.

        Example::

            result = model.generate("Once upon a time", max_tokens=64, temperature=0.8, seed=1)
            print(result.text, result.timings.decode_tokens_per_second)
        """
        return self.stream(prompt, **options).drain()

    def stream(self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> TextStream:
        """Generate a continuation of `prompt` and return an iterator over its text as it is generated.

        Arguments and errors are those of `generate`. A text is never cut inside a character.

        Example::

            for text in model.stream("Once upon a time", max_tokens=64):
                print(text, end="", flush=True)
        """
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
        """Generate continuations of many prompts, and decode up to `batch` of them together.

        Sequences that decode together share each read of the weights. Each result equals that of `generate` with a
        seed: on the CPU logits are the same to the last bit. One exception: for int4 bundles with a head in split
        nibbles, all logits are exact here, but in `generate` only the largest are, which are found by the high nibbles.
        A sampled token may differ; the best one only if 128 tiles of 32 tokens have a larger logit by these. Runtimes
        without batches (portable operators, TensorRT) run the prompts one by one.

        Memory: `batch` KV caches, each for the longest prompt and its max_tokens, at most the context length. They are
        freed at the end. The weights are shared with `generate`, whose own cache is not used.

        Args:
            prompts: texts or lists of token ids.
            batch: sequences that decode together. When one ends, the next prompt takes its place.
            each: options of each prompt, which override `options`.
            **options: options of all prompts, see `edgelm.GenerateOptions`.

        Returns:
            The results in the order of the prompts.

        Raises:
            GenerationTypeError, GenerationValueError, GenerationError, ContextLengthError: as `generate`, before
                anything is computed; the message names the prompt.
        """
        started = time.perf_counter()
        answers = self._answers(prompts, each, options)
        if not is_integer(batch) or batch < 1:
            kind = GenerationValueError if is_integer(batch) else GenerationTypeError
            raise kind(f"batch is {batch!r:.100}: it has to be an integer, 1 or more")
        runtime = self.runtime
        rows = min(int(batch), len(answers))
        if rows > 1:
            with self._turn() as turn:
                opened = runtime.open_batch(rows, positions(answers, runtime.context_length))
                if opened is not None:
                    with opened:
                        return self._together(opened, answers, turn, started)
        return [TextStream(self.cache, answer, Turn(self._turns), started=started).drain() for answer in answers]

    def _together(
        self, batch: SequenceBatch, answers: list[Continuation], turn: Turn, started: float
    ) -> list[Generation]:
        """Generate every continuation on the rows of `batch`; return the results in the order of `answers`."""
        waiting = deque(ScheduledSequence(answer, started=started) for answer in answers)
        results: dict[ScheduledSequence, Generation | None] = dict.fromkeys(waiting)

        def done(sequence: ScheduledSequence) -> None:
            if sequence.error is not None:
                raise sequence.error
            results[sequence] = sequence.generation

        scheduler = Scheduler(
            batch, lambda: waiting.popleft() if waiting else None, done,
            chunk=self.runtime.chunk, context_length=self.runtime.context_length,
        )  # fmt: skip
        turn.check()
        while scheduler.step():
            turn.check()
        return [result for result in results.values() if result is not None]

    def continuation(
        self, tokens: Sequence[int], options: Options, *, shown: frozenset[int] = frozenset()
    ) -> Continuation:
        """Return a continuation of a prompt that has not begun, for a `Scheduler`.

        Args:
            tokens: the prompt's ids.
            options: options of sampling and of the end.
            shown: special tokens that are part of the text, such as those before the calls of tools.

        Raises:
            GenerationTypeError, GenerationError, ContextLengthError, EdgeLMError: as `generate`, by the prompt.
        """
        return self._continuation(self._tokens(tokens), options, shown)

    def _answers(
        self,
        prompts: Iterable[str | Sequence[int]],
        each: Sequence[GenerateOptions] | None,
        options: GenerateOptions,
    ) -> list[Continuation]:
        """Check every prompt and its options, and return their continuations. Raises as `generate_many`."""
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
        """Answer a conversation, rendered with the model's chat template.

        Args:
            messages: messages `{"role": "user", "content": "..."}`. A content may also be a list of parts
                `{"type": "text", "text": "..."}`.
            **options: see `edgelm.GenerateOptions`.

        Raises:
            GenerationError: the bundle has no chat template, the template refuses the messages, or an option is
                invalid.
            ContextLengthError: the conversation is longer than the context.

        Example::

            answer = model.chat([{"role": "user", "content": "Hello"}])
            print(answer.text)
        """
        return self.chat_stream(messages, **options).drain()

    def chat_stream(self, messages: Sequence[Mapping[str, Any]], **options: Unpack[GenerateOptions]) -> TextStream:
        """Answer a conversation and return an iterator over the text. Arguments and errors are those of `chat`."""
        started = time.perf_counter()
        chosen = Options.of(options)
        return self._stream(self.chat_tokens(messages), chosen, started)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any] | None = None) -> str:
        """Return the text of a conversation by the chat template, with the prompt for the model's answer.

        `variables`: further variables of the template, such as `tools`.
        """
        template = self.tool_template if variables and variables.get("tools") else self.chat_template
        return template.render(messages, add_generation_prompt=True, variables=variables)

    @property
    def chat_template(self) -> ChatTemplate:
        """The bundle's chat template, read when it is first needed.

        Raises:
            TokenizerError: there is none, or it is not valid.
        """
        if self._chat_template is None:
            from edgelm.tokenization.chat_template import ChatTemplate

            self._chat_template = ChatTemplate.from_folder(self.bundle.path, self.tokenizer)
        return self._chat_template

    @property
    def tool_template(self) -> ChatTemplate:
        """The chat template for conversations with tools: as in transformers, the one named "tool_use" if there is one.

        Raises:
            TokenizerError: there is none, or it is not valid.
        """
        from edgelm.tokenization.chat_template import ChatTemplate
        from edgelm.tokenization.template_files import read_templates

        if self._tool_template is None:
            name = "tool_use"
            if name in read_templates(self.bundle.path):
                self._tool_template = ChatTemplate.from_folder(self.bundle.path, self.tokenizer, name)
            else:
                self._tool_template = self.chat_template
        return self._tool_template

    def chat_tokens(
        self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Return the token ids of `render_chat`, the prompt of `chat`."""
        # The template writes all special tokens, bos included.
        return self.tokenizer.encode(self.render_chat(messages, variables), add_bos=False)

    async def generate_async(self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> Generation:
        """Like `generate`, without blocking the event loop. Cancelling the task stops the generation."""
        import asyncio

        stream = await asyncio.to_thread(self.stream, prompt, **options)
        return await stream.in_worker(stream.drain)

    async def chat_async(self, messages: Sequence[Mapping[str, Any]], **options: Unpack[GenerateOptions]) -> Generation:
        """Like `chat`, without blocking the event loop. Cancelling the task stops the generation."""
        import asyncio

        stream = await asyncio.to_thread(self.chat_stream, messages, **options)
        return await stream.in_worker(stream.drain)

    def save_session(self, path: Path | str, *, tokens: int | None = None) -> None:
        """Write the cached tokens and their KV cache to a file, atomically. An earlier session there is replaced.

        After `load_session`, in this or a later process, a prompt that begins with these tokens computes only the rest.
        libedgelm reads and writes the same files. The size is that of the cache: 128 KiB per token of OLMoE-1B-7B with
        a float16 cache.

        Args:
            path: the file, in a folder that exists.
            tokens: save only the first ones; default: all that are cached, prompt and answer of the last call.

        Raises:
            SessionError: the runtime cannot save its cache, the file cannot be written, or there are fewer tokens.
            EdgeLMError: `path` is a folder or holds something else than a session, its folder does not exist, the disk
                is full, or the model was closed. A file that existed is then unchanged.

        Example::

            model.generate(manual, max_tokens=1)
            model.save_session("manual.session")
            # after a restart
            model.load_session("manual.session")
            print(model.generate(manual + question).text)  # computes the question only
        """
        with self._turn() as turn:
            save_session(self.bundle, self.cache, path, tokens=tokens, check=turn.check)

    def load_session(self, path: Path | str) -> int:
        """Replace the cached tokens and their KV cache by those of a file that `save_session` or libedgelm wrote.

        The next prompt then continues as it would have in the model that saved the file, bit for bit. A session belongs
        to a bundle, a runtime and a type of KV cache; the context length may be another. With a `seed`, only
        what has the bits of a fresh model is reused, as it is without a restart.

        Args:
            path: the file.

        Returns:
            The number of tokens that are cached now.

        Raises:
            SessionError: the file is missing, unreadable, damaged, or belongs to something else; or the runtime cannot
                load a cache.
            ContextLengthError: it has more tokens than the context.
            EdgeLMError: the model was closed.

        All is checked before the model changes. Only if the file changes while it is read, nothing is cached after the
        error.
        """
        with self._turn() as turn:
            return load_session(self.bundle, self.cache, path, turn.check)

    @contextlib.contextmanager
    def _turn(self) -> Iterator[Turn]:
        """Have the model for the block, after the calls that came before."""
        turn = Turn(self._turns)
        turn.begin()
        try:
            yield turn
        finally:
            turn.leave()
            turn.pause()

    def _tokens(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        ids: list[int] = whole_numbers(prompt, "the prompt").tolist()
        return ids

    def _stream(self, tokens: list[int], options: Options, started: float) -> TextStream:
        return TextStream(self.cache, self._continuation(tokens, options), Turn(self._turns), started=started)

    def _continuation(self, tokens: list[int], options: Options, shown: frozenset[int] = frozenset()) -> Continuation:
        self._turns.require_open()
        if not tokens:
            raise GenerationError("the prompt is empty and the model has no token to begin with: give some text")
        checked_tokens(tokens, self.runtime.vocab_size)
        runtime = self.runtime
        if len(tokens) > runtime.context_length:
            raise context_full(len(tokens), 0, runtime.context_length, runtime.model_context_length)
        return Continuation(tokens, options, self.tokenizer, self.end_ids, shown)

    def close(self) -> None:
        """Wait for the running step, then free the model's memory. Calls of other threads raise `EdgeLMError`."""
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
        runtime: a name from `edgelm.runtimes.runtimes()`; default: the best one on this device for the bundle.
        threads: number of threads; default: the physical cores that this process may use.
        context_length: positions of the KV cache; default: the model's context length, at most 4096.
        kv: type of the KV cache: "float16" (the default), "float32", "int8" or "fp8". The 8-bit types halve the memory
            and the reads of a long context. Bundles with portable operators have one type only.
        weight_memory: bytes of GPU memory for weights, for a TensorRT engine that was built with weight streaming;
            default: all weights.
        chat: start the process that renders chat templates (12 MB) while the bundle loads, if it has a template. False:
            the process starts with the first conversation, which waits for it.

    Returns:
        The loaded model.

    Raises:
        BundleError: it is not a bundle, it is damaged, or its format is newer.
        RuntimeUnavailableError: no installed runtime can run it.
        TokenizerError: its tokenizer cannot be read.
        ContextLengthError: the model has no such context length.
        EdgeLMError: there is no such type of KV cache.

    Example::

        model = edgelm.load("bundle/", threads=4)
        print(model.generate("Once upon a time").text)
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
