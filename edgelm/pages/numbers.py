"""Format numbers for people: 61,160 and 0.0162, with powers of ten for the smallest and largest."""

from __future__ import annotations

import math

from edgelm.sizes import format_size

_TIMES = " \N{MULTIPLICATION SIGN} 10"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float | None, digits: int = 4) -> str:
    """Format with `digits` digits, thousands separators, powers of ten below 10⁻⁴ and from 10⁹; "-" for None, NaN."""
    if value is None or math.isnan(value):
        return "-"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value != 0 and not 1e-4 <= abs(value) < 1e9:
        return _power(value, digits)
    text = f"{value:.{digits}g}"
    return f"{float(text):,.0f}" if abs(float(text)) >= 1000 or "e" in text else text


def estimate(mean: float, error: float, digits: int = 3) -> str:
    """Format a mean and its standard error with one power of ten: "0.0162 ± 0.0005"; without error the mean alone."""
    if error == 0 or not math.isfinite(mean) or not math.isfinite(error):
        return number(mean, digits)
    if mean == 0 or abs(mean) >= 1e-4:
        return f"{number(mean, digits)} ± {number(error, 1)}"
    power = math.floor(math.log10(abs(mean)))
    scaled = f"{number(mean / 10.0**power, digits)} ± {number(error / 10.0**power, 1)}"
    return f"({scaled}){_TIMES}{str(power).translate(_SUPERSCRIPT)}"


def percent(share: float | None) -> str:
    """Format a share in percent; "-" for None and NaN. A share below 1 is never written as 100 %."""
    if share is None or math.isnan(share):
        return "-"
    return "> 99.99 %" if 0.9999 < share < 1 else f"{number(100 * share)} %"


def power_label(value: float) -> str:
    """Format a number for the axis of a chart: "0.01", "10⁻⁴"."""
    text = _power(value, 3) if 0 < abs(value) < 1e-3 else number(value, 3)
    return text.removeprefix(f"1{_TIMES[:-2]}")


def size_label(value: float) -> str:
    """Format a number of bytes for the axis of a chart: "13.8 GB", and "0" without a unit."""
    return format_size(value) if value else "0"


def _power(value: float, digits: int) -> str:
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"{mantissa}{_TIMES}{str(int(exponent)).translate(_SUPERSCRIPT)}"
