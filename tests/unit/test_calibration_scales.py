"""Do smoothed weights and static activation scales go through a calibration, whole or interrupted?"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from edgelm.checkpoint import Checkpoint, bf16_to_float32, float32_to_bf16
from edgelm.cli.quantize import quantize as quantize_command
from edgelm.corpus import read_corpus, standard_library, windows
from edgelm.errors import EdgeLMError, RecipeError
from edgelm.progress import Advance, Progress
from edgelm.quant import PRESETS, Recipe, Rule, Scheme, WeightSource
from edgelm.quant.calibration import CALIBRATION_FILE, CalibrationReport, calibrate_checkpoint, resume
from edgelm.quant.calibration.ranges import calibrated_scales
from edgelm.quant.checkpoint import quantize_checkpoint
from edgelm.quant.reference import activation_kinds, reference_module
from edgelm.quant.scaled_checkpoint import Scaling
from edgelm.synth import write_random_checkpoint
from edgelm.tokenization.tokenizer import Tokenizer

COMMON: dict[str, Any] = {
    "vocab_size": 640,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
}
MOE = {"intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False}
CONFIGS = {
    "olmoe": {"architectures": ["OlmoeForCausalLM"], **COMMON, **MOE},
    "fox": {"architectures": ["LlamaForCausalLM"], **COMMON, "intermediate_size": 96, "tie_word_embeddings": True},
}
FAMILIES = pytest.mark.parametrize("family", CONFIGS)
SMALL: dict[str, Any] = {"samples": 16, "length": 24, "threads": 1}
INT8 = PRESETS["int8"]
STATIC = {
    "olmoe": Recipe("static", Scheme(8, 32), INT8.rules[:1], activations="int8-static"),
    "fox": Recipe("static", Scheme(8, 32), activations="int8-static"),
}
OUTLIERS = (3, 17, 24)


class Watched(Progress):
    """Keeps tasks and notes, and ends the run where it is told to."""

    def __init__(self, stop: Callable[[str], bool] = lambda what: False) -> None:
        self.tasks: list[str] = []
        self.notes: list[str] = []
        self._stop = stop

    def note(self, message: str) -> None:
        self.notes.append(message)

    @contextlib.contextmanager
    def task(self, label: str, total: float, *, unit: str = "bytes") -> Iterator[Advance]:
        self.tasks.append(label)
        if self._stop(label):
            raise KeyboardInterrupt
        yield lambda amount: None


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "some.txt"
    path.write_text("".join(standard_library()[0][10:200:40])[:30_000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint of each family in which three channels of every norm are eight times the others."""
    folder = tmp_path_factory.mktemp("checkpoints")
    found = {name: write_random_checkpoint(config, folder / name, seed=3) for name, config in CONFIGS.items()}
    for path in found.values():
        with Checkpoint.open(path) as opened:
            norms = {info: opened.read_raw(name) for name, info in opened.tensors.items() if len(info.shape) == 1}
        for info, values in norms.items():
            loud = bf16_to_float32(values)
            loud[list(OUTLIERS)] *= 8
            with info.file.open("r+b") as file:
                file.seek(info.offset)
                file.write(float32_to_bf16(loud).tobytes())
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def sample_ids(checkpoint: Path, text: Path) -> np.ndarray[Any, Any]:
    return np.stack(windows(Tokenizer.from_folder(checkpoint), read_corpus(text).documents, 16, 24))


def apart(checkpoint: Path, quantised: Path, text: Path) -> float:
    """Return the relative error of the logits with the recipe's activations."""
    ids = torch.from_numpy(sample_ids(checkpoint, text))
    with Checkpoint.open(checkpoint) as original, Checkpoint.open(quantised) as made:
        exact = reference_module(WeightSource(original))(ids)
        found = reference_module(WeightSource(made))(ids)
    return float((found - exact).norm() / exact.norm())


@FAMILIES
def test_static_scales_are_measured_on_the_calibrated_model(
    checkpoints: dict[str, Path], text: Path, tmp_path: Path, family: str
) -> None:
    calibrate_checkpoint(checkpoints[family], tmp_path / "q", STATIC[family], text=text, **SMALL)
    with Checkpoint.open(tmp_path / "q") as opened:
        source = WeightSource(opened)
        wanted = calibrated_scales(source, sample_ids(checkpoints[family], text))
        assert set(wanted) == set(activation_kinds(source)) == set(source.static_inputs)
        for name in source.shapes:
            found = source.input_scale(name)
            assert found == (pytest.approx(wanted[name], rel=1e-5) if name in wanted else None), name
    assert apart(checkpoints[family], tmp_path / "q", text) < 0.5  # large because of the outlier channels


def test_only_static_activations_get_a_scale(checkpoints: dict[str, Path], text: Path, tmp_path: Path) -> None:
    down = Rule("*.down_proj.weight", Scheme(8, 32), activations="fp8-static")
    recipe = Recipe("one rule", Scheme(8, 32), (down,), activations="int8-token")
    calibrate_checkpoint(checkpoints["fox"], tmp_path / "q", recipe, text=text, **SMALL)
    with Checkpoint.open(tmp_path / "q") as opened:
        stored = {name for name in opened.tensors if name.endswith(".input_scale")}
    assert stored == {f"model.layers.{i}.mlp.down_proj.input_scale" for i in range(2)}


def test_a_run_that_ends_while_writing_scales_resumes(checkpoints: dict[str, Path], text: Path, tmp_path: Path) -> None:
    calibrate_checkpoint(checkpoints["olmoe"], tmp_path / "whole", STATIC["olmoe"], text=text, **SMALL)
    ended = Watched(lambda task: task == "ranges")
    with pytest.raises(KeyboardInterrupt):
        calibrate_checkpoint(
            checkpoints["olmoe"], tmp_path / "out", STATIC["olmoe"], text=text, progress=ended, **SMALL
        )
    assert not (tmp_path / "out").exists()
    again = Watched()
    calibrate_checkpoint(checkpoints["olmoe"], tmp_path / "out", STATIC["olmoe"], text=text, progress=again, **SMALL)
    assert "calibrating" in ended.tasks
    assert "calibrating" not in again.tasks
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_static_activations_without_calibration_text_are_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"int8-static activations for .* --calibration, or choose \"int8-token\""):
        quantize_checkpoint(checkpoints["olmoe"], tmp_path / "q", STATIC["olmoe"])
    path = tmp_path / "static.toml"
    path.write_text(STATIC["olmoe"].to_toml())
    done = CliRunner().invoke(
        quantize_command, [str(checkpoints["olmoe"]), "-o", str(tmp_path / "q"), "--recipe", str(path)]
    )
    assert isinstance(done.exception, RecipeError)  # the command line exits with 1
    assert list(tmp_path.iterdir()) == [path]
    # An embedding table has no inputs to quantise, unless it is also the head.
    table = Rule("model.embed_tokens.weight", Scheme(8, 32), activations="int8-static")
    looked_up = Recipe("table", Scheme(8, 32), (table, *INT8.rules))
    quantize_checkpoint(checkpoints["olmoe"], tmp_path / "table", looked_up)
    with pytest.raises(RecipeError, match="embed_tokens"):
        quantize_checkpoint(checkpoints["fox"], tmp_path / "tied", Recipe("table", Scheme(8, 32), (table,)))


@FAMILIES
@pytest.mark.parametrize("target", ["activations", "weights"])
def test_a_smoothed_calibrated_checkpoint_computes_nearly_the_same(
    checkpoints: dict[str, Path], text: Path, tmp_path: Path, family: str, target: str
) -> None:
    made = calibrate_checkpoint(checkpoints[family], tmp_path / "q", INT8, text=text, smoothing=target, **SMALL)
    assert made.report.smoothing == made.report.info.smoothing == target
    assert json.loads((tmp_path / "q" / CALIBRATION_FILE).read_text())["smoothing"] == target
    read = CalibrationReport.read(tmp_path / "q")
    assert read == made.report
    norm = "model.layers.1.post_attention_layernorm.weight"
    with Checkpoint.open(checkpoints[family]) as original, Checkpoint.open(tmp_path / "q") as opened:
        # Tensors that smoothing changed are stored in float32, not rounded to the checkpoint's type.
        assert opened.info(norm).dtype == "F32"
        assert original.info(norm).dtype == "BF16"
        before, after = original.read_float32(norm), opened.read_float32(norm)
        assert np.abs(after / before - 1).max() > 0.2
        assert (after != bf16_to_float32(float32_to_bf16(after))).any()
        assert opened.tensors["model.norm.weight"].dtype == ("BF16" if family == "fox" else "F32")
    # With random weights the smallest error changes the selected experts, so the logits of an MoE differ more.
    assert apart(checkpoints[family], tmp_path / "q", text) < {"fox": 0.02, "olmoe": 0.05}[family]


@FAMILIES
def test_smoothing_helps_static_activations_with_outlier_channels(
    checkpoints: dict[str, Path], text: Path, tmp_path: Path, family: str
) -> None:
    errors = {}
    for smoothing in (None, "activations"):
        out = tmp_path / str(smoothing)
        calibrate_checkpoint(checkpoints[family], out, STATIC[family], text=text, smoothing=smoothing, **SMALL)
        errors[smoothing] = apart(checkpoints[family], out, text)
    # Most of the MoE's error comes from other selected experts.
    assert errors["activations"] < {"fox": 0.8, "olmoe": 1.0}[family] * errors[None], errors


def test_a_smoothed_run_resumes_with_its_scales(checkpoints: dict[str, Path], text: Path, tmp_path: Path) -> None:
    olmoe, out = checkpoints["olmoe"], tmp_path / "out"
    given: dict[str, Any] = {"text": text, "smoothing": "activations", **SMALL}
    calibrate_checkpoint(olmoe, tmp_path / "whole", INT8, **given)
    with pytest.raises(KeyboardInterrupt):
        calibrate_checkpoint(olmoe, out, INT8, progress=Watched(lambda task: task == "smoothing"), **given)
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]  # nothing was done yet
    with pytest.raises(KeyboardInterrupt):
        calibrate_checkpoint(olmoe, out, INT8, progress=Watched(lambda task: task == "calibrating"), **given)
    again = Watched()
    calibrate_checkpoint(olmoe, out, INT8, progress=again, **given)
    assert "smoothing" not in again.tasks
    assert "resuming with smoothed weights" in again.notes[0]
    assert contents(out) == contents(tmp_path / "whole")


def test_state_with_other_smoothing_is_not_resumed(checkpoints: dict[str, Path], text: Path, tmp_path: Path) -> None:
    fox, out = checkpoints["fox"], tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        stop = Watched(lambda task: task == "calibrating")
        calibrate_checkpoint(fox, out, INT8, text=text, smoothing="weights", progress=stop, **SMALL)
    again = Watched()
    calibrate_checkpoint(fox, out, INT8, text=text, progress=again, **SMALL)
    assert "another smoothing: starting again" in again.notes[0]
    assert "smoothing" not in again.tasks
    with Checkpoint.open(fox) as original, Checkpoint.open(out) as made:
        norm = "model.layers.0.input_layernorm.weight"
        assert np.array_equal(original.read_raw(norm), made.read_raw(norm))


def test_scales_are_stored_exactly(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows, columns = (rng.standard_normal(size).astype(np.float32) for size in (5, 7))
    kept = {"a.weight": Scaling(rows), "rows/b.weight": Scaling(None, columns), "c.weight": Scaling(rows, columns)}
    folder = resume.ResumeFolder(tmp_path)
    assert folder.load_smoothing() is None
    assert not folder.is_worth_keeping
    folder.save_smoothing({})
    assert folder.load_smoothing() == {}
    folder.save_smoothing(kept)
    assert folder.is_worth_keeping
    found = folder.load_smoothing()
    assert found is not None
    assert set(found) == set(kept)
    for name, scaling in kept.items():
        for one, other in ((scaling.rows, found[name].rows), (scaling.columns, found[name].columns)):
            assert (one is None) == (other is None)
            assert one is None or np.array_equal(one, other)


def test_smoothing_of_unknown_kind_or_without_text_is_refused(
    checkpoints: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    with pytest.raises(EdgeLMError, match="no smoothing for 'both': give activations or weights"):
        calibrate_checkpoint(checkpoints["fox"], tmp_path / "q", INT8, text=text, smoothing="both", **SMALL)
    base = [str(checkpoints["fox"]), "-o", str(tmp_path / "q"), "--smooth"]
    alone = CliRunner().invoke(quantize_command, [*base, "weights"])
    assert alone.exit_code == 2
    assert "only with --calibration" in alone.output
    assert CliRunner().invoke(quantize_command, [*base, "both", "--calibration", str(text)]).exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_the_command_smooths(checkpoints: dict[str, Path], text: Path, tmp_path: Path) -> None:
    arguments = [str(checkpoints["fox"]), "-o", str(tmp_path / "q"), "--recipe", "int8", "--calibration", str(text)]
    arguments += ["--samples", "16", "--sample-length", "24", "--threads", "1", "--smooth", "weights", "--json"]
    done = CliRunner().invoke(quantize_command, arguments)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["calibration"]["smoothing"] == "weights"
