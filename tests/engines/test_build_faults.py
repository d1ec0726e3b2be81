"""Does a bundle stay valid wherever `edgelm build` is killed or interrupted, and does the next build clean up?"""

from __future__ import annotations

import dataclasses
import io
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from edgelm.bundle import MANIFEST, Bundle
from edgelm.errors import EdgeLMError
from edgelm.files import lock_folder
from edgelm.progress import Bars
from edgelm.runtimes.tensorrt import build as building
from edgelm.runtimes.tensorrt.build import build_bundle
from edgelm.runtimes.tensorrt.builder import BuildOptions
from edgelm.runtimes.tensorrt.engine_info import EngineInfo, engines

sys.path.insert(0, str(Path(__file__).parents[1]))
from faults import AFTER, KILL, interrupted_at, operations

SMS = (86, 89, 120)


@pytest.fixture
def quick(copied: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """Make builds return the engine of this bundle's export, since building another takes seconds."""
    (made,) = engines(copied)
    kept = shutil.copyfile(copied.file(made.file), tmp_path / "kept.engine")

    def build(library: object, graph: Path, out: Path, *arguments: Any) -> EngineInfo:
        assert graph.is_file()
        shutil.copyfile(kept, out)
        return dataclasses.replace(made, sms=arguments[-1], seconds=0.0)

    monkeypatch.setattr(building, "build_engine", build)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    return copied


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()}


def test_a_bundle_is_whole_wherever_a_build_ends(quick: Bundle) -> None:
    def build() -> None:
        build_bundle(Bundle.open(quick.path), BuildOptions(SMS))

    log = operations(build)
    count = 0
    for at, what in enumerate(log):
        for mode in (KILL,) if at % 2 else (KILL, AFTER):
            before = Bundle.open(quick.path).manifest.files
            assert interrupted_at(build, at, mode) in ("killed" if mode == KILL else "interrupted", 0), (what, mode)
            opened = Bundle.open(quick.path)
            assert opened.verify() == [], (what, mode)
            (info,) = engines(opened)
            assert info.sms == SMS
            assert opened.manifest.files.keys() == before.keys() or info.file not in before, (what, mode)
            if mode != KILL:
                assert files(quick.path) == {*opened.manifest.files, MANIFEST}, (what, mode)
            build()
            assert files(quick.path) == {*Bundle.open(quick.path).manifest.files, MANIFEST}, (what, mode)
            assert sorted(path.name for path in quick.path.parent.iterdir()) == ["bundle", "kept.engine"]
            count += 1
    print(f"{count} faults")
    assert any(line.startswith("symlink") for line in log)
    assert count > 40


def test_two_builds_into_one_bundle_exclude_each_other(quick: Bundle) -> None:
    before = files(quick.path)
    with (
        lock_folder(quick.path, "busy"),
        pytest.raises(EdgeLMError, match=f"another run is writing {quick.path}: wait for it"),
    ):
        build_bundle(quick, BuildOptions(SMS))
    assert files(quick.path) == before


def test_a_build_reports_its_one_step(quick: Bundle) -> None:
    stream = io.StringIO()
    build_bundle(quick, BuildOptions(SMS), progress=Bars(Console(file=stream)))
    assert "building an engine: 1 of 1 in" in stream.getvalue()


def test_a_build_keeps_what_another_added_since_the_bundle_was_opened(quick: Bundle) -> None:
    build_bundle(Bundle.open(quick.path), BuildOptions((86,)))
    made = {info.file for info in engines(Bundle.open(quick.path))}
    build_bundle(quick, BuildOptions((89,)))
    assert made <= {info.file for info in engines(Bundle.open(quick.path))}
    assert Bundle.open(quick.path).verify() == []
