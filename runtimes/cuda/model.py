"""The runtime `cuda-kernels`: a bundle's program with its own kernels, through the driver alone.

Needs a driver and numpy: neither CUDA's toolkit, TensorRT nor ONNX Runtime. The runtime `cuda-emulated` is the same
with the kernels emulated on the CPU, for checks where there is no GPU: the sources, launches and arithmetic are those
of a GPU, the speed is not. It needs a C++ compiler.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import GenerationError
from edgelm.runtimes.base import Runtime, SequenceBatch, model_sizes
from edgelm.runtimes.cuda.executor import Executor, Sizes
from edgelm.runtimes.cuda.loading import LoadedProgram, open_emulator, open_gpu
from edgelm.runtimes.tracing import TracingModel

if TYPE_CHECKING:
    from edgelm.bundle import Bundle

DEFAULT_CHUNK = 2048
"""Tokens of a prefill step: of 64 experts of which 8 act each then has 256, enough for tensor cores."""


class CudaBatch(SequenceBatch):
    """A bundle's program with the caches of `batch` sequences; the options are those of `CudaRuntime`.

    `loaded`: of a runtime whose weights this is to use; None loads them.
    """

    name = "cuda-kernels"
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
        sizes = Sizes(batch, self.context_length, tokens=max(self.chunk, batch), logits=batch, kv=self.kv)
        self._shares = loaded is not None
        self._loaded = loaded or LoadedProgram(bundle, self.open_device, sizes)
        self._executor = self._loaded.executor if loaded is None else loaded.new_executor(sizes, ())
        self._logits: NDArray[np.float32] = np.empty((batch, self.vocab_size), np.float32)

    @property
    def cache_bytes(self) -> int:
        """Bytes of all caches."""
        return self._executor.layout.plan.caches

    def device_bandwidth(self) -> float | None:
        """What a copy within the device reads and writes a second."""
        self._require_open()
        return self._loaded.device.copy_bandwidth()

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


class CudaTracing(TracingModel):
    """A bundle's debug program, with exact products and a float32 cache."""

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


class CudaRuntime(Runtime):
    """A bundle's program on a GPU.

    Args:
        bundle: exported for `tensorrt`.
        threads: of no use here; taken because all runtimes take it.
        context_length: positions to allocate.
        chunk: tokens of a prefill step at most.
        kv: the cache's type; default the bundle's.

    Raises:
        RuntimeUnavailableError, DeviceError: there is no GPU, or none that the bundle has kernels for.
        DeviceMemoryError: it does not fit, with what is needed and what there is.
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
        # All positions' logits of one step, where they are asked for.
        sizes = Sizes(batch=1, capacity=self.context_length, tokens=self.chunk, logits=self._block, kv=self.kv)
        self._loaded = LoadedProgram(bundle, self.open_device, sizes)
        self._executor: Executor = self._loaded.executor
        self._logits: NDArray[np.float32] = np.empty((1, self.vocab_size), np.float32)
        self._token = np.empty(1, np.int32)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache."""
        return self._executor.layout.plan.caches

    def decode(self, token: int) -> NDArray[np.float32]:
        """Append one token."""
        self._append(token)
        self._executor.logits(self._logits)
        logits: NDArray[np.float32] = self._logits[0]
        return logits

    def decode_greedy(self, token: int) -> int:
        """Append one token; the most probable one after it is found on the device, and four bytes are copied."""
        self._append(token, greedy=True)
        self._executor.chosen(self._token)
        found = int(self._token[0])
        if found < 0:
            raise GenerationError("every logit is NaN: the weights are damaged, or the values left their type's range")
        return found

    def open_batch(self, batch: int, context_length: int) -> SequenceBatch:
        """Caches for several sequences over this runtime's weights."""
        self._require_open()
        return self.batch_class(
            self._bundle, batch, context_length=context_length, chunk=self.chunk, kv=self.kv, loaded=self._loaded
        )

    def device_bandwidth(self) -> float | None:
        """What a copy within the device reads and writes a second."""
        self._require_open()
        return self._loaded.device.copy_bandwidth()

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
    """`CudaBatch` in emulation."""

    name = "cuda-emulated"
    open_device = staticmethod(open_emulator)


class EmulatedTracing(CudaTracing):
    """`CudaTracing` in emulation."""

    open_device = staticmethod(open_emulator)


class EmulatedRuntime(CudaRuntime):
    """`CudaRuntime` in emulation."""

    name = "cuda-emulated"
    batch_class = EmulatedBatch
    tracing_class = EmulatedTracing
    open_device = staticmethod(open_emulator)
