"""The training text: Python's own standard library, read from the interpreter that runs this."""

from __future__ import annotations

from edgelm.texts import is_held_out
from edgelm.texts import standard_library as read_corpus

__all__ = ["is_held_out", "read_corpus"]
