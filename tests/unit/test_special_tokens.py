"""Do the special ids come out right when a checkpoint's files contradict each other, as the published ones do?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizer_folders import gemma, gemma_json, olmoe, plain_byte_level, put

from edgelm.errors import TokenizerError
from edgelm.tokenizer import Tokenizer


def with_files(folder: Path, **files: dict[str, Any]) -> Tokenizer:
    for name, value in files.items():
        put(folder, f"{name}.json", value)
    return Tokenizer.from_folder(folder)


def test_olmoe_0125_ends_with_the_id_whatever_it_is_called(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(olmoe(tmp_path / "o", 50280))
    assert tokenizer.token(50279) == "|||IP_ADDRESS|||"
    assert tokenizer.encode("<|endoftext|>") == [0]
    assert tokenizer.eos_ids == (50279,)
    assert tokenizer.bos_id == 50279
    assert tokenizer.pad_id == 1
    assert any("50279 ('|||IP_ADDRESS|||')" in note and "'<|endoftext|>' is 0" in note for note in tokenizer.notes)
    # It is no text, although the vocabulary does not call it special.
    assert tokenizer.decode([50279]) == ""


def test_olmoe_0924_has_nothing_to_note(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(olmoe(tmp_path / "o", 50280, renamed_eos=False))
    assert tokenizer.token(50279) == "<|endoftext|>"
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (50279, (50279,), 1)
    assert tokenizer.notes == []


@pytest.mark.parametrize(
    "declared",
    [
        {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
        {"bos_token": "<|endoftext|>", "eos_token": "|||IP_ADDRESS|||"},
        {"bos_token": {"content": "|||IP_ADDRESS|||"}, "eos_token": {"content": "|||IP_ADDRESS|||"}},
    ],
)
def test_olmoe_0125_begins_with_its_end_however_that_is_said(tmp_path: Path, declared: dict[str, Any]) -> None:
    tokenizer = with_files(olmoe(tmp_path / "o"), tokenizer_config=declared)
    assert tokenizer.eos_ids == (2999,)
    assert tokenizer.bos_id == 2999
    assert tokenizer.notes


def test_fox_goes_by_the_names_because_its_configs_swap_the_ids(tmp_path: Path) -> None:
    folder = gemma(tmp_path / "g")
    (folder / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (2, (1,), 0)
    assert tokenizer.token(2) == "<bos>"
    assert tokenizer.token(1) == "<eos>"
    assert any("bos_token_id 1" in note and "2 ('<bos>') is used" in note for note in tokenizer.notes)
    assert any("eos_token_id 2" in note and "1 ('<eos>') is used" in note for note in tokenizer.notes)


def test_fox_from_tokenizer_json_too(tmp_path: Path) -> None:
    swapped = {"bos_token_id": 1, "eos_token_id": 2}
    tokenizer = with_files(gemma_json(tmp_path / "g"), config=swapped)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (2, (1,), 0)
    assert len(tokenizer.notes) == 2


def test_right_configs_have_nothing_to_note(tmp_path: Path) -> None:
    right = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    folder = gemma(tmp_path / "g")
    (folder / "tokenizer_config.json").unlink()
    tokenizer = with_files(folder, config=right, generation_config=right)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (2, (1,), 0)
    assert tokenizer.notes == []


def test_end_of_turn_ends_an_answer_where_the_template_uses_it(tmp_path: Path) -> None:
    folder = gemma(tmp_path / "g")
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.token_id("<end_of_turn>") == 107
    assert tokenizer.eos_ids == (1, 107)
    assert tokenizer.decode([107]) == ""
    put(folder, "tokenizer_config.json", {})
    assert Tokenizer.from_folder(folder).eos_ids == (1,)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}<end_of_turn>")
    assert Tokenizer.from_folder(folder).eos_ids == (1, 107)


def test_the_generation_config_counts_before_the_config(tmp_path: Path) -> None:
    folder = olmoe(tmp_path / "o")
    tokenizer = with_files(folder, generation_config={"eos_token_id": [2999, 300, 2999]}, config={"eos_token_id": 5})
    assert tokenizer.eos_ids == (2999, 300)
    assert any("generation_config.json counts" in note for note in tokenizer.notes)


def test_ids_outside_the_vocabulary_and_negative_ones_are_not_used(tmp_path: Path) -> None:
    folder = olmoe(tmp_path / "o")
    tokenizer = with_files(
        folder, generation_config={"eos_token_id": 3005, "pad_token_id": -1}, config={"eos_token_id": 2999}
    )
    assert tokenizer.eos_ids == (2999,)
    assert tokenizer.pad_id == 1
    assert any("eos_token_id 3005 has no token" in note for note in tokenizer.notes)


def test_a_pad_that_is_the_end_token_is_fine(tmp_path: Path) -> None:
    config = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 1}
    tokenizer = with_files(gemma_json(tmp_path / "g"), config=config)
    assert tokenizer.pad_id == 1
    assert tokenizer.eos_ids == (1,)


def test_one_token_for_both_ends_is_kept_where_the_tokenizer_says_so(tmp_path: Path) -> None:
    # OPT's way: a text begins with the end token, and the tokenizer's config agrees with config.json.
    config = {"bos_token_id": 1, "eos_token_id": 1}
    tokenizer = with_files(gemma_json(tmp_path / "g"), config=config, tokenizer_config={"bos_token": "<eos>"})
    assert tokenizer.bos_id == 1


def test_names_alone_suffice(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(gemma_json(tmp_path / "g"))
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (2, (1,), 0)
    tokenizer = Tokenizer.from_folder(plain_byte_level(tmp_path / "p"))
    assert tokenizer.token(tokenizer.eos_ids[0]) == "</s>"


@pytest.mark.parametrize("value", ["2999", 1.5, True, {"id": 1}, [1, None]])
def test_ids_that_are_no_numbers_are_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(TokenizerError, match=r"config.json: eos_token_id is"):
        with_files(olmoe(tmp_path / "o"), config={"eos_token_id": value})


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    folder = olmoe(tmp_path / "o")
    text = (folder / "tokenizer.json").read_text().replace("<|endoftext|>", "<first>")
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(TokenizerError, match="no end token: add its eos_token_id"):
        with_files(folder, config={}, tokenizer_config={})
