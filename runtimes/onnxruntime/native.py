"""Runtime of bundles with native operators on the CPU: EdgeLM's compiled operators, registered with ONNX Runtime.

Weights are used directly from the mapped file. The KV cache is bytes whose row size determines its type
(`edgelm.bundle.kv_cache`); the type is chosen when a bundle is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgelm.bundle.kv_cache import require_type, row_bytes
from edgelm.devices import return_free_memory
from edgelm.errors import RuntimeUnavailableError
from edgelm.runtimes.base import DEFAULT_CHUNK, SequenceBatch, model_sizes
from edgelm.runtimes.onnxruntime.cache_rows import TILE, CacheRows
from edgelm.runtimes.onnxruntime.native_library import ExactLogits, describe_cpu
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


def _load(bundle: Bundle, file: str, threads: int) -> onnxruntime.InferenceSession:
    """Load one of the bundle's graphs with the compiled operators.

    Raises:
        RuntimeUnavailableError: there are no compiled operators, or none for this CPU.
        BundleError: ONNX Runtime cannot load the graph.
    """
    found = describe_cpu()
    if found.library is None:
        raise RuntimeUnavailableError(
            f"{bundle.path} needs the compiled operators, which this installation lacks: install edgelm "
            "again with a C++ compiler (and without EDGELM_PURE), or export with --ops portable"
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


class NativeBatch(SequenceBatch):
    """A bundle's native graph with caches for `batch` sequences. Other options as in `NativeRuntime`.

    `graph`: the graph of a runtime, whose session is shared; None: load a session.
    """

    name = "onnxruntime-cpu"
    moves = True
    least_step = 9  # docs/reference/operators.md, "The same bytes": up to 8 new tokens attention sums in another order
    block_tokens = TILE

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
        super().__init__(batch, threads=threads, chunk=chunk, **model_sizes(bundle, context_length))
        model = bundle.manifest.model
        self.kv = require_type(kv or bundle.manifest.graph.kv_dtype)
        shape = (batch, model.num_kv_heads, self.context_length, row_bytes(self.kv, model.head_dim))
        if graph is None:
            weights = MappedWeights(bundle)
            session = _load(bundle, bundle.manifest.graph.file, self.threads)
            check_graph(session, bundle, _LENGTHS)
            graph = BoundGraph(
                session, weights, batch=batch, chunk=self.chunk, vocab_size=self.vocab_size, around=ExactLogits().call
            )
        else:
            graph = graph.another(batch=batch, chunk=self.chunk, around=ExactLogits().call)
        self._graph = graph
        self._caches = [untouched(shape, np.uint8) for _ in range(2 * model.num_layers)]
        self._rows = slice(0, 0)

    def _prefill(self, row: int, ids: NDArray[np.int64], *, last: bool) -> NDArray[np.float32]:
        del last
        logits: NDArray[np.float32] = self._step(slice(row, row + 1), ids[None, :])[0]
        return logits

    def _decode(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        return self._step(slice(0, ids.size), ids[:, None])

    def _move(self, source: int, target: int, length: int) -> None:
        end = -(-length // TILE) * TILE  # the bytes of the last tile's tokens lie anywhere in it
        for cache in self._caches:
            cache[target, :, :end] = cache[source, :, :end]

    def copied_bytes(self, tokens: int) -> int:
        """Return the number of bytes of the cache of `tokens` tokens."""
        return sum(cache[0, :, :1].nbytes for cache in self._caches) * tokens

    def _read_cache(self, row: int, begin: int, end: int) -> NDArray[np.uint8]:
        data = np.empty((len(self._caches), *self._caches[0][row, :, begin:end].shape), np.uint8)
        for cache, part in zip(self._caches, data, strict=True):
            part[:] = cache[row, :, begin:end]
        return data.reshape(-1)

    def _write_cache(self, row: int, begin: int, end: int, data: NDArray[np.uint8]) -> None:
        shape = self._caches[0][row, :, begin:end].shape
        for cache, part in zip(self._caches, data.reshape(len(self._caches), *shape), strict=True):
            cache[row, :, begin:end] = part

    def _step(self, rows: slice, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Run ids [rows, T] on the sequences `rows`; return logits [rows, V]."""
        if rows != self._rows:
            # The batch is the outermost axis of a cache, so consecutive rows are contiguous memory.
            self._graph.bind_input(_LENGTHS, self._lengths[rows], ids.shape[:1])
            self._graph.bind_caches([cache[rows] for cache in self._caches])
            self._rows = rows
        return self._graph.step(ids)

    def _free(self) -> None:
        del self._graph
        self._caches = []
        return_free_memory()


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


class NativeRuntime(OnnxRuntimeModel):
    """A bundle's native graph.

    `kv`: type of the KV cache, one of `edgelm.bundle.kv_cache.KV_TYPES`; default the bundle's.
    """

    batch_class = NativeBatch
    tracing_class = NativeTracing
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
        super().__init__(bundle, threads=threads, context_length=context_length, chunk=chunk)
        self._cache_rows = CacheRows(self.kv, bundle.manifest.model.head_dim, self.context_length)
        self._lengths = np.zeros(1, np.int64)
        self._graph.bind_input(_LENGTHS, self._lengths, (1,))

    def open_batch(self, batch: int, context_length: int) -> NativeBatch:
        """Return caches for several sequences that share this runtime's session."""
        self._require_open()
        return self.batch_class(
            self._bundle, batch, threads=self.threads, context_length=context_length, chunk=self.chunk, kv=self.kv,
            graph=self._graph,
        )  # fmt: skip

    def _session(self, bundle: Bundle) -> onnxruntime.InferenceSession:
        return _load(bundle, bundle.manifest.graph.file, self.threads)

    def _cache_row(self, bundle: Bundle) -> tuple[int, type[np.generic]]:
        return row_bytes(self.kv, bundle.manifest.model.head_dim), np.uint8

    def _bind_step(self, graph: BoundGraph, tokens: int) -> None:
        del graph, tokens
        self._lengths[0] = self._position

    def _rows(self, cache: NDArray[Any], length: int, *, keys: bool) -> NDArray[np.uint8]:
        return self._cache_rows.pack(cache, length, keys=keys)

    def _set_rows(self, cache: NDArray[Any], rows: NDArray[np.uint8], *, keys: bool) -> None:
        self._cache_rows.unpack(cache, rows, keys=keys)
