"""Read and check the fields of a config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgelm.errors import CheckpointError

# Positions are computed in float32, which holds every integer up to here.
MAX_POSITIONS = 1 << 24
MAX_COUNT = (1 << 31) - 1
MIN_FLOAT, MAX_FLOAT = 1.1754944e-38, 3.4028234e38  # smallest normal and largest float32


def shortened(value: object) -> str:
    """Return a value for an error message, cut to 80 characters."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a number of about {int(value.bit_length() * 0.30103) + 1} digits"
    try:
        text = repr(value)
    except RecursionError:
        return f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def positive_int(config: Mapping[str, Any], field: str, default: int | None = None) -> int:
    """Read an integer > 0; null counts as absent.

    Raises:
        CheckpointError: the field is absent and has no default, or is not an integer above zero.
    """
    value = config.get(field)
    if value is None:
        if default is None:
            raise CheckpointError(f"config.json: {field} is missing")
        return default
    limit = MAX_POSITIONS if field == "max_position_embeddings" else MAX_COUNT
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"config.json: {field} is {shortened(value)}; expected a whole number above zero")
    if value > limit:
        raise CheckpointError(f"config.json: {field} is {shortened(value)}; at most {limit} is possible")
    return value


def non_negative_int(config: Mapping[str, Any], field: str, default: int) -> int:
    """Read an integer >= 0; null counts as absent.

    Raises:
        CheckpointError: the field is something else.
    """
    value = config.get(field)
    return 0 if type(value) is int and value == 0 else positive_int(config, field, default)


def positive_float(config: Mapping[str, Any], field: str, default: float | None = None) -> float:
    """Read a number > 0; null counts as absent.

    Raises:
        CheckpointError: the field is absent and has no default, or is not a number above zero.
    """
    value = config.get(field)
    if value is None:
        if default is None:
            raise CheckpointError(f"config.json: {field} is missing")
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not MIN_FLOAT <= value <= MAX_FLOAT:
        raise CheckpointError(
            f"config.json: {field} is {shortened(value)}; expected a number above zero that float32 can hold"
        )
    return float(value)


def boolean(config: Mapping[str, Any], field: str, default: bool) -> bool:
    """Read true or false; null counts as absent.

    Raises:
        CheckpointError: the field is something else.
    """
    value = config.get(field)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise CheckpointError(f"config.json: {field} is {shortened(value)}; expected true or false")
    return value


def check_heads(heads: int, kv_heads: int, head_dim: int) -> None:
    """Check the numbers of heads and their size.

    Raises:
        CheckpointError: the KV heads do not divide the heads, or the head size is odd (RoPE rotates pairs).
    """
    if heads % kv_heads:
        raise CheckpointError(
            f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    if head_dim % 2:
        raise CheckpointError(f"config.json: the head width is {head_dim}; RoPE needs an even one")
