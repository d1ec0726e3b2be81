"""Resolve the ids of bos, eos and pad when the files of a checkpoint contradict each other.

Four places define them: generation_config.json and config.json (ids), tokenizer_config.json (strings), and the
vocabulary (a string for every id; SentencePiece models also declare roles). Two published families have errors. Fox's
configs say bos 1 and eos 2, but its vocabulary is Gemma's, where 1 is `<eos>` and 2 is `<bos>`. OLMoE's 0125
instruction-tuned checkpoints say eos 50279, which is right, although the token at that id is `|||IP_ADDRESS|||`, and
`<|endoftext|>` is another token, 0. These rules resolve both:

1. The id in generation_config.json is used, else that in config.json, whatever the name of its token.
2. Exception: the token has the usual name of *another* role (`<eos>` for a bos id), and the tokenizer itself (its
   config, its SentencePiece model, or a token of the usual name) has an id for the role. Then that id is used.
3. If no config has an id, the tokenizer's is used. If it names bos `<|endoftext|>`, or the same as eos, then bos is the
   end token by rules 1 and 2.
4. Tokens with which the chat template ends turns also end an answer, since fine-tunes often keep the base model's id
   in generation_config.json. These are the tokenizer's own `eos_token` and the usual ones (`TURN_ENDS`).

Each contradiction gives a note. A declared end token that is not in the vocabulary is an error: answers would not end,
and the template would write the token as plain text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from edgelm.errors import TokenizerError
from edgelm.tokenization.added_tokens import Declared
from edgelm.tokenization.vocabulary import Vocabulary

USUAL_NAMES: Mapping[str, tuple[str, ...]] = {
    "bos": ("<bos>", "<s>"),
    "eos": ("<eos>", "</s>", "<|endoftext|>"),
    "pad": ("<pad>", "<|padding|>"),
    "unk": ("<unk>",),
}
# The usual name where one token is both bos and eos. So a bos id with this name is not suspicious.
BOTH_ENDS = "<|endoftext|>"
# Tokens that end turns in published chat formats.
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
    """The resolved ids.

    Attributes:
        bos: None where the model has none.
        eos: at least one id; the first is the model's own.
        pad: None where the model has none.
        template_eos: the end token that chat templates mean by `eos_token`.
        notes: contradictions between the files.
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
    return [i for i in ids if i >= 0]  # -1 means "none"


class _Resolver:
    def __init__(self, vocabulary: Vocabulary, configs: Mapping[str, Mapping[str, Any]], declared: Declared):
        self.vocabulary = vocabulary
        self.configs = configs
        self.rows = declared.rows
        # Defaults of transformers' classes do not count as declarations.
        named = {name.removesuffix("_token"): token for name, token in declared.names.items()}
        self.strings = {role: token.content for role, token in named.items() if token is not None and token.where}
        self.files = {role: token.where for role, token in named.items() if token is not None}
        self.notes: list[str] = []

    def _name(self, index: int) -> str:
        return f"{index} ({self.vocabulary.token(index)!r})"

    def declared(self, role: str) -> int | None:
        """Return the id of a role by the tokenizer itself; None where it has none."""
        string = self.strings.get(role)
        if string is not None and (index := self.vocabulary.token_id(string)) is not None:
            return index
        if (index := self.vocabulary.declared_id(role)) is not None:
            return index
        found = (self.vocabulary.token_id(name) for name in USUAL_NAMES[role])
        return next((index for index in found if index is not None), None)

    def _overruled(self, role: str, index: int, declared: int | None) -> bool:
        name = self.vocabulary.token(index)
        others = [
            other for other, names in USUAL_NAMES.items() if other != role and name in names and name != BOTH_ENDS
        ]
        return bool(others) and declared is not None and declared != index

    def check_named_eos(self) -> None:
        """Raise an error for an `eos_token` that is not in the vocabulary."""
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
            # One of several ids is harmless if it is beyond the model's rows: the model cannot produce it.
            beyond = bool(usable) and self.rows is not None and i >= self.rows
            if role == "eos" and counts and not beyond:
                raise TokenizerError(
                    f"{file}: eos_token_id {i} has no token in the vocabulary of {self.vocabulary.size}: fetch the "
                    "checkpoint's tokenizer files (added_tokens.json, tokenizer_config.json), or correct the id"
                )
            self.notes.append(f"{file}: {role}_token_id {i} has no token in the vocabulary and is ignored")
        return usable

    def from_configs(self, role: str) -> list[int]:
        """Return the ids of a role by rules 1 and 2."""
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
                self.notes.append(f"{file} says {role}_token_id {ids}, {other} says {other_ids}: {file} is used")
        result: list[int] = []
        for i in ids:
            # A pad id that is also the end token is usual and harmless.
            if role != "pad" and declared is not None and self._overruled(role, i, declared):
                self.notes.append(
                    f"{role}_token_id is {i} in {' and '.join(given)}, but that token is {self.vocabulary.token(i)!r}; "
                    f"the tokenizer's {self._name(declared)} is used"
                )
                i = declared
            elif len(ids) == 1 and declared is not None and declared != i:
                self.notes.append(
                    f"the tokenizer's {role} would be {self._name(declared)}, but {file} says {self._name(i)}: "
                    "the id is used"
                )
            if i not in result:
                result.append(i)
        return result

    def bos_by_tokenizer(self, eos: list[int]) -> int | None:
        """Return the bos id by rule 3."""
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
    """Find `marker` (a regular expression) in a template.

    Yields:
        The text before and after it, inside its tag or between two tags, and the previous tag.
    """
    for match in re.finditer(marker, template):
        opened = template.rfind("{%", 0, match.start())
        closed = template.rfind("%}", 0, match.start())
        end = template.find("%}" if opened > closed else "{%", match.end())
        tag = template[opened : closed + 2] if closed > opened >= 0 else ""
        after = template[match.end() : len(template) if end < 0 else end]
        yield template[max(opened, closed, 0) : match.start()], after, tag


def ends_turns(template: str, token: str, variable: str | None = None) -> bool:
    """Return whether a chat template ends turns with `token`, written out or as `variable`.

    It does if the token occurs anywhere but at the beginning of a turn: before any content, before a role or a content
    in the same tag, or before the generation prompt.
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
    """Resolve the ids by the rules in the module's docstring.

    Raises:
        TokenizerError: there is no end token, a declared one is not in the vocabulary, or an id is not a number.
    """
    configs = {"generation_config.json": generation_config, "config.json": config}
    resolver = _Resolver(vocabulary, configs, declared)
    resolver.check_named_eos()
    eos = resolver.from_configs("eos")
    if not eos and (own := resolver.declared("eos")) is not None:
        eos = [own]
    if not eos:
        raise TokenizerError("no end token: add its eos_token_id to config.json")
    rivals = [index for name in USUAL_NAMES["eos"] if (index := vocabulary.token_id(name)) is not None]
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
        # In OLMoE's 0125 checkpoints `<|endoftext|>` is not the end token, so its name is ignored.
        own_name = None if own_name == BOTH_ENDS else own_name
        for name in dict.fromkeys([own_name, *TURN_ENDS]):
            index = None if name is None else vocabulary.token_id(name)
            if name is None or index is None:
                continue
            variable = "eos_token" if name == own_name else None
            if index in eos and name == own_name:
                template_eos = index
            if index in eos or not ends_turns(chat_template, name, variable):
                continue
            eos.append(index)
            template_eos = index if name == own_name else template_eos
            resolver.notes.append(f"the chat template ends turns with {index} ({name!r}): it ends an answer too")
    return SpecialIds(bos, tuple(eos), pad, template_eos, resolver.notes)
