"""Are exported bundles the same as the recorded ones, and does the check find differences?"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from bundle_hashes import CHECKPOINTS, Record, check, differences, record_bundle

from edgelm.export import ExportOptions, export_bundle
from edgelm.parity.golden import GoldenOptions
from edgelm.parity.prompts import Prompt

GRAPH, WEIGHTS, PACK = "model.onnx", "model.onnx.data", "parity/pack.npz"


def test_every_bundle_is_the_one_that_was_recorded(tmp_path: Path) -> None:
    found = check(tmp_path)
    # Record intended changes with `python tests/export/bundle_hashes.py --write`.
    assert not found, "\n".join(found)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = ExportOptions(ops="portable", golden=GoldenOptions(prompts=(Prompt("a", "import"),), greedy_tokens=1))
    return export_bundle(
        CHECKPOINTS / "olmoe-tiny", tmp_path_factory.mktemp("b") / "b", recipe="int4", options=options
    ).path


@pytest.fixture(scope="module")
def recorded(bundle: Path) -> dict[str, Record]:
    return {f"b/{name}": record for name, record in record_bundle(bundle).items()}


def changed(bundle: Path, recorded: dict[str, Record], name: str, data: bytes, *, bits: bool = True) -> list[str]:
    """Return the report for a bundle in which one file has other bytes."""
    path = bundle / name
    before = path.read_bytes()
    path.write_bytes(data)
    try:
        found = {f"b/{name}": record for name, record in record_bundle(bundle).items()}
    finally:
        path.write_bytes(before)
    return list(differences(recorded, found, bits=bits))


def test_is_a_graph_with_other_names_distinguished_from_another_graph(
    bundle: Path, recorded: dict[str, Record]
) -> None:
    model = onnx.load(str(bundle / GRAPH), load_external_data=False)
    renamed = copy.deepcopy(model)
    public = {one.name for one in [*model.graph.input, *model.graph.output]}
    for node in renamed.graph.node:
        node.name = f"other {node.name}"
        for names in (node.input, node.output):
            names[:] = [name if name in public or not name else f"other {name}" for name in names]
    for one in renamed.graph.initializer:
        one.name = one.name if one.name in public else f"other {one.name}"
    [line] = changed(bundle, recorded, GRAPH, renamed.SerializeToString())
    assert line == f"b/{GRAPH}: only names or the order of nodes differ"

    other = copy.deepcopy(model)
    other.graph.node[-1].op_type = "Other"
    [line] = changed(bundle, recorded, GRAPH, other.SerializeToString())
    assert "STRUCTURE" in line
    assert "Other 0 -> 1" in line
    node = next(node for node in model.graph.node if len(node.input) > 1 and node.input[0] != node.input[1])
    node.input[0], node.input[1] = node.input[1], node.input[0]
    [line] = changed(bundle, recorded, GRAPH, model.SerializeToString())
    assert line.endswith("the same nodes, but other attributes, weights or edges")


def test_is_one_changed_byte_of_the_weights_found(bundle: Path, recorded: dict[str, Record]) -> None:
    data = bytearray((bundle / WEIGHTS).read_bytes())
    data[len(data) // 2] ^= 1
    lines = changed(bundle, recorded, WEIGHTS, bytes(data), bits=False)
    assert f"b/{WEIGHTS}: bytes differ" in lines
    assert any("STRUCTURE" in line for line in lines if GRAPH in line)


@pytest.mark.parametrize(
    ("factor", "bits", "want"), [(1 + 1e-6, True, "last bits"), (1 + 1e-6, False, ""), (1.01, False, "rms")]
)
def test_are_sums_compared_with_a_tolerance_on_other_machines(
    bundle: Path, recorded: dict[str, Record], tmp_path: Path, factor: float, bits: bool, want: str
) -> None:
    with np.load(bundle / PACK) as pack:
        arrays = {name: pack[name] for name in pack}
    arrays["reference.norms"] = arrays["reference.norms"] * np.float32(factor)
    np.savez(tmp_path / "pack.npz", **arrays)
    lines = changed(bundle, recorded, PACK, (tmp_path / "pack.npz").read_bytes(), bits=bits)
    assert [want in line for line in lines] == ([True] if want else [])
    arrays["reference.best"] = arrays["reference.best"] + 1
    np.savez(tmp_path / "pack.npz", **arrays)
    assert "exact differ" in changed(bundle, recorded, PACK, (tmp_path / "pack.npz").read_bytes())[0]


def test_is_a_part_of_the_manifest_named_and_are_versions_left_out(bundle: Path, recorded: dict[str, Record]) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["tools"]["torch"] = "another"
    assert changed(bundle, recorded, "manifest.json", json.dumps(manifest).encode()) == []
    manifest["tokens"]["pad_id"] = 7
    assert changed(bundle, recorded, "manifest.json", json.dumps(manifest).encode()) == [
        "b/manifest.json: tokens differ"
    ]


def test_are_added_and_removed_files_bundles_and_refusals_reported(recorded: dict[str, Record]) -> None:
    def told(found: dict[str, Record]) -> list[str]:
        return list(differences({**recorded, "r": {"refused": "no"}}, found, bits=False))

    fewer = {key: record for key, record in recorded.items() if key != f"b/{GRAPH}"}
    assert told({**fewer, "r": {"refused": "never"}, "b/more": {}, "c/more": {}}) == [
        "c: is new",
        f"b/{GRAPH}: missing",
        "b/more: new",
        "r: refused otherwise:\n    no\n    never",
    ]
    assert told({"b": {"refused": "no"}, "r/file": {}})[-2:] == ["r: no longer refused", "r/file: new"]
