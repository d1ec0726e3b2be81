"""JSON schemas: limits, and errors that say where in the schema the problem is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import llguidance

from edgelm.errors import GenerationTypeError, GenerationValueError
from edgelm.serving.constraints.grammar import LIMITS
from edgelm.serving.constraints.messages import one_line

MOST_BYTES = 64 << 10
MOST_DEPTH = 64
WHITESPACE = r"\x20|\r?\n[\x20\t]{0,40}"
"""Whitespace between the parts of a JSON text: a space, or a line end and its indentation.

JSON allows any amount, and models under a grammar that does too may write line ends until their last token."""

_MOST_TRIALS = 200
_EXTENSION = "x-guidance"  # options of llguidance in a schema, which is no place for them
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_MAPS = ("properties", "patternProperties", "dependentSchemas")
_DEFINITIONS = ("$defs", "definitions")
_SINGLE = (
    "additionalItems", "additionalProperties", "contains", "else", "if", "items", "not", "propertyNames", "then",
    "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip
_UNSUPPORTED = re.compile(r"Unimplemented keys: (\[.*\])")


def checked(value: object, where: str, *, most: int = MOST_BYTES) -> dict[str, Any]:
    """Check the type, depth and size of a schema, and return it without options of llguidance.

    Raises:
        GenerationTypeError: it is no JSON object.
        GenerationValueError: it is too large or too deep, or not JSON.
    """
    if not isinstance(value, Mapping):
        raise GenerationTypeError(f"{where} is {value!r:.60}: it has to be a JSON schema, an object")
    if _deep(value):
        raise GenerationValueError(f"{where} is nested more than {MOST_DEPTH} levels deep: make it flatter")
    schema = {key: part for key, part in value.items() if key != _EXTENSION}
    size = len(text_of(schema, where).encode())
    if size > most:
        raise GenerationValueError(f"{where} has {size} bytes, more than the limit of {most}: make it smaller")
    return schema


def text_of(schema: object, where: str) -> str:
    """Return a schema as JSON text. Raises GenerationValueError if it is not JSON."""
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (TypeError, ValueError) as error:
        raise GenerationValueError(f"{where} is not JSON: {error}") from error
    return text


def _deep(value: object) -> bool:
    level = [value]
    for _ in range(MOST_DEPTH):
        below: list[object] = []
        for part in level:
            if isinstance(part, Mapping):
                below += part.values()
            elif isinstance(part, list | tuple):
                below += part
        if not below:
            return False
        level = below
    return True


def grammar_text(schema: Mapping[str, Any], where: str, *, lenient: bool = False) -> str:
    """Return the grammar of a checked schema, and raise its errors with their place.

    Args:
        schema: the schema.
        where: its name, for messages.
        lenient: ignore keywords that cannot be enforced.

    Raises:
        GenerationValueError: the schema is wrong, cannot be satisfied, or has a keyword that is not supported.
    """
    if lenient:
        schema = {**schema, _EXTENSION: {"lenient": True}}
    message = _error(schema)
    if message:
        path = _locate(schema, message)
        raise GenerationValueError(f"{where}, at {path}: {_explained(message)}")
    return compiled(schema)


def compiled(schema: Mapping[str, Any]) -> str:
    """Return the grammar of a schema that was checked."""
    return str(
        llguidance.LLMatcher.grammar_from_json_schema(
            json.dumps(schema, ensure_ascii=False), overrides={"whitespace_pattern": WHITESPACE}
        )
    )


def _error(schema: object) -> str:
    """Return why llguidance refuses a schema; empty if it does not."""
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    if not isinstance(schema, Mapping):
        return "schema must be an object or boolean"
    try:
        return str(llguidance.LLMatcher.validate_grammar(compiled(schema), limits=LIMITS))
    except ValueError as error:
        return str(error)


def _parts(root: Mapping[str, Any], schema: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Yield the direct subschemas of a schema with their paths, and the definition that it refers to."""
    for key in _LISTS:
        if isinstance(schema.get(key), list):
            yield from ((f"/{key}/{i}", part) for i, part in enumerate(schema[key]))
    for key in _MAPS:
        if isinstance(schema.get(key), Mapping):
            yield from ((f"/{key}/{_escaped(name)}", part) for name, part in schema[key].items())
    for key in _SINGLE:
        if key in schema:
            yield f"/{key}", schema[key]
    for key in _DEFINITIONS:
        parts = root.get(key)
        for name, part in parts.items() if isinstance(parts, Mapping) else ():
            path = f"#/{key}/{_escaped(name)}"
            if schema.get("$ref") == path and part is not schema:
                yield path, part


def _escaped(name: object) -> str:
    return str(name).replace("~", "~0").replace("/", "~1")


def _locate(root: Mapping[str, Any], message: str) -> str:
    """Return the JSON pointer of the smallest subschema that is refused for the same reason."""
    shared = {key: root[key] for key in ("$schema", *_DEFINITIONS, _EXTENSION) if key in root}
    path, schema, trials = "#", root, 0
    below = True
    while below:
        below = False
        for step, part in _parts(root, schema):
            trials += 1
            if trials > _MOST_TRIALS:
                break
            if isinstance(part, Mapping) and _error({**shared, **part}) == message:
                path = step if step.startswith("#") else path + step
                schema, below = part, True
                break
    return path


def _explained(message: str) -> str:
    found = _UNSUPPORTED.match(message)
    if found:
        keys = sorted(json.loads(found[1]))
        names = " and ".join(json.dumps(key) for key in keys)
        noun = "keyword" if len(keys) == 1 else "keywords"
        return f"the {noun} {names} cannot be enforced: leave {'it' if len(keys) == 1 else 'them'} out"
    if message.startswith("oneOf"):
        return 'the keyword "oneOf" cannot be enforced for these alternatives, which may overlap: use "anyOf"'
    if message.startswith("Resource"):
        return 'a "$ref" leads out of the schema: put what it means into "$defs"'
    if message.startswith("Unknown format: "):
        return f"the format {json.dumps(one_line(message)[16:])} cannot be enforced: leave it out"
    if message.startswith("regex parse error"):
        return f"its pattern cannot be used: {one_line(message)}"
    text = one_line(message)
    return text[:1].lower() + text[1:] if text[:2] != "JS" else text
