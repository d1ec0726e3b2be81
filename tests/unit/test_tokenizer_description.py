"""Does `tokenizer.edgelm.json` say what Python resolved, so that C++ repeats none of it?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizer_folders import example, gemma_json, llama, llama_json, plain_byte_level, put, trained_pieces

from edgelm.tokenization import description
from edgelm.tokenization.tokenizer import Tokenizer


def described(folder: Path) -> dict[str, Any]:
    return description.describe(Tokenizer.from_folder(folder), folder)


def test_equal_folders_give_equal_bytes_without_the_vocabulary(tmp_path: Path) -> None:
    texts = []
    for name in ("first", "second"):
        folder = example(tmp_path / name, "olmoe-tiny")
        description.write(Tokenizer.from_folder(folder), folder, folder / description.FILE)
        texts.append((folder / description.FILE).read_bytes())
    assert texts[0] == texts[1]
    assert len(texts[0]) < 4096 < (folder / "tokenizer.json").stat().st_size


def test_steps_are_those_that_count_and_not_those_of_the_file(tmp_path: Path) -> None:
    folder = llama_json(tmp_path / "t")
    assert [step["type"] for step in described(folder)["normalizer"]] == ["Prepend", "Replace"]
    put(folder, "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"})
    result = described(folder)
    assert result["normalizer"] == []
    assert [step["prepend_scheme"] for step in result["pre_tokenizer"]] == ["first"]
    assert result["leading_space"] == "drop one"


def test_special_tokens_are_resolved(tmp_path: Path) -> None:
    folder = example(tmp_path / "t", "fox-tiny")  # whose configs swap bos and eos
    tokenizer, result = Tokenizer.from_folder(folder), described(folder)
    assert (result["bos_id"], result["eos_ids"]) == (tokenizer.bos_id, list(tokenizer.eos_ids))
    assert result["special_tokens"]["bos_token"] == "<bos>"
    assert (result["file"], result["kind"], result["rules"]) == ("tokenizer.model", "pieces", "merges")


def test_added_tokens_have_the_ids_and_flags_that_count(tmp_path: Path) -> None:
    folder = llama(tmp_path / "t")
    put(folder, "added_tokens.json", {"<late>": 9999})
    result = described(folder)
    (late,) = [token for token in result["added_tokens"] if token["content"] == "<late>"]
    assert late == {"id": 400, "content": "<late>", "normalized": True}  # the next free id, as in transformers
    assert json.loads(result["fingerprint"]["added"])[0][:2] == [400, "<late>"]


def test_a_normalised_token_is_described_as_it_is_decoded(tmp_path: Path) -> None:
    folder = gemma_json(tmp_path / "t")
    native = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    native.add_tokens([tokenizers.AddedToken("two words", normalized=True)])
    native.save(str(folder / "tokenizer.json"))
    assert described(folder)["added_tokens"][-1]["decoded"] == "two▁words"


@pytest.mark.parametrize(
    ("part", "value", "reason"),
    [
        ("model", {"type": "WordLevel", "vocab": {"a": 0, "</s>": 256}, "unk_token": "a"}, "a WordLevel model"),
        ("pre_tokenizer", {"type": "UnicodeScripts"}, "pre_tokenizer has the step UnicodeScripts"),
        ("normalizer", {"type": "ByteLevel"}, "normalizer has the step ByteLevel"),
    ],
)
def test_what_c_lacks_is_named_in_place_of_the_steps(tmp_path: Path, part: str, value: Any, reason: str) -> None:
    folder = plain_byte_level(tmp_path / "t")
    data = json.loads((folder / "tokenizer.json").read_text())
    put(folder, "tokenizer.json", {**data, part: value})
    result = described(folder)
    assert reason in result["unsupported"]
    assert "kind" not in result


def test_a_space_before_a_text_that_may_lose_its_beginning_is_refused(tmp_path: Path) -> None:
    folder = gemma_json(tmp_path / "t")
    data = json.loads((folder / "tokenizer.json").read_text())
    data["normalizer"] = {"type": "Strip", "strip_left": True, "strip_right": False}
    data["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}
    put(folder, "tokenizer.json", data)
    assert "which Strip may remove" in described(folder)["unsupported"]


def test_a_model_of_characters_is_refused(tmp_path: Path) -> None:
    folder = trained_pieces(tmp_path / "pieces", model_type="char", byte_fallback=False, hard_vocab_limit=False)
    assert "words or characters" in described(folder)["unsupported"]
