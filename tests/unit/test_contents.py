"""Do older bundles without `contents` in the manifest still open, and are wrong contents refused?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_graph import write_tiny_bundle

from edgelm.bundle import Bundle
from edgelm.bundle.contents import Contents, Layout
from edgelm.errors import BundleError

HELD = {"layout": "array", "dtype": "float32", "shape": [4, 4], "matrices": ["x"], "rows": [4]}


def test_a_manifest_without_contents_opens_and_is_written_back_unchanged(tmp_path: Path) -> None:
    written = json.loads((write_tiny_bundle(tmp_path / "b").path / "manifest.json").read_text())
    assert "contents" not in written["tensors"][0]
    manifest = Bundle.open(tmp_path / "b").manifest
    assert manifest.tensors[0].contents is None
    assert json.loads(manifest.to_json())["tensors"] == written["tensors"]


def with_contents(folder: Path, held: dict[str, Any]) -> Path:
    place = write_tiny_bundle(folder).path / "manifest.json"
    data = json.loads(place.read_text())
    data["tensors"][0]["contents"] = held
    place.write_text(json.dumps(data))
    return folder


def test_contents_are_read(tmp_path: Path) -> None:
    manifest = Bundle.open(with_contents(tmp_path / "b", HELD)).manifest
    assert manifest.tensors[0].contents == Contents(Layout.ARRAY, "float32", (4, 4), matrices=("x",), rows=(4,))
    assert json.loads(manifest.to_json())["tensors"][0]["contents"] == HELD


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": "boxes"}, r'contents.layout is "boxes" \(a string\), expected "array" or '),
        ({"rows": [1, 2]}, r'"embed" holds 1 matrices and the rows of 2'),
        ({"colour": 1}, r"contents.colour is an unknown field \(upgrade edgelm"),
        ({"shape": [0, 4]}, r"contents.shape\[0\] is 0, expected a whole number from 1"),
    ],
)
def test_wrong_contents_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        Bundle.open(with_contents(tmp_path / "b", HELD | change))
