"""Write a choice of schemes as a recipe with few rules, and comments on what each rule costs.

Rules for single units come first, then rules for most experts of a layer, then rules for most units of a kind. The
default is the most frequent scheme.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgelm.quant.mixed_precision.units import Unit
from edgelm.quant.recipe import Recipe, Rule, of_role
from edgelm.quant.scheme import AnyScheme


@dataclass(frozen=True)
class Choice:
    """A unit with its scheme, expected loss in nats per token, bytes, and tokens measured with."""

    unit: Unit
    scheme: AnyScheme | None
    loss: float
    nbytes: int
    tokens: int


def make_recipe(name: str, choices: Sequence[Choice], has_router: bool) -> tuple[Recipe, list[str]]:
    """Return the recipe and a comment for each of its rules."""
    default = Counter(choice.scheme for choice in choices for _ in choice.unit.tensors).most_common(1)[0][0]
    single: list[tuple[Rule, str]] = []
    of_layer: list[tuple[Rule, str]] = []
    of_kind: list[tuple[Rule, str]] = []
    kinds: dict[str, list[Choice]] = defaultdict(list)
    for choice in choices:
        kinds[choice.unit.kind].append(choice)
    for kind, members in kinds.items():
        common = Counter(choice.scheme for choice in members).most_common(1)[0][0]
        if len(members) == 1:
            common = default
        elif common != default:
            of_kind.append((Rule(_pattern(members[0].unit, "*", "*"), common), f"most of {kind}"))
        layers: dict[int | None, list[Choice]] = defaultdict(list)
        for choice in members:
            layers[choice.unit.layer].append(choice)
        for layer, inside in layers.items():
            usual, count = Counter(choice.scheme for choice in inside).most_common(1)[0]
            if inside[0].unit.expert is None or count - sum(c.scheme == common for c in inside) < 2:
                usual = common
            else:
                rule = Rule(_pattern(inside[0].unit, str(layer), "*"), usual)
                of_layer.append((rule, f"most of {kind} of layer {layer}"))
            for choice in inside:
                if choice.scheme != usual:
                    unit = choice.unit
                    rule = Rule(_pattern(unit, str(unit.layer), str(unit.expert)), choice.scheme)
                    single.append((rule, _comment([choice])))
    router = [(of_role("router", None), "routers choose in float")] if has_router else []
    rules = router + single + of_layer + of_kind
    return Recipe(name, default, tuple(rule for rule, _ in rules)), [comment for _, comment in rules]


def to_toml(recipe: Recipe, comments: Sequence[str], head: Sequence[str]) -> str:
    """Return the recipe's TOML, with the comment `head` before it and a comment at each rule."""
    top, *blocks = recipe.to_toml().split("\n[[rule]]\n")
    assert len(blocks) == len(comments)
    lines = [*(f"# {line}".rstrip() for line in head), top.rstrip("\n")]
    for block, comment in zip(blocks, comments, strict=True):
        lines += ["", f"[[rule]] # {comment}", block.rstrip("\n")]
    return "\n".join(lines) + "\n"


def table(choices: Sequence[Choice]) -> list[Mapping[str, object]]:
    """Return, for each kind of unit, its weights, mean bits, loss in nats per token, and units per scheme."""
    rows: list[Mapping[str, object]] = []
    for kind in dict.fromkeys(choice.unit.kind for choice in choices):
        members = [choice for choice in choices if choice.unit.kind == kind]
        weights = sum(choice.unit.weights for choice in members)
        counts = Counter(scheme_name(choice.scheme) for choice in members)
        rows.append(
            {
                "kind": kind,
                "weights": weights,
                "bits": 8 * sum(choice.nbytes for choice in members) / weights,
                "loss": sum(choice.loss for choice in members),
                "schemes": dict(counts.most_common()),
            }
        )
    return rows


def scheme_name(scheme: AnyScheme | None) -> str:
    """Return the name of a scheme, or "float" for None."""
    return "float" if scheme is None else scheme.name


def _comment(choices: Sequence[Choice]) -> str:
    loss, nbytes = sum(choice.loss for choice in choices), sum(choice.nbytes for choice in choices)
    return f"{loss:.1e} nats, {nbytes} bytes, {choices[0].tokens} tokens"


def _pattern(unit: Unit, layer: str, expert: str) -> str:
    """Return the pattern of a unit's matrices; `layer` or `expert` may be "*" for all of them.

    Among the parts of a name between dots, the first equal to the layer's number is the layer, and the last equal to
    the expert's number is the expert.
    """
    names = [name.split(".") for name in unit.tensors]
    if unit.layer is None:
        return ".".join(names[0])
    parts = [_any_of(list(dict.fromkeys(words))) for words in zip(*names, strict=True)]
    parts[parts.index(str(unit.layer))] = layer
    if unit.expert is not None:
        parts[len(parts) - 1 - parts[::-1].index(str(unit.expert))] = expert
    return ".".join(parts)


def _any_of(words: Sequence[str]) -> str:
    """Return a pattern that matches these words and few others, such as [qkv]_proj, [gu]*_proj or w[13]."""
    if len(words) == 1:
        return words[0]
    start = _common_start(words)
    end = _common_start([word[len(start) :][::-1] for word in words])[::-1]
    middles = [word[len(start) : len(word) - len(end)] for word in words]
    firsts = "".join(dict.fromkeys(middle[0] for middle in middles))
    return f"{start}[{firsts}]{'' if all(len(middle) == 1 for middle in middles) else '*'}{end}"


def _common_start(words: Sequence[str]) -> str:
    alike = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*words, strict=False))
    return "".join(letters[0] for letters in alike)
