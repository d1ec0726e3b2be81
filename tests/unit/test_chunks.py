"""Are files that are read or written in several chunks hashed, copied and checked completely?"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_graph import Shape, write_tiny_bundle

import edgelm.bundle
import edgelm.checkpoint
from edgelm.bundle import Bundle, sha256_of
from edgelm.checkpoint import Checkpoint, SafetensorsFile, SafetensorsWriter, TensorSpec
from edgelm.errors import BundleError
from edgelm.progress import Advance, Progress

CHUNK = 16
DATA = np.random.default_rng(5).integers(0, 256, 64, dtype=np.uint8).tobytes()


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """A bundle with weights of four chunks: two tensors of one and a half chunks, and one chunk of no tensor."""
    monkeypatch.setattr(edgelm.bundle, "_HASH_CHUNK", CHUNK)
    path = tmp_path / "bundle"
    write_tiny_bundle(path, Shape(layers=1))
    (path / "model.onnx.data").write_bytes(DATA)
    manifest = (path / "manifest.json").read_text(encoding="utf-8")
    old = hashlib.sha256(bytes(64)).hexdigest()
    assert old in manifest
    first, second = (
        f'{{"name": "{name}", "offset": {at}, "size": 24, "crc32": {zlib.crc32(DATA[at : at + 24])}, "layer": {layer}}}'
        for name, at, layer in (("one", 0, "null"), ("two", 24, "0"))
    )
    begin, end = manifest.index('"tensors": [') + len('"tensors": ['), manifest.index("]", manifest.index('"tensors"'))
    manifest = manifest[:begin] + f"{first}, {second}" + manifest[end:]
    manifest = manifest.replace(old, hashlib.sha256(DATA).hexdigest())
    (path / "manifest.json").write_text(manifest, encoding="utf-8")
    return Bundle.open(path)


class Told(Progress):
    """Records the progress of its tasks."""

    def __init__(self) -> None:
        self.amounts: list[float] = []

    @contextlib.contextmanager
    def task(self, label: str, total: float, *, unit: str = "bytes") -> Iterator[Advance]:
        del label, total, unit
        yield self.amounts.append


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 4 * CHUNK, 5 * CHUNK - 3])
def test_does_the_hash_cover_the_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(edgelm.bundle, "_HASH_CHUNK", CHUNK)
    data = (DATA * 2)[:size]
    (tmp_path / "file").write_bytes(data)
    told: list[float] = []
    assert sha256_of(tmp_path / "file", told.append) == hashlib.sha256(data).hexdigest()
    assert sum(told) == size
    assert len(told) == -(-size // CHUNK)


@pytest.mark.parametrize(
    ("at", "problem"),
    [
        (0, "tensor one differs"),
        (20, "tensor one differs"),
        (24, r"tensor two \(layer 0\) differs"),
        (47, r"tensor two \(layer 0\) differs"),
        (63, "contents differ"),
    ],
)
def test_is_a_damaged_byte_of_any_chunk_found_in_its_tensor(bundle: Bundle, at: int, problem: str) -> None:
    assert bundle.verify() == []
    data = bytearray(DATA)
    data[at] ^= 0x10
    bundle.file("model.onnx.data").write_bytes(data)
    (found,) = bundle.verify()
    assert re.search(problem, found), found


@pytest.mark.parametrize("data", [DATA[:-1], DATA + b"x", b""], ids=["shorter", "longer", "empty"])
def test_is_a_file_of_another_size_refused_when_a_bundle_is_opened(bundle: Bundle, data: bytes) -> None:
    bundle.file("model.onnx.data").write_bytes(data)
    with pytest.raises(BundleError, match=f"has {len(data)} bytes, the manifest says {len(DATA)}: copy or export"):
        Bundle.open(bundle.path)


@pytest.mark.parametrize("at", [3, CHUNK, 2 * CHUNK + 5, 63])
def test_is_a_copy_refused_if_any_chunk_of_its_source_is_damaged(bundle: Bundle, tmp_path: Path, at: int) -> None:
    data = bytearray(DATA)
    data[at] ^= 0x10
    bundle.file("model.onnx.data").write_bytes(data)
    with pytest.raises(BundleError, match=r"is damaged .*so nothing was installed"):
        bundle.install(tmp_path / "app")
    assert not (tmp_path / "app").exists()


def test_is_a_copy_complete_if_the_system_writes_less_than_requested(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.open

    class Short:
        """A file that accepts at most five bytes per write, as a full pipe or a network file system may."""

        def __init__(self, file: Any) -> None:
            self._file = file

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *error: object) -> None:
            self._file.close()

        def write(self, data: Any) -> int:
            return int(self._file.write(data[:5]))

    def opened(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        file = real(path, mode, *arguments, **options)
        return Short(file) if mode == "wb" else file

    monkeypatch.setattr(Path, "open", opened)
    bundle.install(tmp_path / "app")
    monkeypatch.undo()
    assert (tmp_path / "app" / "model.onnx.data").read_bytes() == DATA


def test_do_the_hashes_of_a_checkpoint_cover_whole_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edgelm.checkpoint, "HASH_BLOCK", CHUNK)
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with SafetensorsWriter(tmp_path / "model.safetensors", {"a": TensorSpec("U8", (61,))}) as writer:
        writer.write("a", np.frombuffer(DATA, np.uint8)[:61])
    told = Told()
    with Checkpoint.open(tmp_path) as checkpoint:
        hashes = checkpoint.hashes(told)
    for name in ("config.json", "model.safetensors"):
        data = (tmp_path / name).read_bytes()
        assert len(data) % CHUNK, "the last chunk is a short one"
        assert hashes[name] == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert sum(told.amounts) == sum(info["size"] for info in hashes.values() if isinstance(info["size"], int))


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="this system has no preadv and pwrite")
def test_are_tensors_complete_if_the_system_reads_and_writes_less_than_requested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pread, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda file, views, at: pread(file, [views[0][:7]], at))
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: pwrite(file, data[:5], at))
    values = np.arange(33, dtype=np.float32).reshape(11, 3)
    with SafetensorsWriter(tmp_path / "x.safetensors", {"a": TensorSpec("F32", (11, 3))}) as writer:
        writer.write("a", values)
    with SafetensorsFile(tmp_path / "x.safetensors") as file:
        np.testing.assert_array_equal(file.read_float32("a"), values)
        np.testing.assert_array_equal(file.read_raw("a", slice(4, 9)), values[4:9])
