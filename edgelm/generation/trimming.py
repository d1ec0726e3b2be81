"""Drop the oldest turns of a conversation when the context is full."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgelm.generation.language_model import LanguageModel
from edgelm.runtimes.base import context_full
from edgelm.tokenization.chat_template import system_messages


@dataclass(frozen=True)
class Trimmed:
    """A conversation that fits into the context.

    Attributes:
        messages: the messages that remain.
        tokens: the prompt's token ids, for `LanguageModel.stream`.
        dropped: number of turns that were dropped.
    """

    messages: list[dict[str, Any]]
    tokens: list[int]
    dropped: int


def trim_messages(model: LanguageModel, messages: Sequence[Mapping[str, Any]], answer_tokens: int) -> Trimmed:
    """Drop the oldest turns of a conversation, so that the context has room for `answer_tokens` more.

    A turn is a user's message and all messages up to the next one. System messages at the beginning and the last turn
    are kept, even if they leave less room. After a drop, the rest of the conversation has to be computed again. So a
    quarter of the room is freed at once, and the next messages need no further drop. Continue with the returned
    messages.

    Example::

        kept = trim_messages(model, messages, 256)
        answer = model.generate(kept.tokens, max_tokens=256)
        messages = [*kept.messages, {"role": "assistant", "content": answer.text}]

    Raises:
        ContextLengthError: the system messages and the last turn alone do not fit.
        GenerationError: as `LanguageModel.render_chat`.
    """
    context = model.runtime.context_length
    room = context - answer_tokens
    kept = [dict(message) for message in messages]
    tokens = model.chat_tokens(kept)
    if len(tokens) <= room:
        return Trimmed(kept, tokens, 0)
    head = system_messages(kept)
    starts = [i for i in range(head + 1, len(kept)) if kept[i]["role"] == "user" and kept[i - 1]["role"] != "user"]
    rendered: dict[int, list[int]] = {0: tokens}

    def length(dropped: int) -> int:
        if dropped not in rendered:
            rendered[dropped] = model.chat_tokens([*kept[:head], *kept[starts[dropped - 1] :]])
        return len(rendered[dropped])

    dropped = turns = len(starts)
    for goal in (room * 3 // 4, room):
        if dropped == turns:
            dropped = bisect.bisect_left(range(turns), -goal, key=lambda count: -length(count))
    if length(dropped) > context:
        raise context_full(length(dropped), 0, context, model.runtime.model_context_length)
    if dropped:
        kept = [*kept[:head], *kept[starts[dropped - 1] :]]
    return Trimmed(kept, rendered[dropped], dropped)
