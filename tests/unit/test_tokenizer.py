"""Do tokenizers encode and decode text as the libraries do, at once and as a stream?"""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizer_folders import KINDS, TEXTS, gemma, gemma_json, olmoe, plain_byte_level, put, trained_pieces

from edgelm.errors import TokenizerError
from edgelm.tokenization.tokenizer import Tokenizer
from edgelm.tokenization.tokenizer_json import adds_bos

Library = tuple[Callable[[str], list[int]], Callable[[list[int]], str]]


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = KINDS[request.param](tmp_path_factory.mktemp("tokenizer") / request.param)
    return path


def library(folder: Path) -> Library:
    """Return the encode and decode functions of the library."""
    if (folder / "tokenizer.json").exists():
        fast = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        fast.no_truncation()
        fast.no_padding()
        return lambda text: fast.encode(text, add_special_tokens=False).ids, fast.decode
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return pieces.encode, pieces.decode


def random_ids(tokenizer: Tokenizer, count: int, chooser: random.Random) -> list[int]:
    """Return ids of which many are bytes, so that invalid and incomplete characters occur."""
    byte_ids = [i for i in range(tokenizer.vocab_size) if tokenizer.vocabulary.is_byte(i)]
    return [
        chooser.choice(byte_ids) if byte_ids and chooser.random() < 0.5 else chooser.randrange(tokenizer.vocab_size)
        for _ in range(count)
    ]


def stream(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    detokenizer = tokenizer.detokenizer()
    return [*(detokenizer.push(i) for i in ids), detokenizer.flush()]


def test_ids_and_texts_equal_those_of_the_library(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    encode, decode = library(folder)
    for text in TEXTS:
        ids = tokenizer.encode(text, add_bos=False)
        assert ids == encode(text)
        assert tokenizer.decode(ids) == decode(ids)


@pytest.mark.parametrize("kind", ["olmoe", "gemma", "gemma_json", "llama_json", "pieces_identity"])
def test_texts_survive_a_round_trip(kind: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(KINDS[kind](tmp_path / kind))
    for text in TEXTS:
        # GPT-NeoX's tokenizer, and so OLMoE's, composes characters first.
        expected = unicodedata.normalize("NFC", text) if kind == "olmoe" else text
        assert tokenizer.decode(tokenizer.encode(text)) == expected


def test_random_ids_decode_as_in_the_library_if_they_are_utf8(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    _, decode = library(folder)
    chooser = random.Random(1)
    compared = 0
    for _ in range(400):
        ids = random_ids(tokenizer, chooser.randint(1, 6), chooser)
        if any(i in tokenizer.special and i not in tokenizer.vocabulary.own_special for i in ids):
            continue  # special by config.json only, which the library does not read
        text = tokenizer.decode(ids)
        if "\ufffd" not in text:
            assert text == decode(ids), ids
            compared += 1
    assert compared > 50


def test_streamed_texts_join_to_the_whole_and_never_split_a_character(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    chooser = random.Random(2)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        pieces = stream(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids)
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in pieces)
    for _ in range(300):
        ids = random_ids(tokenizer, chooser.randint(0, 12), chooser)
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_character_of_several_tokens_appears_with_the_last_token(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    for character in "🎉漢":
        ids = tokenizer.encode("a" + character, add_bos=False)
        pieces = stream(tokenizer, ids)
        assert pieces[-2] == character
        assert pieces[-1] == ""
        assert len(ids) >= 4, "the vocabularies of these tests have no such character"


def test_an_incomplete_character_becomes_one_replacement_at_the_end(tmp_path: Path) -> None:
    for make in (olmoe, gemma, gemma_json):
        tokenizer = Tokenizer.from_folder(make(tmp_path / make.__name__))
        ids = tokenizer.encode("a🎉", add_bos=False)
        assert stream(tokenizer, ids[:-1]) == ["a", "", "", "", "\ufffd"]
        assert tokenizer.decode([*ids[:-1], ids[0]]) == "a\ufffda"


def test_a_stream_can_be_used_again_after_flush(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    detokenizer = tokenizer.detokenizer()
    ids = tokenizer.encode("the people")
    first, second = ("".join([*map(detokenizer.push, ids), detokenizer.flush()]) for _ in range(2))
    assert first == second == tokenizer.decode(ids)


def test_ids_without_a_token_give_nothing(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    ids = tokenizer.encode("the people", add_bos=False)
    assert tokenizer.decode([tokenizer.vocab_size, *ids, tokenizer.vocab_size + 99, -1]) == tokenizer.decode(ids)
    assert tokenizer.token(tokenizer.vocab_size) is None
    assert tokenizer.token_id("no such token") is None


def test_special_tokens_in_a_text_are_parsed_by_both_kinds(tmp_path: Path) -> None:
    for make in (gemma, gemma_json):
        tokenizer = Tokenizer.from_folder(make(tmp_path / make.__name__))
        ids = tokenizer.encode("<bos>a<eos><bos>", add_bos=False)
        assert [ids[0], *ids[-2:]] == [2, 1, 2]
        assert tokenizer.decode(ids) == "a"
        assert tokenizer.decode(ids, skip_special=False) == "<bos>a<eos><bos>"


def test_bos_is_prepended_if_the_files_say_so(tmp_path: Path) -> None:
    byte_level = Tokenizer.from_folder(olmoe(tmp_path / "o"))
    assert byte_level.add_bos is False
    assert byte_level.encode("a", add_bos=True) == [byte_level.bos_id, *byte_level.encode("a")]
    for folder in (gemma(tmp_path / "g"), gemma_json(tmp_path / "j")):
        tokenizer = Tokenizer.from_folder(folder)
        assert tokenizer.add_bos is True
        assert tokenizer.encode("a") == [2, *tokenizer.encode("a", add_bos=False)]
        put(folder, "tokenizer_config.json", {"add_bos_token": False})
        assert Tokenizer.from_folder(folder).add_bos is False
    without = Tokenizer.from_folder(plain_byte_level(tmp_path / "p"))
    assert without.bos_id is None
    assert without.add_bos is False
    with pytest.raises(TokenizerError, match="pass add_bos=False"):
        without.encode("a", add_bos=True)


def test_truncation_and_padding_settings_are_ignored(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(plain_byte_level(tmp_path / "p"))
    assert len(tokenizer.encode("x" * 50)) == 50
    assert len(tokenizer.encode("x")) == 1


def test_dropout_of_the_tokenizer_is_ignored(tmp_path: Path) -> None:
    folder = plain_byte_level(tmp_path / "p")
    data = json.loads((folder / "tokenizer.json").read_text())
    merged = max(data["model"]["vocab"].values()) + 10
    data["model"]["vocab"]["ab"] = merged
    data["model"] |= {"merges": [["a", "b"]], "dropout": 0.9}
    (folder / "tokenizer.json").write_text(json.dumps(data))
    assert Tokenizer.from_folder(folder).encode("ab" * 50) == [merged] * 50


def test_the_space_before_every_word_but_the_first_is_kept(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    _, decode = library(folder)
    names = ((i, tokenizer.token(i) or "") for i in range(tokenizer.vocab_size))
    words = [i for i, name in names if name[:1] in "\u2581\u0120" and name[1:].isalpha() and name.isprintable()][:4]
    if len(words) < 2:
        pytest.skip("this vocabulary has no words")
    text = tokenizer.decode(words)
    assert text == decode(words)
    assert text.strip().count(" ") == len(words) - 1


def test_leading_spaces_are_dropped_as_in_the_library(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    _, decode = library(folder)
    space = tokenizer.token_id("\u2581") or tokenizer.token_id("\u0120")
    assert space is not None
    words = [tokenizer.encode(word, add_bos=False) for word in ("the", "x y")]
    for ids in ([space], [space, space], *([space] * count + word for count in (1, 2, 3) for word in words)):
        assert tokenizer.decode(ids) == decode(ids), ids


def test_unknown_characters_are_dropped_as_in_transformers(tmp_path: Path) -> None:
    folder = trained_pieces(tmp_path / "p", byte_fallback=False)
    unknown = Tokenizer.from_folder(folder).encode("a\u6f22b", add_bos=False)
    put(folder, "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"})
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.token_id("<unk>") in unknown
    assert tokenizer.token_id("<unk>") not in tokenizer.encode("a\u6f22b", add_bos=False)
    assert tokenizer.decode(tokenizer.encode("a\u6f22b")).replace(" ", "") == "ab"


@pytest.mark.parametrize(("ids", "begins"), [([2], True), ([2, 7], True), ([7, 2], False), ([7], False), ([], False)])
def test_is_bos_the_first_id_of_the_post_processor(ids: list[int], begins: bool) -> None:
    single = [{"SpecialToken": {"id": "X", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {"X": {"id": "X", "ids": ids, "tokens": ["?"] * len(ids)}}
    step = {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": special}
    assert adds_bos({"post_processor": step}, 2) == begins
    assert adds_bos({"post_processor": {"type": "Sequence", "processors": [step]}}, 2) == begins
    last = {**step, "single": single[::-1]}
    assert not adds_bos({"post_processor": last}, 2)


def test_text_that_is_not_unicode_is_refused(folder: Path) -> None:
    with pytest.raises(TokenizerError, match="not valid Unicode at character 1"):
        Tokenizer.from_folder(folder).encode("a\udcff")


def test_the_fingerprint_depends_on_vocabulary_and_special_ids(folder: Path, tmp_path: Path) -> None:
    fingerprint = Tokenizer.from_folder(folder).fingerprint()
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert Tokenizer.from_folder(copy).fingerprint() == fingerprint
    put(copy, "tokenizer_config.json", {"eos_token": Tokenizer.from_folder(copy).token(5), "add_bos_token": True})
    put(copy, "generation_config.json", {"eos_token_id": 5})
    assert Tokenizer.from_folder(copy).fingerprint() != fingerprint


def test_a_swapped_token_changes_the_fingerprint(tmp_path: Path) -> None:
    folder = olmoe(tmp_path / "o")
    before = Tokenizer.from_folder(folder).fingerprint()
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"(": 9', '"(": 10', 1).replace('")": 10', '")": 9', 1))
    assert Tokenizer.from_folder(folder).fingerprint() != before


def test_files_are_those_that_a_bundle_needs(tmp_path: Path) -> None:
    folder = gemma(tmp_path / "g")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    tokenizer = Tokenizer.from_folder(folder)
    names = {path.name for path in tokenizer.files}
    assert names == {"tokenizer.model", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"}
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in [*tokenizer.files, folder / "config.json"]:
        (copy / path.name).write_bytes(path.read_bytes())
    assert Tokenizer.from_folder(copy).fingerprint() == tokenizer.fingerprint()


def test_a_class_with_other_steps_than_the_file_is_used_with_a_note(tmp_path: Path) -> None:
    # As in transformers, whose GPTNeoXTokenizer uses only vocabulary and merges of the file.
    folder = olmoe(tmp_path / "o")
    before = Tokenizer.from_folder(folder)
    assert before.notes == [note for note in before.notes if "steps" not in note]
    file = folder / "tokenizer.json"
    data = json.loads(file.read_text())
    file.write_text(json.dumps({**data, "normalizer": {"type": "Lowercase"}}))
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode("The People") == before.encode("The People")
    assert any("differs from GPTNeoXTokenizer's steps" in note for note in tokenizer.notes)
    put(folder, "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    assert Tokenizer.from_folder(folder).encode("The People") == before.encode("the people")


def test_tokenizer_json_is_preferred_to_tokenizer_model(tmp_path: Path) -> None:
    folder = gemma(tmp_path / "g")
    other = gemma_json(tmp_path / "j")
    (folder / "tokenizer.json").write_bytes((other / "tokenizer.json").read_bytes())
    assert Tokenizer.from_folder(folder).vocab_size == Tokenizer.from_folder(other).vocab_size


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 50, b"version https://git-lfs.github.com/spec/v1\n"])
def test_damaged_files_are_refused_by_name(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=name):
        Tokenizer.from_folder(tmp_path)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"neither tokenizer.json nor tokenizer.model"):
        Tokenizer.from_folder(tmp_path)


def test_a_decoder_of_another_kind_is_refused(tmp_path: Path) -> None:
    folder = plain_byte_level(tmp_path / "p")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="step WordPiece"):
        Tokenizer.from_folder(folder)
    tokenizer.decoder = None
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="step None"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_garbled_settings_are_refused_by_name(tmp_path: Path, name: str) -> None:
    folder = olmoe(tmp_path / "o")
    (folder / name).write_text("{")
    with pytest.raises(TokenizerError, match=name):
        Tokenizer.from_folder(folder)
