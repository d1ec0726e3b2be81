"""Bodies of `POST /v1/responses`, the part of it that text and tools need; see `edgelm.serving.api.requests`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from edgelm.json_dataclass import Length, OneOf, Range
from edgelm.serving.api.answers import ReasoningTokens
from edgelm.serving.api.requests import MAX_TOP_LOGPROBS, Generating, ToolMode

_Name = Annotated[str, Length(1, 64)]


@dataclass(frozen=True)
class InputText:
    """A part of a message.

    Attributes:
        type: "input_text", or "output_text" in an earlier answer.
        text: the text.
        annotations: accepted as in earlier answers, and not used.
        logprobs: accepted as in earlier answers, and not used.
    """

    type: Annotated[str, OneOf(("input_text", "output_text"))]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


@dataclass(frozen=True)
class InputMessage:
    """A message of the conversation.

    Attributes:
        role: who says it.
        content: a text or parts.
        type: "message".
        id: accepted as in earlier answers, and not used.
        status: accepted as in earlier answers, and not used.
        phase: accepted as in earlier answers, and not used.
    """

    role: Annotated[str, OneOf(("system", "developer", "user", "assistant"))]
    content: str | Annotated[list[InputText], Length(1, 10_000)]
    type: Annotated[str, OneOf(("message",))] = "message"
    id: str | None = None
    status: str | None = None
    phase: str | None = None


@dataclass(frozen=True)
class InputCall:
    """An earlier call of a function.

    Attributes:
        type: "function_call".
        call_id: the result names it.
        name: the function.
        arguments: the arguments, as JSON.
        id: accepted as in earlier answers, and not used.
        status: accepted as in earlier answers, and not used.
        namespace: only null, as in earlier answers.
        caller: only null, as in earlier answers.
    """

    type: Annotated[str, OneOf(("function_call",))]
    call_id: str
    name: _Name
    arguments: str
    id: str | None = None
    status: str | None = None
    namespace: None = None
    caller: None = None


@dataclass(frozen=True)
class InputResult:
    """The result of a call.

    Attributes:
        type: "function_call_output".
        call_id: the call.
        output: the result, a text or parts.
        id: accepted and not used.
        status: accepted and not used.
    """

    type: Annotated[str, OneOf(("function_call_output",))]
    call_id: str
    output: str | list[InputText]
    id: str | None = None
    status: str | None = None


@dataclass(frozen=True)
class ReasoningText:
    """A part of the reasoning.

    Attributes:
        type: "reasoning_text".
        text: the text.
    """

    type: Annotated[str, OneOf(("reasoning_text",))]
    text: str


@dataclass(frozen=True)
class InputReasoning:
    """The reasoning of an earlier answer, before its message or calls; for templates that show it.

    Attributes:
        type: "reasoning".
        content: its text.
        summary: accepted as in earlier answers, and not used.
        id: accepted as in earlier answers, and not used.
        status: accepted as in earlier answers, and not used.
        encrypted_content: only null, as in earlier answers.
    """

    type: Annotated[str, OneOf(("reasoning",))]
    content: list[ReasoningText] | None = None
    summary: list[Any] | None = None
    id: str | None = None
    status: str | None = None
    encrypted_content: None = None


@dataclass(frozen=True)
class ResponseTool:
    """A function that the model may call.

    Attributes:
        type: "function".
        name: its name.
        description: what it does, for the model.
        parameters: JSON schema of the arguments.
        strict: whether calls have to match the schema in every case.
    """

    type: Annotated[str, OneOf(("function",))]
    name: _Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


@dataclass(frozen=True)
class ResponseToolChoice:
    """The function that the model has to call.

    Attributes:
        type: "function".
        name: its name.
    """

    type: Annotated[str, OneOf(("function",))]
    name: _Name


@dataclass(frozen=True)
class TextFormat:
    """The form of the answer.

    Attributes:
        type: "text", "json_object" (any JSON object), or "json_schema".
        name: name of the schema.
        schema: the schema.
        description: text for the reader.
        strict: accepted; the answer matches the schema in any case.
    """

    type: Annotated[str, OneOf(("text", "json_object", "json_schema"))]
    name: _Name | None = None
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


@dataclass(frozen=True)
class TextOptions:
    """Options of the answer's text.

    Attributes:
        format: its form.
    """

    format: TextFormat | None = None


@dataclass(frozen=True)
class ResponsesStreamOptions:
    """Options of a stream.

    Attributes:
        include_obfuscation: padding against the analysis of packet sizes; only false.
    """

    include_obfuscation: Annotated[bool, OneOf((False,))] | None = None


@dataclass(frozen=True, kw_only=True)
class ResponsesRequest(Generating):
    """Body of `POST /v1/responses`.

    Attributes:
        input: a text, or the conversation with reasoning, calls and their results.
        instructions: a system message before the input.
        max_output_tokens: most tokens to generate. Default: until the context is full, at most the server's limit.
        text: the form of the answer.
        tools: functions that the model may call.
        tool_choice: "none", "auto" (default), "required", or the function to call.
        parallel_tool_calls: whether an answer may have several calls; default true.
        top_logprobs: alternatives of each token, where `include` asks for log-probabilities.
        include: only "message.output_text.logprobs".
        stream_options: options of a stream.
        truncation: only "disabled": a conversation that is too long is refused.
        background: only false.
        service_tier: accepted and not used.
    """

    input: str | Annotated[list[InputMessage | InputCall | InputResult | InputReasoning], Length(1, 10_000)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Range(1, 2**31 - 1)] | None = None
    text: TextOptions | None = None
    tools: Annotated[list[ResponseTool], Length(0, 128)] | None = None
    tool_choice: ToolMode | ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    top_logprobs: Annotated[int, Range(0, MAX_TOP_LOGPROBS)] | None = None
    include: list[Annotated[str, OneOf(("message.output_text.logprobs",))]] | None = None
    stream_options: ResponsesStreamOptions | None = None
    truncation: Annotated[str, OneOf(("disabled",))] | None = None
    background: Annotated[bool, OneOf((False,))] | None = None
    service_tier: Annotated[str, OneOf(("auto", "default"))] | None = None


@dataclass(frozen=True)
class InputDetails:
    """Kinds of tokens of the prompt.

    Attributes:
        cached_tokens: tokens that were not computed again.
    """

    cached_tokens: int


@dataclass(frozen=True)
class ResponsesUsage:
    """Token counts.

    Attributes:
        input_tokens: tokens of the prompt.
        input_tokens_details: their kinds.
        output_tokens: generated tokens.
        output_tokens_details: those of the reasoning.
        total_tokens: both.
    """

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


@dataclass(frozen=True)
class IncompleteDetails:
    """Why an answer is not complete.

    Attributes:
        reason: "max_output_tokens".
    """

    reason: str


@dataclass(frozen=True, kw_only=True)
class ResponsesAnswer:
    """Answer of `POST /v1/responses`.

    Attributes:
        id: name of this answer.
        object: "response".
        created_at: time in seconds since 1970.
        status: "in_progress", "completed", "incomplete" or "failed".
        model: name of the model.
        output: reasoning, messages and calls, in order.
        parallel_tool_calls: as asked for.
        tool_choice: as asked for.
        tools: as asked for.
        text: as asked for.
        temperature: as asked for.
        top_p: as asked for.
        instructions: as asked for.
        max_output_tokens: as asked for.
        metadata: as asked for.
        user: as asked for.
        usage: token counts; null while it is generated.
        incomplete_details: why it is not complete.
        error: what failed.
        previous_response_id: always null: nothing is stored.
        store: always false.
        truncation: always "disabled".
        background: always false.
    """

    id: str
    object: str
    created_at: int
    status: str
    model: str
    output: list[dict[str, Any]]
    parallel_tool_calls: bool
    tool_choice: Any
    tools: list[dict[str, Any]]
    text: dict[str, Any]
    temperature: float | None
    top_p: float | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    user: str | None
    usage: ResponsesUsage | None
    incomplete_details: IncompleteDetails | None
    error: dict[str, Any] | None
    previous_response_id: str | None
    store: bool
    truncation: str
    background: bool
