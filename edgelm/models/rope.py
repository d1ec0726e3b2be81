"""Rotary position embeddings (RoPE, arXiv 2104.09864): from a config.json to a table of inverse frequencies.

Every published method of context extension is another table. It is computed in float32, as in transformers'
modeling_rope_utils. `dynamic` changes the table only beyond max_position_embeddings, which no bundle exceeds.
`longrope` has one table up to original_max_position_embeddings and another beyond; the context is limited to the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import CheckpointError, UnsupportedConfigError
from edgelm.models.config_fields import positive_float, positive_int, shortened
from edgelm.models.spec import Rope

FIELDS = ("rope_theta", "rope_scaling", "rope_parameters")
_ORIGINAL = "original_max_position_embeddings"

Floats = NDArray[np.float32]
Scaled = tuple[Floats, float, int]
"""Inverse frequencies [Dh / 2], the attention factor, and the positions up to which they are valid."""


def read_rope(config: Mapping[str, Any], head_dim: int, context: int, theta: float = 10000.0) -> tuple[Rope, int]:
    """Return the RoPE table, and the positions up to which it is valid, at most `context`.

    Args:
        config: contents of config.json, with `rope_theta` and `rope_scaling`, or transformers 5's `rope_parameters`.
        head_dim: Dh, even.
        context: max_position_embeddings.
        theta: the default base.

    Raises:
        UnsupportedConfigError: the kind of RoPE is not implemented, or fields contradict each other.
        CheckpointError: a parameter is missing or invalid.
    """
    found = problems(config)
    if found:
        raise UnsupportedConfigError(f"config.json: {'; '.join(found.values())}: not implemented")
    base = _theta(config, theta)
    field, table = _parameters(config)
    frequencies, scale, limit = _KINDS[_kind(table)](table, field, base, head_dim, context)
    return Rope(tuple(frequencies.tolist()), scale), limit


def problems(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the fields of RoPE that are not implemented, each with a description."""
    found = {}
    for field in FIELDS[1:]:
        table = config.get(field)
        if table is None:
            continue
        if not isinstance(table, Mapping):
            found[field] = f"{field} {shortened(table)} (no table of RoPE)"
            continue
        kind = _kind(table)
        if kind not in _KINDS:
            meaning = _UNKNOWN.get(kind, "unknown") if isinstance(kind, str) else "unknown"
            factor = f", factor {shortened(table['factor'])}" if "factor" in table else ""
            found[field] = f"{field}.rope_type {kind if isinstance(kind, str) else shortened(kind)} ({meaning}{factor})"
            continue
        wrong = [
            f"{field}.{key} {shortened(value)} (RoPE other than plain)"
            for key, value in table.items()
            if key not in _READ[kind]
            and key not in _HARMLESS
            and value is not None
            and not (key in _ONE and value == 1)
        ]
        if wrong:
            found[field] = "; ".join(wrong)
    return found


_UNKNOWN = {"mrope": "RoPE over several axes", "proportional": "RoPE on a part of each head"}
_HARMLESS = ("rope_type", "type", "rope_theta", "max_position_embeddings", _ORIGINAL)
# Keys that are allowed with the value 1, which changes nothing.
_ONE = ("partial_rotary_factor", "factor", "attention_factor")


def _kind(table: Mapping[str, Any]) -> Any:
    kind = table.get("rope_type") or table.get("type") or "default"
    if kind == "linear" and table.get("factor") == 1:
        return "default"
    return "longrope" if kind == "su" else kind


def _theta(config: Mapping[str, Any], default: float) -> float:
    thetas: dict[str, float] = {}
    if config.get("rope_theta") is not None:
        thetas["rope_theta"] = positive_float(config, "rope_theta")
    for field in FIELDS[1:]:
        table = config.get(field)
        if table is not None and table.get("rope_theta") is not None:
            thetas[f"{field}.rope_theta"] = positive_float(table, "rope_theta")
    if len(set(thetas.values())) > 1:
        raise UnsupportedConfigError(f"config.json gives several RoPE bases: {thetas}; keep one")
    return next(iter(thetas.values()), default)


def _parameters(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Return the field with the RoPE parameters, and the parameters.

    `original_max_position_embeddings` at the top level of config.json takes precedence, as in transformers.
    """
    given = {field: dict(config[field]) for field in FIELDS[1:] if config.get(field) is not None}
    kinds = {_kind(table) for table in given.values()} - {"default"}
    if len(kinds) > 1:
        raise UnsupportedConfigError(f"config.json gives several kinds of RoPE: {', '.join(sorted(kinds))}; keep one")
    field, table = next(
        ((field, table) for field, table in given.items() if _kind(table) != "default"), ("rope_parameters", {})
    )
    if config.get(_ORIGINAL) is not None:
        table[_ORIGINAL] = config[_ORIGINAL]
    return field, table


def inverse_frequencies(theta: float, head_dim: int, factor: float | Floats = 1.0) -> Floats:
    """Return 1 / (factor * theta^(2i / Dh)) for i < Dh / 2, in float32; the power is float64, rounded to float32."""
    steps = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    powers: Floats = (np.float64(theta) ** steps.astype(np.float64)).astype(np.float32)
    return np.float32(1) / (np.asarray(factor, np.float32) * powers)


def _number(table: Mapping[str, Any], field: str, key: str, default: float | None = None) -> float:
    return positive_float({f"{field}.{key}": table.get(key)}, f"{field}.{key}", default)


def _int(table: Mapping[str, Any], field: str, key: str, default: int | None = None) -> int:
    return positive_int({f"{field}.{key}": table.get(key)}, f"{field}.{key}", default)


def _plain(table: Mapping[str, Any], field: str, theta: float, head_dim: int, context: int) -> Scaled:
    return inverse_frequencies(theta, head_dim), 1.0, context


def _linear(table: Mapping[str, Any], field: str, theta: float, head_dim: int, context: int) -> Scaled:
    return inverse_frequencies(theta, head_dim) / np.float32(_number(table, field, "factor")), 1.0, context


def _llama3(table: Mapping[str, Any], field: str, theta: float, head_dim: int, context: int) -> Scaled:
    """Llama 3: multiply long wavelengths by the factor, keep short ones, interpolate between them."""
    factor, low, high = (
        np.float32(_number(table, field, key)) for key in ("factor", "low_freq_factor", "high_freq_factor")
    )
    original = _int(table, field, _ORIGINAL, context)
    if high <= low:
        raise CheckpointError(f"config.json: {field}.high_freq_factor {high:g} is not above low_freq_factor {low:g}")
    frequencies = inverse_frequencies(theta, head_dim)
    wavelengths = np.float32(2 * math.pi) / frequencies
    smooth = (np.float32(original) / wavelengths - low) / (high - low)
    between = (1 - smooth) * frequencies / factor + smooth * frequencies
    scaled = np.where(wavelengths > original / low, frequencies / factor, frequencies)
    is_between = (wavelengths >= original / high) & (wavelengths <= original / low)
    return np.where(is_between, between, scaled).astype(np.float32), 1.0, context


def _yarn(table: Mapping[str, Any], field: str, theta: float, head_dim: int, context: int) -> Scaled:
    """YaRN (arXiv 2309.00071, sections 3.2 and 3.4)."""
    original = _int(table, field, _ORIGINAL, context)
    factor = _number(table, field, "factor", context / original)
    scale = _attention_factor(table, field, factor)
    fast, slow = _number(table, field, "beta_fast", 32.0), _number(table, field, "beta_slow", 1.0)

    def dimension(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(fast), dimension(slow)
    if table.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - low) / ((high if high != low else high + 0.001) - low)
    kept = (1 - np.clip(ramp, 0, 1)).astype(np.float32)
    frequencies = inverse_frequencies(theta, head_dim)
    scaled = inverse_frequencies(theta, head_dim, factor)
    return (scaled * (1 - kept) + frequencies * kept).astype(np.float32), scale, context


def _attention_factor(table: Mapping[str, Any], field: str, factor: float) -> float:
    if table.get("attention_factor") is not None:
        return _number(table, field, "attention_factor")

    def of(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if table.get("mscale") and table.get("mscale_all_dim"):
        return of(_number(table, field, "mscale")) / of(_number(table, field, "mscale_all_dim"))
    return of(1.0)


def _longrope(table: Mapping[str, Any], field: str, theta: float, head_dim: int, context: int) -> Scaled:
    """LongRoPE (arXiv 2402.13753): a factor for each frequency. Only the factors for short contexts are used."""
    original = _int(table, field, _ORIGINAL, context)
    factor = _number(table, field, "factor", context / original)
    short = table.get("short_factor")
    good = isinstance(short, list) and len(short) == head_dim // 2
    if not good or not all(isinstance(f, int | float) and not isinstance(f, bool) and f > 0 for f in short or ()):
        raise CheckpointError(
            f"config.json: {field}.short_factor is {shortened(short)}; expected {head_dim // 2} numbers above zero"
        )
    scale = table.get("attention_factor")
    if scale is None:
        scale = 1.0 if factor <= 1 or original <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return inverse_frequencies(theta, head_dim, np.asarray(short, np.float32)), float(scale), min(context, original)


_KINDS: Mapping[str, Callable[[Mapping[str, Any], str, float, int, int], Scaled]] = {
    "default": _plain,
    "linear": _linear,
    "dynamic": _plain,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
_READ: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("factor", "attention_factor", "short_factor", "long_factor"),
}
"""Keys that each kind of RoPE reads."""
