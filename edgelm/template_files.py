"""Where a checkpoint or bundle folder keeps its chat templates."""

from __future__ import annotations

from pathlib import Path

from edgelm.checkpoint.jsonfile import read_optional_json
from edgelm.errors import TokenizerError

DEFAULT = "default"
FILE = "chat_template.jinja"
SETTINGS = "tokenizer_config.json"
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
    """The chat templates of a folder by name; chat_template.jinja is the "default" one and wins over the config's.

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
            if not file.is_file():
                raise TokenizerError(f"{file}: is no file; put the publisher's template there")
            if file.stat().st_size > MAX_TEMPLATE_BYTES:
                raise TokenizerError(f"{file}: {file.stat().st_size} bytes are too much for a chat template")
            text = file.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(f"{file}: cannot be read ({error})") from error
        templates[DEFAULT] = text
    for name, text in templates.items():
        if len(text) > MAX_TEMPLATE_BYTES:
            raise TokenizerError(f"{folder}: chat template {name!r} has {len(text)} characters, which is too much")
    return templates


def has_template(folder: Path) -> bool:
    """Whether there is likely a template, without reading it."""
    try:
        return (folder / FILE).exists() or b'"chat_template"' in (folder / SETTINGS).read_bytes()
    except OSError:
        return False


def read_source(folder: Path) -> str | None:
    """The default template's source, None where there is none."""
    templates = read_templates(folder)
    return templates.get(DEFAULT) or next(iter(templates.values()), None)
