"""Is a disk that is too small found before the export begins?"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_models import MakeCheckpoint

from edgelm.bundle import Bundle
from edgelm.errors import EdgeLMError
from edgelm.export import ExportOptions, export_bundle
from edgelm.export.packing.weights_file import WeightsPlan
from edgelm.files import require_disk_space
from edgelm.parity.golden import GoldenOptions
from edgelm.parity.prompts import Prompt
from edgelm.sizes import format_size

OPTIONS = ExportOptions(golden=GoldenOptions(prompts=(Prompt("short", "The"),), greedy_tokens=1), threads=1)


class BeganError(Exception):
    """Raised when the export starts to write weights."""


def set_free(monkeypatch: pytest.MonkeyPatch, free: int, asked: list[Path] | None = None) -> None:
    """Make disks report `free` bytes; append the folders that were asked for to `asked`."""

    def usage(path: Path) -> SimpleNamespace:
        if asked is not None:
            asked.append(Path(path))
        return SimpleNamespace(free=free)

    monkeypatch.setattr("shutil.disk_usage", usage)


def test_the_weights_and_64_mib_must_fit_before_the_first_byte_is_written(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[int] = []

    def write(plan: WeightsPlan, *arguments: object) -> None:
        planned.append(plan.size)
        raise BeganError

    monkeypatch.setattr(WeightsPlan, "write", write)
    source, out = checkpoint("fox"), tmp_path / "new" / "bundle"
    with pytest.raises(BeganError):
        export_bundle(source, tmp_path / "first", options=OPTIONS)
    needed = planned.pop() + (64 << 20)
    asked: list[Path] = []
    set_free(monkeypatch, needed - 1, asked)
    said = f"{out} needs {format_size(needed)} but {tmp_path} has {format_size(needed - 1)} free: free some space or"
    with pytest.raises(EdgeLMError, match=re.escape(said)):
        export_bundle(source, out, options=OPTIONS)
    assert set(asked) == {tmp_path}  # the disk that the bundle is to lie on, of a folder that exists
    assert planned == []
    assert list(tmp_path.iterdir()) == []
    set_free(monkeypatch, needed)
    with pytest.raises(BeganError):
        export_bundle(source, out, options=OPTIONS)


def test_a_bundle_that_does_not_fit_is_not_installed(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = export_bundle(checkpoint("fox"), tmp_path / "bundle", options=OPTIONS)
    with monkeypatch.context() as patch:
        set_free(patch, bundle.size - 1)
        with pytest.raises(EdgeLMError, match="free some space"):
            bundle.install(tmp_path / "device")
        assert list(tmp_path.iterdir()) == [bundle.path]
        set_free(patch, bundle.size)
        assert Bundle.install(bundle, tmp_path / "device").path == tmp_path / "device"


def test_an_export_may_need_all_free_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_free(monkeypatch, 1000)
    require_disk_space(tmp_path / "x", 1000)
    with pytest.raises(EdgeLMError, match=re.escape(f"needs {format_size(1001)} but")):
        require_disk_space(tmp_path / "x", 1001)
