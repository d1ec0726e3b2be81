"""The training text: Python's own standard library, read from the interpreter that runs this."""

from __future__ import annotations

from edgelm.corpus import is_held_out
from edgelm.corpus import standard_library as read_corpus

__all__ = ["is_held_out", "read_corpus"]
