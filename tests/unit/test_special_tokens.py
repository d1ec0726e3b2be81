"""Are special ids resolved correctly when a checkpoint's files contradict each other, as in published checkpoints?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizer_folders import gemma, gemma_json, olmoe, plain_byte_level, put

from edgelm.errors import TokenizerError
from edgelm.tokenization.chat_template import ChatTemplate
from edgelm.tokenization.special_tokens import ends_turns
from edgelm.tokenization.tokenizer import Tokenizer


def with_files(folder: Path, **files: dict[str, Any]) -> Tokenizer:
    for name, value in files.items():
        put(folder, f"{name}.json", value)
    return Tokenizer.from_folder(folder)


def test_the_end_token_of_olmoe_0125_is_found_by_its_id(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(olmoe(tmp_path / "o", 50280))
    assert tokenizer.token(50279) == "|||IP_ADDRESS|||"
    assert tokenizer.encode("<|endoftext|>") == [0]
    assert tokenizer.eos_ids == (50279,)
    assert tokenizer.bos_id == 50279
    assert tokenizer.pad_id == 1
    assert any("50279 ('|||IP_ADDRESS|||')" in note and "'<|endoftext|>' is 0" in note for note in tokenizer.notes)
    # It is not text, although the vocabulary does not mark it as special.
    assert tokenizer.decode([50279]) == ""


def test_a_bos_id_named_endoftext_overrides_the_tokenizer(tmp_path: Path) -> None:
    """In families with one token for bos and eos it is `<|endoftext|>`, so that name does not exclude a bos."""
    folder = olmoe(tmp_path / "o", 50280, renamed_eos=False)
    put(folder, "tokenizer_config.json", {"bos_token": Tokenizer.from_folder(folder).token(5)})
    put(folder, "generation_config.json", {"bos_token_id": 50279, "eos_token_id": 50279})
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.token(50279) == "<|endoftext|>"
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (50279, (50279,))
    assert any("the tokenizer's bos would be 5" in note for note in tokenizer.notes)


@pytest.mark.parametrize("value", [0, [0]])
def test_an_end_token_may_have_the_id_0(tmp_path: Path, value: object) -> None:
    folder = olmoe(tmp_path / "o", 50280, renamed_eos=False)
    for name in ("generation_config.json", "config.json"):
        put(folder, name, {"eos_token_id": value, "bos_token_id": 0, "pad_token_id": 0})
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (0, (0,), 0)
    assert tokenizer.decode([0]) == ""
    put(folder, "generation_config.json", {"eos_token_id": -1})  # some tools write -1 for none
    assert Tokenizer.from_folder(folder).eos_ids == (0,)


def test_an_end_token_by_id_is_not_decoded(tmp_path: Path) -> None:
    folder = olmoe(tmp_path / "o", 50280, renamed_eos=False)
    assert Tokenizer.from_folder(folder).decode([300]) != ""
    put(folder, "generation_config.json", {"eos_token_id": [300, 50279]})
    tokenizer = Tokenizer.from_folder(folder)
    assert 300 in tokenizer.eos_ids
    assert tokenizer.decode([300]) == ""


def test_olmoe_0924_has_no_notes(tmp_path: Path) -> None:
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
def test_in_olmoe_0125_bos_is_eos_however_declared(tmp_path: Path, declared: dict[str, Any]) -> None:
    tokenizer = with_files(olmoe(tmp_path / "o"), tokenizer_config=declared)
    assert tokenizer.eos_ids == (2999,)
    assert tokenizer.bos_id == 2999
    assert tokenizer.notes


def test_special_ids_of_fox_are_found_by_name(tmp_path: Path) -> None:
    folder = gemma(tmp_path / "g")
    (folder / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (2, (1,), 0)
    assert tokenizer.token(2) == "<bos>"
    assert tokenizer.token(1) == "<eos>"
    assert any("bos_token_id is 1" in note and "2 ('<bos>') is used" in note for note in tokenizer.notes)
    assert any("eos_token_id is 2" in note and "1 ('<eos>') is used" in note for note in tokenizer.notes)


def test_special_ids_of_fox_are_found_in_tokenizer_json(tmp_path: Path) -> None:
    swapped = {"bos_token_id": 1, "eos_token_id": 2}
    tokenizer = with_files(gemma_json(tmp_path / "g"), config=swapped)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (2, (1,), 0)
    assert len(tokenizer.notes) == 2


def test_consistent_configs_have_no_notes(tmp_path: Path) -> None:
    right = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    folder = gemma(tmp_path / "g")
    (folder / "tokenizer_config.json").unlink()
    tokenizer = with_files(folder, config=right, generation_config=right)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (2, (1,), 0)
    assert tokenizer.notes == []


def test_end_of_turn_ends_an_answer_if_the_template_uses_it(tmp_path: Path) -> None:
    folder = gemma(tmp_path / "g")
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.token_id("<end_of_turn>") == 107
    assert tokenizer.eos_ids == (1, 107)
    assert tokenizer.decode([107]) == ""
    put(folder, "tokenizer_config.json", {})
    assert Tokenizer.from_folder(folder).eos_ids == (1,)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}<end_of_turn>")
    assert Tokenizer.from_folder(folder).eos_ids == (1, 107)


def test_generation_config_has_priority_over_config(tmp_path: Path) -> None:
    folder = olmoe(tmp_path / "o")
    tokenizer = with_files(folder, generation_config={"eos_token_id": [2999, 300, 2999]}, config={"eos_token_id": 5})
    assert tokenizer.eos_ids == (2999, 300)
    assert any("generation_config.json is used" in note for note in tokenizer.notes)


def test_an_end_token_missing_from_the_vocabulary_is_refused(tmp_path: Path) -> None:
    folder = olmoe(tmp_path / "o")
    with pytest.raises(TokenizerError, match=r"generation_config.json: eos_token_id 3005 has no token .* 3000"):
        with_files(folder, generation_config={"eos_token_id": 3005}, config={"eos_token_id": 2999})
    with pytest.raises(TokenizerError, match=r"generation_config.json: eos_token_id 3005 has no token"):
        with_files(folder, generation_config={"eos_token_id": [2999, 3005]}, config={"vocab_size": 3072})
    (folder / "generation_config.json").unlink()
    with pytest.raises(
        TokenizerError, match=r"tokenizer_config.json: the end token '<\|im_end\|>' is in no vocabulary"
    ):
        with_files(folder, config={"eos_token_id": 2999}, tokenizer_config={"eos_token": "<|im_end|>"})


def test_an_end_token_beyond_the_embedding_is_refused(tmp_path: Path) -> None:
    folder = olmoe(tmp_path / "o")
    put(folder, "added_tokens.json", {"<|im_end|>": 3000})
    files = {"config": {"eos_token_id": 2999, "vocab_size": 3000}, "tokenizer_config": {"eos_token": "<|im_end|>"}}
    with pytest.raises(TokenizerError, match=r"'<\|im_end\|>' cannot be used: its id 3000 is beyond the 3000 rows"):
        with_files(folder, **files)
    files["config"]["vocab_size"] = 3001
    assert with_files(folder, **files).token_id("<|im_end|>") == 3000


def test_harmless_invalid_ids_give_notes(tmp_path: Path) -> None:
    # The model cannot produce the second id; -1 means none; ids in the file that is not used do not matter.
    tokenizer = with_files(
        olmoe(tmp_path / "o"),
        generation_config={"eos_token_id": [2999, 3005], "pad_token_id": -1},
        config={"eos_token_id": 3010, "vocab_size": 3000},
    )
    assert tokenizer.eos_ids == (2999,)
    assert tokenizer.pad_id == 1
    assert any("eos_token_id 3005 has no token" in note for note in tokenizer.notes)
    assert any("eos_token_id 3010 has no token" in note for note in tokenizer.notes)


CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content']}}"
    "{% if (loop.last and add_generation_prompt) or not loop.last %}{{ '<|im_end|>' + '\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITH_EOS = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + eos_token + '\n' }}{% endfor %}"
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
    "message['content'] | trim + '<|eot_id|>' %}{% if loop.first %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}"
)
PHI3 = "{% for m in messages %}{{ '<|user|>' + m['content'] + '<|end|>' + '\n' + '<|assistant|>\n' }}{% endfor %}"
GEMMA3 = (
    "{% for message in messages %}{{ '<start_of_turn>' + role }}{%- if message['content'] is string -%}"
    "{{ message['content'] | trim }}{%- elif message['content'] is iterable -%}{%- for item in message['content'] -%}"
    "{{ item['text'] | trim }}{%- endfor -%}{%- else -%}{{ raise_exception('Invalid content type') }}{%- endif -%}"
    "{{ '<end_of_turn>\n' }}{% endfor %}"
)
OPENING = (
    "{{ eos_token }}{# closes: message['content'] + eos_token #}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'user' %}{{ eos_token + '[INST] ' + message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ eos_token + 'assistant:' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "token", "closes"),
    [
        (CHATML, "<|im_end|>", True),
        (CHATML, "<|im_start|>", False),
        (CHATML, "</s>", False),
        (WITH_EOS, "<|im_end|>", True),
        (LLAMA3, "<|eot_id|>", True),
        (PHI3, "<|end|>", True),
        (GEMMA3, "<end_of_turn>", True),
        (OPENING, "<|im_end|>", False),
        (OPENING.replace("eos_token", "'</s>'"), "</s>", False),
        ("{{ messages[0].content }}</s>", "</s>", True),
        ("{{ messages[0].content }}", "</s>", False),
    ],
)
def test_end_of_turn_tokens_are_found_in_templates(template: str, token: str, closes: bool) -> None:
    assert ends_turns(template, token, "eos_token") is closes


@pytest.mark.parametrize("template", [CHATML, WITH_EOS])
def test_the_tokenizers_eos_ends_an_answer_if_the_template_ends_turns_with_it(tmp_path: Path, template: str) -> None:
    # A ChatML fine-tune: generation_config.json still has the base model's id.
    folder = gemma_json(tmp_path / "g")
    size = Tokenizer.from_folder(folder).vocab_size
    put(folder, "added_tokens.json", {"<|im_start|>": size, "<|im_end|>": size + 1})
    put(folder, "generation_config.json", {"eos_token_id": 1})
    put(folder, "tokenizer_config.json", {"eos_token": "<|im_end|>"})
    assert Tokenizer.from_folder(folder).eos_ids == (1,)
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.eos_ids == (1, size + 1)
    assert any("ends turns with" in note for note in tokenizer.notes)
    # The template's eos_token is that token, as in transformers, so that past turns look as in training.
    assert tokenizer.template_eos_id == size + 1
    rendered = ChatTemplate.from_folder(folder, tokenizer).render([{"role": "user", "content": "a"}])
    assert tokenizer.encode(rendered, add_bos=False).count(size + 1) == 1
    (folder / "chat_template.jinja").write_text(OPENING)
    assert Tokenizer.from_folder(folder).eos_ids == (1,)


def test_a_usual_end_of_turn_token_counts_without_a_declaration(tmp_path: Path) -> None:
    folder = olmoe(tmp_path / "o")
    put(folder, "added_tokens.json", {"<|im_start|>": 3000, "<|im_end|>": 3001})
    (folder / "chat_template.jinja").write_text(CHATML)
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.eos_ids == (2999, 3001)
    assert tokenizer.template_eos_id == 2999


def test_pad_may_be_the_end_token(tmp_path: Path) -> None:
    config = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 1}
    tokenizer = with_files(gemma_json(tmp_path / "g"), config=config)
    assert tokenizer.pad_id == 1
    assert tokenizer.eos_ids == (1,)


def test_bos_may_equal_eos_if_the_tokenizer_says_so(tmp_path: Path) -> None:
    # As in OPT: a text begins with the end token, and the tokenizer's config agrees with config.json.
    config = {"bos_token_id": 1, "eos_token_id": 1}
    tokenizer = with_files(gemma_json(tmp_path / "g"), config=config, tokenizer_config={"bos_token": "<eos>"})
    assert tokenizer.bos_id == 1


def test_names_without_ids_suffice(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(gemma_json(tmp_path / "g"))
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (2, (1,), 0)
    tokenizer = Tokenizer.from_folder(plain_byte_level(tmp_path / "p"))
    assert tokenizer.token(tokenizer.eos_ids[0]) == "</s>"


@pytest.mark.parametrize("value", ["2999", 1.5, True, {"id": 1}, [1, None]])
def test_ids_that_are_not_integers_are_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(TokenizerError, match=r"config.json: eos_token_id is"):
        with_files(olmoe(tmp_path / "o"), config={"eos_token_id": value})


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    folder = olmoe(tmp_path / "o")
    text = (folder / "tokenizer.json").read_text().replace("<|endoftext|>", "<first>")
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(TokenizerError, match="no end token: add its eos_token_id"):
        with_files(folder, config={}, tokenizer_config={})
