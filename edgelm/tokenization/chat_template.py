"""Render conversations with a checkpoint's chat template, and read and write files of messages.

Templates are programs that come with checkpoints, so they run in a sandbox: see `template_sandbox`. A template gets the
same variables and functions as in `apply_chat_template` of transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelm.errors import (
    CheckpointError,
    GenerationError,
    GenerationTypeError,
    GenerationValueError,
    TokenizerError,
)
from edgelm.json_dataclass import ErrorFactory, read_json
from edgelm.tokenization.template_files import DEFAULT, read_templates
from edgelm.tokenization.template_sandbox import SANDBOX, Sandbox
from edgelm.tokenization.template_worker import Answer

if TYPE_CHECKING:
    from edgelm.tokenization.tokenizer import Tokenizer

SYSTEM_ROLES = ("system", "developer")
TOOL_ROLES = ("tool", "ipython", "function")
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys of a message's reasoning. Templates read the first one; those of gpt-oss the second."""


def _check_parts(where: str, parts: Sequence[Any]) -> None:
    for i, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(kind, str) and kind != "text":
            raise GenerationValueError(
                f"{where}: part {i} of its content is of type {kind!r}: models here read text only"
            )
        if kind is None or not isinstance(part.get("text"), str):
            raise GenerationValueError(
                f'{where}: part {i} of its content must be like {{"type": "text", "text": "Hello"}}'
            )


def _is_message(where: str, message: object) -> bool:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    if message["role"] in TOOL_ROLES:
        return content is not None  # a tool's answer may have any type
    if isinstance(content, list | tuple):
        _check_parts(where, content)
        return bool(content)
    return isinstance(content, str) or (content is None and bool(message.get("tool_calls")))


def _checked(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Check messages, and return them as transformers passes them: without None values, reasoning under all keys."""
    right_type = isinstance(messages, Sequence) and not isinstance(messages, str | bytes)
    if not right_type or not messages:
        kind = GenerationValueError if right_type else GenerationTypeError
        raise kind('messages must be a list such as [{"role": "user", "content": "Hello"}]')
    checked = []
    for i, message in enumerate(messages):
        if not _is_message(f"message {i}", message):
            raise GenerationValueError(
                f'message {i} must be like {{"role": "user", "content": "Hello"}}, texts both, the content perhaps a '
                'list of parts {"type": "text", "text": "Hello"}'
            )
        kept = {key: value for key, value in message.items() if value is not None}
        reasoning = next((kept[key] for key in REASONING if key in kept), None)
        if reasoning is not None:
            kept = {"thinking": reasoning, **kept, "reasoning_content": reasoning}
        checked.append(kept)
    return checked


def read_messages(path: Path | str) -> list[dict[str, Any]]:
    """Read a conversation from a JSON file: a list of messages `{"role": "user", "content": "Hello"}`, oldest first.

    Raises:
        GenerationError: the file cannot be read, or has no such list.
    """
    factory = ErrorFactory(GenerationError, 'give a list such as [{"role": "user", "content": "Hello"}]')
    messages = read_json(Path(path), factory)
    try:
        _checked(messages)
    except GenerationError as error:
        raise GenerationError(f"{path}: {error}") from error
    assert isinstance(messages, list)
    return messages


def write_messages(path: Path | str, messages: Sequence[Mapping[str, Any]]) -> None:
    """Write a conversation as JSON for `read_messages`. A file with other contents is never replaced.

    Raises:
        EdgeLMError: the file cannot be written; an existing one is unchanged.
    """
    from edgelm.files import atomic_file
    from edgelm.output_paths import OutputKind

    text = json.dumps([dict(message) for message in messages], ensure_ascii=False, indent=1) + "\n"
    with atomic_file(path, OutputKind("a conversation", _no_conversation, is_folder=False), overwrite=True) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def _no_conversation(path: Path) -> str | None:
    try:
        read_messages(path)
    except GenerationError:
        return "holds something else than a conversation"
    return None


def system_messages(messages: Sequence[Mapping[str, Any]]) -> int:
    """Return the number of system messages at the beginning of a conversation."""
    return next((i for i, message in enumerate(messages) if message.get("role") not in SYSTEM_ROLES), len(messages))


def _one_line(text: str) -> str:
    """Return a template's message for a terminal: one line, no control characters, at most 300 characters."""
    text = "".join(c if c.isprintable() else " " for c in text[:1000])
    text = " ".join(text.split())
    return text if len(text) <= 300 else text[:300] + "..."


def template_notes(folder: Path) -> list[str]:
    """Return a sentence for each invalid chat template of a checkpoint, which can be used without them.

    Raises:
        TokenizerError: a file with templates cannot be read.
    """
    notes = []
    for name, source in read_templates(folder).items():
        try:
            ChatTemplate(source, {}, f"{folder}: chat template {name!r}")
        except (TokenizerError, GenerationError) as error:
            notes.append(f"{error}; conversations will not work with it, plain prompts will")
    return notes


class ChatTemplate:
    """A chat template with the strings of the special tokens.

    Attributes:
        source: the template's text.
        special: variables such as `bos_token` and `eos_token`.
    """

    def __init__(
        self, source: str, special: Mapping[str, str], where: str = "chat template", sandbox: Sandbox = SANDBOX
    ) -> None:
        """Check the template, in a process that is started if there is none yet.

        Raises:
            TokenizerError: the template is not valid; the message begins with `where`.
            GenerationError: no process can be started to render it.
        """
        self.source = source
        self.special = dict(special)
        self._where = where
        self._sandbox = sandbox
        letter, text = sandbox.ask(source, None)
        if letter != Answer.DONE:
            reason = (
                f"does more than a chat template may: {text}" if letter == Answer.LIMIT else "is not valid: " + text
            )
            raise TokenizerError(f"{where} {_one_line(reason)}")

    @classmethod
    def from_folder(cls, path: Path | str, tokenizer: Tokenizer | None = None, name: str | None = None) -> ChatTemplate:
        """Load the template of a checkpoint or bundle folder.

        The strings of bos and eos are those of the *resolved* ids, so that the rendered text encodes to these ids even
        if the vocabulary has another token named `<|endoftext|>`.

        Args:
            path: the folder.
            tokenizer: the folder's tokenizer, if it is open already.
            name: the template's name, where there are several; default "default".

        Raises:
            TokenizerError: there is no template (of that name), or it is not valid.
        """
        from edgelm.tokenization.tokenizer import Tokenizer

        folder = Path(path)
        try:
            templates = read_templates(folder)
        except CheckpointError as error:
            raise TokenizerError(str(error)) from error
        if not templates:
            raise TokenizerError(
                f"{folder}: no chat template: this is a base model, or its template was not copied; use a plain "
                "prompt, or put its publisher's template there as chat_template.jinja"
            )
        wanted = name or (DEFAULT if len(templates) > 1 else next(iter(templates)))
        if wanted not in templates:
            raise TokenizerError(f"{folder}: no chat template {wanted!r}; there are {', '.join(sorted(templates))}")
        tokenizer = tokenizer or Tokenizer.from_folder(folder)
        ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.template_eos_id, "pad_token": tokenizer.pad_id}
        special = {key: tokenizer.token(index) for key, index in ids.items() if index is not None}
        return cls(
            templates[wanted],
            {key: token for key, token in special.items() if token is not None},
            f"{folder}: chat template {wanted!r}",
        )

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the prompt of a conversation. Encode it with `add_bos=False`: the template writes bos itself.

        Args:
            messages: mappings with "role" and "content", oldest first. The content is a text, or a list of parts
                `{"type": "text", "text": ...}`. A template that loops over parts gets the list; another one gets the
                texts joined by line ends. An assistant's message with "tool_calls" needs no content. Other keys are
                passed to the template.
            add_generation_prompt: end with the prompt for the model's answer.
            variables: further variables of the template, such as `tools`.

        Raises:
            GenerationError: the messages are malformed; or the template refuses them, does what the sandbox forbids,
                fails, or exceeds a limit of time, memory or length.
        """
        given = {"tools": None, "documents": None, **self.special, **(variables or {})}
        given |= {"messages": _checked(messages), "add_generation_prompt": add_generation_prompt}
        letter, text = self._sandbox.ask(self.source, given)
        if letter == Answer.DONE:
            return text
        said = _one_line(text)
        reasons = {
            Answer.REFUSED: f"refuses these messages: {said}",
            Answer.FORBIDDEN: f"tries what a template may not: {said}; do not trust it",
            Answer.LIMIT: f"does more than a chat template may: {said}",
        }
        raise GenerationError(f"{self._where} {reasons.get(letter, f'fails on these messages: {said}')}")
