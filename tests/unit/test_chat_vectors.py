"""Does Python still render what tests/vectors/chat_templates.json says? libedgelm renders the same file in C++."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "vectors"
_SPEC = importlib.util.spec_from_file_location("edgelm_chat_vectors", FOLDER / "chat_templates.py")
assert _SPEC is not None and _SPEC.loader is not None
VECTORS = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(VECTORS)


@pytest.fixture(scope="module")
def file() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((FOLDER / "chat_templates.json").read_text(encoding="utf-8"))
    return loaded


def test_does_python_render_the_texts_of_the_vectors(file: dict[str, Any]) -> None:
    given = VECTORS.contents()
    assert given.keys() == file.keys()
    for key, value in given.items():
        assert value == file[key], f"{key}: tests/vectors/chat_templates.py --write, if that is right"


def test_is_each_template_rendered_and_each_kind_of_error_met(file: dict[str, Any]) -> None:
    for name in file["templates"]:
        assert sum("text" in case for case in file["cases"] if case["template"] == name) >= 10, name
    cases = [*file["cases"], *file["features"]]
    assert {case["error"] for case in cases if "error" in case} == {"invalid", "refused", "forbidden", "failed"}


def test_are_features_errors_only_where_they_are_meant_to_be(file: dict[str, Any]) -> None:
    errors = {case["source"] for case in file["features"] if "error" in case}
    assert errors == set(VECTORS.FEATURES.ERRORS)
    assert [case["source"] for case in file["parts"] if (case["text"] == "ab") != VECTORS.READERS[case["source"]]] == []


def test_is_what_only_libedgelm_refuses_valid_for_jinja2() -> None:
    assert VECTORS.left_out_but_invalid() == []
