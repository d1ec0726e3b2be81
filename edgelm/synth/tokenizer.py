"""Generated tokenizers for synthetic checkpoints, in the layout of published ones.

The published vocabularies cannot be shipped. So these are generated: byte-level BPE in the layout of OLMoE
(GPT-NeoX-derived), and SentencePiece BPE in the layout of Fox (Gemma). Special tokens have their published names and
ids if the vocabulary is large enough. The first merges are learned from a few lines of English; the rest are all pairs,
triples and quadruples of letters. The tokenizers encode and decode any text, and compress it about as well as real
ones, but split words at other places.
"""

from __future__ import annotations

import itertools
import json
import string
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SAMPLE = """the a an of to and in that is was he for it with as his on be at by had not are but from or have they which
one you were all her she there would their we him been has when who will no more if out so up said what its about than
into them can only other time new some could these two may first then do any like my now over such our man me even most
made after also well before must through years where much your way down should because each just those people how too
little state good very make world still own see men work long get here between both life being under never day same
another know while last might us great old year off come since against go came right used take three def return self
import class raise value none true false print string number list index error file path name type data line
"""
FULL_LAYOUT_SIZE = 1024  # smallest vocabulary with room for all special tokens at their published ids

OLMOE_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ '<|system|>\n' + message['content'] + '\n' }}"
    "{% elif message['role'] == 'user' %}{{ '<|user|>\n' + message['content'] + '\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<|assistant|>\n' + message['content'] + eos_token }}{% if not loop.last %}{{ '\n' }}{% endif %}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
GEMMA_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def _learned_merges(text: str) -> Iterator[tuple[str, str]]:
    """Yield the merges of byte pair encoding of the words of `text`, each with a leading space."""
    words = [list(" " + word) for word in text.split()]
    while True:
        pairs = Counter(pair for word in words for pair in itertools.pairwise(word))
        if not pairs:
            return
        best, count = min(pairs.items(), key=lambda item: (-item[1], item[0]))
        if count < 2:
            return
        yield best
        for word in words:
            for i in range(len(word) - 1, 0, -1):
                if (word[i - 1], word[i]) == best:
                    word[i - 1 : i + 1] = [best[0] + best[1]]


def _letter_merges() -> Iterator[tuple[str, str]]:
    """Yield merges for all two, three and four letters; for up to three letters also with a leading space."""
    letters = string.ascii_lowercase
    pairs = [a + b for a in letters for b in letters]
    yield from ((" ", a) for a in letters)
    yield from ((a, b) for a in letters for b in letters)
    yield from ((" " + a, b) for a in letters for b in letters)
    yield from ((ab, c) for ab in pairs for c in letters)
    yield from ((" " + ab, c) for ab in pairs for c in letters)
    # A stride coprime to their number spreads the quadruples over the alphabet when only some are used.
    for i in range(len(pairs) ** 2):
        left, right = divmod(i * 100_003 % len(pairs) ** 2, len(pairs))
        yield pairs[left], pairs[right]


def _merges(count: int) -> list[tuple[str, str]]:
    """Return the first `count` merges with distinct results. Both halves are letters, a space, or earlier results."""
    result: dict[str, tuple[str, str]] = {}
    for left, right in itertools.chain(_learned_merges(SAMPLE), _letter_merges()):
        if len(result) == count:
            break
        result.setdefault(left + right, (left, right))
    return list(result.values())


def _byte_characters() -> list[str]:
    """Return the printable character of each byte in byte-level BPE (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(rest))]


def _dump(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


def _added_token(index: int, content: str, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": index, "content": content, **flags, "special": special}


def write_olmoe_tokenizer(folder: Path, size: int, eos_id: int, *, renamed_eos: bool) -> None:
    """Write tokenizer.json and tokenizer_config.json: byte-level BPE of `size` entries in OLMoE's layout.

    With `renamed_eos` the entry at `eos_id` is `|||IP_ADDRESS|||`, and `<|endoftext|>` is another one, as in the 0125
    instruction-tuned checkpoints; otherwise it is the other way round, as in the 0924 ones. A vocabulary of fewer than
    260 entries lacks some bytes, which are lost in encoding.
    """
    names = ["|||IP_ADDRESS|||", "<|endoftext|>"]
    eos_name, first_name = names if renamed_eos else names[::-1]
    fixed = {0: first_name, 1: "<|padding|>", eos_id: eos_name}
    if size >= FULL_LAYOUT_SIZE:
        fixed = {size - 3: "|||PHONE_NUMBER|||", size - 2: "|||EMAIL_ADDRESS|||", **fixed}
    alphabet = _byte_characters()[: size - len(fixed)]
    wanted = max(size - len(fixed) - len(alphabet), 0)
    merges = [(left.replace(" ", "Ġ"), right.replace(" ", "Ġ")) for left, right in _merges(wanted)]
    entries = iter(alphabet + [left + right for left, right in merges])
    vocab = {fixed[i] if i in fixed else next(entries): i for i in range(size)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    special = ("<|endoftext|>", "<|padding|>")
    _dump(
        folder / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [_added_token(i, fixed[i], fixed[i] in special) for i in sorted(fixed)],
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": byte_level,
            "post_processor": byte_level,
            "decoder": byte_level,
            "model": {"type": "BPE", "vocab": vocab, "merges": [list(pair) for pair in merges]},
        },
    )
    _dump(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_eos_token": False,
            "add_prefix_space": False,
            "bos_token": eos_name,
            "eos_token": eos_name,
            "pad_token": "<|padding|>",
            "unk_token": None,
            "tokenizer_class": "GPTNeoXTokenizer",
            "chat_template": OLMOE_CHAT_TEMPLATE,
        },
    )


NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # SentencePiece's piece types


def _varint(value: int) -> bytes:
    result = b""
    while value > 0x7F:
        result += bytes([value & 0x7F | 0x80])
        value >>= 7
    return result + bytes([value])


def _field(number: int, value: int | bytes) -> bytes:
    """Return a protobuf field: a varint, or bytes with their length."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _piece(text: str, score: float, kind: int) -> bytes:
    import struct

    body = _field(1, text.encode()) + _varint(2 << 3 | 5) + struct.pack("<f", score) + _field(3, kind)
    return _field(1, body)


def _gemma_pieces(size: int) -> list[tuple[str, int]]:
    """Return pieces and their types. If there is room, special pieces are at their places in Gemma's vocabulary."""
    pieces = [("<pad>", CONTROL), ("<eos>", CONTROL), ("<bos>", CONTROL), ("<unk>", UNKNOWN)]
    turns = [("<start_of_turn>", USER_DEFINED), ("<end_of_turn>", USER_DEFINED)]
    if size >= FULL_LAYOUT_SIZE:
        pieces += [(text, USER_DEFINED) for text in ("<mask>", "<2mass>", "[@BOS@]")]
        pieces += [(f"<unused{i}>", USER_DEFINED) for i in range(99)]
        pieces += turns
        pieces += [("\n" * n, USER_DEFINED) for n in range(1, 31)]
        pieces += [("▁" * n, USER_DEFINED) for n in range(2, 33)]
        pieces += [(f"<reserved{i}>", USER_DEFINED) for i in range(217 - len(pieces))]
    else:
        pieces += turns
    characters = [
        "▁",
        *string.ascii_lowercase,
        *sorted(set(string.printable) - set(string.whitespace + string.ascii_lowercase)),
    ]
    if size >= len(pieces) + 256 + len(characters):
        pieces += [(f"<0x{byte:02X}>", BYTE) for byte in range(256)]
    characters = characters[: max(size - len(pieces), 0)]
    wanted = size - len(pieces) - len(characters)
    merged = [(left + right).replace(" ", "▁") for left, right in _merges(wanted)]
    return pieces + [(text, NORMAL) for text in (*characters, *merged)]


def write_gemma_tokenizer(folder: Path, size: int) -> None:
    """Write tokenizer.model and tokenizer_config.json: SentencePiece BPE of `size` pieces in Gemma's layout.

    The protobuf (https://github.com/google/sentencepiece, sentencepiece_model.proto) is built directly, not trained,
    because the ids must be Gemma's: pad 0, eos 1, bos 2, unk 3. A vocabulary too small for the 256 byte pieces maps
    unknown characters to unk.
    """
    pieces = _gemma_pieces(size)
    model = b"".join(_piece(text, -float(i) if kind == NORMAL else 0.0, kind) for i, (text, kind) in enumerate(pieces))
    byte_fallback = int(any(kind == BYTE for _, kind in pieces))
    bpe = 2
    trainer = _field(3, bpe) + _field(4, len(pieces)) + _field(35, byte_fallback)
    trainer += _field(40, 3) + _field(41, 2) + _field(42, 1) + _field(43, 0)
    trainer += b"".join(_field(45 + i, name) for i, name in enumerate((b"<unk>", b"<bos>", b"<eos>", b"<pad>")))
    normalizer = _field(1, b"identity") + _field(3, 0) + _field(4, 0) + _field(5, 1)
    (folder / "tokenizer.model").write_bytes(model + _field(2, trainer) + _field(3, normalizer))
    _dump(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "tokenizer_class": "GemmaTokenizer",
            "chat_template": GEMMA_CHAT_TEMPLATE,
        },
    )
