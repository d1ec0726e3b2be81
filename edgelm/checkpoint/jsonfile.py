"""Read JSON files of a checkpoint folder. Any invalid content raises `CheckpointError`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgelm.errors import CheckpointError
from edgelm.json_dataclass import ErrorFactory, parse, read_bytes, shown

MAX_JSON_BYTES = 256 << 20  # a tokenizer.json of 256 000 entries takes about 35 MB
_FETCHED = ErrorFactory(CheckpointError, "fetch the file again")


def parse_json_object(text: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object. Duplicate keys are refused, since readers resolve them differently.

    Raises:
        CheckpointError: it is not UTF-8, not JSON or not an object; the message begins with `where`.
    """
    # Published configs may have infinite numbers; the reader of a field checks whether it must be finite.
    value = parse(text, where, _FETCHED, finite=False)
    if not isinstance(value, dict):
        raise _FETCHED.at(where, f"holds {shown(value)}, expected a JSON object")
    return value


def read_json_object(path: Path, max_bytes: int = MAX_JSON_BYTES, max_values: int | None = None) -> dict[str, Any]:
    """Read the JSON object in `path`, a file of at most `max_bytes` and about `max_values` values.

    Raises:
        CheckpointError: the file is missing, unreadable, too large or not a JSON object.
    """
    text = read_bytes(path, _FETCHED, max_bytes)
    # Check the number of values first: counting is a hundred times faster than parsing.
    if max_values is not None and text.count(b",") > max_values:
        raise _FETCHED.at(str(path), f"holds more than {max_values} values")
    return parse_json_object(text, str(path))


def read_optional_json(path: Path) -> dict[str, Any]:
    """Like `read_json_object`, but return an empty object where the file does not exist."""
    return read_json_object(path) if path.exists() else {}
