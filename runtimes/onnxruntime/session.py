"""Shared code of the CPU runtimes: sessions, bound buffers, prefill in chunks, tracing.

The KV cache is allocated once and bound as both the graph's past and its present, so a step updates it in place without
copies. All other inputs and the logits are bound to reused buffers.
"""

from __future__ import annotations

import math
import mmap
import os
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgelm.bundle import version_numbers
from edgelm.devices import allowed_cores, return_free_memory
from edgelm.errors import BundleError, EdgeLMError, RuntimeUnavailableError
from edgelm.installing import install_hint
from edgelm.runtimes.base import interruptible, model_sizes
from edgelm.runtimes.savable import SavableRuntime
from edgelm.runtimes.tracing import TracingModel

if TYPE_CHECKING:
    from pathlib import Path

    import onnxruntime  # type: ignore[import-untyped]  # it has no type information

    from edgelm.bundle import Bundle

MINIMUM_VERSION = "1.31.1"
"""For bundles that do not state their minimum version."""


def import_onnxruntime(bundle: Bundle | None = None) -> Any:
    """Import onnxruntime and check that it is new enough for `bundle`; without one, for every bundle.

    Raises:
        RuntimeUnavailableError: onnxruntime is missing or too old.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise RuntimeUnavailableError(f"onnxruntime is not installed: {install_hint('cpu')}") from error
    wanted, subject = MINIMUM_VERSION, "EdgeLM needs"
    if bundle is not None:
        needs = [need for need in bundle.manifest.requires if need.package == "onnxruntime"]
        subject = f"{bundle.path} needs"
        if needs:
            most = max(needs, key=lambda need: need.numbers)
            wanted, subject = most.version, f"{bundle.path} has {most.feature}, which needs"
    if version_numbers(onnxruntime.__version__) < version_numbers(wanted):
        raise RuntimeUnavailableError(
            f"{subject} ONNX Runtime {wanted} or newer, here is {onnxruntime.__version__}: "
            f"pip install -U 'onnxruntime>={wanted}'"
        )
    return onnxruntime


def create_session(
    bundle: Bundle,
    file: str,
    threads: int,
    prepare: Callable[[Any], None] | None = None,
    providers: Sequence[str | tuple[str, dict[str, str]]] = ("CPUExecutionProvider",),
) -> onnxruntime.InferenceSession:
    """Load one of the bundle's graphs. `prepare` may change the session options first.

    Raises:
        BundleError: ONNX Runtime cannot load it.
        EdgeLMError: `threads` is less than 1.
    """
    ort = import_onnxruntime(bundle)
    if threads < 1:
        raise EdgeLMError(f"threads is {threads}: give 1 or more")
    options = ort.SessionOptions()
    # Set explicitly: with 0, ONNX Runtime pins threads to cores, even to cores outside a container's cpuset.
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    # A pattern would be kept for every input shape, and the portable mask grows by one with each token.
    options.enable_mem_pattern = False
    # Long enough to catch the next operator, short enough to leave the core to other processes: with the default of 1
    # ms, decoding drops to a half or a third of its speed as soon as another process needs a core.
    options.add_session_config_entry("session.intra_op.spin_duration_us", "20")
    # Errors are raised as exceptions; the log would repeat them on stderr.
    options.log_severity_level = 4
    if prepare is not None:
        prepare(options)
    path = bundle.file(file)
    _refuse_linked_weights(bundle, path)
    try:
        return interruptible(
            lambda: ort.InferenceSession(str(path), options, providers=list(providers), enable_fallback=0),
            lambda: options.set_load_cancellation_flag(True),
        )
    except ort_errors() as error:
        raise BundleError(
            f"onnxruntime {ort.__version__} cannot load {path}: {first_line(error)}; "
            f"check the files with `edgelm inspect --verify {bundle.path}`"
        ) from error


def _refuse_linked_weights(bundle: Bundle, graph: Path) -> None:
    """Check that the weights are in the graph's folder with links resolved, as ONNX Runtime requires.

    Raises:
        BundleError: the weights file is a link to another folder.
    """
    weights = bundle.file(bundle.manifest.graph.weights_file)
    found = weights.resolve()
    folders = {graph.parent.resolve(), graph.resolve().parent}
    if not any(found.is_relative_to(folder) for folder in folders):
        raise BundleError(
            f"{weights} is a link to {found}: ONNX Runtime reads weights only from the folder of the graph. Put the "
            f"file itself there, or link the whole folder ({bundle.path})"
        )


class MappedWeights:
    """Watches the weights file that a session maps: reading a page that no longer exists would kill the process.

    The file is kept open, so that replacing it (`edgelm install`) does not affect running sessions.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._path = bundle.file(bundle.manifest.graph.weights_file)
        self._size = bundle.manifest.files[bundle.manifest.graph.weights_file].size
        self._descriptor = os.open(self._path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self._descriptor)
        self.check()

    def check(self) -> None:
        """Check the file's size, which takes a microsecond.

        Raises:
            BundleError: the file was truncated.
        """
        size = os.fstat(self._descriptor).st_size
        if size < self._size:
            raise BundleError(
                f"{self._path} was truncated from {self._size} to {size} bytes while in use: restore it and load the "
                "bundle again. Replace bundles with `edgelm install` only, never write into their files"
            )


def require_stored_kv(bundle: Bundle, kv: str | None, more: str = "") -> None:
    """Check that `kv`, if given, is the graph's cache type; `more` is appended to the error message.

    Raises:
        EdgeLMError: `kv` names another type.
    """
    stored = bundle.manifest.graph.kv_dtype
    if kv not in (None, stored):
        raise EdgeLMError(f"kv is {kv!r}, but the cache of {bundle.path} is {stored}: leave kv out{more}")


def ort_errors() -> tuple[type[Exception], ...]:
    """Return the exception types that ONNX Runtime raises."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state  # type: ignore[import-untyped]  # it has no type information

    names = ("Fail", "InvalidGraph", "InvalidProtobuf", "InvalidArgument", "NoSuchFile", "NotImplemented")
    # A run with bound buffers raises plain RuntimeError; a damaged name that is converted to a Python string, the
    # second.
    return (RuntimeError, UnicodeDecodeError, state.RuntimeException, *(getattr(state, name) for name in names))


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return str(error).strip().splitlines()[0]


def kv_names(layers: int) -> list[tuple[str, str]]:
    """Return the names of all caches, each as input and as output."""
    return [(f"past_key_values.{i}.{part}", f"present.{i}.{part}") for i in range(layers) for part in ("key", "value")]


def check_graph(
    session: onnxruntime.InferenceSession, bundle: Bundle, lengths: str, extra_outputs: Sequence[str] = ()
) -> None:
    """Check that a graph has the inputs and outputs of a runtime; `lengths` is the input with the cached lengths.

    Raises:
        BundleError: some are missing; the message names them.
    """
    layers = bundle.manifest.model.num_layers
    inputs = {item.name for item in session.get_inputs()}
    optional = {item.name for item in session.get_overridable_initializers()}
    outputs = {item.name for item in session.get_outputs()}
    wanted_in = {"input_ids", lengths, *(past for past, _ in kv_names(layers))}
    wanted_out = {"logits", *(present for _, present in kv_names(layers)), *extra_outputs}
    missing = sorted(wanted_in - inputs) + sorted({"logits_start"} - optional) + sorted(wanted_out - outputs)
    if missing:
        raise BundleError(f"the graph of {bundle.path} lacks {', '.join(missing[:4])}: export the bundle again")
    # Buffers are sized by the manifest, so its numbers must match the graph's where the graph has any.
    model = bundle.manifest.model
    shapes = {item.name: item.shape for item in (*session.get_inputs(), *session.get_outputs())}
    known = [("logits", -1, "vocab_size"), *((past, 1, "num_kv_heads") for past, _ in kv_names(layers))]
    for name, axis, field in known:
        wanted, found = getattr(model, field), shapes[name][axis]
        if isinstance(found, int) and found != wanted:
            raise BundleError(
                f"{bundle.path}: model.{field} is {wanted} in the manifest, but the graph's {name} has {found}: export "
                "the bundle again"
            )


def untouched(shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
    """Return zeros whose memory pages are allocated only when they are written.

    numpy requests huge pages, with which the first row of each head would take 2 MB at once.

    Raises:
        EdgeLMError: there is not enough memory.
    """
    count = math.prod(shape)
    nbytes = count * np.dtype(dtype).itemsize
    try:
        return np.frombuffer(mmap.mmap(-1, nbytes), dtype, count).reshape(shape)
    except (OSError, OverflowError, MemoryError) as error:
        raise EdgeLMError(
            f"not enough memory for a cache of {nbytes} bytes: use a smaller context_length or batch"
        ) from error


class BoundGraph:
    """A session with input and output buffers that are bound once and reused.

    `weights`: the mapped weights file. `batch`: rows of `input_ids`. `chunk`: the largest number of tokens per row and
    step. `around`: calls a function that runs the model, in the thread that runs it.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        weights: MappedWeights,
        *,
        batch: int,
        chunk: int,
        vocab_size: int,
        around: Callable[[Callable[[], None]], None] | None = None,
    ) -> None:
        self._session = session
        self._around = around or (lambda run: run())
        self._weights = weights
        self._vocab_size = vocab_size
        self._binding = session.io_binding()
        self._ids = np.zeros(batch * chunk, np.int64)
        self._start = np.zeros(1, np.int64)
        self._logits: NDArray[np.float32] = np.zeros((batch, vocab_size), np.float32)
        self._bound: tuple[int, ...] = ()
        self.bind_input("logits_start", self._start, (1,))

    def another(self, *, batch: int, chunk: int, around: Callable[[Callable[[], None]], None]) -> BoundGraph:
        """Return a graph with the same session and its own buffers, nothing bound."""
        return BoundGraph(
            self._session, self._weights, batch=batch, chunk=chunk, vocab_size=self._vocab_size, around=around
        )

    def bind_input(self, name: str, array: NDArray[Any], shape: tuple[int, ...]) -> None:
        """Bind an input of `shape` to the start of `array`."""
        self._binding.bind_input(name, "cpu", 0, array.dtype.type, shape, array.ctypes.data)

    def bind_output(self, name: str, array: NDArray[Any], shape: tuple[int, ...]) -> None:
        """Bind an output of `shape` to the start of `array`."""
        self._binding.bind_output(name, "cpu", 0, array.dtype.type, shape, array.ctypes.data)

    def bind_caches(self, caches: Sequence[NDArray[Any]]) -> None:
        """Bind the caches of all layers as both inputs and outputs."""
        for (past, present), cache in zip(kv_names(len(caches) // 2), caches, strict=True):
            self.bind_input(past, cache, cache.shape)
            self.bind_output(present, cache, cache.shape)

    def step(self, ids: NDArray[np.int64], *, all_positions: bool = False) -> NDArray[np.float32]:
        """Run ids [B, T]; return the logits of each row's last position, [B, V], or of all of them, [B, T, V].

        The result is in a buffer that the next step overwrites.

        Raises:
            BundleError: the weights file was truncated.
            EdgeLMError: ONNX Runtime failed, e.g. for lack of memory.
        """
        self._weights.check()
        batch, tokens = ids.shape
        self._ids[: ids.size] = ids.reshape(-1)
        if self._bound != ids.shape:
            self.bind_input("input_ids", self._ids, ids.shape)
            self._bound = ids.shape
        self._start[0] = 0 if all_positions else -1
        if all_positions and tokens > 1:
            # The graph declares one row, which GenAI uses to allocate. ONNX Runtime rejects a larger bound buffer, but
            # allocates one of the true size itself.
            self._binding.bind_output("logits", "cpu")
        else:
            self.bind_output("logits", self._logits, (batch, 1, self._logits.shape[1]))
        self._run(long=tokens > 1)
        if not all_positions:
            return self._logits[:batch]
        if tokens == 1:
            return self._logits[:batch, None]
        found: NDArray[np.float32] = self._binding.get_outputs()[-1].numpy()
        return found

    def _run(self, *, long: bool) -> None:
        session, binding, around = self._session, self._binding, self._around
        try:
            if not long:
                around(lambda: session.run_with_iobinding(binding))
                return
            import onnxruntime

            options = onnxruntime.RunOptions()
            # A chunk's activations are large and decoding does not need their memory: free it.
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
            interruptible(
                lambda: around(lambda: session.run_with_iobinding(binding, options)),
                lambda: setattr(options, "terminate", True),
            )
        except ort_errors() as error:
            raise EdgeLMError(
                f"onnxruntime failed while running the model: {first_line(error)}; if memory ran out, use a smaller "
                f"context_length or a smaller chunk than {self._ids.size}"
            ) from error


class OnnxRuntimeModel(SavableRuntime):
    """A bundle's graph on ONNX Runtime's CPU provider, for one sequence."""

    name = "onnxruntime-cpu"
    lengths: str
    """The input with the number of cached tokens."""

    def __init__(self, bundle: Bundle, *, threads: int | None, context_length: int | None, chunk: int) -> None:
        super().__init__(threads=threads, chunk=chunk, **model_sizes(bundle, context_length))
        weights = MappedWeights(bundle)
        session = self._session(bundle)
        check_graph(session, bundle, self.lengths)
        model, (width, dtype) = bundle.manifest.model, self._cache_row(bundle)
        shape = (1, model.num_kv_heads, self.context_length, width)
        self._caches = [untouched(shape, dtype) for _ in range(2 * model.num_layers)]
        self._graph = BoundGraph(session, weights, batch=1, chunk=self.chunk, vocab_size=self.vocab_size)
        self._graph.bind_caches(self._caches)

    @abstractmethod
    def _session(self, bundle: Bundle) -> onnxruntime.InferenceSession:
        """Load the bundle's main graph."""

    @abstractmethod
    def _cache_row(self, bundle: Bundle) -> tuple[int, type[np.generic]]:
        """Return the number of elements per head and position of a cache, and their type."""

    @abstractmethod
    def _bind_step(self, graph: BoundGraph, tokens: int) -> None:
        """Bind the inputs for a step of `tokens` tokens after the cached ones."""

    @property
    def cache_bytes(self) -> int:
        """Bytes of address space of the cache; only written pages are resident."""
        return sum(cache.nbytes for cache in self._caches)

    def saved_bytes(self, length: int) -> int:
        """Return the number of bytes of the cache of `length` tokens."""
        return self.cache_bytes // self.context_length * length

    def _saved(self, length: int) -> Iterator[NDArray[np.uint8]]:
        for index, cache in enumerate(self._caches):
            yield self._rows(cache[0], length, keys=index % 2 == 0).reshape(-1)

    def _load(self, length: int, read: Callable[[int], NDArray[np.uint8]]) -> None:
        for index, cache in enumerate(self._caches):
            heads, _, width = cache.shape[1:]
            rows = read(heads * length * width * cache.itemsize).reshape(heads, length, width * cache.itemsize)
            self._set_rows(cache[0], rows, keys=index % 2 == 0)

    @abstractmethod
    def _rows(self, cache: NDArray[Any], length: int, *, keys: bool) -> NDArray[np.uint8]:
        """Return the first `length` rows of a layer's keys or values [H, capacity, width], as bytes, in order."""

    @abstractmethod
    def _set_rows(self, cache: NDArray[Any], rows: NDArray[np.uint8], *, keys: bool) -> None:
        """Write what `_rows` returned, bytes [H, length, bytes of a row]."""

    def decode(self, token: int) -> NDArray[np.float32]:
        """Append one token."""
        logits = self._prefill(self._checked((token,)), last=True)
        self._position += 1
        return logits

    def _free(self) -> None:
        del self._graph
        self._caches = []
        return_free_memory()

    def _prefill(self, ids: NDArray[np.int64], *, last: bool) -> NDArray[np.float32]:
        del last
        self._bind_step(self._graph, ids.size)
        logits: NDArray[np.float32] = self._graph.step(ids[None, :])[0]
        return logits

    def _prefill_all(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        self._bind_step(self._graph, ids.size)
        logits: NDArray[np.float32] = self._graph.step(ids[None, :], all_positions=True)[0]
        return logits


class OnnxTracing(TracingModel):
    """A bundle's debug graph in ONNX Runtime."""

    lengths: str
    """The input with the number of cached tokens."""

    def __init__(self, bundle: Bundle, *, threads: int | None = None) -> None:
        super().__init__(bundle)
        self._weights = MappedWeights(bundle)
        self._session = self._load(bundle, allowed_cores() if threads is None else threads)
        check_graph(self._session, bundle, self.lengths, self.traced)

    @abstractmethod
    def _load(self, bundle: Bundle, threads: int) -> onnxruntime.InferenceSession:
        """Load the bundle's debug graph."""

    @abstractmethod
    def _empty_cache(self, batch: int, tokens: int) -> dict[str, NDArray[Any]]:
        """Return the inputs for `batch` rows of `tokens` tokens that begin at position 0."""

    def _run(self, ids: NDArray[np.int64], names: Sequence[str], *, logits: bool) -> list[NDArray[np.float32]]:
        self._weights.check()
        start = np.array([0 if logits else -1], np.int64)
        return self._compute(names, {"input_ids": ids, "logits_start": start, **self._empty_cache(*ids.shape)})

    def _compute(self, names: Sequence[str], feed: dict[str, NDArray[Any]]) -> list[NDArray[np.float32]]:
        """Return the outputs `names` for inputs [batch, tokens] from position 0."""
        return [np.asarray(value) for value in self._session.run(names, feed)]

    def _free(self) -> None:
        del self._session
        return_free_memory()
