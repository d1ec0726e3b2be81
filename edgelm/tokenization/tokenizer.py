"""Encode text to token ids and decode them, with a checkpoint's own tokenizer files.

`tokenizer.json` is preferred to `tokenizer.model`. `edgelm.tokenization.added_tokens` describes the tokens that other
files add, and `edgelm.tokenization.special_tokens` how special ids are resolved when the files contradict each other.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from edgelm.checkpoint.jsonfile import read_optional_json
from edgelm.errors import CheckpointError, TokenizerError
from edgelm.tokenization import special_tokens, template_files
from edgelm.tokenization.added_tokens import FLAGS, Declared, read_declared
from edgelm.tokenization.vocabulary import JsonVocabulary, LeadingSpace, PieceVocabulary, Vocabulary

FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
)
# Texts for fingerprints: spaces, digits, scripts, combining marks, code, special tokens.
PROBES = (
    "Hello, world!",
    "  two  spaces\n\n\ttab 12345 3.14",
    "def f(x):\n    return x**2  # Größe",
    "漢字かな交じり文 한국어 العربية हिन्दी",
    "🎉👩‍👩‍👧 e\u0301 \u00e9 \ufffd",
    "<bos><s></s><|endoftext|><start_of_turn>user\n<|user|>\n",
)


class StreamDetokenizer:
    """Converts ids to text one by one, and never returns part of a character.

    The returned texts, with `flush` at the end, join to `Tokenizer.decode` of all the ids.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True, shown: frozenset[int] = frozenset()) -> None:
        self._vocabulary = tokenizer.vocabulary
        self._skip = tokenizer.special - shown if skip_special else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = self._vocabulary.leading_space is not LeadingSpace.KEEP

    def push(self, index: int) -> str:
        """Add the next id, and return the text that is complete now, which may be empty.

        Invalid bytes become U+FFFD, one for each maximal subpart of a character, as the Unicode standard recommends.
        """
        if index in self._skip:
            return ""
        data = self._vocabulary.token_bytes(index)
        if self._at_start:
            data = self._without_leading_space(index, data)
        return self._decoder.decode(data)

    def _without_leading_space(self, index: int, data: bytes) -> bytes:
        rule = self._vocabulary.leading_space
        droppable = rule is LeadingSpace.DROP_ONE or not self._vocabulary.is_byte(index)
        if droppable and data.startswith(b" "):
            data = data[1:]
            self._at_start = rule is LeadingSpace.DROP_EACH_PIECE and not data
        elif data:
            self._at_start = False
        return data

    def flush(self) -> str:
        """End the text, and return U+FFFD for the bytes of an incomplete character."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        self._at_start = self._vocabulary.leading_space is not LeadingSpace.KEEP
        return text


class Tokenizer:
    """The tokenizer of a checkpoint or bundle.

    Attributes:
        vocabulary: the open tokenizer file.
        vocab_size: one more than the largest id; the model's vocabulary may be larger (padded).
        bos_id: id that begins a text; None where there is none.
        eos_ids: ids that end a text, the model's own first.
        template_eos_id: the id that chat templates mean by `eos_token`.
        pad_id: id for padding; None where there is none.
        special: ids that are not text and are omitted when decoding.
        add_bos: whether `encode` prepends `bos_id` by default.
        notes: contradictions between the files, and how they were resolved.
        files: the tokenizer's files that a bundle needs, without config.json.
    """

    def __init__(self, folder: Path, vocabulary: Vocabulary, declared: Declared) -> None:
        self.vocabulary = vocabulary
        self.vocab_size = vocabulary.size
        self.files = [folder / name for name in FILES if (folder / name).exists()]
        ids = special_tokens.resolve(
            vocabulary,
            read_optional_json(folder / "generation_config.json"),
            read_optional_json(folder / "config.json"),
            declared,
            template_files.read_source(folder),
        )
        self.bos_id, self.eos_ids, self.pad_id = ids.bos, ids.eos, ids.pad
        self.template_eos_id = ids.template_eos
        self.notes = vocabulary.notes + ids.notes
        self._named = {index for index in (ids.bos, ids.pad, *ids.eos) if index is not None}
        self.special = vocabulary.special | self._named
        self.add_bos = self._default_add_bos(declared)

    @classmethod
    def from_folder(cls, path: Path | str) -> Tokenizer:
        """Open the tokenizer of a checkpoint or bundle folder.

        Raises:
            TokenizerError: there is no tokenizer, its files are damaged, or it has no end token.
        """
        folder = Path(path)
        try:
            if (folder / "tokenizer.json").exists():
                declared = read_declared(folder)
                return cls(folder, JsonVocabulary(folder / "tokenizer.json", declared), declared)
            if (folder / "tokenizer.model").exists():
                declared = read_declared(folder)
                return cls(folder, PieceVocabulary(folder / "tokenizer.model", declared), declared)
        except CheckpointError as error:  # from a JSON file
            raise TokenizerError(str(error)) from error
        except TokenizerError as error:
            raise error if str(error).startswith(str(folder)) else TokenizerError(f"{folder}: {error}") from error
        raise TokenizerError(
            f"{folder}: neither tokenizer.json nor tokenizer.model is there; copy one from the checkpoint"
        )

    def _default_add_bos(self, declared: Declared) -> bool:
        if self.bos_id is None:
            return False
        if declared.config.get("add_bos_token") is not None:
            return declared.flag("add_bos_token", False)
        by_file = self.vocabulary.adds_bos(self.bos_id)
        if by_file is not None:
            return by_file
        # These classes of transformers prepend bos by default.
        named = str(declared.config.get("tokenizer_class")).removesuffix("Fast")
        return named in ("GemmaTokenizer", "LlamaTokenizer")

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        """Return the ids of `text`. Strings of special tokens in it, as chat templates write them, become those tokens.

        Args:
            text: the text.
            add_bos: whether to prepend `bos_id`; None for the tokenizer's default (`self.add_bos`). The end token is
                never appended, whatever `add_eos_token` says, since a prompt is continued.

        Raises:
            TokenizerError: the text has a lone surrogate, or `add_bos` is True and there is no bos.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(f"the text is not valid Unicode at character {error.start}") from error
        ids = self.vocabulary.encode(text)
        if not (self.add_bos if add_bos is None else add_bos):
            return ids
        if self.bos_id is None:
            raise TokenizerError("this tokenizer has no token that begins a text: pass add_bos=False")
        return [self.bos_id, *ids]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Return the text of `ids`. Ids without a token, as in a padded vocabulary, give no text.

        The result equals that of the tokenizer's library, except for invalid UTF-8: see `StreamDetokenizer.push`.
        """
        stream = self.detokenizer(skip_special=skip_special)
        return "".join([stream.push(int(index)) for index in ids]) + stream.flush()

    def detokenizer(self, *, skip_special: bool = True, shown: frozenset[int] = frozenset()) -> StreamDetokenizer:
        """Return a new detokenizer for one text, which shows the special tokens `shown` in any case."""
        return StreamDetokenizer(self, skip_special=skip_special, shown=shown)

    def token(self, index: int) -> str | None:
        """Return the string of a token in the vocabulary; None where there is no such token."""
        return self.vocabulary.token(index)

    def token_id(self, token: str) -> int | None:
        """Return the id of a string that is one token of the vocabulary; None where it is not."""
        return None if any("\ud800" <= c <= "\udfff" for c in token) else self.vocabulary.token_id(token)

    def fingerprint(self) -> str:
        """Return a SHA-256 over the vocabulary, the special ids and the ids of some test texts.

        It is equal for tokenizers that encode and decode alike, whatever their files and library versions.
        """
        vocabulary = self.vocabulary
        state = hashlib.sha256()
        for index in range(self.vocab_size):
            state.update(b"%d %b\n" % (index, vocabulary.fingerprint_bytes(index).hex().encode()))
        fields = self.fingerprint_fields()
        ids = [self.bos_id, list(self.eos_ids), self.pad_id, self.add_bos, fields["special"]]
        state.update(json.dumps([ids, [vocabulary.encode(probe) for probe in PROBES]]).encode())
        state.update(fields["added"].encode())
        return state.hexdigest()

    def fingerprint_fields(self) -> dict[str, Any]:
        """Return what the fingerprint covers besides the vocabulary, ids and texts.

        `special`: ids of special tokens; `added`: JSON of the tokens that other files than the vocabulary add. It is
        empty where there are none, so that fingerprints from older versions stay valid.
        """
        added = [
            [index, token.content, *(getattr(token, flag) for flag in FLAGS)]
            for index, token in sorted(self.vocabulary.added.items())
        ]
        special = sorted(self.vocabulary.own_special | self._named)
        return {"special": special, "added": json.dumps(added) if added else ""}
