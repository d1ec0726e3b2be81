"""Is a model refused with every feature that an operator set does not have?"""

from __future__ import annotations

from dataclasses import replace

import pytest

from edgelm.bundle.capabilities import GPU, NATIVE, PORTABLE, check, missing
from edgelm.errors import ExportError
from edgelm.models import decoder as decoder_of
from edgelm.models.spec import Attention, Decoder, MoE
from edgelm.runtimes.cuda.kernels.sources import kernels

CONFIG = {
    "architectures": ["OlmoeForCausalLM"],
    "model_type": "olmoe",
    "hidden_size": 64,
    "intermediate_size": 32,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
}


def with_attention(decoder: Decoder, layer: int | None = None, **changes: object) -> Decoder:
    """The decoder with other attention in one layer, or in all."""
    blocks = (
        replace(block, part=replace(block.part, **changes))  # type: ignore[arg-type]
        if isinstance(block.part, Attention) and layer in (None, block.layer)
        else block
        for block in decoder.blocks
    )
    return replace(decoder, blocks=tuple(blocks))


@pytest.fixture(scope="module")
def olmoe() -> Decoder:
    return decoder_of(CONFIG)  # heads of 16


def test_heads_of_another_size_are_taken_or_refused_with_the_sizes_there_are(olmoe: Decoder) -> None:
    assert not list(missing(olmoe, NATIVE))
    assert not list(missing(olmoe, PORTABLE))
    (said,) = missing(olmoe, GPU)
    assert "has heads of 16 (head_dim" in said
    assert "our attention on GPUs takes heads of 32, 64" in said
    assert said.endswith("export with --target cpu")
    (said,) = missing(with_attention(olmoe, head_dim=8), PORTABLE)
    assert "takes multiples of 16: export with --target cpu --ops native" in said


def test_the_head_sizes_of_a_gpu_are_those_of_the_kernels() -> None:
    names = [name for name in kernels() if name.startswith("attention_")]
    assert GPU.head_sizes == tuple(dict.fromkeys(int(name.rpartition("_s")[2]) for name in names))


def test_layers_with_different_heads_are_refused(olmoe: Decoder) -> None:
    (said,) = missing(with_attention(olmoe, layer=1, head_dim=32), NATIVE)
    assert "gives layers different attention shapes" in said


def test_windows_are_refused_where_operators_attend_to_everything(olmoe: Decoder) -> None:
    windowed = with_attention(with_attention(olmoe, window=100), layer=1, window=50)
    assert not list(missing(windowed, PORTABLE))
    (said,) = missing(windowed, NATIVE)
    assert "sliding_window 50" in said


def test_experts_whose_norm_comes_after_them_are_refused_once(olmoe: Decoder) -> None:
    blocks = (
        replace(block, before=None, after=block.before) if isinstance(block.part, MoE) else block
        for block in olmoe.blocks
    )
    after = replace(olmoe, blocks=tuple(blocks))
    (said,) = missing(after, NATIVE)
    assert said.startswith("layer 0 has a MoE with a norm after it or without one before it")


def test_one_refusal_names_everything(olmoe: Decoder) -> None:
    check(olmoe, NATIVE)
    odd = with_attention(with_attention(olmoe, window=50), layer=1, head_dim=32)
    with pytest.raises(ExportError) as refused:
        check(odd, GPU)
    for part in ("different attention shapes", "has heads of 16", "sliding_window 50"):
        assert part in str(refused.value)
