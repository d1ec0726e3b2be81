"""Do runs that write one output exclude each other, and are files of killed runs put back or removed?"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgelm import files
from edgelm.errors import EdgeLMError
from edgelm.files import atomic_directory, atomic_file, lock_folder, prepare_output, restore
from edgelm.output_paths import OutputKind

sys.path.insert(0, str(Path(__file__).parents[1]))
from faults import KILL, MODES, in_child, interrupted_at, operations

ANY = OutputKind("anything", lambda place: None)
FILE = OutputKind("a file", lambda place: None, is_folder=False)
DEAD = 4194304  # above the largest process id of Linux

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def write(target: Path, text: str, **options: bool) -> None:
    with atomic_directory(target, ANY, **options) as folder:
        (folder / "text").write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Path]:
    """An output that another process is writing. It has the same process id, as in another container."""
    target = tmp_path / "b"
    script = (
        f"import os, sys; os.getpid = lambda: {os.getpid()}\n"
        "from pathlib import Path; from edgelm.files import atomic_directory\n"
        "from edgelm.output_paths import OutputKind\n"
        "kind = OutputKind('anything', lambda place: None)\n"
        f"with atomic_directory({str(target)!r}, kind, overwrite=True) as folder:\n"
        "    (folder / 'text').write_text('theirs'); print('writing', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-P", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        yield target
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(30) == 0
    assert (target / "text").read_text() == "theirs"
    assert names(tmp_path) == ["b"]


@pytest.mark.parametrize("exists", [False, True])
def test_a_second_run_with_the_same_output_is_refused(held: Path, exists: bool) -> None:
    if exists:
        held.mkdir()
        (held / "text").write_text("old")
    with pytest.raises(EdgeLMError, match=f"another run is writing {held}: wait for it, or choose another place"):
        write(held, "mine", overwrite=True)
    assert held.exists() == exists
    assert len([name for name in names(held.parent) if ".partial-" in name]) == 1  # that of the other run


def test_changing_and_replacing_a_bundle_exclude_each_other(tmp_path: Path) -> None:
    write(tmp_path / "b", "old")
    with lock_folder(tmp_path / "b", "busy"):
        with pytest.raises(EdgeLMError, match="another run is writing"):
            write(tmp_path / "b", "new", overwrite=True)
        with pytest.raises(EdgeLMError, match=r"^busy$"), lock_folder(tmp_path / "b", "busy"):
            pass
    with atomic_directory(tmp_path / "b", ANY, overwrite=True) as folder:
        (folder / "text").write_text("new")
        with pytest.raises(EdgeLMError, match=r"^busy$"), lock_folder(tmp_path / "b", "busy"):
            pass
    assert (tmp_path / "b" / "text").read_text() == "new"
    assert names(tmp_path) == ["b"]


def test_of_two_runs_that_write_one_file_the_last_one_wins(tmp_path: Path) -> None:
    target = tmp_path / "f"
    with atomic_file(target) as one:
        one.write_text("one")
        with atomic_file(target) as other:
            other.write_text("other")
        assert target.read_text() == "other"
    assert target.read_text() == "one"
    assert names(tmp_path) == ["f"]


@pytest.mark.parametrize("old", [None, "old"])
def test_a_file_is_old_or_new_after_a_fault_at_any_operation(tmp_path: Path, old: str | None) -> None:
    target = tmp_path / "f"

    def new() -> None:
        with atomic_file(target, FILE, overwrite=True) as partial:
            partial.write_text("new")

    def again() -> None:
        with atomic_file(target) as partial:
            partial.write_text("old")
        if old is None:
            target.unlink()

    log = operations(new)
    assert any(line.startswith("replace") for line in log)
    for at in range(len(log)):
        for mode in MODES:
            again()
            assert interrupted_at(new, at, mode) in ("killed" if mode == KILL else "interrupted", 0)
            assert (target.read_text() if target.exists() else None) in (old, "new"), (log[at], mode)
            assert mode == KILL or set(names(tmp_path)) <= {"f"}, (log[at], mode)
            again()
            assert names(tmp_path) == ([] if old is None else ["f"]), (log[at], mode)


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("old", [None, "old"])
def test_a_folder_is_old_or_new_after_a_fault_at_any_operation(tmp_path: Path, old: str | None, exchange: bool) -> None:
    """Here every operation gets a fault; with real outputs (tests/export/test_faults.py) only some do."""
    target = tmp_path / "b"

    def new() -> None:
        with atomic_directory(target, ANY, overwrite=True) as folder:
            (folder / "inner").mkdir()
            for name in ("text", "inner/text"):
                (folder / name).write_text("new")

    def again() -> None:
        write(target, "old", overwrite=True)
        if old is None:
            (target / "text").unlink()
            target.rmdir()

    def found() -> str | None:
        restore(target)  # as in `Bundle.open`
        texts = {path.read_text() for path in target.rglob("text")}
        assert len(texts) == target.exists()
        assert texts != {"new"} or (target / "inner" / "text").exists()
        return texts.pop() if texts else None

    again()
    log = operations(new, exchange=exchange)
    publishing = "rename" if old is None or not exchange else "exchange"
    assert any(line.startswith(publishing) for line in log)
    for at in range(len(log)):
        for mode in MODES:
            again()
            assert names(tmp_path) == ([] if old is None else ["b"]), (log[at - 1], mode)
            assert interrupted_at(new, at, mode, exchange=exchange) in ("killed" if mode == KILL else "interrupted", 0)
            assert found() in (old, "new"), (log[at], mode)
            assert mode == KILL or set(names(tmp_path)) <= {"b", ".b.edgelm-lock"}, (log[at], mode)


def kill_between_renames(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave what a killed run leaves on a file system that cannot exchange names."""
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)

    def overwrite() -> None:
        write(target, "new", overwrite=True)

    write(target, "old", overwrite=True)
    log = operations(overwrite, exchange=False)
    write(target, "old", overwrite=True)
    second = [at for at, line in enumerate(log) if line.startswith("rename")][1]
    assert interrupted_at(overwrite, second, KILL, exchange=False) == "killed"
    assert not target.exists()


def test_an_old_folder_that_was_moved_away_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "b"
    write(target, "old")
    kill_between_renames(target, monkeypatch)
    with pytest.raises(EdgeLMError, match="exists already"):
        write(target, "next")
    assert (target / "text").read_text() == "old"
    assert names(tmp_path) == ["b"]
    kill_between_renames(target, monkeypatch)
    restore(target)
    assert (target / "text").read_text() == "old"
    kill_between_renames(target, monkeypatch)
    with pytest.raises(ZeroDivisionError), atomic_directory(target, ANY, overwrite=True):
        raise ZeroDivisionError
    assert (target / "text").read_text() == "old"
    assert names(tmp_path) == ["b"]
    restore(tmp_path / "nowhere" / "b")  # nothing to do


def test_left_files_are_removed_before_long_work(held: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EdgeLMError, match="another run is writing"):
        prepare_output(held, ANY)
    target = held.parent / "inner" / "b"
    assert prepare_output(target, ANY) == target
    write(target, "old")
    kill_between_renames(target, monkeypatch)
    with pytest.raises(EdgeLMError, match="exists already"):
        prepare_output(target, ANY)
    assert in_child(lambda: _killed_over(target)) == "killed"
    assert prepare_output(target, ANY, overwrite=True) == target
    assert names(target.parent) == ["b"]
    (target / "text").unlink()
    target.rmdir()
    target.parent.rmdir()


def test_files_of_other_outputs_are_not_touched(tmp_path: Path) -> None:
    """Names are not used as patterns, and a name that contains another is not confused with it."""
    others = ["b", "a1", "x.old", "x.partial", "[x]"]
    for name in others:
        assert in_child(lambda name=name: _killed(tmp_path / name)) == "killed"
    left = set(names(tmp_path))
    assert len(left) == 2 * len(others)
    for name in ("a*", "?", "x", "[a-z]1", "*"):
        write(tmp_path / name, "mine")
        assert set(names(tmp_path)) == left | {name}
        write(tmp_path / name, "mine", overwrite=True)
        (tmp_path / name / "text").unlink()
        (tmp_path / name).rmdir()
    for name in others:
        write(tmp_path / name, "theirs")
    assert set(names(tmp_path)) == set(others)


def _killed(target: Path) -> None:
    with atomic_directory(target, ANY):
        os.kill(os.getpid(), 9)


def test_names_of_the_largest_length_work(tmp_path: Path) -> None:
    for name in ("n" * 255, "é" * 127):
        write(tmp_path / name, "one")
        write(tmp_path / name, "two", overwrite=True)
        assert in_child(lambda name=name: _killed_over(tmp_path / name)) == "killed"
        write(tmp_path / name, "three", overwrite=True)
        with atomic_file(tmp_path / ("f" + name[1:])) as partial:
            partial.write_text("x")
    assert len(names(tmp_path)) == 4


def _killed_over(target: Path) -> None:
    with atomic_directory(target, ANY, overwrite=True):
        os.kill(os.getpid(), 9)


def test_files_left_by_older_versions_are_put_back_or_removed(tmp_path: Path) -> None:
    def leave(name: str) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "text").write_text(name)
        return tmp_path / name

    # Killed between its two renames: the only copy.
    leave(f".b.old.partial-{DEAD}")
    leave(f".b.partial-{DEAD}")
    with pytest.raises(EdgeLMError, match="exists already"):
        write(tmp_path / "b", "new")
    assert (tmp_path / "b" / "text").read_text() == f".b.old.partial-{DEAD}"
    assert names(tmp_path) == ["b"]
    # The process that writes this one still runs.
    running = leave(f".b.partial-{os.getppid()}")
    leave(f".b.old.partial-{DEAD}")
    write(tmp_path / "b", "new", overwrite=True)
    assert names(tmp_path) == [running.name, "b"]
    # A file that may be the only copy of x is not removed when x.old is written.
    only = leave(f".x.old.partial-{DEAD}")
    write(tmp_path / "x.old", "new")
    assert only.is_dir()
    unrelated = leave(".b.partial-mine")
    write(tmp_path / "b", "new", overwrite=True)
    assert unrelated.is_dir()


def test_a_refused_run_can_write_later(tmp_path: Path) -> None:
    """The lock's file is removed by who holds it: nobody may then hold a lock on a file without a name."""
    target = tmp_path / "b"
    with atomic_directory(target, ANY) as folder:
        (folder / "text").write_text("one")
        for _ in range(3):
            with pytest.raises(EdgeLMError, match="another run"):
                write(target, "two")
    write(target, "three", overwrite=True)
    assert names(tmp_path) == ["b"]
    (tmp_path / ".b.edgelm-lock").symlink_to(tmp_path / "victim")
    with pytest.raises(EdgeLMError, match="cannot be written"):
        write(target, "four", overwrite=True)
    assert not (tmp_path / "victim").exists()


def test_file_systems_without_locks_and_exchange_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(95, "not supported")

    monkeypatch.setattr(files.fcntl, "flock", unsupported)
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    target = tmp_path / "b"
    write(target, "one")
    write(target, "two", overwrite=True)
    with pytest.raises(ZeroDivisionError), atomic_directory(target, ANY, overwrite=True) as folder:
        (folder / "text").write_text("three")
        raise ZeroDivisionError
    with atomic_file(tmp_path / "f") as partial:
        partial.write_text("x")
    assert (target / "text").read_text() == "two"
    assert names(tmp_path) == ["b", "f"]


def test_an_unwritable_place_gives_an_error_of_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object, *arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(
        EdgeLMError, match=f"{tmp_path / 'b'} cannot be written \\(Permission denied\\): choose another"
    ):
        write(tmp_path / "b", "x")
