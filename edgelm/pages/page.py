"""Render and write a report as one self-contained HTML file, without scripts, fonts or pictures from elsewhere."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from edgelm.files import atomic_file
from edgelm.output_paths import OutputKind
from edgelm.pages.numbers import estimate, number, percent
from edgelm.sizes import format_size

if TYPE_CHECKING:
    from jinja2 import Environment

# The beginning of templates/page.html.j2. Reports of earlier versions are recognised by it, so it must not change.
_START = (b'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">', b"<style>\n:root { --page: #ffffff; --")
# Control characters, halves of surrogate pairs, and marks that change the direction of text.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069\ufffe\uffff]")


def _unknown_content(path: Path) -> str | None:
    with path.open("rb") as stream:
        start = stream.read(2000)
    return None if start.startswith(_START[0]) and _START[1] in start else "is no report that EdgeLM wrote"


REPORT = OutputKind("a report", _unknown_content, is_folder=False)
"""The kind of output that `write_page` writes."""


def render(template: str, **values: object) -> str:
    """Render a page of `templates`, or a part of one. Unprintable characters are replaced."""
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", _templates().get_template(template).render(values))


def write_page(page: str, path: Path) -> None:
    """Write a page to `path` atomically; an earlier report there is replaced.

    Raises:
        EdgeLMError: `path` is something other than a report, or its folder does not exist.
    """
    with atomic_file(path, REPORT, overwrite=True) as partial:
        partial.write_text(page, encoding="utf-8", newline="\n")


@cache
def _templates() -> Environment:
    # Imported here: verbs import this module even if they write no page.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    found = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"number": number, "percent": percent, "estimate": estimate, "measured": _measured}
    found.filters |= {"size": format_size, "facts": _facts, "readable": _readable}
    return found


def _measured(value: float) -> str:
    return "not a number" if math.isnan(value) else number(value)


def _readable(text: str) -> str:
    """Rewrite numbers such as 4e-05 in a text as pages write them."""
    return re.sub(r"(?<![\w.])-?\d+(\.\d+)?e[+-]\d+", lambda found: number(float(found[0])), text)


def _facts(facts: Mapping[str, object]) -> dict[str, str]:
    """Format keys and values for display."""
    return {key.replace("_", " "): _fact(key, value) for key, value in facts.items()}


def _fact(key: str, value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return format_size(value) if key.startswith("memory") else f"{value:,}"
    if isinstance(value, float):
        return number(value)
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
