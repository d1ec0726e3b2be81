"""Calls as Qwen3-Coder writes them: each argument in an element of its own, as text.

    <tool_call>
    <function=get_weather>
    <parameter=city>
    Paris
    </parameter>
    </function>
    </tool_call>

The arguments become JSON by the types in the function's schema.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgelm.serving.constraints.call_syntax import CallSyntax, Target, Terminal, json_rule
from edgelm.serving.constraints.tool_parser import MalformedError, Reading, ToolParser

_FUNCTION, _PARAMETER, _END_PARAMETER, _END_FUNCTION = "<function=", "<parameter=", "</parameter>", "</function>"
_LONGEST_NAME = 200
_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
    "object": (dict,),
    "array": (list,),
}


@dataclass(frozen=True)
class XmlCalls(CallSyntax):
    """See the module."""

    marker: str = "<tool_call>"
    end: str = "</tool_call>"
    between: str | None = "\n"

    @property
    def markers(self) -> tuple[str, ...]:  # type: ignore[override] # read-only here
        """See `CallSyntax`. The model sometimes forgets the outer element."""
        return (self.marker, _FUNCTION)

    @property
    def ends(self) -> tuple[str, ...]:  # type: ignore[override] # read-only here
        """See `CallSyntax`."""
        return (self.end,)

    def read(self, parser: ToolParser) -> Reading:
        """See `CallSyntax`."""
        if parser.marker != _FUNCTION:
            yield from parser.blank()
            yield from parser.expect(_FUNCTION)
        name = yield from _read_to(parser, ">", _LONGEST_NAME)
        parser.begin(name.strip())
        function = parser.functions.get(name.strip())
        properties = {} if function is None else function.parameters.get("properties", {})
        before = "{"
        while True:
            yield from parser.blank()
            yield from parser.expect("<")
            if (yield from parser.get()) == "/":
                yield from parser.expect(_END_FUNCTION[2:])
                break
            yield from parser.expect(_PARAMETER[2:])
            key = (yield from _read_to(parser, ">", _LONGEST_NAME)).strip()
            text = yield from _read_to(parser, _END_PARAMETER, None)
            text = text.removeprefix("\n").removesuffix("\n")
            value = _value(text, properties.get(key) if isinstance(properties, Mapping) else None)
            parser.arguments(f"{before}{json.dumps(key, ensure_ascii=False)}: {json.dumps(value, ensure_ascii=False)}")
            before = ", "
        parser.arguments("{}" if before == "{" else "}")
        parser.end()
        yield from self._skip_end(parser)
        parser.end()

    def _skip_end(self, parser: ToolParser) -> Reading:
        """Skip the end of the outer element, if it is there."""
        for wanted in self.end:
            following = yield from (parser.blank() if wanted == self.end[0] else parser.get())
            if wanted == self.end[0] and following == wanted:
                yield from parser.get()
            elif following != wanted:
                return

    def arguments(self, prefix: str, parameters: Mapping[str, Any], lenient: bool) -> dict[str, str]:
        """See `CallSyntax`. Of a string's schema only its `enum` and `const` are enforced, since it is free text."""
        properties, required = parameters.get("properties", {}), parameters.get("required", [])
        shared = {key: parameters[key] for key in ("$defs", "definitions") if key in parameters}
        rules, parts = {}, []
        for i, (key, schema) in enumerate(properties.items()):
            head, end = json.dumps(f"{_PARAMETER}{key}>\n"), f"\n{_END_PARAMETER}\n"
            values = _strings(schema)
            if values:
                rules[f"{prefix}_{i}"] = f"{head} ({' | '.join(map(json.dumps, values))}) {json.dumps(end)}"
            elif _types(schema) <= {"string"} or "string" in _types(schema):
                rules[f"{prefix}_{i}"] = f"{head} {prefix}_{i}_text"
                rules[f"{prefix}_{i}_text[lazy]"] = "/(.|\\n)*\\n<\\/parameter>\\n/"
            else:
                rules[f"{prefix}_{i}"] = f"{head} {json_rule({**shared, **schema}, lenient)} {json.dumps(end)}"
            parts.append(f"{prefix}_{i}" if key in required else f"{prefix}_{i}?")
        return {prefix: " ".join(parts) or '""', **rules}

    def after_marker(self, targets: Sequence[Target], terminal: Terminal, *, parallel: bool) -> str:
        """See `CallSyntax`."""
        del parallel
        end = json.dumps(f"{_END_FUNCTION}\n")
        one = " | ".join(f"{json.dumps(f'{_FUNCTION}{t.name}>' + chr(10))} {t.rule} {end}" for t in targets)
        return f'"\\n" ({one}) {terminal(self.end)}'


def _read_to(parser: ToolParser, end: str, most: int | None) -> Reading:
    """Return the text before `end`, and skip it. Raises MalformedError if it does not come."""
    text: list[str] = []
    while True:
        character = yield from parser.get()
        if not character or (most is not None and len(text) > most):
            raise MalformedError
        text.append(character)
        if character == end[-1] and "".join(text[-len(end) :]) == end:
            return "".join(text[: -len(end)])


def _types(schema: object) -> set[str]:
    """Return the JSON types that a schema allows; empty where it does not say."""
    if not isinstance(schema, Mapping):
        return set()
    given = schema.get("type")
    found = {given} if isinstance(given, str) else set(given) if isinstance(given, list) else set()
    for key in ("anyOf", "oneOf"):
        parts = schema.get(key)
        for part in parts if isinstance(parts, list) else ():
            found |= _types(part)
    values = schema.get("enum") if isinstance(schema.get("enum"), list) else None
    values = [schema["const"]] if "const" in schema else values
    if not found and values:
        found = {name for name, kinds in _TYPES.items() if any(_is(value, kinds, name) for value in values)}
    return found


def _strings(schema: object) -> list[str]:
    """Return the strings that `enum` or `const` allow, if they allow nothing else."""
    if not isinstance(schema, Mapping):
        return []
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    return list(values) if isinstance(values, list) and all(isinstance(value, str) for value in values) else []


def _is(value: object, kinds: tuple[type, ...], name: str) -> bool:
    return isinstance(value, kinds) and (name == "boolean" or not isinstance(value, bool))


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _value(text: str, schema: object) -> Any:
    """Return the value of an argument: JSON if its type says so, otherwise the text."""
    types = _types(schema)
    if types == {"string"}:
        return text
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        words = {"true": True, "false": False, "none": None, "null": None}
        value = words.get(text.strip().lower(), text)
    if isinstance(value, str):
        return text  # also where the model wrote quotes
    if not types:
        return value if isinstance(value, dict | list) else text
    return value if any(_is(value, _TYPES.get(name, ()), name) for name in types) else text
