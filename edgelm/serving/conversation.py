"""From the messages and tools of a request to the prompt's tokens, by the model's chat template."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgelm.errors import EdgeLMError
from edgelm.serving.api.errors import invalid, is_of_request, of_request
from edgelm.serving.api.requests import Message
from edgelm.serving.constraints.history import History

if TYPE_CHECKING:
    from edgelm.serving.constraints import ToolFormat, ToolOptions
    from edgelm.serving.models import ServedModel

RESERVED = ("messages", "add_generation_prompt", "tools")
_DROPPED = ("refusal", "annotations", "audio", "function_call")
"""Fields of earlier answers that are not for the model."""


@dataclasses.dataclass(frozen=True)
class Tooling:
    """The tools of a request, and how the model calls tools."""

    format: ToolFormat
    options: ToolOptions


def plain(value: Any) -> Any:
    """Return a part of a request as JSON data, without what is absent."""
    if dataclasses.is_dataclass(value):
        named = ((item.name, getattr(value, item.name)) for item in dataclasses.fields(value))
        return {name: plain(item) for name, item in named if item is not None}
    return [plain(item) for item in value] if isinstance(value, list) else value


def tooling(model: ServedModel, tools: object, choice: object = None, parallel: bool | None = None) -> Tooling | None:
    """Return the tools of a request; None if there are none.

    Raises:
        ApiError: they are wrong, or the model cannot use tools.
    """
    from edgelm.serving.constraints import ToolOptions, require_tool_format

    try:
        options = ToolOptions.of(plain(tools), plain(choice), parallel)
        if options is None:
            return None
        return Tooling(
            model.once("tools", lambda: require_tool_format(model.running.model.tool_template, model.name)), options
        )
    except EdgeLMError as error:
        if is_of_request(error):
            raise of_request(error, model.hidden) from error
        raise


def conversation_tokens(
    model: ServedModel,
    messages: Sequence[Message],
    tools: Tooling | None = None,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """Return the prompt of a conversation.

    Raises:
        ApiError: the template refuses the messages, or there is none.
    """
    for name in variables or {}:
        if name in RESERVED:
            raise invalid("chat_template_kwargs", f"chat_template_kwargs cannot set {name}: it has a field of its own")
    for number, message in enumerate(messages):
        if message.content is None and not message.tool_calls:
            raise invalid(f"messages[{number}].content", f"messages[{number}].content is missing")
    given = [{name: value for name, value in plain(one).items() if name not in _DROPPED} for one in messages]
    try:
        if "developer" not in model.running.model.chat_template.source:
            # OpenAI's newer name of the system message.
            given = [{**one, "role": "system"} if one["role"] == "developer" else one for one in given]
        if tools is None:
            return model.running.model.chat_tokens(History().messages(given), variables)
        more = {**(variables or {}), **tools.format.variables(tools.options)}
        return model.running.model.chat_tokens(tools.format.messages(given), more)
    except EdgeLMError as error:
        if is_of_request(error):
            raise of_request(error, model.hidden, "messages") from error
        raise
