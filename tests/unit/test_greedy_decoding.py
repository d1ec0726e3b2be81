"""Does the runtime choose the token itself in plain greedy decoding, and only there, with the same text?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import edgelm
from edgelm.errors import GenerationError
from edgelm.generation.sampling import argmax
from edgelm.runtimes.base import Runtime

CHECKPOINT = Path(__file__).parents[2] / "examples" / "checkpoints" / "fox-tiny"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> edgelm.LanguageModel:
    from edgelm.export import ExportOptions, export_bundle
    from edgelm.parity.golden import GoldenOptions
    from edgelm.parity.prompts import Prompt

    short = GoldenOptions(prompts=(Prompt("short", "The quick brown fox"),), greedy_tokens=2)
    folder = tmp_path_factory.mktemp("bundle") / "b"
    export_bundle(CHECKPOINT, folder, recipe="int8", options=ExportOptions(ops="portable", golden=short))
    return edgelm.load(folder, threads=1)


@pytest.fixture
def calls(model: edgelm.LanguageModel, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record for each step which of the runtime's two decode methods was called."""
    taken: list[str] = []
    kind = type(model.runtime)
    decode, choose = kind.decode, kind.decode_greedy

    def counted_decode(self: Runtime, token: int) -> NDArray[np.float32]:
        taken.append("logits")
        return decode(self, token)

    def counted_choice(self: Runtime, token: int) -> int:
        taken.append("choice")
        return choose(self, token)

    monkeypatch.setattr(kind, "decode", counted_decode)
    monkeypatch.setattr(kind, "decode_greedy", counted_choice)
    return taken


def test_plain_greedy_text_is_chosen_by_the_runtime(model: edgelm.LanguageModel, calls: list[str]) -> None:
    result = model.generate("Once upon a time", max_tokens=8)
    # The default implementation of `decode_greedy` calls `decode`.
    assert calls == ["choice", "logits"] * (len(result.tokens) - 1)
    model.runtime.reset()
    tokens = model.tokenizer.encode("Once upon a time")
    logits, expected = model.runtime.prefill(tokens), []
    for _ in result.tokens:
        expected.append(int(logits.argmax()))
        logits = model.runtime.decode(expected[-1])
    assert list(result.tokens) == expected


@pytest.mark.parametrize("options", [{"temperature": 0.8, "seed": 1}, {"repetition_penalty": 1.3}])
def test_other_options_use_the_logits(model: edgelm.LanguageModel, calls: list[str], options: dict[str, Any]) -> None:
    model.generate("Once upon a time", max_tokens=6, **options)
    assert calls
    assert set(calls) == {"logits"}


def test_nan_logits_are_an_error_in_greedy_decoding() -> None:
    assert argmax(np.array([1, 3, 3], np.float32)) == 1
    with pytest.raises(GenerationError, match="highest logit is nan"):
        argmax(np.array([1, np.nan], np.float32))
