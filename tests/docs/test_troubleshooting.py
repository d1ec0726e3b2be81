"""Does each heading of the page of errors still stand in the sources?

A heading is an error's words as printed, with `...` for what varies: names, numbers, paths.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
SOURCES = ("edgelm", "export", "quant", "runtimes")
HEADING = re.compile(r"^### `(?P<error>.+)`$", re.MULTILINE)
ERRORS = HEADING.findall(PAGE.read_text(encoding="utf-8"))
SHORTEST = 12
"""Fixed characters of a heading, below which it could be found anywhere."""


@cache
def strings() -> tuple[str, ...]:
    """Every string of the Python sources but docstrings, with a newline for each value that an f-string inserts."""
    found = []
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
            for node in ast.walk(tree):
                if isinstance(node, ast.JoinedStr):
                    found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "\n" for v in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                    found.append(node.value)
    return tuple(found)


def stands_in(error: str, texts: tuple[str, ...]) -> bool:
    """Whether one of the strings has the fixed parts of `error` in their order."""
    parts = [part.strip() for part in error.split("...") if part.strip()]
    pattern = re.compile(".*?".join(map(re.escape, parts)), re.DOTALL)
    return any(pattern.search(text) for text in texts)


def test_the_page_has_the_errors_that_users_meet() -> None:
    assert len(ERRORS) >= 30
    assert len(set(ERRORS)) == len(ERRORS)


@pytest.mark.parametrize("error", ERRORS)
def test_the_error_is_still_printed_in_these_words(error: str) -> None:
    fixed = error.replace("...", "")
    assert len(fixed) >= SHORTEST, f"{error}: give more of the error's words"
    assert stands_in(error, strings()), f"{error}: no string of {', '.join(SOURCES)} has these words"


@pytest.mark.parametrize("error", ERRORS)
def test_the_error_has_a_cause_and_a_remedy(error: str) -> None:
    section = PAGE.read_text(encoding="utf-8").split(f"### `{error}`\n")[1].split("\n##")[0]
    assert "**Why.**" in section, f"{error}: say why"
    assert "**Do.**" in section, f"{error}: say what to do"


def test_words_are_found_in_their_order_across_inserted_values() -> None:
    texts = ("\n is missing: copy \n again", "tensor \n")
    assert stands_in("... is missing: copy ... again", texts)
    assert not stands_in("again ... is missing", texts)
    assert not stands_in("tensor ... is missing", texts)
