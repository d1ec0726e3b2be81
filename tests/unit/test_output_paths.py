"""Is an output never written over its own inputs, nor over anything that EdgeLM did not write?"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from edgelm.bundle import BUNDLE, FORMAT
from edgelm.checkpoint.written import CHECKPOINT, FILE_LIST
from edgelm.cli.main import cli
from edgelm.errors import EdgeLMError
from edgelm.files import atomic_directory, atomic_file
from edgelm.output_paths import check_output
from edgelm.pages.page import REPORT, render
from edgelm.quant import PRESETS
from edgelm.quant.calibration.resume import RESUME
from edgelm.quant.recipe import RECIPE

TINY = Path(__file__).parents[2] / "examples" / "checkpoints" / "fox-tiny"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A published checkpoint, without EdgeLM's list of files."""
    return shutil.copytree(TINY, tmp_path / "models" / "ck", ignore=shutil.ignore_patterns(FILE_LIST))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_bundle(folder: Path) -> Path:
    """Write a minimal bundle: a manifest that lists its files."""
    (folder / "parity").mkdir(parents=True)
    for name in ("model.onnx", "parity/pack.bin"):
        (folder / name).write_bytes(b"x")
    (folder / "manifest.json").write_text(
        json.dumps({"format": FORMAT, "files": {"model.onnx": {}, "parity/pack.bin": {}}})
    )
    return folder


@pytest.mark.parametrize(
    "command",
    [
        ["export", "CK", "-o", "PLACE", "--overwrite"],
        ["export", "CK", "-o", "PLACE", "--overwrite", "--bits", "5"],
        ["quantize", "CK", "-o", "PLACE", "--overwrite"],
        ["quantize", "CK", "-o", "PLACE", "--overwrite", "--calibration", "builtin"],
        ["recipe", "CK", "-o", "PLACE", "--bits", "5", "--overwrite"],
        ["eval", "int4", "--checkpoint", "CK", "--report", "PLACE"],
    ],
    ids=lambda command: " ".join(command[:3] + command[5:]),
)
def test_commands_never_replace_their_inputs_or_other_files(
    command: list[str], checkpoint: Path, tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "photo.jpg").write_bytes(b"\xff\xd8")
    (tmp_path / "link").symlink_to(checkpoint)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = contents(tmp_path)
    places = [
        *(checkpoint, checkpoint.parent, tmp_path, checkpoint / "new", checkpoint / "config.json"),
        *(tmp_path / "link", tmp_path / "link" / "new", checkpoint / ".." / "ck", tmp_path / "dangling"),
        *(photos, photos / "photo.jpg", photos / "photo.jpg" / "x", "/", ".", "/dev/null", "/dev/stdout"),
    ]
    for place in places:
        arguments = [str({"CK": checkpoint, "PLACE": place}.get(word, word)) for word in command]
        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code in (1, 2), (place, result.output)
        assert str(place) in result.output, (place, result.output)
        assert "Traceback" not in result.output
        assert contents(tmp_path) == before, place
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "link", "models", "photos"]


@pytest.mark.parametrize(
    "command", [["recipe", "CK", "-o", "PLACE", "--bits", "5"], ["eval", "CK", "--report", "PLACE"]]
)
def test_writing_a_file_does_not_create_folders(command: list[str], checkpoint: Path, tmp_path: Path) -> None:
    place = tmp_path / "missing" / "x"
    result = CliRunner().invoke(cli, [str({"CK": checkpoint, "PLACE": place}.get(word, word)) for word in command])
    assert result.exit_code == 1
    assert f"there is no folder {place.parent}" in result.output
    assert not place.parent.exists()


def test_sources_are_recognised_through_links_and_mounts(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(checkpoint.parent)
    for place, relation in [
        (tmp_path / "link" / "ck", "is"),
        (tmp_path / "link" / "ck" / "a" / "b", "lies in"),
        (tmp_path / "link" / ".." / "models" / "ck", "is"),
        (tmp_path, "contains"),
    ]:
        with pytest.raises(EdgeLMError, match=f"{relation} the input "):
            check_output(place, BUNDLE, sources=[checkpoint], overwrite=True)
    assert check_output(tmp_path / "link" / "new", BUNDLE, sources=[checkpoint]) == checkpoint.parent / "new"


def test_the_hub_cache_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    repository = cache / "models--owner--name"
    snapshot, blobs = repository / "snapshots" / "0123", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "abc").write_text("{}")
    (snapshot / "config.json").symlink_to(blobs / "abc")
    for source in (snapshot, "owner/name"):
        for place in (cache, repository, blobs, blobs / "abc" / "x", repository / "mine", snapshot):
            with pytest.raises(EdgeLMError, match="the input"):
                check_output(place, BUNDLE, sources=[source], overwrite=True)
    # A folder of links to other places, whose files are the inputs.
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "model.safetensors").symlink_to(blobs / "abc")
    with pytest.raises(EdgeLMError, match=r"contains the input .*abc"):
        check_output(blobs, BUNDLE, sources=[linked], overwrite=True)


def test_a_bundle_is_replaced_if_every_file_is_in_its_manifest(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b")
    with pytest.raises(EdgeLMError, match="exists already: remove it, choose another place, or pass --overwrite"):
        check_output(bundle, BUNDLE)
    assert check_output(bundle, BUNDLE, overwrite=True) == bundle
    # Also with what a killed build leaves, with an empty folder, and with a truncated file of the bundle.
    (bundle / "engines").mkdir()
    (bundle / "engines" / "rtx-1.7.1-sm86-sm89-2.engine").write_bytes(b"x")
    (bundle / ".engine.partial-ab12").mkdir()
    (bundle / ".engine.partial-ab12" / "engine").write_bytes(b"x")
    (bundle / "model.onnx").write_bytes(b"")
    assert check_output(bundle, BUNDLE, overwrite=True) == bundle
    for name in ("notes.txt", "parity/mine.csv", ".hidden", "engines/mine.engine"):
        (bundle / name).write_text("mine")
        with pytest.raises(EdgeLMError, match=f"holds {name}, which is not in its manifest.json: choose another place"):
            check_output(bundle, BUNDLE, overwrite=True)
        (bundle / name).unlink()
    (bundle / "parity" / "link").symlink_to(tmp_path)
    with pytest.raises(EdgeLMError, match="holds parity/link"):
        check_output(bundle, BUNDLE, overwrite=True)


@pytest.mark.parametrize(
    "manifest", ["", "{", "[]", "{}", '{"format": "x", "files": {}}', '{"format": "edgelm-bundle"}']
)
def test_a_folder_with_another_manifest_is_not_a_bundle(tmp_path: Path, manifest: str) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "manifest.json").write_text(manifest)
    with pytest.raises(EdgeLMError, match="exists already and is no bundle"):
        check_output(tmp_path / "b", BUNDLE, overwrite=True)


def test_a_checkpoint_is_replaced_if_edgelm_wrote_it(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(EdgeLMError, match=f"is no checkpoint that EdgeLM wrote \\(it has no {FILE_LIST}\\)"):
        check_output(checkpoint, CHECKPOINT, overwrite=True)
    for other in ({"files": ["config.json"]}, {"format": "another", "files": ["config.json", FILE_LIST]}):
        theirs = tmp_path / "theirs"
        theirs.mkdir(exist_ok=True)
        (theirs / "config.json").write_text("{}")
        (theirs / FILE_LIST).write_text(json.dumps(other))
        with pytest.raises(EdgeLMError, match="is no checkpoint that EdgeLM wrote"):
            check_output(theirs, CHECKPOINT, overwrite=True)
    out = tmp_path / "made"
    with atomic_directory(out, CHECKPOINT) as folder:
        (folder / "config.json").write_text("{}")
    assert json.loads((out / FILE_LIST).read_text())["files"] == ["config.json", FILE_LIST]
    with atomic_directory(out, CHECKPOINT, overwrite=True) as folder:
        (folder / "model.safetensors").write_bytes(b"x")
    assert sorted(path.name for path in out.iterdir()) == [FILE_LIST, "model.safetensors"]
    (out / "model-of-mine.safetensors").write_bytes(b"x")
    with pytest.raises(EdgeLMError, match=r"holds model-of-mine\.safetensors, which is not in its"):
        check_output(out, CHECKPOINT, overwrite=True)


def test_files_that_appear_during_a_run_are_not_replaced(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b")
    with (
        pytest.raises(EdgeLMError, match=r"holds notes\.txt"),
        atomic_directory(bundle, BUNDLE, overwrite=True) as folder,
    ):
        (folder / "new").write_bytes(b"x")
        (bundle / "notes.txt").write_text("mine")
    assert (bundle / "notes.txt").read_text() == "mine"
    with pytest.raises(EdgeLMError, match="exists already"), atomic_directory(tmp_path / "c", BUNDLE):
        (tmp_path / "c").mkdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "c"]


def test_files_are_replaced_only_by_their_own_kind(tmp_path: Path) -> None:
    recipe, report, notes = tmp_path / "r.toml", tmp_path / "r.html", tmp_path / "notes.txt"
    recipe.write_text(PRESETS["int4"].to_toml())
    report.write_text(render("page.html.j2"))
    notes.write_text("title = 'mine'")
    with pytest.raises(EdgeLMError, match="exists already: remove it"):
        check_output(recipe, RECIPE)
    assert check_output(recipe, RECIPE, overwrite=True) == recipe
    assert check_output(report, REPORT, overwrite=True) == report
    for place in (notes, report):
        with pytest.raises(EdgeLMError, match="is no recipe: choose another place, or move it away"):
            check_output(place, RECIPE, overwrite=True)
    for place in (notes, recipe):
        with pytest.raises(EdgeLMError, match="is no report that EdgeLM wrote"):
            check_output(place, REPORT, overwrite=True)
    notes.write_text("")  # as made by mktemp
    assert check_output(notes, REPORT, overwrite=True) == notes
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(EdgeLMError, match="is no regular file"):
        check_output(tmp_path / "pipe", REPORT, overwrite=True)


def test_the_state_of_a_calibration_is_recognised_by_its_files(tmp_path: Path) -> None:
    work = tmp_path / "x.calibrating"
    work.mkdir()
    for name in ("state.json", "layer-00000.safetensors", "stream-00001.safetensors", "head.safetensors", "lock"):
        (work / name).write_bytes(b"x")
    (work / ".state.json.partial-0123456789abcdef").write_bytes(b"")
    assert check_output(work, RESUME, overwrite=True) == work
    (work / "layers.xlsx").write_bytes(b"x")
    with pytest.raises(EdgeLMError, match=r"holds layers\.xlsx, which no calibration left there"):
        check_output(work, RESUME, overwrite=True)


def test_paths_that_differ_in_case_are_one_if_the_system_says_so(checkpoint: Path) -> None:
    other = checkpoint.parent / "CK"
    if other.exists():
        with pytest.raises(EdgeLMError, match="the input"):
            check_output(other, BUNDLE, sources=[checkpoint], overwrite=True)
    else:
        assert check_output(other, BUNDLE, sources=[checkpoint]) == other


def test_folders_made_for_an_output_are_removed_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), atomic_directory(tmp_path / "a" / "b" / "c", BUNDLE):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(EdgeLMError, match="there is no folder"), atomic_file(tmp_path / "a" / "x", RECIPE):
        pass
    assert list(tmp_path.iterdir()) == []
