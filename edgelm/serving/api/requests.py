"""Bodies of requests. Each class is read strictly, and is a schema of the OpenAPI document.

A field that is null is as good as absent. What is not here is refused by name. The fields are OpenAI's; those that
OpenAI lacks are marked as extensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from edgelm.json_dataclass import Length, OneOf, Range

MAX_CHOICES = 16
MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20

_Text = Annotated[str, Length(1, 256)]
_Positive = Annotated[int, Range(1, 2**31 - 1)]
_TokenId = Annotated[int, Range(0, 2**31 - 1)]
_Choices = Annotated[int, Range(1, MAX_CHOICES)]
_Penalty = Annotated[float, Range(-2, 2)]
_Probability = Annotated[float, Range(0, 1)]
_ToolName = Annotated[str, Length(1, 64)]
_Inputs = str | list[str] | list[_TokenId] | list[list[_TokenId]]


@dataclass(frozen=True)
class StreamOptions:
    """Options of a stream.

    Attributes:
        include_usage: send the token counts in a last chunk without choices.
        include_obfuscation: padding against the analysis of packet sizes; only false.
    """

    include_usage: bool | None = None
    include_obfuscation: Annotated[bool, OneOf((False,))] | None = None


@dataclass(frozen=True)
class JsonSchema:
    """A JSON schema that the answer has to match.

    Attributes:
        name: name of the schema, for its reader.
        schema: the schema; {} allows any JSON value.
        description: text for the reader.
        strict: accepted; the answer matches the schema in any case.
    """

    name: _Text
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


@dataclass(frozen=True)
class ResponseFormat:
    """The form of the answer.

    Attributes:
        type: "text", "json_object" (any JSON object), or "json_schema".
        json_schema: the schema, with type "json_schema".
    """

    type: Annotated[str, OneOf(("text", "json_object", "json_schema"))]
    json_schema: JsonSchema | None = None


@dataclass(frozen=True, kw_only=True)
class Generating:
    """Fields of every request that generates text.

    Attributes:
        model: name of the model; may be missing where the server has only one.
        temperature: 0 always takes the most likely token. Default: the bundle's generation_config.json, else 1.
        top_p: sample among the most likely tokens that together reach this probability.
        top_k: extension: sample among the k most likely tokens; 0 and -1: all.
        min_p: extension: sample among tokens with at least this fraction of the highest probability.
        seed: makes sampling reproducible. Choice i of `n` has the seed `seed` + i.
        stream: send the answer as server-sent events.
        user: accepted and not used.
        metadata: accepted and not used.
        store: only false: nothing is stored.
    """

    model: _Text | None = None
    temperature: Annotated[float, Range(0, 2)] | None = None
    top_p: _Probability | None = None
    top_k: Annotated[int, Range(-1, 2**31 - 1)] | None = None
    min_p: _Probability | None = None
    seed: Annotated[int, Range(-(2**63), 2**63 - 1)] | None = None
    stream: bool | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: Annotated[bool, OneOf((False,))] | None = None


@dataclass(frozen=True, kw_only=True)
class Completing(Generating):
    """Fields of chat completions and completions.

    Attributes:
        max_tokens: most tokens to generate. Default: until the context is full, at most the server's limit.
        n: number of answers.
        stop: strings that end the answer; they are not part of it.
        frequency_penalty: subtracted from a token's logit for each time it was generated.
        presence_penalty: subtracted from the logits of tokens that were generated.
        repetition_penalty: extension: divides positive and multiplies negative logits of tokens that occurred.
        logit_bias: added to the logits of token ids (the keys, as strings).
        stream_options: options of a stream.
        service_tier: accepted and not used.
        response_format: the form of the answer.
        regex: extension: a regular expression that the whole answer matches.
        grammar: extension: a grammar that the answer matches, in Lark's syntax.
        min_tokens: extension: the model cannot end the answer before this many tokens.
        ignore_eos: extension: the model cannot end the answer at all; for benchmarks.
    """

    max_tokens: _Positive | None = None
    n: _Choices | None = None
    stop: Annotated[str, Length(1, 1000)] | Annotated[
        list[Annotated[str, Length(1, 1000)]], Length(0, MAX_STOPS)
    ] | None = None  # fmt: skip
    frequency_penalty: _Penalty | None = None
    presence_penalty: _Penalty | None = None
    repetition_penalty: Annotated[float, Range(0.01, 100)] | None = None
    logit_bias: dict[str, Annotated[float, Range(-100, 100)]] | None = None
    stream_options: StreamOptions | None = None
    service_tier: Annotated[str, OneOf(("auto", "default"))] | None = None
    response_format: ResponseFormat | None = None
    regex: Annotated[str, Length(1, 10_000)] | None = None
    grammar: Annotated[str, Length(1, 100_000)] | None = None
    min_tokens: Annotated[int, Range(0, 2**31 - 1)] | None = None
    ignore_eos: bool | None = None


@dataclass(frozen=True)
class TextPart:
    """A part of a message's content. Models here read text only.

    Attributes:
        type: "text".
        text: the text.
    """

    type: Annotated[str, OneOf(("text",))]
    text: str


@dataclass(frozen=True)
class FunctionCall:
    """A call of a function.

    Attributes:
        name: the function.
        arguments: the arguments, as JSON.
    """

    name: _ToolName
    arguments: str


@dataclass(frozen=True)
class ToolCall:
    """A call that the model asked for.

    Attributes:
        id: the answer's `tool_call_id` names it.
        type: "function".
        function: the function and its arguments.
    """

    id: str
    function: FunctionCall
    type: Annotated[str, OneOf(("function",))] = "function"


@dataclass(frozen=True)
class Message:
    """A message of a conversation.

    Attributes:
        role: who says it.
        content: a text or parts; may be missing in a message with tool calls.
        name: passed to the model's chat template.
        tool_calls: what an assistant called.
        tool_call_id: in a tool's message, the call that it answers.
        reasoning_content: extension: an assistant's reasoning, for templates that show it.
        refusal: accepted as in earlier answers, and not used.
        annotations: accepted as in earlier answers, and not used.
        audio: only null, as in earlier answers.
        function_call: only null, as in earlier answers.
    """

    role: Annotated[str, OneOf(("system", "developer", "user", "assistant", "tool"))]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None


@dataclass(frozen=True)
class Function:
    """A function that the model may call.

    Attributes:
        name: its name.
        description: what it does, for the model.
        parameters: JSON schema of the arguments.
        strict: accepted; see the page of the server on when arguments match the schema.
    """

    name: _ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


@dataclass(frozen=True)
class Tool:
    """A tool of the model.

    Attributes:
        type: "function".
        function: the function.
    """

    type: Annotated[str, OneOf(("function",))]
    function: Function


@dataclass(frozen=True)
class FunctionName:
    """The name of a function.

    Attributes:
        name: the name.
    """

    name: _ToolName


@dataclass(frozen=True)
class ToolChoice:
    """The tool that the model has to call.

    Attributes:
        type: "function".
        function: its name.
    """

    type: Annotated[str, OneOf(("function",))]
    function: FunctionName


@dataclass(frozen=True)
class AllowedTools:
    """Some of the tools, of which the model may or has to call one.

    Attributes:
        mode: "auto": it may; "required": it has to.
        tools: their names.
    """

    mode: Annotated[str, OneOf(("auto", "required"))]
    tools: Annotated[list[ToolChoice], Length(1, 128)]


@dataclass(frozen=True)
class AllowedToolsChoice:
    """A choice among some of the tools.

    Attributes:
        type: "allowed_tools".
        allowed_tools: these tools.
    """

    type: Annotated[str, OneOf(("allowed_tools",))]
    allowed_tools: AllowedTools


ToolMode = Annotated[str, OneOf(("none", "auto", "required"))]


@dataclass(frozen=True, kw_only=True)
class ChatRequest(Completing):
    """Body of `POST /v1/chat/completions`.

    Attributes:
        messages: the conversation, oldest first.
        max_completion_tokens: the newer name of `max_tokens`.
        logprobs: whether to return log-probabilities.
        top_logprobs: alternatives of each token, with `logprobs`.
        tools: functions that the model may call.
        tool_choice: "none", "auto" (default), "required", the function to call, or some of the tools.
        parallel_tool_calls: whether an answer may have several calls; default true.
        modalities: only ["text"].
        chat_template_kwargs: extension: variables of the model's chat template, such as `enable_thinking`.
        reasoning_format: extension: "auto" (default) and "deepseek" give a model's reasoning as `reasoning_content`;
            "none" leaves it in the content, as the model wrote it.
    """

    messages: Annotated[list[Message], Length(1, 10_000)]
    max_completion_tokens: _Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Range(0, MAX_TOP_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Length(0, 128)] | None = None
    tool_choice: ToolMode | ToolChoice | AllowedToolsChoice | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Annotated[str, OneOf(("text",))]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_format: Annotated[str, OneOf(("auto", "deepseek", "none"))] | None = None


@dataclass(frozen=True, kw_only=True)
class CompletionRequest(Completing):
    """Body of `POST /v1/completions`.

    Attributes:
        prompt: a text, a list of texts, token ids, or lists of them.
        best_of: generate this many answers and return the `n` with the highest mean log-probability; not in a stream.
        echo: begin the answer with the prompt; not with `logprobs`.
        logprobs: return the log-probabilities of this many alternatives of each token.
    """

    prompt: _Inputs
    best_of: _Choices | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Range(0, MAX_TOP_LOGPROBS)] | None = None


@dataclass(frozen=True, kw_only=True)
class EmbeddingsRequest:
    """Body of `POST /v1/embeddings`.

    Attributes:
        input: a text, a list of texts, token ids, or lists of them.
        model: name of the model; may be missing where the server has only one.
        encoding_format: "float" (default), or "base64" of little-endian float32.
        pooling: extension: "mean" (default) of all tokens, or the "last" one.
        user: accepted and not used.
    """

    input: _Inputs
    model: _Text | None = None
    encoding_format: Annotated[str, OneOf(("float", "base64"))] | None = None
    pooling: Annotated[str, OneOf(("mean", "last"))] | None = None
    user: str | None = None


@dataclass(frozen=True, kw_only=True)
class TokenizeRequest:
    """Body of `POST /tokenize`: a text or a conversation.

    Attributes:
        prompt: the text.
        messages: the conversation, rendered by the model's chat template.
        model: name of the model; may be missing where the server has only one.
        add_special_tokens: whether the token that begins a text is added to `prompt`; default: as the tokenizer does.
        tools: functions, for the chat template.
        chat_template_kwargs: variables of the chat template.
    """

    prompt: str | None = None
    messages: Annotated[list[Message], Length(1, 10_000)] | None = None
    model: _Text | None = None
    add_special_tokens: bool | None = None
    tools: Annotated[list[Tool], Length(0, 128)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class DetokenizeRequest:
    """Body of `POST /detokenize`.

    Attributes:
        tokens: token ids.
        model: name of the model; may be missing where the server has only one.
    """

    tokens: list[_TokenId]
    model: _Text | None = None


@dataclass(frozen=True, kw_only=True)
class ModelRequest:
    """Body of `POST /models/load`, `POST /models/unload` and `POST /parity`.

    Attributes:
        model: name of the model; may be missing where the server has only one.
    """

    model: _Text | None = None


@dataclass(frozen=True, kw_only=True)
class ExpertsRequest:
    """Body of `POST /experts`: a text whose experts are wanted, in one of three forms.

    Attributes:
        model: name of the model; may be missing where the server has only one.
        tokens: the token ids.
        prompt: a text.
        messages: a conversation.
        answer: what the model said to `prompt` or `messages`.
    """

    model: _Text | None = None
    tokens: Annotated[list[_TokenId], Length(1, 100_000)] | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Length(1, 10_000)] | None = None
    answer: str | None = None
