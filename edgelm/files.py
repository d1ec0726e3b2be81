"""Atomic writing of files and folders: an output is complete or absent. It is written beside `x`, then renamed to `x`.

While a run writes `x`, and after a run was killed, these may lie beside it:

    .x.edgelm-lock            locked with flock while the run lives
    .x.partial-<16 digits>    the new `x`; after the two names were exchanged, the old one
    .x.old-<16 digits>        the old `x`, on file systems that cannot exchange two names

A run that holds the lock can tell what to do from the names alone. What is named `x` is complete, and everything else
is left over and is removed. Where there is no `x`, an old one is put back first. So the clean-up is the same after an
error and after a kill.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from edgelm.errors import EdgeLMError
from edgelm.output_paths import OutputKind, Source, check_output
from edgelm.sizes import format_size

try:
    import fcntl
except ImportError:  # Windows has no flock: there, two runs that write one output are not kept apart
    fcntl = None  # type: ignore[assignment]

_LONGEST_NAME = 200  # bytes; file systems allow 255, and the hidden names are longer than the target's
_CURRENT_FOLDER = -100  # AT_FDCWD
_EXCHANGE = 2  # RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS


@contextlib.contextmanager
def disk_full_explained(target: Path) -> Iterator[None]:
    """Turn the system's "no space left" into an `EdgeLMError` that says where, and how much is free."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(target.parent).free
        raise EdgeLMError(
            f"the disk is full while writing {target} ({format_size(free)} free): nothing was left behind; "
            "free some space or choose another place"
        ) from error


def require_disk_space(target: Path, needed: int) -> None:
    """Check before any work that the disk of `target`, which need not exist, has `needed` bytes free.

    Raises:
        EdgeLMError: it has not.
    """
    parent = target.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise EdgeLMError(
            f"{target} needs {format_size(needed)} but {parent} has {format_size(free)} free: "
            "free some space or choose another place with -o"
        )


@contextlib.contextmanager
def atomic_directory(
    target: Path | str, kind: OutputKind, *, sources: Iterable[Source | None] = (), overwrite: bool = False
) -> Iterator[Path]:
    """Yield an empty folder beside `target`; it becomes `target` when the block ends without an error.

    On any exception, `KeyboardInterrupt` included, an existing `target` is unchanged and nothing is left beside it.
    After a kill or a power failure, `target` is the old folder or the new one, complete, and the next run removes what
    was left. Missing parent folders are made.

    Args:
        target: the folder to write.
        kind: kind of output, which decides whether an existing `target` may be replaced.
        sources: inputs of the run, which must not be overwritten.
        overwrite: replace an existing `target`.

    Raises:
        EdgeLMError: `target` cannot be used (`check_output`), another run is writing it, or the disk is full.
    """
    sources = tuple(sources)
    place = check_output(target, kind, sources=sources, overwrite=overwrite)
    with _parents(place.parent), _exclusive(place) as locked:
        token = _token()
        if locked:
            _clean_up(place, kind)
        check_output(target, kind, sources=sources, overwrite=overwrite)
        partial = _sibling(place, "partial", token)
        try:
            with disk_full_explained(place):
                partial.mkdir()
                yield partial
                kind.seal(partial)
                _sync_tree(partial)
                check_output(target, kind, sources=sources, overwrite=overwrite)  # the block may have taken hours
                _publish(partial, place, _sibling(place, "old", token))
        finally:
            mine = None if locked else token
            try:
                _clean_up(place, kind, mine)
            except BaseException:
                _clean_up(place, kind, mine)  # Ctrl-C while cleaning up
                raise


@contextlib.contextmanager
def atomic_file(
    target: Path | str,
    kind: OutputKind | None = None,
    *,
    sources: Iterable[Source | None] = (),
    overwrite: bool = False,
) -> Iterator[Path]:
    """Yield an empty file beside `target` to write to; it becomes `target` when the block ends without an error.

    Where several runs write one file, the last one wins. The file is synced to disk before this returns.

    Args:
        target: the file to write, in a folder that exists.
        kind: kind of output, see `atomic_directory`; None for a file that only EdgeLM writes, which needs no check.
        sources: inputs of the run, which must not be overwritten.
        overwrite: replace an existing file of this kind.

    Raises:
        EdgeLMError: `target` cannot be used (`check_output`), or the disk is full.
    """
    sources = tuple(sources)

    def checked() -> Path:
        return Path(target) if kind is None else check_output(target, kind, sources=sources, overwrite=overwrite)

    place = checked()
    _remove_partial_files(place)
    partial, descriptor = _sibling(place, "partial", _token()), -1
    try:
        with disk_full_explained(place):
            with _explained(place):
                descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            lock_file(descriptor, f"another run is writing {place}: run the command again")
            if os.name != "posix":  # there an open file cannot be renamed, and is not locked anyway
                os.close(descriptor)
                descriptor = -1
            yield partial
            sync(partial)
            checked()
            partial.replace(place)
            sync_folder(place.parent)
    finally:
        try:
            partial.unlink(missing_ok=True)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        finally:
            if descriptor >= 0:
                os.close(descriptor)


def prepare_output(
    target: Path | str, kind: OutputKind, *, sources: Iterable[Source | None] = (), overwrite: bool = False
) -> Path:
    """Check `target` with `check_output` before long work, and remove what killed runs left beside it.

    This frees the disk for the new output, and puts back an old one that a killed run had moved away.

    Raises:
        EdgeLMError: as `check_output`, or another run is writing `target`.
    """
    sources = tuple(sources)
    place = check_output(target, kind, sources=sources, overwrite=overwrite)
    if place.parent.is_dir() and (_leftovers(place) or _leftovers_of_earlier_versions(place)):
        with _exclusive(place) as locked:
            if locked:
                _clean_up(place, kind)
        check_output(target, kind, sources=sources, overwrite=overwrite)
    return place


def restore(target: Path) -> None:
    """Put back a folder that a killed run had moved away and not replaced; do nothing where there is none."""
    with contextlib.suppress(OSError, EdgeLMError):
        left = _leftovers(target)
        if any(path.name.startswith(_prefix(target, "old")) for path in left):
            with _exclusive(target) as locked:
                if locked:
                    _put_back(target, left)


@contextlib.contextmanager
def lock_folder(folder: Path, busy: str) -> Iterator[bool]:
    """Lock an existing folder against other runs; yields whether the file system has locks.

    The system releases the lock when this process ends, however it ends.

    Args:
        folder: the folder to lock.
        busy: the message of the error where another run holds the lock.

    Raises:
        EdgeLMError: another run holds the lock, or the folder was removed.
    """
    with _explained(folder):
        descriptor = os.open(folder, os.O_RDONLY) if os.name == "posix" else -1
    try:
        locked = lock_file(descriptor, busy)
        if locked and not _is_at(descriptor, folder):
            raise EdgeLMError(f"{folder} was replaced or removed just now: run the command again")
        yield locked
    finally:
        if descriptor >= 0:
            os.close(descriptor)


@contextlib.contextmanager
def _exclusive(place: Path) -> Iterator[bool]:
    """Lock `place`, which need not exist, against other runs; yields whether the file system has locks."""
    busy = f"another run is writing {place}: wait for it, or choose another place"
    path = place.parent / f".{_short(place.name)}.edgelm-lock"
    descriptor, ours = -1, False
    try:
        while not ours:
            if descriptor >= 0:
                os.close(descriptor)
                descriptor = -1
            with _explained(place):
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
            locked = lock_file(descriptor, busy)
            # A run that just ended may have removed the lock file after we opened it: then try again.
            ours = not locked or _is_at(descriptor, path)
        if place.is_dir():
            # Commands that change a bundle in place lock the folder itself.
            with lock_folder(place, busy):
                yield locked
        else:
            yield locked
    finally:
        if descriptor >= 0 and os.name != "posix":  # there an open file cannot be removed
            os.close(descriptor)
            descriptor = -1
        if ours:
            with contextlib.suppress(OSError):
                path.unlink()
        if descriptor >= 0:
            os.close(descriptor)


def lock_file(descriptor: int, busy: str) -> bool:
    """Lock an open file against other runs until it is closed; return whether the file system has locks.

    Args:
        descriptor: the open file; a negative one is not locked.
        busy: the message of the error where another run holds the lock.

    Raises:
        EdgeLMError: another run holds the lock.
    """
    try:
        return _try_lock(descriptor)
    except BlockingIOError as error:
        raise EdgeLMError(busy) from error


def _try_lock(descriptor: int) -> bool:
    """Lock an open file; return False where the file system has no locks. Raise BlockingIOError where it is locked."""
    if fcntl is None or descriptor < 0:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _parents(folder: Path) -> Iterator[None]:
    """Make `folder` and its parents; on an error, remove those that were made here."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with _explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()
        raise


@contextlib.contextmanager
def _explained(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise EdgeLMError(f"{place} cannot be written ({error.strerror or error}): choose another place") from error


def _publish(partial: Path, place: Path, old: Path) -> None:
    try:
        if not place.exists():
            partial.rename(place)
        elif not _exchange(partial, place):
            place.rename(old)
            partial.rename(place)
    except OSError as error:
        raise EdgeLMError(
            f"{place} cannot be replaced ({error.strerror or error}): choose another place, or remove it first"
        ) from error
    sync_folder(place.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names atomically; return False where the system or the file system cannot."""
    if os.name != "posix":
        return False
    libc = ctypes.CDLL(None)
    names = os.fsencode(one), os.fsencode(other)
    if hasattr(libc, "renameat2"):  # Linux
        return bool(libc.renameat2(_CURRENT_FOLDER, names[0], _CURRENT_FOLDER, names[1], _EXCHANGE) == 0)
    if hasattr(libc, "renamex_np"):  # macOS
        return bool(libc.renamex_np(*names, _EXCHANGE) == 0)
    return False


def _clean_up(place: Path, kind: OutputKind, token: str | None = None) -> None:
    """Remove what runs left beside `place`. Where `place` does not exist, put an old one back first.

    Args:
        place: the output.
        kind: kind of output.
        token: the run whose files to remove; None for those of all runs, which requires the lock.
    """
    left = _leftovers(place)
    if token is not None:
        left = [path for path in left if path.name.endswith(f"-{token}")]
    _put_back(place, left)
    if token is None:
        earlier = _leftovers_of_earlier_versions(place)
        for path in earlier:
            if ".old." in path.name[len(place.name) :] and not place.exists() and kind.unknown_content(path) is None:
                path.rename(place)
        left += earlier
    for path in left:
        _remove(path)


def _put_back(place: Path, left: list[Path]) -> None:
    for path in left:
        if path.name.startswith(_prefix(place, "old")) and not os.path.lexists(place):
            path.rename(place)


def _leftovers(place: Path) -> list[Path]:
    return [path for path in _siblings(place) if _new_name(place).fullmatch(path.name)]


def _leftovers_of_earlier_versions(place: Path) -> list[Path]:
    """List files of earlier versions: `.x.partial-<pid>`, and `.x.old.partial-<pid>` for old `x` or new `x.old`."""
    pattern = re.compile(rf"\.{re.escape(place.name)}(\.old)?\.partial-(\d{{1,10}})")
    found = []
    for path in _siblings(place):
        match = pattern.fullmatch(path.name)
        if match is None or _process_runs(int(match[2])):
            continue
        if not match[1] and place.suffix == ".old" and not place.with_suffix("").exists():
            continue  # perhaps the only copy of another target
        found.append(path)
    return found


def _remove_partial_files(place: Path) -> None:
    """Remove partial files that killed runs left. A partial file that is still being written is locked."""
    for path in _siblings(place):
        if _new_name(place).fullmatch(path.name):
            with contextlib.suppress(OSError):
                descriptor = os.open(path, os.O_RDWR)
                try:
                    if _try_lock(descriptor):
                        path.unlink(missing_ok=True)
                finally:
                    os.close(descriptor)
            continue
        match = re.fullmatch(rf"\.{re.escape(place.name)}\.partial-(\d{{1,10}})", path.name)
        if match is not None and not _process_runs(int(match[1])) and path.is_file():
            path.unlink(missing_ok=True)  # of an earlier version


def _process_runs(pid: int) -> bool:
    if os.name != "posix":
        return True  # unknown: assume that it runs
    if pid == os.getpid():
        return False  # in a container every run may have the same process id
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _token() -> str:
    return secrets.token_hex(8)


def _short(name: str) -> str:
    return name if len(os.fsencode(name)) <= _LONGEST_NAME else hashlib.sha256(os.fsencode(name)).hexdigest()


def _prefix(place: Path, what: str) -> str:
    return f".{_short(place.name)}.{what}-"


def _sibling(place: Path, what: str, token: str) -> Path:
    return place.parent / (_prefix(place, what) + token)


def _new_name(place: Path) -> re.Pattern[str]:
    return re.compile(rf"\.{re.escape(_short(place.name))}\.(partial|old)-[0-9a-f]{{16}}")


def _siblings(place: Path) -> list[Path]:
    with os.scandir(place.parent) as entries:
        return [Path(entry.path) for entry in entries if entry.name.startswith(".")]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync_tree(root: Path) -> None:
    # The data must reach the disk before the name does.
    for folder, _, files in os.walk(root):
        for name in files:
            sync(Path(folder, name))
        sync_folder(Path(folder))


def sync_folder(folder: Path) -> None:
    """Sync a folder's entries to disk (fsync)."""
    if os.name == "posix":  # elsewhere a folder cannot be opened
        with contextlib.suppress(OSError):  # some network file systems have no fsync of folders
            sync(folder)


def sync(path: Path) -> None:
    """Sync a file's contents to disk (fsync)."""
    # Windows syncs only files that are open for writing.
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
