"""Output of the verbs: tables, lines about a generation, coloured failures."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

import click

# Lines that report a failure.
_BAD = re.compile(
    r"^(?:FAIL|DAMAGED|REFUSED|missing|This device does NOT|The bundle's)\b.*$|^\d+ of \d+ checks FAILED|\bFAILED$",
    re.MULTILINE,
)
_GOOD = re.compile(r"^This device computes the same model as the reference(?=[:.])", re.MULTILINE)

# Control characters are shown as the symbols that Unicode has for C0; C1 has none.
CONTROL = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"}
CONTROL |= dict.fromkeys(range(127, 160), "\N{REPLACEMENT CHARACTER}")


def write_answer(text: str) -> None:
    """Write the model's text to standard output. A terminal gets symbols for its control characters."""
    # Not with click.echo, which removes escape sequences where output is not a terminal.
    sys.stdout.write(text.translate(CONTROL) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def wants_colour() -> bool:
    """Return whether to use colours on a terminal (NO_COLOR and TERM=dumb turn them off)."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def echo(text: str) -> None:
    """Print a verb's result on standard output, with failures in bold red and a passed result in green.

    Pipes, NO_COLOR and TERM=dumb get plain text.
    """
    if wants_colour():
        text = _BAD.sub(lambda match: click.style(match[0], fg="red", bold=True), text)
        text = _GOOD.sub(lambda match: click.style(match[0], fg="green", bold=True), text)
    click.echo(text)  # removes colours where standard output is not a terminal


def pairs(rows: Sequence[tuple[str, str]]) -> str:
    """Format rows as two columns."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in rows)


def grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table with a header: the first column left-aligned, the others right-aligned."""
    table = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = cells
        return "  ".join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *(line(row) for row in rows)])


def timings_line(generation: Any) -> str:
    """Return one line about the speed of a generation."""
    from edgelm.sizes import format_number

    timings = generation.timings
    parts = [f"{timings.prompt_tokens:,} prompt tokens"]
    if timings.reused_tokens:
        parts[0] += f" ({timings.reused_tokens:,} cached)"
    if timings.prefill_tokens_per_second:
        parts[0] += f" at {format_number(timings.prefill_tokens_per_second)}/s"
    if generation.tokens:
        parts.append(f"first after {timings.time_to_first_token:.2f} s")
        speed = f" at {format_number(timings.decode_tokens_per_second)} tokens/s" if timings.decoded_tokens else ""
        parts.append(f"{len(generation.tokens):,} generated{speed}")
    parts.append(f"ended by {generation.stop_reason}")
    return "[" + ", ".join(parts) + "]"


def generation_json(generation: Any) -> dict[str, Any]:
    """Return a generation as a JSON document."""
    timings = generation.timings
    return {
        "text": generation.text,
        "tokens": list(generation.tokens),
        "stop_reason": generation.stop_reason,
        "timings": {
            **dataclasses.asdict(timings),
            "prefill_tokens_per_second": timings.prefill_tokens_per_second,
            "decode_tokens_per_second": timings.decode_tokens_per_second,
        },
    }
