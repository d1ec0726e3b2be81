"""The field `response_format` of a request: text, JSON, a JSON schema, a regular expression or a Lark grammar."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import llguidance

from edgelm.errors import GenerationTypeError, GenerationValueError
from edgelm.serving.constraints import json_schema
from edgelm.serving.constraints.grammar import Grammar
from edgelm.serving.constraints.vocabulary import GrammarTokenizer

MOST_CHARACTERS = 64 << 10
_PLACELESS = re.compile(r": line \d+, column \d+: ")
TYPES = ("text", "json_object", "json_schema", "regex", "grammar")


def grammar_for(response_format: object, tokenizer: GrammarTokenizer, where: str = "response_format") -> Grammar | None:
    """Return the grammar of a `response_format`; None for plain text.

    It is one of:

    - None, or `{"type": "text"}`;
    - `{"type": "json_object"}`: any JSON object;
    - `{"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}`. The schema is enforced whether `strict`
      is true or not;
    - `{"type": "regex", "regex": "[0-9]+"}`: the whole text matches;
    - `{"type": "grammar", "grammar": "start: ..."}`: a Lark grammar, in llguidance's dialect.

    Args:
        response_format: the value of the field.
        tokenizer: the bundle's vocabulary.
        where: the field's name, for messages.

    Raises:
        GenerationTypeError: a field is missing, or of a wrong type.
        GenerationValueError: the type is unknown, or the grammar is wrong, too large or cannot be enforced.
    """
    if response_format is None:
        return None
    kind = _field(response_format, "type", str, where, 'an object such as {"type": "json_object"}')
    if kind == "text":
        return None
    if kind == "json_object":
        return tokenizer.compile(json_schema.compiled({"type": "object"}), where)
    if kind == "json_schema":
        given = _field(response_format, "json_schema", Mapping, where)
        return schema_grammar(given, tokenizer, f"{where}.json_schema")
    if kind == "regex":
        return regex_grammar(_field(response_format, "regex", str, where), tokenizer, f"{where}.regex")
    if kind == "grammar":
        return lark_grammar(_field(response_format, "grammar", str, where), tokenizer, f"{where}.grammar")
    raise GenerationValueError(f"{where}.type is {kind!r:.60}: it has to be one of {', '.join(TYPES)}")


def _field(given: object, name: str, kind: type, where: str, wanted: str = "an object") -> Any:
    if not isinstance(given, Mapping):
        raise GenerationTypeError(f"{where} is {given!r:.60}: it has to be {wanted}")
    if name not in given:
        raise GenerationTypeError(f"{where}.{name} is missing")
    if not isinstance(given[name], kind):
        noun = "a string" if kind is str else "an object"
        raise GenerationTypeError(f"{where}.{name} is {given[name]!r:.60}: it has to be {noun}")
    return given[name]


def schema_grammar(given: Mapping[str, Any], tokenizer: GrammarTokenizer, where: str) -> Grammar:
    """Return the grammar of `{"name": ..., "schema": ..., "strict": ...}`. Raises as `grammar_for`."""
    strict = given.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise GenerationTypeError(f"{where}.strict is {strict!r:.60}: it has to be true or false")
    if "schema" not in given:
        raise GenerationTypeError(f"{where}.schema is missing")
    schema = json_schema.checked(given["schema"], f"{where}.schema")
    return tokenizer.compile(json_schema.grammar_text(schema, f"{where}.schema"), f"{where}.schema", special=())


def regex_grammar(pattern: str, tokenizer: GrammarTokenizer, where: str) -> Grammar:
    """Return the grammar of texts that match a regular expression (Rust's syntax) as a whole.

    Raises:
        GenerationValueError: the expression is wrong or too long.
    """
    text = llguidance.LLMatcher.grammar_from_regex(_limited(pattern, where))
    try:
        return tokenizer.compile(text, where, special=())
    except GenerationValueError as error:
        # The line and column are those of a grammar around the expression.
        raise GenerationValueError(_PLACELESS.sub(": ", str(error), count=1)) from error


def lark_grammar(grammar: str, tokenizer: GrammarTokenizer, where: str) -> Grammar:
    """Return a Lark grammar in llguidance's dialect. `<name>` stands for a special token.

    Raises:
        GenerationValueError: the grammar is wrong or too long.
    """
    text = llguidance.LLMatcher.grammar_from_lark(_limited(grammar, where))
    return tokenizer.compile(text, where, special=tokenizer.named_special(grammar))


def _limited(text: str, where: str) -> str:
    if len(text) > MOST_CHARACTERS:
        raise GenerationValueError(
            f"{where} has {len(text)} characters, more than the limit of {MOST_CHARACTERS}: make it shorter"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise GenerationValueError(f"{where} is not valid Unicode at character {error.start}") from error
    return text
