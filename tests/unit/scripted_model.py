"""A runtime that returns given tokens as the most likely ones, for tests of generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from edgelm.bundle import Bundle
from edgelm.generation.language_model import LanguageModel
from edgelm.runtimes import Runtime
from edgelm.tokenization.tokenizer import Tokenizer

END = 2


class Scripted(Runtime):
    """Answers with `tokens`, one per step, after a prompt of `prompt_length`; then repeats the last one.

    `fed` lists its input tokens. `before_step`, if set, is called before each step.
    """

    name = "scripted"

    def __init__(self, tokens: Sequence[int], prompt_length: int = 1, context_length: int = 64) -> None:
        super().__init__(vocab_size=512, context_length=context_length, model_context_length=128, threads=1)
        self.tokens = list(tokens)
        self.start = prompt_length
        self.fed: list[int] = []
        self.before_step: Callable[[], None] = lambda: None

    def decode(self, token: int) -> NDArray[np.float32]:
        return self.prefill([token])

    def _prefill(self, ids: NDArray[np.int64], *, last: bool) -> NDArray[np.float32]:
        self.before_step()
        self.fed += ids.tolist()
        logits = np.zeros(self.vocab_size, np.float32)
        logits[self.tokens[min(self._position + ids.size - self.start, len(self.tokens) - 1)]] = 5
        return logits

    def _free(self) -> None:
        pass


def scripted(bundle: Bundle, text: str, *, end: bool = True, context_length: int = 64) -> LanguageModel:
    """Return a model that answers the prompt "x" with `text`, one token per byte, and then ends."""
    tokenizer = Tokenizer.from_folder(bundle.path)
    tokens = [tokenizer.encode(char)[0] for char in text] + ([END] if end else [])
    return LanguageModel(bundle, Scripted(tokens, 1, context_length), tokenizer)
