"""What both operator sets share on the CPU: sessions, bound buffers, prefill in chunks, tracing.

The cache of keys and values is allocated once and bound both as the graph's past and as its present, so a step writes
its rows in place and copies nothing. Every other input and the logits are bound to buffers that are reused.
"""

from __future__ import annotations

import math
import mmap
import os
import weakref
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgelm.bundle import version_numbers
from edgelm.devices import allowed_cores, return_free_memory
from edgelm.errors import BundleError, EdgeLMError, RuntimeUnavailableError
from edgelm.installing import install_hint
from edgelm.runtimes.base import Runtime, interruptible, model_sizes
from edgelm.runtimes.tracing import TracingModel

if TYPE_CHECKING:
    from pathlib import Path

    import onnxruntime  # type: ignore[import-untyped]  # it has no type information

    from edgelm.bundle import Bundle

MINIMUM_VERSION = "1.31.1"
"""For bundles that do not say what they need."""


def import_onnxruntime(bundle: Bundle | None = None) -> Any:
    """The package, new enough for `bundle`; without one, for all of them.

    Raises:
        RuntimeUnavailableError: it is missing or too old.
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
    """Load one of the bundle's graphs; `prepare` may change the session's options first.

    Raises:
        BundleError: ONNX Runtime cannot load it.
        EdgeLMError: fewer than one thread.
    """
    ort = import_onnxruntime(bundle)
    if threads < 1:
        raise EdgeLMError(f"threads is {threads}: give 1 or more")
    options = ort.SessionOptions()
    # Given explicitly: with 0 it would pin threads to cores, outside containers' cpusets too.
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    # A pattern is planned and kept for every shape of the inputs, and the portable mask is one longer at each token.
    options.enable_mem_pattern = False
    # Long enough to catch the next operator, short enough to leave the core to others: with the default of a
    # millisecond, decoding falls to a half or a third as soon as another process wants a core.
    options.add_session_config_entry("session.intra_op.spin_duration_us", "20")
    # Failures come as exceptions; the log would say them a second time on stderr.
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
    """ONNX Runtime reads weights only from the folder that the graph lies in, links resolved.

    Raises:
        BundleError: the weights file is a link to elsewhere.
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
    """The bundle's weights file as the session maps it: reading a page that is no longer there kills the process.

    The file is held open, so that a new one in its place (`edgelm install`) does not matter to those that run.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._path = bundle.file(bundle.manifest.graph.weights_file)
        self._size = bundle.manifest.files[bundle.manifest.graph.weights_file].size
        self._descriptor = os.open(self._path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self._descriptor)
        self.check()

    def check(self) -> None:
        """Look at the file's size, which takes a microsecond.

        Raises:
            BundleError: the file has become shorter.
        """
        size = os.fstat(self._descriptor).st_size
        if size < self._size:
            raise BundleError(
                f"{self._path} was cut from {self._size} to {size} bytes while it was in use: load the bundle again "
                "once it is whole. Replace a bundle with `edgelm install`, never write into its files"
            )


def require_stored_kv(bundle: Bundle, kv: str | None, more: str = "") -> None:
    """Refuse another type of cache than the graph's; `more` is what else a user can do.

    Raises:
        EdgeLMError: `kv` names another.
    """
    stored = bundle.manifest.graph.kv_dtype
    if kv not in (None, stored):
        raise EdgeLMError(f"kv is {kv!r}, but the cache of {bundle.path} is {stored}: leave kv out{more}")


def ort_errors() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state  # type: ignore[import-untyped]  # likewise

    names = ("Fail", "InvalidGraph", "InvalidProtobuf", "InvalidArgument", "NoSuchFile", "NotImplemented")
    # A run with bound buffers raises plain RuntimeErrors, a damaged name that is to become a Python string the last.
    return (RuntimeError, UnicodeDecodeError, state.RuntimeException, *(getattr(state, name) for name in names))


def first_line(error: Exception) -> str:
    """An error's message without what follows it."""
    return str(error).strip().splitlines()[0]


def kv_names(layers: int) -> list[tuple[str, str]]:
    """The names of every cache as input and as output."""
    return [(f"past_key_values.{i}.{part}", f"present.{i}.{part}") for i in range(layers) for part in ("key", "value")]


def check_graph(
    session: onnxruntime.InferenceSession, bundle: Bundle, lengths: str, extra_outputs: Sequence[str] = ()
) -> None:
    """Compare a graph's inputs and outputs with what a runtime feeds; `lengths` says how much is cached.

    Raises:
        BundleError: naming what is missing.
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
    # The manifest's numbers become buffers: they must be the graph's, where it says any.
    model = bundle.manifest.model
    shapes = {item.name: item.shape for item in (*session.get_inputs(), *session.get_outputs())}
    known = [("logits", -1, "vocab_size"), *((past, 1, "num_kv_heads") for past, _ in kv_names(layers))]
    for name, axis, field in known:
        wanted, found = getattr(model, field), shapes[name][axis]
        if isinstance(found, int) and found != wanted:
            raise BundleError(
                f"{bundle.path}: model.{field} is {wanted} in the manifest, and the graph's {name} has {found}: export "
                "the bundle again"
            )


def untouched(shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
    """Zeros whose pages are taken only when written.

    numpy asks for huge pages, and each head's first row would then take 2 MB at once.

    Raises:
        EdgeLMError: there is no room for so many.
    """
    count = math.prod(shape)
    nbytes = count * np.dtype(dtype).itemsize
    try:
        return np.frombuffer(mmap.mmap(-1, nbytes), dtype, count).reshape(shape)
    except (OSError, OverflowError, MemoryError) as error:
        raise EdgeLMError(
            f"there is no memory for {nbytes} bytes of cache: take a smaller context_length or batch"
        ) from error


class BoundGraph:
    """A session whose inputs and outputs are buffers that are bound once and reused.

    `weights`: what the session maps. `batch`: rows of `input_ids`. `chunk`: the most tokens a row has in one step.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        weights: MappedWeights,
        *,
        batch: int,
        chunk: int,
        vocab_size: int,
    ) -> None:
        self._session = session
        self._weights = weights
        self._vocab_size = vocab_size
        self._binding = session.io_binding()
        self._ids = np.zeros(batch * chunk, np.int64)
        self._start = np.zeros(1, np.int64)
        self._logits: NDArray[np.float32] = np.zeros((batch, vocab_size), np.float32)
        self._bound: tuple[int, ...] = ()
        self.bind_input("logits_start", self._start, (1,))

    def another(self, *, batch: int, chunk: int) -> BoundGraph:
        """The same session with buffers of their own, nothing bound."""
        return BoundGraph(self._session, self._weights, batch=batch, chunk=chunk, vocab_size=self._vocab_size)

    def bind_input(self, name: str, array: NDArray[Any], shape: tuple[int, ...]) -> None:
        """Let the graph read an input of `shape` from where `array` begins."""
        self._binding.bind_input(name, "cpu", 0, array.dtype.type, shape, array.ctypes.data)

    def bind_output(self, name: str, array: NDArray[Any], shape: tuple[int, ...]) -> None:
        """Let the graph write an output of `shape` to where `array` begins."""
        self._binding.bind_output(name, "cpu", 0, array.dtype.type, shape, array.ctypes.data)

    def bind_caches(self, caches: Sequence[NDArray[Any]]) -> None:
        """Let the graph read and write every layer's keys and values where they lie."""
        for (past, present), cache in zip(kv_names(len(caches) // 2), caches, strict=True):
            self.bind_input(past, cache, cache.shape)
            self.bind_output(present, cache, cache.shape)

    def step(self, ids: NDArray[np.int64], *, all_positions: bool = False) -> NDArray[np.float32]:
        """Run ids [B, T]; return the logits of each row's last position, [B, V], or of all of them, [B, T, V].

        The result lies in a buffer that the next step overwrites.

        Raises:
            BundleError: the weights file has become shorter.
            EdgeLMError: ONNX Runtime failed.
        """
        self._weights.check()
        batch, tokens = ids.shape
        self._ids[: ids.size] = ids.reshape(-1)
        if self._bound != ids.shape:
            self.bind_input("input_ids", self._ids, ids.shape)
            self._bound = ids.shape
        self._start[0] = 0 if all_positions else -1
        if all_positions and tokens > 1:
            # The graph declares one row, by which GenAI allocates: ONNX Runtime refuses a larger buffer that is bound
            # to it, but allocates one of the true size itself.
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
        session, binding = self._session, self._binding
        try:
            if not long:
                session.run_with_iobinding(binding)
                return
            import onnxruntime

            options = onnxruntime.RunOptions()
            # A chunk's activations are large and decoding does not need them: give them back.
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
            interruptible(
                lambda: session.run_with_iobinding(binding, options), lambda: setattr(options, "terminate", True)
            )
        except ort_errors() as error:
            raise EdgeLMError(
                f"onnxruntime failed in the middle: {first_line(error)}; if memory ran out, take a smaller "
                f"context_length or a smaller chunk than {self._ids.size}"
            ) from error


class OnnxRuntimeModel(Runtime):
    """A bundle's graph in ONNX Runtime's CPU provider, with the cache of one sequence."""

    name = "onnxruntime-cpu"
    lengths: str
    """The input that says how much is cached."""

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
        """Numbers of a cache for one head and position, and their type."""

    @abstractmethod
    def _bind_step(self, graph: BoundGraph, tokens: int) -> None:
        """Tell the graph that `tokens` follow the cached ones."""

    @property
    def cache_bytes(self) -> int:
        """Bytes of address space of the whole cache; resident is only what was written."""
        return sum(cache.nbytes for cache in self._caches)

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
    """The input that says how much is cached."""

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
        """What to feed so that `batch` rows of `tokens` begin at position 0."""

    def _run(self, ids: NDArray[np.int64], names: Sequence[str], *, logits: bool) -> list[NDArray[np.float32]]:
        self._weights.check()
        start = np.array([0 if logits else -1], np.int64)
        return self._compute(names, {"input_ids": ids, "logits_start": start, **self._empty_cache(*ids.shape)})

    def _compute(self, names: Sequence[str], feed: dict[str, NDArray[Any]]) -> list[NDArray[np.float32]]:
        """The outputs `names` for inputs of [batch, tokens], from position 0."""
        return [np.asarray(value) for value in self._session.run(names, feed)]

    def _free(self) -> None:
        del self._session
        return_free_memory()
