"""Cutting a range into parts."""

from __future__ import annotations

from collections.abc import Iterator


def slices(count: int, size: int) -> Iterator[slice]:
    """Cut 0 .. count into slices of `size`, at least 1; the last one may be shorter."""
    size = max(1, size)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
