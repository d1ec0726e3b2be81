"""Text to calibrate and to judge with: a file, a folder, or Python's standard library, cut into windows of tokens."""

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
"""Names the standard library's sources, as the interpreter that runs this has them."""

# Not prose-like code: third-party packages, tests, character tables, help texts as escaped strings, build leftovers.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "_bundled"}
HELD_OUT_SHARE = 20  # one file in twenty
LARGEST = 256 << 20
"""Bytes of text read at most: windows are taken evenly, so more of it would only cost time."""

Ints = NDArray[np.int64]


class Encoder(Protocol):
    """The part of `edgelm.tokenization.tokenizer.Tokenizer` that is needed here."""

    @property
    def bos_id(self) -> int | None:
        """The token put before every sequence, None where the model has none."""

    def encode(self, text: str, add_bos: bool = ...) -> list[int]:
        """Ids of a text."""


@dataclass(frozen=True)
class Corpus:
    """Documents, where they came from, and the SHA-256 of all of them."""

    name: str
    documents: tuple[str, ...]
    sha256: str


def is_held_out(name: str) -> bool:
    """Whether a file of the standard library is kept from training and calibration, by its relative path alone."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % HELD_OUT_SHARE == 0


def standard_library() -> tuple[list[str], list[str]]:
    """Sources to train or calibrate on and sources held out, each in the order of the file names."""
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


def read_corpus(source: str | Path, *, held_out: bool = False) -> Corpus:
    """Read a UTF-8 file, all UTF-8 files of a folder (hidden ones left out), or the standard library ("builtin").

    Args:
        source: path, or "builtin".
        held_out: of "builtin", the files that neither training nor calibration sees; files and folders are one whole.

    Raises:
        EdgeLMError: nothing is there, it holds no text, or it is larger than `LARGEST`.
    """
    if source == BUILTIN:
        return _corpus(BUILTIN, standard_library()[held_out])
    path = Path(source)
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = [p for p in sorted(path.rglob("*")) if p.is_file() and not _hidden(p.relative_to(path))]
    else:
        raise EdgeLMError(f'no text at {path}: give a file, a folder, or "{BUILTIN}" for Python\'s standard library')
    size = sum(file.stat().st_size for file in files)
    if size > LARGEST:
        raise EdgeLMError(f"{path} holds {format_size(size)}: give at most {format_size(LARGEST)} of text")
    documents = []
    for file in files:
        try:
            documents.append(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            if path.is_file():
                raise EdgeLMError(f"{path} is no UTF-8 text: {error}") from error
            # A folder may also hold pictures.
    documents = [text for text in documents if text.strip()]
    if not documents:
        raise EdgeLMError(f"{path} holds no text")
    return _corpus(path.name, documents)


def windows(encoder: Encoder, documents: Iterable[str], count: int, length: int) -> list[Ints]:
    """Cut `count` windows of `length` tokens, evenly spaced over the documents one after the other.

    The first token of each is the begin token where the model has one. Windows overlap where the text is short.

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
        # The length keeps ("ab", "c") and ("a", "bc") apart.
        digest.update(len(text).to_bytes(8, "little"))
        digest.update(text.encode("utf-8", errors="surrogatepass"))
    return Corpus(name, tuple(documents), digest.hexdigest())


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
