"""Does a smoothed checkpoint compute the same, with less quantisation error, and can it be written and read?"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_checkpoint import CONFIGS, tokens, write_small

from edgelm.checkpoint import Checkpoint
from edgelm.errors import RecipeError
from edgelm.quant import PRESETS, Recipe, Scheme, WeightSource
from edgelm.quant.calibration.ranges import record_ranges
from edgelm.quant.checkpoint import quantize_checkpoint
from edgelm.quant.reference import activation_kinds, reference_module
from edgelm.quant.scaled_checkpoint import Scaling, SmoothedCheckpoint
from edgelm.quant.smoothing import InputSample, head_folds, layer_folds, smooth
from edgelm.reference.kv_cache import Trace

FAMILIES = pytest.mark.parametrize("family", CONFIGS)


def recipe(family: str, activations: str = "int8-static", bits: int = 8) -> Recipe:
    rules = PRESETS["int8"].rules[:1] if family == "olmoe" else ()
    return Recipe("test", Scheme(bits, 32), rules, activations=activations)


def logits(checkpoint: Checkpoint, ids: torch.Tensor, trace: Trace | None = None) -> torch.Tensor:
    found: torch.Tensor = reference_module(WeightSource(checkpoint))(ids, trace=trace)
    return found


def all_folds(checkpoint: Checkpoint):
    config = checkpoint.decoder
    return [*layer_folds(config, 0), *layer_folds(config, 1), *head_folds(config)]


@FAMILIES
@pytest.mark.parametrize("powers_of_two", [False, True])
def test_every_fold_preserves_the_function(family, powers_of_two, tmp_path):
    checkpoint = write_small(tmp_path / "c", family)
    generator = torch.Generator().manual_seed(0)
    scaling: dict[str, Scaling] = {}
    folds = all_folds(checkpoint)
    for fold in folds:
        s = torch.exp2(4 * torch.rand(checkpoint.shape(fold.producer)[0], generator=generator) - 2)
        if powers_of_two:
            s = torch.exp2(s.log2().round())
        scaling[fold.producer] = scaling.get(fold.producer, Scaling()).over_rows(1 / s)
        for name in fold.consumers:
            scaling[name] = scaling.get(name, Scaling()).times_columns(fold.spread(s))
    view = SmoothedCheckpoint(checkpoint, scaling)
    ids = torch.from_numpy(tokens())
    before, after = Trace(), Trace()
    expected, found = logits(checkpoint, ids, before), logits(view, ids, after)
    # Every matrix and norm of the layers changes, except the norms of queries and keys.
    untouched = {name for name in checkpoint.tensors if name not in scaling}
    assert {name.split(".")[-2] for name in untouched} <= {"embed_tokens", "q_norm", "k_norm", "norm"}
    assert all(torch.equal(a, b) for a, b in zip(before.experts, after.experts, strict=True))
    if powers_of_two:
        assert torch.equal(expected, found)
        assert {info.dtype for info in view.tensors.values()} == {"BF16"}
    else:
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert {view.tensors[name].dtype for name in scaling} == {"F32"}


def test_clamped_values_are_not_smoothed(tmp_path):
    checkpoint = write_small(tmp_path / "c", "olmoe", clip_qkv=0.5, num_hidden_layers=1)
    folds = layer_folds(checkpoint.decoder, 0)
    assert not any("v_proj" in fold.producer for fold in folds)
    view = smooth(checkpoint, tokens(), recipe("olmoe"), threads=1)
    ids = torch.from_numpy(tokens(seed=1))
    expected = logits(checkpoint, ids)
    assert (logits(view, ids) - expected).abs().max() <= 1e-5 * expected.abs().max()


@FAMILIES
@pytest.mark.parametrize("powers_of_two", [False, True])
def test_activations_with_outliers_lose_less(family, powers_of_two, tmp_path):
    checkpoint = write_small(tmp_path / "c", family, num_hidden_layers=1)
    what = recipe(family)
    view = smooth(checkpoint, tokens(16), what, powers_of_two=powers_of_two, threads=1)
    ids = torch.from_numpy(tokens(seed=1))
    expected = logits(checkpoint, ids)
    found = logits(view, ids)
    assert torch.equal(found, expected) or not powers_of_two
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert all(choice.after <= choice.before for choice in view.choices)
    assert any(choice.alpha is not None for choice in view.choices)
    errors = []
    for which in (checkpoint, view):
        source = WeightSource(which, what, threads=1)
        scales = record_ranges(which.decoder, which, tokens(16)).scales(activation_kinds(source))
        errors.append(float((reference_module(source, scales=scales)(ids) - expected).norm()))
    assert errors[1] < 0.8 * errors[0]


@FAMILIES
def test_weights_with_large_inputs_lose_less(family, tmp_path):
    checkpoint = write_small(tmp_path / "c", family, num_hidden_layers=1)
    what = recipe(family, "float", bits=4)
    view = smooth(checkpoint, tokens(16), what, "weights", threads=1)
    ids = torch.from_numpy(tokens(seed=1))
    expected = logits(checkpoint, ids)
    errors = [
        float((reference_module(WeightSource(which, what, threads=1))(ids) - expected).norm())
        for which in (checkpoint, view)
    ]
    # An MoE with random weights selects other experts after any rounding, so its logits are not compared.
    assert family == "olmoe" or errors[1] < errors[0]
    assert sum(choice.after for choice in view.choices) < 0.9 * sum(choice.before for choice in view.choices)


@FAMILIES
def test_a_smoothed_checkpoint_is_written_and_read(family, tmp_path):
    checkpoint = write_small(tmp_path / "c", family)
    (tmp_path / "c" / "tokenizer.json").write_text("{}")
    view = smooth(checkpoint, tokens(), recipe(family), threads=1)
    view.write(tmp_path / "s", shard_bytes=40_000)
    with Checkpoint.open(tmp_path / "s") as written:
        assert (tmp_path / "s" / "tokenizer.json").is_file()
        assert set(written.tensors) == set(view.tensors)
        for name, info in view.tensors.items():
            assert written.tensors[name].dtype == info.dtype
            assert np.array_equal(written.read_float32(name), view.read_float32(name))
    name = "model.layers.0.self_attn.o_proj.weight"
    assert np.array_equal(view.read_float32(name)[3:7], view.read_float32(name, slice(3, 7)))
    vector = "model.layers.0.input_layernorm.weight"
    assert np.array_equal(view.read_float32(vector)[3:7], view.read_float32(vector, slice(3, 7)))
    up = "model.layers.0.mlp.experts.1.up_proj.weight" if family == "olmoe" else "model.layers.0.mlp.up_proj.weight"
    assert np.array_equal(view.read_float32(up)[3:7], view.read_float32(up, slice(3, 7)))
    # Quantising while smoothing, or after writing, gives the same codes.
    quantize_checkpoint(tmp_path / "s", tmp_path / "q", recipe(family, "int8-token"), threads=1)
    with Checkpoint.open(tmp_path / "q") as quantised:
        found = WeightSource(quantised).quantized(name)
    expected = WeightSource(view, recipe(family), threads=1).quantized(name)
    assert np.array_equal(found.codes, expected.codes)
    assert np.array_equal(found.scales, expected.scales)


def test_unsupported_smoothing_is_refused(tmp_path):
    checkpoint = write_small(tmp_path / "c", "fox")
    with pytest.raises(RecipeError, match="no smoothing for 'both': give activations or weights"):
        smooth(checkpoint, tokens(), recipe("fox"), "both")
    quantize_checkpoint(tmp_path / "c", tmp_path / "q", recipe("fox", "int8-token"), threads=1)
    with pytest.raises(RecipeError, match="already quantised"):
        smooth(Checkpoint.open(tmp_path / "q"), tokens(), recipe("fox"))


def test_half_of_the_rows_is_measured_and_the_other_half_kept():
    x = torch.arange(40.0)[:, None].expand(-1, 3)
    seen = InputSample(3, limit=6)
    for part in x.split(10):
        seen.add(part)
    assert seen.tokens == 40
    assert float(seen.absmax[0]) == 34  # of 0-4, 10-14, 20-24, 30-34
    assert float(seen.total[0]) == sum(sum(range(start, start + 5)) for start in range(0, 40, 10))
    assert len(seen.rows) == 6
    kept = seen.rows[:, 0].tolist()
    assert len(set(kept)) == 6
    assert all(row % 10 >= 5 for row in kept)
