"""Is every matrix calibrated with its actual inputs, and does an interrupted run give the same result?"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner

from edgelm.checkpoint import Checkpoint, WeightReader
from edgelm.cli.quantize import quantize as quantize_command
from edgelm.corpus import read_corpus, standard_library, windows
from edgelm.errors import CheckpointError, EdgeLMError, RecipeError
from edgelm.models import decoder as decoder_of
from edgelm.progress import Advance, Progress
from edgelm.quant import PRESETS, Fp8Scheme, Recipe, Rule, Scheme, WeightSource, codec
from edgelm.quant.calibration import (
    CALIBRATION_FILE,
    CalibrationReport,
    CoverageOptions,
    calibrate_checkpoint,
    coverage,
    resume,
)
from edgelm.quant.calibration import layer as stream
from edgelm.quant.calibration.options import CalibrationOptions
from edgelm.quant.calibration.report import LayerReport, TensorReport
from edgelm.quant.checkpoint import quantize_checkpoint
from edgelm.quant.methods import Moments, calibrate
from edgelm.reference.interpreter import Interpreter
from edgelm.reference.layerwise import LayerWeights, LayerwiseReference
from edgelm.synth import write_random_checkpoint
from edgelm.tokenization.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
from faults import KILL, interrupted_at, operations

OLMOE = {
    "architectures": ["OlmoeForCausalLM"],
    "vocab_size": 640,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "norm_topk_prob": False,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
FOX = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 640,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
CONFIGS = {"olmoe": OLMOE, "fox": FOX}
TRAINED = Path(__file__).parents[2] / "examples" / "checkpoints" / "olmoe-tiny"
INT4 = PRESETS["int4"]
SMALL: dict[str, Any] = {"samples": 24, "length": 24, "threads": 1}
EXPERT = "model.layers.{}.mlp.experts.{}.{}_proj.weight"

Calls = dict[str, tuple[torch.Tensor, int] | None]


class Notes(Progress):
    """Records notes and progress, and may stop the run at one of them."""

    def __init__(self, stop: Callable[[str], bool] = lambda what: False) -> None:
        self.notes: list[str] = []
        self.done: dict[str, float] = {}
        self.total: dict[str, float] = {}
        self._stop = stop

    def note(self, message: str) -> None:
        self.notes.append(message)
        if self._stop(message):
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def task(self, label: str, total: float, *, unit: str = "bytes") -> Iterator[Advance]:
        self.total[label], self.done[label] = total, 0.0

        def advance(amount: float) -> None:
            self.done[label] += amount
            if self._stop(f"{label} {self.done[label] / total:.2f}"):
                raise KeyboardInterrupt

        yield advance


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "some.txt"
    path.write_text("".join(standard_library()[0][10:200:40])[:40_000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {name: write_random_checkpoint(config, folder / name, seed=3) for name, config in CONFIGS.items()}


@pytest.fixture(scope="module")
def whole(checkpoints: dict[str, Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return OLMoE calibrated without an interruption."""
    out = tmp_path_factory.mktemp("whole") / "out"
    calibrate_checkpoint(checkpoints["olmoe"], out, INT4, text=text, **SMALL)
    return out


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Record the moments and the number of tokens with which each matrix is calibrated, in order."""
    found: Calls = {}

    def spy(weight: Any, scheme: Any, moments: Moments | None, *, method: str, name: str) -> Any:
        found[name] = None if moments is None else (moments.hessian.clone(), moments.tokens)
        return calibrate(weight, scheme, moments, method=method, name=name)

    monkeypatch.setattr(stream, "calibrate", spy)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def sample_ids(checkpoint: Path, text: Path, samples: int, length: int) -> torch.Tensor:
    found = windows(Tokenizer.from_folder(checkpoint), read_corpus(text).documents, samples, length)
    return torch.from_numpy(np.stack(found))


@torch.no_grad()
def inputs_of_matrices(
    checkpoint: Path, quantised: Path, ids: torch.Tensor, states: dict[str, torch.Tensor] | None = None
) -> tuple[dict[str, Any], list[Any]]:
    """Return the inputs [n, K] of each matrix when all matrices before it are quantised, and the routing.

    `states` gets the residual stream [n, D] before o and a dense block's down are added, and each block's `mlp.normed`.
    """
    found: dict[str, Any] = {}
    states = {} if states is None else states
    routed = []
    with Checkpoint.open(quantised) as opened:
        read = WeightSource(opened).dequantized().read_float32
        decoder = opened.decoder
        x = torch.from_numpy(read("model.embed_tokens.weight"))[ids]
        for index in range(decoder.num_layers):
            run = Interpreter(decoder, LayerWeights(decoder, index, read))
            attend, feed = decoder.layers[index]
            prefix = f"model.layers.{index}"
            h = run.norm(attend.before, x)
            found |= {f"{prefix}.self_attn.{m}_proj.weight": h for m in "qkv"}
            mixed = run.attend(attend.part, *run.project(attend.part, h), None, index)
            found[f"{prefix}.self_attn.o_proj.weight"] = mixed
            states[f"{prefix}.self_attn.o_proj.weight"] = x.flatten(0, 1)
            x = x + run.matmul(attend.part.o, mixed)
            h = run.norm(feed.before, x).flatten(0, 1)
            states |= {f"{prefix}.mlp.down_proj.weight": x.flatten(0, 1), f"{prefix}.mlp.normed": h}
            pairs = [(f"{prefix}.mlp", h)]
            if decoder.num_experts:
                logits, chosen, _ = run.route(feed.part, h)
                routed.append((logits, chosen))
                pairs = [(f"{prefix}.mlp.experts.{e}", h[(chosen == e).any(1)]) for e in range(decoder.num_experts)]
            for block, rows in pairs:
                gate, up = (torch.from_numpy(read(f"{block}.{m}_proj.weight")) for m in ("gate", "up"))
                found[f"{block}.gate_proj.weight"] = found[f"{block}.up_proj.weight"] = rows
                found[f"{block}.down_proj.weight"] = F.silu(rows @ gate.T) * (rows @ up.T)
            x = run.block(feed, x)
        if not decoder.tied:
            last = Interpreter(decoder, lambda name: torch.from_numpy(read(name)))
            found["lm_head.weight"] = last.norm(decoder.norm, x)
    return {name: value.reshape(-1, value.shape[-1]) for name, value in found.items()}, routed


@pytest.mark.parametrize("family", ["olmoe", "fox"])
def test_each_matrix_is_calibrated_with_the_inputs_of_the_quantised_model(
    checkpoints: dict[str, Path], text: Path, tmp_path: Path, calls: Calls, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "SLICE_TOKENS", 50)  # several slices, of samples and of tokens
    calibrate_checkpoint(
        checkpoints[family], tmp_path / "q", INT4, text=text, coverage=CoverageOptions(min_tokens=0), **SMALL
    )
    inputs, _ = inputs_of_matrices(checkpoints[family], tmp_path / "q", sample_ids(checkpoints[family], text, 24, 24))
    assert set(calls) == set(inputs)
    for name, call in calls.items():
        rows = inputs[name]
        if not len(rows):
            assert call is None, name
            continue
        assert call is not None, name
        hessian, tokens = call
        assert tokens == len(rows), name
        wanted = rows.T @ rows
        assert torch.allclose(hessian, wanted, rtol=1e-3, atol=1e-4 * float(wanted.diagonal().mean())), name
    # No two experts get the same tokens.
    if family == "olmoe":
        sums = [calls[EXPERT.format(0, e, "gate")][0].sum().item() for e in range(6)]  # type: ignore[index]
        assert len(set(sums)) == 6


@pytest.mark.parametrize("columns", [96, 1024, 1030])
def test_moments_of_wide_inputs_equal_the_full_matmul(columns: int) -> None:
    inputs = torch.randn(50, columns, generator=torch.Generator().manual_seed(1))
    moments = Moments.zeros(columns)
    for part in (inputs[:20], inputs[20:]):
        moments.add(part)
    wanted = inputs.double().T @ inputs.double()
    assert moments.tokens == 50
    assert torch.equal(moments.hessian, moments.hessian.T)
    assert torch.allclose(moments.hessian.double(), wanted, rtol=0, atol=50 * 2**-22 * float(wanted.max()))


def test_matrices_are_calibrated_in_the_order_of_the_forward_pass(
    checkpoints: dict[str, Path], text: Path, tmp_path: Path, calls: Calls
) -> None:
    calibrate_checkpoint(checkpoints["fox"], tmp_path / "q", INT4, text=text, **SMALL)
    parts = ["self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down"]
    # The tied table is used before there are inputs, so it is rounded to nearest.
    assert list(calls) == [f"model.layers.{i}.{part}_proj.weight" for i in range(3) for part in parts]


def test_the_report_gives_the_method_of_each_matrix(whole: Path, checkpoints: dict[str, Path], text: Path) -> None:
    report = CalibrationReport.read(whole)
    assert report is not None
    assert (report.samples, report.length) == (24, 24)
    assert (report.text, report.sha256) == ("some.txt", read_corpus(text).sha256)
    _, routed = inputs_of_matrices(checkpoints["olmoe"], whole, sample_ids(checkpoints["olmoe"], text, 24, 24))
    assert [layer.tokens for layer in report.layers] == [
        torch.bincount(chosen.flatten(), minlength=6).tolist() for _, chosen in routed
    ]
    with Checkpoint.open(whole) as opened:
        weights = WeightSource(opened)
        quantised = {name for name in weights.shapes if weights.scheme(name) is not None}
        assert set(report.tensors) == quantised - {"model.embed_tokens.weight"}
        for name, entry in report.tensors.items():
            assert entry.scheme == weights.scheme(name).name  # type: ignore[union-attr]
            assert entry.error is not None
            assert entry.error == entry.errors[entry.method] == min(entry.errors.values())
            assert set(entry.errors) == {"gptq", "search", "rtn"}
    assert sum(report.methods.values()) == len(report.tensors)
    assert not report.fallbacks
    assert report.info.methods == report.methods


def test_the_written_weights_are_those_that_were_computed(
    whole: Path, checkpoints: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    """The stored codes have the reported error; floats and the embedding are as without calibration."""
    quantize_checkpoint(checkpoints["olmoe"], tmp_path / "plain", INT4)
    inputs, _ = inputs_of_matrices(checkpoints["olmoe"], whole, sample_ids(checkpoints["olmoe"], text, 24, 24))
    report = CalibrationReport.read(whole)
    assert report is not None
    with (
        Checkpoint.open(checkpoints["olmoe"]) as original,
        Checkpoint.open(whole) as made,
        Checkpoint.open(tmp_path / "plain") as plain,
    ):
        assert made.config == plain.config
        assert set(made.tensors) == set(plain.tensors)
        source = WeightSource(made)
        for name in source.shapes:
            if source.scheme(name) is None and not name.endswith(".mlp.gate.weight"):
                assert np.array_equal(made.read_raw(name), original.read_raw(name)), name
        for part in ("qweight", "scales"):
            key = f"model.embed_tokens.{part}"
            assert np.array_equal(made.read_raw(key), plain.read_raw(key))
        better = 0
        # The error of an expert that borrowed tokens includes those.
        borrowing = tuple(
            f"model.layers.{i}.mlp.experts.{e}."
            for i, layer in enumerate(report.layers)
            for e, more in enumerate(layer.borrowed)
            if more
        )
        for name, entry in report.tensors.items():
            better += entry.error is not None and entry.error < entry.errors["rtn"]
            # The target of all others is the output of the float model, not that of their own weights.
            if name.startswith(borrowing) or ".down_proj." not in name:
                continue
            rows, weight = inputs[name].double(), torch.from_numpy(original.read_float32(name)).double()
            outputs = rows @ weight.T
            wrong = rows @ torch.from_numpy(source.dequantized().read_float32(name)).double().T - outputs
            error = float(wrong.square().sum() / outputs.square().sum())
            # Moments are float32 sums, so errors below a millionth of the outputs are not resolved.
            assert entry.error == pytest.approx(error, rel=0.02, abs=1e-6), name
        assert better > 0.9 * len(report.tensors)


def test_equal_runs_write_equal_bytes(whole: Path, checkpoints: dict[str, Path], text: Path, tmp_path: Path) -> None:
    calibrate_checkpoint(checkpoints["olmoe"], tmp_path / "again", INT4, text=text, **SMALL)
    assert contents(tmp_path / "again") == contents(whole)


@pytest.mark.parametrize(
    "moment",
    ["layer 0 (1 of 2)", "layer 1 (2 of 2)", "calibrating 0.1", "calibrating 0.8", "calibrating 1.00", "quant"],
)
def test_an_interrupted_run_resumes_with_the_same_result(
    whole: Path, checkpoints: dict[str, Path], text: Path, tmp_path: Path, moment: str
) -> None:
    out = tmp_path / "out"
    first = Notes(lambda what: what.startswith(moment))
    with pytest.raises(KeyboardInterrupt):
        calibrate_checkpoint(checkpoints["olmoe"], out, INT4, text=text, progress=first, **SMALL)
    assert not out.exists()
    second = Notes()
    calibrate_checkpoint(checkpoints["olmoe"], out, INT4, text=text, progress=second, **SMALL)
    assert contents(out) == contents(whole)
    assert not (tmp_path / "out.calibrating").exists()
    if moment == "quant":
        assert "calibrating" not in second.done  # nothing was left to calibrate
        return
    assert second.done["calibrating"] == pytest.approx(second.total["calibrating"])
    layers = [note[:7] for note in (*first.notes, *second.notes) if note.startswith("layer ")]
    assert layers == ["layer 0", "layer 1"]  # each once
    if first.notes:
        assert "run the same command again to resume" in first.notes[-1]


@pytest.mark.parametrize("failing", ["save_streams", "save_head"])
def test_a_run_that_ends_between_two_files_resumes(
    whole: Path, checkpoints: dict[str, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def fail(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(resume.ResumeFolder, failing, fail)
        calibrate_checkpoint(checkpoints["olmoe"], tmp_path / "out", INT4, text=text, **SMALL)
    calibrate_checkpoint(checkpoints["olmoe"], tmp_path / "out", INT4, text=text, **SMALL)
    assert contents(tmp_path / "out") == contents(whole)


@pytest.mark.skipif(os.name != "posix", reason="kill is POSIX")
def test_a_killed_run_resumes(whole: Path, checkpoints: dict[str, Path], text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    # The run waits for the signal at the end of its first layer.
    script = (
        "import time; from edgelm.quant.calibration import run; from edgelm.quant import PRESETS\n"
        "run._Run._say = lambda *a: time.sleep(60)\n"
        f"run.calibrate_checkpoint({str(checkpoints['olmoe'])!r}, {str(out)!r}, PRESETS['int4'], text={str(text)!r}, "
        "samples=24, length=24, threads=1)"
    )
    with subprocess.Popen([sys.executable, "-P", "-c", script], env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        kept = tmp_path / "out.calibrating" / "stream-00001.safetensors"
        for _ in range(600):
            if kept.exists():
                break
            time.sleep(0.1)
        with pytest.raises(EdgeLMError, match="another process is calibrating"):
            calibrate_checkpoint(checkpoints["olmoe"], out, INT4, text=text, **SMALL)
        process.send_signal(signal.SIGKILL)
    progress = Notes()
    calibrate_checkpoint(checkpoints["olmoe"], out, INT4, text=text, progress=progress, **SMALL)
    assert "resuming at layer 1 of 2" in progress.notes[0]
    assert contents(out) == contents(whole)


def test_state_of_another_run_is_replaced_with_a_note(
    whole: Path, checkpoints: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    stop = Notes(lambda what: what.startswith("layer 0"))
    with pytest.raises(KeyboardInterrupt):
        other = {**SMALL, "samples": 7}
        calibrate_checkpoint(checkpoints["olmoe"], out, PRESETS["int8"], text=text, progress=stop, **other)
    again = Notes()
    calibrate_checkpoint(checkpoints["olmoe"], out, INT4, text=text, progress=again, **SMALL)
    assert "another recipe, samples, tokens: starting again" in again.notes[0]
    assert contents(out) == contents(whole)


def test_an_unrelated_folder_is_not_emptied(checkpoints: dict[str, Path], text: Path, tmp_path: Path) -> None:
    mine = tmp_path / "out.calibrating" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(EdgeLMError, match=r"holds mine\.txt, which no calibration left there"):
        calibrate_checkpoint(checkpoints["fox"], tmp_path / "out", INT4, text=text, **SMALL)
    assert mine.read_text() == "mine"
    shutil.rmtree(mine.parent)
    mine.parent.write_text("a file")
    with pytest.raises(EdgeLMError, match="is a file, but the resume folder of a calibration is a folder"):
        calibrate_checkpoint(checkpoints["fox"], tmp_path / "out", INT4, text=text, **SMALL)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_partly_removed_state_is_not_resumed(tmp_path: Path) -> None:
    path = tmp_path / "out.calibrating"
    names = ["state.json", "smoothing.safetensors", "head.safetensors", "stream-00002.safetensors"]
    names += ["layer-00000.safetensors", "layer-00001.safetensors", ".head.safetensors.partial-0123456789abcdef"]

    def fill() -> None:
        path.mkdir(exist_ok=True)
        for name in names:
            (path / name).write_bytes(b"x")

    fill()
    log = operations(lambda: resume._remove(path))
    assert not path.exists()
    for at in range(len(log)):
        fill()
        assert interrupted_at(lambda: resume._remove(path), at, KILL) == "killed"
        left = resume.ResumeFolder(path)
        if left.next_layer() is not None or (path / "head.safetensors").is_file():
            assert all(file.is_file() for file in left.files(2)[:-1]), log[at]
            assert (path / "smoothing.safetensors").is_file(), log[at]
        assert not list(path.glob("*")) or (path / "state.json").is_file(), log[at]


def test_tokens_are_borrowed_from_those_with_the_next_router_scores() -> None:
    # Four experts, one per token. Expert 3 is no token's first choice; it is the second choice of tokens 4, 1, 0.
    probabilities = torch.tensor(
        [
            [0.60, 0.10, 0.10, 0.20],
            [0.55, 0.05, 0.10, 0.30],
            [0.50, 0.40, 0.06, 0.04],
            [0.10, 0.70, 0.15, 0.05],
            [0.05, 0.50, 0.05, 0.40],
            [0.05, 0.05, 0.80, 0.10],
        ]
    )
    logits = probabilities.log()
    weights, chosen = probabilities.topk(1)
    for needed, reach, borrowed, starved in [
        (1, 2, [4], False),
        (2, 2, [4, 1], False),
        (3, 2, [4, 1, 0, 5], True),
        (3, 1, [], True),
        (3, 3, [4, 1, 0], False),
        (6, 4, [4, 1, 0, 5, 3, 2], False),
        (7, 4, [4, 1, 0, 5, 3, 2], True),
        (0, 2, [], False),
    ]:
        shares = coverage.assign(logits, chosen, weights, CoverageOptions(reach=reach), needed)
        # Expert 3 is the second choice of four tokens, of which one is enough here.
        expected = borrowed[:needed]
        assert shares[3].own.tolist() == []
        assert shares[3].borrowed.tolist() == expected, (needed, reach)
        assert shares[3].starved is (len(expected) < needed), (needed, reach)
        assert shares[3].starved is starved or needed == 3
        assert shares[0].own.tolist() == [0, 1, 2]
        assert shares[0].weights.tolist() == pytest.approx([0.60, 0.55, 0.50])
        assert shares[1].own.tolist() == [3, 4]
        assert set(shares[0].borrowed.tolist()).isdisjoint([0, 1, 2])


def test_borrowed_tokens_are_used_for_moments_only(
    checkpoints: dict[str, Path], text: Path, tmp_path: Path, calls: Calls
) -> None:
    options = CoverageOptions(min_tokens=200, reach=2)
    made = calibrate_checkpoint(checkpoints["olmoe"], tmp_path / "q", INT4, text=text, coverage=options, **SMALL)
    ids = sample_ids(checkpoints["olmoe"], text, 24, 24)
    # The inputs of later layers agree only if borrowed tokens do not change the outputs.
    inputs, routed = inputs_of_matrices(checkpoints["olmoe"], tmp_path / "q", ids)
    borrowing = 0
    for index, layer in enumerate(made.report.layers):
        logits, chosen = routed[index]
        ranks = logits.argsort(1, descending=True).argsort(1)
        for expert, (own, more) in enumerate(zip(layer.tokens, layer.borrowed, strict=True)):
            name = EXPERT.format(index, expert, "gate")
            assert own == int((chosen == expert).sum())
            near = int(((ranks[:, expert] >= 2) & (ranks[:, expert] < 4)).sum())
            assert more == max(0, min(200 - own, near))
            assert (expert in layer.fallbacks) == (own + more < 200)
            call = calls[name]
            if expert in layer.fallbacks:
                assert call is None
                continue
            assert call is not None
            hessian, tokens = call
            assert tokens == own + more
            mine = inputs[name].T @ inputs[name]
            rest = hessian - mine
            assert (float(rest.trace()) > 1e-3 * float(mine.trace())) == (more > 0)
            borrowing += more > 0
    assert borrowing
    for name in ("model.layers.1.self_attn.q_proj.weight", "lm_head.weight"):
        wanted = inputs[name].T @ inputs[name]
        assert torch.allclose(calls[name][0], wanted, rtol=1e-3, atol=1e-4 * float(wanted.diagonal().mean()))  # type: ignore[index]


def test_experts_with_too_few_tokens_are_rounded_to_nearest_and_named(
    checkpoints: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    options = CoverageOptions(min_tokens=10_000)
    progress = Notes()
    made = calibrate_checkpoint(
        checkpoints["olmoe"], tmp_path / "q", INT4, text=text, coverage=options, progress=progress, **SMALL
    )
    assert [(f.layer, f.expert) for f in made.report.fallbacks] == [(i, e) for i in range(2) for e in range(6)]
    said = [note for note in progress.notes if "too few tokens" in note]
    assert len(said) == 12
    assert "layer 1, expert 5 has too few tokens" in said[-1]
    written = json.loads((tmp_path / "q" / CALIBRATION_FILE).read_text())
    assert written["fallbacks"][-1] == {"layer": 1, "expert": 5, "tokens": made.report.fallbacks[-1].tokens}
    assert written["methods"]["rtn"] >= 36
    with Checkpoint.open(checkpoints["olmoe"]) as plain, Checkpoint.open(tmp_path / "q") as opened:
        rounded, source = WeightSource(plain, INT4), WeightSource(opened)
        for matrix in ("gate", "up", "down"):
            name = EXPERT.format(1, 3, matrix)
            assert np.array_equal(source.quantized(name).codes, rounded.quantized(name).codes)
            assert written["layers"][1]["tensors"][name]["method"] == "rtn"


def test_required_coverage_fails_before_an_output_is_written(
    checkpoints: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "q"
    arguments = [str(checkpoints["olmoe"]), "-o", str(out), "--calibration", str(text), "--samples", "24"]
    arguments += ["--sample-length", "24", "--threads", "1"]
    wanted = ["--min-expert-tokens", "10000", "--require-coverage"]
    failed = CliRunner().invoke(quantize_command, [*arguments, *wanted])
    assert isinstance(failed.exception, EdgeLMError)  # the command line exits with 1
    message = str(failed.exception)
    assert "layer 0: 6 expert(s)" in message
    assert "10000" in message
    assert "5 (" in message
    assert list(tmp_path.iterdir()) == []
    enough = CliRunner().invoke(
        quantize_command, [*arguments, "--min-expert-tokens", "1", "--require-coverage", "--json"]
    )
    assert enough.exit_code == 0, enough.output
    said = json.loads(enough.stdout)["calibration"]
    assert said["samples"] == 24
    assert said["fallbacks"] == []


RECIPES = {
    "attention float": Recipe("a", Scheme(4, 32), (Rule("*.self_attn.*", None), Rule("*.mlp.gate.weight", None))),
    "experts float": Recipe("b", Scheme(4, 32), (Rule("*.mlp.*", None),)),
    "router too": Recipe("c", Scheme(8, 32), ()),
    "fp8": Recipe("d", Fp8Scheme(None), (Rule("lm_head.weight", None), Rule("*.mlp.gate.weight", None))),
    "by method": Recipe(
        "e",
        Scheme(4, 32, symmetric=False),
        (Rule("*.q_proj.*", Scheme(4, 32), method="rtn"), Rule("*.down_proj.*", Scheme(3, 32), method="search")),
        method="gptq",
    ),
}


@pytest.mark.parametrize("name", list(RECIPES))
def test_the_recipe_selects_matrices_and_schemes(
    checkpoints: dict[str, Path], text: Path, tmp_path: Path, name: str
) -> None:
    recipe = RECIPES[name]
    made = calibrate_checkpoint(checkpoints["olmoe"], tmp_path / "q", recipe, text=text, **SMALL)
    with Checkpoint.open(checkpoints["olmoe"]) as original, Checkpoint.open(tmp_path / "q") as opened:
        source = WeightSource(opened)
        assert source.recipe == recipe
        for tensor, shape in source.shapes.items():
            assert source.scheme(tensor) == recipe.scheme_for(tensor, shape)
            if source.scheme(tensor) is None:
                if tensor.endswith(".mlp.gate.weight"):
                    # The router is fitted to the quantised model's states: it changes a little and is not rounded.
                    apart = opened.read_float32(tensor) - original.read_float32(tensor)
                    assert 0 < np.abs(apart).max() < 0.5 * np.abs(original.read_float32(tensor)).max()
                    assert opened.info(tensor).dtype == "F32"
                else:
                    assert np.array_equal(opened.read_raw(tensor), original.read_raw(tensor))
            elif name == "by method" and tensor != "model.embed_tokens.weight":
                wanted = "rtn" if "q_proj" in tensor else "search" if "down_proj" in tensor else "gptq"
                assert made.report.tensors[tensor].method == wanted
    if name == "router too":
        assert "model.layers.0.mlp.gate.weight" in made.report.tensors


def test_invalid_input_is_refused_before_any_work(
    checkpoints: dict[str, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    olmoe, out = checkpoints["olmoe"], tmp_path / "q"
    empty, short = tmp_path / "empty.txt", tmp_path / "short.txt"
    empty.write_text(" \n")
    short.write_text("a few words")
    quantize_checkpoint(checkpoints["fox"], tmp_path / "already", INT4)
    (tmp_path / "there").mkdir()
    before = sorted(tmp_path.iterdir())

    def refused(error: type[EdgeLMError], match: str, **changes: Any) -> None:
        given = {"source": olmoe, "out": out, "recipe": INT4, "text": text, **SMALL, **changes}
        with pytest.raises(error, match=match):
            calibrate_checkpoint(given.pop("source"), given.pop("out"), given.pop("recipe"), **given)
        assert sorted(tmp_path.iterdir()) == before

    refused(EdgeLMError, "holds no text", text=empty)
    refused(EdgeLMError, "give more text", text=short)
    refused(EdgeLMError, "no text at", text=tmp_path / "nowhere")
    refused(EdgeLMError, "--sample-length", length=129)
    refused(EdgeLMError, "at least one sample", samples=0)
    refused(EdgeLMError, "exists already", out=tmp_path / "there")
    refused(RecipeError, "already quantised", source=tmp_path / "already")
    refused(RecipeError, "quantises none", recipe=PRESETS["none"])
    refused(RecipeError, "matches none", recipe=Recipe("typo", Scheme(4, 32), (Rule("*.gat.weight", None),)))
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
        refused(EdgeLMError, "free some space")
    with pytest.raises(EdgeLMError, match="0 or more"):
        CoverageOptions(min_tokens=-1)
    with pytest.raises(EdgeLMError, match="reach"):
        CoverageOptions(reach=0)
    with pytest.raises(EdgeLMError, match="two tokens"):
        CalibrationOptions(length=1)


def test_the_command_refuses_invalid_combinations(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    base = [str(checkpoints["fox"]), "-o", str(tmp_path / "q")]
    alone = CliRunner().invoke(quantize_command, [*base, "--samples", "3"])
    assert alone.exit_code == 2
    assert "only with --calibration" in alone.output
    unknown = CliRunner().invoke(quantize_command, [*base, "--recipe", "int5", "--calibration", "builtin"])
    assert unknown.exit_code == 2
    assert "there is no recipe 'int5'" in unknown.output


def test_a_damaged_weight_is_named(checkpoints: dict[str, Path], text: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoints["fox"], damaged)
    with Checkpoint.open(damaged) as opened:
        info = opened.info("model.layers.1.mlp.up_proj.weight")
    with info.file.open("r+b") as file:
        file.seek(info.offset)
        file.write(b"\x80\x7f")  # infinity in bfloat16
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj"):
        calibrate_checkpoint(damaged, tmp_path / "q", INT4, text=text, **SMALL)


def kl_of(reference: WeightReader, quantised: WeightReader, config: dict[str, Any], ids: np.ndarray[Any, Any]) -> float:
    """Return the mean KL(reference || quantised) in nats per token."""
    logs = []
    for reader in (reference, quantised):
        model = LayerwiseReference(decoder_of(config), reader)
        final = torch.from_numpy(model.windows(ids)).flatten(0, 1)
        logs.append(torch.cat([block for _, block in model.head_blocks(final)], -1).log_softmax(-1))
    return float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())


def test_calibration_loses_less_than_rounding_on_a_trained_model(tmp_path: Path) -> None:
    """Measured on other text than the calibration text, with one layer only, so that it is fast."""
    config = json.loads((TRAINED / "config.json").read_text())
    documents = standard_library()
    text = tmp_path / "text.txt"
    text.write_text("".join(documents[0][::100])[:30_000], encoding="utf-8")
    short = Recipe("short", Scheme(4, 32), (Rule("model.layers.[0-2].*", None), *INT4.rules))
    calibrate_checkpoint(TRAINED, tmp_path / "q", short, text=text, samples=16, length=128, threads=1)
    held_out = windows(Tokenizer.from_folder(TRAINED), [documents[1][0][:30_000]], 6, 128)
    with Checkpoint.open(TRAINED) as original, Checkpoint.open(tmp_path / "q") as made:
        ids = np.stack(held_out)
        plain = kl_of(original, WeightSource(original, short).dequantized(), config, ids)
        found = kl_of(original, WeightSource(made).dequantized(), config, ids)
    assert found < 0.75 * plain


def test_codes_of_a_finished_layer_are_read_as_they_were_made(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    folder = resume.ResumeFolder(tmp_path)
    schemes = [Scheme(4, 32, symmetric=False), Scheme(3, 32), Fp8Scheme(None)]
    tensors = {
        f"model.layers.3.m{i}.weight": codec.quantize(rng.standard_normal((8, 64)).astype(np.float32), scheme)
        for i, scheme in enumerate(schemes)
    }
    report = LayerReport(
        {"a": TensorReport("int4-g32-sym", "gptq", 0.25, {"gptq": 0.25, "rtn": 0.5})}, [3, 4], [0, 1], [1]
    )
    folder.save_layer(3, tensors, {}, report)
    assert folder.layer_report(3) == report
    x = torch.randn(2, 3, 8)
    folder.save_streams(3, x, x)
    folder.save_streams(4, x + 1, x)
    assert folder.next_layer() == 4
    assert all(map(torch.equal, folder.load_streams(4), (x + 1, x)))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["layer-00003.safetensors", "stream-00004.safetensors"]
