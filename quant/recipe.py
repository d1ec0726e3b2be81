"""Recipes: which scheme each tensor of a checkpoint gets.

    name = "mine"
    default = "int4-g32-sym"

    [[rule]]
    role = "router"
    scheme = "float"

    [[rule]]
    match = "model.layers.0.*"
    scheme = "int8-g32-sym"

A rule is for the matrices of a role (`edgelm.models.spec.ROLES`), or for the tensors whose full name matches a shell
pattern (`*` crosses dots). The first rule that matches decides; where none does, `default` does. "float" keeps a tensor
as it is, and tensors that are not matrices are always kept.

Three more keys may stand at the top, and the first two of them in a rule:

    activations = "float"   what the matrix multiplies: one of `ACTIVATIONS`; "auto" leaves it to the target
    method = "gptq"         how quantised values are found where there are calibration data: one of `METHODS`
    kv = "int8"             the type of cache that a bundle asks for: one of `KV_TYPES`; "auto" leaves it to the target
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import translate
from functools import cached_property
from pathlib import Path

from edgelm.errors import RecipeError
from edgelm.json_dataclass import Blame, parse_toml, quoted, read_bytes
from edgelm.models.spec import EMBEDDING, HEAD, ROLES, Decoder
from edgelm.places import Kind
from edgelm.quant.scheme import AnyScheme, Fp8Scheme, Scheme, parse_scheme

_BLAME = Blame(RecipeError, "mend it, or write one with `edgelm recipe`")

FLOAT = "float"
AUTO = "auto"
ACTIVATIONS = (AUTO, FLOAT, "int8-token", "int8-static", "fp8-token", "fp8-static")
"""What a matrix multiplies: float; int8 or FP8 E4M3 with a scale for each token, or one calibrated for all."""
STATIC_ACTIVATIONS = ("int8-static", "fp8-static")
"""Those whose scale is calibrated."""
METHODS = (AUTO, "gptq", "search", "rtn")
"""How values are found: by the least error of the output with its columns corrected in turn (gptq), by scales that
weigh the error with the inputs' magnitude (search), by the least error of the weights (rtn), or the best (auto)."""
KV_TYPES = (AUTO, "float32", "float16", "int8", "fp8")

_WILDCARD = re.compile(r"[*?[]")
_CHOICES = {"activations": ACTIVATIONS, "method": METHODS, "kv": KV_TYPES}
_OF_RULES = ("activations", "method")


@dataclass(frozen=True)
class Rule:
    """Tensors whose name matches `pattern`, or those of `role`, get `scheme`, or stay float where it is None.

    `activations` and `method` of None are the recipe's own.
    """

    pattern: str | None
    scheme: AnyScheme | None
    activations: str | None = None
    method: str | None = None
    role: str | None = None


def of_role(role: str, scheme: AnyScheme | None) -> Rule:
    """A rule for the matrices of a role."""
    return Rule(None, scheme, role=role)


@dataclass(frozen=True)
class Recipe:
    """A named default with exceptions.

    `roles` are those of a model's matrices by their names (`for_model`): without them no rule for a role matches.
    """

    name: str
    default: AnyScheme | None
    rules: tuple[Rule, ...] = ()
    activations: str = AUTO
    method: str = AUTO
    kv: str = AUTO
    roles: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def for_model(self, decoder: Decoder) -> Recipe:
        """Return this recipe with the roles of a model's matrices known."""
        return replace(self, roles={name: matrix.role for name, matrix in decoder.matrices.items()})

    def match(self, tensor: str) -> AnyScheme | None:
        """Return the scheme written for a tensor of that name, before its shape is looked at."""
        return self.rule(tensor).scheme

    def rule(self, tensor: str) -> Rule:
        """Return what is written for a tensor of that name, nothing left to defaults."""
        index = min(self._matching(tensor), default=None)
        if index is None:
            return Rule("*", self.default, self.activations, self.method)
        rule = self.rules[index]
        return replace(rule, activations=rule.activations or self.activations, method=rule.method or self.method)

    def activations_for(self, tensor: str) -> str:
        """Return what a matrix of that name is to be multiplied with, one of `ACTIVATIONS`."""
        return self.rule(tensor).activations or AUTO

    def _matching(self, tensor: str) -> Iterator[int]:
        """Indices of the rules that match, in no order."""
        role = self.roles.get(tensor)
        if role is not None:
            yield from (index for index, rule in enumerate(self.rules) if rule.role == role)
        for length, patterns in self._patterns.items():
            for index, pattern in patterns.get(tensor[:length], ()):
                if pattern is None:
                    if len(tensor) == length:
                        yield index
                elif pattern.match(tensor):
                    yield index

    @cached_property
    def _patterns(self) -> dict[int, dict[str, list[tuple[int, re.Pattern[str] | None]]]]:
        """Rules by the text before the first wildcard, and by its length; a pattern without one is None.

        A recipe with a scheme for each expert has thousands of rules, and a checkpoint thousands of tensors: most
        pairs of them are told apart here.
        """
        found: dict[int, dict[str, list[tuple[int, re.Pattern[str] | None]]]] = {}
        for index, rule in enumerate(self.rules):
            if rule.pattern is None:
                continue
            start = _WILDCARD.search(rule.pattern)
            stem = rule.pattern if start is None else rule.pattern[: start.start()]
            pattern = None if start is None else re.compile(translate(rule.pattern))
            found.setdefault(len(stem), {}).setdefault(stem, []).append((index, pattern))
        return found

    def scheme_for(self, tensor: str, shape: tuple[int, ...]) -> AnyScheme | None:
        """Return the scheme of a tensor with its group made to fit the rows; None keeps it float."""
        scheme = self.match(tensor) if len(shape) == 2 else None
        return None if scheme is None else scheme.effective(shape[1])

    @property
    def is_preset(self) -> bool:
        """Whether this is one of the named presets."""
        return PRESETS.get(self.name) == self

    def check(self, tensors: Collection[str]) -> None:
        """Refuse a pattern that matches no tensor: most likely a typo.

        A role may be one that the model does not have, and presets serve every model: they are exempt.

        Raises:
            RecipeError: naming the pattern.
        """
        if self.is_preset:
            return
        matched = {index for tensor in tensors for index in self._matching(tensor)}
        for index, rule in enumerate(self.rules):
            if rule.role is None and index not in matched:
                example = next(iter(sorted(tensors)), "none")
                raise RecipeError(
                    f'recipe {self.name}: the pattern "{rule.pattern}" matches none of the {len(tensors)} tensors '
                    f"(e.g. {example}); patterns match the whole name"
                )

    def to_toml(self) -> str:
        """Return the TOML that `from_toml` reads back to an equal recipe."""
        lines = [f"name = {_quoted(self.name)}", f"default = {_quoted(_scheme_name(self.default))}"]
        lines += [f"{key} = {_quoted(getattr(self, key))}" for key in _CHOICES if getattr(self, key) != AUTO]
        for rule in self.rules:
            lines += [
                "",
                "[[rule]]",
                f"match = {_quoted(rule.pattern)}" if rule.pattern is not None else f"role = {_quoted(str(rule.role))}",
                f"scheme = {_quoted(_scheme_name(rule.scheme))}",
                *(f"{key} = {_quoted(value)}" for key in _OF_RULES if (value := getattr(rule, key)) is not None),
            ]
        return "\n".join(lines) + "\n"

    @classmethod
    def from_toml(cls, text: str | bytes, where: str = "the recipe", name: str | None = None) -> Recipe:
        """Read a recipe; `name` is used where the text gives none.

        Raises:
            RecipeError: it is no TOML, a key is unknown or missing, or a scheme does not exist.
        """
        table = parse_toml(text, where, _BLAME)
        _only(table, ("name", "default", "rule", *_CHOICES), where)
        rules = table.get("rule", [])
        if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
            raise RecipeError(f'{where}: rules are tables headed "[[rule]]"')
        found = []
        for number, rule in enumerate(rules, 1):
            place = f"{where}, rule {number}"
            _only(rule, ("match", "role", "scheme", *_OF_RULES), place)
            chosen = {key: _choice(rule, key, place) for key in _OF_RULES if key in rule}
            if "role" in rule and "match" in rule:
                raise RecipeError(f'{place}: give "match" or "role", not both')
            if "role" in rule:
                chosen["role"] = _role(rule, place)
            pattern = None if "role" in rule else _text(rule, "match", place)
            found.append(Rule(pattern, _scheme(rule, "scheme", place), **chosen))
        if name is None or "name" in table:
            name = _text(table, "name", where)
        chosen = {key: _choice(table, key, where) for key in _CHOICES if key in table}
        kinds = {key: chosen.get(key, AUTO) for key in _CHOICES}
        recipe = cls(
            name, _scheme(table, "default", where), tuple(found), kinds["activations"], kinds["method"], kinds["kv"]
        )
        # Bundles and checkpoints of before roles have the presets with patterns.
        return PRESETS[recipe.name] if _FORMER_PRESETS.get(recipe.name) == recipe else recipe

    @classmethod
    def load(cls, preset_or_path: str | Path) -> Recipe:
        """Return a preset by its name, or read a TOML file.

        Raises:
            RecipeError: it is neither, or the file is malformed.
        """
        if isinstance(preset_or_path, str) and preset_or_path in PRESETS:
            return PRESETS[preset_or_path]
        path = Path(preset_or_path)
        if not path.is_file():
            raise RecipeError(f"no recipe {preset_or_path}: give {', '.join(PRESETS)}, or the path of a .toml file")
        return cls.from_toml(read_bytes(path, _BLAME), str(path), path.stem)


def _refusal(path: Path) -> str | None:
    try:
        Recipe.load(path)
    except RecipeError:
        return "is no recipe"
    return None


RECIPE = Kind("a recipe", _refusal, is_folder=False)
"""A TOML file that `Recipe.load` reads."""


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped) + '"'


def _only(table: Mapping[str, object], keys: tuple[str, ...], where: str) -> None:
    unknown = sorted(set(table) - set(keys))
    if unknown:
        raise RecipeError(f"{where}: unknown key {', '.join(unknown)[:200]}; known are {', '.join(keys)}")


def _text(table: Mapping[str, object], key: str, where: str) -> str:
    value = table.get(key)
    if not isinstance(value, str) or not value:
        raise RecipeError(f'{where}: "{key}" is missing or not a text')
    return value


def _role(table: Mapping[str, object], where: str) -> str:
    role = _text(table, "role", where)
    if role not in ROLES:
        raise RecipeError(f"{where}: role = {quoted(role)} is none of {', '.join(ROLES)}")
    return role


def _choice(table: Mapping[str, object], key: str, where: str) -> str:
    value = _text(table, key, where)
    if value not in _CHOICES[key]:
        raise RecipeError(f"{where}: {key} = {quoted(value)} is none of {', '.join(_CHOICES[key])}")
    return value


def _scheme(table: Mapping[str, object], key: str, where: str) -> AnyScheme | None:
    name = _text(table, key, where)
    if name == FLOAT:
        return None
    try:
        return parse_scheme(name)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}, or {FLOAT}") from error


def _scheme_name(scheme: AnyScheme | None) -> str:
    return FLOAT if scheme is None else scheme.name


_ROUTER = of_role("router", None)
# The tables of the vocabulary stay at 8 bits: an error of the head goes straight into every logit, and the embedding
# is read one row a token, so its width costs storage but no speed. Norms are vectors, which no rule quantises.
_TABLES = (of_role(EMBEDDING, Scheme(8, 128)), of_role(HEAD, Scheme(8, 128)))

PRESETS: Mapping[str, Recipe] = {
    "int4": Recipe("int4", Scheme(4, 32), (_ROUTER, *_TABLES)),
    # The activations are rounded to int8 in blocks of the weights' group: with 128 in place of 32 a MoE loses almost
    # twice as much (docs/log.md), for 8 % fewer bytes.
    "int8": Recipe("int8", Scheme(8, 32), (_ROUTER, *_TABLES)),
    # As most FP8 checkpoints have it: one scale a row; embedding, head and router stay float.
    "fp8": Recipe("fp8", Fp8Scheme(None), (_ROUTER, of_role(EMBEDDING, None), of_role(HEAD, None))),
    "none": Recipe("none", None),
}

_FORMER_PATTERNS = {"router": "*.mlp.gate.weight", EMBEDDING: "model.embed_tokens.weight", HEAD: "lm_head.weight"}
_FORMER_PRESETS: Mapping[str, Recipe] = {
    name: replace(
        preset, rules=tuple(Rule(_FORMER_PATTERNS[rule.role], rule.scheme) for rule in preset.rules if rule.role)
    )
    for name, preset in PRESETS.items()
}
"""The presets as they were written when rules had patterns alone."""
