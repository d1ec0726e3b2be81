"""What an output may replace: never what it is made from, and nothing that EdgeLM did not write."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from edgelm.errors import EdgeLMError

Source = str | Path
"""A folder or a file; what is neither is taken for a hub id, whose folder lies in the hub's cache."""


def _no_seal(folder: Path) -> None:
    del folder


@dataclass(frozen=True)
class Kind:
    """A kind of output.

    Attributes:
        name: what a user calls it, "a bundle".
        unknown_content: Say what EdgeLM did not write in an existing file or non-empty folder, such as "holds
            notes.txt, which ..."; None if EdgeLM wrote all of it.
        is_folder: whether it is one.
        seal: Add to a complete new folder the mark that `unknown_content` looks for.
    """

    name: str
    unknown_content: Callable[[Path], str | None]
    is_folder: bool = True
    seal: Callable[[Path], None] = _no_seal


def check_place(
    target: Path | str, kind: Kind, *, sources: Iterable[Source | None] = (), overwrite: bool = False
) -> Path:
    """Decide whether an output may be written to `target`; returns its path, absolute and without links above it.

    Args:
        target: need not exist.
        kind: what is to be written.
        sources: what it is made from; None stands for nothing.
        overwrite: whether an existing one of this kind may be replaced.

    Raises:
        EdgeLMError: `target` is no place for an output of this kind, is, contains or lies in a source, or exists and
            may not be replaced. The message says why.
    """
    given = Path(target)
    place = resolved(given)
    if not place.name or (kind.is_folder and any(_same(place, folder) for folder in _upwards(Path.cwd()))):
        raise EdgeLMError(f"{given} is a folder to work in, not to replace: name one for {kind.name}")
    if place.is_symlink():
        raise EdgeLMError(f"{given} is a link to {os.path.realpath(place)}: name that place itself, or another")
    for source in sources:
        for path in _protected(source):
            relation = _relation(place, path)
            if relation is not None:
                raise EdgeLMError(f"{given} {relation} the input {path}: choose another place")
    _check_parent(given, place, kind)
    if not os.path.lexists(place):
        return place
    unknown = _unknown_content(place, kind)
    if unknown is not None:
        raise EdgeLMError(f"{given} exists already and {unknown}: choose another place, or move it away")
    if not overwrite:
        raise EdgeLMError(f"{given} exists already: remove it, choose another place, or pass --overwrite")
    return place


def unlisted(folder: Path, known: Callable[[str], bool]) -> str | None:
    """The first file or link in `folder` whose path, relative to it, is not `known`; None where there is none.

    Links to folders are not followed.
    """

    def fail(error: OSError) -> None:
        raise error

    for at, folders, files in os.walk(folder, onerror=fail):
        folders.sort()
        links = [name for name in folders if Path(at, name).is_symlink()]
        for name in sorted([*files, *links]):
            path = Path(at, name).relative_to(folder).as_posix()
            if not known(path):
                return path
    return None


def resolved(given: Path) -> Path:
    """`given`, absolute and with the links above it followed; itself it may be one, or not exist."""
    if given.name in ("", ".."):
        return Path(os.path.realpath(given))
    return Path(os.path.realpath(given.parent)) / given.name


def _check_parent(given: Path, place: Path, kind: Kind) -> None:
    if not kind.is_folder and not place.parent.exists():
        raise EdgeLMError(
            f"there is no folder {given.parent} to write {given.name} to: make it, or choose another place"
        )
    above = next(path for path in place.parents if path.exists())
    if not above.is_dir():
        raise EdgeLMError(f"{given} cannot be written: {above} is a file; choose another place")


def _unknown_content(place: Path, kind: Kind) -> str | None:
    try:
        if place.is_dir():
            if not kind.is_folder:
                return f"is a folder, {kind.name} a file"
            if os.path.ismount(place):
                return "is a mount point, which cannot be replaced (a folder inside it can be made)"
            return kind.unknown_content(place) if any(place.iterdir()) else None
        if kind.is_folder:
            return f"is a file, {kind.name} a folder"
        if not place.is_file():
            return "is no regular file"
        return kind.unknown_content(place) if place.stat().st_size else None
    except OSError as error:
        return f"cannot be looked into ({error.strerror or error})"


def _protected(source: Source | None) -> Iterator[Path]:
    """Where the bytes of a source lie: its folder, its files where they are links, and the hub's folder of it."""
    if source is None:
        return
    path = Path(source)
    if not path.exists():
        yield from _hub_cache()
        return
    yield path
    if not path.is_dir():
        return
    real = Path(os.path.realpath(path))
    if real.parent.name == "snapshots":
        yield real.parent.parent
    for entry in sorted(real.iterdir()):
        if entry.is_symlink():
            yield Path(os.path.realpath(entry))


def _hub_cache() -> Iterator[Path]:
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        return
    yield Path(HF_HUB_CACHE)


def _relation(place: Path, source: Path) -> str | None:
    if _same(place, source):
        return "is"
    if any(_same(place, folder) for folder in _upwards(source)):
        return "contains"
    if any(_same(folder, source) for folder in _upwards(place)):
        return "lies in"
    return None


def _upwards(path: Path) -> Iterator[Path]:
    real = Path(os.path.realpath(path))
    yield from (real, *real.parents)


def _same(one: Path, other: Path) -> bool:
    """Whether both name one file: by what the system says, which also folds case and knows mounts."""
    try:
        return one.samefile(other)
    except OSError:
        return os.path.realpath(one) == os.path.realpath(other)
