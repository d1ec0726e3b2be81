"""The two kinds of tokenizer files behind one interface: text to ids, and an id to the bytes it stands for."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from enum import Enum
from pathlib import Path
from typing import Any

from edgelm.errors import TokenizerError

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
SPACE = "▁"


class LeadingSpace(Enum):
    """What decoding does with the space that encoding put before the first word."""

    KEEP = "keep"
    DROP_ONE = "drop one"  # the first character of the text, if it is a space
    DROP_ONE_PIECE = "drop one of the first piece"  # the same, but not when it came from a byte token
    DROP_EACH_PIECE = "drop one of every piece until there is text"


class Vocabulary(ABC):
    """An open tokenizer file.

    Attributes:
        size: one more than the largest id.
        special: ids that are no text.
        leading_space: see `LeadingSpace`.
    """

    size: int
    special: frozenset[int]
    leading_space: LeadingSpace

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of `text`; strings of special tokens within it become those tokens. Nothing is put before or behind."""

    @abstractmethod
    def token(self, index: int) -> str | None:
        """The token's string, None where there is none."""

    @abstractmethod
    def token_id(self, token: str) -> int | None:
        """The id of a string that is one token."""

    @abstractmethod
    def declared_id(self, role: str) -> int | None:
        """What the file itself says is its "bos", "eos" or "pad"."""

    @abstractmethod
    def adds_bos(self, bos: int) -> bool | None:
        """Whether the file says that `bos` goes before a text; None when it does not say."""

    @abstractmethod
    def token_bytes(self, index: int) -> bytes:
        """The UTF-8 bytes, maybe part of a character, that the token adds to a text; none for an unknown id."""

    @abstractmethod
    def is_byte(self, index: int) -> bool:
        """Whether the token stands for one raw byte."""


def _byte_of_character() -> dict[str, int]:
    """GPT-2's table: the printable bytes stand for themselves, the other ones are moved to U+0100 and after."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


class JsonVocabulary(Vocabulary):
    """tokenizer.json, through `tokenizers`: byte-level BPE, or SentencePiece-like with byte tokens.

    Raises:
        TokenizerError: the file is damaged, or decodes in a way that is not one of these two.
    """

    def __init__(self, path: Path) -> None:
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception for every kind of bad file
            raise TokenizerError(f"{path}: not a usable tokenizer.json ({error}); fetch the file again") from error
        # Settings for training batches: they would cut or fill prompts.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self.special = frozenset(index for index, token in added.items() if token.special)
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        self.size = max(ids, default=-1) + 1
        if not self.size:
            raise TokenizerError(f"{path}: the vocabulary is empty; fetch the file again")
        self._byte_level: dict[str, int] = {}
        self._byte_fallback = False
        self._replace: list[tuple[str, str]] = []
        self.leading_space = LeadingSpace.KEEP
        self._read_decoder(path)

    def _read_decoder(self, path: Path) -> None:
        decoder: dict[str, Any] = json.loads(self._tokenizer.decoder.__getstate__()) if self._tokenizer.decoder else {}
        steps = decoder.get("decoders", []) if decoder.get("type") == "Sequence" else [decoder]
        kinds = [step.get("type") for step in steps]
        if kinds == ["ByteLevel"]:
            self._byte_level = _byte_of_character()
            return
        fused = False
        for step, kind in zip(steps, kinds, strict=True):
            if kind == "Replace" and not fused and isinstance(step["pattern"].get("String"), str):
                self._replace.append((step["pattern"]["String"], step["content"]))
            elif kind == "ByteFallback" and not fused:
                self._byte_fallback = True
            elif kind == "Fuse":
                fused = True
            elif kind == "Strip" and fused and (step["content"], step["start"], step["stop"]) == (" ", 1, 0):
                self.leading_space = LeadingSpace.DROP_ONE
            else:
                raise TokenizerError(
                    f"{path}: its decoder has the step {kind}, which is not supported here; EdgeLM reads byte-level "
                    "BPE and SentencePiece-like tokenizers"
                )

    def encode(self, text: str) -> list[int]:
        """See `Vocabulary`."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def token(self, index: int) -> str | None:
        """See `Vocabulary`."""
        token: str | None = self._tokenizer.id_to_token(index) if 0 <= index < self.size else None
        return token

    def token_id(self, token: str) -> int | None:
        """See `Vocabulary`."""
        index: int | None = self._tokenizer.token_to_id(token)
        return index

    def declared_id(self, role: str) -> int | None:
        """The file has no such field."""
        del role
        return None

    def adds_bos(self, bos: int) -> bool | None:
        """What the post-processor does with an empty text."""
        if self._tokenizer.post_processor is None:
            return None
        ids: list[int] = self._tokenizer.encode("").ids
        return bos in ids[:1] or None

    def is_byte(self, index: int) -> bool:
        """See `Vocabulary`."""
        return self._byte_fallback and BYTE_TOKEN.fullmatch(self.token(index) or "") is not None

    def token_bytes(self, index: int) -> bytes:
        """See `Vocabulary`. As the library does, a byte-level token with a foreign character stands for itself."""
        token = self.token(index)
        if token is None:
            return b""
        if self._byte_level:
            if all(character in self._byte_level for character in token):
                return bytes(self._byte_level[character] for character in token)
            return token.encode()
        for old, new in self._replace:
            token = token.replace(old, new)
        if self._byte_fallback and (match := BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(match[1])
        return token.encode()


def _wire_fields(data: bytes) -> list[tuple[int, int | bytes]]:
    """Top-level fields of a protobuf message: number and value (fixed-width ones as bytes)."""
    position = 0
    result: list[tuple[int, int | bytes]] = []

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    while position < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            result.append((key >> 3, varint()))
            continue
        size = {1: 8, 5: 4}.get(kind) or varint()
        result.append((key >> 3, data[position : position + size]))
        position += size
    return result


def _after_pieces(data: bytes) -> bytes:
    """What follows the pieces that a sentencepiece model begins with (field 1, repeated).

    Apart from `_wire_fields`, because there may be a quarter of a million of them.
    """
    position = 0
    while position < len(data) and data[position] == 0x0A:
        size, start = data[position + 1], position + 2
        if size >= 0x80:
            size, start = size & 0x7F | data[start] << 7, start + 1
        position = start + size
    return data[position:]


class PieceVocabulary(Vocabulary):
    """tokenizer.model, through `sentencepiece`.

    The library does not parse control tokens (`<bos>`) in a text, as tokenizer.json does; here they are cut out first
    and what lies between is encoded, so that both files of one model give the same ids for a rendered chat.

    Raises:
        TokenizerError: the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        import sentencepiece

        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(path.read_bytes())
            self.size: int = self._model.GetPieceSize()
            fields = _wire_fields(_after_pieces(self._model.serialized_model_proto()))
            normalizer = [value for number, value in fields if number == 3]
            flags = dict(_wire_fields(normalizer[-1])) if normalizer and isinstance(normalizer[-1], bytes) else {}
        except (RuntimeError, OSError, ValueError, IndexError) as error:
            raise TokenizerError(f"{path}: not a usable tokenizer.model ({error}); fetch the file again") from error
        if not self.size:
            raise TokenizerError(f"{path}: the vocabulary is empty; fetch the file again")
        self.leading_space = LeadingSpace.KEEP
        if flags.get(4, 1):  # remove_extra_whitespaces
            self.leading_space = LeadingSpace.DROP_EACH_PIECE
        elif flags.get(3, 1):  # add_dummy_prefix
            self.leading_space = LeadingSpace.DROP_ONE_PIECE
        self.special = frozenset(i for i in range(self.size) if self._model.IsControl(i))
        names = sorted((self._model.IdToPiece(i) for i in self.special), key=len, reverse=True)
        self._controls = re.compile(f"({'|'.join(map(re.escape, names))})") if names else None
        self._ids = {self._model.IdToPiece(i): i for i in self.special}

    def encode(self, text: str) -> list[int]:
        """See `Vocabulary`."""
        ids: list[int] = []
        for part in self._controls.split(text) if self._controls else [text]:
            if part in self._ids:
                ids.append(self._ids[part])
            elif part:
                ids += self._model.EncodeAsIds(part)
        return ids

    def token(self, index: int) -> str | None:
        """See `Vocabulary`."""
        token: str | None = self._model.IdToPiece(index) if 0 <= index < self.size else None
        return token

    def token_id(self, token: str) -> int | None:
        """See `Vocabulary`."""
        index: int = self._model.PieceToId(token)
        return index if self.token(index) == token else None

    def declared_id(self, role: str) -> int | None:
        """The ids that the model was made with."""
        index: int = {"bos": self._model.bos_id, "eos": self._model.eos_id, "pad": self._model.pad_id}[role]()
        return index if index >= 0 else None

    def adds_bos(self, bos: int) -> bool | None:
        """Models that have a bos are used with it: Gemma's and Llama's tokenizers put it there by default."""
        return self.declared_id("bos") == bos

    def is_byte(self, index: int) -> bool:
        """See `Vocabulary`."""
        return 0 <= index < self.size and bool(self._model.IsByte(index))

    def token_bytes(self, index: int) -> bytes:
        """See `Vocabulary`."""
        token = self.token(index)
        if token is None or index in self.special:
            return (token or "").encode()
        if self._model.IsByte(index):
            return bytes([int(token[3:5], 16)])
        if self._model.IsUnknown(index):
            surface: str = self._model.DecodeIds([index])
            return surface.encode()
        return token.replace(SPACE, " ").encode()
