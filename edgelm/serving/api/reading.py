"""Read the body of a request as one of the dataclasses in `requests`."""

from __future__ import annotations

from typing import Any, TypeVar

from edgelm.errors import EdgeLMError
from edgelm.json_dataclass import ErrorFactory, InvalidField, convert, parse
from edgelm.serving.api.errors import ApiError, invalid

T = TypeVar("T")

_ERRORS = ErrorFactory(EdgeLMError, "send a JSON object")


def read_body(cls: type[T], body: bytes) -> T:
    """Return the request of a body.

    Raises:
        ApiError: it is not JSON, or a field is missing, unknown, or of a wrong type or range.
    """
    try:
        data = parse(body, "the body", _ERRORS)
    except EdgeLMError as error:
        raise invalid(None, str(error), code="invalid_json") from error
    return read_data(cls, data)


def read_data(cls: type[T], data: Any) -> T:
    """Return the request of parsed JSON. Raises as `read_body`."""
    try:
        return convert(cls, data)
    except InvalidField as problem:
        field = problem.field
        if problem.unknown:
            raise ApiError(
                400, f"{field} is not supported by this server", param=field, code="unsupported_parameter"
            ) from None
        raise invalid(field or None, f"{field or 'the body'} {problem.problem}") from None
