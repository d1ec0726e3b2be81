"""Runtime of bundles for the target `tensorrt`, using TensorRT or TensorRT-RTX."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgelm.runtimes.base import Runtime, SequenceBatch
from edgelm.runtimes.tensorrt.session import Session

if TYPE_CHECKING:
    from edgelm.bundle import Bundle


class TensorRtBatch(SequenceBatch):
    """A bundle's engine with caches for `batch` sequences. Options and errors as in `Session`."""

    name = "tensorrt"

    def __init__(
        self,
        bundle: Bundle,
        batch: int,
        *,
        context_length: int | None = None,
        chunk: int | None = None,
        kv: str | None = None,
        weight_memory: int | None = None,
    ) -> None:
        self._session = Session(
            bundle, batch=batch, context_length=context_length, chunk=chunk, kv=kv, weight_memory=weight_memory
        )
        super().__init__(batch, threads=None, chunk=self._session.chunk, **self._session.sizes)

    def _prefill(self, row: int, ids: NDArray[np.int64], *, last: bool) -> NDArray[np.float32]:
        del last
        return self._session.prefill(row, ids, self._lengths)

    def _decode(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        return self._session.decode(ids, self._lengths)

    def _free(self) -> None:
        self._session.close()


class TensorRtRuntime(Runtime):
    """A bundle's engine for one sequence. Options and errors as in `Session`."""

    name = "tensorrt"
    batch_class = TensorRtBatch

    def __init__(
        self,
        bundle: Bundle,
        *,
        context_length: int | None = None,
        chunk: int | None = None,
        kv: str | None = None,
        weight_memory: int | None = None,
    ) -> None:
        self._session = Session(
            bundle, batch=1, context_length=context_length, chunk=chunk, kv=kv, weight_memory=weight_memory
        )
        super().__init__(chunk=self._session.chunk, **self._session.sizes)
        self.kv = self._session.info.kv

    def decode(self, token: int) -> NDArray[np.float32]:
        """Append one token."""
        logits: NDArray[np.float32] = self._session.decode(self._checked([token]), self._position)[0]
        self._position += 1
        return logits

    def _prefill(self, ids: NDArray[np.int64], *, last: bool) -> NDArray[np.float32]:
        del last
        return self._session.prefill(0, ids, self._position)

    def _free(self) -> None:
        self._session.close()
