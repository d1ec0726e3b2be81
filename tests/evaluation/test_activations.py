"""Does the evaluation of a recipe include its quantised activations and KV cache?"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgelm.checkpoint import Checkpoint
from edgelm.corpus import read_corpus, windows
from edgelm.errors import RecipeError
from edgelm.evaluation import EvalOptions, evaluate
from edgelm.quant import Recipe, WeightSource
from edgelm.quant.reference import reference_module
from edgelm.tokenization.tokenizer import Tokenizer

TEXT = """name = "{name}"
default = "int8-row-sym"
activations = "{activations}"
kv = "{kv}"

[[rule]]
match = "model.embed_tokens.weight"
scheme = "int8-g128-sym"
"""


def written(folder, name, activations, kv="auto"):
    path = folder / f"{name}.toml"
    path.write_text(TEXT.format(name=name, activations=activations, kv=kv))
    return str(path)


def test_quantised_activations_and_caches_have_the_loss_of_the_whole_model(checkpoint, text, tmp_path):
    given = [
        written(tmp_path, "weights", "float"),
        written(tmp_path, "token", "int8-token"),
        written(tmp_path, "cache", "fp8-token", "int8"),
    ]
    options = EvalOptions(text=text, tokens=4 * 64, length=64, speed=False)
    targets = evaluate(given, checkpoint("fox"), options).targets
    opened = Checkpoint.open(checkpoint("fox"))
    found = np.stack(windows(Tokenizer.from_folder(opened.path), read_corpus(text).documents, 4, 65))
    ids = torch.from_numpy(found[:, :-1])
    p = reference_module(WeightSource(opened))(ids).double().log_softmax(-1)
    for target, path in zip(targets, given, strict=True):
        module = reference_module(WeightSource(opened, Recipe.load(path)))
        q = module(ids).double().log_softmax(-1)
        assert target.kl.mean == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=0.02)
    assert targets[0].kl.mean < targets[1].kl.mean < targets[2].kl.mean
    assert not any("rounded" in note for note in targets[0].notes)
    assert any("int8-token" in note for note in targets[1].notes)
    assert any("cache, int8" in note for note in targets[2].notes)


def test_static_activations_need_calibrated_scales(checkpoint, text, tmp_path):
    options = EvalOptions(text=text, tokens=64, length=64, speed=False)
    with pytest.raises(RecipeError, match=r"embed_tokens\.weight has int8-static activations.*calibrate"):
        evaluate([written(tmp_path, "static", "int8-static")], checkpoint("fox"), options)
