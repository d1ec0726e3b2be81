"""Does the benchmark count the bytes read per token, and report its measurements?"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny_graph import Shape, write_tiny_model

from edgelm import devices
from edgelm.benchmark import (
    Spread,
    bench,
    bytes_per_token,
    choose_tokens,
    exceeds_caches,
    memory_bandwidth,
    read_bandwidth,
)
from edgelm.bundle import Bundle, TensorEntry
from edgelm.bundle.cpu_layout import RESCORE
from edgelm.cli.bench import table
from edgelm.cli.main import cli
from edgelm.errors import ContextLengthError, EdgeLMError


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "bundle", Shape(vocab=512, context=128))


def tensor(name: str, size: int) -> TensorEntry:
    return TensorEntry(name, 0, size, 0)


def test_a_token_reads_its_experts_once_and_no_embedding_table(bundle: Bundle) -> None:
    manifest = dataclasses.replace(
        bundle.manifest,
        model=dataclasses.replace(bundle.manifest.model, num_experts=8, experts_per_token=2),
        tensors=(
            tensor("layers.0.moe.gate_up.qweight", 8000),
            tensor("layers.0.attn.qkv.qweight", 300),
            tensor("model.embed_tokens.qweight", 5000),
            tensor("rope.cos", 77),
            tensor("lm_head.scales", 20),
        ),
    )
    cache = 2 * 2 * 2 * 16 * 4  # keys and values, layers, KV heads, head_dim, float32
    assert bytes_per_token(manifest, 0) == 8000 * 2 // 8 + 300 + 20
    assert bytes_per_token(manifest, 10) == 8000 * 2 // 8 + 300 + 20 + 10 * cache
    tied = dataclasses.replace(manifest, model=dataclasses.replace(manifest.model, tied=True))
    assert bytes_per_token(tied, 0) == 2000 + 300 + 20 + 5000


def test_of_a_head_in_split_nibbles_the_high_ones_and_the_rescored_tiles_are_read(bundle: Bundle) -> None:
    manifest = dataclasses.replace(
        bundle.manifest,
        model=dataclasses.replace(bundle.manifest.model, vocab_size=RESCORE * 32 * 4),
        tensors=(tensor("lm_head.weight", 1000), tensor("lm_head.weight.lower", 800)),
    )
    assert bytes_per_token(manifest, 0) == 1000 + 800 // 4


def test_the_cache_is_counted_in_its_own_type(bundle: Bundle) -> None:
    manifest = dataclasses.replace(bundle.manifest, tensors=())
    heads = 2 * 2 * 2  # keys and values, layers, KV heads
    assert bytes_per_token(manifest, 3, "float16") == 3 * heads * 16 * 2
    assert bytes_per_token(manifest, 3, "int8") == 3 * heads * (16 + 4)


def test_median_and_spread_are_those_of_the_runs() -> None:
    spread = Spread.of([3.0, 1.0, 2.0, 10.0])
    assert (spread.median, spread.low, spread.high) == (2.5, 1.0, 10.0)


def test_bandwidth_is_plausible_for_memory() -> None:
    assert 5e8 < read_bandwidth(1) < 1e12


def test_bench_reports_measurements_and_settings(bundle: Bundle) -> None:
    result = bench(bundle.path, prompt_tokens=20, new_tokens=10, repeat=2, threads=1)
    assert len(result.decode_tokens_per_second.runs) == 2
    assert result.decode_tokens_per_second.low > 0
    assert result.prefill_tokens_per_second.median > 0
    # The prompt takes some time, and the first token comes after it.
    assert all(seconds * 1.001 >= 20 / max(result.prefill_tokens_per_second.runs)
               for seconds in result.time_to_first_token.runs)  # fmt: skip
    assert result.files["model.onnx"] == bundle.manifest.files["model.onnx"].size
    # A model of some kilobytes fits into the CPU's caches, so its reads do not measure memory bandwidth.
    assert result.decode_bandwidth is None
    assert result.bandwidth_share is None


def test_a_model_larger_than_the_caches_has_its_share_of_the_bandwidth(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgelm.devices.cache_bytes", lambda: 2048)
    result = bench(bundle.path, prompt_tokens=20, new_tokens=10, repeat=1, threads=1)
    assert result.decode_bandwidth == result.bytes_per_token * result.decode_tokens_per_second.median
    assert result.machine_bandwidth is not None
    assert result.bandwidth_share == result.decode_bandwidth / result.machine_bandwidth
    said = r"^bandwidth +[\d.]+ [kMG]B/s: .* per token; \d+% of the [\d.]+ [MG]B/s that 1 thread reads here$"
    assert re.search(said, table(result), re.MULTILINE)
    scarce = dataclasses.replace(result, machine_bandwidth=None)
    assert "the memory's own was not measured: too little of it is free" in table(scarce)


def test_bandwidth_is_measured_only_if_memory_exceeds_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgelm.devices.cache_bytes", lambda: 1 << 20)
    assert [exceeds_caches(size) for size in ((4 << 20) - 1, 4 << 20)] == [False, True]
    full = devices.describe()
    monkeypatch.setattr(devices, "describe", lambda: dataclasses.replace(full, memory_available=(16 << 20) - 4))
    assert memory_bandwidth(1) is None
    monkeypatch.setattr(devices, "describe", lambda: dataclasses.replace(full, memory_available=16 << 20))
    assert memory_bandwidth(1) is not None


@pytest.mark.parametrize(
    ("prompt", "new", "context", "chosen"),
    [
        (None, None, 4096, (512, 128)), (None, None, 640, (512, 128)), (None, None, 639, (512, 127)),
        (None, None, 128, (103, 25)), (None, None, 2, (1, 1)), (100, None, 128, (100, 28)),
        (None, 100, 128, (28, 100)), (127, 1, 128, (127, 1)), (3000, None, 4096, (3000, 128)),
        (None, 4000, 4096, (96, 4000)),
    ],
)  # fmt: skip
def test_default_token_counts_fit_into_the_context(
    prompt: int | None, new: int | None, context: int, chosen: tuple[int, int]
) -> None:
    assert choose_tokens(prompt, new, context) == chosen


@pytest.mark.parametrize(("prompt", "new"), [(128, None), (None, 128), (100, 29)])
def test_requested_token_counts_that_do_not_fit_are_refused(prompt: int | None, new: int | None) -> None:
    with pytest.raises(ContextLengthError, match=r"tokens .*do not fit into the model's context of 128 tokens"):
        choose_tokens(prompt, new, 128)


def test_a_short_context_is_measured_with_a_note(bundle: Bundle) -> None:
    result = CliRunner().invoke(cli, ["bench", str(bundle.path), "--repeat", "1"])
    assert result.exit_code == 0, result.output
    assert "prefill 103" in result.stdout
    assert "decode 25" in result.stdout
    assert "the model's context of 128 has no room for the usual 512 prompt and 128 new tokens" in result.stdout


def test_a_gpu_bundle_without_a_gpu_gives_an_error_of_one_line(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGELM_CUDA_DRIVER", str(tmp_path / "libcuda.so.1"))
    copy = shutil.copytree(bundle.path, tmp_path / "bundle")
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "target": "cuda"}))
    result = CliRunner().invoke(cli, ["bench", str(copy)])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"edgelm: error: {copy} was exported for an NVIDIA GPU: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("option", ["prompt_tokens", "new_tokens", "repeat"])
def test_counts_below_one_are_refused(bundle: Bundle, option: str) -> None:
    with pytest.raises(EdgeLMError, match=f"{option} is 0"):
        bench(bundle.path, **{option: 0})  # type: ignore[arg-type]


def test_more_tokens_than_the_context_are_refused(bundle: Bundle) -> None:
    with pytest.raises(ContextLengthError, match=r"100 prompt tokens and 29 new ones .*context of 128"):
        bench(bundle.path, prompt_tokens=100, new_tokens=29)


def test_the_verb_prints_a_table_or_json(bundle: Bundle) -> None:
    arguments = ["bench", str(bundle.path), "--prompt-tokens", "16", "--new-tokens", "4", "--repeat", "1"]
    table = CliRunner().invoke(cli, arguments)
    assert table.exit_code == 0, table.output
    for word in ("load", "prefill 16", "first token", "decode 4", "resident peak", "reads"):
        assert word in table.stdout
    result = CliRunner().invoke(cli, [*arguments, "--json"])
    document = json.loads(result.stdout)
    assert document["decode_tokens_per_second"]["median"] > 0
    assert document["bandwidth_share"] is None
    assert document["notes"] == []
    assert document["device"]["cpu"]


def test_a_missing_bundle_fails_before_measuring(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["bench", str(tmp_path / "none")])
    assert result.exit_code == 1
    assert "does not exist" in result.stderr


def test_bandwidth_of_a_mapped_file(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(bytes(4 << 20))
    assert 5e8 < read_bandwidth(2, tmp_path / "weights") < 1e13
    (tmp_path / "small").write_bytes(bytes(9))
    with pytest.raises(EdgeLMError, match="small is too small"):
        read_bandwidth(2, tmp_path / "small")
