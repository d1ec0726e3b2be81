"""One interface to both kinds of tokenizer files: encode text to ids, and return the bytes of an id."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from edgelm.errors import TokenizerError
from edgelm.tokenization import described_steps, tokenizer_json
from edgelm.tokenization.added_tokens import AddedToken, Declared, json_tokens
from edgelm.tokenization.piece_model import BPE, BYTE, CONTROL, UNIGRAM, UNKNOWN, USER_DEFINED, read_piece_model
from edgelm.tokenization.tokenizer_json import SPACE, call_library

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class LeadingSpace(Enum):
    """How decoding treats the space that encoding prepends to a text."""

    KEEP = "keep"
    DROP_ONE = "drop one"  # drop the first character of the text, if it is a space
    DROP_ONE_PIECE = "drop one of the first piece"  # the same, unless it comes from a byte token
    DROP_EACH_PIECE = "drop one of every piece until there is text"


class Vocabulary(ABC):
    """An open tokenizer file.

    Attributes:
        size: one more than the largest id.
        special: ids that are not text.
        leading_space: see `LeadingSpace`.
        own_special: `special` without the tokens that the JSON files next to it declare.
        added: tokens that only those files declare, by id.
        left_out: reasons why some of those tokens cannot be used, by their strings.
        notes: contradictions between those files and the vocabulary.
    """

    size: int
    special: frozenset[int]
    leading_space: LeadingSpace
    own_special: frozenset[int]
    added: Mapping[int, AddedToken]
    left_out: Mapping[str, str]
    notes: list[str]

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`. Strings of special tokens in it become those tokens. No bos or eos is added."""

    @abstractmethod
    def token(self, index: int) -> str | None:
        """Return the string of a token; None where there is no such token."""

    @abstractmethod
    def token_id(self, token: str) -> int | None:
        """Return the id of a string that is one token; None where it is not."""

    @abstractmethod
    def declared_id(self, role: str) -> int | None:
        """Return the id of "bos", "eos" or "pad" that the file itself declares; None where it declares none."""

    @abstractmethod
    def adds_bos(self, bos: int) -> bool | None:
        """Return whether the file says to prepend `bos` to a text; None where it does not say."""

    @abstractmethod
    def token_bytes(self, index: int) -> bytes:
        """Return the UTF-8 bytes that a token adds to a text, maybe part of a character; empty for an unknown id."""

    def fingerprint_bytes(self, index: int) -> bytes:
        """Return `token_bytes` as in every version of EdgeLM, for fingerprints."""
        return self.token_bytes(index)

    @abstractmethod
    def is_byte(self, index: int) -> bool:
        """Return whether the token is one raw byte."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return the fields that `edgelm.tokenization.description` lists for this kind of file.

        Raises:
            UnsupportedError: libedgelm does not have such a tokenizer.
        """


def _byte_of_character() -> dict[str, int]:
    """Return GPT-2's table: printable bytes are their own characters, the others are U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


def _place(
    tokens: Collection[AddedToken], known: Mapping[str, int], next_id: int, declared: Declared
) -> tuple[dict[str, int], dict[str, str], list[str]]:
    """Return the ids of added tokens, those left out with reasons, and notes, by transformers' rules (`added_tokens`).

    Raises:
        TokenizerError: no file has an id for the end token.
    """
    eos = declared.names.get("eos_token")
    ids: dict[str, int] = {}
    left_out: dict[str, str] = {}
    notes = []
    for token in tokens:
        if token.content in known:
            ids[token.content] = known[token.content]
        elif not token.where:
            continue  # a default of transformers' class that no file has
        elif token.declared is None and eos is not None and token.content == eos.content:
            raise TokenizerError(
                f"{token.where}: the end token {token.content[:80]!r} is in no vocabulary file: fetch the checkpoint's "
                "added_tokens.json or tokenizer.json, or name another eos_token"
            )
        elif declared.rows is not None and next_id >= declared.rows:
            left_out[token.content] = f"its id {next_id} is beyond the {declared.rows} rows of the model's embedding"
        else:
            ids[token.content] = next_id
            next_id += 1
        if token.declared is not None and ids.get(token.content, token.declared) != token.declared:
            notes.append(
                f"{token.where} says that {token.content[:80]!r} is {token.declared}, but its id is "
                f"{ids[token.content]}, as transformers has it"
            )
    if left_out:
        names = ", ".join([repr(content[:80]) for content in list(left_out)[:4]]) + (
            ", ..." if len(left_out) > 4 else ""
        )
        notes.append(f"not used: {names}, declared beside the vocabulary; {next(iter(left_out.values()))}")
    return ids, left_out, notes


class JsonVocabulary(Vocabulary):
    """A tokenizer.json, loaded by `tokenizers`: byte-level BPE, or SentencePiece-like with byte tokens.

    Raises:
        TokenizerError: the file is damaged, or its decoder is of another kind.
    """

    def __init__(self, path: Path, declared: Declared | None = None) -> None:
        declared = declared or Declared()
        data, text = tokenizer_json.read(path)
        own = json_tokens(data.get("added_tokens"), str(path))
        # With an added_tokens_decoder, the file's own added tokens are used only if it has them as well.
        dropped = not declared.use_own_tokens and any(
            index not in declared.listed or not token.equals(declared.listed[index]) for index, token in own.items()
        )
        rebuilt = tokenizer_json.rebuilt(data, declared, dropped)
        self._tokenizer = tokenizer_json.load(text if rebuilt is None else json.dumps(rebuilt), path)
        self._path = path
        self._post_processor = {"post_processor": data.get("post_processor")}
        self._add(own, declared, rebuilt is None)
        # No note for LlamaTokenizer, whose published files differ from the class in how they prepend a space.
        if rebuilt is not None and declared.kind != "LlamaTokenizer" and not tokenizer_json.same_steps(data, rebuilt):
            self.notes.append(
                f"{path.name} differs from {declared.kind}'s steps; the class's steps are used, as in transformers"
            )
        added: dict[int, Any] = self._tokenizer.get_added_tokens_decoder()
        self.special = frozenset(index for index, token in added.items() if token.special)
        vocab = data["model"]["vocab"]
        own_ids = vocab.values() if isinstance(vocab, Mapping) else range(len(vocab))
        self.size = max(max(own_ids, default=-1), max(added, default=-1)) + 1
        if not self.size:
            raise TokenizerError(f"{path}: the vocabulary is empty; fetch the file again")
        self.own_special = frozenset(
            index for token in own.values() if token.special and (index := self.token_id(token.content)) is not None
        )
        self._tokenizer.encode_special_tokens = declared.flag("split_special_tokens", False)
        self._byte_level: dict[str, int] = {}
        self._byte_fallback = False
        self._replace: list[tuple[str, str]] = []
        self.leading_space = LeadingSpace.KEEP
        self._read_decoder(path)

    def _add(self, own: Mapping[int, AddedToken], declared: Declared, as_it_is: bool) -> None:
        """Add the tokens that other files declare; where the steps were rebuilt, all added tokens."""
        native = self._tokenizer
        present = {token.content for token in own.values()} if as_it_is else set()
        tokens = declared.tokens(own=own, present=present)
        known = {t.content: index for t in tokens if (index := native.token_to_id(t.content)) is not None}
        # The library assigns the next id after the model's own and the added ones.
        next_id = native.get_vocab_size(with_added_tokens=False)
        next_id = max(next_id, *(index + 1 for index in native.get_added_tokens_decoder()), 0)
        ids, self.left_out, self.notes = _place(tokens, known, next_id, declared)
        named = {token.content for token in own.values()}
        call_library(
            native.add_tokens,
            [token.to_library() for token in tokens if token.content in ids],
            what=f"{self._path}: its tokens cannot be extended by those of {', '.join(_sources(tokens))}",
        )
        self.added = {
            ids[t.content]: t for t in tokens if t.content in ids and t.content not in known and t.content not in named
        }

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

        def call() -> list[int]:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
            return ids

        return call_library(call, what=f"{self._path}: it cannot encode this text")

    def token(self, index: int) -> str | None:
        """See `Vocabulary`."""
        return self.added[index].content if index in self.added else self._decoded_token(index)

    def _decoded_token(self, index: int) -> str | None:
        """Return the string for decoding; of an added token the normalised one."""
        token: str | None = self._tokenizer.id_to_token(index) if 0 <= index < self.size else None
        return token

    def token_id(self, token: str) -> int | None:
        """See `Vocabulary`."""
        index: int | None = self._tokenizer.token_to_id(token)
        return index

    def declared_id(self, role: str) -> int | None:
        """Return None: the file has no such field."""
        del role
        return None

    def adds_bos(self, bos: int) -> bool | None:
        """See `Vocabulary`: by the file's post-processor."""
        return tokenizer_json.adds_bos(self._post_processor, bos) or None

    def is_byte(self, index: int) -> bool:
        """See `Vocabulary`."""
        return self._byte_fallback and BYTE_TOKEN.fullmatch(self.token(index) or "") is not None

    def token_bytes(self, index: int) -> bytes:
        """See `Vocabulary`. As in the library, a byte-level token with any other character is its own text."""
        token = self._decoded_token(index)
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

    def describe(self) -> dict[str, Any]:
        """See `Vocabulary`."""
        native = self._tokenizer
        tokens = described_steps.added_tokens(native.get_added_tokens_decoder().items())
        for token in tokens:
            text = self._decoded_token(token["id"])
            if text != token["content"]:
                token["decoded"] = text
        normalizer, pre_tokenizer = (described_steps.steps(native, part) for part in ("normalizer", "pre_tokenizer"))
        described_steps.check_order(normalizer, pre_tokenizer)
        return {
            "kind": "json",
            "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer,
            "model": described_steps.json_model(native),
            "decoder": {
                "byte_level": bool(self._byte_level),
                "replace": [list(pair) for pair in self._replace],
                "byte_tokens": self._byte_fallback,
            },
            "split_special_tokens": native.encode_special_tokens,
            "added_tokens": tokens,
        }


def _sources(tokens: Collection[AddedToken]) -> list[str]:
    return sorted({token.where for token in tokens if token.where})


class _Splitter:
    """Splits added tokens off a text, by the rules of the `tokenizers` library."""

    def __init__(self, tokens: Collection[AddedToken], ids: Mapping[str, int], declared: Declared) -> None:
        import tokenizers

        self._native = tokenizers.Tokenizer(tokenizers.models.BPE())  # without tokens: it keeps added tokens only
        if declared.kind == "GemmaTokenizer":
            self._native.normalizer = tokenizers.normalizers.Replace(" ", SPACE)
        self._native.encode_special_tokens = declared.flag("split_special_tokens", False)
        used = [token for token in tokens if token.content in ids]
        where = ", ".join(_sources(used)) or "tokenizer.model"
        call_library(
            self._native.add_tokens, [t.to_library() for t in used], what=f"{where}: its tokens cannot be used"
        )
        self._ids = {self._native.token_to_id(token.content): ids[token.content] for token in used}

    def describe(self) -> dict[str, Any]:
        """Return the fields of the description that say what is split off."""
        tokens = self._native.get_added_tokens_decoder().items()
        return {
            "normalizer": described_steps.steps(self._native, "normalizer"),
            "split_special_tokens": self._native.encode_special_tokens,
            "added_tokens": described_steps.added_tokens((self._ids[index], token) for index, token in tokens),
        }

    def __call__(self, text: str) -> Iterator[tuple[int, str | int]]:
        """Yield the parts of `text` with their offsets: the id of an added token, or the text between them."""
        end = 0
        if self._ids:
            cut = call_library(self._native.encode, text, what="the added tokens cannot be found in this text")
            for index, (start, stop) in zip(cut.ids, cut.offsets, strict=True):
                if start > end:
                    yield end, text[end:start]
                yield start, self._ids[index]
                end = stop
        if end < len(text):
            yield end, text[end:]


class PieceVocabulary(Vocabulary):
    """A tokenizer.model, loaded by `sentencepiece`.

    Unlike tokenizer.json, the library does not recognise control tokens (`<bos>`) and added tokens in a text. So these
    are split off first, and the text between them is encoded. If tokenizer_config.json names a class of transformers,
    the rules of that class apply: it merges pieces by id, does not normalise, and decides where to prepend a space.
    Otherwise the rules of the model apply.

    Raises:
        TokenizerError: the file is damaged.
    """

    def __init__(self, path: Path, declared: Declared | None = None) -> None:
        import sentencepiece

        declared = declared or Declared()
        model = read_piece_model(path)
        self._path = path
        self._pieces = model
        # transformers treats every model as BPE. A model of another type gets its own rules here.
        self._kind = declared.kind if model.model_type == BPE and declared.kind != "GPTNeoXTokenizer" else ""
        self._model = sentencepiece.SentencePieceProcessor()
        call_library(
            self._model.LoadFromSerializedProto,
            model.plain() if self._kind else model.data,
            what=f"{path}: not a usable tokenizer.model",
        )
        if self._model.GetPieceSize() != len(model):
            raise TokenizerError(f"{path}: not a usable tokenizer.model (pieces are missing); fetch the file again")
        self._prefix = tokenizer_json.prepend_scheme(declared) if self._kind == "LlamaTokenizer" else "never"
        self.leading_space = LeadingSpace.KEEP
        if self._prefix != "never":
            self.leading_space = LeadingSpace.DROP_ONE
        elif not self._kind and model.remove_extra_whitespace:
            self.leading_space = LeadingSpace.DROP_EACH_PIECE
        elif not self._kind and model.dummy_prefix:
            self.leading_space = LeadingSpace.DROP_ONE_PIECE
        self._add(declared)

    def _add(self, declared: Declared) -> None:
        pieces = self._pieces
        size = len(pieces)
        controls = frozenset(pieces.of_kind(CONTROL))
        cut = pieces.of_kind(CONTROL, USER_DEFINED) if self._kind else sorted(controls)
        of_model = [AddedToken(pieces.name(i), special=i in controls, where=self._path.name) for i in cut]
        tokens = declared.tokens(extra=of_model)
        if not self._kind:
            tokens = list({token.content: token for token in [*of_model, *tokens]}.values())
        known = {t.content: index for t in tokens if (index := self._piece_id(t.content)) is not None}
        ids, self.left_out, self.notes = _place(tokens, known, size, declared)
        self.size = size + sum(index >= size for index in ids.values())
        self.added = {ids[token.content]: token for token in tokens if ids.get(token.content, 0) >= size}
        self.special = frozenset(ids[t.content] for t in tokens if t.special and t.content in ids)
        self.own_special = controls
        self._split = _Splitter(tokens, ids, declared)
        self._unknown = next(iter(pieces.of_kind(UNKNOWN)), -1)
        named = declared.names.get("unk_token")
        self._drops_unknown = self._kind == "LlamaTokenizer" or bool(
            self._kind and (named is None or self._piece_id(named.content) != self._unknown)
        )

    def encode(self, text: str) -> list[int]:
        """See `Vocabulary`."""
        ids: list[int] = []
        for start, part in self._split(text):
            if isinstance(part, int):
                ids.append(part)
                continue
            prefixed = self._prefix == "always" or (self._prefix == "first" and start == 0)
            if prefixed and not part.startswith((" ", SPACE)):
                part = " " + part
            found: list[int] = call_library(
                self._model.EncodeAsIds, part, what=f"{self._path}: it cannot encode this text"
            )
            ids += [i for i in found if i != self._unknown] if self._drops_unknown else found
        return ids

    def token(self, index: int) -> str | None:
        """See `Vocabulary`."""
        if 0 <= index < len(self._pieces):
            return self._pieces.name(index)
        added = self.added.get(index)
        return None if added is None else added.content

    def token_id(self, token: str) -> int | None:
        """See `Vocabulary`."""
        index = self._piece_id(token)
        return next((i for i, added in self.added.items() if added.content == token), None) if index is None else index

    def _piece_id(self, token: str) -> int | None:
        index: int = self._model.PieceToId(token)
        return index if self._pieces.name(index) == token else None

    def declared_id(self, role: str) -> int | None:
        """See `Vocabulary`: by the trainer's settings in the model."""
        index: int = {"bos": self._model.bos_id, "eos": self._model.eos_id, "pad": self._model.pad_id}[role]()
        return index if index >= 0 else None

    def adds_bos(self, bos: int) -> bool | None:
        """See `Vocabulary`. True for models with a bos: the tokenizers of Gemma and Llama prepend it by default."""
        return self.declared_id("bos") == bos

    def is_byte(self, index: int) -> bool:
        """See `Vocabulary`."""
        if self._kind:
            return BYTE_TOKEN.fullmatch(self.token(index) or "") is not None
        return 0 <= index < len(self._pieces) and bool(self._pieces.kinds[index] == BYTE)

    def token_bytes(self, index: int) -> bytes:
        """See `Vocabulary`."""
        token = self.token(index)
        if token is None or (not self._kind and (index in self.own_special or index in self.added)):
            return (token or "").encode()
        if self.is_byte(index):
            return bytes([int(token[3:5], 16)])
        if index == self._unknown and not self._kind:
            return self.fingerprint_bytes(index)
        return token.replace(SPACE, " ").encode()

    def fingerprint_bytes(self, index: int) -> bytes:
        """See `Vocabulary`: for the unknown token the library's mark, even where transformers writes another."""
        if index == self._unknown:
            surface: str = self._model.DecodeIds([index])
            return surface.encode()
        return self.token_bytes(index)

    def describe(self) -> dict[str, Any]:
        """See `Vocabulary`."""
        if self._pieces.model_type not in (UNIGRAM, BPE):
            raise described_steps.UnsupportedError(
                "it is a model of words or characters; libedgelm has BPE and Unigram"
            )
        return {
            "kind": "pieces",
            "rules": "merges" if self._kind else "model",
            "prefix": self._prefix,
            "unknown_id": None if self._unknown < 0 else self._unknown,
            "unknown_text": "" if self._unknown < 0 else self.fingerprint_bytes(self._unknown).decode(),
            "drops_unknown": self._drops_unknown,
            "verbatim": [] if self._kind else sorted({*self.own_special, *self.added}),
            **self._split.describe(),
        }
