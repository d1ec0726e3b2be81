"""A runtime without batches as a batch of one sequence, so that an engine serves every bundle."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgelm.runtimes import Runtime, SequenceBatch


class SingleSequence(SequenceBatch):
    """The one sequence of `runtime`, whose KV cache it uses. The runtime is closed by its owner."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(
            1,
            threads=runtime.threads,
            chunk=runtime.chunk,
            vocab_size=runtime.vocab_size,
            context_length=runtime.context_length,
            model_context_length=runtime.model_context_length,
        )
        self.name = runtime.name
        self._runtime = runtime
        runtime.reset()

    def truncate(self, row: int, length: int) -> None:
        """Keep the first `length` cached tokens."""
        super().truncate(row, length)
        self._runtime.truncate(length)

    def _prefill(self, row: int, ids: NDArray[np.int64], *, last: bool) -> NDArray[np.float32]:
        del row, last
        return self._runtime.prefill(ids.tolist())

    def _decode(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        return self._runtime.decode(int(ids[0]))[None]

    def _free(self) -> None:
        pass
