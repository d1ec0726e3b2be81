"""Does every malformed config.json, header and index give an error of one line, quickly and with little memory?"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_checkpoint import CONFIGS, write_small

from edgelm.checkpoint import Checkpoint
from edgelm.checkpoint.safetensors import MAX_TENSORS, SafetensorsFile
from edgelm.errors import CheckpointError

COUNTS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "head_dim", "num_experts", "num_experts_per_tok",
)  # fmt: skip
NUMBERS = ("rms_norm_eps", "rope_theta", "clip_qkv")
OTHERS = ("tie_word_embeddings", "norm_topk_prob", "architectures", "rope_scaling", "rope_parameters", "layer_types",
          "quantization_config", "hidden_act", "model_type", "sliding_window", "auto_map")  # fmt: skip
# As JSON text: Python's json module also accepts NaN and Infinity.
VALUES = (
    "0", "-1", "1000000000000", "1e12", "1e308", "NaN", "Infinity", "-Infinity", '"7"', "true", "[]", "[1, 2]", "{}",
    '{"a": [1]}', "2.5", "1" + "0" * 400, "9" * 4000, "[" * 300 + "]" * 300, '"' + "x" * 10_000 + '"',
)  # fmt: skip


def opened(folder: Path) -> Any:
    """Open the checkpoint and check its tensors, as every command does first."""
    with Checkpoint.open(folder) as checkpoint:
        config = checkpoint.decoder
        checkpoint.check_tensors(config.tensor_shapes)
        return config


@pytest.mark.parametrize("family", ["olmoe", "fox"])
def test_any_value_in_any_field_gives_a_model_or_an_error_of_one_line(tmp_path: Path, family: str) -> None:
    folder = tmp_path / "c"
    plain = opened(write_small(folder, family).path)
    text = json.dumps(CONFIGS[family])
    refused = accepted = 0
    for field in (*COUNTS, *NUMBERS, *OTHERS):
        for value in VALUES:
            (folder / "config.json").write_text(f"{json.dumps({**CONFIGS[family], field: '@'})}".replace('"@"', value))
            start = time.perf_counter()
            try:
                config = opened(folder)
            except CheckpointError as error:
                assert "\n" not in str(error), field
                assert len(str(error)) < 500, (field, value)
                assert field in str(error) or "config.json" in str(error) or "shape" in str(error)
                refused += 1
            else:
                accepted += 1
                numeric = field in NUMBERS or field in ("max_position_embeddings", "rope_theta")
                assert numeric or config == plain or field in ("norm_topk_prob", "num_experts_per_tok"), (field, value)
            assert time.perf_counter() - start < 5
    (folder / "config.json").write_text(text)
    assert opened(folder) == plain
    assert refused > 300
    assert accepted < 100


def test_too_large_counts_are_refused_with_the_actual_counts(tmp_path: Path) -> None:
    folder = write_small(tmp_path / "c", "olmoe").path
    for field, value, said in (
        ("num_hidden_layers", 10**12, r"num_hidden_layers is 1000000000000, but the weight files hold 2 layers"),
        ("num_hidden_layers", 3, r"num_hidden_layers is 3, but the weight files hold 2 layers"),
        ("num_experts", 5, r"num_experts is 5, but the weight files hold 4 experts per layer"),
        ("num_experts", 10**9, r"num_experts is 1000000000, but the weight files hold 4 experts per layer"),
        ("max_position_embeddings", 10**12, r"max_position_embeddings is 1000000000000; at most 16777216 is possible"),
        (
            "vocab_size",
            10**9,
            r"'model.embed_tokens.weight' has shape \(96, 64\), config.json asks for \(1000000000, 64\)",
        ),
        ("rope_theta", 10**400, r"rope_theta is a number of about 401 digits; expected a number above zero that"),
        ("hidden_size", 2**40, r"hidden_size is 1099511627776; at most 2147483647 is possible"),
    ):
        (folder / "config.json").write_text(json.dumps({**CONFIGS["olmoe"], field: value}))
        with pytest.raises(CheckpointError, match=said):
            opened(folder)


LIMITED = """
import resource, sys, time
from pathlib import Path
import edgelm.models.llama, edgelm.models.olmoe
from edgelm.checkpoint import Checkpoint
from edgelm.errors import CheckpointError
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20), resource.RLIM_INFINITY))
for folder in sys.argv[1:]:
    start = time.process_time()
    try:
        with Checkpoint.open(Path(folder)) as opened:
            config = opened.decoder
            opened.check_tensors(config.tensor_shapes)
        print("accepted", folder)
    except CheckpointError as error:
        print(f"{time.process_time() - start:.3f}", error)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_hostile_folders_are_refused_within_a_second_and_200_megabytes(tmp_path: Path) -> None:
    folders = []
    for number, change in enumerate(
        (
            {"num_hidden_layers": 10**12},
            {"num_experts": 10**12},
            {"num_hidden_layers": 2, "num_experts": 2**31 - 1},
            {"max_position_embeddings": 10**12},
            {"vocab_size": 2**31 - 1},
            {"id2label": {str(i): "x" for i in range(900_000)}},
        )
    ):
        folder = write_small(tmp_path / str(number), "olmoe").path
        (folder / "config.json").write_text(json.dumps({**CONFIGS["olmoe"], **change}))
        folders.append(folder)
    empty = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100)}
    entry = json.dumps(empty)[1:-1].encode()
    long = write_small(tmp_path / "long", "olmoe").path
    header = b"{" + b",".join([entry] * 14_400) + b"}"  # duplicate names are not detected before the size
    assert len(header) > 90_000_000
    (long / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    many = write_small(tmp_path / "many", "olmoe").path
    header = b"{" + b",".join([entry] * 4_000) + b"}"
    (many / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    numbers = write_small(tmp_path / "numbers", "olmoe").path
    header = b'{"a":[' + b"1," * (15 << 20) + b"1]}"
    (numbers / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    index = write_small(tmp_path / "index", "olmoe").path
    (index / "model.safetensors").rename(index / "a.safetensors")
    names = b",".join(b'"t%d":"a.safetensors"' % i for i in range(1_500_000))
    (index / "model.safetensors.index.json").write_bytes(b'{"weight_map":{' + names + b"}}")
    stack = write_small(tmp_path / "stack", "olmoe").path
    header = json.dumps(
        {
            "model.layers.0.mlp.experts.gate_up_proj": {
                "dtype": "BF16",
                "shape": [2**24, 2, 1],
                "data_offsets": [0, 2**26],
            }
        }
    ).encode()
    with (stack / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        stream.truncate(8 + len(header) + 2**26)
    folders += [long, many, numbers, index, stack]
    found = subprocess.run(
        [sys.executable, "-c", LIMITED, *map(str, folders)], capture_output=True, text=True, check=True, timeout=120
    )
    lines = found.stdout.splitlines()
    assert len(lines) == len(folders), found.stdout
    wanted = (
        "num_hidden_layers is", "num_experts is", "num_experts is", "max_position_embeddings is", "has shape",
        "is larger than 8388608 bytes", "claims a header of", "describes some 400000 tensors", "describes some",
        "holds more than 400000 values", "too many experts",
    )  # fmt: skip
    for line, said in zip(lines, wanted, strict=True):
        seconds, message = line.split(" ", 1)
        assert said in message, line
        assert float(seconds) < 1, line


def test_a_header_with_the_largest_number_of_tensors_is_read(tmp_path: Path) -> None:
    header = json.dumps(
        {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(MAX_TENSORS)}
    ).encode()
    (tmp_path / "f.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with SafetensorsFile(tmp_path / "f.safetensors") as file:
        assert len(file.tensors) == MAX_TENSORS


def test_rounding_to_bfloat16_keeps_nan(tmp_path: Path) -> None:
    from edgelm.export.graph.base import stored_as

    values = np.array([np.nan, -np.nan, 1.0, np.inf], np.float32)
    bits = np.asarray(stored_as(values, "bfloat16", "w")).astype(np.uint16)
    assert ((bits[:2] & 0x7FFF) > 0x7F80).all()  # NaN: all exponent bits, and some of the fraction
    assert bits[2:].tolist() == [0x3F80, 0x7F80]
