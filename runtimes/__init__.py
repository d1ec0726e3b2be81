"""What runs a bundle on a device. Importing it loads no runtime: each is imported when it is opened."""

from edgelm.runtimes.base import Runtime, SequenceBatch
from edgelm.runtimes.registry import RuntimeEntry, open_batch, open_runtime, open_tracing, runtimes

__all__ = ["Runtime", "RuntimeEntry", "SequenceBatch", "open_batch", "open_runtime", "open_tracing", "runtimes"]
