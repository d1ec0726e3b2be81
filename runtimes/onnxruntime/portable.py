"""Runtime of bundles with portable operators on the CPU: graphs that need only ONNX Runtime's own operators."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgelm.checkpoint.jsonfile import read_json_object
from edgelm.errors import BundleError
from edgelm.models.config_fields import positive_int
from edgelm.runtimes.base import DEFAULT_CHUNK
from edgelm.runtimes.onnxruntime.session import (
    BoundGraph,
    OnnxRuntimeModel,
    OnnxTracing,
    create_session,
    kv_names,
    require_stored_kv,
    untouched,
)

if TYPE_CHECKING:
    import onnxruntime  # type: ignore[import-untyped]  # it has no type information

    from edgelm.bundle import Bundle

_KV_DTYPES: dict[str, type[np.floating[Any]]] = {"float32": np.float32, "float16": np.float16}


def _kv_dtype(bundle: Bundle) -> type[np.floating[Any]]:
    kind = bundle.manifest.graph.kv_dtype
    if kind not in _KV_DTYPES:
        raise BundleError(
            f"{bundle.path} has a {kind} cache, and portable operators support {', '.join(_KV_DTYPES)}: export it again"
        )
    return _KV_DTYPES[kind]


def _has_8_bit_experts(bundle: Bundle) -> bool:
    model = bundle.manifest.model
    codes = [entry for entry in bundle.manifest.tensors if entry.name.endswith(".moe.gate_up.qweight")]
    if not codes:
        return False
    width = positive_int(read_json_object(bundle.file("config.json")), "intermediate_size")
    return any(entry.size >= model.num_experts * 2 * width * model.hidden_size for entry in codes)


@contextlib.contextmanager
def _float32_experts(bundle: Bundle) -> Iterator[None]:
    """Make QMoE nodes that are created inside compute in float32, like the debug graph's other matmuls.

    The 8-bit kernel of QMoE quantises activations to int8 whatever `accuracy_level` is; its noise of 0.3 % would hide a
    small error of a weight. The 4-bit kernel follows `accuracy_level` and is left on: without it OLMoE takes 20 times
    as long to load.
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


class PortableTracing(OnnxTracing):
    """A bundle's portable debug graph."""

    lengths = "attention_mask"

    def __init__(self, bundle: Bundle, *, threads: int | None = None) -> None:
        self._dtype = _kv_dtype(bundle)
        super().__init__(bundle, threads=threads)

    def _load(self, bundle: Bundle, threads: int) -> onnxruntime.InferenceSession:
        with _float32_experts(bundle):
            return create_session(bundle, bundle.manifest.graph.debug_file, threads)

    def _empty_cache(self, batch: int, tokens: int) -> dict[str, NDArray[Any]]:
        model = self._model
        empty = np.zeros((batch, model.num_kv_heads, 0, model.head_dim), self._dtype)
        names = [past for past, _ in kv_names(model.num_layers)]
        return {"attention_mask": np.ones((batch, tokens), np.int64), **dict.fromkeys(names, empty)}


class PortableRuntime(OnnxRuntimeModel):
    """A bundle's portable graph. The cache type is that of the graph; `kv` may only name it."""

    tracing_class = PortableTracing
    lengths = "attention_mask"

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        context_length: int | None = None,
        chunk: int = DEFAULT_CHUNK,
        kv: str | None = None,
    ) -> None:
        require_stored_kv(bundle, kv, ", or export with --ops native")
        self.kv = bundle.manifest.graph.kv_dtype
        super().__init__(bundle, threads=threads, context_length=context_length, chunk=chunk)
        self._mask = untouched((self.context_length,), np.int64)

    def _session(self, bundle: Bundle) -> onnxruntime.InferenceSession:
        return create_session(bundle, bundle.manifest.graph.file, self.threads)

    def _cache_row(self, bundle: Bundle) -> tuple[int, type[np.generic]]:
        return bundle.manifest.model.head_dim, _kv_dtype(bundle)

    def _bind_step(self, graph: BoundGraph, tokens: int) -> None:
        end = self._position + tokens
        self._mask[self._position : end] = 1
        graph.bind_input("attention_mask", self._mask, (1, end))

    def _rows(self, cache: NDArray[Any], length: int, *, keys: bool) -> NDArray[np.uint8]:
        del keys
        return np.ascontiguousarray(cache[:, :length]).view(np.uint8)

    def _set_rows(self, cache: NDArray[Any], rows: NDArray[np.uint8], *, keys: bool) -> None:
        del keys
        cache[:, : rows.shape[1]] = rows.view(cache.dtype)

    def _load(self, length: int, read: Callable[[int], NDArray[np.uint8]]) -> None:
        super()._load(length, read)
        self._mask[:length] = 1
