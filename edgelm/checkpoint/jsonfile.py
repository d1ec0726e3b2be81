"""JSON files of a checkpoint folder, read so that whatever is in them ends in a `CheckpointError`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgelm.errors import CheckpointError

MAX_JSON_BYTES = 256 << 20  # a tokenizer.json of 256 000 entries takes about 35 MB


def _unique_object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key!r} stands there twice")
            seen.add(key)
    return result


def parse_json_object(text: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object; duplicate keys are refused because readers disagree on which one counts.

    Raises:
        CheckpointError: not UTF-8, not JSON, not an object; the message begins with `where`.
    """
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_object)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(f"{where}: not valid JSON ({reason}); fetch the file again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: holds a JSON {type(value).__name__}, expected an object; fetch the file again")
    return value


def read_json_object(path: Path) -> dict[str, Any]:
    """Read the JSON object in `path`.

    Raises:
        CheckpointError: the file is missing, unreadable, too large or not a JSON object.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: {size} bytes are too many for a JSON file of a checkpoint")
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    return parse_json_object(text, str(path))


def read_optional_json(path: Path) -> dict[str, Any]:
    """Like `read_json_object`; an absent file gives an empty object."""
    return read_json_object(path) if path.exists() else {}
