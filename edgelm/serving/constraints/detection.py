"""Find out how a model calls tools, by its chat template.

A template is tried with a tool and a conversation that calls it. What it writes for the earlier call is what the model
was trained to write: the markers, their whitespace, the keys and the separators. Names of models play no part.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

from edgelm.errors import GenerationError, GenerationValueError
from edgelm.serving.constraints.call_syntax import NAME, CallSyntax, JsonCalls, NamedCalls
from edgelm.serving.constraints.call_xml import XmlCalls
from edgelm.serving.constraints.history import History
from edgelm.serving.constraints.tool_format import ToolFormat
from edgelm.tokenization.chat_template import ChatTemplate

_NAME, _KEY, _VALUE = "edgelm_probe", "edgelm_key", "edgelm_value"
_SHORT, _LONG = "a1b2c3d4e", "call_" + "a1b2c3d4e" * 2  # some of Mistral's templates want 9 letters and digits
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "Return a value.",
        "parameters": {"type": "object", "properties": {_KEY: {"type": "string"}}, "required": [_KEY]},
    },
}
_HELLO = "Hello edgelm"
_USER = {"role": "user", "content": _HELLO}
_ARGUMENTS = rf'\{{"{_KEY}": ?"{_VALUE}"\}}'
_RIGHT = re.compile(rf"{_ARGUMENTS}|<parameter={_KEY}>")
_CALL = re.compile(
    rf'(?P<head>\{{\s?"name": ?"{_NAME}", ?"(?:arguments|parameters)": ?){_ARGUMENTS}(?P<own_id>, "id": "\w+")?\s?\}}'
)
_MARKER = re.compile(r"(<[^\s<>]{1,40}>|\[[A-Z_]{1,40}\])(\s*\[?\s*)$")
_GRANITE = JsonCalls("<|tool_call|>", open="[", close="]", separator=", ")
_HERMES = JsonCalls("<tool_call>", open="\n", close="\n", end="</tool_call>", between="\n")
_CONVENTIONS = {"<|tool_call|>": _GRANITE, '<tool_call>\n{"name"': _HERMES}
"""What templates that do not write earlier calls tell the model about them, and what it then writes."""


def tool_format(template: ChatTemplate) -> ToolFormat | None:
    """Return how a model calls tools, by its chat template; None if the template has no tools.

    Raises:
        GenerationValueError: the template shows tools, but how the model writes calls is not known here.
    """
    try:
        prompt = template.render([_USER], variables={"tools": [_TOOL]})
    except GenerationError:
        return None
    if _NAME not in prompt:
        return None
    generation_prompt = prompt[prompt.rfind(_HELLO) :]
    for history in (History(), History(empty_content=True), History(text=True), History(text=True, empty_content=True)):
        one = _rendered(template, history, calls=1)
        if not _RIGHT.search(one):
            continue
        two = _rendered(template, history, calls=2)
        syntax = _syntax(one, two, generation_prompt, long_ids=bool(_rendered(template, history, calls=1, id_=_LONG)))
        if syntax is not None:
            return ToolFormat(syntax, replace(history, short_ids=syntax.short_ids), several=bool(two))
        break
    else:
        for convention, syntax in _CONVENTIONS.items():
            if convention in prompt:
                return ToolFormat(syntax, History())
    raise GenerationValueError(
        "the model's chat template shows tools, but calls that are not JSON are known only as Qwen3-Coder and Mistral "
        "write them: leave out tools, and ask for JSON in the prompt"
    )


def require_tool_format(template: ChatTemplate, model: str) -> ToolFormat:
    """Return `tool_format`.

    Args:
        template: the chat template.
        model: the model's name, for the message.

    Raises:
        GenerationValueError: the template has no tools, or an unknown way to call them.
    """
    found = tool_format(template)
    if found is None:
        raise GenerationValueError(
            f"tools cannot be used with {model}: its chat template does not show them to the model. Leave out tools, "
            "or choose a model that was trained to call them"
        )
    return found


def _rendered(template: ChatTemplate, history: History, calls: int, id_: str = _SHORT) -> str:
    """Return a conversation with a number of calls; an empty text if the template refuses it."""
    ids = [id_[:-1] + str(i) for i in range(calls)]
    function = {"name": _NAME, "arguments": json.dumps({_KEY: _VALUE})}
    tool_calls = [{"id": index, "type": "function", "function": function} for index in ids]
    conversation: list[dict[str, Any]] = [_USER, {"role": "assistant", "content": None, "tool_calls": tool_calls}]
    conversation += [{"role": "tool", "tool_call_id": index, "content": "42"} for index in ids]
    try:
        return template.render(history.messages(conversation), variables={"tools": [_TOOL]})
    except GenerationError:
        return ""


def _syntax(one: str, two: str, generation_prompt: str, *, long_ids: bool) -> CallSyntax | None:
    """Return how calls are written; None if that is not known.

    Args:
        one: a conversation with one call.
        two: the same with two calls; empty if the template refuses it.
        generation_prompt: what a prompt ends with, from the user's message on.
        long_ids: whether the template takes ids of other than 9 characters.
    """
    if re.search(rf"<tool_call>\s*<function={_NAME}>\s*<parameter={_KEY}>", one):
        return XmlCalls()
    if re.search(rf"\[TOOL_CALLS\]\s?{_NAME}(\[CALL_ID\]\w+)?\[ARGS\]", one):
        return NamedCalls()
    call = _CALL.search(one)
    if call is None:
        return None
    head = call["head"].replace(_NAME, NAME)
    pair = list(_CALL.finditer(two))
    middle = two[pair[0].end() : pair[1].start()] if len(pair) > 1 else ""
    found = _MARKER.search(one[: call.start()])
    if found is None or found[1] in generation_prompt:
        array = one[: call.start()].rstrip().endswith("[")
        return None if array else JsonCalls("<|python_tag|>", head=head, separator=middle or "; ", bare=True)
    marker, opening = found[1], found[2]
    close, end = _close(one[call.end() :], marker, "[" in opening)
    between = None
    if marker in middle:
        before, after = middle.removeprefix(close + end).split(marker, 1)
        if after != opening:
            return None
        between = before
    return JsonCalls(
        marker,
        open=opening,
        close=close,
        end=end,
        head=head,
        separator=middle or ", " if between is None else "",
        between=between,
        own_id=call["own_id"] is not None,
        short_ids=not long_ids,
    )


def _close(rest: str, marker: str, array: bool) -> tuple[str, str]:
    """Return the text after the last call, and the marker after it; both are empty where there is nothing."""
    ends = {
        marker.replace("<", "</"), marker.replace("<|", "<|/"), marker.replace("[", "[/"),
        marker.replace("begin", "end"), marker.replace("start", "end"),
    } - {marker}  # fmt: skip
    found = re.match(rf"(\s*{']' if array else ''}\s*)({'|'.join(map(re.escape, sorted(ends, reverse=True)))})", rest)
    return (found[1], found[2]) if found else ("]" if array else "", "")
