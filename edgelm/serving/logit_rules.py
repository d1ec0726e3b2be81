"""Rules that change the logits of one sequence: OpenAI's penalties and biases. See `LogitsRule` in the scheduler."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray


class Penalties:
    """Frequency and presence penalty, of generated tokens alone, as OpenAI documents them.

    logit -= frequency * (how often the token was generated) + presence * (whether it was).
    """

    def __init__(self, frequency: float, presence: float) -> None:
        self._frequency, self._presence = frequency, presence
        self._counts: dict[int, int] = {}

    def apply(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the logits with the penalties subtracted."""
        if not self._counts:
            return logits
        tokens = np.fromiter(self._counts, np.int64, len(self._counts))
        counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
        result = logits.copy()
        result[tokens] -= (np.float32(self._frequency) * counts + np.float32(self._presence)).astype(np.float32)
        return result

    def accept(self, token: int) -> None:
        """Count the chosen token."""
        self._counts[token] = self._counts.get(token, 0) + 1


class Bias:
    """A number that is added to the logits of some tokens."""

    def __init__(self, biases: Mapping[int, float]) -> None:
        self._tokens = np.fromiter(biases, np.int64, len(biases))
        self._values = np.fromiter(biases.values(), np.float32, len(biases))

    def apply(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the logits with the biases added."""
        result = logits.copy()
        result[self._tokens] += self._values
        return result

    def accept(self, token: int) -> None:
        """Do nothing: the biases stay."""
        del token


class NoEnd:
    """Keeps the model from ending the text.

    Args:
        end_ids: the tokens that end a text.
        least: tokens after which it may end; None: never.
    """

    def __init__(self, end_ids: Iterable[int], least: int | None) -> None:
        self._ends = np.array(sorted(end_ids), np.int64)
        self._least, self._count = least, 0

    def apply(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the logits, without the end tokens while the text is too short."""
        if self._least is not None and self._count >= self._least:
            return logits
        result = logits.copy()
        result[self._ends] = -np.inf
        return result

    def accept(self, token: int) -> None:
        """Count the chosen token."""
        del token
        self._count += 1
