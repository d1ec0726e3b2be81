"""The fields of a request about tools: `tools`, `tool_choice` and `parallel_tool_calls`, checked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from edgelm.errors import GenerationTypeError, GenerationValueError
from edgelm.serving.constraints import json_schema

MOST_TOOLS = 128
MOST_BYTES = 256 << 10
"""Size of all schemas together."""
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")

Choice = Literal["auto", "none", "required"]


@dataclass(frozen=True)
class Function:
    """A function that the model may call.

    Attributes:
        name: its name.
        parameters: the JSON schema of its arguments, an object.
        strict: whether calls have to follow the schema in every case.
        where: its place in the request, for messages.
    """

    name: str
    parameters: Mapping[str, Any]
    strict: bool
    where: str


@dataclass(frozen=True)
class ToolOptions:
    """Checked tools of a request.

    Attributes:
        tools: what the chat template gets, without `strict`, which is not for the model.
        functions: the functions that may be called: all, or those that `tool_choice` names.
        choice: "auto": the model decides; "none": it calls nothing; "required": it has to call a function.
        named: whether `tool_choice` named one function; a response then ends with "stop".
        parallel: whether several calls in one answer are allowed; not where one function was named, as with OpenAI.
    """

    tools: tuple[Mapping[str, Any], ...]
    functions: tuple[Function, ...]
    choice: Choice
    named: bool = False
    parallel: bool = True

    @classmethod
    def of(cls, tools: object, tool_choice: object = None, parallel_tool_calls: object = None) -> ToolOptions | None:
        """Check the three fields of a request. None means that a field is missing.

        Returns:
            The options; None where there are no tools.

        Raises:
            GenerationTypeError: a value has a wrong type.
            GenerationValueError: a name is invalid, unknown or given twice, or there are too many or too large tools.
        """
        if parallel_tool_calls is not None and not isinstance(parallel_tool_calls, bool):
            raise GenerationTypeError(f"parallel_tool_calls is {parallel_tool_calls!r:.60}: it has to be true or false")
        if tools is not None and (not isinstance(tools, Sequence) or isinstance(tools, str | bytes)):
            raise GenerationTypeError(f"tools is {tools!r:.60}: it has to be a list of functions")
        if not tools:
            if tool_choice not in (None, "auto", "none"):
                raise GenerationValueError(f"tool_choice is {tool_choice!r:.60}, but there are no tools")
            return None
        if len(tools) > MOST_TOOLS:
            raise GenerationValueError(f"tools has {len(tools)} functions, more than the limit of {MOST_TOOLS}")
        functions = [_function(tool, f"tools[{i}]") for i, tool in enumerate(tools)]
        _check_names(functions)
        size = sum(len(json_schema.text_of(f.parameters, f.where).encode()) for f in functions)
        if size > MOST_BYTES:
            raise GenerationValueError(f"tools has schemas of {size} bytes, more than the limit of {MOST_BYTES}")
        choice, names = _choice(tool_choice)
        known = {function.name for function in functions}
        unknown = [name for name in names or () if name not in known]
        if unknown:
            raise GenerationValueError(
                f"tool_choice names the function {unknown[0]!r:.80}, which is not in tools; there are: "
                f"{', '.join(sorted(known))}"
            )
        chosen = tuple(function for function in functions if names is None or function.name in names)
        named = isinstance(tool_choice, Mapping) and tool_choice.get("type") == "function"
        parallel = parallel_tool_calls is not False and not named
        return cls(tuple(_shown(tool) for tool in tools), chosen, choice, named, parallel)


def _function(tool: object, where: str) -> Function:
    if not isinstance(tool, Mapping) or tool.get("type") != "function":
        raise GenerationTypeError(
            f'{where} is {tool!r:.60}: it has to be like {{"type": "function", "function": {{"name": ...}}}}'
        )
    function = tool.get("function")
    if not isinstance(function, Mapping):
        raise GenerationTypeError(f"{where}.function is {function!r:.60}: it has to be an object with a name")
    where = f"{where}.function"
    name = function.get("name")
    if not isinstance(name, str):
        raise GenerationTypeError(f"{where}.name is {name!r:.60}: it has to be a string")
    if not _NAME.fullmatch(name):
        raise GenerationValueError(
            f"{where}.name is {name!r:.80}: it has to be 1 to 64 letters, digits, underscores, hyphens or dots"
        )
    for key, kind, noun in (("description", str, "a string"), ("strict", bool, "true or false")):
        value = function.get(key)
        if value is not None and not isinstance(value, kind):
            raise GenerationTypeError(f"{where}.{key} is {value!r:.60}: it has to be {noun}")
    parameters = function.get("parameters")
    schema = json_schema.checked({} if parameters is None else parameters, f"{where}.parameters")
    if schema.get("type", "object") != "object":
        raise GenerationValueError(f'{where}.parameters has the type {schema["type"]!r:.60}: it has to be "object"')
    return Function(name, {"type": "object", **schema}, function.get("strict") is True, where)


def _check_names(functions: Sequence[Function]) -> None:
    seen: dict[str, str] = {}
    for function in functions:
        if function.name in seen:
            raise GenerationValueError(
                f"{function.where}.name is {function.name!r}, as {seen[function.name]}.name is: give each function a "
                "name of its own"
            )
        seen[function.name] = function.where


def _choice(given: object) -> tuple[Choice, list[str] | None]:
    """Return whether a call is required, and the names of the functions that may be called; None for all."""
    if given is None or given == "auto":
        return "auto", None
    if given == "none":
        return "none", None
    if given == "required":
        return "required", None
    kind = given.get("type") if isinstance(given, Mapping) else None
    if kind == "function":
        assert isinstance(given, Mapping)
        return "required", [_named(given, "tool_choice")]
    if kind == "allowed_tools":
        assert isinstance(given, Mapping)
        allowed = given.get("allowed_tools")
        tools = allowed.get("tools") if isinstance(allowed, Mapping) else None
        mode = allowed.get("mode") if isinstance(allowed, Mapping) else None
        if isinstance(tools, Sequence) and tools and mode in ("auto", "required"):
            names = [_named(tool, f"tool_choice.allowed_tools.tools[{i}]") for i, tool in enumerate(tools)]
            return ("required" if mode == "required" else "auto"), names
    raise GenerationValueError(
        f'tool_choice is {given!r:.60}: it has to be "auto", "none", "required", '
        '{"type": "function", "function": {"name": ...}}, or of the type "allowed_tools" with a mode and tools'
    )


def _named(given: object, where: str) -> str:
    function = given.get("function") if isinstance(given, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise GenerationTypeError(f'{where} has to be like {{"type": "function", "function": {{"name": ...}}}}')
    return name


def _shown(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    function = {key: value for key, value in tool["function"].items() if key != "strict" and value is not None}
    return {"type": "function", "function": function}
