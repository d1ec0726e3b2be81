"""Which ids begin and end a text, when the files of a checkpoint contradict each other.

Four places speak of it: generation_config.json and config.json (ids), tokenizer_config.json (strings), and the
vocabulary (a string at every id; SentencePiece models also declare roles). Both published families get it wrong
somewhere: Fox's configs say bos 1 and eos 2 while its vocabulary is Gemma's, where 1 is `<eos>` and 2 is `<bos>`;
OLMoE's 0125 instruction-tuned checkpoints rightly say eos 50279 although the vocabulary calls that id
`|||IP_ADDRESS|||` and has another `<|endoftext|>`, 0. The rule that gets both right:

1. An id from generation_config.json counts, else one from config.json, whatever the token there is called...
2. ...unless the vocabulary calls it by the customary name of *another* role (`<eos>` for a bos id) and the tokenizer
   itself (its config, its SentencePiece model, or a token of the customary name) says which is right: then that one.
3. Where no config gives an id, the tokenizer's word counts; a bos that it calls `<|endoftext|>`, or by the same string
   as eos, is the end token that rules 1 and 2 found.

Every contradiction is noted, so that it can be shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from edgelm.errors import TokenizerError

CUSTOMARY: Mapping[str, tuple[str, ...]] = {
    "bos": ("<bos>", "<s>"),
    "eos": ("<eos>", "</s>", "<|endoftext|>"),
    "pad": ("<pad>", "<|padding|>"),
    "unk": ("<unk>",),
}
# Families that have one token for both ends call it this; it says nothing against the id being a bos.
BOTH_ENDS = "<|endoftext|>"
TURN_END = "<end_of_turn>"


class Vocabulary(Protocol):
    """What resolving needs of a tokenizer."""

    size: int

    def token(self, index: int) -> str | None:
        """The token's string, None where there is none."""

    def token_id(self, token: str) -> int | None:
        """The id of a string that is one token."""

    def declared_id(self, role: str) -> int | None:
        """What the vocabulary itself says is its bos, eos or pad."""


@dataclass(frozen=True)
class SpecialIds:
    """The resolved ids; `eos` has at least one, the first being the model's own."""

    bos: int | None
    eos: tuple[int, ...]
    pad: int | None
    notes: list[str] = field(default_factory=list)


def _ids(file: str, values: Mapping[str, Any], role: str) -> list[int]:
    value = values.get(f"{role}_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise TokenizerError(f"{file}: {role}_token_id is {str(value)[:80]}; expected an id or a list of ids")
    return [i for i in ids if i >= 0]  # -1 is used for "none"


def token_string(values: Mapping[str, Any], role: str) -> str | None:
    """The string of `bos_token` etc. in tokenizer_config.json, where it may be an object with a `content`."""
    value = values.get(f"{role}_token")
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


class _Resolver:
    def __init__(self, vocabulary: Vocabulary, configs: Mapping[str, Mapping[str, Any]], strings: Mapping[str, Any]):
        self.vocabulary = vocabulary
        self.configs = configs
        self.strings = strings
        self.notes: list[str] = []

    def _name(self, index: int) -> str:
        return f"{index} ({self.vocabulary.token(index)!r})"

    def declared(self, role: str) -> int | None:
        """What the tokenizer itself says."""
        string = token_string(self.strings, role)
        if string is not None and (index := self.vocabulary.token_id(string)) is not None:
            return index
        if (index := self.vocabulary.declared_id(role)) is not None:
            return index
        found = (self.vocabulary.token_id(name) for name in CUSTOMARY[role])
        return next((index for index in found if index is not None), None)

    def _overruled(self, role: str, index: int, declared: int | None) -> bool:
        name = self.vocabulary.token(index)
        others = [other for other, names in CUSTOMARY.items() if other != role and name in names and name != BOTH_ENDS]
        return bool(others) and declared is not None and declared != index

    def _usable(self, file: str, role: str, ids: list[int]) -> list[int]:
        usable = [i for i in ids if self.vocabulary.token(i) is not None]
        for i in set(ids) - set(usable):
            self.notes.append(f"{file}: {role}_token_id {i} has no token in the vocabulary and is ignored")
        return usable

    def from_configs(self, role: str) -> list[int]:
        """Rules 1 and 2."""
        declared = self.declared(role)
        given = {file: self._usable(file, role, _ids(file, values, role)) for file, values in self.configs.items()}
        given = {file: ids for file, ids in given.items() if ids}
        if not given:
            return []
        file, ids = next(iter(given.items()))
        for other, other_ids in given.items():
            if set(other_ids) != set(ids):
                self.notes.append(f"{file} says {role}_token_id {ids}, {other} says {other_ids}: {file} counts")
        result: list[int] = []
        for i in ids:
            # A pad that is also the end token is customary and harmless.
            if role != "pad" and declared is not None and self._overruled(role, i, declared):
                self.notes.append(
                    f"{' and '.join(given)} say {role}_token_id {i}, but that token is {self.vocabulary.token(i)!r}: "
                    f"{self._name(declared)} is used, as the tokenizer says"
                )
                i = declared
            elif len(ids) == 1 and declared is not None and declared != i:
                self.notes.append(
                    f"the tokenizer's {role} would be {self._name(declared)}, but {file} says {self._name(i)}: "
                    "the id counts"
                )
            if i not in result:
                result.append(i)
        return result

    def bos_by_tokenizer(self, eos: list[int]) -> int | None:
        """Rule 3 for bos."""
        string = token_string(self.strings, "bos")
        if string is not None and string in (BOTH_ENDS, token_string(self.strings, "eos")):
            if string == BOTH_ENDS and self.vocabulary.token_id(string) not in (eos[0], None):
                self.notes.append(f"bos is called {string!r} like the end token: {self._name(eos[0])} is used")
            return eos[0]
        return self.declared("bos")


def resolve(
    vocabulary: Vocabulary,
    generation_config: Mapping[str, Any],
    config: Mapping[str, Any],
    tokenizer_config: Mapping[str, Any],
    chat_template: str | None,
) -> SpecialIds:
    """Find the ids by the rules in the module's docstring.

    `<end_of_turn>` is an end token too where the chat template uses it: the model closes its answers with it.

    Raises:
        TokenizerError: there is no end token, or an id is not a number.
    """
    configs = {"generation_config.json": generation_config, "config.json": config}
    resolver = _Resolver(vocabulary, configs, tokenizer_config)
    eos = resolver.from_configs("eos")
    if not eos and (declared := resolver.declared("eos")) is not None:
        eos = [declared]
    if not eos:
        raise TokenizerError("no end token: add its eos_token_id to config.json")
    rivals = [index for name in CUSTOMARY["eos"] if (index := vocabulary.token_id(name)) is not None]
    if rivals and not set(rivals) & set(eos) and not resolver.notes:
        resolver.notes.append(
            f"the end token is {eos[0]} ({vocabulary.token(eos[0])!r}), by its id; the token called "
            f"{vocabulary.token(rivals[0])!r} is {rivals[0]} and ends nothing"
        )
    given_bos = resolver.from_configs("bos")
    bos = given_bos[0] if given_bos else resolver.bos_by_tokenizer(eos)
    given_pad = resolver.from_configs("pad")
    pad = given_pad[0] if given_pad else resolver.declared("pad")
    turn_end = vocabulary.token_id(TURN_END)
    if chat_template is not None and TURN_END in chat_template and turn_end is not None and turn_end not in eos:
        eos.append(turn_end)
        resolver.notes.append(f"the chat template ends turns with {turn_end} ({TURN_END!r}): it ends an answer too")
    return SpecialIds(bos, tuple(eos), pad, resolver.notes)
