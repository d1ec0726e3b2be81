"""Bundles for CUDA: ONNX Runtime's own operators on an NVIDIA GPU.

The cache of keys and values lies on the GPU and is bound as the graph's past and its present. Decoding is captured
once, as a CUDA graph, and replayed for every token, so everything that a step reads lies at a fixed address: the id of
the token, and a mask as long as the cache, of which the graph takes the sum. Its first element holds that sum and the
others are zero, so that 8 bytes say how long the text is.

Greedy decoding goes round on the GPU: a second small graph takes the best logit and writes the token and the length
where the next step reads them. One token comes back to the host; sampling, which needs them all, copies the logits.
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
"""Names in the graph that chooses greedily; see `edgelm.export.onnxruntime.greedy_graph`."""
CAPTURE_VARIABLE = "EDGELM_CUDA_GRAPHS"
"""Environment variable: 0 launches every operator of every token instead of replaying a captured graph."""

# ONNX's numbers of what a cache can hold; numpy has no bfloat16.
_ELEMENT = {"float16": 10, "bfloat16": 16}
_CAPTURED, _NOT_CAPTURED = "1", "-1"
_LENGTHS = "attention_mask"

Result = TypeVar("Result")


def _failure(error: Exception, doing: str) -> EdgeLMError:
    return device_error(error, doing) or EdgeLMError(
        f"onnxruntime failed when {doing}: {first_line(error)}; {CAPTURE_VARIABLE}=0 decodes without captured graphs"
    )


def _check_router(bundle: Bundle, threads: int) -> None:
    if PROBE_FILE not in bundle.manifest.files:
        raise BundleError(f"{bundle.path} lacks {PROBE_FILE}, with which its routing is checked: export it again")
    session = cuda_session(bundle, PROBE_FILE, threads)
    try:
        check_router(session, PROVIDER)
    except ort_errors() as error:
        raise _failure(error, "checking how it routes") from error


def device_of(session: onnxruntime.InferenceSession) -> tuple[str, int]:
    """Where a session's buffers lie, as ONNX Runtime names it."""
    return "cuda", int(session.get_provider_options()[PROVIDER]["device_id"])


Caches = list[tuple[str, str, Any]]
"""Names of a cache as input and as output, and its buffer on the GPU."""


def device_caches(bundle: Bundle, batch: int, length: int, device: tuple[str, int]) -> Caches:
    """A cache for every layer's keys and values, [batch, kv_heads, length, head_dim].

    Raises:
        BundleError: of a type that these graphs do not have.
    """
    model, kind = bundle.manifest.model, bundle.manifest.graph.kv_dtype
    if kind not in _ELEMENT:
        raise BundleError(f"{bundle.path} wants a {kind} cache; bundles for CUDA have {', '.join(_ELEMENT)}")
    make = import_onnxruntime().OrtValue.ortvalue_from_shape_and_type
    shape = (batch, model.num_kv_heads, length, model.head_dim)
    return [(past, present, make(shape, _ELEMENT[kind], *device)) for past, present in kv_names(model.num_layers)]


def bind_caches(binding: Any, caches: Caches) -> None:
    """Let a graph read and write the same buffers."""
    for past, present, cache in caches:
        binding.bind_ortvalue_input(past, cache)
        binding.bind_ortvalue_output(present, cache)


class OnnxCudaTracing(OnnxTracing):
    """A bundle's debug graph on the GPU: the very products of the shipped graph, with their types' rounding."""

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
            # In the order in which they were bound, the caches first.
            return [np.asarray(value.numpy()) for value in binding.get_outputs()[-len(names) :]]
        except ort_errors() as error:
            raise _failure(error, "running the debug graph") from error


class OnnxCudaRuntime(Runtime):
    """A bundle's graph on a GPU, with the cache of one sequence. The cache's type is the graph's: `kv` may name it.

    Raises:
        RuntimeUnavailableError: ONNX Runtime has no CUDA here, a node would run on the CPU, or the provider
            computes another mixture of experts.
        DeviceError: no GPU, one that is too old, or one that failed; DeviceMemoryError: not enough memory.
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
        """Everything that stays where it is: caches, the token, the mask, the logits; and what is bound to them."""
        ort = import_onnxruntime()
        self._caches = device_caches(bundle, 1, self.context_length, self._where)
        self._ids = ort.OrtValue.ortvalue_from_numpy(np.zeros((1, 1), np.int64), *self._where)
        self._mask_on_host = np.zeros((1, self.context_length), np.int64)
        self._mask_on_host[0, 0] = 1
        self._mask = ort.OrtValue.ortvalue_from_numpy(self._mask_on_host, *self._where)
        self._logits = ort.OrtValue.ortvalue_from_shape_and_type((1, 1, self.vocab_size), np.float32, *self._where)
        self._last = ort.OrtValue.ortvalue_from_numpy(np.array([-1], np.int64))
        self._all = ort.OrtValue.ortvalue_from_numpy(np.array([0], np.int64))
        # What the next replay would append, and how many tokens there would be then; the GPU changes it by itself.
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
        """Bytes of the whole cache, on the GPU."""
        return sum(int(cache.tensor_size_in_bytes()) for _, _, cache in self._caches)

    def decode(self, token: int) -> NDArray[np.float32]:
        """Append one token; all logits are copied to the host."""
        self._append(token)
        logits: NDArray[np.float32] = self._guarded(self._logits.numpy, "copying logits")
        return logits.reshape(-1)

    def decode_greedy(self, token: int) -> int:
        """Append one token and choose the next on the GPU, which then has it in place for the step after."""
        self._append(token)
        found = self._guarded(self._choose, "choosing a token")
        chosen, highest = int(found[0, 0]), float(found[0, 1])
        require_finite(highest)
        self._staged = (chosen, self._position + 1)
        return chosen

    def _free(self) -> None:
        # Bindings first: they hold the sessions and their buffers.
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
        # Whatever happens, the GPU's own token and length are not what they were.
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
        """Run at most one chunk, outside the captured graph: the logits from position `start` of it on."""
        session = self._session
        binding = session.io_binding()
        bind_caches(binding, self._caches)
        # Copied to the GPU here: the arrays may go when this returns.
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
