"""Parsing and formatting of sizes and numbers.

Sizes are printed in decimal units, as on download pages, disks and for memory bandwidth: 13.8 GB at 25 GB/s take
0.55 s. Both decimal and binary units are parsed.
"""

from __future__ import annotations

import re

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}


def parse_size(text: str) -> int:
    """Return the bytes of a size such as "4GB", "1.5 GiB", "800MB" or a plain number.

    Raises:
        ValueError: `text` is not a positive size.
    """
    match = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([kmgt]i?)?b?\s*", text.lower())
    size = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if not 0 < size < 1 << 63:
        raise ValueError(f"{text[:60]!r} is not a size: write for example 4GB, 1.5GiB or 800MB")
    return size


def format_size(count: float | None) -> str:
    """Format a number of bytes with three digits: "13.8 GB"; "unknown" for None."""
    if count is None:
        return "unknown"
    value = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(value) < 999.5 or unit == "TB":
            break
        value /= 1000
    if unit == "B" or abs(value) >= 99.95:
        return f"{value:,.0f} {unit}"
    return f"{value:.3g} {unit}"


def format_number(value: float, digits: int = 1) -> str:
    """Format a number with thousands separators, and with `digits` decimals below a thousand: "61,160", "271.4"."""
    return f"{value:,.{0 if abs(value) >= 1000 else digits}f}"
