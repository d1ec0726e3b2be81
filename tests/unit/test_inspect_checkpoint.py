"""Does `edgelm inspect` describe a checkpoint of any architecture, and list every reason why it cannot be exported?"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edgelm.bundle import ModelInfo
from edgelm.cli.inspect import inspect

CHECKPOINTS = Path(__file__).parents[2] / "examples" / "checkpoints"


def changed(out: Path, name: str, **changes: Any) -> Path:
    shutil.copytree(CHECKPOINTS / name, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, **changes}))
    return out


def document(folder: Path) -> dict[str, Any]:
    result = CliRunner().invoke(inspect, [str(folder), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    rows = CliRunner().invoke(inspect, [str(folder)], catch_exceptions=False).output
    assert bool(re.search(r"^export +supported$", rows, re.MULTILINE)) == found["exportable"] == (not found["refused"])
    assert rows.count("REFUSED") == len(found["refused"])
    return found


@pytest.mark.parametrize(("name", "family"), [("fox-tiny", "llama"), ("olmoe-tiny", "olmoe")])
def test_supported_checkpoints_are_reported_as_exportable(tmp_path: Path, name: str, family: str) -> None:
    found = document(changed(tmp_path / "c", name, auto_map={"AutoModel": "own.Own"}, pretraining_tp=2))
    assert (found["family"], found["exportable"], found["quantized"]) == (family, True, False)


def test_every_unsupported_field_is_listed_with_value_and_meaning(tmp_path: Path) -> None:
    folder = changed(
        tmp_path / "c",
        "fox-tiny",
        rope_scaling={"rope_type": "mrope", "factor": 8.0},
        attention_bias=True,
        vocab_size=100,
        quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True},
        num_hidden_layers=7,
    )
    found = document(folder)
    assert found["family"] == "llama"
    for reason, said in zip(
        sorted(found["refused"]),
        (
            "attention_bias True (biases in attention): not implemented",
            "num_hidden_layers is 7, but the weight files hold 6 layers",
            "quantization_config.quant_method 'bitsandbytes' (read are",
            "rope_scaling.rope_type mrope (RoPE over several axes, factor 8.0): not implemented",
            "the tokenizer has 3072 tokens, the model's table only 100 rows",
        ),
        strict=True,
    ):
        assert said in reason


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"},
            "'Gemma3ForCausalLM' is not supported",
        ),
        ({"architectures": None, "model_type": "gemma3"}, "model_type 'gemma3' is not supported"),
        ({"architectures": [3]}, "architectures is not a list of names"),
        ({"architectures": "LlamaForCausalLM"}, "architectures is not a list of names"),
    ],
    ids=str,
)
def test_unknown_models_are_described_too(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    found = document(changed(tmp_path / "c", "fox-tiny", **change))
    assert (found["family"], found["tensors"], found["dtypes"]) == (None, 56, {"BF16": 56})
    assert len(found["refused"]) == 1
    assert said in found["refused"][0]


def test_a_missing_tokenizer_is_listed(tmp_path: Path) -> None:
    folder = changed(tmp_path / "c", "olmoe-tiny")
    (folder / "tokenizer.json").unlink()
    assert ["neither tokenizer.json nor tokenizer.model" in reason for reason in document(folder)["refused"]] == [True]


def test_bundles_of_the_family_fox_are_read_as_llama() -> None:
    sizes = dict.fromkeys(("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "vocab_size"), 1)
    info = ModelInfo(family="fox", name="x", context_length=1, tied=True, **sizes)
    assert info.family == "llama"
    assert ModelInfo(family="olmoe", name="x", context_length=1, tied=True, **sizes).family == "olmoe"
