"""Reasoning: what a model writes between `<think>` and `</think>` before its answer.

DeepSeek-R1, QwQ, Qwen3 and models made from them write it so. Clients get it in a field of its own, as of llama.cpp's
and DeepSeek's servers (`reasoning_content`), and a grammar holds for the answer after it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgelm.serving.constraints.vocabulary import special_ids

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgelm.generation.scheduler import LogitsRule
    from edgelm.tokenization.tokenizer import Tokenizer

BEGIN, END = "<think>", "</think>"
_TAIL = 16
"""Tokens in which the end of a prompt and the markers are looked for; a marker has 7 or 8 characters."""


@dataclass(frozen=True)
class ReasoningDelta:
    """A piece of the reasoning."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """How an answer's reasoning is found.

    Attributes:
        began: whether the prompt ends with `<think>`, so that the answer begins with reasoning.
    """

    began: bool

    @staticmethod
    def of(source: str, prompt: Sequence[int], tokenizer: Tokenizer) -> Reasoning | None:
        """Return how an answer reasons; None if it does not.

        Args:
            source: the chat template: models that reason have `</think>` in it.
            prompt: the prompt's ids; one that ends with `</think>` leaves the reasoning out.
            tokenizer: the bundle's tokenizer.
        """
        if END not in source:
            return None
        tail = tokenizer.decode(prompt[-_TAIL:], skip_special=False).rstrip()
        return None if tail.endswith(END) else Reasoning(tail.endswith(BEGIN))

    def shown(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Return the special tokens that the parser needs in the text, for `LanguageModel.continuation`."""
        return special_ids((BEGIN, END), tokenizer)

    def parser(self) -> ReasoningParser:
        """Return a parser for one answer."""
        return ReasoningParser(began=self.began)

    def grammar_rule(self, rule: LogitsRule, tokenizer: Tokenizer) -> LogitsRule:
        """Return a grammar's rule for answers that may begin with reasoning.

        If the prompt began the reasoning, the grammar holds after it. If not, it holds from the first token on, and the
        model does not reason.
        """
        return AfterReasoning(rule, tokenizer) if self.began else rule


class ReasoningParser:
    """Splits one answer into reasoning and content. The result does not depend on how the text is cut into pieces.

    Whitespace around the reasoning is no part of either.
    """

    def __init__(self, *, began: bool) -> None:
        self._marker = END if began else BEGIN  # the one that is looked for; "": none any more
        self._held = ""
        self._said = False  # there was reasoning, or content after it

    @property
    def inside(self) -> bool:
        """Whether the reasoning has begun and not ended."""
        return self._marker == END

    def feed(self, text: str) -> tuple[str, str]:
        """Read the next piece of the answer; return the reasoning and the content that are certain now."""
        thought = content = ""
        held, self._held = self._held + text, ""
        if self._marker == BEGIN:
            start = held.lstrip()
            if start.startswith(BEGIN):
                held, self._marker = start[len(BEGIN) :], END
            elif BEGIN.startswith(start):
                self._held = held
                return "", ""
            else:
                self._marker, self._said = "", True
        if self._marker == END:
            if not self._said:
                held = held.lstrip()
            before, found, after = held.partition(END)
            if found:
                thought, held, self._marker, self._said = before.rstrip(), after, "", False
            else:
                keep = next((n for n in range(len(END) - 1, 0, -1) if held.endswith(END[:n])), 0)
                thought = held[: len(held) - keep].rstrip()
                self._held, held = held[len(thought) :], ""
                self._said = self._said or bool(thought)
        if not self._marker:
            content = held if self._said else held.lstrip()
            self._said = self._said or bool(content)
        return thought, content

    def finish(self) -> tuple[str, str]:
        """End the answer; return the rest of the reasoning and of the content."""
        held, self._held = self._held, ""
        return (held.rstrip(), "") if self._marker == END else ("", held)


class AfterReasoning:
    """A `LogitsRule` that holds from the token after `</think>` on."""

    def __init__(self, rule: LogitsRule, tokenizer: Tokenizer) -> None:
        self._rule, self._tokenizer = rule, tokenizer
        self._tail: deque[int] = deque(maxlen=_TAIL)
        self._holds = False

    def apply(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the logits [V] to choose by. Raises as the rule."""
        return self._rule.apply(logits) if self._holds else logits.copy()

    def accept(self, token: int) -> None:
        """Take note of the token that was chosen."""
        if self._holds:
            self._rule.accept(token)
            return
        self._tail.append(token)
        self._holds = END in self._tokenizer.decode(self._tail, skip_special=False)
