"""What a reader must not miss stands out on a terminal. Pipes, NO_COLOR and TERM=dumb get plain text."""

from __future__ import annotations

import os
import re

import click

# Lines of results that begin with a bad word, and the verdicts.
_BAD = re.compile(r"^(?:FAIL|DAMAGED|REFUSED|missing)\b.*$|^parity FAILED.*$|\bFAILED$", re.MULTILINE)
_GOOD = re.compile(r"^parity PASSED\b", re.MULTILINE)


def echo(text: str) -> None:
    """Print a verb's result on standard output, failures bold and red, a passed verdict green."""
    if not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb":
        text = _BAD.sub(lambda match: click.style(match[0], fg="red", bold=True), text)
        text = _GOOD.sub(lambda match: click.style(match[0], fg="green", bold=True), text)
    click.echo(text)  # takes the colours out where standard output is no terminal
