"""Does the page of the Python API have every public name?"""

from __future__ import annotations

from pathlib import Path

import pytest

import edgelm
import edgelm.export

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "python.md").read_text(encoding="utf-8")
NAMES = [f"edgelm.{name}" for name in edgelm.__all__ if not name.startswith("_")]
NAMES += [f"edgelm.export.{name}" for name in edgelm.export.__all__]
SHOWN_ELSEWHERE = {"edgelm.EdgeLMError"}
"""Names of modules whose members are all shown."""


@pytest.mark.parametrize("name", sorted({*NAMES} - SHOWN_ELSEWHERE))
def test_a_public_name_is_on_the_page(name: str) -> None:
    assert f":: {name}\n" in PAGE


def test_the_errors_are_shown_together() -> None:
    assert ".. automodule:: edgelm.errors\n   :members:" in PAGE
