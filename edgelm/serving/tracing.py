"""Hidden states and router logits, from the debug graph of a bundle. One is open at a time, and closed when idle."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import EdgeLMError
from edgelm.json_dataclass import ErrorFactory, read_json
from edgelm.serving.api.errors import ApiError

if TYPE_CHECKING:
    from edgelm.bundle import Bundle
    from edgelm.runtimes.tracing import Trace, TracingModel
    from edgelm.serving.models import ServedModel

IDLE_SECONDS = 120.0
BATCH_TOKENS = 8192
"""Tokens of a pass, with padding."""


class Tracer:
    """Runs texts through debug graphs, one request at a time, in a thread of its own.

    Args:
        threads: CPU threads; None: the runtime's default.
    """

    def __init__(self, threads: int | None) -> None:
        self._threads = threads
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="edgelm-tracing")
        self._opened: tuple[str, TracingModel] | None = None
        self._idle: asyncio.TimerHandle | None = None

    async def trace(self, model: ServedModel, texts: Sequence[Sequence[int]]) -> list[Trace]:
        """Return what the debug graph of a loaded model computes for each text, without logits.

        Raises:
            ApiError: the model's runtime has no debug graph.
            EdgeLMError: the graph cannot be loaded, or a text is too long for the model.
        """
        loop = asyncio.get_running_loop()
        if self._idle is not None:
            self._idle.cancel()
        try:
            return await loop.run_in_executor(self._worker, self._trace, model, texts)
        finally:
            self._idle = loop.call_later(IDLE_SECONDS, self._worker.submit, self._free)

    def _trace(self, model: ServedModel, texts: Sequence[Sequence[int]]) -> list[Trace]:
        opened = self._open(model)
        # Of similar lengths together: shorter ones are padded.
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        found: dict[int, Trace] = {}
        while order:
            longest = len(texts[order[-1]])
            count = max(1, min(len(order), BATCH_TOKENS // longest))
            together, order = order[-count:], order[:-count]
            traces = opened.trace_all([texts[index] for index in together], logits=False)
            found.update(zip(together, traces, strict=True))
        return [found[index] for index in range(len(texts))]

    def _open(self, model: ServedModel) -> TracingModel:
        from edgelm.runtimes.registry import open_tracing

        if self._opened is None or self._opened[0] != model.name:
            self._free()
            runtime = model.running.model.runtime.name
            opened = open_tracing(model.bundle, runtime, threads=self._threads)
            if opened is None:
                raise ApiError(400, f"{model.name} runs with {runtime}, which shows no hidden states", param="model")
            self._opened = (model.name, opened)
        return self._opened[1]

    def _free(self) -> None:
        if self._opened is not None:
            self._opened[1].close()
            self._opened = None

    def close(self) -> None:
        """Free the memory; waits for the request that runs."""
        if self._idle is not None:
            self._idle.cancel()
        self._worker.submit(self._free)
        self._worker.shutdown()


class FinalNorm:
    """The norm before the head, RMSNorm: x / sqrt(mean(x^2) + eps) * weight. A debug graph ends before it.

    Raises:
        EdgeLMError: the bundle does not have its weights in float32 or bfloat16.
    """

    def __init__(self, bundle: Bundle) -> None:
        from edgelm.models import decoder

        config = read_json(bundle.file("config.json"), ErrorFactory(EdgeLMError, "export the bundle again"))
        norm = decoder(config).norm
        entry = next((tensor for tensor in bundle.manifest.tensors if tensor.name == norm.name), None)
        if entry is None or entry.size not in (4 * norm.size, 2 * norm.size):
            raise EdgeLMError(f"{bundle.path} has no weights of the final norm, {norm.name}, that can be read")
        with bundle.file(bundle.manifest.graph.weights_file).open("rb") as stream:
            stream.seek(entry.offset)
            data = stream.read(entry.size)
        self._eps, self._weight = norm.eps, _floats(data, norm.size)

    def __call__(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return [T, D] normed."""
        scale = 1 / np.sqrt(np.square(hidden, dtype=np.float32).mean(axis=-1, keepdims=True) + np.float32(self._eps))
        result: NDArray[np.float32] = hidden * scale * self._weight
        return result


def _floats(data: bytes, size: int) -> NDArray[np.float32]:
    if len(data) == 4 * size:
        return np.frombuffer(data, "<f4").astype(np.float32)
    upper: NDArray[Any] = np.frombuffer(data, "<u2").astype(np.uint32) << 16  # bfloat16 is the upper half of float32
    return upper.view(np.float32)
