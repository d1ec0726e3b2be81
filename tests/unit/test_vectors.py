"""Does Python still give what tests/vectors says? libedgelm has to give the same: runtimes/csrc/tests/capi."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "vectors"
_SPEC = importlib.util.spec_from_file_location("edgelm_vectors", FOLDER / "write.py")
assert _SPEC is not None and _SPEC.loader is not None
VECTORS = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(VECTORS)


def test_does_python_give_the_tokens_texts_and_messages_of_the_vectors() -> None:
    for name, text in VECTORS.files().items():
        wanted = (FOLDER / name).read_text(encoding="utf-8").splitlines()
        given = text.splitlines()
        assert [line for line in given if line not in wanted] == [], f"{name}: tests/vectors/write.py --write, if right"
        assert given == wanted


@pytest.mark.parametrize("name", ["one token", "all equal", "many ties", "usual", "large"])
def test_do_the_vectors_cover_draws_from_few_and_from_many_tokens(name: str) -> None:
    cases = json.loads((FOLDER / "sampling.json").read_text(encoding="utf-8"))["choices"]
    drawn = [case for case in cases if case["logits"] == name and case["options"].get("temperature")]
    assert sum(len(case["tokens"]) for case in drawn) >= 80
    if name != "one token":
        assert len({token for case in drawn for token in case["tokens"]}) > 10
