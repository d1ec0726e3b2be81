"""Does a bundle work, or raise a clear error, if its files are links, are truncated, or are replaced while in use?"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from tiny_models import OPERATOR_SETS, MakeCheckpoint

from edgelm.bundle import Bundle
from edgelm.checkpoint import Checkpoint
from edgelm.cli.main import cli
from edgelm.errors import BundleError, EdgeLMError
from edgelm.export import ExportOptions, export_bundle
from edgelm.parity.golden import GoldenOptions
from edgelm.parity.prompts import Prompt
from edgelm.runtimes import open_runtime

IDS = [3, 1, 4, 1, 5]
WEIGHTS = "model.onnx.data"


@pytest.fixture(scope="module", params=OPERATOR_SETS)
def exported(
    request: pytest.FixtureRequest, checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    golden = GoldenOptions(prompts=(Prompt("short", "The quick"),), greedy_tokens=1)
    out = tmp_path_factory.mktemp("exported") / "bundle"
    return export_bundle(checkpoint("fox"), out, options=ExportOptions(golden=golden, ops=request.param)).path


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(exported, tmp_path / "bundle"))


def logits(path: Path) -> bytes:
    with open_runtime(Bundle.open(path), threads=1) as runtime:
        return runtime.prefill(IDS).tobytes()


def files_of(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_a_link_to_a_bundle_and_a_folder_of_links_are_bundles(bundle: Bundle, tmp_path: Path) -> None:
    expected = logits(bundle.path)
    (tmp_path / "link").symlink_to(bundle.path)
    # As in the hub's cache: every file is a link to a file with another name in another folder.
    snapshot, blobs = tmp_path / "cache" / "snapshots" / "0123", tmp_path / "cache" / "blobs"
    for name, contents in files_of(bundle.path).items():
        blob = blobs / f"{name.replace('/', '-')}.blob"
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(contents)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blob)
    for path in (tmp_path / "link", snapshot):
        assert logits(path) == expected
        assert Bundle.open(path).verify() == []


def test_weights_linked_from_elsewhere_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    elsewhere = tmp_path / "disk" / "weights"
    elsewhere.parent.mkdir()
    bundle.file(WEIGHTS).rename(elsewhere)
    bundle.file(WEIGHTS).symlink_to(elsewhere)
    with pytest.raises(BundleError, match=f"is a link to {elsewhere}: ONNX Runtime reads weights only from the folder"):
        logits(bundle.path)
    # The advice of the message works.
    bundle.file(WEIGHTS).unlink()
    shutil.copyfile(elsewhere, bundle.file(WEIGHTS))
    assert logits(bundle.path)


def test_weights_truncated_while_in_use_are_an_error_not_a_crash(bundle: Bundle) -> None:
    with open_runtime(bundle, threads=1) as runtime:
        runtime.prefill(IDS)
        os.truncate(bundle.file(WEIGHTS), 4096)
        for use in (lambda: runtime.prefill(IDS), lambda: runtime.decode(1), lambda: list(runtime.logits_all(IDS))):
            with pytest.raises(BundleError, match=r"was truncated from \d+ to 4096 bytes while in use"):
                use()
    with pytest.raises(BundleError, match="has 4096 bytes, the manifest says"):
        logits(bundle.path)


def test_an_open_bundle_keeps_its_weights_when_it_is_replaced(bundle: Bundle, exported: Path) -> None:
    expected = logits(bundle.path)
    with open_runtime(bundle, threads=1) as runtime:
        before = bundle.file(WEIGHTS).stat().st_ino
        Bundle.open(exported).install(bundle.path, overwrite=True)
        assert bundle.file(WEIGHTS).stat().st_ino != before
        # Truncating the new file does not affect a runtime that uses the old one.
        os.truncate(bundle.file(WEIGHTS), 4096)
        assert runtime.prefill(IDS).tobytes() == expected


def test_install_copies_every_file_and_checks_it(bundle: Bundle, tmp_path: Path) -> None:
    target = tmp_path / "app" / "model"
    installed = bundle.install(target)
    assert files_of(target) == files_of(bundle.path)
    assert installed.verify() == []
    with pytest.raises(EdgeLMError, match="exists already"):
        bundle.install(target)
    before = files_of(target)
    data = bytearray(bundle.file(WEIGHTS).read_bytes())
    data[100] ^= 1
    bundle.file(WEIGHTS).write_bytes(data)
    with pytest.raises(BundleError, match=r"is damaged .*so nothing was installed"):
        bundle.install(target, overwrite=True)
    assert files_of(target) == before
    assert sorted(path.name for path in target.parent.iterdir()) == ["model"]


def test_the_install_command_copies_only_the_bundles_files(bundle: Bundle, tmp_path: Path) -> None:
    bundle.file("notes.txt").write_text("mine")
    result = CliRunner().invoke(cli, ["install", str(bundle.path), str(tmp_path / "app")])
    assert result.exit_code == 0, result.output
    assert "every file is what was exported" in result.stdout
    assert not (tmp_path / "app" / "notes.txt").exists()
    assert logits(tmp_path / "app") == logits(bundle.path)


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("models--allenai--OLMoE-1B-7B-0924/snapshots/0123abcd", "allenai/OLMoE-1B-7B-0924@0123abcd"),
        ("models--owner--a--b/snapshots/main", "owner/a--b@main"),
        ("models--gpt2/snapshots/0123", "gpt2@0123"),
        ("snapshots/0123", "0123"),
        ("models--owner--name/refs/main", "main"),
    ],
)
def test_a_snapshot_of_the_hub_has_its_repositorys_name(tmp_path: Path, folder: str, name: str) -> None:
    tiny = Path(__file__).parents[2] / "examples" / "checkpoints" / "fox-tiny"
    (tmp_path / folder).parent.mkdir(parents=True)
    shutil.copytree(tiny, tmp_path / folder)
    with Checkpoint.open(tmp_path / folder) as checkpoint:
        assert checkpoint.source_id == name
        assert np.isfinite(checkpoint.read_float32("model.norm.weight")).all()
