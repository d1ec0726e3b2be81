"""Does the check need only a run-time install, and does the live reference agree with the stored pack?"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import edgelm
from edgelm.cli.parity import parity, summary
from edgelm.errors import ParityError, RecipeError
from edgelm.parity.check import check_parity
from edgelm.parity.golden import GoldenOptions, make_pack
from edgelm.parity.limits import LIMITS
from edgelm.parity.noise import rounding_limits
from edgelm.parity.pack import ParityPack
from edgelm.parity.prompts import Prompt
from edgelm.parity.report import render
from edgelm.runtimes import open_runtime

from . import damage
from .conftest import CHECKPOINTS, OPERATOR_SETS

# Types that portable operators do not have.
NATIVE_SCHEMES = ["int3-g32-sym", "int5-g64-asym", "int6-g32-sym", "fp8-b32"] if "native" in OPERATOR_SETS else []
IMPORT_ROOT = Path(edgelm.__file__).parents[1]
EXPORT_ONLY = ("torch", "onnx", "safetensors", "huggingface_hub", "transformers")


def test_the_check_runs_where_only_the_run_time_packages_are(exported, tmp_path):
    script = f"""
import sys, json
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {EXPORT_ONLY!r}:
            raise ImportError(name + " is not installed here")
sys.meta_path.insert(0, Refuse())
import edgelm
report = edgelm.check_parity(sys.argv[1], threads=1)
from edgelm.parity.report import render
from edgelm.parity.limits import LIMITS
from edgelm.runtimes import open_runtime
render(report)
print(json.dumps([report.passed, sorted(set({EXPORT_ONLY!r}) & set(sys.modules))]))
"""
    environment = {**os.environ, "PYTHONPATH": str(IMPORT_ROOT)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, str(exported("olmoe", "int4"))],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [True, []]


@pytest.mark.parametrize(("model", "recipe"), [("olmoe", "int4"), ("fox", "none")])
def test_the_reference_computed_anew_agrees_with_the_pack(exported, model, recipe):
    report = check_parity(exported(model, recipe), threads=1, checkpoint=CHECKPOINTS / f"{model}-tiny")
    pack = next(check for check in report.checks if check.name == "pack")
    assert pack.passed, pack
    assert report.passed
    assert "computed now" in report.reference


@pytest.mark.parametrize("scheme", ["int4-g64-asym", "int8-row-sym", *NATIVE_SCHEMES])
def test_custom_recipes_pass_with_the_limits_of_their_kind(tmp_path, scheme):
    from edgelm.export import export_bundle
    from edgelm.quant.recipe import Recipe, Rule
    from edgelm.quant.scheme import parse_scheme

    recipe = Recipe("own", parse_scheme(scheme), (Rule("*.mlp.gate.weight", None),))
    report = check_parity(export_bundle(CHECKPOINTS / "olmoe-tiny", tmp_path / "b", recipe=recipe), threads=1)
    assert report.passed, [(check.name, check.value, check.limit) for check in report.failures]
    assert report.kind == scheme.split("-")[0]


@pytest.mark.skipif("native" not in OPERATOR_SETS, reason="portable operators have one type for the experts of a layer")
def test_experts_of_several_bit_widths_in_one_layer_pass(tmp_path):
    from edgelm.bundle import Bundle
    from edgelm.cli.inspect import packed_groups
    from edgelm.export import export_bundle
    from edgelm.quant.recipe import PRESETS, Recipe, Rule
    from edgelm.quant.scheme import Scheme

    widths = (3, 4, 5, 6, 8)
    rules = [Rule(f"*.experts.{e}.*", Scheme(widths[e % 5], 32, e % 2 == 0)) for e in range(32)]
    # Gate and up are one matrix: these take the wider of their types.
    rules.insert(0, Rule("*.experts.0.up_proj.weight", Scheme(5, 64)))
    recipe = Recipe("mixed", Scheme(4, 32), (*rules, *PRESETS["int4"].rules))
    bundle = export_bundle(CHECKPOINTS / "olmoe-tiny", tmp_path / "b", recipe=recipe)
    stored = {group.matrix.kind for group in packed_groups(Bundle.open(tmp_path / "b")) if "experts" in group.name}
    assert {int(kind) for kind in stored} == set(widths)
    report = check_parity(bundle, threads=1)
    assert report.passed, [(check.name, check.value, check.limit) for check in report.failures]
    assert report.kind == "int3"


def test_a_bundle_of_a_quantised_checkpoint_passes(tmp_path):
    from edgelm.export import export_bundle
    from edgelm.quant.checkpoint import quantize_checkpoint
    from edgelm.quant.recipe import Recipe

    quantize_checkpoint(CHECKPOINTS / "fox-tiny", tmp_path / "q", Recipe.load("int4"))
    bundle = export_bundle(tmp_path / "q", tmp_path / "b")
    report = check_parity(bundle, threads=1)
    assert report.passed, [(check.name, check.value, check.limit) for check in report.failures]
    assert report.kind == "int4"
    assert not report.float_loss.known
    assert "not known" in report.float_loss.text
    assert [check.name for check in check_parity(bundle, threads=1, max_kl=1.0).failures] == ["float_kl"]


@pytest.mark.parametrize(("model", "dtype"), [("olmoe", "fp16"), ("fox", "bf16")])
def test_the_device_is_compared_with_weights_as_they_are_stored(tmp_path, model, dtype):
    from edgelm.export import ExportOptions, export_bundle
    from edgelm.synth import write_random_checkpoint

    config = json.loads((CHECKPOINTS / f"{model}-tiny" / "config.json").read_text())
    config |= {"vocab_size": 600, "num_hidden_layers": 2}
    write_random_checkpoint(config, tmp_path / "float32", dtype="F32")
    bundle = export_bundle(tmp_path / "float32", tmp_path / "b", recipe="none", options=ExportOptions(dtype=dtype))
    report = check_parity(bundle, threads=1)
    assert report.passed, [(check.name, check.value, check.limit) for check in report.failures]
    pack = ParityPack.load(bundle.file("parity"))
    assert pack.quantized is not None
    assert not np.array_equal(pack.quantized.sketches[-1], pack.reference.sketches[-1])


@pytest.fixture(scope="module")
def far_from_float(tmp_path_factory):
    """A bundle that is computed rightly and whose float model is another."""
    from edgelm.export import ExportOptions, export_bundle
    from edgelm.quant.checkpoint import quantize_checkpoint
    from edgelm.quant.recipe import Recipe
    from edgelm.synth import write_random_checkpoint

    root = tmp_path_factory.mktemp("far")
    config = json.loads((CHECKPOINTS / "fox-tiny" / "config.json").read_text())
    write_random_checkpoint(config, root / "float")
    quantize_checkpoint(CHECKPOINTS / "fox-tiny", root / "q", Recipe.load("int4"))
    return export_bundle(root / "q", root / "b", options=ExportOptions(reference=root / "float")).path


def test_the_loss_of_the_recipe_is_reported_without_a_check(far_from_float):
    report = check_parity(far_from_float, threads=1)
    assert report.passed, [(check.name, check.value, check.limit) for check in report.failures]
    loss = report.float_loss
    assert loss.kl == pytest.approx(report.float_kl_mean)
    assert loss.kl == pytest.approx(loss.kl_reference, rel=0.05)
    assert loss.kl > 0.5
    assert f"{loss.kl:.3g} nats, large from 0.3 on" in loss.warning
    assert "for int4" in loss.warning
    assert not any("float" in check.name for check in report.checks)
    html = render(report)
    assert "Warning:</b> the mean KL to the float model is" in html
    assert html.index("<h2>Cost of quantisation</h2>") > html.index("<h2>What was compared</h2>")
    assert report.to_dict()["float_loss"]["warning"] == loss.warning
    lines = summary(report).splitlines()
    assert any(line.split()[:3] == ["quantisation", "cost:", "mean"] for line in lines)
    assert any(line.startswith("warning: the mean KL") for line in lines)


def test_a_loss_within_the_usual_has_no_warning(exported):
    loss = check_parity(exported("fox", "int4"), threads=1).float_loss
    assert loss.known
    assert loss.warning is None
    assert 3e-3 < loss.kl < 1.2e-2  # measured: 6e-3


@pytest.mark.parametrize(("max_kl", "code"), [("1000", 0), ("0.5", 1)])
def test_max_kl_makes_the_loss_a_check(far_from_float, max_kl, code):
    result = CliRunner().invoke(parity, [str(far_from_float), "--threads", "1", "--max-kl", max_kl])
    assert result.exit_code == code, result.output
    assert f"; --max-kl is {max_kl}" in result.stdout
    report = check_parity(far_from_float, threads=1, max_kl=float(max_kl))
    assert [check.name for check in report.failures] == ["float_kl"] * code
    assert report.cause is None


@pytest.mark.parametrize("max_kl", [float("nan"), float("inf"), -0.1])
def test_an_invalid_max_kl_is_refused(exported, max_kl):
    with pytest.raises(ParityError, match=r"max_kl is .*: give a number of nats"):
        check_parity(exported("fox", "int4"), threads=1, max_kl=max_kl)


WILD = {
    "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "vocab_size": 600, "hidden_size": 64,
    "intermediate_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 4,
    "num_experts": 16, "num_experts_per_tok": 4, "norm_topk_prob": False, "max_position_embeddings": 512,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip


@pytest.fixture(scope="module")
def wild(tmp_path_factory):
    """A random MoE that amplifies rounding: weights twice as large as usual, and outlier channels."""
    from edgelm.checkpoint import Checkpoint
    from edgelm.checkpoint.writer import ShardedWriter, TensorSpec
    from edgelm.export import ExportOptions, export_bundle
    from edgelm.synth import write_random_checkpoint

    root = tmp_path_factory.mktemp("wild")
    folder = write_random_checkpoint(WILD, root / "checkpoint", seed=9, dtype="F32")
    opened = Checkpoint.open(folder)
    weights = {name: opened.read_float32(name).copy() for name in opened.tensors}
    with ShardedWriter(folder, {name: TensorSpec("F32", value.shape) for name, value in weights.items()}) as writer:
        for name, value in weights.items():
            if value.ndim == 1 and "self_attn" not in name:
                value[[3, 17, 24]] *= 8
            writer.write(name, value * (1 if value.ndim == 1 or "embed" in name else 2))
    options = ExportOptions(ops=OPERATOR_SETS[0])
    return export_bundle(folder, root / "b", recipe="int4", options=options).path


def test_a_correct_device_passes_with_a_model_that_amplifies_rounding(wild):
    report = check_parity(wild, threads=1)
    assert report.passed, [(check.name, check.value, check.limit) for check in report.failures]
    assert report.kl_mean > 5 * LIMITS["int4"].kl_mean
    assert any("amplifies rounding" in note for note in report.notes)


def test_damage_is_found_in_a_model_that_amplifies_rounding(wild, tmp_path):
    folder = tmp_path / "b"
    shutil.copytree(wild, folder)
    damage.renormalise_routing(folder, layer=3)
    damage.reseal(folder)
    report = check_parity(folder, threads=1)
    assert report.first_diverged_layer == 3


@pytest.mark.parametrize("model", ["olmoe", "fox"])
def test_the_limits_of_calm_models_are_far_below_the_fixed_ones(exported, model):
    fixed = LIMITS["int4"]
    limits = rounding_limits(ParityPack.load(exported(model, "int4") / "parity"), fixed)
    assert limits.logit_error < fixed.logit_error / 5
    assert limits.decode_error < fixed.decode_error / 5
    assert limits.kl_mean < fixed.kl_mean * (1 if model == "olmoe" else 0.1)


def test_a_pack_without_rounded_record_uses_the_fixed_limits(copied):
    folder = copied("olmoe", "int4")
    pack = ParityPack.load(folder / "parity")
    assert pack.rounded is not None
    replace(pack, rounded=None).save(folder / "parity")
    damage.reseal(folder)
    report = check_parity(folder, threads=1)
    assert report.passed, [(check.name, check.value, check.limit) for check in report.failures]
    found = {check.name: check.limit for check in report.checks}
    assert (found["logits.error"], found["logits.kl_mean"]) == (LIMITS["int4"].logit_error, LIMITS["int4"].kl_mean)


@pytest.mark.skipif("native" not in OPERATOR_SETS, reason="portable caches are float32")
def test_a_coarser_cache_than_the_simulated_one_has_limits_no_tighter_than_the_fixed_ones(exported):
    report = check_parity(exported("olmoe", "int4"), threads=1, kv="int8")
    assert report.passed, [(check.name, check.value, check.limit) for check in report.failures]
    found = {check.name: check.limit for check in report.checks}
    assert found["logits.error"] >= LIMITS["int4"].logit_error
    assert any("the KV cache is int8, coarser than the float16" in note for note in report.notes)


def test_another_checkpoint_is_detected(exported, tmp_path):
    from edgelm.synth import write_random_checkpoint

    config = json.loads((CHECKPOINTS / "fox-tiny" / "config.json").read_text())
    write_random_checkpoint(config, tmp_path / "other")
    report = check_parity(exported("fox", "int4"), threads=1, checkpoint=tmp_path / "other")
    assert report.passed is False
    assert next(check for check in report.checks if check.name == "pack").passed is False


def test_the_pack_of_another_model_is_refused(exported, copied):
    folder = copied("fox", "int4")
    for name in ("pack.npz", "pack.json"):
        (folder / "parity" / name).write_bytes((exported("olmoe", "int4") / "parity" / name).read_bytes())
    damage.reseal(folder)
    with pytest.raises(ParityError, match="belongs to another model"):
        check_parity(folder, threads=1, integrity=False)


class OneTensorChanged:
    """A reader whose layer 1 is another: the quantised reference of a made-up recipe."""

    def __init__(self, reader, name, change):
        self._reader, self._name, self._change = reader, name, change

    def shape(self, name):
        return self._reader.shape(name)

    def read_float32(self, name, rows=None):
        values = self._reader.read_float32(name, rows)
        return self._change(values) if name == self._name else values


@pytest.fixture(scope="module")
def tiny():
    from edgelm.checkpoint import Checkpoint
    from edgelm.tokenization.tokenizer import Tokenizer

    checkpoint = Checkpoint.open(CHECKPOINTS / "olmoe-tiny")
    return checkpoint, Tokenizer.from_folder(checkpoint.path)


OPTIONS = GoldenOptions(prompts=(Prompt("a", "def f(x):\n    return"), Prompt("b", "import os")), greedy_tokens=5)


def test_a_pack_equals_the_results_of_the_whole_model_in_memory(tiny):
    import torch

    from edgelm.reference.kv_cache import Trace
    from edgelm.reference.module import ReferenceModel

    checkpoint, tokenizer = tiny
    pack = make_pack(checkpoint, None, checkpoint.decoder, tokenizer, OPTIONS)
    model = ReferenceModel(checkpoint.decoder)
    model.load_weights(checkpoint.read_float32)
    for prompt in pack.prompts:
        ids = pack.ids[prompt.positions]
        assert ids[: prompt.length].tolist() == tokenizer.encode(prompt.text)
        assert len(prompt.greedy) == 5
        trace = Trace()
        with torch.no_grad():
            logits = model(torch.from_numpy(ids.astype(np.int64))[None], trace=trace)[0].numpy()
        record, rows = pack.reference, prompt.positions
        assert logits[prompt.length - 1 :].argmax(-1).tolist() == list(prompt.greedy)
        assert np.allclose(np.take_along_axis(logits, pack.top_ids[rows], 1), record.top_logits[rows], atol=1e-4)
        assert np.allclose(logits[:, pack.probe_ids], record.probe_logits[rows], atol=1e-4)
        assert np.allclose(np.sort(logits)[:, ::-1][:, :64], record.top_logits[rows], atol=1e-4)
        total = torch.from_numpy(logits).logsumexp(-1).numpy()
        assert np.allclose(total, record.logsumexp[rows], atol=1e-4)
        after = ids[1 : prompt.length]
        assert np.allclose(logits[np.arange(len(after)), after], record.next_logit[rows][: len(after)], atol=1e-4)
        assert (len(trace.hidden), len(trace.experts)) == (pack.num_layers + 1, pack.num_layers)
        for index, hidden in enumerate(trace.hidden):
            assert np.allclose(hidden[0].norm(dim=-1).numpy(), record.norms[index, rows], rtol=1e-4)
        for index, chosen in enumerate(trace.experts):
            assert np.array_equal(chosen[0].numpy(), record.experts[index, rows])


def test_both_references_are_over_the_same_tokens(tiny):
    checkpoint, tokenizer = tiny
    name = "model.layers.1.self_attn.o_proj.weight"
    other = OneTensorChanged(checkpoint, name, lambda values: -values)
    pack = make_pack(checkpoint, other, checkpoint.decoder, tokenizer, OPTIONS)
    assert pack.quantized.norms.shape == pack.reference.norms.shape
    assert np.allclose(pack.quantized.sketches[1], pack.reference.sketches[1], rtol=1e-3, atol=1e-3)
    assert not np.allclose(pack.quantized.sketches[2], pack.reference.sketches[2], rtol=1e-2)


def test_making_a_pack_twice_gives_the_same_pack(tiny, tmp_path):
    checkpoint, tokenizer = tiny
    for name in ("one", "two"):
        make_pack(checkpoint, checkpoint, checkpoint.decoder, tokenizer, OPTIONS).save(tmp_path / name)
    first, second = (ParityPack.load(tmp_path / name) for name in ("one", "two"))
    assert np.array_equal(first.reference.sketches, second.reference.sketches)
    assert np.allclose(first.reference.top_logits, first.quantized.top_logits, atol=1e-4)


def test_no_greedy_tokens_and_long_prompts_are_possible(tiny):
    checkpoint, tokenizer = tiny
    options = GoldenOptions(prompts=(Prompt("long", "x = 1\n" * 500),), greedy_tokens=0, max_prompt_tokens=40)
    pack = make_pack(checkpoint, None, checkpoint.decoder, tokenizer, options)
    assert len(pack.ids) == 40
    assert pack.prompts[0].greedy == ()


def test_a_prompt_without_tokens_is_refused(tiny):
    checkpoint, tokenizer = tiny
    with pytest.raises(ParityError, match="'nothing' has no tokens"):
        make_pack(checkpoint, None, checkpoint.decoder, tokenizer, GoldenOptions(prompts=(Prompt("nothing", ""),)))


def test_a_checkpoint_quantised_with_another_recipe_is_refused(exported, tmp_path):
    from edgelm.quant.checkpoint import quantize_checkpoint
    from edgelm.quant.recipe import Recipe

    quantize_checkpoint(CHECKPOINTS / "fox-tiny", tmp_path / "q8", Recipe.load("int8"))
    with pytest.raises(RecipeError, match="already quantised"):
        check_parity(exported("fox", "int4"), threads=1, checkpoint=tmp_path / "q8")


@pytest.mark.skipif(OPERATOR_SETS[0] != "native", reason="needs the compiled operators")
def test_a_large_head_read_by_high_nibbles_in_decoding_passes(tmp_path):
    """With more than 128 tiles of 32 tokens improbable ones get noise in decoding, which is no fault of the device."""
    from edgelm.export import ExportOptions, export_bundle
    from edgelm.synth import write_random_checkpoint

    config = {**WILD, "vocab_size": 12_000, "num_hidden_layers": 1}
    write_random_checkpoint(config, tmp_path / "checkpoint", seed=2)
    bundle = export_bundle(tmp_path / "checkpoint", tmp_path / "bundle", options=ExportOptions(ops="native"))
    report = check_parity(bundle)
    by_name = {check.name: check for check in report.checks}
    assert by_name["greedy.error"].passed, by_name["greedy.error"]
    assert report.passed, [check for check in report.checks if check.passed is False]
    with open_runtime(bundle) as runtime:
        ids = [5, 6, 7, 8]
        at_once = list(runtime.logits_all(ids))[-1][-1].copy()
        runtime.truncate(3)
        decoded = runtime.decode(ids[-1])
    # Without the rule of `LIKELY` the check would see this noise.
    assert np.abs(decoded - at_once).std() > 0.03 * at_once.std()


def test_a_checkpoint_of_another_model_is_refused(exported):
    with pytest.raises(ParityError, match=r"is not the model of .*: layers 6, there 4; hidden size 256, there 128"):
        check_parity(exported("fox", "int4"), threads=1, checkpoint=CHECKPOINTS / "olmoe-tiny")
