"""Is an output on disk before it gets its name, and are a full disk and partial files of other runs handled?"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from edgelm import files
from edgelm.errors import EdgeLMError
from edgelm.files import atomic_directory, atomic_file, require_disk_space
from edgelm.output_paths import OutputKind

ANY = OutputKind("anything", lambda place: None)
DEAD = 4194304  # above the largest process id of Linux

pytestmark = pytest.mark.skipif(os.name != "posix", reason="there is no fsync of folders, and no flock")


class Call(NamedTuple):
    """An observed system call, and the file or folder it changed."""

    what: str
    inode: int
    size: int


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Record the calls that make data and names durable, in order. The calls are still executed."""
    seen: list[Call] = []

    def observe(owner: Any, name: str, what: str, stat: Callable[[Any], os.stat_result]) -> None:
        real = getattr(owner, name)

        def called(first: Any, *rest: Any) -> Any:
            found = stat(first)
            result = real(first, *rest)
            if result is not False:  # False: an exchange that the file system does not support
                seen.append(Call(what, found.st_ino, found.st_size))
            return result

        monkeypatch.setattr(owner, name, called)

    observe(os, "fsync", "sync", os.fstat)
    observe(os, "rename", "name", os.stat)
    observe(os, "replace", "name", os.stat)
    observe(files, "_exchange", "name", os.stat)
    return seen


def assert_durable(calls: list[Call], place: Path) -> None:
    """Check that everything in `place` was synced before it got its name, and the name after that."""
    given = [at for at, call in enumerate(calls) if call.what == "name" and call.inode == place.stat().st_ino]
    assert len(given) == 1, calls
    before, after = calls[: given[0]], calls[given[0] + 1 :]
    for path in (place, *place.rglob("*")):
        synced = [call for call in before if call.what == "sync" and call.inode == path.stat().st_ino]
        assert synced, f"{path} got its name before its contents were synced: {calls}"
        assert path.is_dir() or synced[-1].size == path.stat().st_size, f"{path} was written to after it was synced"
    assert any(call.what == "sync" and call.inode == place.parent.stat().st_ino for call in after), calls


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("exists", [True, False])
def test_is_a_folder_synced_before_it_gets_its_name(
    calls: list[Call], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    place = tmp_path / "bundle"
    if exists:
        place.mkdir()
        (place / "old").write_text("old")
    sealed = OutputKind(
        "anything", lambda place: None, seal=lambda folder: (folder / "list").write_text("seal") and None
    )
    with atomic_directory(place, sealed, overwrite=True) as folder:
        (folder / "inner").mkdir()
        (folder / "weights").write_bytes(b"w" * 1000)
        (folder / "inner" / "golden").write_bytes(b"g" * 100)
    assert sorted(path.name for path in place.rglob("*")) == ["golden", "inner", "list", "weights"]
    assert_durable(calls, place)


@pytest.mark.parametrize("exists", [True, False])
def test_is_a_file_synced_before_it_gets_its_name(calls: list[Call], tmp_path: Path, exists: bool) -> None:
    place = tmp_path / "recipe.toml"
    if exists:
        place.write_text("old")
    with atomic_file(place) as partial:
        partial.write_text("new and longer")
    assert place.read_text() == "new and longer"
    assert_durable(calls, place)


@pytest.mark.parametrize("other_user", [False, True])
def test_is_a_partial_file_of_a_running_older_version_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other_user: bool
) -> None:
    live, dead = tmp_path / f".f.partial-{os.getppid()}", tmp_path / f".f.partial-{DEAD}"
    live.write_text("theirs")
    dead.write_text("left")
    if other_user:  # no signal may be sent to its process
        kill = os.kill

        def refused(pid: int, signal: int) -> None:
            if pid == os.getppid():
                raise PermissionError(errno.EPERM, "Operation not permitted")
            kill(pid, signal)

        monkeypatch.setattr(os, "kill", refused)
    with atomic_file(tmp_path / "f") as partial:
        partial.write_text("mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == [live.name, "f"]


def test_is_a_lock_taken_again_if_its_file_was_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends removes its lock file, possibly after another run opened it and before that run locks it."""
    real, removed = files._try_lock, []

    def removed_first(descriptor: int) -> bool:
        if not removed:
            removed.append(tmp_path / ".b.edgelm-lock")
            removed[0].unlink()
        return real(descriptor)

    monkeypatch.setattr(files, "_try_lock", removed_first)
    with atomic_directory(tmp_path / "b", ANY) as folder:
        (folder / "text").write_text("one")
        assert removed[0].is_file()
        with pytest.raises(EdgeLMError, match="another run is writing"), atomic_directory(tmp_path / "b", ANY):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_is_a_full_disk_explained(tmp_path: Path, number: int) -> None:
    with (
        pytest.raises(EdgeLMError, match=f"the disk is full while writing {tmp_path / 'b'} .* free some space"),
        atomic_directory(tmp_path / "b", ANY),
    ):
        raise OSError(number, os.strerror(number))
    assert list(tmp_path.iterdir()) == []


def test_is_another_disk_error_passed_on(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Input/output error"), atomic_directory(tmp_path / "b", ANY):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_is_too_little_disk_space_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def usage(folder: Path) -> Any:
        asked.append(folder)
        return SimpleNamespace(free=10**9)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    target = tmp_path / "not" / "yet" / "there"
    require_disk_space(target, 10**9)
    with pytest.raises(EdgeLMError, match=f"{target} needs 2 GB but {tmp_path} has 1 GB free: free some space"):
        require_disk_space(target, 2 * 10**9)
    with pytest.raises(EdgeLMError, match="free some space"):
        require_disk_space(target, 10**9 + 1)
    assert asked == [tmp_path] * 3
