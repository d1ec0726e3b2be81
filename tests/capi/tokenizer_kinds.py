"""Folders with tokenizers of every kind that libedgelm reads, and their descriptions."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

import test_tokenizer_oracle as oracle
import tokenizer_folders
from tokenizer_folders import ADDITIONS, WAYS, put, trained_pieces
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from edgelm.synth.tokenizer import SAMPLE
from edgelm.tokenization import description
from edgelm.tokenization.piece_model import NORMAL, UNUSED, read_piece_model
from edgelm.tokenization.tokenizer import Tokenizer as Ours

Make = Callable[[Path], Path]

# Pre-tokenizers of published families.
ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}"
QWEN2 = LLAMA3.replace("{1,3}", "")
UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
WORD = r"[^\r\n\p{L}\p{N}]?"
O200K = (
    rf"{WORD}[{UPPER}]*[{LOWER}]+{ENDINGS}?|{WORD}[{UPPER}]+[{LOWER}]*{ENDINGS}?|"
    rf"\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"
)


def _byte_level(folder: Path, steps: list[Any], normalizer: Any = None) -> Path:
    """Byte-level BPE that splits a text by `steps` first."""
    folder.mkdir()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not steps)]
    )
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SAMPLE.splitlines(), trainer)
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(mark, normalized=False, special=True) for mark in marks])
    tokenizer.save(str(folder / "tokenizer.json"))
    put(folder, "config.json", {"eos_token_id": tokenizer.token_to_id("<|im_end|>")})
    return folder


def _split(*patterns: str) -> list[Any]:
    return [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]


def _deepseek(folder: Path) -> Path:
    letters = "".join(
        f"{chr(a)}-{chr(b)}" for a, b in ((0x41, 0x5A), (0x61, 0x7A), (0xC0, 0xD6), (0xF8, 0x1BA), (0x370, 0x3FF))
    )
    patterns = (
        r"[\r\n]",
        rf"\s?[{letters}]+",
        "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$",
        "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
    )
    return _byte_level(folder, [*_split(*patterns), pre_tokenizers.Digits(individual_digits=True)])


def _unigram_json(folder: Path) -> Path:
    folder.mkdir()
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=500, unk_token="<unk>", special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(SAMPLE.splitlines(), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def _pieces(**options: Any) -> Make:
    return lambda folder: trained_pieces(folder, **options)


def _unused(**options: Any) -> Make:
    """A model in which every fifth piece is unused: it is merged, and then split again."""

    def make(folder: Path) -> Path:
        file = trained_pieces(folder, **options) / "tokenizer.model"
        model = read_piece_model(file)
        assert model.score_at is not None
        data = b""
        for i, (start, kind) in enumerate(zip(model.score_at, model.kinds, strict=True)):
            name = model.name(i).encode()
            kind = UNUSED if kind == NORMAL and i % 5 == 0 else kind
            body = bytes((10, len(name))) + name + b"\x15" + model.data[start : start + 4] + bytes((24, kind))
            data += bytes((10, len(body))) + body
        file.write_bytes(data + model.data[model.pieces_end :])
        return folder

    return make


PIECES: Mapping[str, Make] = {
    **{kind: oracle.KINDS[kind] for kind in oracle.KINDS if "model" in kind},
    "gemma": tokenizer_folders.gemma,
    **{kind: make for kind, make in tokenizer_folders.KINDS.items() if kind.startswith("pieces")},
    "bpe_unknown": _pieces(byte_fallback=False),
    "bpe_user_defined": _pieces(user_defined_symbols=["people", "the ", "word", "▁▁▁▁", "🎉", "\n", "aa"]),
    "bpe_user_defined_identity": _pieces(
        user_defined_symbols=["people", "▁▁", "<tool>"],
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
    ),
    "bpe_suffix": _pieces(treat_whitespace_as_suffix=True),
    "bpe_nfkc_cf": _pieces(normalization_rule_name="nfkc_cf"),
    "unigram": _pieces(model_type="unigram", hard_vocab_limit=False),
    "bpe_unused": _unused(),
    "unigram_unused": _unused(model_type="unigram", hard_vocab_limit=False, byte_fallback=False),
    "unigram_unknown": _pieces(model_type="unigram", hard_vocab_limit=False, byte_fallback=False),
    "unigram_user_defined": _pieces(
        model_type="unigram", hard_vocab_limit=False, user_defined_symbols=["people", "word", "🎉", "aa", "a"]
    ),
    "unigram_identity": _pieces(
        model_type="unigram",
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
    ),
}
__all__ = ["ADDITIONS", "JSON", "PIECES", "WAYS", "make", "oracle"]
JSON: Mapping[str, Make] = {
    **{kind: oracle.KINDS[kind] for kind in oracle.KINDS if "model" not in kind},
    "olmoe": tokenizer_folders.olmoe,
    "plain_byte_level": tokenizer_folders.plain_byte_level,
    "gpt2": lambda folder: _byte_level(folder, []),
    "llama3": lambda folder: _byte_level(folder, _split(LLAMA3)),
    "qwen2": lambda folder: _byte_level(folder, _split(QWEN2), normalizers.NFC()),
    "o200k": lambda folder: _byte_level(folder, _split(O200K)),
    "deepseek": _deepseek,
    "many_steps": lambda folder: _byte_level(
        folder,
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(), pre_tokenizers.Digits()],
        normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]),
    ),
    "bert_steps": lambda folder: _byte_level(
        folder, [pre_tokenizers.BertPreTokenizer()], normalizers.Sequence([normalizers.NFKD(), normalizers.Nmt()])
    ),
    "unigram_json": _unigram_json,
}


def make(kind: str, way: str, root: Path) -> tuple[Path, Ours]:
    """Write a folder of a kind, with the added tokens of a way of `tokenizer_folders.WAYS`, and its description."""
    parent = root / f"{kind}-{way}"
    parent.mkdir()
    folder = {**PIECES, **JSON}[kind](parent / kind)
    config = folder / "config.json"
    values = json.loads(config.read_text()) if config.exists() else {}
    put(folder, "config.json", {"model_type": "llama", **values, "vocab_size": 5000})
    if (add := WAYS[way]) is not None:
        add(folder, Ours.from_folder(folder).vocab_size)
    ours = Ours.from_folder(folder)
    description.write(ours, folder, folder / description.FILE)
    return folder, ours
