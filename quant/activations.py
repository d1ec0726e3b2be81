"""Round activations and KV caches as devices do, computed in float32 ("fake quantisation"), in PyTorch.

Each function returns value(code) * scale. A float matmul of these values gives what an integer or FP8 matmul with
float32 sums gives, up to the order of the sums.

    int8 per token      scale = absmax / 127 of the row, code = round(x / scale)          arXiv 2211.10438, section 3
    int8 static         one scale for the tensor, code = round(x / scale) in -128 .. 127  same, calibrated
    int8 in blocks      as per token, for each 32 neighbouring columns                    our CPU operators
    FP8 per token       scale = absmax / largest of the row, code = nearest FP8 number    arXiv 2209.05433, section 3
    FP8 static          one scale for the tensor; what is larger becomes the largest      same, calibrated

A cache has one scale per head and token (each row [Dh] of [B, K, T, Dh]), or calibrated scales per head, or per head
and channel. The latter help keys, whose outliers stay in the same channels (arXiv 2402.02750, section 3; arXiv
2401.18079).

Shape letters: B batch, T tokens, K key/value heads, Dh head size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from edgelm.quant.fp8 import FORMS

Rounding = Callable[[Tensor], Tensor]

FP8_TYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
_INT8 = 127.0
_TINY = 2.0**-100
"""A row with a smaller largest magnitude becomes zeros, since its scale would be near float32's smallest number."""


def round_fp8(x: Tensor, form: str = "e4m3") -> Tensor:
    """Round to the nearest FP8 number, ties to the even code; clip to the largest number. float32, same shape."""
    largest = float(FORMS[form].largest)
    return x.clamp(-largest, largest).to(FP8_TYPES[form]).float()


def int8_token(x: Tensor) -> Tensor:
    """Round each row of [..., K] to int8 with the scale absmax / 127; same shape."""
    return _by_absmax(x, _INT8, torch.round)


def fp8_token(x: Tensor, form: str = "e4m3") -> Tensor:
    """Round each row of [..., K] to FP8 with the scale absmax / largest; same shape."""
    return _by_absmax(x, float(FORMS[form].largest), lambda scaled: round_fp8(scaled, form))


def int8_blocks(x: Tensor, block: int = 32) -> Tensor:
    """Round each block of `block` neighbouring columns of [..., K] to int8 with its own scale; same shape.

    If `block` does not divide K, the last block is shorter.
    """
    columns = x.shape[-1]
    padded = F.pad(x, (0, -columns % block))
    rounded = int8_token(padded.reshape(*x.shape[:-1], -1, block)).flatten(-2)
    return rounded[..., :columns]


def int8_static(x: Tensor, scale: Tensor | float) -> Tensor:
    """Round to int8 with a given positive scale, a number or broadcast against x; codes are clipped to -128 .. 127."""
    return (x / scale).round().clamp(-_INT8 - 1, _INT8) * scale


def fp8_static(x: Tensor, scale: Tensor | float, form: str = "e4m3") -> Tensor:
    """Round to FP8 with a given positive scale, a number or broadcast against x; clip to the largest number."""
    return round_fp8(x / scale, form) * scale


def _by_absmax(x: Tensor, largest: float, rounding: Rounding) -> Tensor:
    absmax = x.abs().amax(-1, keepdim=True)
    scale = torch.where(absmax < _TINY, torch.ones_like(absmax), absmax / largest)
    return torch.where(absmax < _TINY, torch.zeros_like(x), rounding(x / scale) * scale)


@dataclass(frozen=True)
class Static:
    """A rounding with a calibrated scale.

    Attributes:
        rounding: Function of the values and the scale.
        largest: Largest number of the format.
    """

    rounding: Callable[[Tensor, Tensor | float], Tensor]
    largest: float


DYNAMIC: Mapping[str, Rounding] = {
    "int8-token": int8_token,
    "int8-b32": int8_blocks,
    "fp8-token": fp8_token,
    "fp8e5m2-token": lambda x: fp8_token(x, "e5m2"),
}
"""Roundings that need no calibration. "int8-b32" is that of the native CPU operators; recipes do not use the name."""

STATIC: Mapping[str, Static] = {
    "int8-static": Static(int8_static, _INT8),
    "fp8-static": Static(fp8_static, float(FORMS["e4m3"].largest)),
    "fp8e5m2-static": Static(lambda x, scale: fp8_static(x, scale, "e5m2"), float(FORMS["e5m2"].largest)),
}
"""Roundings with calibrated scales."""


@dataclass(frozen=True)
class KvScales:
    """Calibrated scales of one layer's cache, float32: per head [K], or per head and channel [K, Dh]."""

    keys: Tensor
    values: Tensor

    def broadcast(self) -> tuple[Tensor, Tensor]:
        """Return the scales in shapes that broadcast against keys and values [B, K, T, Dh]."""
        keys, values = (s[:, None, None] if s.ndim == 1 else s[:, None, :] for s in (self.keys, self.values))
        return keys, values


def round_cache(keys: Tensor, values: Tensor, kind: str, scales: KvScales | None = None) -> tuple[Tensor, Tensor]:
    """Round keys and values [B, K, T, Dh] to the type of a cache.

    Args:
        keys: Keys after RoPE, as they are cached.
        values: Values.
        kind: Type of the cache: "float32", "float16", "int8" or "fp8" (E4M3).
        scales: Calibrated scales; None for one scale per head and token.

    Raises:
        KeyError: There is no such type.
    """
    if kind == "float32":
        return keys, values
    if kind == "float16":
        return keys.half().float(), values.half().float()
    if scales is None:
        dynamic = {"int8": int8_token, "fp8": fp8_token}[kind]
        return dynamic(keys), dynamic(values)
    static = {"int8": int8_static, "fp8": fp8_static}[kind]
    of_keys, of_values = scales.broadcast()
    return static(keys, of_keys), static(values, of_values)
