"""Do texts and ids agree with transformers in both directions, also with the added tokens of fine-tunes?

What differs on purpose, and is therefore not compared, is listed in docs/reference/tokenizer.md.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tokenizer_folders import ADDITIONS, TEXTS, WAYS, example, gemma_json, llama, llama_json, put

from edgelm.tokenization.tokenizer import Tokenizer

EMOJI = ("🎉", "👩‍👩‍👧‍👦", "🇩🇪", "👍🏽", "❤️", "🏴\U000e0067\U000e0062\U000e007f", "1️⃣")
SCRIPTS = (
    "漢字かな交じり文",
    "한국어",
    "العربية",
    "עִבְרִית",
    "हिन्दी",
    "ไทย",
    "Ελληνικά",
    "русский",
    "ﷺ",
    "\uff46\uff55\uff4c\uff4c",
)
MARKS = ("e\u0301", "\u00e9", "a\u0323\u0307", "\u0301", "ﬁ", "\u212b", "\u1e9b\u0323", "q\u0307\u0323", "\u0930\u094d")
SPACES = (" ", "  ", "   ", "\t", "\n", "\r\n", "\n\n\n", "\u00a0", "\u2003", "\u3000", "\u200b", "\x0b", "\x85", "▁")
MARKERS = ("<s>", "</s>", "<unk>", "<bos>", "<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>", "<|endoftext|>")
BYTES = ("<0x0A>", "<0x41>", "<0xZZ>", "\x00", "\x01", "\x7f", "\ufeff", "\ufffd", "\U0010ffff")
CHATS = (
    "<|im_start|>user\nhow are you?<|im_end|>\n<|im_start|>assistant\n",
    "<bos><start_of_turn>user\nhow are you?<end_of_turn>\n<start_of_turn>model\n",
    "<s>[INST] <<SYS>>\nbe kind\n<</SYS>>\n\nhow are you? [/INST] well </s><s>[INST] and you? [/INST]",
    "<|endoftext|><|user|>\nhow are you?\n<|assistant|>\nwell<|endoftext|>\n<|user|>\nand you?\n<|assistant|>\n",
)
CODE = (
    "def f(x):\n    return x**2  # Größe",
    "a=[1,2,3];\tb={'k':\"v\"}",
    "https://example.org/a?b=c&d=%20",
    "3.14e-10",
)


def texts() -> list[str]:
    """Return 300 texts: the parts above alone, between words, at the ends, next to each other, and repeated."""
    added = [content for content, _ in ADDITIONS]
    special = [*MARKERS, *added, "cafe\u0301"]
    parts = [*EMOJI, *SCRIPTS, *MARKS, *SPACES, *BYTES, *CODE, *special]
    result = [*TEXTS, *CHATS, *parts]
    result += [f"the {part} people" for part in parts] + [f"{part}the" for part in special]
    result += [f"the{part}" for part in special] + [f" {part} {part}\n{part}" for part in special]
    result += [
        "".join(special),
        " ".join(special),
        "words word-word sword word",
        "two  words two words",
        "<tool><tool>",
    ]
    result += [" " * n for n in (4, 5, 8, 31, 32, 33, 40, 100, 1000)] + ["\n" * n for n in (2, 31, 33, 70)]
    result += ["a" * 3000, "ab" * 500, "the people " * 200, "🎉" * 50, "\u0301" * 40, "x" + " " * 45 + "y"]
    chooser = random.Random(5)
    letters = [*"aabcdehlmnoprstu ,.  \n", *EMOJI, *SCRIPTS, *MARKS, *special, *SPACES]
    result += ["".join(chooser.choices(letters, k=chooser.randint(2, 30))) for _ in range(60)]
    return list(dict.fromkeys(result))


STRINGS = texts()


def neox(folder: Path) -> Path:
    return example(folder, "olmoe-tiny")


def fox(folder: Path) -> Path:
    return example(folder, "fox-tiny")


def with_class(make: Callable[[Path], Path], **settings: Any) -> Callable[[Path], Path]:
    def made(folder: Path) -> Path:
        put(make(folder), "tokenizer_config.json", settings)
        return folder

    return made


def llama_both(folder: Path) -> Path:
    """tokenizer.model and a different tokenizer.json, which takes precedence."""
    llama(folder, bos_token="<bos>", eos_token="<eos>")
    other = llama_json(folder.with_name("other"))
    put(folder, "config.json", {"model_type": "llama", "eos_token_id": 1})
    (folder / "tokenizer.json").write_bytes((other / "tokenizer.json").read_bytes())
    return folder


KINDS: dict[str, Callable[[Path], Path]] = {
    "byte_level": neox,
    "gemma_model": fox,
    "gemma_json": gemma_json,
    "gemma_json_class": with_class(gemma_json, tokenizer_class="GemmaTokenizer"),
    "llama_json": llama_json,
    "llama_json_class": with_class(llama_json, tokenizer_class="LlamaTokenizer", eos_token="<eos>", bos_token="<bos>"),
    "llama_model": llama,
    "llama_both": llama_both,
    "llama_model_legacy": lambda folder: llama(folder, legacy=True),
    "llama_model_new": lambda folder: llama(folder, legacy=False),
    "llama_model_no_prefix": lambda folder: llama(folder, add_prefix_space=False, clean_up_tokenization_spaces=True),
    "llama_model_split": lambda folder: llama(folder, split_special_tokens=True),
}


@dataclass(frozen=True)
class Pair:
    """EdgeLM's and transformers' tokenizers of a folder, and EdgeLM's ids of all texts."""

    ours: Tokenizer
    theirs: Any
    ids: list[list[int]]


@pytest.fixture(scope="module", params=[(kind, way) for kind in KINDS for way in WAYS], ids=lambda pair: "-".join(pair))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    from transformers import AutoTokenizer

    kind, way = request.param
    folder = KINDS[kind](tmp_path_factory.mktemp("oracle") / kind)
    config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").exists() else {}
    config.setdefault("model_type", "llama")
    put(folder, "config.json", config | {"vocab_size": 5000})
    size = Tokenizer.from_folder(folder).vocab_size
    if (add := WAYS[way]) is not None:
        add(folder, size)
    ours = Tokenizer.from_folder(folder)
    ids = [ours.encode(text, add_bos=False) for text in STRINGS]
    return Pair(ours, AutoTokenizer.from_pretrained(str(folder)), ids)


def test_ids_equal_those_of_transformers(pair: Pair) -> None:
    expected = pair.theirs(STRINGS, add_special_tokens=False)["input_ids"]
    wrong = [case for case in zip(STRINGS, pair.ids, expected, strict=True) if case[1] != case[2]]
    assert not wrong, (len(wrong), wrong[:3])


def test_texts_equal_those_of_transformers(pair: Pair) -> None:
    # transformers decodes end tokens that only the chat template implies, such as `<end_of_turn>`, as text.
    ends = pair.ours.special - pair.ours.vocabulary.special
    wrong = []
    for ids in pair.ids:
        for skip in (False,) if ends.intersection(ids) else (False, True):
            stream = pair.ours.detokenizer(skip_special=skip)
            decoded = "".join([*map(stream.push, ids), stream.flush()])
            expected = pair.theirs.decode(ids, skip_special_tokens=skip)
            if decoded != expected or pair.ours.decode(ids, skip_special=skip) != decoded:
                wrong.append((ids, skip, decoded, expected))
    assert not wrong, (len(wrong), wrong[:3])
