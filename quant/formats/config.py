"""Reading another tool's `quantization_config` so that nothing in it which changes the numbers goes unnoticed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from edgelm.errors import CheckpointError, UnsupportedConfigError
from edgelm.quant.scheme import MIN_GROUP, AnyScheme, Scheme

Settings = Mapping[str, object]

WAY_OUT = "start from the float checkpoint"
"""What to do about a checkpoint that cannot be read exactly."""


def unsupported(key: str, value: object, accepted: str) -> UnsupportedConfigError:
    """Return the error for a value of `quantization_config` that is not read."""
    return UnsupportedConfigError(
        f"config.json: quantization_config.{key} is {value!r}; EdgeLM reads {accepted}: {WAY_OUT}"
    )


def bits_of(settings: Settings, keys: Sequence[str], accepted: Sequence[int], default: object = None) -> int:
    """Read the width of the codes.

    Raises:
        UnsupportedConfigError: it is absent or none of `accepted`.
    """
    value = first_of(settings, keys, default)
    if isinstance(value, bool) or value not in accepted:
        raise unsupported(keys[0], value, " or ".join(map(str, accepted)))
    assert isinstance(value, int)
    return value


def group_of(settings: Settings, keys: Sequence[str], default: object = None) -> int | None:
    """Read the number of values to a scale; -1 (or null) is a row and returned as None.

    Raises:
        UnsupportedConfigError: it is no power of two of at least 16, which all that computes with groups here needs.
    """
    value = first_of(settings, keys, default)
    if value is None or value == -1:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < MIN_GROUP or value & (value - 1):
        raise unsupported(keys[0], value, f"-1 and powers of two of at least {MIN_GROUP}")
    return value


def flag(settings: Settings, key: str, default: bool) -> bool:
    """Read true or false; null counts as absent.

    Raises:
        UnsupportedConfigError: it is something else.
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
        UnsupportedConfigError: it is something else.
    """
    value = settings.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise unsupported(key, value, "an object")
    return value


def names(settings: Settings, *keys: str) -> tuple[str, ...]:
    """Read the first of `keys` that is there as a list of texts; absent or null is none.

    Raises:
        UnsupportedConfigError: it is something else.
    """
    value = first_of(settings, keys, [])
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise unsupported(keys[0], value, "a list of module names")
    return tuple(value)


def first_of(settings: Settings, keys: Sequence[str], default: object = None) -> object:
    """Return the value of the first key that is there and not null."""
    return next((settings[key] for key in keys if settings.get(key) is not None), default)


def matched(pattern: str, module: str) -> bool:
    """Whether a regular expression of the config matches from the start of a module's name.

    Raises:
        UnsupportedConfigError: it is none.
    """
    try:
        return re.match(pattern, module) is not None
    except re.error as error:
        raise unsupported("a pattern", pattern, f"regular expressions ({error})") from error


def label(scheme: AnyScheme) -> str:
    """Return a scheme's name as recipes of other tools' checkpoints have it: symmetric goes without saying."""
    return scheme.name.removesuffix("-sym") if isinstance(scheme, Scheme) else scheme.name


def contradiction(module: str, key: str) -> CheckpointError:
    """Return the error for a module that is stored quantised although the config says that it is float."""
    return CheckpointError(
        f"{module} is stored quantised, but config.json lists it in quantization_config.{key}: which of the two is "
        f"right cannot be told; fetch the checkpoint again, or {WAY_OUT}"
    )
