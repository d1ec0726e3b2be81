"""Read the chat templates of a checkpoint or bundle folder."""

from __future__ import annotations

from pathlib import Path

from edgelm.checkpoint.jsonfile import read_optional_json
from edgelm.errors import TokenizerError
from edgelm.json_dataclass import ErrorFactory, read_bytes
from edgelm.tokenization.template_sandbox import FILE, SETTINGS

_PUBLISHED = ErrorFactory(TokenizerError, "put the publisher's template there")
DEFAULT = "default"
MAX_TEMPLATE_BYTES = 1 << 20


def _named_templates(value: object, where: str) -> dict[str, str]:
    if isinstance(value, str):
        return {DEFAULT: value}
    if isinstance(value, list) and all(
        isinstance(item, dict) and isinstance(item.get("name"), str) and isinstance(item.get("template"), str)
        for item in value
    ):
        return {item["name"]: item["template"] for item in value}
    raise TokenizerError(f"{where}: chat_template is neither a string nor a list of named templates")


def read_templates(folder: Path) -> dict[str, str]:
    """Return the chat templates of a folder by name. chat_template.jinja is "default" and overrides the config's.

    Raises:
        TokenizerError: a template cannot be read.
    """
    templates: dict[str, str] = {}
    settings = read_optional_json(folder / SETTINGS)
    if settings.get("chat_template") is not None:
        templates = _named_templates(settings["chat_template"], str(folder / SETTINGS))
    file = folder / FILE
    if file.exists():
        try:
            templates[DEFAULT] = read_bytes(file, _PUBLISHED, MAX_TEMPLATE_BYTES).decode("utf-8")
        except UnicodeDecodeError as error:
            raise _PUBLISHED.at(file, f"cannot be read ({error})") from error
    for name, text in templates.items():
        if len(text) > MAX_TEMPLATE_BYTES:
            raise TokenizerError(f"{folder}: chat template {name!r} has {len(text)} characters, which are too many")
    return templates


def read_source(folder: Path) -> str | None:
    """Return the source of the default template; None where there is none."""
    templates = read_templates(folder)
    return templates.get(DEFAULT) or next(iter(templates.values()), None)
