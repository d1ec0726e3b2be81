"""`POST /v1/chat/completions`."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from edgelm.serving.api.answers import (
    AnswerMessage,
    ChatAnswer,
    ChatChoice,
    ChatLogprobs,
    ReasoningTokens,
    TokenLogprob,
    Usage,
    as_json,
)
from edgelm.serving.api.errors import ApiError, invalid
from edgelm.serving.api.requests import ChatRequest, FunctionCall, ToolCall
from edgelm.serving.constraints import ContentDelta, Reasoning, ReasoningDelta, collect
from edgelm.serving.conversation import Tooling, conversation_tokens, tooling
from edgelm.serving.engine import Finished, Token
from edgelm.serving.events import DONE, PING, EventStream, error_event, event
from edgelm.serving.generating import Run, allowed_tokens, answered, grammar_of, options_of, orders_of, require_prompt
from edgelm.serving.token_texts import token_logprob

if TYPE_CHECKING:
    from edgelm.generation.stream import Generation
    from edgelm.serving.constraints import Delta, ReasoningParser, ToolParser
    from edgelm.serving.guard import Client
    from edgelm.serving.models import ServedModel
    from edgelm.serving.service import Service


@dataclass
class Choice:
    """One answer as it grows.

    Attributes:
        reasoning: finds the reasoning in the text; None where there is none.
        parser: finds calls of tools in the rest; None without tools.
        deltas: reasoning, content and calls so far.
        logprobs: log-probabilities of the tokens so far.
        reasoning_tokens: tokens of the reasoning so far.
    """

    reasoning: ReasoningParser | None
    parser: ToolParser | None
    deltas: list[Delta] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    reasoning_tokens: int = 0

    def take(self, text: str, *, last: bool = False) -> list[Delta]:
        """Add the text of a token, or end the answer; return what is certain now."""
        found: list[Delta] = []
        if self.reasoning is not None:
            inside = self.reasoning.inside
            thought, text = self.reasoning.feed(text)
            if not last:
                self.reasoning_tokens += inside or self.reasoning.inside
            else:
                rest = self.reasoning.finish()
                thought, text = thought + rest[0], text + rest[1]
            if thought:
                found.append(ReasoningDelta(thought))
        if self.parser is not None:
            found += self.parser.feed(text) + (self.parser.finish() if last else [])
        elif text:
            found.append(ContentDelta(text))
        self.deltas += found
        return found


class Chat:
    """A chat completion that is prepared, and then answered as a whole or as a stream.

    Args:
        service: the server.
        request: what is asked for.
        client: who asks.
        model: the model, in use until the end.
    """

    def __init__(self, service: Service, request: ChatRequest, client: Client, model: ServedModel) -> None:
        self._service, self._request, self._client, self._model = service, request, client, model
        self._id, self._created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        self._tokenizer = model.running.model.tokenizer
        self._end_ids = model.running.model.end_ids
        self._tools: Tooling | None = None
        self._reasoning: Reasoning | None = None

    def prepare(self) -> None:
        """Check the request and make its prompt; in a thread, since rendering and tokenizing take time.

        Raises:
            ApiError: a field is wrong.
        """
        request, model = self._request, self._model
        if request.max_tokens is not None and request.max_completion_tokens is not None:
            raise invalid("max_tokens", "max_tokens and max_completion_tokens are two names of one limit: give one")
        if request.top_logprobs is not None and not request.logprobs:
            raise invalid("top_logprobs", "top_logprobs needs logprobs: true")
        param = "max_completion_tokens" if request.max_tokens is None else "max_tokens"
        limit = allowed_tokens(request.max_completion_tokens or request.max_tokens, self._service, param)
        stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
        self._tools = tooling(model, request.tools, request.tool_choice, request.parallel_tool_calls)
        self._prompt = conversation_tokens(model, request.messages, self._tools, request.chat_template_kwargs)
        require_prompt(len(self._prompt), model, self._service, "messages")
        options = options_of(request, model, limit, stop=stop)
        grammar = grammar_of(request, model, self._tools)
        template = model.running.model.chat_template if self._tools is None else model.running.model.tool_template
        # Also where the reasoning stays in the content: a grammar holds for what comes after it.
        self._reasoning = Reasoning.of(template.source, self._prompt, self._tokenizer)
        self._orders = orders_of(
            request, self._prompt, options, model, request.n or 1, grammar, reasoning=self._reasoning
        )

    def start(self, deadline: float) -> Run:
        """Hand the sequences to the engine. Raises as `Run.start`."""
        logprobs = (self._request.top_logprobs or 0) if self._request.logprobs else None
        shown = frozenset[int]() if self._tools is None else self._tools.format.shown(self._tokenizer)
        if self._reasoning is not None:
            shown |= self._reasoning.shown(self._tokenizer)
        run = Run(
            self._service, self._model, self._orders, self._client, logprobs=logprobs, deadline=deadline, shown=shown
        )
        run.start()
        return run

    def choices(self) -> list[Choice]:
        """Return the answers before they begin."""
        tools = self._tools
        calling = tools is not None and tools.options.choice != "none"
        reasoning = None if self._request.reasoning_format == "none" else self._reasoning
        return [
            Choice(
                None if reasoning is None else reasoning.parser(),
                tools.format.parser(tools.options) if tools is not None and calling else None,
            )
            for _ in self._orders
        ]

    async def whole(self, run: Run) -> ChatAnswer:
        """Return the answer when it is complete. Raises as `Run.events`."""
        choices = self.choices()
        async for found in run.events():
            for index, item in found:
                if isinstance(item, Token):
                    choices[index].take(item.text)
                    self.logprobs(choices[index], item)
                else:
                    choices[index].take("", last=True)
        answers = []
        for index, (choice, generation) in enumerate(zip(choices, run.generations, strict=True)):
            assert generation is not None
            reasoning, content, calls = collect(choice.deltas)
            made = [ToolCall(call.id, FunctionCall(call.name, call.arguments)) for call in calls]
            message = AnswerMessage("assistant", content or (None if made else ""), reasoning or None, made or None)
            logprobs = ChatLogprobs(choice.logprobs) if self._request.logprobs else None
            answers.append(ChatChoice(index, message, self._reason(choice, generation), logprobs))
        return ChatAnswer(
            self._id, "chat.completion", self._created, self._model.name, answers, self.usage(run, choices),
            self._model.fingerprint,
        )  # fmt: skip

    def _reason(self, choice: Choice, generation: Generation) -> str:
        called = choice.parser is not None and choice.parser.calls > 0
        named = self._tools is not None and self._tools.options.named
        # As OpenAI: a call that was asked for by name ends with "stop".
        return "tool_calls" if called and not named and generation.stop_reason != "length" else reason_of(generation)

    def logprobs(self, choice: Choice, token: Token) -> list[TokenLogprob]:
        """Add a token's log-probabilities to an answer if they are asked for; return those that are new."""
        if not self._request.logprobs or token.token in self._end_ids:
            return []
        choice.logprobs.append(token_logprob(self._tokenizer, token))
        return choice.logprobs[-1:]

    def usage(self, run: Run, choices: Sequence[Choice]) -> Usage:
        """Return the token counts."""
        reasoning = ReasoningTokens(sum(choice.reasoning_tokens for choice in choices))
        return replace(run.usage(len(self._prompt)), completion_tokens_details=reasoning)

    async def stream(self, run: Run) -> AsyncGenerator[bytes, None]:
        """Yield the events of the answer."""
        choices = self.choices()
        try:
            for index in range(len(choices)):
                yield self._chunk(index, {"role": "assistant", "content": ""})
            async for found in run.events():
                yield b"".join(self._chunks(choices, found)) if found else PING
            if self._with_usage:
                yield event({**self._head(), "choices": [], "usage": json.loads(as_json(self.usage(run, choices)))})
        except ApiError as error:
            yield error_event(error)
        yield DONE

    def _chunks(self, choices: list[Choice], found: list[tuple[int, Token | Finished]]) -> list[bytes]:
        chunks = []
        for index, item in found:
            choice = choices[index]
            ended = isinstance(item, Finished)
            logprobs = [] if isinstance(item, Finished) else self.logprobs(choice, item)
            deltas = choice.take("" if isinstance(item, Finished) else item.text, last=ended)
            if logprobs and not deltas:
                deltas = [ContentDelta("")]
            for delta in deltas:
                chunks.append(self._chunk(index, delta_data(delta), None, logprobs))
                logprobs = []
            if isinstance(item, Finished):
                chunks.append(self._chunk(index, {}, self._reason(choice, item.generation)))
        return chunks

    @property
    def _with_usage(self) -> bool:
        options = self._request.stream_options
        return options is not None and bool(options.include_usage)

    def _head(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._model.name,
            "system_fingerprint": self._model.fingerprint,
        }

    def _chunk(
        self, index: int, delta: dict[str, Any], reason: str | None = None, logprobs: list[TokenLogprob] | None = None
    ) -> bytes:
        found = json.loads(as_json(ChatLogprobs(logprobs))) if logprobs else None
        choice = {"index": index, "delta": delta, "logprobs": found, "finish_reason": reason}
        return event({**self._head(), "choices": [choice], **({"usage": None} if self._with_usage else {})})


def delta_data(delta: Delta) -> dict[str, Any]:
    """Return a delta as it is in a chunk."""
    if isinstance(delta, ContentDelta):
        return {"content": delta.text}
    if isinstance(delta, ReasoningDelta):
        return {"reasoning_content": delta.text}
    function = (
        {"arguments": delta.arguments} if delta.name is None else {"name": delta.name, "arguments": delta.arguments}
    )
    head = {} if delta.id is None else {"id": delta.id, "type": "function"}
    return {"tool_calls": [{"index": delta.index, **head, "function": function}]}


def reason_of(generation: Generation) -> str:
    """Return OpenAI's word for why a text ended."""
    return "length" if generation.stop_reason == "length" else "stop"


async def create(service: Service, request: ChatRequest, client: Client) -> ChatAnswer | EventStream:
    """Answer a conversation."""
    return await answered(service, request, client, lambda model: Chat(service, request, client, model))
