"""Find the calls of tools in an answer while it is generated.

The parser reads characters one by one, so its result does not depend on how the text was cut into pieces. A call is
reported as soon as its name is known, then its arguments as they come. Text that only looks like a call is content.
"""

from __future__ import annotations

import json
import secrets
import string
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

from edgelm.serving.constraints.reasoning import ReasoningDelta
from edgelm.serving.constraints.tools import Function

_ALPHABET = string.ascii_letters + string.digits
Reading = Generator[None, str, Any]
"""A reader: it yields for the next character, and gets "" at the end of the text."""


@dataclass(frozen=True)
class ContentDelta:
    """A piece of the answer's text."""

    text: str


@dataclass(frozen=True)
class CallDelta:
    """A piece of a call.

    Attributes:
        index: number of the call in the answer, from 0.
        id: the call's id, in its first piece; None in the others.
        name: the function's name, in the call's first piece; None in the others.
        arguments: the next characters of the arguments, which together are JSON as the model wrote it.
    """

    index: int
    id: str | None
    name: str | None
    arguments: str


Delta = ReasoningDelta | ContentDelta | CallDelta


@dataclass(frozen=True)
class Call:
    """A whole call: its id, the function's name, and the arguments as JSON text."""

    id: str
    name: str
    arguments: str


def collect(deltas: Sequence[Delta]) -> tuple[str, str, list[Call]]:
    """Return the reasoning, the content and the calls of an answer, from all its deltas."""
    reasoning = "".join([delta.text for delta in deltas if isinstance(delta, ReasoningDelta)])
    content = "".join([delta.text for delta in deltas if isinstance(delta, ContentDelta)])
    calls: list[Call] = []
    for delta in deltas:
        if isinstance(delta, CallDelta):
            if delta.id is not None and delta.name is not None:
                calls.append(Call(delta.id, delta.name, delta.arguments))
            else:
                last = calls[delta.index]
                calls[delta.index] = Call(last.id, last.name, last.arguments + delta.arguments)
    return reasoning, content, calls


class MalformedError(Exception):
    """The text is no call."""


class CallReader(ABC):
    """Reads the calls of one way to write them.

    Attributes:
        markers: texts that begin calls; each may be a special token.
        bare: whether an answer may begin with calls without a marker.
        short_ids: whether ids are 9 letters and digits.
    """

    markers: tuple[str, ...]
    bare: bool = False
    short_ids: bool = False

    @abstractmethod
    def read(self, parser: ToolParser) -> Reading:
        """Read the calls after a marker.

        Raises:
            MalformedError: there is no call.
        """

    def read_bare(self, parser: ToolParser) -> Reading:
        """Read the calls that an answer begins with. Raises as `read`."""
        return self.read(parser)

    def recover(self, parser: ToolParser) -> Reading:
        """Skip the rest of a call that became malformed after it was reported."""
        del parser
        yield from ()


class ToolParser:
    """Parser of one answer. Feed it the text, with the special tokens that `ToolFormat.shown` names.

    Attributes:
        calls: number of calls so far.
        marker: the marker that the current calls began with.
    """

    def __init__(self, syntax: CallReader, functions: Sequence[Function], *, parallel: bool = True) -> None:
        """Called by `ToolFormat.parser`.

        Args:
            syntax: how the model writes calls.
            functions: the functions of the request.
            parallel: False: report the first call only.
        """
        self.syntax = syntax
        self.functions = {function.name: function for function in functions}
        self.calls = 0
        self.marker = ""
        self._parallel = parallel
        self._deltas: list[Delta] = []
        self._back: list[str] = []  # characters to read again
        self._raw: list[str] = []  # characters since the last call or content
        self._open = False  # the current call was reported
        self._after_call = False  # no content since the last call
        self._said = False  # there was content
        self._machine = self._run()
        next(self._machine)

    def feed(self, text: str) -> list[Delta]:
        """Read the next piece of the answer, and return what is certain now."""
        for character in text:
            self._machine.send(character)
        return self._drained()

    def finish(self) -> list[Delta]:
        """End the answer, and return the rest. A call without its end keeps the arguments that it has."""
        try:
            self._machine.send("")
        except StopIteration:
            return self._drained()
        raise AssertionError("a reader ignored the end of the text")

    def _drained(self) -> list[Delta]:
        deltas, self._deltas = self._deltas, []
        joined: list[Delta] = []
        for delta in deltas:
            last = joined[-1] if joined else None
            if isinstance(delta, ContentDelta) and isinstance(last, ContentDelta):
                joined[-1] = ContentDelta(last.text + delta.text)
            elif isinstance(delta, CallDelta) and isinstance(last, CallDelta) and last.index == delta.index:
                joined[-1] = CallDelta(last.index, last.id, last.name, last.arguments + delta.arguments)
            else:
                joined.append(delta)
        return joined

    # For the readers of a syntax.

    def get(self) -> Reading:
        """Read a character. At the end of the text it is "", every time."""
        if self._back:
            character = self._back.pop()
        else:
            character = yield
        if character:
            self._raw.append(character)
        else:
            self._back.append("")
        return character

    def unget(self, character: str) -> None:
        """Read this character again."""
        if character:
            self._raw.pop()
            self._back.append(character)

    def blank(self) -> Reading:
        """Skip whitespace, and return the character after it, which is read again."""
        while True:
            character = yield from self.get()
            if not character or not character.isspace():
                self.unget(character)
                return character

    def expect(self, text: str) -> Reading:
        """Read exactly `text`."""
        for wanted in text:
            if (yield from self.get()) != wanted:
                raise MalformedError

    def begin(self, name: str) -> None:
        """Report a call."""
        self._open = True
        self.calls += 1
        if self._reported:
            self._deltas.append(CallDelta(self.calls - 1, self._new_id(), name, ""))

    def arguments(self, text: str) -> None:
        """Report the next characters of the call's arguments."""
        if self._reported:
            self._deltas.append(CallDelta(self.calls - 1, None, None, text))

    def end(self) -> None:
        """End the call."""
        self._open, self._after_call = False, True
        self._raw.clear()

    @property
    def _reported(self) -> bool:
        return self._parallel or self.calls == 1

    def _new_id(self) -> str:
        if self.syntax.short_ids:
            return "".join(secrets.choice(_ALPHABET) for _ in range(9))
        return "call_" + secrets.token_hex(12)

    # The answer as a whole.

    def _run(self) -> Reading:
        bare = self.syntax.bare
        if bare:
            yield from self._bare()
        while True:
            if not (yield from self._content()):
                return
            try:
                yield from self.syntax.read(self)
            except MalformedError:
                yield from self._give_up()

    def _bare(self) -> Reading:
        """Read calls without a marker, which an answer may begin with."""
        if (yield from self.blank()) == "{":
            try:
                yield from self.syntax.read_bare(self)
            except MalformedError:
                yield from self._give_up()
        else:
            self._back += reversed(self._raw)
            self._raw.clear()

    def _give_up(self) -> Reading:
        """End a call that was reported. If none was, what was read since the last one is content."""
        if self._raw and self._back != [""]:
            self.unget(self._raw[-1])  # what was not expected may begin a marker
        raw = "".join(self._raw)
        if self._open:
            self.end()
            yield from self.syntax.recover(self)
            raw = ""
        self._raw.clear()
        self._say(raw)

    def _say(self, text: str) -> None:
        """Report content. Whitespace next to calls is none, but between texts some of it stays."""
        if self._after_call and not (self._said and text.strip()):
            text = text.lstrip()
        if text:
            self._after_call, self._said = False, True
            self._deltas.append(ContentDelta(text))

    def _content(self) -> Reading:
        """Read content up to a marker. Return whether one came before the end of the text."""
        markers = self.syntax.markers
        held = ""
        while True:
            character = yield from self.get()
            self._raw.clear()
            if not character:
                self._say(held)
                return False
            held += character
            found = next((marker for marker in markers if held.endswith(marker)), None)
            if found is not None:
                content = held[: -len(found)].rstrip()
                self._say(content)
                self._raw[:] = held[len(content) :]
                self.marker = found
                return True
            keep = _maybe_marker(held, markers)
            self._say(held[: len(held) - keep])
            held = held[len(held) - keep :]


def _maybe_marker(text: str, markers: Sequence[str]) -> int:
    """Return the length of the end of `text` that is whitespace and the beginning of a marker."""
    longest = max(
        (n for marker in markers for n in range(1, min(len(marker), len(text) + 1)) if text.endswith(marker[:n])),
        default=0,
    )
    return len(text) - len(text[: len(text) - longest].rstrip())


def read_string(parser: ToolParser) -> Reading:
    """Read a JSON string whose first quote was read, and return it."""
    text = '"'
    while True:
        character = yield from parser.get()
        if not character:
            raise MalformedError
        text += character
        if character == "\\":
            text += yield from parser.get()
        elif character == '"':
            try:
                return json.loads(text, strict=False)
            except ValueError:
                raise MalformedError from None
