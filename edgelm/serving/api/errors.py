"""Errors of the HTTP API: OpenAI's body, a status code, and no path of the server's disk."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from edgelm.errors import (
    ContextLengthError,
    EdgeLMError,
    GenerationError,
    TokenizerError,
)

_FIELD = re.compile(
    r"(?:tools|tool_choice|parallel_tool_calls|messages|response_format|regex|grammar)(?:\.\w+|\[\d+\])*(?=[ :])"
)
"""The field that a message begins with."""


class ApiError(Exception):
    """An answer with an error.

    Args:
        status: the HTTP status.
        message: what is wrong and what to do.
        code: a word for programs, such as "unsupported_parameter".
        param: the field at fault.
        headers: further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The JSON document."""
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def invalid(param: str | None, message: str, *, code: str | None = None) -> ApiError:
    """Return the error of an invalid field."""
    return ApiError(400, message, param=param, code=code)


def unsupported(param: str, why: str) -> ApiError:
    """Return the error of a field that this server does not support."""
    return ApiError(400, f"{param} is not supported: {why}", param=param, code="unsupported_parameter")


def of_request(error: EdgeLMError, hidden: Mapping[str, str], param: str | None = None) -> ApiError:
    """Return the answer to an error that a request caused.

    Args:
        error: the error.
        hidden: paths that must not be shown, and what to write in their place.
        param: the field at fault; None: the one that the message begins with, if it does.
    """
    message = str(error)
    begins = _FIELD.match(message)
    if param is None and begins is not None:
        param = begins[0]
    for path, name in hidden.items():
        message = message.replace(path, name)
    code = "context_length_exceeded" if isinstance(error, ContextLengthError) else None
    return ApiError(400, message, param=param, code=code)


def is_of_request(error: EdgeLMError) -> bool:
    """Return whether an error is the fault of a request, not of the server."""
    return isinstance(error, (GenerationError, ContextLengthError, TokenizerError))
