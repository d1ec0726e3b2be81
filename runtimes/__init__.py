"""Runtimes run bundles on devices. Importing this package loads none of them: each is imported when it is opened."""

from edgelm.runtimes.base import Runtime, SequenceBatch
from edgelm.runtimes.registry import (
    RuntimeEntry,
    engine_of,
    open_batch,
    open_runtime,
    open_tracing,
    runtimes,
)

__all__ = [
    "Runtime",
    "RuntimeEntry",
    "SequenceBatch",
    "engine_of",
    "open_batch",
    "open_runtime",
    "open_tracing",
    "runtimes",
]
