"""Text to token ids and back, with the checkpoint's own tokenizer files.

`tokenizer.json` is preferred to `tokenizer.model` where both are there. Which tokens the files beside them add is
written in `edgelm.tokenization.added_tokens`, and how the special ids are found when the files contradict each other in
`edgelm.tokenization.special_tokens`.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

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
# What a fingerprint is taken of: spaces, digits, scripts, combining marks, code, special strings.
PROBES = (
    "Hello, world!",
    "  two  spaces\n\n\ttab 12345 3.14",
    "def f(x):\n    return x**2  # Größe",
    "漢字かな交じり文 한국어 العربية हिन्दी",
    "🎉👩‍👩‍👧 e\u0301 \u00e9 \ufffd",
    "<bos><s></s><|endoftext|><start_of_turn>user\n<|user|>\n",
)


class StreamDetokenizer:
    """Turns ids into text one by one and never gives out part of a character.

    The pieces, with `flush` at the end, join to `Tokenizer.decode` of all the ids.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._vocabulary = tokenizer.vocabulary
        self._skip = tokenizer.special if skip_special else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = self._vocabulary.leading_space is not LeadingSpace.KEEP

    def push(self, index: int) -> str:
        """Take the next id; gives the text that is complete now, maybe none.

        Bytes that cannot become a character are given as U+FFFD, one for each maximal part of one, as the Unicode
        standard recommends.
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
        """The end of the text: bytes that wait for the rest of their character become U+FFFD."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        self._at_start = self._vocabulary.leading_space is not LeadingSpace.KEEP
        return text


class Tokenizer:
    """A checkpoint's or bundle's tokenizer.

    Attributes:
        vocabulary: the open tokenizer file.
        vocab_size: one more than the largest id; the model's own may be larger (padded).
        bos_id: id that begins a text, or None.
        eos_ids: ids that end one, the model's own first.
        template_eos_id: the one that chat templates mean by `eos_token`.
        pad_id: id for padding, or None.
        special: ids that are no text and are left out when decoding.
        add_bos: whether `encode` puts `bos_id` first when not told.
        notes: contradictions between the files and how they were resolved.
        files: the files that make up this tokenizer, config.json apart: what a bundle needs.
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
            TokenizerError: there is none, its files are damaged, or no end token can be found.
        """
        folder = Path(path)
        try:
            if (folder / "tokenizer.json").exists():
                declared = read_declared(folder)
                return cls(folder, JsonVocabulary(folder / "tokenizer.json", declared), declared)
            if (folder / "tokenizer.model").exists():
                declared = read_declared(folder)
                return cls(folder, PieceVocabulary(folder / "tokenizer.model", declared), declared)
        except CheckpointError as error:  # of the JSON files beside it
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
        # transformers' classes for these put bos first unless told otherwise.
        named = str(declared.config.get("tokenizer_class")).removesuffix("Fast")
        return named in ("GemmaTokenizer", "LlamaTokenizer")

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        """Ids of `text`. Strings of special tokens in it, as chat templates write them, become those tokens.

        Args:
            text: any text.
            add_bos: put `bos_id` first; None does what the tokenizer does by default (`self.add_bos`). The end token is
                never put last, whatever `add_eos_token` says: a prompt is to be continued.

        Raises:
            TokenizerError: the text holds a lone surrogate, or bos is asked for and there is none.
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
        """Text of `ids`; ids without a token (a padded vocabulary has such) give nothing.

        Equal to what the tokenizer's library gives, but for bytes that are not UTF-8: see `StreamDetokenizer.push`.
        """
        stream = self.detokenizer(skip_special=skip_special)
        return "".join([stream.push(int(index)) for index in ids]) + stream.flush()

    def detokenizer(self, *, skip_special: bool = True) -> StreamDetokenizer:
        """A fresh stream detokenizer."""
        return StreamDetokenizer(self, skip_special=skip_special)

    def token(self, index: int) -> str | None:
        """The string of a token as the vocabulary has it, None where there is none."""
        return self.vocabulary.token(index)

    def token_id(self, token: str) -> int | None:
        """The id of a string that is one token of the vocabulary, None where it is none."""
        return None if any("\ud800" <= c <= "\udfff" for c in token) else self.vocabulary.token_id(token)

    def fingerprint(self) -> str:
        """SHA-256 over the vocabulary, the special ids and the ids of some probing texts.

        Equal for tokenizers that encode and decode alike, whichever files and library versions are behind them.
        """
        vocabulary = self.vocabulary
        state = hashlib.sha256()
        for index in range(self.vocab_size):
            state.update(b"%d %b\n" % (index, vocabulary.lasting_bytes(index).hex().encode()))
        special = sorted(vocabulary.own_special | self._named)
        ids = [self.bos_id, list(self.eos_ids), self.pad_id, self.add_bos, special]
        state.update(json.dumps([ids, [vocabulary.encode(probe) for probe in PROBES]]).encode())
        if vocabulary.added:  # only then, so that the other fingerprints stay what they were
            flags = [
                [index, token.content, *(getattr(token, flag) for flag in FLAGS)]
                for index, token in sorted(vocabulary.added.items())
            ]
            state.update(json.dumps(flags).encode())
        return state.hexdigest()
