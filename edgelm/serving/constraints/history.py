"""Earlier calls of tools and their results, as chat templates take them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgelm.errors import GenerationTypeError, GenerationValueError

_SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")


@dataclass(frozen=True)
class History:
    """How a chat template takes an assistant's message with `tool_calls`.

    Attributes:
        text: it wants the arguments as text; most templates want them as an object.
        empty_content: it wants a content, even if that is empty.
        short_ids: it wants ids of 9 letters and digits.
    """

    text: bool = False
    empty_content: bool = False
    short_ids: bool = False

    def messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return a conversation as the template takes it. Messages without calls are as they were.

        Clients send arguments as JSON text.

        Raises:
            GenerationTypeError: `tool_calls` is malformed.
            GenerationValueError: arguments are not a JSON object.
        """
        return [self._message(message, f"messages[{i}]") for i, message in enumerate(messages)]

    def _message(self, message: Mapping[str, Any], where: str) -> dict[str, Any]:
        given = dict(message) if isinstance(message, Mapping) else {}
        if not given:
            raise GenerationTypeError(f"{where} is {message!r:.60}: it has to be an object with a role")
        if isinstance(given.get("tool_call_id"), str):
            given["tool_call_id"] = self._id(given["tool_call_id"])
        calls = given.get("tool_calls")
        if calls is None:
            return given
        if not isinstance(calls, Sequence) or isinstance(calls, str | bytes):
            raise GenerationTypeError(f"{where}.tool_calls is {calls!r:.60}: it has to be a list of calls")
        if not calls:  # templates take an empty list for calls
            del given["tool_calls"]
            return given
        given["tool_calls"] = [self._call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
        if given.get("content") is None and self.empty_content:
            given["content"] = ""
        return given

    def _call(self, call: object, where: str) -> dict[str, Any]:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(call, Mapping) or not isinstance(function, Mapping):
            raise GenerationTypeError(
                f'{where} has to be like {{"id": ..., "type": "function", '
                '"function": {"name": ..., "arguments": "{}"}}'
            )
        if not isinstance(function.get("name"), str):
            raise GenerationTypeError(f"{where}.function.name is {function.get('name')!r:.60}: it has to be a string")
        arguments = _object(function.get("arguments"), f"{where}.function.arguments")
        given = {**function, "arguments": json.dumps(arguments, ensure_ascii=False) if self.text else arguments}
        result = {**call, "type": "function", "function": given}
        if isinstance(call.get("id"), str):
            result["id"] = self._id(call["id"])
        return result

    def _id(self, given: str) -> str:
        if not self.short_ids or _SHORT_ID.fullmatch(given):
            return given
        return hashlib.sha256(given.encode("utf-8", "surrogatepass")).hexdigest()[:9]


def _object(arguments: object, where: str) -> dict[str, Any]:
    if arguments is None or arguments == "":
        return {}
    value = arguments
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise GenerationValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(value, Mapping):
        raise GenerationValueError(f"{where} is {arguments!r:.60}: it has to be a JSON object")
    return dict(value)
