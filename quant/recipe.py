"""Recipes: the quantisation scheme of each tensor of a checkpoint, as TOML.

    name = "mine"
    default = "int4-g32-sym"

    [[rule]]
    role = "router"
    scheme = "float"

    [[rule]]
    match = "model.layers.0.*"
    scheme = "int8-g32-sym"

A rule applies to the matrices of a role (`edgelm.models.spec.ROLES`) or a list of them, or to the tensors whose full
name matches a shell pattern, in which `*` also matches dots. The first rule that matches decides; without a match
`default` does. "float" means not quantised. Tensors that are not matrices are never quantised.

Three more keys are possible at the top, and the first two also in a rule:

    activations = "float"   activation type of the matmul, one of `ACTIVATIONS`; "auto" leaves it to the target
    method = "gptq"         calibration method, one of `METHODS`; unused without calibration
    kv = "int8"             default type of the KV cache, one of `KV_TYPES`; "auto" leaves it to the target
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import translate
from functools import cached_property
from pathlib import Path

from edgelm.errors import RecipeError
from edgelm.json_dataclass import ErrorFactory, parse_toml, quoted, read_bytes
from edgelm.models.spec import EMBEDDING, HEAD, ROLES, Decoder
from edgelm.output_paths import OutputKind
from edgelm.quant.scheme import AnyScheme, Fp8Scheme, Scheme, parse_scheme

_ERRORS = ErrorFactory(RecipeError, "correct it, or write one with `edgelm recipe`")

FLOAT = "float"
AUTO = "auto"
ACTIVATIONS = (AUTO, FLOAT, "int8-token", "int8-static", "fp8-token", "fp8-static")
"""Activation types: float, or int8 or FP8 E4M3 with one scale per token or one calibrated ("static") scale."""
STATIC_ACTIVATIONS = ("int8-static", "fp8-static")
"""The activation types with a calibrated scale."""
METHODS = (AUTO, "gptq", "search", "rtn")
"""Calibration methods.

"gptq" minimises the error of the matmul's output and corrects later columns for the error of earlier ones. "search"
chooses scales by the error weighted with the magnitude of the inputs. "rtn" rounds to nearest, with scales of the least
error of the weights. "auto" takes the best of them.
"""
KV_TYPES = (AUTO, "float32", "float16", "int8", "fp8")

_WILDCARD = re.compile(r"[*?[]")
_CHOICES = {"activations": ACTIVATIONS, "method": METHODS, "kv": KV_TYPES}
_OF_RULES = ("activations", "method")


@dataclass(frozen=True)
class Rule:
    """A rule of a recipe: the scheme of some tensors. Either `pattern` or `role` is given.

    Attributes:
        pattern: Shell pattern that matches the tensors' full names.
        scheme: How to quantise them; None keeps them float.
        activations: Activation type, one of `ACTIVATIONS`; None for the recipe's own.
        method: Calibration method, one of `METHODS`; None for the recipe's own.
        role: Role of the matrices, one of `edgelm.models.spec.ROLES`.
    """

    pattern: str | None
    scheme: AnyScheme | None
    activations: str | None = None
    method: str | None = None
    role: str | None = None


def of_role(role: str, scheme: AnyScheme | None) -> Rule:
    """Return a rule for the matrices of a role."""
    return Rule(None, scheme, role=role)


@dataclass(frozen=True)
class Recipe:
    """How to quantise each tensor of a checkpoint: a default scheme, and rules for exceptions.

    Attributes:
        name: Name of the recipe.
        default: Scheme of matrices that no rule matches; None keeps them float.
        rules: The exceptions. The first rule that matches a tensor decides.
        activations: Activation type where a rule has none, one of `ACTIVATIONS`.
        method: Calibration method where a rule has none, one of `METHODS`.
        kv: Default type of the KV cache, one of `KV_TYPES`.
        roles: Role of each matrix of a model, by name. `for_model` sets it; without it no rule for a role matches.

    Example::

        from edgelm.quant.recipe import Recipe

        print(Recipe.load("int4").to_toml())
    """

    name: str
    default: AnyScheme | None
    rules: tuple[Rule, ...] = ()
    activations: str = AUTO
    method: str = AUTO
    kv: str = AUTO
    roles: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def for_model(self, decoder: Decoder) -> Recipe:
        """Return this recipe with the roles of a model's matrices, so that rules for roles match."""
        return replace(self, roles={name: matrix.role for name, matrix in decoder.matrices.items()})

    def match(self, tensor: str) -> AnyScheme | None:
        """Return the scheme of a tensor by its name alone; see `scheme_for`."""
        return self.rule(tensor).scheme

    def rule(self, tensor: str) -> Rule:
        """Return the rule for a tensor, with the recipe's own values filled in."""
        index = min(self._matching(tensor), default=None)
        if index is None:
            return Rule("*", self.default, self.activations, self.method)
        rule = self.rules[index]
        return replace(rule, activations=rule.activations or self.activations, method=rule.method or self.method)

    def activations_for(self, tensor: str) -> str:
        """Return the activation type of a matrix's matmul, one of `ACTIVATIONS`."""
        return self.rule(tensor).activations or AUTO

    def _matching(self, tensor: str) -> Iterator[int]:
        """Yield the indices of the rules that match a tensor, in any order."""
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
        """The rules by the text before their first wildcard, grouped by its length; None for a pattern without one.

        A recipe with a scheme for each expert has thousands of rules, and a checkpoint has thousands of tensors. This
        index avoids matching every pair of them.
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
        """Return the scheme of a tensor, with a group that suits its rows (`AnyScheme.effective`); None keeps it float.

        Tensors with other than two dimensions stay float.
        """
        scheme = self.match(tensor) if len(shape) == 2 else None
        return None if scheme is None else scheme.effective(shape[1])

    @property
    def is_preset(self) -> bool:
        """Whether this is one of `PRESETS`."""
        return PRESETS.get(self.name) == self

    def check(self, tensors: Collection[str]) -> None:
        """Check that every pattern matches at least one tensor, as one that does not is probably a typo.

        Presets and rules for roles are exempt: they are for all models.

        Raises:
            RecipeError: Names a pattern that matches nothing.
        """
        if self.is_preset:
            return
        matched = {index for tensor in tensors for index in self._matching(tensor)}
        for index, rule in enumerate(self.rules):
            if rule.role is None and index not in matched:
                example = next(iter(sorted(tensors)), "none")
                raise RecipeError(
                    f'recipe {self.name}: the pattern "{rule.pattern}" matches none of the {len(tensors)} tensors '
                    f"(such as {example}): write a pattern for the whole name, or remove the rule"
                )

    def to_toml(self) -> str:
        """Return the recipe as TOML, which `from_toml` reads back."""
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
        """Parse a recipe.

        Args:
            text: The TOML.
            where: Name of the source in errors, such as the file's path.
            name: Name of the recipe if the TOML has none.

        Raises:
            RecipeError: It is not TOML, a key is unknown or missing, or a value is not one of those allowed.
        """
        table = parse_toml(text, where, _ERRORS)
        _only(table, ("name", "default", "rule", *_CHOICES), where)
        rules = table.get("rule", [])
        if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
            raise RecipeError(f'{where}: "rule" is not a list of tables: start each rule with "[[rule]]"')
        found = []
        for number, rule in enumerate(rules, 1):
            place = f"{where}, rule {number}"
            _only(rule, ("match", "role", "scheme", *_OF_RULES), place)
            chosen = {key: _choice(rule, key, place) for key in _OF_RULES if key in rule}
            if "role" in rule and "match" in rule:
                raise RecipeError(f'{place}: give "match" or "role", not both')
            scheme = _scheme(rule, "scheme", place)
            if "role" in rule:
                found += [Rule(None, scheme, **chosen, role=role) for role in _roles(rule, place)]
            else:
                found.append(Rule(_text(rule, "match", place), scheme, **chosen))
        if name is None or "name" in table:
            name = _text(table, "name", where)
        chosen = {key: _choice(table, key, where) for key in _CHOICES if key in table}
        kinds = {key: chosen.get(key, AUTO) for key in _CHOICES}
        recipe = cls(
            name, _scheme(table, "default", where), tuple(found), kinds["activations"], kinds["method"], kinds["kv"]
        )
        # Bundles and checkpoints of earlier versions hold the presets with patterns in place of roles.
        return PRESETS[recipe.name] if _FORMER_PRESETS.get(recipe.name) == recipe else recipe

    @classmethod
    def load(cls, preset_or_path: str | Path) -> Recipe:
        """Return a preset, or read a TOML file.

        Args:
            preset_or_path: Name of a preset ("int4", "int8", "fp8", "none"), or path of a file.

        Raises:
            RecipeError: It is neither, or the file is malformed.
        """
        if isinstance(preset_or_path, str) and preset_or_path in PRESETS:
            return PRESETS[preset_or_path]
        path = Path(preset_or_path)
        if not path.is_file():
            raise RecipeError(
                f"there is no recipe {preset_or_path}: give {', '.join(PRESETS)}, or the path of a .toml file"
            )
        return cls.from_toml(read_bytes(path, _ERRORS), str(path), path.stem)


def _refusal(path: Path) -> str | None:
    try:
        Recipe.load(path)
    except RecipeError:
        return "is no recipe"
    return None


RECIPE = OutputKind("a recipe", _refusal, is_folder=False)
"""A TOML file that `Recipe.load` reads, as a kind of output."""


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped) + '"'


def _only(table: Mapping[str, object], keys: tuple[str, ...], where: str) -> None:
    unknown = sorted(set(table) - set(keys))
    if unknown:
        raise RecipeError(f"{where}: unknown key {', '.join(unknown)[:200]}; the keys are {', '.join(keys)}")


def _text(table: Mapping[str, object], key: str, where: str) -> str:
    value = table.get(key)
    if not isinstance(value, str) or not value:
        raise RecipeError(f'{where}: "{key}" is missing or is not a string')
    return value


def _roles(table: Mapping[str, object], where: str) -> list[str]:
    """Return the roles of a rule, which names one or a list."""
    value = table["role"]
    roles = value if isinstance(value, list) else [_text(table, "role", where)]
    if not roles:
        raise RecipeError(f'{where}: "role" is an empty list: name at least one of {", ".join(ROLES)}')
    for role in roles:
        if role not in ROLES:
            raise RecipeError(f"{where}: role = {quoted(str(role))} is not one of {', '.join(ROLES)}")
    return roles


def _choice(table: Mapping[str, object], key: str, where: str) -> str:
    value = _text(table, key, where)
    if value not in _CHOICES[key]:
        raise RecipeError(f"{where}: {key} = {quoted(value)} is not one of {', '.join(_CHOICES[key])}")
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
# Embedding and head get 8 bits. An error of the head is an error of every logit, and of the embedding only one row is
# read per token, so its bits cost storage but no speed. Norms are vectors, which are never quantised.
_TABLES = (of_role(EMBEDDING, Scheme(8, 128)), of_role(HEAD, Scheme(8, 128)))

PRESETS: Mapping[str, Recipe] = {
    "int4": Recipe("int4", Scheme(4, 32), (_ROUTER, *_TABLES)),
    # Activations are rounded to int8 in blocks of the weights' group. With groups of 128 instead of 32 a MoE loses
    # almost twice as much quality (docs/log.md) and takes 8 % fewer bytes.
    "int8": Recipe("int8", Scheme(8, 32), (_ROUTER, *_TABLES)),
    # Like most published FP8 checkpoints: one scale per row; embedding, head and router stay float.
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
"""The presets as earlier versions wrote them, when rules had no roles."""
