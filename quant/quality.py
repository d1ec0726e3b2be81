"""Signal to noise ratio of each scheme: a table that tests measure again and docs/performance/schemes.md shows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgelm.quant.codec import rounded
from edgelm.quant.scheme import AnyScheme, Scheme, parse_scheme

ROWS, COLUMNS = 256, 2048
"""Shape of the measured matrices; the rows are as long as those of OLMoE and Fox."""


@dataclass(frozen=True)
class Quality:
    """Signal to quantisation noise ratio of a scheme, in dB. 6.02 dB are one bit.

    Attributes:
        scheme: Name of the scheme.
        normal: On normally distributed weights.
        plain: The same with plain rounding, whose scale comes from the largest magnitude. None for FP8, which always
            has such scales.
        heavy: On Student-t weights with 5 degrees of freedom, which have outliers.
    """

    scheme: str
    normal: float
    plain: float | None
    heavy: float


QUALITY: tuple[Quality, ...] = (
    Quality("int3-g32-sym", 15.79, 12.89, 14.01),
    Quality("int3-g32-asym", 15.90, 15.24, 14.61),
    Quality("int3-g64-sym", 15.05, 11.99, 12.84),
    Quality("int3-g64-asym", 15.08, 14.18, 13.27),
    Quality("int3-g128-sym", 14.57, 11.22, 11.97),
    Quality("int3-g128-asym", 14.58, 13.32, 12.27),
    Quality("int3-row-sym", 13.94, 9.11, 10.56),
    Quality("int3-row-asym", 13.94, 10.91, 10.59),
    Quality("int4-g32-sym", 21.84, 20.26, 19.73),
    Quality("int4-g32-asym", 22.30, 21.86, 20.99),
    Quality("int4-g64-sym", 20.92, 19.35, 18.25),
    Quality("int4-g64-asym", 21.22, 20.81, 19.33),
    Quality("int4-g128-sym", 20.28, 18.59, 17.03),
    Quality("int4-g128-asym", 20.44, 19.94, 17.92),
    Quality("int4-row-sym", 19.33, 16.47, 14.49),
    Quality("int4-row-asym", 19.32, 17.54, 14.65),
    Quality("int5-g32-sym", 27.94, 26.88, 25.72),
    Quality("int5-g32-asym", 28.72, 28.15, 27.37),
    Quality("int5-g64-sym", 26.89, 25.97, 24.07),
    Quality("int5-g64-asym", 27.47, 27.12, 25.54),
    Quality("int5-g128-sym", 26.09, 25.21, 22.64),
    Quality("int5-g128-asym", 26.52, 26.25, 23.97),
    Quality("int5-row-sym", 24.68, 23.08, 18.56),
    Quality("int5-row-asym", 24.68, 23.85, 19.27),
    Quality("int6-g32-sym", 34.12, 33.18, 31.87),
    Quality("int6-g32-asym", 35.06, 34.33, 33.71),
    Quality("int6-g64-sym", 32.96, 32.27, 30.10),
    Quality("int6-g64-asym", 33.71, 33.27, 31.79),
    Quality("int6-g128-sym", 32.07, 31.52, 28.55),
    Quality("int6-g128-asym", 32.68, 32.41, 30.12),
    Quality("int6-row-sym", 30.17, 29.39, 23.40),
    Quality("int6-row-asym", 30.33, 30.00, 24.69),
    Quality("int8-g32-sym", 46.48, 45.42, 44.25),
    Quality("int8-g32-asym", 47.58, 46.46, 46.24),
    Quality("int8-g64-sym", 45.21, 44.51, 42.37),
    Quality("int8-g64-asym", 46.10, 45.41, 44.19),
    Quality("int8-g128-sym", 44.22, 43.76, 40.71),
    Quality("int8-g128-asym", 44.97, 44.55, 42.42),
    Quality("int8-row-sym", 41.80, 41.64, 34.87),
    Quality("int8-row-asym", 42.22, 42.15, 36.53),
    Quality("fp8-b32", 32.40, None, 33.02),
    Quality("fp8-b128", 31.80, None, 32.19),
    Quality("fp8-row", 31.54, None, 31.67),
    Quality("fp8e5m2-b128", 25.80, None, 26.20),
    Quality("fp8e5m2-row", 25.58, None, 25.69),
)


def sqnr(reference: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """Return 10 log10(sum(reference**2) / sum((reference - found)**2)) in dB; infinite if they are equal."""
    exact = reference.astype(np.float64)
    noise = float(np.square(exact - found).sum())
    return float("inf") if noise == 0 else float(10 * np.log10(np.square(exact).sum() / noise))


def measure(scheme: AnyScheme, seed: int = 0) -> Quality:
    """Measure a scheme: one row of the table."""
    rng = np.random.default_rng(seed)
    normal = (0.02 * rng.standard_normal((ROWS, COLUMNS))).astype(np.float32)
    heavy = (0.02 * rng.standard_t(5, (ROWS, COLUMNS))).astype(np.float32)
    return Quality(
        scheme.name,
        sqnr(normal, rounded(normal, scheme)),
        sqnr(normal, plain_rounding(normal, scheme)) if isinstance(scheme, Scheme) else None,
        sqnr(heavy, rounded(heavy, scheme)),
    )


def plain_rounding(weight: NDArray[np.float32], scheme: Scheme) -> NDArray[np.float32]:
    """Round weights [N, K] with float16 scales absmax / (2**(bits-1) - 1), or range / (2**bits - 1) if asymmetric."""
    values = weight.reshape(weight.shape[0], scheme.groups(weight.shape[1]), -1)
    if scheme.symmetric:
        low = high = np.float32(scheme.symmetric_zero - 1)
        step = np.abs(values).max(axis=2, keepdims=True) / high
        zero = np.float32(0)
    else:
        low, high = np.float32(0), np.float32(scheme.levels - 1)
        bottom = np.minimum(values.min(axis=2, keepdims=True), 0)
        step = (np.maximum(values.max(axis=2, keepdims=True), 0) - bottom) / high
    step = step.astype(np.float16).astype(np.float32)
    inverse = np.where(step == 0, 0, 1 / np.where(step == 0, 1, step))
    if not scheme.symmetric:
        zero = np.clip(np.rint(-bottom * inverse), 0, high)
    codes = np.clip(np.rint(values * inverse), -low - zero, high - zero)
    result: NDArray[np.float32] = (codes * step).astype(np.float32)
    return result.reshape(weight.shape)


def markdown() -> Iterator[str]:
    """Yield the lines of the table in docs/performance/schemes.md."""
    yield "| scheme | bits per weight | normal, dB | plain rounding, dB | Student-t, dB |"
    yield "|---|---|---|---|---|"
    for row in QUALITY:
        bits = parse_scheme(row.scheme).bits_per_weight(COLUMNS)
        plain = "" if row.plain is None else f"{row.plain:.2f}"
        yield f"| {row.scheme} | {bits:.2f} | {row.normal:.2f} | {plain} | {row.heavy:.2f} |"
