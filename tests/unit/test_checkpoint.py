"""Is every incomplete, damaged or unknown checkpoint folder refused by name, and every good one read?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from edgelm.checkpoint import Checkpoint, ShardedWriter, TensorSpec, write_sharded
from edgelm.errors import CheckpointError, UnsupportedConfigError

CONFIG = {"architectures": ["LlamaForCausalLM"]}
SPECS = {"a": TensorSpec("F32", (4, 3)), "b": TensorSpec("F32", (5,)), "c": TensorSpec("F32", (2, 2))}
SHAPES = {name: spec.shape for name, spec in SPECS.items()}
INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00003.safetensors"


def values(name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.arange(np.prod(SHAPES[name]), dtype=np.float32).reshape(SHAPES[name]) + ord(name)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint of three tensors in three shards."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    files = write_sharded(tmp_path, SPECS, lambda name: [values(name)[:1], values(name)[1:]], shard_bytes=30)
    assert files[1] == SHARD
    return tmp_path


def edit_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    return str(caught.value)


def test_a_sharded_folder_reads_as_one(sharded: Path) -> None:
    with Checkpoint.open(str(sharded)) as checkpoint:
        assert checkpoint.config == CONFIG
        assert checkpoint.family.name == "llama"
        assert checkpoint.source_id == sharded.name
        checkpoint.check_tensors(SHAPES)
        for name in SPECS:
            assert checkpoint.shape(name) == SHAPES[name]
            np.testing.assert_array_equal(checkpoint.read_float32(name), values(name))
            np.testing.assert_array_equal(checkpoint.read_raw(name, slice(1, 2)), values(name)[1:2])
        assert checkpoint.tensors["b"].file.name == SHARD


def test_safetensors_reads_our_shards(sharded: Path) -> None:
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    for name, file in weight_map.items():
        np.testing.assert_array_equal(safetensors.numpy.load_file(sharded / file)[name], values(name))
    assert json.loads((sharded / INDEX).read_text())["metadata"] == {"total_size": 84}


def test_a_single_file_needs_no_index(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert write_sharded(tmp_path, SPECS, lambda name: [values(name)]) == ["model.safetensors"]
    assert not (tmp_path / INDEX).exists()
    with Checkpoint.open(tmp_path) as checkpoint:
        checkpoint.check_tensors(SHAPES)
        assert [path.name for path in checkpoint.files] == ["config.json", "model.safetensors"]


def test_shards_may_be_links_as_in_the_hubs_cache(sharded: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in sharded.iterdir():
        if path.is_file():
            (snapshot / path.name).symlink_to(path)
    with Checkpoint.open(snapshot) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read_float32("c"), values("c"))


def test_hashes_equal_those_of_the_files(sharded: Path) -> None:
    with Checkpoint.open(sharded) as checkpoint:
        hashes = checkpoint.hashes()
    assert set(hashes) == {"config.json", INDEX, *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))}
    for name, entry in hashes.items():
        content = (sharded / name).read_bytes()
        assert entry == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({**SHAPES, "d": (1,), "e": (1,)}, r"tensor 'd' is missing \(2 of 5 are\)"),
        ({"a": (4, 3), "c": (2, 2)}, r"model-00002-of-00003.safetensors: extra tensor 'b' \(1 in all\)"),
        ({**SHAPES, "c": (4,)}, r"model-00003-of-00003.safetensors: tensor 'c' has shape \(2, 2\).* \(4,\)"),
    ],
)
def test_tensors_that_do_not_fit_the_model_are_named(sharded: Path, expected: dict[str, Any], message: str) -> None:
    with Checkpoint.open(sharded) as checkpoint, pytest.raises(CheckpointError, match=message):
        checkpoint.check_tensors(expected)


def test_an_unknown_tensor_name_raises_an_edgelm_error(sharded: Path) -> None:
    with Checkpoint.open(sharded) as checkpoint:
        for read in (checkpoint.shape, checkpoint.read_float32, checkpoint.read_raw):
            with pytest.raises(CheckpointError, match="no tensor 'lm_head' among its 3"):
                read("lm_head")


def test_a_missing_shard_is_named_with_a_tensor_of_it(sharded: Path) -> None:
    (sharded / SHARD).unlink()
    message = refusal(sharded)
    assert SHARD in message
    assert "'b'" in message
    assert "download the checkpoint again" in message


def test_a_truncated_shard_is_named(sharded: Path) -> None:
    content = (sharded / SHARD).read_bytes()
    (sharded / SHARD).write_bytes(content[:-1])
    message = refusal(sharded)
    assert SHARD in message
    assert "truncated: tensor 'b'" in message


@pytest.mark.parametrize("file", ["/etc/passwd", "../a.safetensors", "x/../../a.safetensors", "..", "", ".", "x\0"])
def test_an_index_may_only_name_files_of_its_folder(sharded: Path, file: str) -> None:
    edit_index(sharded, lambda index: index["weight_map"].update(b=file))
    message = refusal(sharded)
    assert INDEX in message
    assert "tensor 'b'" in message
    assert "not a file of this folder" in message


@pytest.mark.parametrize("file", [3, None, ["x"], "C:evil.safetensors", "..\\a.safetensors", "x" * 5000])
def test_an_index_must_hold_names(sharded: Path, file: object) -> None:
    edit_index(sharded, lambda index: index["weight_map"].update(b=file))
    assert "not a file of this folder" in refusal(sharded)


def test_an_index_with_pickle_shards_is_refused(sharded: Path) -> None:
    edit_index(sharded, lambda index: index["weight_map"].update(b="pytorch_model-00001.bin"))
    assert "only .safetensors files are read" in refusal(sharded)


def test_index_and_shards_must_agree(sharded: Path) -> None:
    original = (sharded / INDEX).read_text()
    edit_index(sharded, lambda index: index["weight_map"].update(d=SHARD))
    assert f"{SHARD}: tensor 'd' is missing" in refusal(sharded)
    (sharded / INDEX).write_text(original)
    edit_index(sharded, lambda index: index["weight_map"].update(a=SHARD))
    assert "tensor 'a'" in refusal(sharded)
    (sharded / INDEX).write_text(original)
    safetensors.numpy.save_file({"b": values("b"), "extra": values("a")}, sharded / SHARD)
    assert f"{SHARD}: extra tensor 'extra'" in refusal(sharded)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": {}}', '{"weight_map": []}', '{"a": 1, "a": 2}', "\udcff"])
def test_a_garbled_index_is_refused(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert INDEX in refusal(sharded)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / name).write_bytes(b"\x80\x02}q\x00.")
    message = refusal(tmp_path)
    assert name in message
    assert "safe_serialization=True" in message


def test_folders_without_required_files_are_refused(tmp_path: Path) -> None:
    assert "no config.json" in refusal(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert "no model.safetensors and no" in refusal(tmp_path)
    for name in ("x.safetensors", "y.safetensors"):
        safetensors.numpy.save_file({"b": values("b")}, tmp_path / name)
    assert "2 .safetensors files but no" in refusal(tmp_path)
    (tmp_path / "y.safetensors").unlink()
    Checkpoint.open(tmp_path).check_tensors({"b": (5,)})


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"', '{"a": 1, "a": 1}', '{"a": "\\ud800', "[" * 100_000])
def test_a_garbled_config_is_refused(sharded: Path, text: str) -> None:
    (sharded / "config.json").write_text(text)
    assert "config.json: " in refusal(sharded)


@pytest.mark.parametrize("config", [{}, {"architectures": ["GPT2LMHeadModel"]}, {"model_type": "mamba"}])
def test_an_unknown_architecture_is_refused(sharded: Path, config: dict[str, Any]) -> None:
    (sharded / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedConfigError, match="EdgeLM knows"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("architectures", ["LlamaForCausalLM", 3, [3], {"0": "x"}])
def test_architectures_of_a_wrong_type_are_refused(sharded: Path, architectures: object) -> None:
    (sharded / "config.json").write_text(json.dumps({"architectures": architectures}))
    assert "architectures is not a list of names" in refusal(sharded)


def test_a_path_that_is_not_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="GGUF files are not read: give the original Hugging Face folder"):
        Checkpoint.open(tmp_path / "model.gguf")
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "model.gguf").touch()
    with pytest.raises(CheckpointError, match=r"no config\.json; GGUF files are not read"):
        Checkpoint.open(tmp_path / "only")
    with pytest.raises(CheckpointError, match="is a file; give the folder"):
        Checkpoint.open(tmp_path / "file")
    with pytest.raises(CheckpointError, match="no such folder"):
        Checkpoint.open(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="a hub id looks like owner/name"):
        Checkpoint.open("a/b/c")


def test_an_unfinished_sharded_write_is_noticed(tmp_path: Path) -> None:
    writer = ShardedWriter(tmp_path, SPECS, 30)
    writer.write("a", values("a"))
    with pytest.raises(ValueError, match="not written in full"):
        writer.close()
    assert not (tmp_path / INDEX).exists()
    with pytest.raises(KeyboardInterrupt), ShardedWriter(tmp_path, SPECS, 30):
        raise KeyboardInterrupt
