"""Are the two trained checkpoints in examples/checkpoints complete, and are they trained?"""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from edgelm.checkpoint import Checkpoint
from edgelm.reference.kv_cache import Trace
from edgelm.reference.module import ReferenceModel
from edgelm.tokenization.chat_template import ChatTemplate
from edgelm.tokenization.tokenizer import Tokenizer

FOLDER = Path(__file__).parents[2] / "examples" / "checkpoints"
NAMES = ("olmoe-tiny", "fox-tiny")
CODE = "import os\n\n\nclass Reader:\n    def __init__(self, path):\n        self.path = path\n\n    def close(self):\n"


def corpus_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("corpus", FOLDER / "corpus.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(name: str) -> tuple[Any, Tokenizer]:
    with Checkpoint.open(FOLDER / name) as checkpoint:
        checkpoint.check_tensors(checkpoint.decoder.tensor_shapes)
        model = ReferenceModel(checkpoint.decoder)
        model.load_weights(checkpoint.read_float32)
    return model, Tokenizer.from_folder(FOLDER / name)


@pytest.fixture(scope="module", params=NAMES)
def tiny(request: pytest.FixtureRequest) -> tuple[str, Any, Tokenizer]:
    return request.param, *load(request.param)


@pytest.fixture(scope="module")
def held_out() -> str:
    _, texts = corpus_module().read_corpus()
    return "".join(text[:6000] for text in texts[:6])


def test_the_folder_is_small_and_complete(tiny: tuple[str, Any, Tokenizer]) -> None:
    name, _, tokenizer = tiny
    files = {path.name: path.stat().st_size for path in (FOLDER / name).iterdir()}
    vocabulary = "tokenizer.json" if name == "olmoe-tiny" else "tokenizer.model"
    assert {"README.md", "config.json", "generation_config.json", "model.safetensors", vocabulary} <= files.keys()
    assert sum(files.values()) < 10_000_000
    with Checkpoint.open(FOLDER / name) as checkpoint:
        assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {"BF16"}
    for text in (CODE, "größe 日本 🎉 \x00\n\n\n\t  x"):
        assert tokenizer.decode(tokenizer.encode(text, add_bos=False)) == text


def test_the_model_is_trained(tiny: tuple[str, Any, Tokenizer], held_out: str) -> None:
    _, model, tokenizer = tiny
    stream = torch.tensor(tokenizer.encode(held_out, add_bos=False))[: 16 * 257].view(-1, 257)
    with torch.no_grad():
        loss = float(F.cross_entropy(model(stream[:, :-1]).flatten(0, 1), stream[:, 1:].flatten()))
    shares = torch.bincount(stream.flatten()) / stream.numel()
    own_entropy = float(-(shares * shares.clamp_min(1e-9).log()).sum())  # lower bound of any unigram model
    assert loss < 0.75 * own_entropy < math.log(model.decoder.vocab_size)


def test_routing_is_neither_uniform_nor_collapsed(held_out: str) -> None:
    model, tokenizer = load("olmoe-tiny")
    ids = torch.tensor(tokenizer.encode(held_out)[:2048]).view(-1, 256)
    trace = Trace()
    with torch.no_grad():
        model(ids, trace=trace)
    assert len(trace.experts) == model.decoder.num_layers
    for experts, weights in zip(trace.experts, trace.expert_weights, strict=True):
        load_shares = torch.bincount(experts.flatten(), minlength=32) / experts.numel()
        entropy = float(-(load_shares * load_shares.clamp_min(1e-9).log()).sum()) / math.log(32)
        assert 0.8 < entropy < 0.999
        assert (load_shares > 0).all(), "an expert is never selected"
        sums = weights.sum(-1)
        assert 4 / 32 < sums.mean() < 0.95, "routing is uniform, or its weights are renormalised"
        # Routing is not random: the weight of a token's first expert is clearly above that of the fourth.
        assert weights[..., 0].mean() > 2 * weights[..., 3].mean()


def test_transformers_reads_the_folder_and_agrees(tiny: tuple[str, Any, Tokenizer]) -> None:
    name, model, tokenizer = tiny
    theirs = AutoModelForCausalLM.from_pretrained(FOLDER / name, dtype=torch.float32, attn_implementation="eager")
    ids = torch.tensor([tokenizer.encode(CODE)])
    with torch.no_grad():
        expected, got = theirs(ids).logits, model(ids)
    assert float((got - expected).norm() / expected.norm()) < 1e-5


def test_the_published_errors_are_reproduced() -> None:
    config = json.loads((FOLDER / "fox-tiny" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    fox, olmoe = (Tokenizer.from_folder(FOLDER / name) for name in ("fox-tiny", "olmoe-tiny"))
    assert (fox.pad_id, fox.eos_ids[0], fox.bos_id) == (0, 1, 2)
    assert fox.encode("x")[0] == 2
    assert fox.vocab_size == config["vocab_size"]
    # As in OLMoE, the embedding table is padded, bos is eos, and nothing is prepended to a prompt.
    assert (olmoe.vocab_size, olmoe.eos_ids[0], olmoe.bos_id) == (2024, 2023, 2023)
    assert olmoe.encode("x")[0] != 2023


def test_chat_templates_have_the_structure_of_published_ones() -> None:
    turns = [{"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", "Hello!"), ("user", "x"))]
    end = "<|endoftext|>"
    assert (
        ChatTemplate.from_folder(FOLDER / "olmoe-tiny").render(turns)
        == f"{end}<|user|>\nHi\n<|assistant|>\nHello!{end}\n<|user|>\nx\n<|assistant|>\n"
    )
    assert ChatTemplate.from_folder(FOLDER / "fox-tiny").render(turns) == (
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>\n"
        "<start_of_turn>user\nx<end_of_turn>\n<start_of_turn>model\n"
    )
