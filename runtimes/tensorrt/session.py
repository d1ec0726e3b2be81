"""A bundle's engine with its buffers on the device: prefill of one sequence, decoding of all.

The caches are bound once per profile and updated in place. Decoding is captured as a CUDA graph after its first step.
The graph copies ids and lengths in from pinned memory and logits out to it, so a step costs the host a single call.
Prefill is not captured, since its shapes vary.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgelm.bundle.gpu_layout import aligned
from edgelm.errors import EdgeLMError
from edgelm.runtimes.base import choose_context_length
from edgelm.runtimes.cuda.driver import CudaDevice
from edgelm.runtimes.cuda.executor import CAPACITY_MULTIPLE
from edgelm.runtimes.cuda.kernels.images import FOLDER, KernelFolder
from edgelm.runtimes.tensorrt.engine import DECODE, PREFILL, Context, Engine, Tensor, choose
from edgelm.runtimes.tensorrt.engine_info import EngineInfo, engines
from edgelm.runtimes.tensorrt.library import installed, load
from edgelm.runtimes.tensorrt.plugins import PluginLibrary

if TYPE_CHECKING:
    from edgelm.bundle import Bundle

IDS, LENGTHS, LOGITS = "input_ids", "past_lengths", "logits"
PAST, PRESENT = "past_key_values.", "present."


class Session:
    """The loaded engine that is compatible with this device.

    Args:
        bundle: the bundle, with engines; see `engine_info.engines`.
        batch: number of sequences.
        context_length: positions of each sequence; default the model's, at most 4096.
        chunk: tokens per prefill step, at most the engine's.
        kv: type of the KV cache; may only name the engine's.
        weight_memory: bytes of weights that may be in the GPU's memory; default all.

    Raises:
        RuntimeUnavailableError: TensorRT is not installed, or no engine is compatible.
        DeviceError: there is no GPU or driver, or the driver is too old.
        DeviceMemoryError: the GPU has not enough memory.
        EdgeLMError: the engine was not built for an option.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        batch: int,
        context_length: int | None,
        chunk: int | None,
        kv: str | None,
        weight_memory: int | None,
    ) -> None:
        model = bundle.manifest.model
        found = engines(bundle)
        self.device = CudaDevice(KernelFolder(bundle.file(FOLDER)))
        try:
            info = choose(found, self.device.info, installed(), bundle.path)
            check_options(info, batch=batch, chunk=chunk, kv=kv)
            self.info = info
            self.vocab_size = model.vocab_size
            self.batch = batch
            most = min(model.context_length, info.context_length)
            self.context_length = choose_context_length(context_length, most)
            self.sizes = {
                "vocab_size": model.vocab_size,
                "context_length": self.context_length,
                "model_context_length": most,
            }
            """Arguments of `edgelm.runtimes.base.LoadedModel`."""
            self.chunk = min(chunk or info.chunk, info.chunk, self.context_length)
            library = load(info.edition)
            plugins = PluginLibrary(bundle.file(info.library))
            self._engine = Engine(library, info, bundle.file(info.file), plugins, weight_memory)
            self.capacity = self._capacity()
            self._caches = self._allocate(model.num_kv_heads)
            self._contexts = self._make_contexts()
        except BaseException:
            self.device.close()
            raise
        self._graph: Callable[[], None] | None = None
        self._decoded = False
        self._row = -1

    def _capacity(self) -> int:
        """Return the positions of a cache: fixed by the engine for its own attention, otherwise rounded for our
        kernels."""
        fixed = {self._engine.input_shape(tensor.name)[2] for tensor in self._engine.tensors if _is_cache(tensor)}
        (size,) = fixed
        if size > 0:
            return size
        return min(aligned(self.context_length, CAPACITY_MULTIPLE), self.info.context_length)

    # -- buffers -------------------------------------------------------------------------------------------------------

    def _allocate(self, kv_heads: int) -> dict[str, tuple[int, int]]:
        """Allocate all buffers. Return each cache's address and its bytes per sequence."""
        device = self.device
        caches = {}
        for tensor in self._engine.tensors:
            if _is_cache(tensor):
                shape = self._engine.input_shape(tensor.name)
                size = kv_heads * self.capacity * shape[3] * tensor.element_bytes
                address = device.allocate(self.batch * size)
                device.fill(address, 0, self.batch * size)
                caches[tensor.name] = (address, size)
        steps = max(self.batch, self.chunk)
        self._ids, self._device_lengths = device.allocate(4 * steps), device.allocate(4 * self.batch)
        self._logits = device.allocate(4 * self.batch * self.vocab_size)
        self._pinned_ids = device.pinned(4 * steps).view(np.int32)
        self._pinned_lengths = device.pinned(4 * self.batch).view(np.int32)
        self._pinned_logits = (
            device.pinned(4 * self.batch * self.vocab_size).view(np.float32).reshape(self.batch, self.vocab_size)
        )
        return caches

    def _make_contexts(self) -> list[Context]:
        scratch_bytes = self._engine.activation_bytes()
        scratch = self.device.allocate(scratch_bytes) if scratch_bytes else 0
        cache = compiled_cache(self.info, self._engine.path, self.device.info.name)
        stream = self.device.stream
        contexts = [
            self._engine.context(profile, stream, scratch, scratch_bytes, cache) for profile in (DECODE, PREFILL)
        ]
        self._bind(contexts[DECODE], 0, self.batch)
        self.device.synchronize()
        return contexts

    def _bind(self, context: Context, row: int, rows: int) -> None:
        """Bind the caches of sequences `row` to `row + rows` to a context."""
        for tensor in self._engine.tensors:
            if tensor.name in self._caches:
                address, size = self._caches[tensor.name]
                shape = self._engine.input_shape(tensor.name)
                context.bind(tensor.name, address + row * size, (rows, shape[1], self.capacity, shape[3]))
        context.bind(LENGTHS, self._device_lengths + 4 * row, (rows,))
        context.bind(IDS, self._ids, (rows, 1))
        for tensor in self._engine.tensors:
            if tensor.is_input:
                continue
            if tensor.name.startswith(PRESENT):
                name = PAST + tensor.name.removeprefix(PRESENT)
                address, size = self._caches[name]
                context.bind(tensor.name, address + row * size)
            elif tensor.name == LOGITS:
                context.bind(LOGITS, self._logits + 4 * row * self.vocab_size)
            else:
                raise EdgeLMError(
                    f"{self._engine.path} has an unknown output {tensor.name}: upgrade edgelm or build the engine again"
                )

    # -- steps ---------------------------------------------------------------------------------------------------------

    def prefill(self, row: int, ids: NDArray[np.int64], lengths: NDArray[np.int64] | int) -> NDArray[np.float32]:
        """Run ids [T], at most `chunk`, on a sequence; return the logits [vocabulary] after the last, in a buffer.

        `lengths`: cached tokens of each sequence. The caller checks that the ids fit, and updates the lengths.
        """
        context = self._contexts[PREFILL]
        if row != self._row:
            self._bind(context, row, 1)
            self._row = row
        device = self.device
        self._pinned_lengths[:] = lengths
        self._pinned_ids[: len(ids)] = ids
        self._start_upload(len(ids))
        context.bind(IDS, self._ids, (1, len(ids)))
        context.run(device.stream)
        logits: NDArray[np.float32] = self._pinned_logits[row]
        device.start_download(logits, self._logits + 4 * row * self.vocab_size)
        # The pinned buffers are reused for the next chunk.
        device.synchronize()
        return logits

    def decode(self, ids: NDArray[np.int64], lengths: NDArray[np.int64] | int) -> NDArray[np.float32]:
        """Run one id per sequence; return the logits [batch, vocabulary], in a buffer. `lengths` as in `prefill`."""
        self._pinned_lengths[:] = lengths
        self._pinned_ids[: self.batch] = ids
        if self._graph is not None:
            self._graph()
        else:
            self._step()
            self.device.synchronize()
            # TensorRT compiles and initialises in the first run. It may not be capturable, e.g. when weights are
            # streamed.
            if not self._decoded and self._contexts[DECODE].capturable(self.device.stream):
                self._graph = self.device.capture(self._step)
            if not self._decoded:
                self._contexts[DECODE].keep_compiled()
            self._decoded = True
        self.device.synchronize()
        return self._pinned_logits

    def _step(self) -> None:
        self._start_upload(self.batch)
        self._contexts[DECODE].run(self.device.stream)
        self.device.start_download(self._pinned_logits, self._logits)

    def _start_upload(self, ids: int) -> None:
        self.device.start_upload(self._device_lengths, self._pinned_lengths)
        self.device.start_upload(self._ids, self._pinned_ids[:ids])

    @property
    def captured(self) -> bool:
        """Whether decoding has been captured as a CUDA graph."""
        return self._graph is not None

    def close(self) -> None:
        """Free all memory on the device."""
        for context in self._contexts:
            context.close()
        self._engine.close()
        self.device.close()


def _is_cache(tensor: Tensor) -> bool:
    return tensor.name.startswith(PAST)


def check_options(info: EngineInfo, *, batch: int, chunk: int | None, kv: str | None) -> None:
    """Check that an engine was built for these options.

    Raises:
        EdgeLMError: it was not; the message says what it was built for.
    """
    if batch > info.max_batch:
        raise EdgeLMError(
            f"batch is {batch}, and {info.file} was built for at most {info.max_batch}: build it again with "
            f"--max-batch {batch}"
        )
    if batch < 1 or (chunk is not None and chunk < 1):
        raise EdgeLMError(f"batch is {batch} and chunk {chunk}: give 1 or more")
    if kv not in (None, info.kv):
        raise EdgeLMError(
            f'{info.file} was built for a cache of {info.kv}: leave kv out, export with kv = "{kv}" in the recipe, or '
            "use the runtime cuda-kernels"
        )


def compiled_cache(info: EngineInfo, engine: Path, device: str) -> Path:
    """Return the file, in the user's cache folder, for the kernels that TensorRT-RTX compiles for an engine and
    device."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    stat = engine.stat()
    key = hashlib.sha256(
        f"{engine.absolute()}|{stat.st_size}|{stat.st_mtime_ns}|{info.version}|{device}".encode()
    ).hexdigest()
    return Path(root) / "edgelm" / "tensorrt" / f"{key[:24]}.cache"
