"""Text for calibration and evaluation: a file, a folder or Python's standard library, cut into windows of tokens."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import EdgeLMError
from edgelm.sizes import format_size

BUILTIN = "builtin"
"""Name of the corpus of the running interpreter's standard library sources."""

# Third-party packages, tests, character tables, help texts as escaped strings, build output.
EXCLUDED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "pydoc_data",
    "_bundled",
}
HELD_OUT_SHARE = 20  # one file in twenty
MAX_TEXT_BYTES = 256 << 20
"""Most bytes of text to read. Windows are spaced evenly over the text, so more text only costs time."""

Ints = NDArray[np.int64]


class Encoder(Protocol):
    """The part of `edgelm.tokenization.tokenizer.Tokenizer` that this module uses."""

    @property
    def bos_id(self) -> int | None:
        """The begin-of-sequence token; None where the model has none."""

    def encode(self, text: str, add_bos: bool = ...) -> list[int]:
        """Return the token ids of a text."""


@dataclass(frozen=True)
class Corpus:
    """Documents, the name of their source, and the SHA-256 of all of them."""

    name: str
    documents: tuple[str, ...]
    sha256: str


def is_held_out(name: str) -> bool:
    """Return whether a standard library file is held out from training and calibration, by a hash of its path."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % HELD_OUT_SHARE == 0


def standard_library() -> tuple[list[str], list[str]]:
    """Return the standard library's sources to train or calibrate on, and the held-out ones, sorted by file name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    training: list[str] = []
    held_out: list[str] = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if (
            EXCLUDED_FOLDERS.intersection(parts)
            or path.name.startswith("_sysconfigdata")
            or parts[0].startswith("config-")
        ):
            continue
        text = path.read_bytes().decode("utf-8", errors="replace")
        if text.strip():
            (held_out if is_held_out("/".join(parts)) else training).append(text)
    return training, held_out


def read_corpus(source: str | Path, *, held_out: bool = False) -> Corpus:
    """Read a UTF-8 file, all UTF-8 files of a folder (hidden ones left out), or the standard library ("builtin").

    Args:
        source: path, or "builtin".
        held_out: of "builtin", read the files that training and calibration do not see. Ignored for other sources.

    Raises:
        EdgeLMError: `source` does not exist, holds no text, or is larger than `MAX_TEXT_BYTES`.
    """
    if source == BUILTIN:
        return _corpus(BUILTIN, standard_library()[held_out])
    path = Path(source)
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = [p for p in sorted(path.rglob("*")) if p.is_file() and not _hidden(p.relative_to(path))]
    else:
        raise EdgeLMError(
            f'there is no text at {path}: give a file, a folder, or "{BUILTIN}" for Python\'s standard library'
        )
    size = sum(file.stat().st_size for file in files)
    if size > MAX_TEXT_BYTES:
        raise EdgeLMError(f"{path} holds {format_size(size)}: give at most {format_size(MAX_TEXT_BYTES)} of text")
    documents = []
    for file in files:
        try:
            documents.append(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            if path.is_file():
                raise EdgeLMError(f"{path} is not UTF-8 text ({error}): convert it, or give another file") from error
            # Skip binary files of a folder, such as pictures.
    documents = [text for text in documents if text.strip()]
    if not documents:
        raise EdgeLMError(f"{path} holds no text: give another file or folder")
    return _corpus(path.name, documents)


def windows(encoder: Encoder, documents: Iterable[str], count: int, length: int) -> list[Ints]:
    """Cut `count` windows of `length` tokens, evenly spaced over the concatenated documents.

    The first token of each window is replaced by the begin-of-sequence token where the model has one. Windows overlap
    where the text is short.

    Returns:
        `count` arrays int64 [length].

    Raises:
        EdgeLMError: the documents have fewer than `length` tokens together.
    """
    ids = np.array([token for text in documents for token in encoder.encode(text, add_bos=False)], np.int64)
    if len(ids) < length:
        raise EdgeLMError(f"the text has {len(ids)} tokens, one window alone needs {length}: give more text")
    starts = np.linspace(0, len(ids) - length, count).astype(int)
    found = [ids[start : start + length].copy() for start in starts]
    if encoder.bos_id is not None:
        for window in found:
            window[0] = encoder.bos_id
    return found


def _corpus(name: str, documents: Sequence[str]) -> Corpus:
    digest = hashlib.sha256()
    for text in documents:
        # With the length, ("ab", "c") and ("a", "bc") have different hashes.
        digest.update(len(text).to_bytes(8, "little"))
        digest.update(text.encode("utf-8", errors="surrogatepass"))
    return Corpus(name, tuple(documents), digest.hexdigest())


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
