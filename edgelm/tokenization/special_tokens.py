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
4. Tokens with which the chat template closes turns end an answer too: fine-tunes often keep the base model's id in
   generation_config.json. These are the tokenizer's own `eos_token`, and the usual ones (`TURN_ENDS`).

Every contradiction is noted, so that it can be shown. An end token that is declared and that no vocabulary has is an
error: answers would not end, and the template would spell it out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from edgelm.errors import TokenizerError
from edgelm.tokenization.added_tokens import Declared
from edgelm.tokenization.vocabulary import Vocabulary

CUSTOMARY: Mapping[str, tuple[str, ...]] = {
    "bos": ("<bos>", "<s>"),
    "eos": ("<eos>", "</s>", "<|endoftext|>"),
    "pad": ("<pad>", "<|padding|>"),
    "unk": ("<unk>",),
}
# Families that have one token for both ends call it this; it says nothing against the id being a bos.
BOTH_ENDS = "<|endoftext|>"
# Tokens that close turns in the published chat formats.
TURN_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eot|>",
    "<|end|>",
    "<end_of_turn>",
    "<|end_of_turn|>",
    "<|endofturn|>",
    "<turn|>",
    "</s>",
)


@dataclass(frozen=True)
class SpecialIds:
    """The resolved ids; `eos` has at least one, the first being the model's own.

    `template_eos` is the end token that chat templates mean by `eos_token`.
    """

    bos: int | None
    eos: tuple[int, ...]
    pad: int | None
    template_eos: int
    notes: list[str] = field(default_factory=list)


def _ids(file: str, values: Mapping[str, Any], role: str) -> list[int]:
    value = values.get(f"{role}_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise TokenizerError(f"{file}: {role}_token_id is {str(value)[:80]!r}; expected an id or a list of ids")
    return [i for i in ids if i >= 0]  # -1 is used for "none"


class _Resolver:
    def __init__(self, vocabulary: Vocabulary, configs: Mapping[str, Mapping[str, Any]], declared: Declared):
        self.vocabulary = vocabulary
        self.configs = configs
        self.rows = declared.rows
        # What only a class of transformers names is no declaration.
        named = {name.removesuffix("_token"): token for name, token in declared.names.items()}
        self.strings = {role: token.content for role, token in named.items() if token is not None and token.where}
        self.files = {role: token.where for role, token in named.items() if token is not None}
        self.notes: list[str] = []

    def _name(self, index: int) -> str:
        return f"{index} ({self.vocabulary.token(index)!r})"

    def declared(self, role: str) -> int | None:
        """What the tokenizer itself says."""
        string = self.strings.get(role)
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

    def check_named_eos(self) -> None:
        """Refuse an `eos_token` that is no token."""
        string = self.strings.get("eos")
        if string is None or self.vocabulary.token_id(string) is not None:
            return
        reason = self.vocabulary.left_out.get(string, "no vocabulary file has it")
        raise TokenizerError(
            f"{self.files['eos']}: the end token {string[:80]!r} cannot be used: {reason}; fetch the checkpoint's "
            "tokenizer files again, or name another eos_token"
        )

    def _usable(self, file: str, role: str, ids: list[int], counts: bool) -> list[int]:
        usable = [i for i in ids if self.vocabulary.token(i) is not None]
        for i in sorted(set(ids) - set(usable)):
            # One of several that the model cannot produce either does no harm.
            beyond = bool(usable) and self.rows is not None and i >= self.rows
            if role == "eos" and counts and not beyond:
                raise TokenizerError(
                    f"{file}: eos_token_id {i} has no token in the vocabulary of {self.vocabulary.size}: fetch the "
                    "checkpoint's tokenizer files (added_tokens.json, tokenizer_config.json), or correct the id"
                )
            self.notes.append(f"{file}: {role}_token_id {i} has no token in the vocabulary and is ignored")
        return usable

    def from_configs(self, role: str) -> list[int]:
        """Rules 1 and 2."""
        declared = self.declared(role)
        given: dict[str, list[int]] = {}
        for name, values in self.configs.items():
            if usable := self._usable(name, role, _ids(name, values, role), counts=not given):
                given[name] = usable
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
        string = self.strings.get("bos")
        if string is not None and string in (BOTH_ENDS, self.strings.get("eos")):
            if string == BOTH_ENDS and self.vocabulary.token_id(string) not in (eos[0], None):
                self.notes.append(f"bos is called {string!r} like the end token: {self._name(eos[0])} is used")
            return eos[0]
        return self.declared("bos")


_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
_CONTENT = re.compile(r"content|\btext\b")
_TURN = re.compile(r"content|\btext\b|\brole\b")
_WORD = re.compile(r"[^\W\d_]{2,}")


def _places(template: str, marker: str) -> Iterator[tuple[str, str, str]]:
    """Where a template writes `marker` (a regular expression): what stands before it and after it, in the same tag or
    between two tags, and the tag before."""
    for match in re.finditer(marker, template):
        opened = template.rfind("{%", 0, match.start())
        closed = template.rfind("%}", 0, match.start())
        end = template.find("%}" if opened > closed else "{%", match.end())
        tag = template[opened : closed + 2] if closed > opened >= 0 else ""
        after = template[match.end() : len(template) if end < 0 else end]
        yield template[max(opened, closed, 0) : match.start()], after, tag


def closes_turns(template: str, token: str, variable: str | None = None) -> bool:
    """Whether a chat template closes turns with `token`, written out or as `variable`.

    It does where it writes it anywhere but at the beginning of a turn: before any content, before a role or a content
    in the same tag, or before the words with which the model is to begin.
    """
    template = _COMMENT.sub("", template)
    first = _CONTENT.search(template)
    if first is None:
        return False
    template = template[first.start() :]
    for before, after, tag in _places(template, re.escape(token) + (rf"|\b{variable}\b" if variable else "")):
        opens = _TURN.search(after) is not None and _CONTENT.search(before) is None
        prompts = "add_generation_prompt" in tag and _WORD.search(re.sub(r"\\[nrt]", " ", after)) is not None
        if not opens and not prompts:
            return True
    return False


def resolve(
    vocabulary: Vocabulary,
    generation_config: Mapping[str, Any],
    config: Mapping[str, Any],
    declared: Declared,
    chat_template: str | None,
) -> SpecialIds:
    """Find the ids by the rules in the module's docstring.

    Raises:
        TokenizerError: there is no end token, one that is declared is in no vocabulary, or an id is not a number.
    """
    configs = {"generation_config.json": generation_config, "config.json": config}
    resolver = _Resolver(vocabulary, configs, declared)
    resolver.check_named_eos()
    eos = resolver.from_configs("eos")
    if not eos and (own := resolver.declared("eos")) is not None:
        eos = [own]
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
    template_eos = eos[0]
    if chat_template is not None:
        own_name = resolver.strings.get("eos")
        # OLMoE's 0125 checkpoints call another token `<|endoftext|>` than the one that ends; there the id counts.
        own_name = None if own_name == BOTH_ENDS else own_name
        for name in dict.fromkeys([own_name, *TURN_ENDS]):
            index = None if name is None else vocabulary.token_id(name)
            if name is None or index is None:
                continue
            variable = "eos_token" if name == own_name else None
            if index in eos and name == own_name:
                template_eos = index
            if index in eos or not closes_turns(chat_template, name, variable):
                continue
            eos.append(index)
            template_eos = index if name == own_name else template_eos
            resolver.notes.append(f"the chat template ends turns with {index} ({name!r}): it ends an answer too")
    return SpecialIds(bos, tuple(eos), pad, template_eos, resolver.notes)
