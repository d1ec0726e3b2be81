"""The conversation of `edgelm chat`: its messages and commands."""

from __future__ import annotations

import dataclasses
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelm.cli.chat.input import Cleared, Entry
from edgelm.cli.common.output import CONTROL, timings_line, wants_colour, write_answer
from edgelm.cli.main import Failure, Terminated
from edgelm.errors import ContextLengthError, EdgeLMError
from edgelm.generation.trimming import trim_messages
from edgelm.tokenization.chat_template import read_messages, system_messages, write_messages

if TYPE_CHECKING:
    from edgelm.generation.language_model import LanguageModel
    from edgelm.generation.stream import Generation, TextStream

Message = dict[str, Any]

WELCOME = "/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves"
COMMANDS = {
    "system": ("[TEXT]", 'set the system message ("" removes it); without TEXT: show it'),
    "reset": ("", "forget the conversation; the system message stays"),
    "regen": ("", "answer the last message again"),
    "save": ("FILE", "write the conversation as JSON, which `edgelm run --messages` reads"),
    "load": ("FILE", "continue the conversation in such a file"),
    "help": ("", "this list"),
    "exit": ("", "leave; so does Ctrl-D"),
}
ALIASES = {"clear": "reset", "quit": "exit", "bye": "exit", "?": "help"}
MORE_HELP = (
    '  """ begins a message of several lines, """ at the end of a line ends it; a paste is one message.',
    "  To send a message that begins with /, put a space before it.",
)


class Screen:
    """Output of a session: answers on standard output, all else on standard error, coloured on a terminal."""

    def __init__(self) -> None:
        self._colour = wants_colour()

    def style(self, text: str, **style: Any) -> str:
        """Return `text` in a style, if colours are wanted."""
        return click.style(text, **style) if self._colour else text

    def info(self, text: str) -> None:
        """Print a line about the session."""
        click.echo(self.style(text.translate(CONTROL), dim=True), err=True)

    def problem(self, text: str) -> None:
        """Print an error in one line."""
        click.echo(self.style(Failure(text).format_message(), fg="red"), err=True)

    def answer(self, piece: str, *, end: bool = False) -> None:
        """Print a piece of an answer, as `write_answer` does."""
        write_answer(piece + "\n" * end)


class Session:
    """A conversation with a model.

    Attributes:
        messages: the conversation, system messages first.
        failed: whether a message or a command failed.
    """

    def __init__(
        self,
        model: LanguageModel,
        screen: Screen,
        options: dict[str, Any],
        *,
        system: str | None = None,
        trim: bool = True,
        quiet: bool = False,
    ) -> None:
        """Begin with an empty conversation.

        Args:
            model: the model.
            screen: the output.
            options: options of `LanguageModel.stream`.
            system: the system message.
            trim: drop the oldest turns when the context is full; otherwise refuse the message.
            quiet: print no lines about speed.

        Raises:
            EdgeLMError: an option is wrong, or the model has no chat template, or one without system messages.
        """
        from edgelm.generation.options import Options

        self._max_tokens = Options.of(options).max_tokens
        self._model, self._screen, self._options = model, screen, options
        self._trim, self._quiet = trim, quiet
        self._regenerated = 0
        self._interrupts = 0
        self._cancelled = False
        self.failed = False
        self.messages: list[Message] = []
        self._set_system(system)

    def run(self, read: Callable[[], Entry], *, terminal: bool) -> None:
        """Handle messages and commands until the input ends or /exit."""
        going = True
        while going:
            try:
                going = self._serve(read)
            except Terminated:
                raise
            except KeyboardInterrupt:
                # Do nothing more here: another Ctrl-C at this place would end the chat.
                self._cancelled = True
                if not terminal:
                    raise

    def _serve(self, read: Callable[[], Entry]) -> bool:
        """Handle one message or command; return whether to go on."""
        if self._cancelled:
            self._cancelled = False
            self._screen.info("\n[cancelled: the conversation is as it was before]")
        try:
            entry = read()
        except EOFError:
            return False
        except Cleared as cleared:
            self._interrupts = self._interrupts + 1 if cleared.empty else 0
            self._screen.info("\n[Ctrl-C again or Ctrl-D leaves, /help lists the commands]" if cleared.empty else "")
            return self._interrupts < 2
        self._interrupts = 0
        return self.handle(entry)

    def handle(self, entry: Entry) -> bool:
        """Run a command or answer a message; return whether to go on."""
        text = entry.text if entry.literal else entry.text.rstrip().lstrip("\n")
        command = re.match(r"/(\S*)\s*(.*)\Z", text, re.DOTALL) if not entry.literal else None
        word = command[1].lower() if command is not None else ""
        if not text.strip():
            return True
        if entry.problem:
            self._problem(f"not sent: {entry.problem}")
        elif command is not None and ("\n" not in text or word == "system"):
            return self._command(word, command[2])
        else:
            # Keep the indentation of pasted code; before a single line, spaces only protect a leading slash.
            text = text if entry.literal or "\n" in text else text.lstrip()
            self._respond([*self.messages, {"role": "user", "content": text}])
        return True

    def _problem(self, text: str) -> None:
        self.failed = True
        self._screen.problem(text)

    def _command(self, word: str, argument: str) -> bool:
        name = ALIASES.get(word, word)
        if name not in COMMANDS:
            self._problem(
                f"not sent: there is no command /{word}{_suggestion(word)}; /help says how to send such a message"
            )
            return True
        wanted = COMMANDS[name][0]
        if argument and not wanted:
            self._problem(f"/{word} takes nothing after it")
        elif not argument and wanted == "FILE":
            self._problem(f"/{word} needs the name of a file: /{word} talk.json")
        elif name == "exit":
            return False
        else:
            try:
                getattr(self, f"_do_{name}")(argument)
            except (EdgeLMError, OSError) as error:
                self._problem(f"/{word}: {error}")
        return True

    def _do_help(self, _: str) -> None:
        for name, (argument, text) in COMMANDS.items():
            others = "".join(f", /{alias}" for alias, of in ALIASES.items() if of == name)
            self._screen.info(f"  {f'/{name}{others} {argument}':<22}{text}")
        for line in MORE_HELP:
            self._screen.info(line)

    def _do_system(self, text: str) -> None:
        if text:
            self._set_system(None if text == '""' else text)
        system = [str(message["content"]) for message in self.messages[: system_messages(self.messages)]]
        self._screen.info(f"[system message: {' '.join(system)}]" if system else "[no system message]")

    def _set_system(self, text: str | None) -> None:
        from edgelm.runtimes.base import context_full

        start = [] if text is None else [{"role": "system", "content": text}]
        # Render once now, so that a template that is missing or takes no system message fails at once.
        tokens = self._model.chat_tokens([*start, {"role": "user", "content": "?"}])
        runtime = self._model.runtime
        if len(tokens) >= runtime.context_length:
            raise context_full(len(tokens), 0, runtime.context_length, runtime.model_context_length)
        self.messages = [*start, *self.messages[system_messages(self.messages) :]]

    def _do_reset(self, _: str) -> None:
        self.messages = self.messages[: system_messages(self.messages)]
        self._screen.info("[the conversation is forgotten]")

    def _do_regen(self, _: str) -> None:
        if not self.messages or self.messages[-1]["role"] != "assistant":
            self._problem("/regen: there is no answer yet")
            return
        self._respond(self.messages[:-1], again=self._regenerated + 1)

    def _do_save(self, argument: str) -> None:
        path = _path(argument)
        if len(self.messages) == system_messages(self.messages):
            self._problem("/save: nothing has been said yet")
            return
        write_messages(path, self.messages)
        self._screen.info(f"[{_count(self.messages)} saved in {path}]")

    def _do_load(self, argument: str) -> None:
        path = _path(argument)
        messages = read_messages(path)
        asked = messages[-1]["role"] == "user"
        self._model.chat_tokens(messages if asked else [*messages, {"role": "user", "content": "?"}])
        self._screen.info(f"[{_count(messages)} loaded from {path}]")
        self.messages = messages[:-1] if asked else messages
        if asked:  # as `edgelm run --messages` does
            self._respond(messages)

    def _respond(self, messages: list[Message], again: int = 0) -> None:
        """Answer `messages`, which become the conversation with the answer.

        The conversation is unchanged if that fails or is interrupted before the first text. `again` is how often this
        message was answered already.
        """
        started = time.perf_counter()
        options = dict(self._options)
        if again and options.get("seed") is not None:
            options["seed"] = (options["seed"] + again) % 2**64
        stream = None
        try:
            messages, tokens = self._fitted(messages)
            rendering = time.perf_counter() - started
            stream = self._model.stream(tokens, reuse=True, **options)
            self._show(stream)
        except EdgeLMError as error:
            if stream is not None and stream.generation.text:
                self._screen.answer("", end=True)
            self._problem(f"not answered: {error}")
            return
        generation = stream.generation
        self.messages = [*messages, {"role": "assistant", "content": generation.text}]
        self._regenerated = again
        self._screen.answer("", end=True)
        if not self._quiet:
            self._screen.info(timings_line(_from_the_key(generation, rendering)))

    def _fitted(self, messages: list[Message]) -> tuple[list[Message], list[int]]:
        """Return the messages without the turns that do not fit into the context, and their tokens."""
        context = self._model.runtime.context_length
        answer = min(self._max_tokens or context, context // 2)
        kept = trim_messages(self._model, messages, answer)
        if kept.dropped and not self._trim:
            raise ContextLengthError(
                f"the conversation and an answer of {answer} tokens do not fit into the context of {context}: type "
                "/reset, give a larger --context-length, or leave --no-trim out"
            )
        if kept.dropped:
            turns = "turn" if kept.dropped == 1 else f"{kept.dropped} turns"
            self._screen.info(f"[the context of {context} tokens is full: the oldest {turns} dropped]")
        return kept.messages, kept.tokens

    def _show(self, stream: TextStream) -> None:
        """Print the answer as it is generated. Ctrl-C ends it and keeps the text so far."""
        try:
            for piece in stream:
                self._screen.answer(piece)
        except Terminated:
            raise
        except KeyboardInterrupt:
            stream.close()
            if not stream.generation.text:
                raise


def _count(messages: list[Message]) -> str:
    return "1 message" if len(messages) == 1 else f"{len(messages)} messages"


def _suggestion(word: str) -> str:
    import difflib

    found = difflib.get_close_matches(word, [*COMMANDS, *ALIASES], 1)
    return f", perhaps /{found[0]}" if found else ""


def _path(argument: str) -> Path:
    """Return the path that a user typed: quotes are removed, ~ is the home folder."""
    quoted = len(argument) > 1 and argument[0] == argument[-1] and argument[0] in "'\""
    # Path.expanduser raises for an unknown user.
    return Path(os.path.expanduser(argument[1:-1] if quoted else argument))  # noqa: PTH111


def _from_the_key(generation: Generation, seconds: float) -> Generation:
    """Return the generation with `seconds` more to its first token: the time between sending and generating."""
    timings = generation.timings
    first = timings.time_to_first_token + seconds
    return dataclasses.replace(generation, timings=dataclasses.replace(timings, time_to_first_token=first))
