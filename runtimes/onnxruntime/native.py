"""Bundles with native operators: EdgeLM's own compiled ones, registered with ONNX Runtime, on the processor.

Weights are used where the file is mapped. The cache is bytes whose row says what it holds (`edgelm.bundle.kv_cache`),
chosen when a bundle is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgelm.bundle.kv_cache import require_type, row_bytes
from edgelm.devices import allowed_cores, return_free_memory
from edgelm.errors import EdgeLMError, GenerationError, RuntimeUnavailableError
from edgelm.runtimes.base import DEFAULT_CHUNK, SequenceBatch, checked_tokens, choose_context_length, context_full
from edgelm.runtimes.onnxruntime.native_library import describe_cpu
from edgelm.runtimes.onnxruntime.session import (
    BoundGraph,
    MappedWeights,
    OnnxRuntimeModel,
    OnnxTracing,
    check_graph,
    create_session,
    first_line,
    kv_names,
    ort_errors,
    untouched,
)

if TYPE_CHECKING:
    import onnxruntime  # type: ignore[import-untyped]  # it has no type information

    from edgelm.bundle import Bundle

_LENGTHS = "past_lengths"


def open(bundle: Bundle, **options: Any) -> NativeRuntime:  # noqa: A001 - the name the registry calls
    """Load the bundle's graph; the options are those of `NativeRuntime`."""
    return NativeRuntime(bundle, **options)


def open_batch(bundle: Bundle, batch: int, **options: Any) -> NativeBatch:
    """Load the bundle's graph for several sequences; the options are those of `NativeRuntime`."""
    return NativeBatch(bundle, batch, **options)


def open_tracing(bundle: Bundle, *, threads: int | None = None) -> NativeTracing:
    """Load the bundle's debug graph."""
    return NativeTracing(bundle, threads=threads)


def _load(bundle: Bundle, file: str, threads: int) -> onnxruntime.InferenceSession:
    """Load one of the bundle's graphs with the compiled operators.

    Raises:
        RuntimeUnavailableError: there are none here, or not for this processor.
        BundleError: ONNX Runtime cannot load the graph.
    """
    found = describe_cpu()
    if found.library is None:
        raise RuntimeUnavailableError(
            f"{bundle.path} was exported for the compiled operators, which this installation lacks: install edgelm "
            "again where there is a C++ compiler (and without EDGELM_PURE), or export with --ops portable"
        )
    if found.chosen is None:
        raise RuntimeUnavailableError(found.why)

    def register(options: Any) -> None:
        try:
            options.register_custom_ops_library(found.library)
        except ort_errors() as error:
            raise RuntimeUnavailableError(
                f"onnxruntime cannot use {found.library}: {first_line(error)}; install edgelm again, or export with "
                "--ops portable"
            ) from error

    return create_session(bundle, file, threads, register)


class NativeRuntime(OnnxRuntimeModel):
    """A bundle's native graph.

    `kv`: the cache's type, one of `edgelm.bundle.kv_cache.KV_TYPES`; default the bundle's.
    """

    lengths = _LENGTHS

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        context_length: int | None = None,
        chunk: int = DEFAULT_CHUNK,
        kv: str | None = None,
    ) -> None:
        self.kv = require_type(kv or bundle.manifest.graph.kv_dtype)
        self._bundle = bundle
        self._row_bytes = row_bytes(self.kv, bundle.manifest.model.head_dim)
        super().__init__(bundle, threads=threads, context_length=context_length, chunk=chunk)

    def open_batch(self, batch: int, context_length: int) -> NativeBatch:
        """Caches for several sequences over this runtime's session."""
        self._require_open()
        return NativeBatch(
            self._bundle, batch, threads=self.threads, context_length=context_length, chunk=self.chunk, kv=self.kv,
            graph=self._graph,
        )  # fmt: skip

    def _session(self, bundle: Bundle) -> onnxruntime.InferenceSession:
        return _load(bundle, bundle.manifest.graph.file, self.threads)

    def _bind_caches(self, graph: BoundGraph, bundle: Bundle) -> list[NDArray[Any]]:
        model = bundle.manifest.model
        self._lengths = np.zeros(1, np.int64)
        graph.bind_input(_LENGTHS, self._lengths, (1,))
        shape = (1, model.num_kv_heads, self.context_length, self._row_bytes)
        caches = []
        for past, present in kv_names(model.num_layers):
            cache = untouched(shape, np.uint8)
            graph.bind_input(past, cache, shape)
            graph.bind_output(present, cache, shape)
            caches.append(cache)
        return caches

    def _bind_step(self, graph: BoundGraph, tokens: int) -> None:
        del graph, tokens
        self._lengths[0] = self._position


class NativeBatch(SequenceBatch):
    """A bundle's native graph with the caches of `batch` sequences; the other options are those of `NativeRuntime`.

    `graph`: of a runtime whose session this is to use; None loads one.
    """

    name = "onnxruntime-cpu"

    def __init__(
        self,
        bundle: Bundle,
        batch: int,
        *,
        threads: int | None = None,
        context_length: int | None = None,
        chunk: int = DEFAULT_CHUNK,
        kv: str | None = None,
        graph: BoundGraph | None = None,
    ) -> None:
        model = bundle.manifest.model
        for name, value in (("batch", batch), ("chunk", chunk)):
            if value < 1:
                raise EdgeLMError(f"{name} is {value}: give 1 or more")
        self.batch = batch
        self.vocab_size = model.vocab_size
        self.context_length = choose_context_length(context_length, model.context_length)
        self.model_context_length = model.context_length
        self.threads = allowed_cores() if threads is None else threads
        self.kv = require_type(kv or bundle.manifest.graph.kv_dtype)
        self._chunk = min(chunk, self.context_length)
        shape = (batch, model.num_kv_heads, self.context_length, row_bytes(self.kv, model.head_dim))
        if graph is None:
            weights = MappedWeights(bundle)
            session = _load(bundle, bundle.manifest.graph.file, self.threads)
            check_graph(session, bundle, _LENGTHS)
            graph = BoundGraph(session, weights, batch=batch, chunk=self._chunk, vocab_size=self.vocab_size)
        else:
            graph = graph.another(batch=batch, chunk=self._chunk)
        self._graph: BoundGraph | None = graph
        self._names = kv_names(model.num_layers)
        self._caches = [untouched(shape, np.uint8) for _ in self._names]
        self._lengths = np.zeros(batch, np.int64)
        self._rows = slice(0, 0)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """How many tokens of each sequence are cached, [batch]."""
        return self._lengths.copy()

    def prefill(self, row: int, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Append tokens to one sequence, `chunk` at a time."""
        self._require_row(row)
        ids = checked_tokens(tokens, self.vocab_size)
        self._require_room(row, ids.size)
        for begin in range(0, ids.size, self._chunk):
            logits = self._step(slice(row, row + 1), ids[None, begin : begin + self._chunk])
        last: NDArray[np.float32] = logits[0]
        return last

    def decode_batch(self, tokens: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
        """Append one token to every sequence."""
        ids = checked_tokens(tokens, self.vocab_size)
        if ids.size != self.batch:
            raise GenerationError(f"{ids.size} tokens for {self.batch} sequences: give one to each")
        self._require_room(int(self._lengths.argmax()), 1)
        return self._step(slice(0, self.batch), ids[:, None])

    def truncate(self, row: int, length: int) -> None:
        """Keep the first cached tokens of one sequence."""
        self._require_row(row)
        if not 0 <= length <= self._lengths[row]:
            raise GenerationError(f"cannot keep {length} cached tokens: {self._lengths[row]} are cached")
        self._lengths[row] = length

    def close(self) -> None:
        """Free the session and the caches."""
        self._graph = None
        self._caches = []
        return_free_memory()

    def _require_row(self, row: int) -> None:
        if not 0 <= row < self.batch:
            raise GenerationError(f"there is no sequence {row}: there are 0..{self.batch - 1}")

    def _require_room(self, row: int, tokens: int) -> None:
        length = int(self._lengths[row])
        if length + tokens > self.context_length:
            raise context_full(tokens, length, self.context_length, self.model_context_length)

    def _step(self, rows: slice, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Run ids [rows, T] on those sequences: logits [rows, V]."""
        graph = self._graph
        if graph is None:
            raise EdgeLMError("this batch was closed: load the bundle again")
        if rows != self._rows:
            # The batch is the outermost axis of a cache: any rows of it are one piece of memory.
            graph.bind_input(_LENGTHS, self._lengths[rows], ids.shape[:1])
            for (past, present), cache in zip(self._names, self._caches, strict=True):
                mine = cache[rows]
                graph.bind_input(past, mine, mine.shape)
                graph.bind_output(present, mine, mine.shape)
            self._rows = rows
        logits = graph.step(ids)
        self._lengths[rows] += ids.shape[1]
        return logits


class NativeTracing(OnnxTracing):
    """A bundle's native debug graph, with a float32 cache."""

    lengths = _LENGTHS

    def __init__(self, bundle: Bundle, *, threads: int | None = None) -> None:
        self._row = row_bytes("float32", bundle.manifest.model.head_dim)
        super().__init__(bundle, threads=threads)

    def _load(self, bundle: Bundle, threads: int) -> onnxruntime.InferenceSession:
        return _load(bundle, bundle.manifest.graph.debug_file, threads)

    def _empty_cache(self, batch: int, tokens: int) -> dict[str, NDArray[Any]]:
        model = self._model
        empty = untouched((batch, model.num_kv_heads, tokens, self._row), np.uint8)
        names = [past for past, _ in kv_names(model.num_layers)]
        return {_LENGTHS: np.zeros(batch, np.int64), **dict.fromkeys(names, empty)}
