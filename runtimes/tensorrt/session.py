"""A bundle's engine with its buffers on the device: prefill of one sequence, decoding of all.

The caches are bound once for each profile and written in place. Decoding is captured in a CUDA graph after its first
step, which then starts with one call: ids and lengths are copied in from pinned memory and logits out to it within the
graph, so a step costs the host nothing but the call. Prefill is not captured, since its shapes vary.
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
from edgelm.runtimes.cuda.operators import Operators
from edgelm.runtimes.cuda.program import PROGRAM_FILE, Program
from edgelm.runtimes.tensorrt.engine import DECODE, PREFILL, Context, Engine, Tensor, choose
from edgelm.runtimes.tensorrt.engine_info import EngineInfo, engines, plugins_in
from edgelm.runtimes.tensorrt.host import DeviceHost, counter_bytes
from edgelm.runtimes.tensorrt.library import installed, load

if TYPE_CHECKING:
    from edgelm.bundle import Bundle

IDS, LENGTHS, LOGITS = "input_ids", "past_lengths", "logits"
PAST, PRESENT = "past_key_values.", "present."


class Session:
    """The engine that fits this device, loaded.

    Args:
        bundle: with engines, see `engine_info.engines`.
        batch: sequences that it holds caches for.
        context_length: positions of each; default the model's, at most 4096.
        chunk: tokens of a prefill step, at most the engine's.
        kv: type of the cache; the engine's, which has no other.
        weight_memory: bytes of weights that may lie in the GPU's memory; default all.

    Raises:
        RuntimeUnavailableError: no TensorRT, or no engine that fits.
        DeviceError: no GPU, no driver or an old one.
        DeviceMemoryError: the GPU has not enough memory.
        EdgeLMError: an option that the engine does not have.
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
        program = Program.read(bundle.file(PROGRAM_FILE))
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
            """For `edgelm.runtimes.base.LoadedModel`."""
            self.chunk = min(chunk or info.chunk, info.chunk, self.context_length)
            library = load(info.edition)
            self.device.load(Operators(program, info.kv, 0, self.device.info).kernels())
            self._host = DeviceHost(self.device)
            self._engine = Engine(library, info, bundle.file(info.file), self._host, weight_memory)
            self.capacity = self._capacity()
            specs = plugins_in(bundle.file(info.file))
            counters = counter_bytes(self.device.info, specs, batch, self.chunk, self.capacity)
            place = self.device.allocate(counters)
            self.device.fill(place, 0, counters)
            self._host.counters = place
            self._caches = self._allocate(model.num_kv_heads)
            self._contexts = self._make_contexts()
        except BaseException:
            self.device.close()
            raise
        self._graph: Callable[[], None] | None = None
        self._decoded = False
        self._row = -1

    def _capacity(self) -> int:
        """Positions of a cache: what the engine fixes, as its own attention does, else rounded for our kernels."""
        fixed = {self._engine.input_shape(tensor.name)[2] for tensor in self._engine.tensors if _is_cache(tensor)}
        (size,) = fixed
        if size > 0:
            return size
        return min(aligned(self.context_length, CAPACITY_MULTIPLE), self.info.context_length)

    # -- buffers -------------------------------------------------------------------------------------------------------

    def _allocate(self, kv_heads: int) -> dict[str, tuple[int, int]]:
        """Every cache's address and the bytes of one sequence in it; ids, lengths and logits beside."""
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
        """Give a context the caches of sequences `row` to `row + rows`."""
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
                raise EdgeLMError(f"{self._engine.path} has a result {tensor.name} that this EdgeLM does not know")

    # -- steps ---------------------------------------------------------------------------------------------------------

    def prefill(self, row: int, ids: NDArray[np.int64], lengths: NDArray[np.int64] | int) -> NDArray[np.float32]:
        """Run ids [T], at most `chunk`, on a sequence; the logits [vocabulary] after the last, in a buffer.

        `lengths`: how many tokens of each sequence are cached. The caller has checked that these fit, and counts them.
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
        # The pinned buffers are written again for the next chunk.
        device.synchronize()
        return logits

    def decode(self, ids: NDArray[np.int64], lengths: NDArray[np.int64] | int) -> NDArray[np.float32]:
        """Run one id of every sequence: the logits [batch, vocabulary], in a buffer; `lengths` as for `prefill`."""
        self._pinned_lengths[:] = lengths
        self._pinned_ids[: self.batch] = ids
        if self._graph is not None:
            self._graph()
        else:
            self._step()
            self.device.synchronize()
            # TensorRT compiles and sets itself up in the first run; it may refuse to be captured, as when weights are
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
        """Whether decoding is a CUDA graph by now."""
        return self._graph is not None

    def close(self) -> None:
        """Free everything on the device."""
        for context in self._contexts:
            context.close()
        self._engine.close()
        self._host.close()
        self.device.close()


def _is_cache(tensor: Tensor) -> bool:
    return tensor.name.startswith(PAST)


def check_options(info: EngineInfo, *, batch: int, chunk: int | None, kv: str | None) -> None:
    """Refuse what an engine was not built for.

    Raises:
        EdgeLMError: says what it was built for.
    """
    if batch > info.max_batch:
        raise EdgeLMError(
            f"{batch} sequences are more than {info.file} was built for, {info.max_batch}: build it again with "
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
    """Where TensorRT-RTX's compiled kernels of an engine are kept for a device: under the user's cache folder."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    stat = engine.stat()
    key = hashlib.sha256(
        f"{engine.absolute()}|{stat.st_size}|{stat.st_mtime_ns}|{info.version}|{device}".encode()
    ).hexdigest()
    return Path(root) / "edgelm" / "tensorrt" / f"{key[:24]}.cache"
