"""Which tokens do the files next to a vocabulary add, with which ids, and which are left out?

test_tokenizer_oracle.py compares texts and ids with transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizer_folders import ADDITIONS, add_by_both, add_by_decoder, add_by_file, example, gemma_json, llama, put

from edgelm.errors import TokenizerError
from edgelm.tokenization.added_tokens import AddedToken, Declared, read_declared
from edgelm.tokenization.tokenizer import Tokenizer


@pytest.mark.parametrize("add", [add_by_file, add_by_decoder, add_by_both])
@pytest.mark.parametrize("make", [gemma_json, llama, lambda folder: example(folder, "fox-tiny")])
def test_added_tokens_extend_the_vocabulary(tmp_path: Path, make: Any, add: Any) -> None:
    folder = make(tmp_path / "t")
    (folder / "config.json").unlink(missing_ok=True)
    before = Tokenizer.from_folder(folder)
    add(folder, before.vocab_size)
    tokenizer = Tokenizer.from_folder(folder)
    new = [content for content, _ in ADDITIONS if before.token_id(content) is None]
    assert len(new) >= 8
    assert tokenizer.vocab_size == before.vocab_size + len(new)
    for index, content in enumerate(new, before.vocab_size):
        assert tokenizer.token_id(content) == index
        assert tokenizer.token(index) == content
        assert tokenizer.vocabulary.token_bytes(index) == content.encode()
        assert tokenizer.encode(content, add_bos=False) == [index]
        assert tokenizer.decode([index], skip_special=False) == content
    assert tokenizer.token(tokenizer.vocab_size) is None
    assert tokenizer.decode([before.vocab_size + 1]) == ""
    assert tokenizer.decode([before.vocab_size + 2]) == "<tool>"
    assert tokenizer.fingerprint() != before.fingerprint()


def test_flags_of_added_tokens_change_the_fingerprint(tmp_path: Path) -> None:
    folder = gemma_json(tmp_path / "t")
    prints = set()
    for flags in ({}, {"lstrip": True}, {"special": True}):
        added = {"400": {"content": "<x>", "normalized": False, **flags}}
        put(folder, "tokenizer_config.json", {"added_tokens_decoder": added})
        prints.add(Tokenizer.from_folder(folder).fingerprint())
    assert len(prints) == 3


def test_fingerprints_of_checkpoints_without_added_tokens_are_unchanged(tmp_path: Path) -> None:
    # Parity packs of older bundles contain these fingerprints.
    known = {
        "fox-tiny": "0030e1a67f84dccf6ed08265aea1c0270f90420cadd33632ff6e1b95e657d301",
        "olmoe-tiny": "288ca72397b56f5a6a72adcc5ee3cefc761abe5d19d904f781bb1c0916768e26",
    }
    for name, fingerprint in known.items():
        assert Tokenizer.from_folder(example(tmp_path / name, name)).fingerprint() == fingerprint


def test_another_id_than_the_declared_one_is_noted(tmp_path: Path) -> None:
    folder = gemma_json(tmp_path / "t")
    size = Tokenizer.from_folder(folder).vocab_size
    put(folder, "added_tokens.json", {"<|im_end|>": size + 5, "<eos>": 2})
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.token_id("<|im_end|>") == size
    assert tokenizer.token_id("<eos>") == 1
    assert any(f"'<|im_end|>' is {size + 5}, but its id is {size}" in note for note in tokenizer.notes)


def test_tokens_without_an_embedding_row_are_encoded_as_text(tmp_path: Path) -> None:
    # As in many Llama 2 fine-tunes, which declare <pad> with the id 32000 and have 32000 rows.
    folder = gemma_json(tmp_path / "t")
    size = Tokenizer.from_folder(folder).vocab_size
    put(folder, "added_tokens.json", {"<here>": size, "[PAD]": size + 1})
    put(folder, "config.json", {"vocab_size": size + 1})
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.vocab_size == size + 1
    assert tokenizer.encode("<here>", add_bos=False) == [size]
    assert max(tokenizer.encode("[PAD]", add_bos=False)) < size
    assert any("not used: '[PAD]'" in note and f"beyond the {size + 1} rows" in note for note in tokenizer.notes)


def test_a_bundle_gets_every_file_that_adds_tokens(tmp_path: Path) -> None:
    folder = example(tmp_path / "t", "fox-tiny")
    put(folder, "config.json", {"vocab_size": 4000})
    add_by_both(folder, 3072)
    tokenizer = Tokenizer.from_folder(folder)
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in [*tokenizer.files, folder / "config.json"]:
        (copy / file.name).write_bytes(file.read_bytes())
    assert Tokenizer.from_folder(copy).fingerprint() == tokenizer.fingerprint()
    assert {"added_tokens.json", "special_tokens_map.json"} <= {file.name for file in tokenizer.files}


@pytest.mark.parametrize(
    ("file", "value", "match"),
    [
        ("added_tokens.json", {"<x>": "7"}, r"added_tokens.json: the id of '<x>' is '7'"),
        ("added_tokens.json", {"<x>": -1}, r"added_tokens.json: the id of '<x>' is '-1'; expected 0 to"),
        ("added_tokens.json", {"<x>": 10**12}, r"added_tokens.json: the id of '<x>'"),
        ("added_tokens.json", {"\ud800": 400}, r"added_tokens.json: .*not valid Unicode"),
        ("added_tokens.json", {str(i): i for i in range((1 << 17) + 1)}, r"added_tokens.json: 131073 tokens are more"),
        ("tokenizer_config.json", {"added_tokens_decoder": []}, r"added_tokens_decoder is '\[\]'; expected an object"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}, r"the id of 'x'"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1": {}}}, r"token '1' is '\{\}'; expected a string or"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"1": {"content": "a", "lstrip": 1}}},
            r"flags of token '1'",
        ),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1": {"content": "a", "x": 1}}}, r"unknown field 'x'"),
        ("tokenizer_config.json", {"eos_token": 5}, r"tokenizer_config.json: eos_token is '5'"),
        ("tokenizer_config.json", {"extra_special_tokens": 5}, r"extra_special_tokens is '5'; expected a list"),
        ("tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "legacy": "no"}, r"legacy is 'no'"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"\ud800\n": {}}}, r"token '.ud800.n' is"),
        ("generation_config.json", {"eos_token_id": "\ud800\n"}, r"generation_config.json: eos_token_id is '.ud800.n'"),
        ("special_tokens_map.json", {"eos_token": ["</s>"]}, r"special_tokens_map.json: eos_token is"),
    ],
)
def test_malformed_declarations_are_refused_in_one_line(tmp_path: Path, file: str, value: Any, match: str) -> None:
    folder = gemma_json(tmp_path / "t")
    put(folder, file, value)
    with pytest.raises(TokenizerError, match=match) as caught:
        Tokenizer.from_folder(folder)
    assert "\n" not in str(caught.value)
    str(caught.value).encode()


def test_a_string_that_is_not_unicode_is_not_a_token(tmp_path: Path) -> None:
    for make in (gemma_json, llama):
        assert Tokenizer.from_folder(make(tmp_path / make.__name__)).token_id("\ud800") is None


def test_special_tokens_can_be_encoded_as_text(tmp_path: Path) -> None:
    folder = llama(tmp_path / "t", split_special_tokens=True)
    assert 2 not in Tokenizer.from_folder(folder).encode("</s>")


def test_a_listed_token_that_is_also_named_becomes_special() -> None:
    listed = {7: AddedToken("<x>", special=False, lstrip=True, declared=7), 8: AddedToken("<y>", special=False)}
    found = Declared(names={"eos_token": AddedToken("<x>", where="special_tokens_map.json")}, listed=listed).tokens()
    assert [(token.content, token.special, token.lstrip) for token in found] == [
        ("<x>", True, True),
        ("<y>", False, False),
    ]


def test_tokens_are_matched_in_normalised_text_unless_special_or_declared_otherwise(tmp_path: Path) -> None:
    decoder = {
        "5": {"content": "plain"},
        "6": {"content": "<special>", "special": True},
        "7": {"content": "raw", "normalized": False},
        "8": {"content": "<odd>", "special": True, "normalized": True},
    }
    put(tmp_path, "tokenizer_config.json", {"added_tokens_decoder": decoder})
    listed = read_declared(tmp_path).listed
    assert {i: (token.special, token.normalized) for i, token in listed.items()} == {
        5: (False, True),
        6: (True, False),
        7: (False, False),
        8: (True, True),
    }
