"""The model's vocabulary as llguidance needs it, and a cache of the grammars that were compiled for it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import llguidance
import numpy as np
from numpy.typing import NDArray

from edgelm.errors import GenerationValueError
from edgelm.serving.constraints.grammar import LIMITS, Grammar, Start
from edgelm.serving.constraints.messages import one_line
from edgelm.tokenization.tokenizer import Tokenizer
from edgelm.tokenization.vocabulary import LeadingSpace, Vocabulary

MOST_GRAMMARS = 64
"""Compiled grammars that are kept. One takes from some kilobytes to a few megabytes."""
_ENCODED = 512
"""Bytes of a forced text that are encoded as the model's tokenizer does."""
_SPECIAL_BYTE = b"\xff"


def special_ids(texts: Iterable[str], tokenizer: Tokenizer) -> frozenset[int]:
    """Return the ids of those texts that are special tokens; decoding leaves these out unless they are asked for."""
    ids = {tokenizer.token_id(text) for text in texts}
    return frozenset(index for index in ids if index is not None and index in tokenizer.special)


class _Words:
    """The tokens as the constructor of `llguidance.LLTokenizer` reads them.

    It calls the object to encode a text that a grammar forces: the model then sees the tokens that it knows from
    training, and not every way to cut the text into tokens.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, tokens: list[bytes], special: list[int], end: int) -> None:
        self._tokenizer = tokenizer
        self._text = frozenset(index for index, token in enumerate(tokens) if token).difference(special)
        single = {token for index, token in enumerate(tokens) if len(token) == 1 and index in self._text}
        # Ids beyond the logits, so that every text is a sequence of ids. The model cannot choose them.
        missing = [bytes([byte]) for byte in range(_SPECIAL_BYTE[0]) if bytes([byte]) not in single]
        self.tokens, self.special_token_ids, self.eos_token_id = [*tokens, *missing], special, end
        self.native: Any = None

    def __call__(self, text: str | bytes) -> list[int]:
        data = text if isinstance(text, bytes) else text.encode()
        # Only the next token is used, and the text is encoded again after it.
        begin = data[:_ENCODED].decode("utf-8", "ignore")
        ids = self._tokenizer.encode(begin, add_bos=False)
        # Some tokenizers prepend a space, normalise, or read the names of special tokens in a text.
        if not self._text.issuperset(ids) or b"".join([self.tokens[index] for index in ids]) != begin.encode():
            ids, begin = [], ""
        rest = data[len(begin.encode()) :].decode("utf-8", "ignore")
        return ids if self.native is None or not rest else [*ids, *self.native.greedy_tokenize(rest)]


class GrammarTokenizer:
    """A bundle's vocabulary for grammars, built once, and the grammars that were compiled with it.

    Special tokens never stand for their text: a grammar that allows the text `</s>` allows its characters. Entries of
    the logits beyond the tokenizer's tokens are never allowed.

    Attributes:
        tokenizer: the bundle's tokenizer.
        end_ids: tokens that end a text.
        vocab_size: number of logits.
    """

    def __init__(self, tokenizer: Tokenizer, end_ids: Iterable[int], vocab_size: int) -> None:
        """Build the vocabulary: 0.2 s for 50,000 tokens.

        Raises:
            GenerationValueError: no token ends a text.
        """
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.end_ids = frozenset(index for index in end_ids if 0 <= index < vocab_size)
        if not self.end_ids:
            raise GenerationValueError("structured output needs a token that ends a text, and the model has none")
        self._special = sorted(i for i in tokenizer.special | self.end_ids if i < vocab_size)
        vocabulary = tokenizer.vocabulary
        known = min(tokenizer.vocab_size, vocab_size)
        tokens = [vocabulary.token_bytes(index) for index in range(known)] + [b""] * (vocab_size - known)
        # llguidance marks special tokens by this byte. No valid text has it.
        tokens = [b"" if token.startswith(_SPECIAL_BYTE) else token for token in tokens]
        for index in self._special:
            tokens[index] = (tokenizer.token(index) or f"<unnamed {index}>").encode()
        self._native = self._build(tokens)
        self._first: Any = None
        self._no_op: list[int] = []
        if vocabulary.leading_space is not LeadingSpace.KEEP:
            self._first_texts = first = self._first_tokens(vocabulary, tokens)
            self._first = self._build(first)
            if vocabulary.leading_space is LeadingSpace.DROP_ONE:
                self._no_op = [i for i, token in enumerate(tokens) if token == b" " and not first[i]]
        self._grammars: OrderedDict[str, Grammar] = OrderedDict()
        self._lock = threading.Lock()

    def _build(self, tokens: list[bytes]) -> Any:
        words = _Words(self.tokenizer, tokens, self._special, min(self.end_ids))
        native = llguidance.LLTokenizer(words, eos_token=sorted(self.end_ids))  # type: ignore[arg-type]
        words.native = native
        return native

    def _first_tokens(self, vocabulary: Vocabulary, tokens: list[bytes]) -> list[bytes]:
        """Return what each token adds to a text as its first one, where decoding drops a leading space."""
        special, any_token = set(self._special), vocabulary.leading_space is LeadingSpace.DROP_ONE
        return [
            token[1:]
            if token.startswith(b" ") and index not in special and (any_token or not vocabulary.is_byte(index))
            else token
            for index, token in enumerate(tokens)
        ]

    def token_id(self, token: str) -> int | None:
        """Return the id of a special token by its string; None where the string is no special token."""
        index = self.tokenizer.token_id(token)
        return index if index in set(self._special) else None

    def named_special(self, grammar: str) -> list[int] | None:
        """Return the special tokens that a Lark grammar names, `<|end|>`; None if it has ids, `<[128010]>`."""
        if "<[" in grammar:
            return None
        return [index for index in self._special if (self.tokenizer.token(index) or "") in grammar]

    def compile(self, text: str, what: str, *, special: Iterable[int] | None = None) -> Grammar:
        """Compile a grammar of llguidance, or return the one that was compiled before.

        Thread-safe. It takes some milliseconds, for the worst schemas a quarter of a second: call it outside an event
        loop.

        Args:
            text: the grammar, as `LLMatcher.grammar_from_lark` and so on return it.
            what: what the message of an error begins with.
            special: special tokens besides the end tokens that the grammar may allow; None: all.

        Raises:
            GenerationValueError: the grammar is wrong, too large, or the vocabulary has no token to begin it with.
        """
        with self._lock:
            if text in self._grammars:
                self._grammars.move_to_end(text)
                return self._grammars[text]
        forbidden = [] if special is None else sorted(set(self._special) - self.end_ids - set(special))
        grammar = self._compile(text, what, np.array(forbidden, np.int64))
        with self._lock:
            self._grammars[text] = grammar
            while len(self._grammars) > MOST_GRAMMARS:
                self._grammars.popitem(last=False)
        return grammar

    def _compile(self, text: str, what: str, forbidden: NDArray[np.int64]) -> Grammar:
        matcher = llguidance.LLMatcher(self._native, text, log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise GenerationValueError(f"{what}: {one_line(matcher.get_error())}")
        start = None
        if self._first is not None:
            first = llguidance.LLMatcher(self._first, text, log_level=0, limits=LIMITS)
            start = Start(first, self._first_texts, self._native, frozenset(self._special), frozenset(self._no_op))
        grammar = Grammar(matcher, self.vocab_size, self.end_ids, forbidden, start)
        grammar.check(what)
        return grammar
