"""`POST /v1/responses`: the same generation as a chat completion, in the form of OpenAI's newer API."""

from __future__ import annotations

import dataclasses
import json
import secrets
import time
from collections.abc import AsyncGenerator, Iterator
from typing import TYPE_CHECKING, Any

from edgelm.serving.api.answers import TokenLogprob, as_json
from edgelm.serving.api.errors import ApiError, invalid
from edgelm.serving.api.requests import (
    ChatRequest,
    Function,
    FunctionCall,
    FunctionName,
    JsonSchema,
    Message,
    ResponseFormat,
    TextPart,
    Tool,
    ToolCall,
    ToolChoice,
)
from edgelm.serving.api.responses import (
    IncompleteDetails,
    InputCall,
    InputDetails,
    InputMessage,
    InputReasoning,
    InputResult,
    InputText,
    ResponsesAnswer,
    ResponsesRequest,
    ResponsesUsage,
    ResponseToolChoice,
    TextFormat,
)
from edgelm.serving.constraints import ContentDelta, ReasoningDelta
from edgelm.serving.conversation import plain
from edgelm.serving.endpoints.chat import Chat
from edgelm.serving.engine import Finished, Token
from edgelm.serving.events import PING, EventStream, error_event, event
from edgelm.serving.generating import answered

if TYPE_CHECKING:
    from edgelm.serving.constraints import Delta
    from edgelm.serving.generating import Run
    from edgelm.serving.guard import Client
    from edgelm.serving.models import ServedModel
    from edgelm.serving.service import Service

_PARAMS = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
}
"""Fields of chat completions and what they are called here."""


def as_chat(request: ResponsesRequest) -> ChatRequest:
    """Return the chat completion that generates the same.

    Raises:
        ApiError: log-probabilities are half asked for, or a schema has no name.
    """
    logprobs = bool(request.include)
    if request.top_logprobs and not logprobs:
        raise invalid("top_logprobs", 'top_logprobs needs include: ["message.output_text.logprobs"]')
    messages = [] if request.instructions is None else [Message("system", request.instructions)]
    if isinstance(request.input, str):
        messages.append(Message("user", request.input))
    else:
        messages += _messages(request.input)
    same = {item.name: getattr(request, item.name) for item in dataclasses.fields(ChatRequest)
            if item.name in _SAME}  # fmt: skip
    return ChatRequest(
        **same,
        messages=messages,
        max_tokens=request.max_output_tokens,
        logprobs=logprobs or None,
        top_logprobs=request.top_logprobs if logprobs else None,
        tools=[
            Tool("function", Function(tool.name, tool.description, tool.parameters, tool.strict))
            for tool in request.tools or []
        ],
        tool_choice=(
            ToolChoice("function", FunctionName(request.tool_choice.name))
            if isinstance(request.tool_choice, ResponseToolChoice)
            else request.tool_choice
        ),
        response_format=None if request.text is None else _format(request.text.format),
    )


_SAME = ("model", "temperature", "top_p", "top_k", "min_p", "seed", "parallel_tool_calls")


def _format(given: TextFormat | None) -> ResponseFormat | None:
    if given is None:
        return None
    if (given.type == "json_schema") != (given.schema is not None):
        raise invalid("text.format.schema", 'text.format.schema goes with the type "json_schema" alone')
    if given.schema is None:
        return ResponseFormat(given.type)
    return ResponseFormat(given.type, JsonSchema(given.name or "answer", given.schema))


def _messages(items: list[InputMessage | InputCall | InputResult | InputReasoning]) -> Iterator[Message]:
    """Yield the messages of a conversation; calls that follow each other or a message belong to one message, and so
    does the reasoning before them."""
    before: Message | None = None
    for item in items:
        if isinstance(item, InputReasoning):
            if before is not None and not _is_reasoning(before):
                yield before
            text = "".join([part.text for part in item.content or []])
            before = Message("assistant", reasoning_content=text or None)
            continue
        if isinstance(item, InputCall):
            call = ToolCall(item.call_id, FunctionCall(item.name, item.arguments))
            earlier = before if before is not None and before.role == "assistant" else Message("assistant")
            if before is not None and before is not earlier:
                yield before
            before = dataclasses.replace(earlier, tool_calls=[*(earlier.tool_calls or []), call])
            continue
        reasoned = before is not None and _is_reasoning(before)
        if isinstance(item, InputMessage) and item.role == "assistant" and before is not None and reasoned:
            before = dataclasses.replace(before, content=_content(item.content))
            continue
        if before is not None and not reasoned:
            yield before
        if isinstance(item, InputResult):
            before = Message("tool", _content(item.output), tool_call_id=item.call_id)
        else:
            before = Message(item.role, _content(item.content))
    if before is not None and not _is_reasoning(before):
        yield before


def _is_reasoning(message: Message) -> bool:
    """Whether a message has reasoning at most, as that of an answer which was cut off."""
    return message.role == "assistant" and message.content is None and not message.tool_calls


def _content(given: str | list[InputText]) -> str | list[TextPart]:
    return given if isinstance(given, str) else [TextPart("text", part.text) for part in given]


class Output:
    """The output as it grows: items, each reasoning, a message or a call, and the events that tell of them."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._open = False

    def take(self, delta: Delta, logprobs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Add a delta; yield its events."""
        if isinstance(delta, ReasoningDelta):
            if not self._open:
                yield from self._begin(
                    {"id": f"rs_{secrets.token_hex(12)}", "type": "reasoning", "summary": [], "content": []}
                )
                self.items[-1]["content"].append({"type": "reasoning_text", "text": ""})
                yield self._event(
                    "response.content_part.added", content_index=0, part=dict(self.items[-1]["content"][0])
                )
            self.items[-1]["content"][0]["text"] += delta.text
            yield self._event("response.reasoning_text.delta", content_index=0, delta=delta.text)
            return
        if isinstance(delta, ContentDelta):
            if not self._open or self.items[-1]["type"] != "message":
                yield from self._begin(
                    {"id": f"msg_{secrets.token_hex(12)}", "type": "message", "role": "assistant", "content": []}
                )
                part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
                self.items[-1]["content"].append(part)
                yield self._event("response.content_part.added", content_index=0, part=dict(part, logprobs=[]))
            part = self.items[-1]["content"][0]
            part["text"] += delta.text
            part["logprobs"] += logprobs
            yield self._event("response.output_text.delta", content_index=0, delta=delta.text, logprobs=logprobs)
            return
        if delta.id is not None:
            call = {"type": "function_call", "call_id": delta.id, "name": delta.name, "arguments": ""}
            yield from self._begin({"id": f"fc_{secrets.token_hex(12)}", **call})
        self.items[-1]["arguments"] += delta.arguments
        if delta.arguments:
            yield self._event("response.function_call_arguments.delta", delta=delta.arguments)

    def finish(self, status: str) -> Iterator[dict[str, Any]]:
        """End the open item with a status; yield its events."""
        if not self._open:
            return
        self._open = False
        item = self.items[-1]
        item["status"] = status
        if item["type"] == "message":
            part = item["content"][0]
            yield self._event(
                "response.output_text.done", content_index=0, text=part["text"], logprobs=part["logprobs"]
            )
            yield self._event("response.content_part.done", content_index=0, part=part)
        elif item["type"] == "reasoning":
            part = item["content"][0]
            yield self._event("response.reasoning_text.done", content_index=0, text=part["text"])
            yield self._event("response.content_part.done", content_index=0, part=part)
        else:
            yield self._event("response.function_call_arguments.done", name=item["name"], arguments=item["arguments"])
        yield {"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": item}

    def _begin(self, item: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from self.finish("completed")
        self._open = True
        self.items.append({**item, "status": "in_progress"})
        shown = {**self.items[-1], **({"content": []} if "content" in item else {})}
        yield {"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": shown}

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        return {"type": kind, "item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, **fields}


class Answering:
    """One answer of this endpoint.

    Args:
        request: what is asked for.
        chat: the chat completion that generates it.
        name: name of the model.
    """

    def __init__(self, request: ResponsesRequest, chat: Chat, name: str) -> None:
        self._request, self._chat, self._name = request, chat, name
        self._id, self._created = f"resp_{secrets.token_hex(12)}", int(time.time())
        self._output = Output()
        self._number = 0

    def prepare(self) -> None:
        """Check the request and make its prompt. Raises as `Chat.prepare`."""
        self._chat.prepare()
        self._choice = self._chat.choices()[0]

    def start(self, deadline: float) -> Run:
        """Hand the sequence to the engine. Raises as `Run.start`."""
        return self._chat.start(deadline)

    async def whole(self, run: Run) -> ResponsesAnswer:
        """Return the answer when it is complete. Raises as `Run.events`."""
        async for _ in self._grow(run):
            pass
        return self._answer(self._status(run), run)

    async def stream(self, run: Run) -> AsyncGenerator[bytes, None]:
        """Yield the events of the answer."""
        try:
            yield self._written("response.created", "in_progress")
            yield self._written("response.in_progress", "in_progress")
            async for found in self._grow(run):
                yield b"".join(map(self._numbered, found)) if found else PING
            status = self._status(run)
            yield self._written(f"response.{status}", status, run)
        except ApiError as error:
            error_event(error)  # logs its cause
            detail = {"code": error.code or "server_error", "message": error.message}
            yield self._written("response.failed", "failed", error=detail)

    async def _grow(self, run: Run) -> AsyncGenerator[list[dict[str, Any]], None]:
        """Add what arrives to the output; yield its events, an empty list after some time without any."""
        async for found in run.events():
            events: list[dict[str, Any]] = []
            for _, item in found:
                logprobs, text = [], ""
                if isinstance(item, Token):
                    logprobs, text = [_logprob(one) for one in self._chat.logprobs(self._choice, item)], item.text
                for delta in self._choice.take(text, last=isinstance(item, Finished)):
                    events += self._output.take(delta, logprobs)
                    logprobs = []
                if isinstance(item, Finished):
                    events += self._output.finish(self._status(run))
            if events or not found:
                yield events

    def _status(self, run: Run) -> str:
        generation = run.generations[0]
        assert generation is not None
        return "incomplete" if generation.stop_reason == "length" else "completed"

    def _numbered(self, data: dict[str, Any]) -> bytes:
        self._number += 1
        return event({**data, "sequence_number": self._number - 1}, data["type"])

    def _written(self, kind: str, status: str, run: Run | None = None, error: dict[str, Any] | None = None) -> bytes:
        answer = json.loads(as_json(self._answer(status, run, error)))
        return self._numbered({"type": kind, "response": answer})

    def _answer(self, status: str, run: Run | None = None, error: dict[str, Any] | None = None) -> ResponsesAnswer:
        request, usage = self._request, None
        if run is not None:
            counted = self._chat.usage(run, [self._choice])
            usage = ResponsesUsage(
                counted.prompt_tokens, InputDetails(counted.prompt_tokens_details.cached_tokens),
                counted.completion_tokens, counted.completion_tokens_details, counted.total_tokens,
            )  # fmt: skip
        form = request.text.format if request.text is not None else None
        return ResponsesAnswer(
            id=self._id, object="response", created_at=self._created, status=status, model=self._name,
            output=self._output.items, parallel_tool_calls=request.parallel_tool_calls is not False,
            tool_choice=plain(request.tool_choice) or "auto", tools=plain(request.tools) or [],
            text={"format": plain(form) or {"type": "text"}},
            temperature=request.temperature, top_p=request.top_p, instructions=request.instructions,
            max_output_tokens=request.max_output_tokens, metadata=request.metadata or {}, user=request.user,
            usage=usage, incomplete_details=IncompleteDetails("max_output_tokens") if status == "incomplete" else None,
            error=error, previous_response_id=None, store=False, truncation="disabled", background=False,
        )  # fmt: skip


def _logprob(one: TokenLogprob) -> dict[str, Any]:
    top = [{"token": other.token, "logprob": other.logprob, "bytes": other.bytes or []} for other in one.top_logprobs]
    return {"token": one.token, "logprob": one.logprob, "bytes": one.bytes or [], "top_logprobs": top}


async def create(service: Service, request: ResponsesRequest, client: Client) -> ResponsesAnswer | EventStream:
    """Answer a conversation, in the form of OpenAI's Responses API.

    Nothing is stored: send the whole conversation each time.
    """

    def answering(model: ServedModel) -> Answering:
        return Answering(request, Chat(service, as_chat(request), client, model), model.name)

    try:
        return await answered(service, request, client, answering)
    except ApiError as error:
        raise _renamed(error) from error.__cause__


def _renamed(error: ApiError) -> ApiError:
    """Return an error with the fields' names of this endpoint."""
    old = next((name for name in _PARAMS if error.param is not None and error.param.startswith(name)), None)
    if old is None or error.param is None:
        return error
    message, param = (text.replace(old, _PARAMS[old], 1) for text in (error.message, error.param))
    return ApiError(error.status, message, code=error.code, param=param, headers=error.headers)
