"""The OpenAPI 3.1 document, made of the dataclasses of requests and answers and of the list of operations."""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from edgelm.json_dataclass import Length, OneOf, Range
from edgelm.serving.api.answers import ErrorAnswer
from edgelm.version import __version__

_SCALARS = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
ERRORS = {
    400: "a field is wrong or not supported",
    401: "the key is missing or wrong",
    403: "the host or the origin is not allowed",
    404: "there is no such model",
    405: "the method is not allowed",
    413: "the body is too large",
    415: "the body is not declared as JSON",
    429: "too many requests: try again later",
    500: "the server failed",
    503: "the server is closing, or has no memory for the model",
    504: "the request took too long",
}

EVENT = {
    "type": "object",
    "description": "An event: its JSON, or [DONE].",
    "properties": {"data": {"type": "string"}, "event": {"type": "string"}},
    "required": ["data"],
}


@dataclass(frozen=True)
class Operation:
    """A method of a path.

    Attributes:
        method: "GET" or "POST".
        path: the path.
        endpoint: the function that answers; its docstring describes the operation.
        request: class of the body; None where there is none.
        answer: class of the answer; None for text.
        stream: whether the answer may be a stream of events.
        open: whether it needs no key.
        query: name and description of each parameter of the query.
    """

    method: str
    path: str
    endpoint: Callable[..., Any]
    request: type[Any] | None = None
    answer: type[Any] | None = None
    stream: bool = False
    open: bool = False
    query: tuple[tuple[str, str], ...] = ()


def document(operations: Sequence[Operation], *, keys: bool) -> dict[str, Any]:
    """Return the document.

    Args:
        operations: all that the server can do.
        keys: whether requests need a key.
    """
    schemas: dict[str, Any] = {}
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation, schemas, keys=keys)
    components: dict[str, Any] = {"schemas": dict(sorted(schemas.items()))}
    if keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "edgelm serve", "version": __version__},
        "paths": paths,
        "components": components,
    }


def _operation(operation: Operation, schemas: dict[str, Any], *, keys: bool) -> dict[str, Any]:
    summary, _, rest = inspect.cleandoc(operation.endpoint.__doc__ or "").partition("\n\n")
    if operation.answer is None:
        content: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}}
    else:
        content = {"application/json": {"schema": schema_of(operation.answer, schemas)}}
    if operation.stream:
        content["text/event-stream"] = {"schema": EVENT}
    error = {"application/json": {"schema": schema_of(ErrorAnswer, schemas)}}
    described: dict[str, Any] = {
        "summary": " ".join(summary.split()),
        "operationId": f"{operation.method.lower()}{operation.path.replace('/', '_').replace('.', '_')}",
        "responses": {
            "200": {"description": "the answer", "content": content},
            **{str(status): {"description": text, "content": error} for status, text in ERRORS.items()},
        },
    }
    if rest:
        described["description"] = " ".join(rest.split())
    if operation.request is not None:
        body = schema_of(operation.request, schemas)
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    if operation.query:
        described["parameters"] = [
            {"name": name, "in": "query", "description": text, "schema": {"type": "string"}}
            for name, text in operation.query
        ]
    if keys and not operation.open:
        described["security"] = [{"key": []}]
    return described


def schema_of(hint: Any, schemas: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON schema of a type hint as `edgelm.json_dataclass` reads it.

    Args:
        hint: the hint.
        schemas: receives the schemas of dataclasses, by name.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return {}
    if origin is Annotated:
        return _limited(schema_of(arguments[0], schemas), arguments[1:])
    if origin in (Union, types.UnionType):
        return _union([schema_of(argument, schemas) for argument in arguments])
    if origin in (list, tuple, Sequence):
        return {"type": "array", "items": schema_of(arguments[0], schemas)}
    if origin in (dict, Mapping):
        return {"type": "object", "additionalProperties": schema_of(arguments[1], schemas)}
    if is_dataclass(hint):
        return _reference(hint, schemas)
    return {"type": _SCALARS[hint]}


def _limited(schema: dict[str, Any], limits: Sequence[Any]) -> dict[str, Any]:
    for limit in limits:
        if isinstance(limit, Range):
            schema["minimum"] = limit.low
            if limit.high != math.inf:
                schema["maximum"] = limit.high
        elif isinstance(limit, Length):
            what = "Items" if schema["type"] == "array" else "Length"
            schema |= {f"min{what}": limit.low, f"max{what}": limit.high}
        elif isinstance(limit, OneOf):
            schema["enum"] = list(limit.choices)
    return schema


def _union(schemas: list[dict[str, Any]]) -> dict[str, Any]:
    return {"anyOf": schemas}


def _reference(cls: Any, schemas: dict[str, Any]) -> dict[str, Any]:
    name = cls.__name__
    if name not in schemas:
        schemas[name] = {}  # a class may hold itself
        hints, texts = get_type_hints(cls, include_extras=True), described(cls)
        properties, required = {}, []
        for item in fields(cls):
            properties[item.name] = {**schema_of(hints[item.name], schemas), "description": texts[item.name]}
            if item.default is MISSING and item.default_factory is MISSING:
                required.append(item.name)
        schemas[name] = {
            "type": "object",
            "description": inspect.cleandoc(cls.__doc__).partition("\n")[0],
            "properties": properties,
            "additionalProperties": False,
            **({"required": required} if required else {}),
        }
    return {"$ref": f"#/components/schemas/{name}"}


@cache
def described(cls: Any) -> dict[str, str]:
    """Return the descriptions of a dataclass's fields, from "Attributes:" in its docstring and those of its bases."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, text = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")
        name = ""
        for line in text.splitlines():
            if not line.startswith("    "):
                break
            if line.startswith("     "):
                found[name] += " " + line.strip()
            else:
                name, _, described_as = line.strip().partition(": ")
                found[name] = described_as
    return found
