"""The directive `edgelm-commands`: every verb with its example and its options, from the click objects."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import click
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from edgelm.cli.common.help import Group
from edgelm.cli.main import GROUPS, cli


def markdown(command: click.Command, name: str) -> Iterator[str]:
    """Yield the lines about one verb: what it does, an example, its usage, its options by group."""
    context = click.Context(command, info_name=name)
    yield from inspect.cleandoc(command.help or "").replace("\b\n", "").splitlines()
    yield ""
    example = getattr(command, "example", None)
    if example:
        yield "```console"
        for number, line in enumerate(example.splitlines()):
            going_on = number and example.splitlines()[number - 1].endswith("\\")
            yield line if going_on else f"$ {line}"
        yield "```"
    yield f"Usage: `{' '.join([name, *command.collect_usage_pieces(context)])}`"
    for title, records in _options(command, context).items():
        yield f"\n**{title}**\n"
        for names, text in records:
            yield f"`{names}`\n: {text.replace('<', '&lt;')}\n"


def _options(command: click.Command, context: click.Context) -> dict[str, list[tuple[str, str]]]:
    """The options under their headings, in the order of `--help`."""
    found: dict[str, list[tuple[str, str]]] = {group.value: [] for group in Group}
    for param in command.get_params(context):
        record = param.get_help_record(context) if isinstance(param, click.Option) else None
        if record is not None and not record[0].endswith("--help"):
            found[getattr(param, "group", Group.COMMON).value].append(record)
    return {title: records for title, records in found.items() if records}


def page() -> Iterator[str]:
    """Yield the lines of all verbs, as `edgelm --help` groups them."""
    context = click.Context(cli, info_name="edgelm")
    for title, verbs in GROUPS.items():
        yield f"## {title}\n"
        for verb in verbs:
            command = cli.get_command(context, verb)
            assert command is not None
            yield f"### edgelm {verb}\n"
            yield from markdown(command, f"edgelm {verb}")
            yield ""


class Commands(SphinxDirective):
    """Replace the directive by the sections of all verbs."""

    def run(self) -> list[nodes.Node]:
        """Parse what `page` yields as Markdown."""
        return self.parse_text_to_nodes("\n".join(page()), allow_section_headings=True)


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_directive("edgelm-commands", Commands)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
