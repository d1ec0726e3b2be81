"""Does the help of every verb say what it does, show an example that works, and put every option under a heading?"""

from __future__ import annotations

import re
import shlex

import click
import pytest
from click.testing import CliRunner

from edgelm.cli.common.help import Group, Option, Verb
from edgelm.cli.main import ALIASES, EXAMPLE, VERBS, cli

WIDTH = 80


def command_of(verb: str) -> Verb:
    found = cli.get_command(click.Context(cli), verb)
    assert isinstance(found, Verb)
    return found


def help_of(*verb: str) -> str:
    # click takes two columns off the terminal's width.
    result = CliRunner().invoke(cli, [*verb, "--help"], terminal_width=WIDTH - 2, prog_name="edgelm")
    assert result.exit_code == 0, result.output
    return result.stdout


def sections(text: str) -> dict[str, list[str]]:
    """The indented lines of a page of help, by the heading above them."""
    found: dict[str, list[str]] = {}
    heading = ""
    for line in text.splitlines():
        if line and not line.startswith(" "):
            heading = line.removesuffix(":")
            found[heading] = []
        elif line:
            found[heading].append(line)
    return found


def parse(line: str) -> str:
    """Parse a command line as the program does, without running the verb; return the verb."""
    program, verb, *arguments = shlex.split(line)
    assert program == "edgelm"
    command_of(verb).make_context(verb, arguments)
    return verb


@pytest.mark.parametrize("verb", VERBS)
def test_the_summary_of_a_verb_is_one_sentence_on_one_line(verb: str) -> None:
    for summary in (VERBS[verb], str(command_of(verb).help).split("\n\n")[0]):
        assert "\n" not in summary
        assert len(summary) <= WIDTH - 2
        assert re.fullmatch(r"[A-Z][^.;]*\.", summary), summary
    assert f"  {str(command_of(verb).help).splitlines()[0]}\n" in help_of(verb)


@pytest.mark.parametrize("verb", VERBS)
def test_the_example_of_a_verb_can_be_parsed(verb: str) -> None:
    lines = sections(help_of(verb))["Example"]
    assert [line.strip() for line in lines] == command_of(verb).example.splitlines()
    assert [parse(line) for line in lines] == [verb]


def test_the_example_of_the_program_is_a_chain_of_verbs() -> None:
    assert [line.strip() for line in sections(help_of())["Example"]] == EXAMPLE.splitlines()
    assert [parse(line) for line in EXAMPLE.splitlines()] == ["export", "parity", "run"]


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_has_help_and_a_heading_of_its_group(verb: str) -> None:
    found = sections(help_of(verb))
    for option in command_of(verb).params:
        if isinstance(option, click.Argument):
            continue
        assert isinstance(option, Option), f"{option.opts}: define it with edgelm.cli.common.help.option"
        assert option.help, option.opts
        assert option.help.endswith(".")
        name = re.compile(rf"{option.shown[-1].split('/')[0]}(?![\w-])")
        assert any(name.search(line) for line in found[option.group.value]), option.opts
    headings = [heading for heading in found if heading in {group.value for group in Group}]
    assert headings == [group.value for group in Group if group.value in headings], "common first, GPU last"
    assert headings[0] == "Options"


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_a_page_of_help_fits_a_terminal_of_80_columns(verb: str) -> None:
    long = [line for line in help_of(*filter(None, [verb])).splitlines() if len(line) > WIDTH]
    assert long == []


def test_the_help_of_the_program_lists_each_verb_once_under_a_heading() -> None:
    found = sections(help_of())
    listed = [line.split()[0] for title in list(found)[2:-1] for line in found[title]]
    assert listed == list(VERBS)
    assert not set(ALIASES) & set(listed)


def test_help_shows_required_options_and_defaults() -> None:
    text = " ".join(help_of("export").split())
    assert "Bundle folder to write. [required]" in text
    assert "[default: int4]" in text
    assert "-n, --max-tokens N Tokens to generate at most. [default: 256]" in " ".join(help_of("run").split())
