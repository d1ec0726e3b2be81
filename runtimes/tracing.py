"""Base class of runtimes for a bundle's debug graph: token ids in, hidden states and router logits of every layer
out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgelm.runtimes.base import Closable, checked_tokens, context_full

if TYPE_CHECKING:
    from edgelm.bundle import Bundle


@dataclass(frozen=True)
class Trace:
    """Values of the debug graph at every position of a text of T tokens.

    `logits` [T, V], None if not requested; `hidden`: L + 1 arrays [T, D], the embedding's output and the
    residual stream after each layer; `router_logits`: L arrays [T, E], empty for a dense model.
    """

    logits: NDArray[np.float32] | None
    hidden: list[NDArray[np.float32]]
    router_logits: list[NDArray[np.float32]]


class TracingModel(Closable):
    """A bundle's loaded debug graph. It takes as much memory as the main graph: close that one first.

    Its matmuls are computed in float32, so it differs from the quantised reference only by rounding.
    """

    kind = "tracing runtime"

    def __init__(self, bundle: Bundle) -> None:
        self._model = bundle.manifest.model
        layers = self._model.num_layers
        routers = [f"router_logits.{i}" for i in range(layers)] if self._model.num_experts else []
        self.traced = (*(f"hidden.{i}" for i in range(layers + 1)), *routers)
        """Names of the returned values, without logits."""

    @abstractmethod
    def _run(self, ids: NDArray[np.int64], names: Sequence[str], *, logits: bool) -> list[NDArray[np.float32]]:
        """Run ids [B, T] from position 0; return the values `names`, each with B * T rows.

        The first name is "logits"; that value may be incomplete unless `logits` is true.
        """

    def trace(self, tokens: Sequence[int], *, logits: bool = True) -> Trace:
        """Run `tokens` from position 0 in one pass. `logits=False` saves their memory, [T, V] float32.

        Raises:
            ContextLengthError, GenerationError: as `Runtime.prefill`, against the model's own context length.
        """
        return self.trace_all([tokens], logits=logits)[0]

    def trace_all(self, texts: Sequence[Sequence[int]], *, logits: bool = True) -> list[Trace]:
        """Run several texts in one pass over the weights, each from position 0.

        Shorter ones are padded at the end: attention is causal, so earlier positions are not affected. Memory grows
        with the number of texts times the longest. Raises as `trace`.
        """
        self._require_open()
        model = self._model
        parts = [checked_tokens(tokens, model.vocab_size) for tokens in texts]
        longest = max(part.size for part in parts)
        if longest > model.context_length:
            raise context_full(longest, 0, model.context_length, model.context_length)
        ids = np.stack([np.pad(part, (0, longest - part.size), mode="edge") for part in parts])
        first, *values = self._run(ids, ["logits", *self.traced], logits=logits)
        every = first.reshape(len(parts), longest, -1) if logits else None
        rows = [value.reshape(len(parts), longest, -1) for value in values]
        routers = model.num_layers + 1

        def of(number: int, arrays: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
            return [array[number, : parts[number].size] for array in arrays]

        return [
            Trace(
                logits=None if every is None else every[number, : parts[number].size],
                hidden=of(number, rows[:routers]),
                router_logits=of(number, rows[routers:]),
            )
            for number in range(len(parts))
        ]
