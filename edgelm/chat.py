"""A checkpoint's own chat template, rendered in a sandbox.

Templates are programs that come with the checkpoint, so they run in jinja2's immutable sandbox, as transformers runs
them (`transformers.utils.chat_template_utils`), and their output and loops are bounded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelm.errors import CheckpointError, GenerationError, TokenizerError
from edgelm.template_files import DEFAULT, read_templates
from edgelm.template_sandbox import Budget, TemplateLimit, sandbox

if TYPE_CHECKING:
    from edgelm.tokenizer import Tokenizer

MAX_OUTPUT = 8 << 20  # characters


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    if isinstance(messages, str | Mapping) or not messages:
        raise GenerationError('messages must be a list such as [{"role": "user", "content": "Hello"}]')
    for i, message in enumerate(messages):
        fine = isinstance(message, Mapping) and isinstance(message.get("role"), str)
        if not fine or not isinstance(message.get("content"), str):
            raise GenerationError(f'message {i} must be like {{"role": "user", "content": "Hello"}}, texts both')


class ChatTemplate:
    """A template with the strings of the special tokens it may ask for.

    Attributes:
        source: the template's text.
        special: variables such as `bos_token` and `eos_token`.
    """

    def __init__(self, source: str, special: Mapping[str, str], where: str = "chat template") -> None:
        """Check the template.

        Raises:
            TokenizerError: it is not a valid template; the message begins with `where`.
        """
        self.source = source
        self.special = dict(special)
        self._where = where
        self._compile(Budget())

    @classmethod
    def from_folder(cls, path: Path | str, tokenizer: Tokenizer | None = None, name: str | None = None) -> ChatTemplate:
        """Take the template of a checkpoint or bundle folder.

        The strings of bos and eos are those of the *resolved* ids, so that the rendered text encodes to them even
        where the vocabulary has another token called `<|endoftext|>`.

        Args:
            path: the folder.
            tokenizer: the folder's, if open already.
            name: which template, where there are several; default "default".

        Raises:
            TokenizerError: there is no template (of that name), or it is not valid.
        """
        from edgelm.tokenizer import Tokenizer

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
        ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_ids[0], "pad_token": tokenizer.pad_id}
        special = {key: tokenizer.token(index) for key, index in ids.items() if index is not None}
        return cls(
            templates[wanted],
            {key: token for key, token in special.items() if token is not None},
            f"{folder}: chat template {wanted!r}",
        )

    def _compile(self, budget: Budget) -> Any:
        from jinja2.exceptions import TemplateError

        try:
            return sandbox(budget).from_string(self.source)
        except (TemplateError, RecursionError, SyntaxError) as error:
            raise TokenizerError(f"{self._where} is not valid: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for a conversation. Encode it with `add_bos=False`: the template writes bos where it belongs.

        Args:
            messages: mappings with "role" and "content", both texts, oldest first.
            add_generation_prompt: end with what makes the model answer.
            variables: further variables of the template, such as `tools`.

        Raises:
            GenerationError: the messages are malformed, the template refuses them, tries what the sandbox forbids,
                or does not come to an end.
        """
        from jinja2.exceptions import SecurityError, TemplateError

        _check_messages(messages)
        template = self._compile(Budget())
        given = {"tools": None, "documents": None, **self.special, **(variables or {})}
        given |= {"messages": [dict(message) for message in messages], "add_generation_prompt": add_generation_prompt}
        parts: list[str] = []
        length = 0
        try:
            for part in template.generate(given):
                length += len(part)
                if length > MAX_OUTPUT:
                    raise TemplateLimit(f"more than {MAX_OUTPUT} characters")
                parts.append(part)
        except SecurityError as error:
            raise GenerationError(f"{self._where} tries what a template may not: {error}; do not trust it") from error
        except TemplateError as error:
            raise GenerationError(f"{self._where} refuses these messages: {error}") from error
        except (TemplateLimit, RecursionError) as error:
            reason = "recursion without end" if isinstance(error, RecursionError) else error
            raise GenerationError(f"{self._where} does more than a chat template may: {reason}") from error
        except (TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError) as error:
            # The template's own expressions raise these, for example when it adds a text to nothing.
            raise GenerationError(f"{self._where} fails on these messages: {error}") from error
        return "".join(parts)
