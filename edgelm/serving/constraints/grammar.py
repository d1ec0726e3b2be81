"""Compiled grammars, and the rule that keeps one answer inside its grammar."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import llguidance
import numpy as np
from numpy.typing import NDArray

from edgelm.errors import GenerationError, GenerationValueError
from edgelm.serving.constraints.messages import one_line

LIMITS = llguidance.LLParserLimits(max_lexer_states=50_000, verbose_errors=False)
"""llguidance's own limits on the work for a token and on the size of a grammar, with at most 100 MB of lexer states."""
_FORBIDDEN = np.float32(-np.inf)


@dataclass(frozen=True)
class Start:
    """How the first token is matched where decoding drops the space at the beginning of a text.

    Attributes:
        matcher: the grammar, for the vocabulary without these spaces.
        texts: the bytes of that vocabulary's tokens.
        later: the vocabulary of the other tokens.
        special: ids that are not text.
        no_op: ids that add nothing to the text as its first token: the space alone.
    """

    matcher: Any
    texts: Sequence[bytes]
    later: Any
    special: frozenset[int]
    no_op: frozenset[int]

    def tokens(self, token: int) -> list[int]:
        """Return the later tokens that add the same text as `token` does at the beginning."""
        if token in self.special:
            return [token]
        if token in self.no_op:
            return []
        return list(self.later.tokenize_bytes(self.texts[token]))


class Grammar:
    """A compiled grammar. It does not change, and threads may share it."""

    def __init__(
        self,
        matcher: Any,
        vocab_size: int,
        end_ids: frozenset[int],
        forbidden: NDArray[np.int64],
        start: Start | None = None,
    ) -> None:
        """Called by `GrammarTokenizer.compile`.

        Args:
            matcher: an `llguidance.LLMatcher` at the beginning of the text.
            vocab_size: number of logits.
            end_ids: tokens that end a text.
            forbidden: tokens that are never allowed.
            start: how the first token is matched, if not as the others.
        """
        self._matcher, self.vocab_size, self.forbidden, self.start = matcher, vocab_size, forbidden, start
        self.end_ids = end_ids
        self._lock = threading.Lock()

    def copies(self) -> tuple[Any, Any]:
        """Return a matcher for one answer, and the one of its first token if that is another."""
        with self._lock:
            return self._matcher.deep_copy(), None if self.start is None else self.start.matcher.deep_copy()

    def rule(self) -> GrammarRule:
        """Return a rule for one answer."""
        return GrammarRule(self)

    def check(self, what: str) -> None:
        """Compute the first mask.

        Raises:
            GenerationValueError: no token can begin the text.
        """
        try:
            self.rule().allowed()
        except GenerationError as error:
            raise GenerationValueError(f"{what}: {error}") from error


class GrammarRule:
    """Keeps one answer inside its grammar: a `LogitsRule`.

    When the text is complete and cannot go on, only the tokens that end it are allowed.
    """

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar
        self._matcher, self._first = grammar.copies()
        self._ends = np.array(sorted(grammar.end_ids), np.int64)
        self._mask: NDArray[np.bool_] | None = None
        self._ended = False

    @property
    def complete(self) -> bool:
        """Whether the text so far is a whole text of the grammar."""
        matcher = self._matcher if self._first is None else self._first
        return bool(matcher.is_accepting())

    def allowed(self) -> NDArray[np.bool_]:
        """Return which tokens may come next, [V].

        Raises:
            GenerationError: none may, or the grammar needs more work for one token than a grammar may.
        """
        if self._mask is None:
            self._mask = self._next_mask()
        return self._mask

    def _next_mask(self) -> NDArray[np.bool_]:
        grammar = self._grammar
        matcher = self._matcher if self._first is None else self._first
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        mask = np.unpackbits(bits, count=grammar.vocab_size, bitorder="little").view(np.bool_)
        mask[grammar.forbidden] = False
        if self._first is not None and grammar.start is not None:
            mask[list(grammar.start.no_op)] = True
        if matcher.is_error():
            raise GenerationError(f"the grammar cannot go on: {one_line(matcher.get_error())}")
        # A negated terminal (`~`) matches any bytes, those of the special tokens too.
        if not matcher.is_accepting():
            mask[self._ends] = False
        if not mask.any():
            raise GenerationError("the grammar cannot go on: no token of the vocabulary has the characters it needs")
        return mask

    def apply(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return a copy of logits [V] with -inf for every token that the grammar forbids.

        Raises:
            GenerationError: no token is allowed.
        """
        if self._ended:
            return logits.copy()
        changed = np.where(self.allowed(), logits, _FORBIDDEN)
        if changed.max() == _FORBIDDEN:
            raise GenerationError("the tokens that the grammar allows are forbidden by other options of the request")
        return changed

    def accept(self, token: int) -> None:
        """Advance by the token that was chosen. An error shows in the next `apply`."""
        self._mask = None
        if token in self._grammar.end_ids:
            self._ended = True
        elif self._first is None:
            self._matcher.consume_token(token)
        else:
            assert self._grammar.start is not None
            self._first = None
            self._matcher.consume_tokens(self._grammar.start.tokens(token))
