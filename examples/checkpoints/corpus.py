"""The training text: Python's own standard library, read from the interpreter that runs this."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

# Not prose-like code: third-party packages, tests, character tables, help texts as escaped strings, build leftovers.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "_bundled"}
HELD_OUT_SHARE = 20  # one file in twenty


def is_held_out(name: str) -> bool:
    """Whether a file is kept from training, by its relative path alone: the same on every machine."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % HELD_OUT_SHARE == 0


def read_corpus() -> tuple[list[str], list[str]]:
    """Texts to train on and texts held out, each in the order of the file names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    training: list[str] = []
    held_out: list[str] = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if LEFT_OUT.intersection(parts) or path.name.startswith("_sysconfigdata") or parts[0].startswith("config-"):
            continue
        text = path.read_bytes().decode("utf-8", errors="replace")
        if text.strip():
            (held_out if is_held_out("/".join(parts)) else training).append(text)
    return training, held_out
