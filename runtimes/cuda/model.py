"""The runtime `cuda-kernels`: a bundle's program with its own kernels, through the driver alone.

Needs a driver and numpy: neither CUDA's toolkit, TensorRT nor ONNX Runtime. The runtime `cuda-emulated`, in
`emulated_model`, is the same with the kernels emulated on the processor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import EdgeLMError, GenerationError
from edgelm.runtimes.base import Runtime, SequenceBatch, checked_tokens, choose_context_length, context_full
from edgelm.runtimes.cuda.executor import Executor, Sizes
from edgelm.runtimes.cuda.loading import LoadedProgram, Opener, gpu
from edgelm.runtimes.tracing import TracingModel

if TYPE_CHECKING:
    from edgelm.bundle import Bundle

DEFAULT_CHUNK = 2048
"""Tokens of a prefill step: of 64 experts of which 8 act each then has 256, enough for tensor cores."""
_LOGITS_BYTES = 64 << 20


def open(bundle: Bundle, **options: Any) -> CudaRuntime:  # noqa: A001 - the name the registry calls
    """Load the bundle's program; the options are those of `CudaRuntime`."""
    return CudaRuntime(bundle, **options)


def open_batch(bundle: Bundle, batch: int, **options: Any) -> CudaBatch:
    """Load the bundle's program for several sequences; the options are those of `CudaBatch`."""
    return CudaBatch(bundle, batch, **options)


def open_tracing(bundle: Bundle, *, threads: int | None = None) -> CudaTracing:
    """Load the bundle's debug program."""
    return CudaTracing(bundle, threads=threads)


class CudaRuntime(Runtime):
    """A bundle's program on a GPU.

    Args:
        bundle: exported for `tensorrt`.
        threads: of no use here; taken because all runtimes take it.
        context_length: positions to allocate.
        chunk: tokens of a prefill step at most.
        kv: the cache's type; default the bundle's.
        opener: how a device is had.

    Raises:
        RuntimeUnavailableError, DeviceError: there is no GPU, or none that the bundle has kernels for.
        DeviceMemoryError: it does not fit, with what is needed and what there is.
        BundleError: a file is damaged.
    """

    name = "cuda-kernels"

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        context_length: int | None = None,
        chunk: int = DEFAULT_CHUNK,
        kv: str | None = None,
        opener: Opener = gpu,
    ) -> None:
        del threads
        model = bundle.manifest.model
        if chunk < 1:
            raise EdgeLMError(f"chunk is {chunk}: give 1 or more tokens a prefill step")
        length = choose_context_length(context_length, model.context_length)
        super().__init__(
            vocab_size=model.vocab_size, context_length=length, model_context_length=model.context_length, threads=1
        )
        self._bundle = bundle
        self.kv = kv or bundle.manifest.graph.kv_dtype
        self.chunk = min(chunk, length)
        # All positions' logits of one step, where they are asked for.
        self._block = max(1, min(self.chunk, _LOGITS_BYTES // (4 * self.vocab_size)))
        sizes = Sizes(batch=1, capacity=length, tokens=self.chunk, logits=self._block, kv=self.kv)
        self._loaded: LoadedProgram | None = LoadedProgram(bundle, opener, sizes)
        self._logits: NDArray[np.float32] = np.empty((1, self.vocab_size), np.float32)
        self._token = np.empty(1, np.int32)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache."""
        return self._executor.layout.plan.caches

    @property
    def device_bytes(self) -> int:
        """Bytes of the device's memory that this model takes: weights, cache, values and workspace."""
        self._require_open()
        assert self._loaded is not None
        return self._loaded.device_bytes

    @property
    def _executor(self) -> Executor:
        self._require_open()
        assert self._loaded is not None
        return self._loaded.executor

    def prefill(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Append tokens, `chunk` at a time; the logits after the last are in a buffer that the next call overwrites."""
        ids = self._checked(tokens)
        for begin in range(0, ids.size, self.chunk):
            part = ids[begin : begin + self.chunk]
            self._executor.run(part[None, :], [self._position])
            self._position += part.size
        self._executor.logits(self._logits)
        last: NDArray[np.float32] = self._logits[0]
        return last

    def decode(self, token: int) -> NDArray[np.float32]:
        """Append one token."""
        ids = self._checked([token])
        self._executor.run(ids[None, :], [self._position], graph=True)
        self._position += 1
        self._executor.logits(self._logits)
        last: NDArray[np.float32] = self._logits[0]
        return last

    def decode_greedy(self, token: int) -> int:
        """Append one token; the most probable one after it is found on the device, and four bytes are copied."""
        ids = self._checked([token])
        self._executor.run(ids[None, :], [self._position], graph=True, greedy=True)
        self._position += 1
        self._executor.chosen(self._token)
        found = int(self._token[0])
        if found < 0:
            raise GenerationError("every logit is NaN: the weights are damaged, or the values left their type's range")
        return found

    def logits_all(self, tokens: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        """Append tokens; yield logits in blocks of at most 64 MiB, valid until the next is asked for."""
        ids = self._checked(tokens)
        for begin in range(0, ids.size, self._block):
            part = self._checked(ids[begin : begin + self._block])
            self._executor.run(part[None, :], [self._position], all_positions=True)
            self._position += part.size
            logits = np.empty((part.size, self.vocab_size), np.float32)
            self._executor.logits(logits)
            yield logits

    def open_batch(self, batch: int, context_length: int) -> CudaBatch:
        """Caches for several sequences over this runtime's weights."""
        self._require_open()
        opened = CudaBatch(
            self._bundle, batch, context_length=context_length, chunk=self.chunk, kv=self.kv, loaded=self._loaded
        )
        opened.name = self.name
        return opened

    def device_bandwidth(self) -> float | None:
        """What a copy within the device reads and writes a second."""
        self._require_open()
        assert self._loaded is not None
        return self._loaded.device.copy_bandwidth()

    def close(self) -> None:
        """Free the device's memory."""
        self._closed = True
        if self._loaded is not None:
            self._loaded.close()
            self._loaded = None


class CudaBatch(SequenceBatch):
    """A bundle's program with the caches of `batch` sequences; the options are those of `CudaRuntime`.

    `loaded`: of a runtime whose weights this is to use; None loads them.
    """

    name = "cuda-kernels"

    def __init__(
        self,
        bundle: Bundle,
        batch: int,
        *,
        threads: int | None = None,
        context_length: int | None = None,
        chunk: int = DEFAULT_CHUNK,
        kv: str | None = None,
        opener: Opener = gpu,
        loaded: LoadedProgram | None = None,
    ) -> None:
        del threads
        model = bundle.manifest.model
        for name, value in (("batch", batch), ("chunk", chunk)):
            if value < 1:
                raise EdgeLMError(f"{name} is {value}: give 1 or more")
        self.batch = batch
        self.threads = 1
        self.vocab_size = model.vocab_size
        self.context_length = choose_context_length(context_length, model.context_length)
        self.model_context_length = model.context_length
        self.kv = kv or bundle.manifest.graph.kv_dtype
        self._chunk = min(chunk, self.context_length)
        self._lengths = np.zeros(batch, np.int64)
        sizes = Sizes(batch, self.context_length, tokens=max(self._chunk, batch), logits=batch, kv=self.kv)
        self._shares = loaded is not None
        self._loaded: LoadedProgram | None = LoadedProgram(bundle, opener, sizes) if loaded is None else loaded
        self._steps = self._loaded.executor if loaded is None else loaded.new_executor(sizes, ())
        self._logits: NDArray[np.float32] = np.empty((batch, self.vocab_size), np.float32)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """How many tokens of each sequence are cached, [batch]."""
        return self._lengths.copy()

    @property
    def cache_bytes(self) -> int:
        """Bytes of all caches."""
        return self._executor.layout.plan.caches

    @property
    def device_bytes(self) -> int:
        """Bytes of the device's memory that this model takes: weights, caches, values and workspace."""
        return self._open.weights.nbytes + self._executor.layout.nbytes

    @property
    def _open(self) -> LoadedProgram:
        if self._loaded is None:
            raise EdgeLMError("this batch was closed: load the bundle again")
        return self._loaded

    @property
    def _executor(self) -> Executor:
        assert self._open is self._loaded
        return self._steps

    def prefill(self, row: int, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Append tokens to one sequence, `chunk` at a time."""
        self._require_row(row)
        ids = checked_tokens(tokens, self.vocab_size)
        self._require_room(row, ids.size)
        for begin in range(0, ids.size, self._chunk):
            part = ids[begin : begin + self._chunk]
            self._executor.run(part[None, :], self._lengths[row : row + 1], first=row)
            self._lengths[row] += part.size
        self._executor.logits(self._logits[:1])
        last: NDArray[np.float32] = self._logits[0]
        return last

    def decode_batch(self, tokens: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
        """Append one token to every sequence."""
        ids = checked_tokens(tokens, self.vocab_size)
        if ids.size != self.batch:
            raise GenerationError(f"{ids.size} tokens for {self.batch} sequences: give one to each")
        self._require_room(int(self._lengths.argmax()), 1)
        self._executor.run(ids[:, None], self._lengths, graph=True)
        self._lengths += 1
        self._executor.logits(self._logits)
        return self._logits

    def device_bandwidth(self) -> float | None:
        """What a copy within the device reads and writes a second."""
        return self._open.device.copy_bandwidth()

    def truncate(self, row: int, length: int) -> None:
        """Keep the first cached tokens of one sequence."""
        self._require_row(row)
        if not 0 <= length <= self._lengths[row]:
            raise GenerationError(f"cannot keep {length} cached tokens: {self._lengths[row]} are cached")
        self._lengths[row] = length

    def close(self) -> None:
        """Free the device's memory."""
        if self._loaded is not None:
            if self._shares:
                self._steps.free()
            else:
                self._loaded.close()
            self._loaded = None

    def _require_row(self, row: int) -> None:
        if not 0 <= row < self.batch:
            raise GenerationError(f"there is no sequence {row}: there are 0..{self.batch - 1}")

    def _require_room(self, row: int, tokens: int) -> None:
        length = int(self._lengths[row])
        if length + tokens > self.context_length:
            raise context_full(tokens, length, self.context_length, self.model_context_length)


class CudaTracing(TracingModel):
    """A bundle's debug program, with exact products and a float32 cache."""

    def __init__(self, bundle: Bundle, *, threads: int | None = None, opener: Opener = gpu) -> None:
        del threads
        super().__init__(bundle)
        self._loaded: LoadedProgram | None = LoadedProgram(bundle, opener, debug=True)

    def _run(self, ids: NDArray[np.int64], names: Sequence[str], *, logits: bool) -> list[NDArray[np.float32]]:
        if self._loaded is None:
            raise EdgeLMError("this tracing runtime was closed: load the bundle again")
        batch, tokens = ids.shape
        sizes = Sizes(batch, tokens, tokens=ids.size, logits=ids.size if logits else batch, kv="float32")
        executor = self._loaded.new_executor(sizes, names)
        try:
            executor.run(ids, [0] * batch, all_positions=logits)
            return [executor.value(name, batch if name == "logits" and not logits else ids.size) for name in names]
        finally:
            executor.free()

    def close(self) -> None:
        """Free the device's memory."""
        if self._loaded is not None:
            self._loaded.close()
            self._loaded = None
