"""Runtime `onnxruntime-cuda`: bundles for CUDA with ONNX Runtime's own operators on an NVIDIA GPU.

The KV cache is on the GPU and bound as the graph's past and present. A decode step is captured once as a CUDA graph and
replayed for every token, so all its inputs have fixed addresses: the token id, and a mask as long as the cache, of
which the graph takes the sum. The mask's first element holds that sum and the others are zero, so 8 bytes set the
length.

In greedy decoding the loop stays on the GPU: a second small graph computes the argmax and writes token and length where
the next step reads them. Only the token is copied to the host. Sampling needs all logits and copies them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgelm.devices import return_free_memory
from edgelm.errors import BundleError, EdgeLMError
from edgelm.generation.sampling import require_finite
from edgelm.runtimes.base import DEFAULT_CHUNK, Runtime, interruptible, model_sizes
from edgelm.runtimes.onnxruntime.cuda_session import PROVIDER, cuda_session, device_error
from edgelm.runtimes.onnxruntime.router_probe import PROBE_FILE, check_router
from edgelm.runtimes.onnxruntime.session import (
    OnnxTracing,
    check_graph,
    first_line,
    import_onnxruntime,
    kv_names,
    ort_errors,
    require_stored_kv,
)

if TYPE_CHECKING:
    import onnxruntime  # type: ignore[import-untyped]  # it has no type information

    from edgelm.bundle import Bundle

GREEDY_FILE = "greedy.onnx"
LENGTH, NEXT_IDS, NEXT_LENGTH, ANSWER = "length", "next_ids", "next_length", "answer"
"""Names in the graph for greedy decoding; see `edgelm.export.onnxruntime.greedy_graph`."""
CAPTURE_VARIABLE = "EDGELM_CUDA_GRAPHS"
"""Environment variable: 0 launches every operator of every token in place of replaying a CUDA graph."""

# ONNX's numbers of the cache types; numpy has no bfloat16.
_ELEMENT = {"float16": 10, "bfloat16": 16}
_CAPTURED, _NOT_CAPTURED = "1", "-1"
_LENGTHS = "attention_mask"

Result = TypeVar("Result")


def _failure(error: Exception, doing: str) -> EdgeLMError:
    return device_error(error, doing) or EdgeLMError(
        f"onnxruntime failed when {doing}: {first_line(error)}; try {CAPTURE_VARIABLE}=0 (no CUDA graphs)"
    )


def _check_router(bundle: Bundle, threads: int) -> None:
    if PROBE_FILE not in bundle.manifest.files:
        raise BundleError(
            f"{bundle.path} lacks {PROBE_FILE}, which is needed to check its MoE routing: export it again"
        )
    session = cuda_session(bundle, PROBE_FILE, threads)
    try:
        check_router(session, PROVIDER)
    except ort_errors() as error:
        raise _failure(error, "checking how it routes") from error


def device_of(session: onnxruntime.InferenceSession) -> tuple[str, int]:
    """Return the device of a session's buffers, as ONNX Runtime names it."""
    return "cuda", int(session.get_provider_options()[PROVIDER]["device_id"])


Caches = list[tuple[str, str, Any]]
"""For each cache its names as input and output, and its buffer on the GPU."""


def device_caches(bundle: Bundle, batch: int, length: int, device: tuple[str, int]) -> Caches:
    """Allocate a cache for the keys and values of every layer, [batch, kv_heads, length, head_dim].

    Raises:
        BundleError: the bundle's cache type is not supported.
    """
    model, kind = bundle.manifest.model, bundle.manifest.graph.kv_dtype
    if kind not in _ELEMENT:
        raise BundleError(
            f"{bundle.path} has a {kind} cache, and bundles for CUDA support {', '.join(_ELEMENT)}: export it again"
        )
    make = import_onnxruntime().OrtValue.ortvalue_from_shape_and_type
    shape = (batch, model.num_kv_heads, length, model.head_dim)
    return [(past, present, make(shape, _ELEMENT[kind], *device)) for past, present in kv_names(model.num_layers)]


def bind_caches(binding: Any, caches: Caches) -> None:
    """Bind the caches as both inputs and outputs."""
    for past, present, cache in caches:
        binding.bind_ortvalue_input(past, cache)
        binding.bind_ortvalue_output(present, cache)


class OnnxCudaTracing(OnnxTracing):
    """A bundle's debug graph on the GPU. Its matmuls are those of the shipped graph, rounding included."""

    lengths = _LENGTHS

    def __init__(self, bundle: Bundle, *, threads: int | None = None) -> None:
        self._bundle = bundle
        super().__init__(bundle, threads=threads)

    def _load(self, bundle: Bundle, threads: int) -> onnxruntime.InferenceSession:
        return cuda_session(bundle, bundle.manifest.graph.debug_file, threads)

    def _empty_cache(self, batch: int, tokens: int) -> dict[str, NDArray[Any]]:
        return {_LENGTHS: np.ones((batch, tokens), np.int64)}

    def _compute(self, names: Sequence[str], feed: dict[str, NDArray[Any]]) -> list[NDArray[np.float32]]:
        session = self._session
        make = import_onnxruntime().OrtValue.ortvalue_from_numpy
        try:
            batch, tokens = feed["input_ids"].shape
            binding = session.io_binding()
            for name, value in feed.items():
                binding.bind_ortvalue_input(name, make(np.ascontiguousarray(value)))
            bind_caches(binding, device_caches(self._bundle, batch, tokens, device_of(session)))
            for name in names:
                binding.bind_output(name, "cpu")
            session.run_with_iobinding(binding)
            # Outputs are in the order in which they were bound, the caches first.
            return [np.asarray(value.numpy()) for value in binding.get_outputs()[-len(names) :]]
        except ort_errors() as error:
            raise _failure(error, "running the debug graph") from error


class OnnxCudaRuntime(Runtime):
    """A bundle's graph on a GPU, for one sequence. The cache type is that of the graph; `kv` may only name it.

    Raises:
        RuntimeUnavailableError: ONNX Runtime has no CUDA here, a node would run on the CPU, or the provider does not
            compute the model's MoE.
        DeviceError: there is no GPU, or it is too old, or it failed; DeviceMemoryError: not enough memory.
    """

    name = "onnxruntime-cuda"
    tracing_class = OnnxCudaTracing

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        context_length: int | None = None,
        chunk: int = DEFAULT_CHUNK,
        kv: str | None = None,
    ) -> None:
        require_stored_kv(bundle, kv)
        super().__init__(threads=threads, chunk=chunk, **model_sizes(bundle, context_length))
        if bundle.manifest.model.num_experts:
            _check_router(bundle, self.threads)
        self._captures = os.environ.get(CAPTURE_VARIABLE, "1") != "0"
        file = bundle.manifest.graph.file
        self._session = cuda_session(bundle, file, self.threads, capture=self._captures)
        check_graph(self._session, bundle, _LENGTHS)
        self._guarded(lambda: self._allocate(bundle), "allocating the cache")
        self._guarded(self._replay, "capturing a step")

    def _allocate(self, bundle: Bundle) -> None:
        """Allocate everything with a fixed address (caches, token, mask, logits) and bind it."""
        ort = import_onnxruntime()
        self._caches = device_caches(bundle, 1, self.context_length, self._where)
        self._ids = ort.OrtValue.ortvalue_from_numpy(np.zeros((1, 1), np.int64), *self._where)
        self._mask_on_host = np.zeros((1, self.context_length), np.int64)
        self._mask_on_host[0, 0] = 1
        self._mask = ort.OrtValue.ortvalue_from_numpy(self._mask_on_host, *self._where)
        self._logits = ort.OrtValue.ortvalue_from_shape_and_type((1, 1, self.vocab_size), np.float32, *self._where)
        self._last = ort.OrtValue.ortvalue_from_numpy(np.array([-1], np.int64))
        self._all = ort.OrtValue.ortvalue_from_numpy(np.array([0], np.int64))
        # The token that the next replay appends, and the length then. The greedy graph changes both on the GPU.
        self._staged = (0, 1)
        self._step = self._session.io_binding()
        bind_caches(self._step, self._caches)
        self._step.bind_ortvalue_input("input_ids", self._ids)
        self._step.bind_ortvalue_input(_LENGTHS, self._mask)
        self._step.bind_ortvalue_input("logits_start", self._last)
        self._step.bind_ortvalue_output("logits", self._logits)
        self._greedy = cuda_session(bundle, GREEDY_FILE, self.threads)
        self._choice = self._greedy.io_binding()
        self._choice.bind_ortvalue_input("logits", self._logits)
        for bind, name, buffer in (
            (self._choice.bind_input, LENGTH, self._mask),
            (self._choice.bind_output, NEXT_IDS, self._ids),
            (self._choice.bind_output, NEXT_LENGTH, self._mask),
        ):
            bind(name, *self._where, np.int64, (1, 1), buffer.data_ptr())
        self._choice.bind_output(ANSWER, "cpu")

    @property
    def _where(self) -> tuple[str, int]:
        return device_of(self._session)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the KV cache, on the GPU."""
        return sum(int(cache.tensor_size_in_bytes()) for _, _, cache in self._caches)

    def decode(self, token: int) -> NDArray[np.float32]:
        """Append one token; copy all logits to the host."""
        self._append(token)
        logits: NDArray[np.float32] = self._guarded(self._logits.numpy, "copying logits")
        return logits.reshape(-1)

    def decode_greedy(self, token: int) -> int:
        """Append one token and compute the argmax on the GPU, where the next step reads it."""
        self._append(token)
        found = self._guarded(self._choose, "choosing a token")
        chosen, highest = int(found[0, 0]), float(found[0, 1])
        require_finite(highest)
        self._staged = (chosen, self._position + 1)
        return chosen

    def _free(self) -> None:
        # Bindings first, since they hold references to the sessions and their buffers.
        del self._step, self._choice
        del self._session, self._greedy
        self._caches = []
        del self._ids, self._mask, self._logits
        return_free_memory()

    def _append(self, token: int) -> None:
        """Run one token through the captured step."""
        ids = self._checked((token,))
        wanted = (int(ids[0]), self._position + 1)
        if self._staged != wanted:
            self._guarded(lambda: self._stage(*wanted), "copying a token")
        self._guarded(self._replay, "decoding")
        self._position += 1

    def _stage(self, token: int, length: int) -> None:
        self._mask_on_host[0, 0] = length
        self._ids.update_inplace(np.array([[token]], np.int64))
        self._mask.update_inplace(self._mask_on_host)
        self._staged = (token, length)

    def _replay(self) -> None:
        options = import_onnxruntime().RunOptions()
        options.add_run_config_entry("gpu_graph_id", _CAPTURED if self._captures else _NOT_CAPTURED)
        self._session.run_with_iobinding(self._step, options)

    def _choose(self) -> NDArray[np.float32]:
        # Even if this fails, token and length on the GPU have changed.
        self._staged = (-1, -1)
        self._greedy.run_with_iobinding(self._choice)
        answer: NDArray[np.float32] = self._choice.get_outputs()[-1].numpy()
        return answer

    def _prefill(self, ids: NDArray[np.int64], *, last: bool) -> NDArray[np.float32]:
        del last
        logits: NDArray[np.float32] = self._run(ids, self._last)[-1]
        return logits

    def _prefill_all(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        return self._run(ids, self._all)

    def _run(self, ids: NDArray[np.int64], start: Any) -> NDArray[np.float32]:
        """Run at most one chunk, without CUDA graph; return the logits from its position `start` on."""
        session = self._session
        binding = session.io_binding()
        bind_caches(binding, self._caches)
        # This copies to the GPU, so the arrays may be freed when it returns.
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(ids[None, :]))
        binding.bind_cpu_input(_LENGTHS, np.ones((1, self._position + ids.size), np.int64))
        binding.bind_ortvalue_input("logits_start", start)
        binding.bind_output("logits", "cpu")
        options = import_onnxruntime().RunOptions()
        options.add_run_config_entry("gpu_graph_id", _NOT_CAPTURED)
        self._guarded(
            lambda: interruptible(
                lambda: session.run_with_iobinding(binding, options), lambda: setattr(options, "terminate", True)
            ),
            f"reading {ids.size} tokens at once",
        )
        logits: NDArray[np.float32] = binding.get_outputs()[-1].numpy()[0]
        return logits

    def _guarded(self, work: Callable[[], Result], doing: str) -> Result:
        try:
            return work()
        except ort_errors() as error:
            raise _failure(error, doing) from error
