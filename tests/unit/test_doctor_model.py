"""Does `edgelm doctor MODEL` say whether a model fits and how fast it will be, before it is downloaded or exported?"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hub_server import COMMIT, Hub, running
from small_checkpoint import CONFIGS, write_small

from edgelm.bundle.cpu_layout import Kind, PackedMatrix, Scales
from edgelm.bundle.kv_cache import KV_TYPES
from edgelm.cli.main import cli
from edgelm.errors import EdgeLMError
from edgelm.models import decoder
from edgelm.preflight.boards import board, boards, predict_for
from edgelm.preflight.fit import longest_context, memory
from edgelm.preflight.planned import plan
from edgelm.preflight.predict import operations, read_bytes
from edgelm.quant.recipe import Recipe
from edgelm.runtimes.onnxruntime.measure import AttentionWork, MatmulWork, Measurement, medians
from edgelm.runtimes.onnxruntime.native_library import library_path
from edgelm.synth import PUBLISHED

needs_operators = pytest.mark.skipif(library_path() is None, reason="this installation has no compiled operators")


def doctor(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["doctor", *map(str, arguments)])


def document(*arguments: str | Path) -> dict[str, Any]:
    result = doctor(*arguments, "--json")
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    assert found["fits"] == (result.exit_code == 0)
    return found


def config_only(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    files = {
        "config.json": json.dumps(dict(PUBLISHED["fox-1-1.6b"])).encode(),
        "model.safetensors": bytes(100_000),
        "tokenizer.json": bytes(5_000),
        "README.md": bytes(70_000),
    }
    with running(files) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


@needs_operators
@pytest.mark.parametrize("name", CONFIGS)
def test_says_what_a_checkpoint_takes_and_how_fast_it_will_be(name: str, tmp_path: Path) -> None:
    write_small(tmp_path / "model", name)
    found = document(tmp_path / "model", "--kv", "int8", "--context-length", "32")
    # Its tokenizer is missing, so no export takes it: that is said, and the rest too.
    assert not found["fits"]
    assert any("tokenizer" in reason for reason in found["refused"])
    for option in found["options"]:
        assert option["memory"]["context"] == 32
        assert option["memory"]["total"] > option["weights_bytes"] > 0
        speed = option["prediction"]
        assert speed["kv"] == "int8"
        for phase in ("prefill", "decode", "first_token"):
            assert 0 < speed[phase]["low"] <= speed[phase]["value"] <= speed[phase]["high"]
    assert [option["recipe"] for option in found["options"]] == ["int4", "int8"]


def test_of_a_hub_id_only_small_files_are_fetched(hub: Hub) -> None:
    found = document("owner/model", "--for", "pi5-8gb")
    assert {name for name, _ in hub.gets} == {"config.json"}
    assert found["kind"] == "hub"
    assert found["download_bytes"] == 105_000
    assert found["checkpoint_bytes"] == 105_000 + len(hub.files["config.json"])
    assert found["recommended"] == "int4"
    assert found["commands"][0] == "edgelm export owner/model -o model-int4 --recipe int4 --ops native"
    text = doctor(f"owner/model@{COMMIT}", "--for", "pi5-8gb")
    assert text.exit_code == 0
    assert "105 kB to download" in text.stdout


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("owner/gated", "access is restricted"),
        ("owner/none", "no such repository"),
        ("no folder", "no such folder"),
        ("https://huggingface.co/owner/model", "https://huggingface.co/owner/model: no such folder"),
        ("", "the model is '': give the folder of a checkpoint or of a bundle, or a hub id"),
        (__file__, "is a file: give the folder of a checkpoint or of a bundle, or a hub id"),
    ],
)
def test_what_cannot_be_read_gives_one_line(hub: Hub, name: str, message: str) -> None:
    result = doctor(name)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_without_a_network_the_connection_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    result = doctor("owner/model")
    assert result.exit_code == 1
    assert result.stderr.startswith("edgelm: error: owner/model: no such folder here, and the hub cannot be reached (")
    assert result.stderr.endswith("): check the connection, or give a folder\n")


def test_a_damaged_bundle_is_refused(tiny_bundle: Callable[[str, str, str], Path], tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle("fox", "int4", "native"), bundle)

    def refusal() -> str:
        result = doctor(bundle, "--for", "pi5-8gb")
        assert result.exit_code == 1
        assert result.stderr.count("\n") == 1
        return result.stderr

    config = (bundle / "config.json").read_bytes()
    (bundle / "config.json").write_bytes(b" " * len(config))
    assert "config.json: not valid JSON" in refusal()
    (bundle / "config.json").write_bytes(config.replace(b"LlamaForCausalLM", b"OtherForCausalLM").replace(
        b'"llama"', b'"other"'))  # fmt: skip
    assert "config.json: describes no model that EdgeLM knows" in refusal()
    (bundle / "config.json").write_bytes(config)
    other = doctor(bundle, "--for", "orin-nano-8gb")
    assert "takes bundles for tensorrt: export it again with --target tensorrt" in other.stdout
    os.truncate(bundle / "model.onnx.data", 1000)
    assert "model.onnx.data has 1000 bytes" in refusal()
    (bundle / "config.json").unlink()
    assert "config.json is missing" in refusal()


def test_damaged_and_unknown_configs_are_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    assert "has no config.json: give the folder of a checkpoint or of a bundle" in doctor(broken).stderr
    (broken / "config.json").write_text('{"architectures": [')
    result = doctor(broken)
    assert result.exit_code == 1
    assert "config.json" in result.stderr
    unknown = config_only(tmp_path / "unknown", {"architectures": ["GemmaForCausalLM"]})
    assert "GemmaForCausalLM" in document(unknown)["refused"][0]
    softcap = config_only(tmp_path / "softcap", {**CONFIGS["fox"], "attn_logit_softcapping": 30.0})
    found = document(softcap, "--for", "pi5-4gb")
    assert any("attn_logit_softcapping" in reason for reason in found["refused"])
    assert found["options"][0]["memory"]["total"] > 0
    assert any("no weights are here" in note for note in found["notes"])
    window = config_only(
        tmp_path / "window",
        {**CONFIGS["fox"], "architectures": ["MistralForCausalLM"], "sliding_window": 16},
    )
    assert any("sliding_window" in reason for reason in document(window, "--for", "pi5-4gb")["refused"])


def test_wrong_usage_is_told_apart(tmp_path: Path) -> None:
    model = config_only(tmp_path / "model", CONFIGS["fox"])
    for arguments, message in (
        (("--recipe", "int4"), "--recipe needs a model"),
        ((model, "--for", "pi9"), "there is no board 'pi9' in the table: give one of pi5-2gb"),
        ((model, "--context-length", "65"), "more than the model's context of 64"),
        ((model, "--for", "pi5", "--threads", "1"), "--threads is for this machine"),
        ((model, "--for", "thor", "--ops", "portable"), "--ops is for the target cpu, and this is for tensorrt"),
        ((model, "--target", "cuda", "--ops", "native"), "--ops is for the target cpu, and this is for cuda"),
        ((model, "--new-tokens", "x"), "'x' is not a valid whole number"),
    ):
        result = doctor(*arguments)
        assert result.exit_code == 2
        assert message in result.stderr


def test_a_model_that_is_too_large_for_a_board_is_refused(tmp_path: Path) -> None:
    model = config_only(tmp_path / "mistral", dict(PUBLISHED["mistral-7b"]))
    result = doctor(model, "--for", "pi5-4gb")
    assert result.exit_code == 1
    assert "cannot run on Raspberry Pi 5, 4 GB" in result.stdout
    assert "REFUSED" in result.stdout
    assert "int8: memory:" in result.stdout
    assert document(model, "--for", "pi5-8gb")["recommended"] == "int4"
    other = doctor(model, "--for", "pi5-8gb", "--target", "tensorrt")
    assert other.exit_code == 1
    assert "takes bundles for cpu" in other.stdout


def test_without_compiled_operators_portable_ones_are_assessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGELM_OPS_LIBRARY", "")
    model = config_only(tmp_path / "model", CONFIGS["fox"])
    found = document(model)
    assert found["options"][0]["ops"] == "portable"
    assert found["options"][0]["prediction"] is None
    assert any("no compiled operators" in note for note in found["notes"])
    assert "--ops portable" in found["commands"][-2]


def test_every_board_has_its_figures_and_their_source() -> None:
    for name, one in boards().items():
        assert 0 < one.kept < one.memory, name
        assert 0 < one.read <= 1 and 1e9 < one.bandwidth < 1e12, name
        assert len(one.source) > 40, name
        assert (one.sm is None) == (one.target == "cpu"), name
        assert (one.cores > 0) == (one.target == "cpu"), name
    assert board("pi5").name == board("PI5").name == "pi5-16gb"
    with pytest.raises(EdgeLMError, match="there is no board 'x' in the table"):
        board("x")
    assert "pi5-8gb" in doctor("--for", "list").stdout
    assert doctor("owner/model", "--for", "list").stdout == doctor("--for", "list").stdout
    assert json.loads(doctor("--for", "list", "--json").stdout)["thor"]["sm"] == 110


@pytest.mark.parametrize("recipe", ["int4", "int8"])
@pytest.mark.parametrize("name", ["olmoe-1b-7b", "fox-1-1.6b"])
def test_a_board_is_predicted_by_the_documented_formula(name: str, recipe: str) -> None:
    planned = plan(decoder(PUBLISHED[name]), Recipe.load(recipe))
    pi = board("pi5-8gb")
    found = predict_for(planned, pi, prompt_tokens=512, new_tokens=128)
    seconds = read_bytes(planned, "float16", 576) / (17.1e9 * 0.65)
    assert 1 / found.decode.value == pytest.approx(seconds, rel=0.03)  # the calls of the runtime come on top
    assert found.decode.low < found.decode.value < found.decode.high
    assert found.prefill is not None
    assert found.prefill.value == pytest.approx(0.35 * 4 * 2.4e9 * 64 / operations(planned, 512))
    # Two operations per active weight, and attention over half of the prompt.
    active = {"olmoe-1b-7b": 1_178_994_688 - 50304 * 2048, "fox-1-1.6b": 1_665_271_808 - 256000 * 2048}[name]
    info = planned.info
    attention = 2 * info.num_layers * info.num_heads * info.head_dim * 512
    assert operations(planned, 512) == pytest.approx(2 * active + attention, rel=1e-3)
    with pytest.raises(EdgeLMError, match="takes bundles for tensorrt"):
        predict_for(planned, board("orin-nano-8gb"), prompt_tokens=512, new_tokens=128)


def test_the_longest_context_is_the_longest_that_fits() -> None:
    planned = plan(decoder(PUBLISHED["fox-1-1.6b"]), Recipe.load("int4"))
    available = memory(planned, 5000).total
    assert longest_context(planned, available) == 5000
    assert longest_context(planned, available - 1) == 4999
    assert longest_context(planned, planned.weights_bytes) == 0
    assert longest_context(planned, 1 << 40) == 8192
    assert memory(planned, 5000, "int8").cache < memory(planned, 5000).cache


@needs_operators
def test_the_kernels_are_timed_on_every_kind_of_matrix_and_cache() -> None:
    works: list[Any] = []
    for kind in Kind:
        scales = Scales.FLOAT16 if kind.is_integer else Scales.FLOAT32 if kind is Kind.FP8 else Scales.NONE
        for swiglu in (False, True):
            matrix = PackedMatrix(kind, scales, False, swiglu, 128, 64, 32 if kind.is_integer else 64)
            if kind is Kind.INT8_SPLIT:
                matrix = matrix.with_low_offset(matrix.first_bytes)
            works += [MatmulWork(matrix, tokens, 2) for tokens in (1, 9, 130)]
            works.append(MatmulWork(matrix, 3, int8=False))
            if kind is Kind.INT8_SPLIT:
                works.append(MatmulWork(matrix, 1, high_only=True))
    works += [AttentionWork(kv, 4, 2, 16, past, tokens) for kv in KV_TYPES for past in (0, 600) for tokens in (1, 20)]
    for threads in (1, 2):
        passes = Measurement(works, threads).passes(3)
        assert [len(times) for times in passes] == [len(works)] * 3
        assert all(time > 0 for times in passes for time in times)
        assert len(medians(passes)) == len(works)


@needs_operators
def test_shapes_that_the_kernels_refuse_are_an_error() -> None:
    with pytest.raises(EdgeLMError, match="the kernels refuse these shapes"):
        Measurement([AttentionWork("float16", 3, 2, 16, 0, 1)], 1).passes(1)
    with pytest.raises(EdgeLMError, match="the kernels refuse these shapes"):
        Measurement([MatmulWork(PackedMatrix(Kind.INT4, Scales.FLOAT16, False, False, 64, 64, 24), 1)], 1).passes(1)
