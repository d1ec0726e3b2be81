"""Does the demo find both checkpoints, and take them through all steps from quantisation to parity?"""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from edgelm.cli.demo import NAMES, RECIPES, find_checkpoints
from edgelm.cli.main import cli
from edgelm.errors import EdgeLMError

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": False,
}
CONFIGS = {
    "olmoe-tiny": {
        **COMMON,
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "num_key_value_heads": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": False,
        "tie_word_embeddings": False,
        "eos_token_id": 50,
        "pad_token_id": 1,
    },
    "fox-tiny": {
        **COMMON,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch")
    from edgelm.synth import write_random_checkpoint

    folder = tmp_path_factory.mktemp("checkpoints")
    for name, config in CONFIGS.items():
        write_random_checkpoint(config, folder / name)
    return folder


def test_the_demo_runs_all_steps_and_compares(checkpoints: Path, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    arguments = ["demo", "--checkpoints", str(checkpoints), "--out", str(out), "-n", "4"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    results = [line.split()[-1] for line in result.stdout.splitlines() if line.startswith(NAMES)]
    assert len(results) == len(NAMES) * len(RECIPES)
    assert "KL added: quantised reference -> this device" in result.stdout
    # The limits are for trained weights, so random ones may fail; the exit code must agree with the table.
    assert set(results) <= {"passed", "FAILED"}
    assert result.exit_code == int("FAILED" in results)
    for name in NAMES:
        for recipe in RECIPES:
            assert (out / f"{name}-{recipe}" / "manifest.json").is_file()
            assert (out / f"{name}-{recipe}.html").read_text(encoding="utf-8").startswith("<!")


def test_another_folder_is_not_replaced(checkpoints: Path, tmp_path: Path) -> None:
    mine = tmp_path / "olmoe-tiny-int4"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    result = CliRunner().invoke(cli, ["demo", "--checkpoints", str(checkpoints), "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "exists already and is no bundle" in result.stderr
    assert (mine / "thesis.txt").read_text() == "years of work"


def test_missing_checkpoints_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        (tmp_path / "examples" / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "examples" / "checkpoints" / name / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert find_checkpoints(None) == Path("examples/checkpoints")
    with pytest.raises(EdgeLMError, match=r"olmoe-tiny and fox-tiny are not in .*--checkpoints"):
        find_checkpoints(tmp_path)
