"""Bundles for `tensorrt`, run by TensorRT or TensorRT-RTX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgelm.devices import allowed_cores
from edgelm.errors import EdgeLMError, GenerationError
from edgelm.runtimes.base import Runtime, SequenceBatch, checked_tokens, context_full
from edgelm.runtimes.tensorrt.session import Session

if TYPE_CHECKING:
    from edgelm.bundle import Bundle

NAME = "tensorrt"


def open(bundle: Bundle, **options: Any) -> TensorRtRuntime:  # noqa: A001 - the name the registry calls
    """Load the bundle's engine for this device; the options are those of `TensorRtRuntime`."""
    return TensorRtRuntime(bundle, **options)


def open_batch(bundle: Bundle, batch: int, **options: Any) -> TensorRtBatch:
    """Load the bundle's engine for several sequences; the options are those of `TensorRtRuntime`."""
    return TensorRtBatch(bundle, batch, **options)


class TensorRtRuntime(Runtime):
    """A bundle's engine with the cache of one sequence; options and errors as for `Session`."""

    name = NAME

    def __init__(
        self,
        bundle: Bundle,
        *,
        context_length: int | None = None,
        chunk: int | None = None,
        kv: str | None = None,
        weight_budget: int | None = None,
    ) -> None:
        self._session = Session(
            bundle, batch=1, context_length=context_length, chunk=chunk, kv=kv, weight_budget=weight_budget
        )
        super().__init__(
            vocab_size=self._session.vocab_size,
            context_length=self._session.context_length,
            model_context_length=self._session.model_context_length,
            threads=allowed_cores(),
        )
        self.chunk = self._session.chunk
        self.kv = self._session.info.kv

    def prefill(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Append tokens, `chunk` at a time."""
        ids = self._checked(tokens)
        self._session.lengths[0] = self._position
        logits = self._session.prefill(0, ids)
        self._position += ids.size
        return logits

    def decode(self, token: int) -> NDArray[np.float32]:
        """Append one token."""
        ids = self._checked([token])
        self._session.lengths[0] = self._position
        logits: NDArray[np.float32] = self._session.decode(ids)[0]
        self._position += 1
        return logits

    def close(self) -> None:
        """Free the engine and everything on the device."""
        if not self._closed:
            self._closed = True
            self._session.close()


class TensorRtBatch(SequenceBatch):
    """A bundle's engine with the caches of `batch` sequences; options and errors as for `Session`."""

    name = NAME

    def __init__(
        self,
        bundle: Bundle,
        batch: int,
        *,
        context_length: int | None = None,
        chunk: int | None = None,
        kv: str | None = None,
        weight_budget: int | None = None,
    ) -> None:
        self._session = Session(
            bundle, batch=batch, context_length=context_length, chunk=chunk, kv=kv, weight_budget=weight_budget
        )
        self.batch = batch
        self.threads = allowed_cores()
        self.vocab_size = self._session.vocab_size
        self.context_length = self._session.context_length
        self._closed = False

    @property
    def lengths(self) -> NDArray[np.int64]:
        """How many tokens of each sequence are cached, [batch]."""
        return self._session.lengths.astype(np.int64)

    def prefill(self, row: int, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Append tokens to one sequence, `chunk` at a time."""
        self._require(row)
        ids = checked_tokens(tokens, self.vocab_size)
        self._require_room(row, ids.size)
        return self._session.prefill(row, ids)

    def decode_batch(self, tokens: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
        """Append one token to every sequence."""
        self._require(0)
        ids = checked_tokens(tokens, self.vocab_size)
        if ids.size != self.batch:
            raise GenerationError(f"{ids.size} tokens for {self.batch} sequences: give one to each")
        self._require_room(int(self._session.lengths.argmax()), 1)
        return self._session.decode(ids)

    def truncate(self, row: int, length: int) -> None:
        """Keep the first cached tokens of one sequence."""
        self._require(row)
        if not 0 <= length <= self._session.lengths[row]:
            raise GenerationError(f"cannot keep {length} cached tokens: {self._session.lengths[row]} are cached")
        self._session.lengths[row] = length

    def close(self) -> None:
        """Free the engine and everything on the device."""
        if not self._closed:
            self._closed = True
            self._session.close()

    def _require(self, row: int) -> None:
        if self._closed:
            raise EdgeLMError("this batch was closed: load the bundle again")
        if not 0 <= row < self.batch:
            raise GenerationError(f"there is no sequence {row}: there are 0..{self.batch - 1}")

    def _require_room(self, row: int, tokens: int) -> None:
        length = int(self._session.lengths[row])
        if length + tokens > self.context_length:
            raise context_full(tokens, length, self.context_length, self._session.model_context_length)
