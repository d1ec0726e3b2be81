"""Do hostile and damaged tokenizer files give an error of one line before they use much time or memory?"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizer_folders import gemma, gemma_json, olmoe, plain_byte_level

from edgelm.errors import TokenizerError
from edgelm.tokenization import piece_model, tokenizer_json
from edgelm.tokenization.piece_model import read_piece_model
from edgelm.tokenization.tokenizer import Tokenizer
from edgelm.tokenization.tokenizer_json import check_pattern

Replace = dict[str, Any]


def replace(old: str, new: str, kind: str = "String") -> Replace:
    return {"type": "Replace", "pattern": {kind: old}, "content": new}


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def nested(depth: int) -> dict[str, Any]:
    step: dict[str, Any] = {"type": "NFC"}
    for _ in range(depth):
        step = {"type": "Sequence", "normalizers": [step]}
    return step


def sequence(*steps: Any, of: str = "normalizers") -> dict[str, Any]:
    return {"type": "Sequence", of: list(steps)}


@pytest.mark.parametrize(
    ("part", "value", "match"),
    [
        ("normalizer", sequence(*[replace("a", "aaaa")] * 10), "1048576 times as long"),
        ("normalizer", replace("", "x"), "replaces nothing"),
        ("normalizer", replace("", "x" * 100, "Regex"), "101 times as long"),
        ("normalizer", {"type": "Prepend", "prepend": "x" * 5000}, "puts 5000 before each"),
        ("normalizer", sequence(*[{"type": "NFC"}] * 100), "100 steps"),
        ("normalizer", nested(200), "nested more than"),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "////////"}, "precompiled_charsmap is damaged"),
        ("decoder", sequence(*[replace("a", "a" * 60)] * 4, of="decoders"), "times as long"),
        ("pre_tokenizer", split("(a+)+b"), "repetition within a repetition"),
        ("pre_tokenizer", sequence(split("(?:x|(y*z)){2,}"), of="pretokenizers"), "repetition within a repetition"),
        ("pre_tokenizer", split("(a)\\1*"), "refers to a group"),
        ("pre_tokenizer", split("a{99999}"), "99999"),
        ("pre_tokenizer", {"type": "FixedLength", "length": 0}, "no length"),
        ("model", {"type": "BPE", "vocab": {"a": 1 << 40}, "merges": []}, "not between 0 and"),
        ("model", {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]}, "does not make one token"),
        ("model", {"type": "BPE", "vocab": {"a": 0}, "merges": ["a"]}, "does not make one token"),
        ("model", {"type": "Unigram", "vocab": [["a", float("inf")]]}, "not finite"),
        ("model", None, "it has no model"),
        ("added_tokens", [{"id": 1 << 40, "content": "<x>"}], "the id of '<x>'"),
        ("added_tokens", {"a": 1}, "added_tokens is not a list"),
    ],
)
def test_steps_that_could_explode_or_panic_are_refused(tmp_path: Path, part: str, value: Any, match: str) -> None:
    folder = gemma_json(tmp_path / "t")
    data = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**data, part: value}))
    with pytest.raises(TokenizerError, match=match) as caught:
        Tokenizer.from_folder(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    "pattern",
    [
        # GPT-2, GPT-4, Llama 3 and Qwen, GPT-4o, DeepSeek, BLOOM, StarCoder, Mistral.
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\s+",
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+|\\s*[\r\n]+",
        r" ?[^(\s|[.,!?…。，、।۔،])]+",  # noqa: RUF001 (the published pattern has these)
        r"(?>a+)*|(?:b++)+",
    ],
)
def test_published_patterns_are_accepted(pattern: str) -> None:
    check_pattern(pattern)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_files_of_a_gigabyte_are_not_read(tmp_path: Path, name: str) -> None:
    with (tmp_path / name).open("wb") as file:
        file.truncate(1 << 30)  # sparse
    start = time.process_time()
    with pytest.raises(TokenizerError, match=f"{name}: is larger than 67108864 bytes"):
        Tokenizer.from_folder(tmp_path)
    assert time.process_time() - start < 1


def test_deeply_nested_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model":' + "[" * 200_000 + "]" * 200_000 + "}")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"\x0a\xff\xff\xff\xff\x0f", "where 0 are left"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "more than 64 bits"),
        (b"\x0a\x05\x0a\x03ab", "ends too early|are left"),
        (b"\x0a\x0a\x0a\x01\xff\x15\x00\x00\x00\x00\x18\x01", "utf-8"),
        (b"\x0a\x0a\x0a\x01a\x15\x00\x00\x00\x00\x18\x09", "no known type"),
        (b"\x12\x00", "vocabulary is empty"),
        (b"\x0a\x00" * (1 << 22) + b"\x0a\x00", "more than 4194304 pieces"),
        (b"\x0b\x00", "wire type 3"),
        (b"\x0a\x0a\x0a\x01a\x15\x00\x00\x00\x00\x18\x01" * 2, "not a usable tokenizer.model"),
    ],
)
def test_damaged_models_are_refused(tmp_path: Path, content: bytes, match: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(TokenizerError, match=match) as caught:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_text_that_the_library_cannot_encode_gives_an_error_of_one_line(tmp_path: Path) -> None:
    folder = plain_byte_level(tmp_path / "t")
    data = json.loads((folder / "tokenizer.json").read_text())
    data["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "q"}
    (folder / "tokenizer.json").write_text(json.dumps(data))
    tokenizer = Tokenizer.from_folder(folder)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: it cannot encode this text \(.*UNK") as caught:
        tokenizer.encode("b")
    assert "\n" not in str(caught.value)


def test_panics_become_errors_and_interrupts_are_passed_on(tmp_path: Path) -> None:
    class Panic(BaseException):
        pass

    def fail(error: BaseException) -> None:
        raise error

    with pytest.raises(TokenizerError, match=r"here \(first second\)"):
        tokenizer_json.call_library(fail, Panic("first\n  second"), what="here")
    with pytest.raises(KeyboardInterrupt):
        tokenizer_json.call_library(fail, KeyboardInterrupt(), what="here")


def _mutated(data: bytes, chooser: random.Random) -> bytes:
    result = bytearray(data)
    at = chooser.randrange(len(data))
    way = chooser.randrange(4)
    if way == 0:
        for _ in range(chooser.randint(1, 4)):
            result[chooser.randrange(len(data))] = chooser.randrange(256)
    elif way == 1:
        del result[at:]
    elif way == 2:
        del result[at : at + chooser.randint(1, 100)]
    else:
        result[at:at] = data[-at:][: chooser.randint(1, 100)]
    return bytes(result)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (gemma_json, "tokenizer.json"),
        (lambda folder: olmoe(folder, 500), "tokenizer.json"),
        (lambda folder: gemma(folder, 500), "tokenizer.model"),
        (lambda folder: olmoe(folder, 500), "tokenizer_config.json"),
    ],
)
def test_mutated_files_are_read_or_refused_in_one_line(tmp_path: Path, make: Callable[[Path], Path], name: str) -> None:
    folder = make(tmp_path / "t")
    data = (folder / name).read_bytes()
    chooser = random.Random(7)
    read = refused = 0
    for _ in range(60):
        (folder / name).write_bytes(_mutated(data, chooser))
        try:
            tokenizer = Tokenizer.from_folder(folder)
            tokenizer.decode(tokenizer.encode("the <s> people\n 🎉 \x00"))
            read += 1
        except TokenizerError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 10
    assert read + refused == 60


def test_pieces_in_unusual_order_are_read_and_written(tmp_path: Path) -> None:
    # Fields in another order, which protobuf allows; the usual order has a fast path.
    folder = gemma(tmp_path / "t", 600)
    file = folder / "tokenizer.model"
    usual = piece_model.read_piece_model(file)
    assert usual.score_at is not None
    swapped = b""
    for i, kind in enumerate(usual.kinds.tolist()):
        name = usual.name(i).encode()
        body = bytes((0x18, kind, 0x0A, len(name))) + name + b"\x15" + (i * 7).to_bytes(4, "little")
        swapped += bytes((0x0A, len(body))) + body
    expected = Tokenizer.from_folder(folder).fingerprint()
    file.write_bytes(swapped + usual.data[usual.pieces_end :])
    assert piece_model.read_piece_model(file).score_at is None
    assert Tokenizer.from_folder(folder).fingerprint() == expected


def test_pieces_that_share_a_character_are_refused(tmp_path: Path) -> None:
    """Joined they are valid UTF-8; only the start of the second piece shows that they are not valid."""

    def piece(name: bytes) -> bytes:
        body = b"\x0a" + bytes([len(name)]) + name + b"\x15" + bytes(4)
        return b"\x0a" + bytes([len(body)]) + body

    file = tmp_path / "tokenizer.model"
    whole = "\u6f22".encode()
    file.write_bytes(piece(b"a") + piece(whole))
    assert read_piece_model(file).name(1) == "\u6f22"
    for cut in (1, 2):
        file.write_bytes(piece(b"a") + piece(whole[:cut]) + piece(whole[cut:]))
        with pytest.raises(TokenizerError, match="a piece that begins within a character"):
            read_piece_model(file)
