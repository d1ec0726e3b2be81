"""Read another tool's `quantization_config` strictly: an unsupported value of a field that matters is an error."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from edgelm.errors import CheckpointError, UnsupportedConfigError
from edgelm.quant.scheme import MIN_GROUP, AnyScheme, Scheme

Settings = Mapping[str, object]

ADVICE = "start from the float checkpoint"
"""Advice in errors about a checkpoint that cannot be read exactly."""


def unsupported(key: str, value: object, accepted: str) -> UnsupportedConfigError:
    """Return the error for an unsupported value in `quantization_config`."""
    return UnsupportedConfigError(
        f"config.json: quantization_config.{key} is {value!r}, but EdgeLM reads {accepted}: {ADVICE}"
    )


def bits_of(settings: Settings, keys: Sequence[str], accepted: Sequence[int], default: object = None) -> int:
    """Read the bits per code.

    Raises:
        UnsupportedConfigError: They are missing or not among `accepted`.
    """
    value = first_of(settings, keys, default)
    if isinstance(value, bool) or value not in accepted:
        raise unsupported(keys[0], value, " or ".join(map(str, accepted)))
    assert isinstance(value, int)
    return value


def group_of(settings: Settings, keys: Sequence[str], default: object = None) -> int | None:
    """Read the number of values per scale; -1 or null means a whole row and gives None.

    Raises:
        UnsupportedConfigError: It is not a power of two of at least 16, the only groups that EdgeLM supports.
    """
    value = first_of(settings, keys, default)
    if value is None or value == -1:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < MIN_GROUP or value & (value - 1):
        raise unsupported(keys[0], value, f"-1 and powers of two of at least {MIN_GROUP}")
    return value


def flag(settings: Settings, key: str, default: bool) -> bool:
    """Read true or false; null counts as missing.

    Raises:
        UnsupportedConfigError: It is something else.
    """
    value = settings.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise unsupported(key, value, "true or false")
    return value


def table(settings: Settings, key: str) -> Mapping[str, object]:
    """Read an object; null counts as empty.

    Raises:
        UnsupportedConfigError: It is something else.
    """
    value = settings.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise unsupported(key, value, "an object")
    return value


def names(settings: Settings, *keys: str) -> tuple[str, ...]:
    """Read a list of strings from the first of `keys` that is present; missing or null gives an empty list.

    Raises:
        UnsupportedConfigError: It is something else.
    """
    value = first_of(settings, keys, [])
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise unsupported(keys[0], value, "a list of module names")
    return tuple(value)


def first_of(settings: Settings, keys: Sequence[str], default: object = None) -> object:
    """Return the value of the first key that is present and not null."""
    return next((settings[key] for key in keys if settings.get(key) is not None), default)


def matched(pattern: str, module: str) -> bool:
    """Return whether a regular expression of the config matches the start of a module's name.

    Raises:
        UnsupportedConfigError: It is not a regular expression.
    """
    try:
        return re.match(pattern, module) is not None
    except re.error as error:
        raise unsupported("a pattern", pattern, f"regular expressions ({error})") from error


def label(scheme: AnyScheme) -> str:
    """Return a scheme's name for the recipe of another tool's checkpoint: without "-sym"."""
    return scheme.name.removesuffix("-sym") if isinstance(scheme, Scheme) else scheme.name


def contradiction(module: str, key: str) -> CheckpointError:
    """Return the error for a module that is stored quantised although the config says that it is float."""
    return CheckpointError(
        f"{module} is stored quantised, but quantization_config.{key} in config.json says that it is not: fetch the "
        f"checkpoint again, or {ADVICE}"
    )
