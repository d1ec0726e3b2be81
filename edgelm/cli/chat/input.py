"""Input of `edgelm chat`: a terminal with line editing and history, or a pipe."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import click

from edgelm.cli.main import Terminated

BLOCK = '"""'
PROMPT, MORE = "> ", "... "
HISTORY_BYTES = 1 << 20
"""Limit of the history file, in bytes; beyond it, the file is cut to half of this."""
LONGEST_KEPT = 10_000
"""Characters of the longest message that the history file keeps."""

_OPENING = re.compile(r'\s*(/\w+\s+)?"""')
_UNUSABLE = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


class Cleared(Exception):  # noqa: N818 - not an error
    """Ctrl-C was pressed at the prompt. `empty`: nothing had been typed."""

    def __init__(self, *, empty: bool) -> None:
        super().__init__()
        self.empty = empty


@dataclass(frozen=True)
class Entry:
    """A message or a command.

    `literal`: it was in triple quotes, so it is not a command.
    `problem`: why it cannot be used; empty if it can.
    """

    text: str
    literal: bool = False
    problem: str = ""


def read_entry(line: Callable[[str], str]) -> Entry:
    '''Read a line or, from """ to """, several. A paste is one line that holds line ends.

    Args:
        line: reads one line without its end, after showing a prompt.

    Raises:
        EOFError: the input has ended.
        Cleared: Ctrl-C at the prompt.
    '''
    text = line(PROMPT)
    opening = _OPENING.match(text)
    rest = "" if opening is None else text[opening.end() :]
    if opening is None or ("\n" in rest and not _closed(rest)):  # a paste that only begins with three quotes
        return Entry(text, problem=unusable(text))
    while not _closed(rest):
        try:
            rest += "\n" + line(MORE)
        except EOFError:
            return Entry(text, problem=f"the input ended before the {BLOCK} that ends the message")
        except Cleared as cleared:
            raise Cleared(empty=False) from cleared
    body = rest.rstrip().removesuffix(BLOCK).removeprefix("\n").removesuffix("\n")
    command = opening[1] or ""
    return Entry(command + body, literal=not command, problem=unusable(body))


def _closed(text: str) -> bool:
    return text.rstrip().endswith(BLOCK)


def unusable(text: str) -> str:
    """Return what is wrong with a message (bytes that are not UTF-8, control characters); "" if nothing is."""
    found = _UNUSABLE.search(text)
    if found is None:
        return ""
    code, place = ord(found[0]), found.start() + 1
    if 0xDC80 <= code <= 0xDCFF:  # what Python makes of a byte that it cannot decode
        return f"character {place} is the byte 0x{code - 0xDC00:02x}, which is not valid UTF-8"
    kind = "half a surrogate pair" if code >= 0xD800 else "a control character"
    return f"character {place} is U+{code:04X}, {kind}"


def piped_entries(stream: BinaryIO) -> Callable[[], Entry]:
    """Return a function that reads the next entry of a pipe or file, without a prompt; EOFError at the end."""

    def line(prompt: str) -> str:
        del prompt
        data = stream.readline()
        if not data:
            raise EOFError
        # A byte that is not UTF-8 becomes a lone surrogate, which `unusable` finds.
        return data.decode("utf-8", "surrogateescape").removeprefix("\ufeff").removesuffix("\n").removesuffix("\r")

    return lambda: read_entry(line)


def typed_entries(history: History | None, prompt_style: Callable[[str], str]) -> Callable[[], Entry]:
    """Return a function that reads the next entry from a terminal, with readline's editing where Python has it.

    Raises as `read_entry`.

    Args:
        history: the history file, if any.
        prompt_style: adds colour to a prompt.
    """
    readline: Any = None
    if sys.stdout.isatty():  # input() does not use readline otherwise
        with contextlib.suppress(ImportError):  # Windows has none
            import readline
    if readline is not None:
        readline.set_auto_history(False)
        readline.parse_and_bind("set enable-bracketed-paste on")  # then a paste of several lines is one line of input
        for text in history.read() if history is not None else []:
            readline.add_history(text)
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # as for a pipe

    def line(prompt: str) -> str:
        try:
            if readline is None:
                click.echo(prompt_style(prompt), nl=False, err=True)  # standard output is for answers
                return input()
            # \x01 and \x02 enclose characters without width.
            text = input(re.sub("(\x1b\\[[0-9;]*m)", "\x01\\1\x02", prompt_style(prompt)))
            return text.replace("\r\n", "\n").replace("\r", "\n")
        except EOFError:
            click.echo(err=True)
            raise
        except Terminated:
            raise
        except KeyboardInterrupt:
            raise Cleared(empty=readline is None or not readline.get_line_buffer()) from None

    def read() -> Entry:
        entry = read_entry(line)
        text = entry.text.rstrip()
        if entry.literal and text.startswith("/"):
            text = " " + text  # so that it is not a command when it is recalled
        last = 0 if readline is None else readline.get_current_history_length()
        new = not last or readline.get_history_item(last) != text
        if readline is not None and text.strip() and new and not entry.problem:
            readline.add_history(text)
            if history is not None:
                history.add(text)
        return entry

    return read


class History:
    """The history file: one JSON string a line, the oldest first.

    Errors of reading and writing are ignored: the history then ends with the session.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def default(cls) -> History | None:
        """Return the user's history file, under XDG_STATE_HOME; None where there is no home."""
        state = Path(os.environ.get("XDG_STATE_HOME", ""))
        try:
            # The XDG specification says to ignore a relative path.
            folder = state if state.is_absolute() else Path.home() / ".local" / "state"
        except RuntimeError:
            return None
        return cls(folder / "edgelm" / "chat_history")

    def read(self) -> list[str]:
        """Return the entries. A file that is too large is cut first."""
        try:
            if not self.path.is_file():
                return []
            with self.path.open("rb") as stream:
                stream.seek(max(0, self.path.stat().st_size - HISTORY_BYTES))
                lines = stream.read().splitlines(keepends=True)
            if self.path.stat().st_size > HISTORY_BYTES:
                lines = self._cut(lines)
        except OSError:
            return []
        found = []
        for line in lines:
            with contextlib.suppress(ValueError):  # a line that was cut, or is not JSON
                text = json.loads(line)
                if isinstance(text, str) and not unusable(text):
                    found.append(text)
        return found

    def _cut(self, lines: list[bytes]) -> list[bytes]:
        from edgelm.errors import EdgeLMError
        from edgelm.files import atomic_file

        size = sum(len(line) for line in lines)
        while size > HISTORY_BYTES // 2:
            size -= len(lines.pop(0))
        with contextlib.suppress(EdgeLMError), atomic_file(self.path) as partial:
            partial.chmod(0o600)
            partial.write_bytes(b"".join(lines))
        return lines

    def add(self, text: str) -> None:
        """Append an entry. Only the user may read the file."""
        if len(text) > LONGEST_KEPT:
            return
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(json.dumps(text).encode() + b"\n")
