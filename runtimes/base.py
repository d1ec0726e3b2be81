"""Base classes of runtimes: append tokens to a KV cache, return logits, truncate the cache."""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor, wait
from concurrent.futures import TimeoutError as NotYet
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgelm.devices import allowed_cores
from edgelm.errors import ContextLengthError, EdgeLMError, GenerationError, GenerationTypeError
from edgelm.generation.sampling import Sampler, argmax, is_integer

if TYPE_CHECKING:
    from edgelm.bundle import Bundle

Self = TypeVar("Self", bound="Closable")
Result = TypeVar("Result")

DEFAULT_CONTEXT_LENGTH = 4096
DEFAULT_CHUNK = 512
_LOGITS_BYTES = 64 << 20


class Closable(ABC):
    """An object that holds a device's memory until `close` is called or its `with` block ends."""

    kind: ClassVar[str]
    """The name of the object in error messages."""
    _closed = False

    def close(self) -> None:
        """Free the memory. Closing twice is harmless; any other use after it raises EdgeLMError."""
        if not self._closed:
            self._closed = True
            self._free()

    @abstractmethod
    def _free(self) -> None:
        """Free the memory; called once."""

    def _require_open(self) -> None:
        if self._closed:
            raise EdgeLMError(f"this {self.kind} was closed: load the bundle again")

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class LoadedModel(Closable):
    """A model that is loaded on a device, with a KV cache. Base of `Runtime` and `SequenceBatch`.

    Only one thread at a time may use it. Logits that it returns are float32 in a buffer of the model: they are valid
    until the next call; copy them to keep them.

    Args:
        vocab_size: V, the number of logits per position.
        context_length: positions of each sequence.
        model_context_length: the model's limit.
        threads: CPU threads; None: the physical cores that this process may use.
        chunk: the largest number of tokens per prefill step; a long prompt takes several steps.

    Raises:
        EdgeLMError: `chunk` is less than 1.
    """

    name: str
    """The name in the registry, e.g. "onnxruntime-cpu"."""

    def __init__(
        self,
        *,
        vocab_size: int,
        context_length: int,
        model_context_length: int,
        threads: int | None = None,
        chunk: int = DEFAULT_CHUNK,
    ) -> None:
        if chunk < 1:
            raise EdgeLMError(f"chunk is {chunk}: give 1 or more tokens per prefill step")
        self.vocab_size = vocab_size
        self.context_length = context_length
        self.model_context_length = model_context_length
        self.threads = allowed_cores() if threads is None else threads
        self.chunk = min(chunk, context_length)

    def device_bandwidth(self) -> float | None:
        """Measure the bandwidth of the device's memory in bytes per second; None if it cannot be measured."""
        return None

    def _fitting(self, tokens: Sequence[int] | NDArray[np.int64], length: int) -> NDArray[np.int64]:
        """Return `tokens` as int64 [T], checked as `prefill` documents for a sequence with `length` cached tokens.

        Raises:
            ContextLengthError, GenerationError: as `Runtime.prefill`.
        """
        self._require_open()
        ids = checked_tokens(tokens, self.vocab_size)
        self._require_room(ids.size, length)
        return ids

    def _require_room(self, tokens: int, length: int) -> None:
        if length + tokens > self.context_length:
            raise context_full(tokens, length, self.context_length, self.model_context_length)


class SequenceBatch(LoadedModel):
    """A model that is loaded on a device, with the KV caches of several sequences that decode together.

    Each sequence is prefilled separately and has its own length.

        with open_batch(Bundle.open("bundle"), 8) as model:
            tokens = [int(model.prefill(row, prompt).argmax()) for row, prompt in enumerate(prompts)]
            while ...:
                tokens = model.decode_batch(tokens).argmax(axis=1)
    """

    kind = "batch"
    moves: ClassVar[bool] = False
    """Whether `move` and `use` work here."""
    least_step: ClassVar[int | None] = None
    """Tokens from which on a prefill step gives the same bits however a prompt is cut into such steps. None: the bits
    depend on the cuts."""
    block_tokens: ClassVar[int | None] = None
    """`read_cache` and `write_cache` take multiples of as many tokens. None: they do not work here."""

    def __init__(self, batch: int, *, threads: int | None, chunk: int, **sizes: int) -> None:
        if batch < 1:
            raise EdgeLMError(f"batch is {batch}: give 1 or more")
        super().__init__(threads=threads, chunk=chunk, **sizes)
        self.batch = batch
        self._in_use = batch
        self._lengths = np.zeros(batch, np.int64)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """The number of cached tokens of each sequence, [batch]."""
        return self._lengths.copy()

    def prefill(self, row: int, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Append `tokens` to sequence `row`, `chunk` at a time; return the logits [vocab_size] after the last of them.

        Raises:
            ContextLengthError: the tokens do not all fit; nothing was appended.
            GenerationError: no sequence has this number, there is no token, or an id is outside the vocabulary; nothing
            was appended.
        """
        self._require_row(row)
        ids = self._fitting(tokens, int(self._lengths[row]))
        for begin in range(0, ids.size, self.chunk):
            part = ids[begin : begin + self.chunk]
            logits = self._prefill(row, part, last=begin + part.size == ids.size)
            self._lengths[row] += part.size
        return logits

    def decode_batch(self, tokens: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
        """Append one token to every sequence, in one pass over the weights; return the logits [batch, vocab_size].

        After `use(count)`: to the first `count` sequences, and [count, vocab_size].

        Raises:
            ContextLengthError: a sequence is full; nothing was appended.
            GenerationError: the number of tokens is not that of the sequences, or an id is outside the vocabulary;
            nothing was appended.
        """
        logits = self._decode(self._one_each(tokens))
        self._lengths[: self._in_use] += 1
        return logits

    def use(self, count: int) -> None:
        """Decode only the first `count` sequences from now on: that many tokens and logits. The others stay cached.

        Raises:
            GenerationError: there are not that many sequences, or the runtime decodes all of them (`moves`).
        """
        self._require_open()
        if not 1 <= count <= self.batch:
            raise GenerationError(f"cannot use {count} sequences: give 1 to {self.batch}")
        if count != self.batch and not self.moves:
            raise GenerationError(f"{self.name} decodes all {self.batch} sequences")
        self._in_use = count

    def move(self, source: int, target: int) -> None:
        """Move the cached tokens of sequence `source` to sequence `target`, whose own are dropped.

        Raises:
            GenerationError: no sequence has this number, or the runtime cannot move them (`moves`).
        """
        self._require_row(source)
        self._require_row(target)
        if not self.moves:
            raise GenerationError(f"{self.name} cannot move a sequence")
        if source != target:
            length = int(self._lengths[source])
            self._move(source, target, length)
            self._lengths[target], self._lengths[source] = length, 0

    def _move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` cached tokens. Only where `moves` is set."""
        raise AssertionError(f"{type(self).__name__} sets moves and has no _move")

    def read_cache(self, row: int, begin: int, end: int) -> NDArray[np.uint8]:
        """Return a copy of the cache of the tokens `begin` to `end` of a sequence, as bytes for `write_cache`.

        The bytes depend on the model, the type of the cache and the tokens before, not on the context length.

        Args:
            row: the sequence.
            begin: the first token, a multiple of `block_tokens`.
            end: the token after the last, another multiple.

        Raises:
            GenerationError: not all of them are cached, they are no multiples, or the runtime cannot (`block_tokens`).
        """
        self._require_row(row)
        self._require_blocks(begin, end)
        if end > self._lengths[row]:
            raise GenerationError(f"cannot read {end} cached tokens: sequence {row} has {self._lengths[row]}")
        return self._read_cache(row, begin, end)

    def write_cache(self, row: int, begin: int, end: int, data: NDArray[np.uint8]) -> None:
        """Replace the cache of a sequence from token `begin` on by what `read_cache` returned; `end` are cached then.

        Raises:
            ContextLengthError: there is no room.
            GenerationError: as `read_cache`, where fewer than `begin` are cached; or the number of bytes is another.
        """
        self._require_row(row)
        self._require_blocks(begin, end)
        _require_cached(begin, int(self._lengths[row]))
        self._require_room(end - begin, begin)
        wanted = self.copied_bytes(end - begin)
        if data.nbytes != wanted:
            raise GenerationError(f"{data.nbytes} bytes are not the cache of {end - begin} tokens, which has {wanted}")
        self._write_cache(row, begin, end, data)
        self._lengths[row] = end

    def copied_bytes(self, tokens: int) -> int:
        """Return the number of bytes of the cache of `tokens` tokens. Only where `block_tokens` is set."""
        raise AssertionError(f"{type(self).__name__} sets block_tokens and has no copied_bytes")

    def _read_cache(self, row: int, begin: int, end: int) -> NDArray[np.uint8]:
        raise AssertionError(f"{type(self).__name__} sets block_tokens and has no _read_cache")

    def _write_cache(self, row: int, begin: int, end: int, data: NDArray[np.uint8]) -> None:
        raise AssertionError(f"{type(self).__name__} sets block_tokens and has no _write_cache")

    def _require_blocks(self, begin: int, end: int) -> None:
        if self.block_tokens is None:
            raise GenerationError(f"{self.name} cannot copy the cache of a sequence")
        if begin % self.block_tokens or end % self.block_tokens or not 0 <= begin <= end:
            raise GenerationError(
                f"cannot copy the cache of tokens {begin} to {end}: give multiples of {self.block_tokens}"
            )

    def decode_sampled(
        self, tokens: Sequence[int] | NDArray[np.int64], samplers: Sequence[Sampler | None]
    ) -> list[int]:
        """Append one token to every sequence, in one pass over the weights; return the next tokens [batch].

        Each is what `Sampler.sample` chooses by the logits. A GPU runtime copies what is needed for that, not the
        logits. Without a sampler a sequence's next token is 0. After `use(count)`: of the first `count` sequences.
        Raises as `decode_batch` and `Sampler.sample` do.
        """
        logits = self.decode_batch(tokens)
        return [0 if one is None else one.sample(row) for one, row in zip(samplers, logits, strict=True)]

    def truncate(self, row: int, length: int) -> None:
        """Keep the first `length` cached tokens of sequence `row`.

        Raises:
            GenerationError: no sequence has this number, or `length` is negative or more than is cached.
        """
        self._require_row(row)
        _require_cached(length, int(self._lengths[row]))
        self._lengths[row] = length

    @abstractmethod
    def _prefill(self, row: int, ids: NDArray[np.int64], *, last: bool) -> NDArray[np.float32]:
        """Run ids [T], at most `chunk`, on sequence `row`. The caller updates the length.

        Return the logits [vocab_size] after the last of them. They are used only if `last`.
        """

    @abstractmethod
    def _decode(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Run ids [n], one for each of the first n sequences; return logits [n, vocab_size].

        The caller updates the lengths.
        """

    def _one_each(self, tokens: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Return `tokens` as int64 [n], checked as `decode_batch` documents."""
        self._require_open()
        ids = checked_tokens(tokens, self.vocab_size)
        if ids.size != self._in_use:
            raise GenerationError(f"{ids.size} tokens for {self._in_use} sequences: give one to each")
        self._require_room(1, int(self._lengths[: self._in_use].max()))
        return ids

    def _require_row(self, row: int) -> None:
        self._require_open()
        if not 0 <= row < self.batch:
            raise GenerationError(f"sequence {row} does not exist: choose 0 to {self.batch - 1}")


class Runtime(LoadedModel):
    """A model that is loaded on a device, with the cache of one sequence."""

    kind = "runtime"
    batch_class: ClassVar[type[SequenceBatch] | None] = None
    """Class for several sequences; called like this class, with the number of sequences after the bundle. None: not
    supported."""
    tracing_class: ClassVar[type[Any] | None] = None  # an `edgelm.runtimes.tracing.TracingModel`
    """Class for the debug graph; called with the bundle and `threads`. None: not supported."""
    _position = 0

    @property
    def position(self) -> int:
        """The number of cached tokens, which is the position of the next token."""
        return self._position

    def prefill(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Append `tokens` to the cache, `chunk` at a time; return the logits [vocab_size] after the last of them.

        Raises:
            ContextLengthError: the tokens do not all fit; nothing was appended.
            GenerationError: there is no token, or an id is outside the vocabulary; nothing was appended.
        """
        ids = self._checked(tokens)
        for begin in range(0, ids.size, self.chunk):
            part = ids[begin : begin + self.chunk]
            logits = self._prefill(part, last=begin + part.size == ids.size)
            self._position += part.size
        return logits

    @abstractmethod
    def _prefill(self, ids: NDArray[np.int64], *, last: bool) -> NDArray[np.float32]:
        """Run ids [T], at most `chunk`, after the cached ones. The caller updates the position.

        Return the logits [vocab_size] after the last of them. They are used only if `last`.
        """

    @abstractmethod
    def decode(self, token: int) -> NDArray[np.float32]:
        """Append one token; return the logits [vocab_size] after it. Raises as `prefill` does."""

    def decode_greedy(self, token: int) -> int:
        """Append one token; return the argmax of the logits after it.

        A GPU runtime copies only the token back. If several logits are exactly equal it may choose another than the
        first. Raises as `decode` and `argmax` do.
        """
        return argmax(self.decode(token))

    def decode_sampled(self, token: int, sampler: Sampler) -> int:
        """Append one token; return the next one, which `sampler` chooses.

        It is what `Sampler.sample` chooses by the logits. A GPU runtime copies what is needed for that, not the logits.
        If nothing changes the logits of greedy decoding, `decode_greedy` chooses. Raises as these do.
        """
        return self.decode_greedy(token) if sampler.options.plain else sampler.sample(self.decode(token))

    def open_batch(self, batch: int, context_length: int) -> SequenceBatch | None:
        """Return a `SequenceBatch` of `batch` sequences of `context_length` positions that shares this runtime's
        weights.

        Close it before the runtime. None if the runtime supports only one sequence.
        """
        del batch, context_length
        return None

    def truncate(self, length: int) -> None:
        """Keep the first `length` cached tokens and drop the rest.

        Raises:
            GenerationError: `length` is negative or more than is cached.
        """
        self._require_open()
        _require_cached(length, self._position)
        self._position = length

    def reset(self) -> None:
        """Drop all cached tokens."""
        self.truncate(0)

    def logits_all(self, tokens: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        """Append `tokens`; yield the logits after each of them in blocks [rows, vocab_size], in order.

        A block has at most 64 MiB, so that memory stays small for a long text with a large vocabulary. It is valid
        until the next block is requested. Raises as `prefill` does, before the first block.
        """
        ids = self._checked(tokens)
        for begin in range(0, ids.size, self._block):
            part = self._checked(ids[begin : begin + self._block])
            end = self._position + part.size
            logits = self._prefill_all(part)
            self._position = end
            yield logits

    def _prefill_all(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Run ids [T], at most `_block`, after the cached ones; return logits [T, vocab_size]."""
        return np.stack([self.decode(token).copy() for token in ids.tolist()])

    @property
    def _block(self) -> int:
        """The number of positions whose logits are computed in one step."""
        return max(1, min(self.chunk, _LOGITS_BYTES // (4 * self.vocab_size)))

    def _checked(self, tokens: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Return `tokens` as int64 [T], checked as `prefill` documents."""
        return self._fitting(tokens, self._position)


def _require_cached(length: int, cached: int) -> None:
    if not 0 <= length <= cached:
        raise GenerationError(f"cannot keep {length} cached tokens: give 0 to {cached}, the number that is cached")


def checked_tokens(tokens: Sequence[int] | NDArray[np.int64], vocab_size: int) -> NDArray[np.int64]:
    """Return `tokens` as int64 [T].

    Raises:
        GenerationError: there is none, or an id is not an integer or outside the vocabulary.
    """
    ids = whole_numbers(tokens, "the tokens")
    if ids.size == 0:
        raise GenerationError("no tokens to append: give at least one token id")
    outside = (ids < 0) | (ids >= vocab_size)
    if outside.any():
        index = int(outside.argmax())
        raise GenerationError(
            f"token id {ids[index]} (number {index} of {ids.size}) is outside the vocabulary 0..{vocab_size - 1}: "
            "was it made by another model's tokenizer?"
        )
    return ids


def whole_numbers(tokens: object, what: str) -> NDArray[np.int64]:
    """Return token ids as int64 [T]. Nothing is rounded, truncated or wrapped around.

    Raises:
        GenerationTypeError: `tokens` is not a list of integers; the message begins with `what`.
        GenerationError: a number does not fit into 64 bits.
    """
    wanted = "give text, or a list of integer token ids"
    if isinstance(tokens, (str, bytes, bytearray, Mapping, Set)) or not isinstance(tokens, (Iterable, np.ndarray)):
        raise GenerationTypeError(f"{what}: {tokens!r:.60} cannot be used: {wanted}")
    if not hasattr(tokens, "dtype"):
        tokens = list(tokens)
        for index, token in enumerate(tokens):
            if not is_integer(token):
                raise GenerationTypeError(f"{what}: number {index} is {token!r:.60}: {wanted}")
            if not -(2**63) <= token < 2**63:
                raise GenerationError(f"{what}: number {index} is beyond any vocabulary: {wanted}")
    try:
        ids = np.asarray(tokens) if hasattr(tokens, "dtype") else np.asarray(tokens, np.int64)
    except (TypeError, ValueError, RuntimeError) as error:  # such as a tensor on a GPU
        raise GenerationTypeError(f"{what} cannot be used ({error}): {wanted}") from error
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise GenerationTypeError(f"{what}: an array of {ids.dtype} with shape {ids.shape}: {wanted}")
    if ids.dtype == np.uint64 and ids.size and int(ids.max()) >= 2**63:
        raise GenerationError(f"{what}: {int(ids.max())} is beyond any vocabulary: {wanted}")
    return ids.astype(np.int64, copy=False)


def interruptible(work: Callable[[], Result], cancel: Callable[[], None]) -> Result:
    """Run `work`, a long call into native code, so that Ctrl-C takes effect at once and not after the call.

    Python handles signals only in the main thread, and not before a native call returns. So `work` runs in another
    thread while the main thread waits; on an interruption it calls `cancel` and waits until `work` has returned. If
    this is not the main thread, `work` just runs.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="edgelm") as pool:
        running = pool.submit(work)
        try:
            while True:
                with contextlib.suppress(NotYet):
                    # The timeout is for Windows, where a wait without one cannot be interrupted.
                    return running.result(timeout=0.25)
        except BaseException as error:
            cancel()
            later = _outlast(running)
            if later is not None:
                raise later from error
            raise


def _outlast(running: Future[Result]) -> BaseException | None:
    """Wait for cancelled work to end, so that the next call does not run beside it. Return the last interruption.

    This does not leave the waiting to the pool: Python 3.11 counts a thread as ended if its `join` is interrupted.
    """
    interruption: BaseException | None = None
    while not running.done():
        try:
            wait([running])
        except BaseException as error:
            interruption = error
    return interruption


def context_full(asked: int, position: int, context_length: int, model_context_length: int) -> ContextLengthError:
    """Return the error that says how many tokens were given and how many fit."""
    used = f", {position} are taken" if position else ""
    larger = (
        f" or load with a larger context_length (the model's limit is {model_context_length})"
        if context_length < model_context_length
        else f": {model_context_length} is the model's own limit"
    )
    return ContextLengthError(
        f"{asked} tokens do not fit: the context holds {context_length}{used}, so {context_length - position} fit. "
        f"Shorten the text{larger}"
    )


def choose_context_length(asked: int | None, model_context_length: int) -> int:
    """Return the context length to allocate: `asked`, by default the model's but at most 4096.

    Raises:
        ContextLengthError: `asked` is not between 1 and the model's limit.
    """
    if asked is None:
        return min(model_context_length, DEFAULT_CONTEXT_LENGTH)
    if not is_integer(asked) or not 1 <= asked <= model_context_length:
        raise ContextLengthError(
            f"context_length is {asked!r:.60}: give 1 to {model_context_length}, the model's limit"
        )
    return asked


def model_sizes(bundle: Bundle, context_length: int | None) -> dict[str, int]:
    """Return `LoadedModel`'s arguments for a bundle and a context length. Raises as `choose_context_length`."""
    model = bundle.manifest.model
    return {
        "vocab_size": model.vocab_size,
        "context_length": choose_context_length(context_length, model.context_length),
        "model_context_length": model.context_length,
    }
