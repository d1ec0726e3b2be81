"""Texts of single tokens, and log-probabilities in OpenAI's two forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgelm.serving.api.answers import CompletionLogprobs, TokenLogprob, TopLogprob

if TYPE_CHECKING:
    from edgelm.serving.engine import Token
    from edgelm.tokenization.tokenizer import Tokenizer


def text_and_bytes(tokenizer: Tokenizer, token: int) -> tuple[str, list[int] | None]:
    """Return the text of a token and its bytes; of a special token its name, which has no bytes in the text."""
    if token in tokenizer.special:
        return tokenizer.token(token) or "", None
    data = tokenizer.vocabulary.token_bytes(token)
    return data.decode("utf-8", "replace"), list(data)


def token_logprob(tokenizer: Tokenizer, token: Token) -> TokenLogprob:
    """Return a token's log-probabilities as chat completions have them."""
    text, data = text_and_bytes(tokenizer, token.token)
    top = []
    for other, logprob in token.top:
        other_text, other_data = text_and_bytes(tokenizer, other)
        top.append(TopLogprob(other_text, logprob, other_data))
    assert token.logprob is not None
    return TokenLogprob(text, token.logprob, data, top)


def completion_logprobs(tokenizer: Tokenizer, tokens: Sequence[Token], offset: int) -> CompletionLogprobs:
    """Return log-probabilities as completions have them.

    Args:
        tokenizer: the tokenizer.
        tokens: the tokens.
        offset: characters of the text before them.
    """
    found = CompletionLogprobs([], [], [], [])
    for token in tokens:
        assert token.logprob is not None
        found.tokens.append(text_and_bytes(tokenizer, token.token)[0])
        found.token_logprobs.append(token.logprob)
        top: dict[str, float] = {}
        for other, logprob in token.top:
            top.setdefault(text_and_bytes(tokenizer, other)[0], logprob)  # of equal texts the most likely token
        found.top_logprobs.append(top)
        found.text_offset.append(offset)
        offset += len(token.text)
    return found
