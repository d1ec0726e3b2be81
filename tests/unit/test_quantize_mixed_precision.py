"""Do `quantize` and `export` use the mixed-precision recipe for a given number of bits or bytes?"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import edgelm.quant.mixed_precision
from edgelm.bundle import Bundle
from edgelm.checkpoint import Checkpoint
from edgelm.cli.main import cli
from edgelm.corpus import standard_library
from edgelm.quant import Recipe, WeightSource
from edgelm.quant.calibration import CalibrationReport
from edgelm.quant.mixed_precision import MixedPrecision, mixed_precision_recipe
from edgelm.runtimes.onnxruntime.native_library import library_path
from edgelm.synth import write_random_checkpoint

CONFIG = {
    "architectures": ["OlmoeForCausalLM"],
    "vocab_size": 640,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
CALIBRATED = ["--samples", "12", "--sample-length", "24", "--threads", "1"]

needs_native = pytest.mark.skipif(library_path() is None, reason="no native operators here")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "some.txt"
    path.write_text("".join(standard_library()[0][10:200:40])[:20_000], encoding="utf-8")
    return path


@pytest.fixture
def builtin(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the built-in text by a small one, since tokenizing its megabytes takes a minute."""

    def measured(*arguments: Any, **options: Any) -> MixedPrecision:
        assert options["text"] == "builtin"
        return mixed_precision_recipe(*arguments, **options | {"text": text, "tokens": 256})

    monkeypatch.setattr(edgelm.quant.mixed_precision, "mixed_precision_recipe", measured)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(CONFIG, tmp_path_factory.mktemp("checkpoint") / "olmoe", seed=3)


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def never(*arguments: Any, **options: Any) -> None:
    raise AssertionError("measured")


def test_quantize_uses_the_chosen_recipe_and_writes_it(checkpoint: Path, builtin: None, tmp_path: Path) -> None:
    out = tmp_path / "q"
    done = run("quantize", checkpoint, "-o", out, "--bits", "5", "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["recipe"] == "bits-5"
    assert 4.5 < said["budget"]["bits"] <= 5
    assert said["budget"]["predicted_kl"] >= said["budget"]["bound_kl"] > 0
    assert f"chosen: {said['budget']['bits']:.2f} bits per weight" in done.stderr
    assert "expected KL" in done.stderr
    recipe = Recipe.load(out / "recipe.toml")
    assert "# " in (out / "recipe.toml").read_text()
    with Checkpoint.open(out) as opened:
        source = WeightSource(opened)
        assert source.recipe == recipe
        assert len({source.scheme(name) for name in source.shapes} - {None}) > 1
    # Another run accepts the recipe that was written.
    again = run("quantize", checkpoint, "-o", tmp_path / "again", "--recipe", out / "recipe.toml")
    assert again.exit_code == 0, again.output
    weights = "model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (out / weights).read_bytes()
    assert not (tmp_path / "again" / "recipe.toml").exists()


def test_calibration_uses_the_chosen_recipe_and_the_same_text(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "q"
    done = run("quantize", checkpoint, "-o", out, "--bits", "5", "--calibration", text, *CALIBRATED, "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert (said["budget"]["text"], said["budget"]["tokens"]) == ("some.txt", 256)  # one window
    assert said["calibration"]["samples"] == 12
    wanted = mixed_precision_recipe(checkpoint, bits=5, text=text, tokens=12 * 24, name="bits-5")
    assert Recipe.load(out / "recipe.toml") == wanted.recipe
    report = CalibrationReport.read(out)
    assert report is not None
    with Checkpoint.open(out) as opened:
        source = WeightSource(opened)
        assert source.recipe == wanted.recipe
        assert {name: entry.scheme for name, entry in report.tensors.items()} == {
            name: scheme.name for name in report.tensors if (scheme := source.scheme(name)) is not None
        }


@needs_native
def test_export_keeps_within_the_given_size(checkpoint: Path, builtin: None, tmp_path: Path) -> None:
    out = tmp_path / "b"
    base = ["export", checkpoint, "-o", out, "--greedy-tokens", "1", "--threads", "1"]
    done = run(*base, "--max-size", "200 KiB")
    assert done.exit_code == 0, done.output
    manifest = Bundle.open(out).manifest
    assert manifest.recipe.name == "size-205kB"
    assert manifest.files[manifest.graph.weights_file].size <= 200 << 10
    assert len(Recipe.from_toml(manifest.recipe.toml).rules) > 1
    assert "".join(f"edgelm recipe {checkpoint} --max-size {200 << 10} -o FILE".split()) in "".join(done.stderr.split())
    as_json = run(*base, "--bits", "6", "--overwrite", "--json")
    assert json.loads(as_json.stdout)["budget"]["bits"] <= 6


@pytest.mark.parametrize("verb", ["quantize", "export"])
def test_invalid_combinations_are_refused_before_any_work(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    (tmp_path / "there").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(edgelm.quant.mixed_precision, "mixed_precision_recipe", never)
        base = [verb, checkpoint, "-o", tmp_path / "q"]
        for two in (["--bits", "4", "--max-size", "1MiB"], ["--bits", "4", "--recipe", "int4"]):
            done = run(*base, *two)
            assert done.exit_code == 2
            assert "one of --recipe, --bits and --max-size" in done.stderr
        assert run(*base, "--bits", "0").exit_code == 2
        assert run(*base, "--bits", "4", "--samples", "3").exit_code == 2
        there = run(verb, checkpoint, "-o", tmp_path / "there", "--bits", "4", *_native(verb))
        assert there.exit_code == 1
        assert "--overwrite" in there.stderr
        size = run(*base, "--max-size", "much", *_native(verb))
        assert size.exit_code == 2
        assert "is not a size" in size.stderr
        if verb == "export":
            portable = run(*base, "--bits", "4", "--ops", "portable")
            assert portable.exit_code == 2
            assert "--ops native" in portable.stderr
    small = run(*base, "--bits", "2", *_native(verb))
    assert small.exit_code == 1
    assert "these schemes take at least" in small.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_bits_cannot_be_chosen_for_a_quantised_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    assert run("quantize", checkpoint, "-o", tmp_path / "q").exit_code == 0
    done = run("export", tmp_path / "q", "-o", tmp_path / "b", "--bits", "5", *_native("export"))
    assert done.exit_code == 1
    assert "already quantised" in done.stderr


def _native(verb: str) -> list[str]:
    return ["--ops", "native"] if verb == "export" else []


def test_recipe_prints_a_table_of_what_it_chose_and_the_next_command(
    checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    common = ("recipe", checkpoint, "--bits", "5", "--calibration", text, "--tokens", "256", "-o")
    done = run(*common, tmp_path / "r.toml")
    assert done.exit_code == 0, done.output
    sentence, _, head, _, *rows = done.stdout.splitlines()
    expected = r".*r\.toml: [\d.]+ bits per weight, a weights file of .*, expected KL \S+ nats per token"
    assert re.match(expected, sentence)
    assert head.split() == ["matrix", "weights", "bits", "KL,", "nats/token", "schemes"]
    assert rows
    assert all(re.search(r" [\d,]+ +[\d.]+ +\S+e[-+]\d+ +\d+ x \S+", row) for row in rows)
    assert f"edgelm export {checkpoint} -o BUNDLE --recipe {tmp_path / 'r.toml'}" in " ".join(done.stderr.split())
    said = json.loads(run(*common, tmp_path / "again.toml", "--json").stdout)
    assert said["recipe"] == str(tmp_path / "again.toml")
    assert len(said["kinds"]) == len(rows)
    assert Recipe.load(tmp_path / "again.toml").rules == Recipe.load(tmp_path / "r.toml").rules
