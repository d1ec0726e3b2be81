"""Bodies of answers. Each class is a schema of the OpenAPI document; `as_json` writes it."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any

from edgelm.json_dataclass import OneOf
from edgelm.serving.api.requests import ToolCall

Reason = Annotated[str, OneOf(("stop", "length", "tool_calls"))]


@dataclass(frozen=True)
class ErrorDetail:
    """What is wrong.

    Attributes:
        message: what is wrong and what to do.
        type: kind of the error.
        param: the field at fault.
        code: a word for programs.
    """

    message: str
    type: str
    param: str | None = None
    code: str | None = None


@dataclass(frozen=True)
class ErrorAnswer:
    """An error.

    Attributes:
        error: what is wrong.
    """

    error: ErrorDetail


@dataclass(frozen=True)
class CachedTokens:
    """Tokens of the prompt that were not computed again.

    Attributes:
        cached_tokens: their number.
    """

    cached_tokens: int = 0


@dataclass(frozen=True)
class ReasoningTokens:
    """Generated tokens of the reasoning.

    Attributes:
        reasoning_tokens: their number, the markers included.
    """

    reasoning_tokens: int = 0


@dataclass(frozen=True)
class Usage:
    """Token counts.

    Attributes:
        prompt_tokens: tokens of the prompt.
        completion_tokens: generated tokens of all choices.
        total_tokens: both.
        prompt_tokens_details: tokens of the prompt that were reused.
        completion_tokens_details: generated tokens of the reasoning.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: ReasoningTokens = ReasoningTokens()


@dataclass(frozen=True)
class TopLogprob:
    """An alternative of a token.

    Attributes:
        token: its text.
        logprob: its log-probability.
        bytes: its bytes.
    """

    token: str
    logprob: float
    bytes: list[int] | None


@dataclass(frozen=True)
class TokenLogprob:
    """A token and its log-probability.

    Attributes:
        token: its text.
        logprob: its log-probability.
        bytes: its bytes.
        top_logprobs: the most likely tokens in its place.
    """

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


@dataclass(frozen=True)
class ChatLogprobs:
    """Log-probabilities of an answer.

    Attributes:
        content: of each token.
    """

    content: list[TokenLogprob]


@dataclass(frozen=True)
class AnswerMessage:
    """The model's message.

    Attributes:
        role: "assistant".
        content: the text; null where there are only tool calls.
        reasoning_content: extension: what the model wrote before its answer, between `<think>` and `</think>`; missing
            where it wrote nothing.
        tool_calls: what the model calls; missing where it calls nothing.
        refusal: always null.
    """

    role: str
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    refusal: str | None = None


@dataclass(frozen=True)
class ChatChoice:
    """One of the answers.

    Attributes:
        index: its number.
        message: the message.
        finish_reason: why it ended.
        logprobs: log-probabilities, if asked for.
    """

    index: int
    message: AnswerMessage
    finish_reason: Reason
    logprobs: ChatLogprobs | None = None


@dataclass(frozen=True)
class ChatAnswer:
    """Answer of `POST /v1/chat/completions`.

    Attributes:
        id: name of this answer.
        object: "chat.completion".
        created: time in seconds since 1970.
        model: name of the model.
        choices: the answers.
        usage: token counts.
        system_fingerprint: changes with the bundle's weights and the version of EdgeLM.
    """

    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str


@dataclass(frozen=True)
class CompletionLogprobs:
    """Log-probabilities of a completion.

    Attributes:
        tokens: texts of the tokens.
        token_logprobs: their log-probabilities.
        top_logprobs: for each, the most likely texts in its place.
        text_offset: where each begins in the text.
    """

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


@dataclass(frozen=True)
class CompletionChoice:
    """One of the completions.

    Attributes:
        index: its number.
        text: the text.
        finish_reason: why it ended.
        logprobs: log-probabilities, if asked for.
    """

    index: int
    text: str
    finish_reason: Reason
    logprobs: CompletionLogprobs | None = None


@dataclass(frozen=True)
class CompletionAnswer:
    """Answer of `POST /v1/completions`.

    Attributes:
        id: name of this answer.
        object: "text_completion".
        created: time in seconds since 1970.
        model: name of the model.
        choices: `n` completions of each prompt, in the order of the prompts.
        usage: token counts.
        system_fingerprint: changes with the bundle's weights and the version of EdgeLM.
    """

    id: str
    object: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    system_fingerprint: str


@dataclass(frozen=True)
class Embedding:
    """A text's embedding.

    Attributes:
        object: "embedding".
        index: number of the text.
        embedding: numbers, or base64 of little-endian float32.
    """

    object: str
    index: int
    embedding: list[float] | str


@dataclass(frozen=True)
class EmbeddingsUsage:
    """Token counts.

    Attributes:
        prompt_tokens: tokens of all texts.
        total_tokens: the same.
    """

    prompt_tokens: int
    total_tokens: int


@dataclass(frozen=True)
class EmbeddingsAnswer:
    """Answer of `POST /v1/embeddings`.

    Attributes:
        object: "list".
        data: the embeddings, in the order of the texts.
        model: name of the model.
        usage: token counts.
    """

    object: str
    data: list[Embedding]
    model: str
    usage: EmbeddingsUsage


@dataclass(frozen=True)
class ModelEntry:
    """A model of this server.

    Attributes:
        id: its name.
        object: "model".
        created: when its bundle was made, in seconds since 1970.
        owned_by: "edgelm".
        state: "unloaded", "loading" or "loaded".
        context_length: tokens of prompt and answer together.
        family: the model's family, such as "olmoe".
        recipe: how the weights are quantised.
        num_layers: its layers.
        num_experts: experts of a layer; 0: no MoE.
        experts_per_token: how many of them a token uses.
        vocab_size: size of the vocabulary.
        chat: whether it has a chat template.
    """

    id: str
    object: str
    created: int
    owned_by: str
    state: str
    context_length: int
    family: str
    recipe: str
    num_layers: int
    num_experts: int
    experts_per_token: int
    vocab_size: int
    chat: bool


@dataclass(frozen=True)
class ModelList:
    """Answer of `GET /v1/models`.

    Attributes:
        object: "list".
        data: the models.
    """

    object: str
    data: list[ModelEntry]


@dataclass(frozen=True)
class TokenizeAnswer:
    """Answer of `POST /tokenize`.

    Attributes:
        tokens: the token ids.
        count: their number.
        max_model_len: tokens of prompt and answer together that the model takes here.
        token_strs: the text of each token.
    """

    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str]


@dataclass(frozen=True)
class DetokenizeAnswer:
    """Answer of `POST /detokenize`.

    Attributes:
        prompt: the text.
    """

    prompt: str


@dataclass(frozen=True)
class Health:
    """Answer of `GET /health`.

    Attributes:
        status: "ok", or "closing" while the server shuts down.
        models: the state of each model.
    """

    status: str
    models: dict[str, str]


@dataclass(frozen=True)
class ExpertsToken:
    """A token and its experts.

    Attributes:
        id: the token.
        text: its text.
        experts: for each layer, the experts that it uses, the one with the largest weight first.
        weights: their router weights, which sum to 1 where the model normalises them.
    """

    id: int
    text: str
    experts: list[list[int]]
    weights: list[list[float]]


@dataclass(frozen=True)
class ExpertsAnswer:
    """Answer of `POST /experts`.

    Attributes:
        model: name of the model.
        num_layers: layers of the model.
        num_experts: experts of a layer.
        experts_per_token: how many of them a token uses.
        prompt_tokens: how many of the tokens are the prompt's; all, where no answer was given.
        tokens: every token with its experts.
    """

    model: str
    num_layers: int
    num_experts: int
    experts_per_token: int
    prompt_tokens: int
    tokens: list[ExpertsToken]


@dataclass(frozen=True)
class ParityState:
    """The parity check of a model on this device.

    Attributes:
        model: name of the model.
        running: whether a check runs now.
        report: the last report, as `edgelm parity --json` prints it; null where there is none.
        sentence: the result in a sentence.
        error: why the last check could not run.
    """

    model: str
    running: bool
    report: dict[str, Any] | None
    sentence: str | None = None
    error: str | None = None


def as_json(answer: Any) -> bytes:
    """Return an answer as JSON, not escaped, without what is optional and None in `AnswerMessage`."""
    return json.dumps(answer, default=_fields, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def _fields(value: Any) -> dict[str, Any]:
    if not is_dataclass(value):
        raise TypeError(f"{type(value).__name__} is not part of an answer")
    found = {item.name: getattr(value, item.name) for item in fields(value)}
    if isinstance(value, AnswerMessage):
        for name in ("reasoning_content", "tool_calls"):  # clients loop over calls where the field is there
            if found[name] is None:
                del found[name]
    return found
