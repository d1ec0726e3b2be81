"""Compare the reference models with transformers on the same weights and tokens."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from edgelm.models import decoder as decoder_of
from edgelm.reference.kv_cache import Trace
from edgelm.reference.module import ReferenceModel

TOLERANCE = 1e-5  # relative error in the Euclidean norm
CACHED = 5 * TOLERANCE
"""For chunks of a prompt against the whole, whose sums have another order: 1.1 times TOLERANCE for a Mixtral on an
Intel Xeon, where one position multiplies the difference of its input."""


@dataclass
class Comparison:
    """Outputs of the reference and of transformers for one batch of tokens."""

    model: Any
    ids: Tensor
    logits: Tensor
    trace: Trace
    expected: Any  # transformers' output, with hidden states
    expected_experts: list[Tensor]  # [N, A] per layer
    expected_router_logits: list[Tensor]  # [N, E] per layer


def relative(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return float((got - expected).detach().norm() / expected.detach().norm())


def disk_tensors(model: Any) -> dict[str, Tensor]:
    """Return the tensors of the checkpoint that transformers writes; in memory names differ and experts are stacked."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(f"{folder}/model.safetensors")


def randomize(model: Any, seed: int) -> None:
    """Set weights so large that attention and routing are far from uniform, and norms that are not all one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0, 2 / parameter.shape[-1] ** 0.5, generator=generator)


def compare(config_json: dict[str, Any], hf_config: Any, seed: int) -> Comparison:
    hf_config._attn_implementation = hf_config._experts_implementation = "eager"
    theirs = AutoModelForCausalLM.from_config(hf_config).eval()
    randomize(theirs, seed)
    tensors = disk_tensors(theirs)
    decoder = decoder_of(config_json)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == decoder.tensor_shapes
    ours = ReferenceModel(decoder)
    assert {name: tuple(t.shape) for name, t in ours.tensors()} == decoder.tensor_shapes
    ours.load_weights(lambda name: tensors[name].numpy())
    experts: list[Tensor] = []
    router_logits: list[Tensor] = []

    def keep_routing(module: Any, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        router_logits.append(output[0])
        experts.append(output[2])

    for layer in theirs.model.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp.gate.register_forward_hook(keep_routing)
    ids = torch.randint(0, decoder.vocab_size, (2, 19), generator=torch.Generator().manual_seed(seed))
    trace = Trace()
    with torch.no_grad():
        expected = theirs(ids, output_hidden_states=True, use_cache=False)
        logits = ours(ids, trace=trace)
    return Comparison(ours, ids, logits, trace, expected, experts, router_logits)


def check_hidden_states(c: Comparison) -> None:
    expected = c.expected.hidden_states
    assert len(c.trace.hidden) == len(expected)
    for got, want in zip(c.trace.hidden[:-1], expected[:-1], strict=True):
        assert relative(got, want) < TOLERANCE
    # transformers' last hidden state is after the final norm, ours before it.
    assert relative(c.model.interpreter.norm(c.model.decoder.norm, c.trace.hidden[-1]), expected[-1]) < TOLERANCE


def check_cached_decoding(c: Comparison) -> None:
    """Compare a prompt, single tokens and the rest with a full forward pass, then again after a truncation."""
    cache = c.model.new_cache()
    with torch.no_grad():
        for start, end in ((0, 5), (5, 6), (6, 7), (7, 19)):
            logits = c.model(c.ids[:, start:end], cache)
            assert relative(logits, c.logits[:, start:end]) < CACHED
        assert cache.length == 19
        cache.truncate(6)
        assert relative(c.model(c.ids[:, 6:9], cache), c.logits[:, 6:9]) < CACHED
        assert cache.length == 9
