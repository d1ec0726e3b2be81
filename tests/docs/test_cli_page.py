"""Does the page of the command line show what `--help` shows?"""

from __future__ import annotations

import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "_ext"))

from edgelm.cli.main import VERBS, cli

reference = pytest.importorskip("cli_reference", reason="needs Sphinx")


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_has_its_example_and_every_option_under_its_heading(verb: str) -> None:
    command = cli.get_command(click.Context(cli), verb)
    assert command is not None
    shown = "\n".join(reference.markdown(command, f"edgelm {verb}"))
    helped = CliRunner().invoke(cli, [verb, "--help"], terminal_width=10_000).output
    for line in helped.splitlines():
        if line.startswith("  -") and "--help" not in line:
            names = line.strip().split("  ")[0]
            assert f"`{names}`" in shown, f"{verb} has no {names} on the page"
    for line in command.example.splitlines():  # type: ignore[attr-defined]
        assert line in shown
    for heading in (line[:-1] for line in helped.splitlines() if line.endswith(":") and line[0] != " "):
        assert heading in ("Example", "Options") or f"**{heading}**" in shown


def test_the_page_has_every_verb_under_its_group() -> None:
    lines = list(reference.page())
    assert [line[11:-1] for line in lines if line.startswith("### edgelm ")] == list(VERBS)
    assert [line[3:-1] for line in lines if line.startswith("## ")] == list(reference.GROUPS)
