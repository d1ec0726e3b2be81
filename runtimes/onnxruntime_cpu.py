"""ONNX Runtime on the processor.

The cache of keys and values is allocated once and bound both as the graph's past and as its present, so a step writes
its rows in place and copies nothing. Every other input and the logits are bound to buffers that are reused.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgelm.devices import allowed_cores, return_free_memory
from edgelm.errors import BundleError, EdgeLMError, RuntimeUnavailableError
from edgelm.runtimes.base import Runtime, checked_tokens, choose_context_length, context_full, interruptible

if TYPE_CHECKING:
    import onnxruntime  # type: ignore[import-untyped]  # it has no type information

    from edgelm.bundle import Bundle

MINIMUM_VERSION = (1, 31, 1)
DEFAULT_CHUNK = 512
_LOGITS_BYTES = 64 << 20
_KV_DTYPES: dict[str, type[np.floating[Any]]] = {"float32": np.float32, "float16": np.float16}


def open(bundle: Bundle, **options: int) -> Runtime:  # noqa: A001 - the name the registry calls
    """Load the bundle's graph; the options are those of `OnnxRuntimeCpu`."""
    return OnnxRuntimeCpu(bundle, **options)


def _import() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise RuntimeUnavailableError("onnxruntime is not installed: pip install 'edgelm[cpu]'") from error
    # Until 1.31.1 QMoE on the CPU renormalised the routing weights: wrong by about three times on OLMoE.
    version = tuple(int(part) for part in onnxruntime.__version__.split(".")[:3] if part.isdigit())
    if version < MINIMUM_VERSION:
        wanted = ".".join(map(str, MINIMUM_VERSION))
        raise RuntimeUnavailableError(
            f"onnxruntime {onnxruntime.__version__} is too old, {wanted} is needed: pip install 'onnxruntime>={wanted}'"
        )
    return onnxruntime


def _create_session(bundle: Bundle, file: str, threads: int) -> onnxruntime.InferenceSession:
    """Load one of the bundle's graphs.

    Raises:
        BundleError: ONNX Runtime cannot load it.
        EdgeLMError: fewer than one thread.
    """
    ort = _import()
    if threads < 1:
        raise EdgeLMError(f"threads is {threads}: give 1 or more")
    options = ort.SessionOptions()
    # Given explicitly: with 0 it would pin threads to cores, outside containers' cpusets too.
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    # A pattern is planned and kept for every shape of the inputs, and the mask is one longer at each token.
    options.enable_mem_pattern = False
    # Long enough to catch the next operator, short enough to leave the core to others: with the default of a
    # millisecond, decoding falls to a half or a third as soon as another process wants a core.
    options.add_session_config_entry("session.intra_op.spin_duration_us", "20")
    # Failures come as exceptions; the log would say them a second time on stderr.
    options.log_severity_level = 4
    path = bundle.file(file)
    try:
        return interruptible(
            lambda: ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]),
            lambda: options.set_load_cancellation_flag(True),
        )
    except _errors() as error:
        raise BundleError(
            f"onnxruntime {ort.__version__} cannot load {path}: {_first_line(error)}; "
            f"check the files with `edgelm inspect --verify {bundle.path}`"
        ) from error


def _errors() -> tuple[type[Exception], ...]:
    from onnxruntime.capi import onnxruntime_pybind11_state as state  # type: ignore[import-untyped]  # likewise

    names = ("Fail", "InvalidGraph", "InvalidProtobuf", "InvalidArgument", "NoSuchFile", "NotImplemented")
    # A run with bound buffers raises plain RuntimeErrors.
    return (RuntimeError, state.RuntimeException, *(getattr(state, name) for name in names))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _kv_names(layers: int) -> list[tuple[str, str]]:
    return [(f"past_key_values.{i}.{part}", f"present.{i}.{part}") for i in range(layers) for part in ("key", "value")]


def _check_graph(session: onnxruntime.InferenceSession, bundle: Bundle, extra_outputs: Sequence[str] = ()) -> None:
    layers = bundle.manifest.model.num_layers
    inputs = {item.name for item in session.get_inputs()}
    optional = {item.name for item in session.get_overridable_initializers()}
    outputs = {item.name for item in session.get_outputs()}
    wanted_in = {"input_ids", "attention_mask", *(past for past, _ in _kv_names(layers))}
    wanted_out = {"logits", *(present for _, present in _kv_names(layers)), *extra_outputs}
    missing = sorted(wanted_in - inputs) + sorted({"logits_start"} - optional) + sorted(wanted_out - outputs)
    if missing:
        raise BundleError(f"the graph of {bundle.path} lacks {', '.join(missing[:4])}: export the bundle again")


def _anonymous(shape: tuple[int, ...], dtype: type[np.floating[Any]]) -> NDArray[Any]:
    """Zeros whose pages are taken only when written.

    numpy asks for huge pages, and each head's first row would then take 2 MB at once.
    """
    count = int(np.prod(shape))
    return np.frombuffer(mmap.mmap(-1, count * np.dtype(dtype).itemsize), dtype, count).reshape(shape)


class OnnxRuntimeCpu(Runtime):
    """A bundle's graph in ONNX Runtime's CPU provider."""

    name = "onnxruntime-cpu"

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        context_length: int | None = None,
        chunk: int = DEFAULT_CHUNK,
    ) -> None:
        model = bundle.manifest.model
        if chunk < 1:
            raise EdgeLMError(f"chunk is {chunk}: give 1 or more tokens a prefill step")
        super().__init__(
            vocab_size=model.vocab_size,
            context_length=choose_context_length(context_length, model.context_length),
            model_context_length=model.context_length,
            threads=allowed_cores() if threads is None else threads,
        )
        self._chunk = min(chunk, self.context_length)
        session = _create_session(bundle, bundle.manifest.graph.file, self.threads)
        _check_graph(session, bundle)
        self._session: onnxruntime.InferenceSession | None = session
        self._binding = session.io_binding()
        self._ids = np.zeros(self._chunk, np.int64)
        self._mask = np.ones(self.context_length, np.int64)
        self._start = np.zeros(1, np.int64)
        self._allocate_logits(1)
        self._bind_input("logits_start", self._start, (1,))
        self._caches = self._bind_caches(bundle)

    def _bind_caches(self, bundle: Bundle) -> list[NDArray[Any]]:
        model, kind = bundle.manifest.model, bundle.manifest.graph.kv_dtype
        if kind not in _KV_DTYPES:
            raise BundleError(f"{bundle.path} wants a {kind} cache; {self.name} has {', '.join(_KV_DTYPES)}")
        shape = (1, model.num_kv_heads, self.context_length, model.head_dim)
        caches = []
        for past, present in _kv_names(model.num_layers):
            cache = _anonymous(shape, _KV_DTYPES[kind])
            self._bind_input(past, cache, shape)
            self._bind_output(present, cache, shape)
            caches.append(cache)
        return caches

    def _allocate_logits(self, rows: int) -> None:
        self._logits: NDArray[np.float32] = np.zeros((rows, self.vocab_size), np.float32)
        # Where a step that asks for one row puts it.
        self._last_logits: NDArray[np.float32] = self._logits[0]

    def _bind_input(self, name: str, array: NDArray[Any], shape: tuple[int, ...]) -> None:
        self._binding.bind_input(name, "cpu", 0, array.dtype.type, shape, array.ctypes.data)

    def _bind_output(self, name: str, array: NDArray[Any], shape: tuple[int, ...]) -> None:
        self._binding.bind_output(name, "cpu", 0, array.dtype.type, shape, array.ctypes.data)

    @property
    def cache_bytes(self) -> int:
        """Bytes of address space of the whole cache; resident is only what was written."""
        return sum(cache.nbytes for cache in self._caches)

    def prefill(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Append tokens, `chunk` at a time."""
        ids = self._checked(tokens)
        for begin in range(0, ids.size, self._chunk):
            self._step(ids[begin : begin + self._chunk], rows=1)
        return self._last_logits

    def decode(self, token: int) -> NDArray[np.float32]:
        """Append one token."""
        self._step(self._checked((token,)), rows=1)
        return self._last_logits

    def logits_all(self, tokens: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        """Append tokens; yield logits in blocks of at most 64 MiB, valid until the next is asked for."""
        ids = self._checked(tokens)
        block = max(1, min(self._chunk, _LOGITS_BYTES // (4 * self.vocab_size)))
        for begin in range(0, ids.size, block):
            part = self._checked(ids[begin : begin + block])
            yield self._step(part, rows=part.size)

    def close(self) -> None:
        """Free the session and the cache."""
        if self._closed:
            return
        self._closed = True
        self._session = None
        self._binding = None
        self._caches = []
        return_free_memory()

    def _step(self, ids: NDArray[np.int64], rows: int) -> NDArray[np.float32]:
        """Run at most one chunk; return the logits [rows, V] of its last positions: 1 or all of them."""
        end = self._position + ids.size
        self._ids[: ids.size] = ids
        self._start[0] = -1 if rows == 1 else 0
        self._bind_input("input_ids", self._ids, (1, ids.size))
        self._bind_input("attention_mask", self._mask, (1, end))
        if rows == 1:
            self._bind_output("logits", self._logits, (1, 1, self.vocab_size))
        else:
            # The graph declares one row, by which GenAI allocates: ONNX Runtime refuses a larger buffer that is bound
            # to it, but allocates one of the true size itself.
            self._binding.bind_output("logits", "cpu")
        self._run(long=ids.size > 1)
        self._position = end
        if rows == 1:
            return self._logits
        logits: NDArray[np.float32] = self._binding.get_outputs()[-1].numpy()[0]
        return logits

    def _run(self, *, long: bool) -> None:
        session, binding = self._session, self._binding
        assert session is not None
        try:
            if not long:
                session.run_with_iobinding(binding)
                return
            options = _import().RunOptions()
            # A chunk's activations are large and decoding does not need them: give them back.
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
            interruptible(
                lambda: session.run_with_iobinding(binding, options), lambda: setattr(options, "terminate", True)
            )
        except _errors() as error:
            raise EdgeLMError(
                f"onnxruntime failed in the middle: {_first_line(error)}; if memory ran out, take a smaller "
                f"context_length than {self.context_length} or a smaller chunk than {self._chunk}"
            ) from error


@dataclass(frozen=True)
class Trace:
    """What the debug graph computed at every position of a text of T tokens.

    `logits` [T, V], None where they were not asked for; `hidden`: L + 1 arrays [T, D], the embedding's output and the
    residual stream after each layer; `router_logits`: L arrays [T, E], empty for a dense model.
    """

    logits: NDArray[np.float32] | None
    hidden: list[NDArray[np.float32]]
    router_logits: list[NDArray[np.float32]]


def _has_8_bit_experts(bundle: Bundle) -> bool:
    model = bundle.manifest.model
    codes = [entry for entry in bundle.manifest.tensors if entry.name.endswith(".moe.gate_up.qweight")]
    if not codes:
        return False
    width = json.loads(bundle.file("config.json").read_text(encoding="utf-8"))["intermediate_size"]
    return any(entry.size >= model.num_experts * 2 * width * model.hidden_size for entry in codes)


@contextlib.contextmanager
def _float32_experts(bundle: Bundle) -> Iterator[None]:
    """QMoE created within this computes in float32, as the debug graph's other products do.

    Its 8-bit kernel quantises activations to int8 whatever `accuracy_level` says, and the 0.3 % of noise that this
    makes would hide a small error of a weight. The 4-bit kernel obeys, and is left alone: switched off, OLMoE loads 20
    times as long.
    """
    names = ("ORT_QMOE_CPU_QNBIT_GEMM", "ORT_USE_MLAS_Q4_GEMM_MOE") if _has_8_bit_experts(bundle) else ()
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "0"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class TracingRuntime:
    """The bundle's debug graph, loaded. It takes as much memory as the main graph: close that one first.

    Its products are computed in float32, so it differs from the quantised reference by rounding only.
    """

    def __init__(self, bundle: Bundle, *, threads: int | None = None) -> None:
        self._model = bundle.manifest.model
        self._dtype = _KV_DTYPES.get(bundle.manifest.graph.kv_dtype, np.float32)
        layers = range(self._model.num_layers)
        self._hidden = [f"hidden.{i}" for i in range(self._model.num_layers + 1)]
        self._routers = [f"router_logits.{i}" for i in layers] if self._model.num_experts else []
        file = bundle.manifest.graph.debug_file
        with _float32_experts(bundle):
            self._session: onnxruntime.InferenceSession | None = _create_session(
                bundle, file, allowed_cores() if threads is None else threads
            )
        _check_graph(self._session, bundle, [*self._hidden, *self._routers])

    def trace(self, tokens: Sequence[int], *, logits: bool = True) -> Trace:
        """Run `tokens` from position 0 in one pass. `logits=False` spares their [T, V] float32.

        Raises:
            ContextLengthError, GenerationError: as `Runtime.prefill`, against the model's own context length.
        """
        return self.trace_all([tokens], logits=logits)[0]

    def trace_all(self, texts: Sequence[Sequence[int]], *, logits: bool = True) -> list[Trace]:
        """Run several texts in one pass over the weights, each from position 0.

        Shorter ones are filled up at the end with a token of their own: attention looks back only, so what is computed
        before stays as it is. Memory grows with the number of texts times the longest. Raises as `trace`.
        """
        if self._session is None:
            raise EdgeLMError("this tracing runtime was closed: load the bundle again")
        model = self._model
        parts = [checked_tokens(tokens, model.vocab_size) for tokens in texts]
        longest = max(part.size for part in parts)
        if longest > model.context_length:
            raise context_full(longest, 0, model.context_length, model.context_length)
        ids = np.stack([np.pad(part, (0, longest - part.size), mode="edge") for part in parts])
        feed: dict[str, NDArray[Any]] = {
            "input_ids": ids,
            "attention_mask": np.ones(ids.shape, np.int64),
            "logits_start": np.array([0 if logits else -1], np.int64),
        }
        for past, _ in _kv_names(model.num_layers):
            feed[past] = np.zeros((len(parts), model.num_kv_heads, 0, model.head_dim), self._dtype)
        names = ["logits", *self._hidden, *self._routers]
        values = [np.asarray(value) for value in self._session.run(names, feed)]
        first_router = 1 + len(self._hidden)
        rows = [value.reshape(len(parts), longest, -1) for value in values[1:]]

        def of(number: int, arrays: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
            return [array[number, : parts[number].size] for array in arrays]

        return [
            Trace(
                logits=values[0][number, : parts[number].size] if logits else None,
                hidden=of(number, rows[: first_router - 1]),
                router_logits=of(number, rows[first_router - 1 :]),
            )
            for number in range(len(parts))
        ]

    def close(self) -> None:
        """Free the session."""
        self._session = None
        return_free_memory()

    def __enter__(self) -> TracingRuntime:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def trace(bundle: Bundle, tokens: Sequence[int], *, threads: int | None = None, logits: bool = True) -> Trace:
    """Load the debug graph, run `tokens` once, free it again."""
    with TracingRuntime(bundle, threads=threads) as runtime:
        return runtime.trace(tokens, logits=logits)
