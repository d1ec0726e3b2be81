"""Check of output paths: an output never replaces its own inputs, nor anything that EdgeLM did not write."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from edgelm.errors import EdgeLMError

Source = str | Path
"""An input: a folder or a file. Anything else is taken for a hub id, whose files lie in the hub's cache."""


def _no_seal(folder: Path) -> None:
    del folder


@dataclass(frozen=True)
class OutputKind:
    """A kind of output, and how to tell whether EdgeLM wrote an existing one.

    Attributes:
        name: its name in messages, such as "a bundle".
        unknown_content: function that says what in an existing file or non-empty folder EdgeLM did not write, such as
            "holds notes.txt, which ..."; None if EdgeLM wrote all of it.
        is_folder: whether it is a folder.
        seal: function that adds the mark to a complete new folder by which `unknown_content` recognises it.
    """

    name: str
    unknown_content: Callable[[Path], str | None]
    is_folder: bool = True
    seal: Callable[[Path], None] = _no_seal


def check_output(
    target: Path | str, kind: OutputKind, *, sources: Iterable[Source | None] = (), overwrite: bool = False
) -> Path:
    """Check that an output may be written to `target`.

    Args:
        target: the output's path, which need not exist.
        kind: kind of output.
        sources: inputs of the run; None entries are ignored.
        overwrite: whether an existing output of this kind may be replaced.

    Returns:
        The absolute path, with links in its parent folders resolved.

    Raises:
        EdgeLMError: an output of this kind cannot be there; `target` is, contains or lies in a source; or it exists and
            may not be replaced.
    """
    given = Path(target)
    place = resolved(given)
    if not place.name or (kind.is_folder and any(_same(place, folder) for folder in _with_parents(Path.cwd()))):
        raise EdgeLMError(f"{given} is the folder you are in, or above it: give another folder for {kind.name}")
    if place.is_symlink():
        raise EdgeLMError(f"{given} is a link to {os.path.realpath(place)}: give that path itself, or another")
    for source in sources:
        for path in _source_paths(source):
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


def first_unlisted(folder: Path, known: Callable[[str], bool]) -> str | None:
    """Return the path, relative to `folder`, of its first file or link that is not `known`; None where all are.

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
    """Return `given` as an absolute path, with links in its parents resolved. It may be a link itself, or not exist."""
    if given.name in ("", ".."):
        return Path(os.path.realpath(given))
    return Path(os.path.realpath(given.parent)) / given.name


def _check_parent(given: Path, place: Path, kind: OutputKind) -> None:
    if not kind.is_folder and not place.parent.exists():
        raise EdgeLMError(
            f"there is no folder {given.parent} to write {given.name} to: make it, or choose another place"
        )
    above = next(path for path in place.parents if path.exists())
    if not above.is_dir():
        raise EdgeLMError(f"{given} cannot be written: {above} is a file; choose another place")


def _unknown_content(place: Path, kind: OutputKind) -> str | None:
    try:
        if place.is_dir():
            if not kind.is_folder:
                return f"is a folder, but {kind.name} is a file"
            if os.path.ismount(place):
                return "is a mount point, which cannot be replaced (a folder inside it can be made)"
            return kind.unknown_content(place) if any(place.iterdir()) else None
        if kind.is_folder:
            return f"is a file, but {kind.name} is a folder"
        if not place.is_file():
            return "is no regular file"
        return kind.unknown_content(place) if place.stat().st_size else None
    except OSError as error:
        return f"cannot be looked into ({error.strerror or error})"


def _source_paths(source: Source | None) -> Iterator[Path]:
    """Yield the paths that hold a source's bytes: its folder, the targets of links in it, and its hub cache folder."""
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
    if any(_same(place, folder) for folder in _with_parents(source)):
        return "contains"
    if any(_same(folder, source) for folder in _with_parents(place)):
        return "lies in"
    return None


def _with_parents(path: Path) -> Iterator[Path]:
    real = Path(os.path.realpath(path))
    yield from (real, *real.parents)


def _same(one: Path, other: Path) -> bool:
    """Return whether both paths are one file by the system's file id, which handles case folding and mounts."""
    try:
        return one.samefile(other)
    except OSError:
        return os.path.realpath(one) == os.path.realpath(other)
