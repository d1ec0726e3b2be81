"""Does a text begin and end correctly for a tokenizer with a bos token and several end tokens?"""

from __future__ import annotations

from pathlib import Path

import pytest
from scripted_model import Scripted
from tiny_graph import write_tiny_model

from edgelm.bundle import Bundle
from edgelm.generation.language_model import LanguageModel, load
from edgelm.tokenization.tokenizer import Tokenizer

PAD, EOS, BOS, UNKNOWN, TURN, END_OF_TURN = range(6)
MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_tiny_model(tmp_path_factory.mktemp("gemma") / "b", eos_ids=(EOS, END_OF_TURN), gemma=True)


def answering(bundle: Bundle, tokens: list[int], prompt: list[int]) -> tuple[LanguageModel, Scripted]:
    runtime = Scripted(tokens, len(prompt))
    return LanguageModel(bundle, runtime, Tokenizer.from_folder(bundle.path)), runtime


def test_a_prompt_begins_with_one_bos(bundle: Bundle) -> None:
    tokenizer = Tokenizer.from_folder(bundle.path)
    prompt = [BOS, *tokenizer.encode("hello", add_bos=False)]
    assert BOS not in prompt[1:]
    model, runtime = answering(bundle, [EOS], prompt)
    assert model.generate("hello").timings.prompt_tokens == len(prompt)
    assert runtime.fed == prompt
    # Nothing is prepended to token ids.
    runtime.fed.clear()
    model.generate(prompt[1:], seed=1)
    assert runtime.fed == prompt[1:]


def test_a_conversation_begins_with_one_bos(bundle: Bundle) -> None:
    # The template writes bos, and the tokenizer would prepend it again.
    model, runtime = answering(bundle, [EOS], [0])
    model.chat(MESSAGES)
    assert runtime.fed[0] == BOS
    assert BOS not in runtime.fed[1:]
    assert model.tokenizer.decode(runtime.fed, skip_special=False) == model.render_chat(MESSAGES)
    runtime.fed.clear()
    model.generate(model.render_chat(MESSAGES), seed=1)
    assert runtime.fed[:2] == [BOS, BOS]  # a plain prompt gets bos, even if its text begins with bos


def test_an_empty_prompt_is_bos_alone(bundle: Bundle) -> None:
    with load(bundle.path, threads=1) as model:
        assert model.generate("", max_tokens=3).tokens == model.generate([BOS], max_tokens=3).tokens


@pytest.mark.parametrize("end", [EOS, END_OF_TURN])
def test_each_end_id_ends_a_text_and_is_not_part_of_it(bundle: Bundle, end: int) -> None:
    tokenizer = Tokenizer.from_folder(bundle.path)
    words = tokenizer.encode("hello", add_bos=False)
    # A special id that is not an end token gives no text either.
    model, _ = answering(bundle, [*words, TURN, end, 77], [BOS])
    got = model.generate([BOS])
    assert (got.stop_reason, got.tokens) == ("eos", (*words, TURN))
    assert got.text == tokenizer.decode(got.tokens)
    assert "hello" in got.text
    assert model.end_ids == {EOS, END_OF_TURN}


def test_an_end_id_of_zero_ends_a_text(tmp_path: Path) -> None:
    bundle = write_tiny_model(tmp_path / "b", eos_ids=(0,))
    model, _ = answering(bundle, [70, 71, 0, 72], [5])
    assert model.generate([5]).tokens == (70, 71)
    assert model.generate([5]).stop_reason == "eos"
    assert model.generate_many([[5], [5]])[1].tokens == (70, 71)
