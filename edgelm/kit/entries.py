"""What a kit holds: files from disk, files from memory and links, each with its name in the kit."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from edgelm.errors import EdgeLMError

SUMS = "SHA256SUMS"
"""File of a kit with the hash of every other file, in the format of sha256sum."""
_CHUNK = 8 << 20
# Safe in a shell, on every file system and in SHA256SUMS, where sha256sum escapes other characters.
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+@=-]*")


@dataclass(frozen=True)
class Entry:
    """A file or link of a kit.

    Attributes:
        name: its path in the kit, with slashes.
        source: the file on disk, its bytes, or the target of a link.
        size: bytes of the contents, 0 for links.
        sha256: hash of the contents in hexadecimal; of a link, that of the file it leads to.
        executable: whether it is a program.
    """

    name: str
    source: Path | bytes | str
    size: int
    sha256: str
    executable: bool = False

    @property
    def is_link(self) -> bool:
        """Whether this is a symbolic link."""
        return isinstance(self.source, str)

    def write_to(self, stream: BinaryIO, advance: Callable[[float], None]) -> None:
        """Write the contents, and check that they are what was hashed.

        Raises:
            EdgeLMError: the file on disk has changed since.
        """
        assert not isinstance(self.source, str)
        if isinstance(self.source, bytes):
            stream.write(self.source)
            advance(self.size)
            return
        digest, size = hashlib.sha256(), 0
        with self.source.open("rb", buffering=0) as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
                if size > self.size:
                    break
                stream.write(chunk)
                advance(len(chunk))
        if size != self.size or digest.hexdigest() != self.sha256:
            raise EdgeLMError(f"{self.source} changed while the kit was written: run the command again")


def check_name(name: str) -> str:
    """Return a path inside a kit unchanged.

    Raises:
        EdgeLMError: a part of it is empty, begins with a dot, or has characters that a shell or a file system may not
            take.
    """
    if not all(_PART.fullmatch(part) for part in name.split("/")) or len(name) > 200:
        raise EdgeLMError(
            f"a kit cannot hold a file named {name!r:.120}: names have letters, digits and any of _ . + @ = -"
        )
    return name


def of_bytes(name: str, content: bytes | str, *, executable: bool = False) -> Entry:
    """Return a file from memory."""
    data = content.encode() if isinstance(content, str) else content
    return Entry(check_name(name), data, len(data), hashlib.sha256(data).hexdigest(), executable)


def of_file(name: str, path: Path, sha256: str, *, executable: bool = False) -> Entry:
    """Return a file from disk whose hash is known."""
    return Entry(check_name(name), path, path.stat().st_size, sha256, executable)


def with_sums(entries: Iterable[Entry]) -> list[Entry]:
    """Return the entries sorted by name, and SHA256SUMS first.

    Raises:
        EdgeLMError: two entries have one name, also where only their case differs.
    """
    found = sorted(entries, key=lambda entry: entry.name)
    names = [entry.name.lower() for entry in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise EdgeLMError(f"two files of the kit would be named {twice}")
    return [of_bytes(SUMS, "".join(f"{entry.sha256}  {entry.name}\n" for entry in found)), *found]
