"""Does every malformed file give an error of one line in every verb that reads it? `malformed.py` has the probes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from malformed import DAMAGE, PLACES, TARGETS, WRONG, Target, folders, paths, run
from tiny_graph import write_tiny_bundle

from edgelm.bundle import Bundle
from edgelm.errors import BundleError

MINE = [target for target in TARGETS if target.folder in ("bundle", "gpu")]
NEVER_RIGHT = ("infinite", "NaN", "deep", "half a character")
FIELDS = 8


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return folders(tmp_path_factory.mktemp("malformed"), all_kinds=False)


@pytest.mark.parametrize("target", MINE, ids=lambda target: f"{target.folder}/{target.file}")
def test_a_damaged_file_gives_an_error_of_one_line(made: dict[str, Path], target: Target) -> None:
    wanted = {*PLACES, *DAMAGE}
    once = replace(target, commands=target.commands[:1])
    found = list(run(once, made[target.folder], lambda _, name: name in wanted))
    assert len(found) == len(wanted)
    assert [outcome for outcome in found if outcome.wrong] == []
    if target.is_ours:
        # If the file is missing, the command cannot know that it belonged to the bundle.
        accepted = {outcome.probe for outcome in found if not outcome.code}
        assert accepted <= {f"{target.folder}/{target.file}: {name}" for name in ("bytes changed",)}


@pytest.mark.parametrize(
    "target", [target for target in MINE if target.fields], ids=lambda target: f"{target.folder}/{target.file}"
)
def test_a_wrong_field_gives_an_error_of_one_line(made: dict[str, Path], target: Target) -> None:
    places = len(list(paths(json.loads((made[target.folder] / target.file).read_bytes()))))
    # A step that is coprime to the number of kinds covers all kinds and fields evenly.
    step = max(1, places * (1 + len(WRONG)) // FIELDS)
    step += step % (1 + len(WRONG)) == 0
    found = list(run(target, made[target.folder], lambda number, name: number % step == step - 1))
    assert len(found) >= min(FIELDS, places) // 2
    assert [outcome for outcome in found if outcome.wrong] == []
    if target.is_ours:
        assert [outcome for outcome in found if outcome.probe.endswith(NEVER_RIGHT) and not outcome.code] == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m["files"].update({"../x": m["files"]["config.json"]}), r'names a file outside the bundle: "../x"'),
        (lambda m: m["files"].update({"/x": m["files"]["config.json"]}), r'names a file outside the bundle: "/x"'),
        (lambda m: m["tensors"].append({**m["tensors"][0], "name": "b", "offset": 8, "size": 8}), '"b" overlaps the'),
        (lambda m: m["tensors"].append({**m["tensors"][0], "name": "b", "offset": 64}), '"b" ends at 128, and model.'),
    ],
)
def test_a_contradictory_manifest_gives_an_error_of_one_line(tmp_path, change, said):
    bundle = write_tiny_bundle(tmp_path / "b")
    manifest = json.loads(bundle.file("manifest.json").read_text(encoding="utf-8"))
    change(manifest)
    bundle.file("manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(BundleError) as caught:
        Bundle.open(bundle.path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
