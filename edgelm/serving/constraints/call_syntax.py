"""How models write the calls of tools: as JSON between markers, as JSON alone, or with the name outside of the JSON.

A syntax reads calls (`read`, for `ToolParser`) and writes the rule of a Lark grammar that allows nothing else
(`calls`). `edgelm.serving.constraints.call_xml` has the one that is not JSON.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgelm.serving.constraints.json_schema import WHITESPACE
from edgelm.serving.constraints.tool_parser import CallReader, MalformedError, Reading, ToolParser, read_string

ARGUMENTS = ("arguments", "parameters")
NAME = "\0"
"""Stands for a function's name."""
_KNOWN = ("name", "function", "type", "id", *ARGUMENTS)
_ID, _QUOTE = ', "id": "', '"'
_CLOSE = {"{": "}", "[": "]"}

Terminal = Callable[[str], str]
"""Returns a marker as Lark: a special token, or its text."""


@dataclass(frozen=True)
class Target:
    """A function for the grammar: its name, and the rule of its arguments."""

    name: str
    rule: str


class CallSyntax(CallReader):
    """How a model writes calls.

    Attributes:
        ends: texts that end calls; each may be a special token.
        between: text between a call and the next marker; None where one marker is for all calls.
    """

    ends: tuple[str, ...] = ()
    between: str | None = None

    def arguments(self, prefix: str, parameters: Mapping[str, Any], lenient: bool) -> dict[str, str]:
        """Return Lark rules of a function's arguments, by their names. The first one is `prefix`.

        Args:
            prefix: a name of a rule.
            parameters: the schema of the arguments.
            lenient: ignore keywords that cannot be enforced.
        """
        return {prefix: json_rule(parameters, lenient)}

    @abstractmethod
    def after_marker(self, targets: Sequence[Target], terminal: Terminal, *, parallel: bool) -> str:
        """Return the part of a Lark rule after a marker: one call, or several where `between` is None."""


def json_rule(schema: Mapping[str, Any], lenient: bool) -> str:
    """Return a JSON schema as a part of a Lark rule."""
    options: dict[str, Any] = {"whitespace_pattern": WHITESPACE}
    if lenient:
        options["lenient"] = True
    return f"%json {json.dumps({**schema, 'x-guidance': options}, ensure_ascii=False)}"


def _either(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"({' | '.join(parts)})"


@dataclass(frozen=True)
class JsonCalls(CallSyntax):
    """Calls as JSON objects after a marker: `{"name": ..., "arguments": {...}}`.

    Attributes:
        marker: the text before the calls.
        open: text between the marker and the first call: whitespace, and "[" for an array.
        close: text after the last call, before `end`.
        end: the marker after the calls; empty where there is none.
        head: the beginning of a call up to its arguments, with `NAME` for the function's name.
        separator: text between calls after one marker.
        between: see `CallSyntax`.
        bare: see `CallSyntax`. The marker may then be missing.
        own_id: whether the model writes an id of its own after the arguments. It is not used.
        short_ids: see `CallSyntax`.
    """

    marker: str
    open: str = ""
    close: str = ""
    end: str = ""
    head: str = f'{{"name": "{NAME}", "arguments": '
    separator: str = ", "
    between: str | None = None
    bare: bool = False
    own_id: bool = False
    short_ids: bool = False

    @property
    def markers(self) -> tuple[str, ...]:  # type: ignore[override] # read-only here
        """See `CallSyntax`."""
        return (self.marker,)

    @property
    def ends(self) -> tuple[str, ...]:  # type: ignore[override] # read-only here
        """See `CallSyntax`."""
        return (self.end,) if self.end else ()

    def read(self, parser: ToolParser) -> Reading:
        """See `CallSyntax`. One object or an array of them, whatever the model was trained for."""
        first = yield from parser.blank()
        if first == "[":
            yield from parser.get()
            yield from self._objects(parser, ",")
            if (yield from parser.get()) != "]":
                raise MalformedError
        else:
            yield from self._objects(parser, ";," if self.bare else self.separator.strip())
        if self.end:
            yield from self._skip_end(parser)
        parser.end()

    def read_bare(self, parser: ToolParser) -> Reading:
        """See `CallSyntax`: only functions of the request are called, as an answer may be JSON."""
        yield from self._objects(parser, ";,", only_known=True)
        parser.end()

    def _objects(self, parser: ToolParser, separators: str, *, only_known: bool = False) -> Reading:
        """Read objects up to a character that cannot follow one, which is read again."""
        while True:
            yield from parser.blank()
            yield from read_call(parser, only_known=only_known)
            following = yield from parser.blank()
            if following and following in separators:  # of one character each
                yield from parser.get()
            elif following != "{":
                return

    def recover(self, parser: ToolParser) -> Reading:
        """See `CallSyntax`."""
        if self.end:
            yield from self._skip_end(parser)

    def _skip_end(self, parser: ToolParser) -> Reading:
        """Read up to the end marker. Models forget it, or close too many braces."""
        seen = ""
        while not seen.endswith(self.end):
            character = yield from parser.get()
            if not character:
                return
            seen = (seen + character)[-len(self.end) :]

    def after_marker(self, targets: Sequence[Target], terminal: Terminal, *, parallel: bool) -> str:
        """See `CallSyntax`."""
        own_id = f"({_text(_ID)} /[A-Za-z0-9]{{9}}/ {_text(_QUOTE)})? " if self.own_id else ""
        one = _either([f"{_text(self.head.replace(NAME, t.name))} {t.rule} {own_id}{_text('}')}" for t in targets])
        several = self.between is None and parallel
        body = f"{one} ({_text(self.separator)} {one})*" if several else one
        end = [terminal(self.end)] if self.end else []
        return " ".join([*_texts(self.open), body, *_texts(self.close), *end])


@dataclass(frozen=True)
class NamedCalls(CallSyntax):
    """Calls as `[TOOL_CALLS]name[ARGS]{...}`, those of Mistral's models since 2025."""

    marker: str = "[TOOL_CALLS]"
    separator: str = "[ARGS]"
    short_ids: bool = True
    between: str | None = ""

    @property
    def markers(self) -> tuple[str, ...]:  # type: ignore[override] # read-only here
        """See `CallSyntax`."""
        return (self.marker,)

    @property
    def ends(self) -> tuple[str, ...]:  # type: ignore[override] # read-only here
        """See `CallSyntax`."""
        return (self.separator,)

    def read(self, parser: ToolParser) -> Reading:
        """See `CallSyntax`. An id between name and arguments, `[CALL_ID]...`, is ignored."""
        yield from parser.blank()
        head = ""
        while not head.endswith(self.separator):
            character = yield from parser.get()
            if not character or character in "{}\n" or len(head) > 200:
                raise MalformedError
            head += character
        name = head.removesuffix(self.separator).split("[CALL_ID]")[0].strip()
        if not name:
            raise MalformedError
        if (yield from parser.blank()) != "{":
            raise MalformedError
        parser.begin(name)
        yield from read_value(parser, parser.arguments)
        parser.end()

    def after_marker(self, targets: Sequence[Target], terminal: Terminal, *, parallel: bool) -> str:
        """See `CallSyntax`."""
        del parallel
        return _either([f"{_text(t.name)} {terminal(self.separator)} {t.rule}" for t in targets])


def _texts(text: str) -> list[str]:
    """Return a text as literals of Lark: one, or none for the empty text."""
    return [_text(text)] if text else []


def _text(text: str) -> str:
    """Return a text as a literal of Lark."""
    return json.dumps(text)


def read_call(parser: ToolParser, *, only_known: bool) -> Reading:
    """Read an object with a function's name and its arguments, in any order, and report the call.

    Args:
        parser: the parser, before the object.
        only_known: whether an unknown name, or a key that calls do not have, makes it no call.

    Raises:
        MalformedError: it is no such object.
    """
    call = _Object(parser, only_known)
    yield from call.read()
    call.close()


class _Object:
    """One call that is read."""

    def __init__(self, parser: ToolParser, only_known: bool) -> None:
        self._parser, self._only_known = parser, only_known
        self._name: str | None = None
        self._arguments: str | None = None  # read before the name
        self._begun = False

    def read(self) -> Reading:
        parser = self._parser
        yield from parser.expect("{")
        if (yield from parser.blank()) == "}":
            yield from parser.get()
            return
        while True:
            yield from parser.blank()
            yield from parser.expect('"')
            key = yield from read_string(parser)
            yield from parser.blank()
            yield from parser.expect(":")
            first = yield from parser.blank()
            yield from self._field(key, first)
            yield from parser.blank()
            following = yield from parser.get()
            if following == "}":
                return
            if following != ",":
                raise MalformedError

    def _field(self, key: str, first: str) -> Reading:
        parser = self._parser
        if self._only_known and key not in _KNOWN:
            raise MalformedError
        if key in ("name", "function") and first == '"' and self._name is None:
            yield from parser.get()
            self._name = yield from read_string(parser)
            if not self._name or (self._only_known and self._name not in parser.functions):
                raise MalformedError
        elif key == "function" and first == "{" and self._name is None:
            yield from self.read()
        elif key in ARGUMENTS and not self._begun and self._arguments is None:
            yield from self._read_arguments(first)
        else:
            yield from read_value(parser, lambda text: None)

    def _read_arguments(self, first: str) -> Reading:
        parser = self._parser
        if first == "{" and self._name is not None:
            self._begun = True
            parser.begin(self._name)
            yield from read_value(parser, parser.arguments)
            return
        read: list[str] = []
        yield from read_value(parser, read.append)
        text = "".join(read)
        if first == '"':  # JSON in a string
            try:
                text = json.loads(text, strict=False)
            except ValueError:
                raise MalformedError from None
        text = "{}" if text in ("null", "") else text
        if not text.lstrip().startswith("{"):
            raise MalformedError
        self._arguments = text

    def close(self) -> None:
        """Report what could not be reported earlier, and end the call."""
        if not self._begun:
            if self._name is None:
                raise MalformedError
            self._parser.begin(self._name)
            self._parser.arguments(self._arguments or "{}")
        self._parser.end()


def read_value(parser: ToolParser, take: Callable[[str], None]) -> Reading:
    """Read a JSON value, and pass on its characters. Its strings and brackets are checked, the rest is as it is.

    Raises:
        MalformedError: the text ends, or a bracket closes another kind.
    """
    first = yield from parser.get()
    take(first)
    if first == '"':
        yield from _string(parser, take)
    elif first in _CLOSE:
        open_ = [_CLOSE[first]]
        while open_:
            character = yield from parser.get()
            if not character:
                raise MalformedError
            if character in "}]" and character != open_[-1]:
                raise MalformedError
            take(character)
            if character == '"':
                yield from _string(parser, take)
            elif character in _CLOSE:
                open_.append(_CLOSE[character])
            elif character == open_[-1]:
                open_.pop()
    else:
        while True:
            following = yield from parser.get()
            if not following or following in ",}]" or following.isspace():
                parser.unget(following)
                return
            take(following)


def _string(parser: ToolParser, take: Callable[[str], None]) -> Reading:
    """Pass on the rest of a JSON string."""
    while True:
        character = yield from parser.get()
        if not character:
            raise MalformedError
        take(character)
        if character == '"':
            return
        if character == "\\":
            escaped = yield from parser.get()
            if not escaped:
                raise MalformedError
            take(escaped)
