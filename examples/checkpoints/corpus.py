"""Read the training text: the sources of Python's standard library, from the running interpreter."""

from __future__ import annotations

from edgelm.corpus import is_held_out
from edgelm.corpus import standard_library as read_corpus

__all__ = ["is_held_out", "read_corpus"]
