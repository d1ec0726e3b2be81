"""Does each step of a tokenizer.json do in libedgelm what it does in the `tokenizers` library?

A vocabulary that marks the last character of each word shows in the ids where a text is cut.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

sys.path.insert(0, str(Path(__file__).parent))

from fuzz_tokenizers import PROGRAM
from tokenizer_kinds import LLAMA3, O200K, oracle, put
from tokenizer_process import RefusedError, TokenizerProcess

from edgelm.tokenization import description
from edgelm.tokenization.tokenizer import Tokenizer

BEHAVIORS = ("removed", "isolated", "merged_with_previous", "merged_with_next", "contiguous")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Published ones first (GPT-4, DeepSeek, BLOOM), then the parts of the language one by one.
PATTERNS = (
    GPT2,
    LLAMA3,
    O200K,
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+|\\s*[\r\n]+",
    r" ?[^(\s|[.,!?…。，、।۔،])]+",  # noqa: RUF001 (the published pattern has these)
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    "[0-9][0-9][0-9]",
    r"\s+$",
    r"x*",
    "",
    r"(?=[A-Z])",
    r"(?<=\s)\S",
    r"(?<!a)b|[a-z&&[^ab]]+",
    r"\b|\d",
    r"^.|.$|\n",
    r"(?>a+)b?|.",
    r"(?:ab|a)*c?|[^a]",
    r"a(?i)b|c",
    r"\p{^L}+|\P{Lu}",
    r"[\p{L}&&[^\p{Lu}]]+",
    r".{2,3}?",
    r"[^\x00-\x7f]+|\u0020",
    r"\A.|.\z|\n\Z",
    r"(?m:.)+",
    r"[\]\-a]+|[-z]+|[a^]",
)
CHARACTERS = sorted(
    {character for text in oracle.STRINGS for form in (text, text.lower()) for character in form}
    | {*normalizers.NFKD().normalize_str("".join(oracle.STRINGS)), *pre_tokenizers.ByteLevel.alphabet(), *"_x"}
)


@pytest.fixture(scope="module")
def process() -> Iterator[TokenizerProcess]:
    with TokenizerProcess(PROGRAM) as running:
        yield running


def written(folder: Path, model: Any, normalizer: Any = None, pre_tokenizer: Any = None) -> Tokenizer:
    """Write a folder with a tokenizer of these steps, whose last token ends a text."""
    folder.mkdir()
    native = tokenizers.Tokenizer(model)
    if normalizer is not None:
        native.normalizer = normalizer
    if pre_tokenizer is not None:
        native.pre_tokenizer = pre_tokenizer
    native.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    native.save(str(folder / "tokenizer.json"))
    put(folder, "config.json", {"eos_token_id": native.get_vocab_size() - 1})
    ours = Tokenizer.from_folder(folder)
    description.write(ours, folder, folder / description.FILE)
    return ours


def marking(**settings: Any) -> models.BPE:
    """Return a model without merges in which the last character of a word is another token."""
    names = [*CHARACTERS, *(f"{character}#" for character in CHARACTERS), "<unk>", "</s>"]
    vocab = {name: index for index, name in enumerate(dict.fromkeys(names))}
    return models.BPE(vocab=vocab, merges=[], unk_token="<unk>", end_of_word_suffix="#", **settings)


def compare(process: TokenizerProcess, folder: Path, normalizer: Any = None, pre_tokenizer: Any = None) -> None:
    ours = written(folder, marking(), normalizer, pre_tokenizer)
    process.open(folder)
    for text in oracle.STRINGS:
        assert process.encode(text) == ours.encode(text, add_bos=False), text


@pytest.mark.parametrize("pattern", PATTERNS)
def test_regular_expressions_match_the_same(process: TokenizerProcess, tmp_path: Path, pattern: str) -> None:
    compare(process, tmp_path / "t", pre_tokenizer=pre_tokenizers.Split(Regex(pattern), "isolated"))


@pytest.mark.parametrize("invert", [False, True])
@pytest.mark.parametrize("behavior", BEHAVIORS)
def test_splits_join_their_parts_the_same(
    process: TokenizerProcess, tmp_path: Path, behavior: str, invert: bool
) -> None:
    for number, pattern in enumerate((Regex(r"\s+|e"), Regex(r"(?=[a-h])"), "th")):
        split = pre_tokenizers.Split(pattern, behavior, invert=invert)
        compare(process, tmp_path / str(number), pre_tokenizer=split)
    compare(process, tmp_path / "p", pre_tokenizer=pre_tokenizers.Punctuation(behavior))


@pytest.mark.parametrize(
    "step",
    [
        pre_tokenizers.ByteLevel(True),
        pre_tokenizers.ByteLevel(False, use_regex=False),
        *[
            pre_tokenizers.Metaspace("▁", scheme, split)
            for scheme in ("always", "first", "never")
            for split in (True, False)
        ],
        pre_tokenizers.Digits(True),
        pre_tokenizers.Digits(False),
        pre_tokenizers.Whitespace(),
        pre_tokenizers.WhitespaceSplit(),
        pre_tokenizers.CharDelimiterSplit("e"),
        pre_tokenizers.FixedLength(3),
        pre_tokenizers.BertPreTokenizer(),
        pre_tokenizers.Sequence([pre_tokenizers.Punctuation("contiguous"), pre_tokenizers.ByteLevel(False)]),
    ],
    ids=str,
)
def test_pre_tokenizers_cut_the_same(process: TokenizerProcess, tmp_path: Path, step: Any) -> None:
    compare(process, tmp_path / "t", pre_tokenizer=step)


@pytest.mark.parametrize(
    "step",
    [
        normalizers.NFC(),
        normalizers.NFD(),
        normalizers.NFKC(),
        normalizers.NFKD(),
        normalizers.Lowercase(),
        normalizers.StripAccents(),
        normalizers.Nmt(),
        normalizers.Strip(True, False),
        normalizers.Strip(False, True),
        normalizers.Prepend("_x"),
        normalizers.Replace("th", "_"),
        normalizers.Replace("a", ""),
        normalizers.Replace(Regex("x*"), "_"),
        normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]),
    ],
    ids=str,
)
def test_normalizers_change_the_same(process: TokenizerProcess, tmp_path: Path, step: Any) -> None:
    compare(process, tmp_path / "t", normalizer=step, pre_tokenizer=pre_tokenizers.WhitespaceSplit())


@pytest.mark.parametrize("pattern", [r"[\p{L}\d\s]", r"[\p{P}\p{M}]|\p{Nl}|(?i:[sk])"])
def test_every_character_is_classified_the_same(process: TokenizerProcess, tmp_path: Path, pattern: str) -> None:
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    model = models.BPE(vocab={**vocab, "</s>": 256}, merges=[], byte_fallback=True)
    ours = written(tmp_path / "t", model, normalizers.Replace(Regex(pattern), "x"))
    process.open(tmp_path / "t")
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    for start in range(0, len(characters), 1 << 16):
        text = "".join(characters[start : start + (1 << 16)])
        assert process.encode(text) == ours.encode(text, add_bos=False), hex(ord(text[0]))


@pytest.mark.parametrize("setting", ["none", "fuse_unk", "byte_fallback", "ignore_merges"])
def test_settings_of_merging_count(process: TokenizerProcess, tmp_path: Path, setting: str) -> None:
    names = ["a", "b", "c", "ab", "bc", "abc", "abca", "aab", "the", "t", "h", "e", "<0xC3>", "<0xA9>", "<unk>", "</s>"]
    merges = [("b", "c"), ("a", "b"), ("ab", "c"), ("a", "bc"), ("a", "ab")]  # two ways to one token
    settings = {} if setting == "none" else {setting: True}
    model = models.BPE({name: i for i, name in enumerate(names)}, merges, unk_token="<unk>", **settings)
    ours = written(tmp_path / "t", model, pre_tokenizer=pre_tokenizers.WhitespaceSplit())
    process.open(tmp_path / "t")
    for text in ("the abca", "aabcabcaabb", "xyabé漢éa xx", "ab" * 500, "bcbcabcab" * 50, "é漢xé", "ü a"):
        assert process.encode(text) == ours.encode(text, add_bos=False), text


def test_what_cannot_be_encoded_is_an_error(process: TokenizerProcess, tmp_path: Path) -> None:
    model = models.BPE({"a": 0, "<unk>": 1, "</s>": 2}, [], unk_token="<unk>")
    written(tmp_path / "t", model)
    for name in ("tokenizer.json", description.FILE):
        file = tmp_path / "t" / name
        text = file.read_text(encoding="utf-8")
        file.write_text(text.replace('"<unk>"', '"gone"').replace('"unk_id": 1', '"unk_id": null'), encoding="utf-8")
    process.open(tmp_path / "t")
    assert process.encode("aa") == [0, 0]
    with pytest.raises(RefusedError, match=r"tokenizer\.json: its vocabulary has no token for what it cannot encode"):
        process.encode("b")
