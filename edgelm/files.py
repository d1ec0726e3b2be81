"""Outputs that are whole or absent: written beside their place and renamed into it."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from edgelm.errors import EdgeLMError

PARTIAL = ".partial-"


def _process_runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_stale_partials(target: Path) -> list[Path]:
    """Remove what a killed run left beside `target`; a partial of a process that still runs stays."""
    removed = []
    for path in target.parent.glob(f".{target.name}{PARTIAL}*"):
        pid = path.name.rpartition("-")[2]
        if pid.isdigit() and not (int(pid) != os.getpid() and _process_runs(int(pid))):
            _remove(path)
            removed.append(path)
    return removed


@contextlib.contextmanager
def disk_full_explained(target: Path) -> Iterator[None]:
    """Turn "no space left" into an error that says where and how much is free."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(target.parent).free
        raise EdgeLMError(
            f"the disk is full while writing {target} ({free / 1e9:.1f} GB free): nothing was left behind; "
            "free some space or choose another place with -o"
        ) from error


def need_disk(target: Path, needed: int) -> None:
    """Refuse before any work where `needed` bytes do not fit on the disk of `target`, which need not exist.

    Raises:
        EdgeLMError: says what is needed and what is free.
    """
    parent = target.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise EdgeLMError(
            f"{target} needs {needed / 1e9:.2f} GB but {parent} has {free / 1e9:.2f} GB free: "
            "free some space or choose another place with -o"
        )


@contextlib.contextmanager
def atomic_directory(target: Path | str, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty directory beside `target`; rename it to `target` when the block ends without an error.

    On any exception, `KeyboardInterrupt` included, the partial directory is removed and an existing `target` is
    untouched. Leftovers of killed runs are removed first.

    Raises:
        EdgeLMError: `target` exists and `overwrite` is false, its parent is not a directory, or the disk is full.
    """
    target = Path(target).absolute()
    if target.exists() and not overwrite:
        raise EdgeLMError(f"{target} exists already: remove it, choose another place, or pass --overwrite")
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_stale_partials(target)
    partial = target.parent / f".{target.name}{PARTIAL}{os.getpid()}"
    partial.mkdir()
    try:
        with disk_full_explained(target):
            yield partial
            _sync_tree(partial)
            if target.exists():
                old = target.parent / f".{target.name}.old{PARTIAL}{os.getpid()}"
                target.rename(old)
                partial.rename(target)
                _remove(old)
            else:
                partial.rename(target)
    except BaseException:
        _remove(partial)
        raise


@contextlib.contextmanager
def atomic_file(target: Path | str, *, durable: bool = False) -> Iterator[Path]:
    """Yield a path beside `target` to write to; rename it over `target` when the block ends without an error.

    `durable` has the disk hold all of it, also through a loss of power, before this returns.
    """
    target = Path(target).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}{PARTIAL}{os.getpid()}"
    try:
        with disk_full_explained(target):
            yield partial
            if durable:
                _sync(partial)
            partial.replace(target)
            if durable and os.name == "posix":
                _sync(target.parent)  # the new name too; elsewhere a folder cannot be opened
    except BaseException:
        _remove(partial)
        raise


def _sync_tree(root: Path) -> None:
    # The rename must not become durable before the data it names.
    for path in root.rglob("*"):
        if path.is_file():
            _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
