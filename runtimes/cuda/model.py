"""The runtime `cuda-kernels`: runs a bundle's program with its own kernels, through the driver alone.

It needs a driver and numpy, but not the CUDA toolkit, TensorRT or ONNX Runtime. The runtime `cuda-emulated` is the same
with the kernels emulated on the CPU, for checks without a GPU: sources, launches and arithmetic are those of a GPU, the
speed is not. It needs a C++ compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import GenerationError
from edgelm.generation.sampling import Sampler
from edgelm.runtimes.base import SequenceBatch, model_sizes
from edgelm.runtimes.cuda.executor import Executor, Sizes
from edgelm.runtimes.cuda.loading import LoadedProgram, open_emulator, open_gpu
from edgelm.runtimes.cuda.sampling import SampledDecoding
from edgelm.runtimes.savable import SavableRuntime
from edgelm.runtimes.tracing import TracingModel

if TYPE_CHECKING:
    from edgelm.bundle import Bundle

DEFAULT_CHUNK = 2048
"""Tokens per prefill step. With 8 of 64 experts per token, each expert has 256 tokens on average, enough for tensor
cores."""


class CudaBatch(SequenceBatch):
    """A bundle's program with caches for `batch` sequences. Options as in `CudaRuntime`.

    `loaded`: the loaded program of a runtime, whose weights are shared; None: load them.
    """

    name = "cuda-kernels"
    block_tokens = 1
    open_device = staticmethod(open_gpu)

    def __init__(
        self,
        bundle: Bundle,
        batch: int,
        *,
        threads: int | None = None,
        context_length: int | None = None,
        chunk: int = DEFAULT_CHUNK,
        kv: str | None = None,
        loaded: LoadedProgram | None = None,
    ) -> None:
        del threads
        super().__init__(batch, threads=1, chunk=chunk, **model_sizes(bundle, context_length))
        self.kv = kv or bundle.manifest.graph.kv_dtype
        tokens = max(self.chunk, batch)
        sizes = Sizes(batch, self.context_length, tokens=tokens, logits=batch, kv=self.kv, samples=True)
        self._shares = loaded is not None
        self._loaded = loaded or LoadedProgram(bundle, self.open_device, sizes)
        self._executor = self._loaded.executor if loaded is None else loaded.new_executor(sizes, ())
        self._sampled = _sampled(self._executor)
        self._logits: NDArray[np.float32] = np.empty((batch, self.vocab_size), np.float32)

    @property
    def cache_bytes(self) -> int:
        """Bytes of all KV caches."""
        return self._executor.layout.plan.caches

    def device_bandwidth(self) -> float | None:
        """Measure the bytes per second that a copy within the device reads and writes."""
        self._require_open()
        return self._loaded.device.copy_bandwidth()

    def copied_bytes(self, tokens: int) -> int:
        """Return the number of bytes of the cache of `tokens` tokens."""
        return sum(nbytes for _, nbytes in self._executor.cache_parts(tokens))

    def _read_cache(self, row: int, begin: int, end: int) -> NDArray[np.uint8]:
        data, at = np.empty(self.copied_bytes(end - begin), np.uint8), 0
        for address, nbytes in self._executor.cache_parts(end - begin, row=row, begin=begin):
            self._loaded.device.download(address, data[at : at + nbytes])
            at += nbytes
        return data

    def _write_cache(self, row: int, begin: int, end: int, data: NDArray[np.uint8]) -> None:
        at = 0
        for address, nbytes in self._executor.cache_parts(end - begin, row=row, begin=begin):
            self._loaded.device.upload(address, data[at : at + nbytes])
            at += nbytes
        self._loaded.device.wait()

    def decode_sampled(
        self, tokens: Sequence[int] | NDArray[np.int64], samplers: Sequence[Sampler | None]
    ) -> list[int]:
        """Append one token to every sequence; return the next ones. The logits stay on the device."""
        if self._sampled is None:
            return super().decode_sampled(tokens, samplers)
        self._sampled.run(self._one_each(tokens), self._lengths, samplers)
        self._lengths += 1
        return self._sampled.choose(samplers)

    def _prefill(self, row: int, ids: NDArray[np.int64], *, last: bool) -> NDArray[np.float32]:
        self._executor.run(ids[None, :], self._lengths[row : row + 1], first=row)
        if last:
            self._executor.logits(self._logits[:1])
        logits: NDArray[np.float32] = self._logits[0]
        return logits

    def _decode(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        self._executor.run(ids[:, None], self._lengths, graph=True)
        self._executor.logits(self._logits)
        return self._logits

    def _free(self) -> None:
        if self._shares:
            self._executor.free()
        else:
            self._loaded.close()


def _sampled(executor: Executor) -> SampledDecoding | None:
    return SampledDecoding(executor) if executor.layout.sampling is not None else None


class CudaTracing(TracingModel):
    """A bundle's debug program, with exact matmuls and a float32 cache."""

    open_device = staticmethod(open_gpu)

    def __init__(self, bundle: Bundle, *, threads: int | None = None) -> None:
        del threads
        super().__init__(bundle)
        self._loaded = LoadedProgram(bundle, self.open_device, debug=True)

    def _run(self, ids: NDArray[np.int64], names: Sequence[str], *, logits: bool) -> list[NDArray[np.float32]]:
        batch, tokens = ids.shape
        sizes = Sizes(batch, tokens, tokens=ids.size, logits=ids.size if logits else batch, kv="float32")
        executor = self._loaded.new_executor(sizes, names)
        try:
            executor.run(ids, [0] * batch, all_positions=logits)
            return [executor.value(name, batch if name == "logits" and not logits else ids.size) for name in names]
        finally:
            executor.free()

    def _free(self) -> None:
        self._loaded.close()


class CudaRuntime(SavableRuntime):
    """A bundle's program on a GPU.

    Args:
        bundle: exported for `tensorrt`.
        threads: not used; accepted because all runtimes have it.
        context_length: positions to allocate.
        chunk: the largest number of tokens per prefill step.
        kv: type of the KV cache; default the bundle's.

    Raises:
        RuntimeUnavailableError, DeviceError: there is no GPU that the bundle has kernels for.
        DeviceMemoryError: there is not enough memory; the message says how much is needed and free.
        BundleError: a file is damaged.
    """

    name = "cuda-kernels"
    batch_class = CudaBatch
    tracing_class = CudaTracing
    open_device = staticmethod(open_gpu)

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        context_length: int | None = None,
        chunk: int = DEFAULT_CHUNK,
        kv: str | None = None,
    ) -> None:
        del threads
        super().__init__(threads=1, chunk=chunk, **model_sizes(bundle, context_length))
        self._bundle = bundle
        self.kv = kv or bundle.manifest.graph.kv_dtype
        # Memory for the logits of all positions of a step, for `logits_all`.
        sizes = Sizes(1, self.context_length, tokens=self.chunk, logits=self._block, kv=self.kv, samples=True)
        self._loaded = LoadedProgram(bundle, self.open_device, sizes)
        self._executor: Executor = self._loaded.executor
        self._sampled = _sampled(self._executor)
        self._logits: NDArray[np.float32] = np.empty((1, self.vocab_size), np.float32)
        self._token = np.empty(1, np.int32)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the KV cache."""
        return self._executor.layout.plan.caches

    def decode(self, token: int) -> NDArray[np.float32]:
        """Append one token."""
        self._append(token)
        self._executor.logits(self._logits)
        logits: NDArray[np.float32] = self._logits[0]
        return logits

    def decode_greedy(self, token: int) -> int:
        """Append one token; return the argmax after it, computed on the device, so that four bytes are copied."""
        self._append(token, greedy=True)
        self._executor.chosen(self._token)
        found = int(self._token[0])
        if found < 0:
            raise GenerationError("every logit is NaN, as of damaged weights or values too large: run edgelm parity")
        return found

    def decode_sampled(self, token: int, sampler: Sampler) -> int:
        """Append one token; return the next one. The logits stay on the device."""
        if self._sampled is None or sampler.options.plain:
            return super().decode_sampled(token, sampler)
        self._sampled.run(self._checked([token]), [self._position], [sampler])
        self._position += 1
        (found,) = self._sampled.choose([sampler])
        return found

    def open_batch(self, batch: int, context_length: int) -> SequenceBatch:
        """Return caches for several sequences that share this runtime's weights."""
        self._require_open()
        return self.batch_class(
            self._bundle, batch, context_length=context_length, chunk=self.chunk, kv=self.kv, loaded=self._loaded
        )

    def device_bandwidth(self) -> float | None:
        """Measure the bytes per second that a copy within the device reads and writes."""
        self._require_open()
        return self._loaded.device.copy_bandwidth()

    def saved_bytes(self, length: int) -> int:
        """Return the number of bytes of the cache of `length` tokens."""
        return sum(nbytes for _, nbytes in self._executor.cache_parts(length))

    def _saved(self, length: int) -> Iterator[NDArray[np.uint8]]:
        for address, nbytes in self._executor.cache_parts(length):
            part = np.empty(nbytes, np.uint8)
            self._loaded.device.download(address, part)
            yield part

    def _load(self, length: int, read: Callable[[int], NDArray[np.uint8]]) -> None:
        for address, nbytes in self._executor.cache_parts(length):
            self._loaded.device.upload(address, read(nbytes))
        self._loaded.device.wait()

    def _append(self, token: int, *, greedy: bool = False) -> None:
        ids = self._checked([token])
        self._executor.run(ids[None, :], [self._position], graph=True, greedy=greedy)
        self._position += 1

    def _prefill(self, ids: NDArray[np.int64], *, last: bool) -> NDArray[np.float32]:
        self._executor.run(ids[None, :], [self._position])
        if last:
            self._executor.logits(self._logits)
        logits: NDArray[np.float32] = self._logits[0]
        return logits

    def _prefill_all(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        self._executor.run(ids[None, :], [self._position], all_positions=True)
        logits = np.empty((ids.size, self.vocab_size), np.float32)
        self._executor.logits(logits)
        return logits

    def _free(self) -> None:
        self._loaded.close()


class EmulatedBatch(CudaBatch):
    """`CudaBatch`, emulated on the CPU."""

    name = "cuda-emulated"
    open_device = staticmethod(open_emulator)


class EmulatedTracing(CudaTracing):
    """`CudaTracing`, emulated on the CPU."""

    open_device = staticmethod(open_emulator)


class EmulatedRuntime(CudaRuntime):
    """`CudaRuntime`, emulated on the CPU."""

    name = "cuda-emulated"
    batch_class = EmulatedBatch
    tracing_class = EmulatedTracing
    open_device = staticmethod(open_emulator)
