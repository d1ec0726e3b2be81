"""Do the safetensors reader and writer agree with the reference implementation, and are damaged files refused?"""

from __future__ import annotations

import json
import os
import random
import struct
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from edgelm.checkpoint.safetensors import (
    NUMPY_DTYPES,
    READ_BYTES,
    SafetensorsFile,
    bf16_to_float32,
    first_not_finite,
)
from edgelm.checkpoint.writer import SafetensorsWriter, TensorSpec, float32_to_bf16, plan_shards
from edgelm.errors import CheckpointError

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def a_file(path: Path) -> dict[str, torch.Tensor]:
    """Write a small file with the reference implementation."""
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "w": torch.randn(7, 5, generator=generator).bfloat16(),
        "half": torch.randn(3, 2, 2, generator=generator).half(),
        "single": torch.randn(4, generator=generator),
        "scalar": torch.tensor(2.5),
        "none": torch.zeros(0, 6),
        "codes": torch.arange(10, dtype=torch.uint8),
    }
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    return tensors


def raw_file(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(shape: list[Any], begin: int, end: int, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_every_dtype_is_read_as_written_by_safetensors(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: (torch.randn(5, 3, generator=generator) * 50).abs().to(dtype) for name, dtype in TORCH_DTYPES.items()
    }
    safetensors.torch.save_file(tensors, tmp_path / "f.safetensors")
    with SafetensorsFile(tmp_path / "f.safetensors") as file:
        for name, tensor in tensors.items():
            raw = file.read_raw(name)
            expected = tensor.view(torch.uint16) if name == "BF16" else tensor
            assert file.tensors[name].dtype == name
            assert raw.dtype == NUMPY_DTYPES[name]
            np.testing.assert_array_equal(raw, expected.numpy())


def test_upcasting_floats_is_exact_whole_and_by_rows(tmp_path: Path) -> None:
    tensors = a_file(tmp_path / "f.safetensors")
    with SafetensorsFile(tmp_path / "f.safetensors") as file:
        for name in ("w", "half", "single", "scalar", "none"):
            np.testing.assert_array_equal(file.read_float32(name), tensors[name].float().numpy(), strict=True)
        for rows in (slice(0, 3), slice(2, None), slice(-2, None), slice(5, 5), slice(3, 99), slice(None)):
            np.testing.assert_array_equal(file.read_float32("w", rows), tensors["w"].float().numpy()[rows], strict=True)
            np.testing.assert_array_equal(file.read_raw("half", rows), tensors["half"].numpy()[rows], strict=True)


def test_tensors_larger_than_one_read_are_complete(tmp_path: Path) -> None:
    values = torch.randn(700, 1021, generator=torch.Generator().manual_seed(3)).bfloat16()
    safetensors.torch.save_file({"x": values}, tmp_path / "f.safetensors")
    with SafetensorsFile(tmp_path / "f.safetensors") as file:
        np.testing.assert_array_equal(file.read_float32("x"), values.float().numpy())
        np.testing.assert_array_equal(file.read_float32("x", slice(1, 699)), values[1:699].float().numpy())
        codes = values.view(torch.int16).numpy().view(np.uint16)
        np.testing.assert_array_equal(file.read_raw("x"), codes)
        np.testing.assert_array_equal(file.read_raw("x", slice(1, 699)), codes[1:699])


@pytest.mark.parametrize("place", [0, READ_BYTES // 4 - 1, READ_BYTES // 4, READ_BYTES // 2 + 7])
def test_is_the_first_value_that_is_not_finite_found_in_any_block(place: int) -> None:
    values = np.zeros(READ_BYTES, np.float32)
    assert first_not_finite(values, "F32") is None
    values[place] = np.inf
    values[-1] = np.nan
    assert first_not_finite(values, "F32") == place


def test_invalid_rows_are_refused(tmp_path: Path) -> None:
    a_file(tmp_path / "f.safetensors")
    with SafetensorsFile(tmp_path / "f.safetensors") as file:
        with pytest.raises(ValueError, match="step 1"):
            file.read_raw("w", slice(0, 4, 2))
        with pytest.raises(ValueError, match="scalar"):
            file.read_float32("scalar", slice(0, 1))
        with pytest.raises(CheckpointError, match="'codes' is U8"):
            file.read_float32("codes")


def test_threads_may_read_at_once(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((64, 257), float(i)) for i in range(16)}
    safetensors.torch.save_file(tensors, tmp_path / "f.safetensors")
    wrong: list[str] = []
    with SafetensorsFile(tmp_path / "f.safetensors") as file:

        def read(seed: int) -> None:
            chooser = random.Random(seed)
            for _ in range(100):
                i = chooser.randrange(16)
                if not (file.read_float32(f"t{i}", slice(i, i + 9)) == i).all():
                    wrong.append(f"t{i}")

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_safetensors_reads_what_is_written(tmp_path: Path) -> None:
    tensors = a_file(tmp_path / "reference.safetensors")
    with SafetensorsFile(tmp_path / "reference.safetensors") as source:
        specs = {name: TensorSpec(info.dtype, info.shape) for name, info in source.tensors.items()}
        with SafetensorsWriter(tmp_path / "ours.safetensors", specs, {"format": "pt"}) as writer:
            for name in reversed(specs):
                if name == "w":
                    writer.write_rows("w", 4, source.read_raw("w", slice(4, 7)))
                    writer.write_rows("w", 0, source.read_raw("w", slice(0, 4)))
                elif name == "single":
                    writer.write_flat("single", 1, source.read_raw("single")[1:])
                    writer.write_flat("single", 0, source.read_raw("single")[:1])
                else:
                    writer.write(name, source.read_raw(name))
    back = safetensors.torch.load_file(tmp_path / "ours.safetensors")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)
    with safetensors.safe_open(tmp_path / "ours.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_writer_refuses_wrong_and_incomplete_tensors(tmp_path: Path) -> None:
    specs = {"a": TensorSpec("BF16", (4, 2)), "b": TensorSpec("F32", (3,))}
    with SafetensorsWriter(tmp_path / "f", specs) as writer:
        with pytest.raises(ValueError, match=r"shape \(2, 4\), declared \(4, 2\)"):
            writer.write("a", np.zeros((2, 4), np.uint16))
        with pytest.raises(ValueError, match="dtype float32, declared BF16"):
            writer.write("a", np.zeros((4, 2), np.float32))
        with pytest.raises(ValueError, match="do not fit"):
            writer.write_rows("a", 3, np.zeros((2, 2), np.uint16))
        with pytest.raises(ValueError, match="do not fit"):
            writer.write_flat("b", 2, np.zeros(2, np.float32))
        writer.write("a", np.zeros((4, 2), np.uint16))
        with pytest.raises(ValueError, match="more was written"):
            writer.write_rows("a", 0, np.zeros((1, 2), np.uint16))
        writer.write("b", np.zeros(3, np.float32))
    writer = SafetensorsWriter(tmp_path / "g", specs)
    writer.write("b", np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="1 tensors not written in full, the first is 'a'"):
        writer.close()


def test_rounding_to_bf16_equals_torch() -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 32, 200_000, dtype=np.uint32)
    special = np.array([0, -0.0, np.inf, -np.inf, np.nan, 3.4e38, 1e-45, 1.00390625, 1.01171875], np.float32)
    values = np.concatenate([bits.view(np.float32), special])
    expected = torch.from_numpy(values.copy()).bfloat16()
    rounded = float32_to_bf16(values)
    nan = np.isnan(values)
    np.testing.assert_array_equal(rounded[~nan], expected.view(torch.uint16).numpy()[~nan])
    assert np.isnan(bf16_to_float32(rounded[nan])).all()
    np.testing.assert_array_equal(bf16_to_float32(rounded)[~nan], expected.float().numpy()[~nan])


def test_shards_are_filled_in_order() -> None:
    specs = {f"t{i}": TensorSpec("U8", (size,)) for i, size in enumerate((4, 4, 4, 20, 1, 9))}
    assert plan_shards(specs, 10) == [["t0", "t1"], ["t2"], ["t3"], ["t4", "t5"]]
    assert plan_shards(specs, None) == [[f"t{i}" for i in range(6)]]


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b'{"a"', b"", "header: not valid JSON"),
        (b"[1, 2]", b"", "does not begin with '{'"),
        (b'{"a": "\xff"}', b"", "header: not valid JSON"),
        (b'{"a":' + b"[" * 100_000, b"", "not valid JSON"),
        (b'{"a":1' + b"0" * 10_000 + b"}", b"", "not valid JSON"),
        (b'{"a": {}, "a": {}}', b"", 'the key "a" is there twice'),
        ({"a": 3}, b"", "tensor 'a': its header entry is not an object"),
        ({"a": entry([2], 0, 2, "F7_E1M5")}, b"ab", "tensor 'a': unknown dtype 'F7_E1M5'"),
        ({"a": entry([2], 0, 2, ["U8"])}, b"ab", "tensor 'a': unknown dtype"),
        ({"a": {"shape": [2], "data_offsets": [0, 2]}}, b"ab", "tensor 'a': unknown dtype None"),
        ({"a": entry([-1], 0, 2)}, b"ab", "tensor 'a': its shape"),
        ({"a": entry([True, 2], 0, 2)}, b"ab", "tensor 'a': its shape"),
        ({"a": entry([2.0], 0, 2)}, b"ab", "tensor 'a': its shape"),
        ({"a": entry([0, 1 << 40, 1 << 40], 0, 0)}, b"", "tensor 'a': its shape"),
        ({"a": entry([2], 0, 3)}, b"abc", "tensor 'a': 3 bytes at 0 to 3, but U8 of shape"),
        ({"a": entry([2], 2, 0)}, b"ab", "tensor 'a': -2 bytes"),
        ({"a": entry([2], -2, 0)}, b"ab", "tensor 'a': its data_offsets"),
        ({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0]}}, b"ab", "tensor 'a': its data_offsets"),
        ({"a": entry([2], 0, 2), "b": entry([2], 1, 3)}, b"abc", "tensor 'b' overlaps"),
        ({"a": entry([2], 0, 2), "b": entry([2], 0, 2)}, b"ab", "overlaps"),
        ({"a": entry([2], 1, 3)}, b"abc", "1 bytes before tensor 'a' belong to no tensor"),
        ({"a": entry([4], 0, 4)}, b"ab", "truncated: tensor 'a' ends at byte"),
        ({"a": entry([2], 0, 2)}, b"abcd", "2 bytes after the last tensor"),
        ({"__metadata__": {"x": 3}}, b"", "__metadata__"),
    ],
)
def test_inconsistent_headers_are_refused_by_name(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    path = raw_file(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFile(path)
    assert message in str(caught.value)
    assert "bad.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated: 0 bytes"),
        (b"\x01\x02", "truncated: 2 bytes"),
        (struct.pack("<Q", 50) + b"{}", "truncated: its header has 50 bytes"),
        (struct.pack("<Q", 1 << 63) + b"{}", "claims a header of 9223372036854775808 bytes"),
        (struct.pack("<Q", 0), "does not begin with '{'"),
        (b"\x80\x02}q\x00(X\x06\x00\x00\x00weight", "claims a header"),
    ],
)
def test_files_that_are_not_safetensors_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        SafetensorsFile(path)
    with pytest.raises(CheckpointError, match="not a regular file"):
        SafetensorsFile(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be opened"):
        SafetensorsFile(tmp_path / "absent")


def test_a_file_truncated_anywhere_is_refused(tmp_path: Path) -> None:
    a_file(tmp_path / "f.safetensors")
    whole = (tmp_path / "f.safetensors").read_bytes()
    for size in range(0, len(whole), 7):
        (tmp_path / "cut.safetensors").write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            SafetensorsFile(tmp_path / "cut.safetensors")


def test_a_file_truncated_while_open_is_detected(tmp_path: Path) -> None:
    a_file(tmp_path / "f.safetensors")
    with SafetensorsFile(tmp_path / "f.safetensors") as file:
        with (tmp_path / "f.safetensors").open("r+b") as stream:
            stream.truncate(file.tensors["w"].offset + 3)
        with pytest.raises(CheckpointError, match="truncated while it was read"):
            file.read_float32("w")


def mutate(content: bytes, chooser: random.Random) -> bytes:
    """Damage the length or the header in a random way."""
    length = int.from_bytes(content[:8], "little")
    head, data = bytearray(content[: 8 + length]), content[8 + length :]
    for _ in range(chooser.randint(1, 4)):
        at = chooser.randrange(len(head))
        kind = chooser.randrange(6)
        if kind == 0:
            head[at] = chooser.randrange(256)
        elif kind == 1:
            del head[at : at + chooser.randint(1, 20)]
        elif kind == 2:
            head[at:at] = bytes(chooser.choice(b'{}[],:"0123456789-.eEnulltrue') for _ in range(chooser.randint(1, 12)))
        elif kind == 3:
            start = chooser.randrange(len(head))
            head[at:at] = head[start : start + chooser.randint(1, 40)]
        elif kind == 4:
            digits = [i for i, byte in enumerate(head) if 48 <= byte <= 57]
            if digits:
                head[chooser.choice(digits)] = chooser.choice(b"0123456789")
        else:
            head[at:at] = b"9" * chooser.choice((1, 5, 30, 5000))
        if not head:
            break
    if chooser.random() < 0.7:  # otherwise the length is wrong, which is another kind of damage
        head[:8] = max(len(head) - 8, 0).to_bytes(8, "little")
    return bytes(head) + data


def test_random_damage_gives_an_edgelm_error_or_a_readable_file(tmp_path: Path) -> None:
    a_file(tmp_path / "f.safetensors")
    whole = (tmp_path / "f.safetensors").read_bytes()
    chooser = random.Random(0)
    refused = 0
    for _ in range(600):
        path = tmp_path / "damaged.safetensors"
        path.write_bytes(mutate(whole, chooser))
        try:
            with SafetensorsFile(path) as file:
                for name in file.tensors:
                    file.read_raw(name)
        except CheckpointError as error:
            assert str(path) in str(error)
            refused += 1
    assert 400 < refused <= 600


def test_reading_and_writing_work_without_pread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = a_file(tmp_path / "f.safetensors")
    for name in ("preadv", "pwrite"):
        monkeypatch.delattr(os, name)
    with SafetensorsFile(tmp_path / "f.safetensors") as file:
        specs = {name: TensorSpec(info.dtype, info.shape) for name, info in file.tensors.items()}
        with SafetensorsWriter(tmp_path / "g.safetensors", specs) as writer:
            for name in specs:
                writer.write(name, file.read_raw(name))
    for name, tensor in safetensors.torch.load_file(tmp_path / "g.safetensors").items():
        assert torch.equal(tensor, tensors[name])
