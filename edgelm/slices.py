"""Cut a range into slices."""

from __future__ import annotations

from collections.abc import Iterator


def slices(count: int, size: int) -> Iterator[slice]:
    """Yield consecutive slices of `size` (at least 1) that cover 0 .. count; the last one may be shorter."""
    size = max(1, size)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
