"""Does the repository use the usual terms of the field? `tests/words.toml` lists the words to avoid."""

from __future__ import annotations

import re
import subprocess
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORDS = tomllib.loads((ROOT / "tests" / "words.toml").read_text())["word"]
TEXT = {
    ".py", ".md", ".toml", ".cc", ".h", ".cu", ".cuh", ".c", ".txt", ".html", ".css", ".js", ".sh", ".yml", ".yaml",
}  # fmt: skip
LISTS_THEM = {"tests/words.toml", "tests/unit/test_words.py"}
PUBLISHED = {"examples/checkpoints", "tests/node/package-lock.json"}
"""Training text, and files of other projects."""


@cache
def files() -> dict[str, str]:
    """Return the text of every file, by its name."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = [name for name in listed.split("\0") if name and name not in LISTS_THEM]
    return {
        name: (ROOT / name).read_text(errors="replace")
        for name in names
        if (Path(name).suffix in TEXT or Path(name).name == "Makefile") and not name.startswith(tuple(PUBLISHED))
        if (ROOT / name).is_file()
    }


@cache
def as_words(text: str) -> str:
    """Split identifiers into words: `dot_product` is "dot product", `DotProduct` "Dot Product". Lines stay."""
    text = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|_", " ", text)
    return text.replace("-", " ")


def found(text: str, entry: dict[str, object]) -> list[int]:
    """Return the numbers of the lines, from 1, where the word occurs outside its allowed uses."""
    word = re.compile(rf"\b(?:{entry['word']})\b", re.IGNORECASE)
    right = [re.compile(str(use), re.IGNORECASE) for use in entry.get("but", ())]  # type: ignore[union-attr]
    lines: list[int] = []
    if not word.search(as_words(text)):
        return lines
    for number, line in enumerate(as_words(text).splitlines(), 1):
        kept = [match.span() for use in right for match in use.finditer(line)]
        if any(
            not any(low <= match.start() and match.end() <= high for low, high in kept) for match in word.finditer(line)
        ):
            lines.append(number)
    return lines


@pytest.mark.parametrize("entry", WORDS, ids=[entry["word"] for entry in WORDS])
def test_the_words_to_avoid_do_not_occur(entry: dict[str, object]) -> None:
    places = [f"{name}:{number}" for name, text in files().items() for number in found(text, entry)]
    assert not places, f"write {entry['instead']!r} in place of {entry['word']!r}:\n" + "\n".join(places)


def test_words_are_found_in_identifiers_and_allowed_uses_are_not_reported() -> None:
    entry = {"word": "products?", "but": ["dot.products?"]}
    assert found("a dot product\nint8Product(x)\nfloat_products = 1\nproduction", entry) == [2, 3]
