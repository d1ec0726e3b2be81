"""Are the plans of attention in C++ those of Python, byte for byte?"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest

from edgelm.errors import DeviceError, EdgeLMError
from edgelm.runtimes.cuda import planning
from edgelm.runtimes.cuda.device import Launch
from edgelm.runtimes.cuda.kernels import attention
from edgelm.runtimes.cuda.kernels.attention import AttentionBuffers, AttentionShape

MULTIPROCESSORS = (4, 16, 20, 28, 58, 84, 108, 128, 132, 148, 170)
CAPACITIES = (64, 128, 192, 1024, 4096, 8192, 131072)
TOKENS = (*range(1, 36), 63, 64, 65, 100, 127, 128, 129, 255, 256, 500, 512, 777, 1024, 2048, 4096, 8192)


def outcome(call: Callable[..., Any], *args: Any) -> Any:
    """The result of a call, or the class and message of its error."""
    try:
        return call(*args)
    except EdgeLMError as error:
        return type(error), str(error)


TYPES = [("f32", "f32"), *((a, c) for a in ("bf16", "f16") for c in ("bf16", "f16", "int8", "fp8"))]
COUNTS = ("batch", "tokens", "heads", "kv_heads", "size", "capacity", "positions")


def random_call(rng: random.Random) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Shape, buffers and options; one in ten is one that no kernel computes."""
    kv_heads = rng.choice((1, 2, 4, 8, 16, 32))
    capacity = rng.choice(CAPACITIES)
    activations, cache = rng.choice(TYPES)
    shape = {
        "batch": rng.choice((1, 1, 1, 2, 3, 4, 7, 8, 16, 64, 256)),
        "tokens": rng.choice([t for t in TOKENS if t <= capacity]),
        "heads": kv_heads * rng.choice((1, 2, 3, 4, 7, 8, 16)), "kv_heads": kv_heads, "size": rng.choice((32, 64, 128)),
        "capacity": capacity, "positions": capacity + rng.choice((0, 0, 3)),
        "activations": activations, "cache": cache,
    }  # fmt: skip
    names = ("qkv", "key_cache", "value_cache", "past_lengths", "cos", "sin", "out", "workspace")
    buffers: dict[str, Any] = {name: 256 * rng.randrange(1, 1 << 40) for name in names}
    if rng.random() < 0.5:
        buffers |= {"q_norm": 256 * rng.randrange(1, 1 << 40), "k_norm": 256 * rng.randrange(1, 1 << 40)}
        buffers |= {name: rng.random() < 0.5 for name in ("q_norm_per_head", "k_norm_per_head")}
    for name in ("new_lengths", "counters"):
        buffers[name] = rng.choice((0, 256 * rng.randrange(1, 1 << 40)))
    options = {
        "epsilon": rng.choice((1e-5, 1e-6, 0.1, 0.0)), "clip": rng.choice((0.0, 0.0, 8.0, 30.7)),
        "scale": rng.choice((0.0, 0.0, 0.3)), "splits": rng.choice((None, None, None, 1, 2, 3, 16, 32)),
    }  # fmt: skip
    if rng.random() < 0.1:
        shape[rng.choice(COUNTS)] = rng.choice((0, -1, 7, 96, 70000))
    if rng.random() < 0.02:
        shape[rng.choice(("activations", "cache"))] = rng.choice(("f16", "int4", "f32"))
    if rng.random() < 0.02:
        buffers[rng.choice(list(buffers))] = 0
    return shape, buffers, options


def python_plan(
    shape: dict[str, Any], buffers: dict[str, Any], options: dict[str, Any], multiprocessors: int
) -> tuple[list[Launch], int]:
    """The launches and bytes of workspace of a call."""
    made = AttentionShape(**shape)
    launches = attention.attention_launches(made, AttentionBuffers(**buffers), multiprocessors, **options)
    return list(launches), attention.workspace_bytes(made, multiprocessors, options["splits"])


def cpp_plan(fields: dict[str, Any]) -> tuple[list[Launch], int]:
    """The same from C++."""
    return planning.launches("attention_launches", fields), int(planning.call("attention_workspace", fields))


def test_attention() -> None:
    rng = random.Random(1)
    refused = 0
    for _ in range(30_000):
        shape, buffers, options = call = random_call(rng)
        multiprocessors = rng.choice(MULTIPROCESSORS)
        expected = outcome(python_plan, *call, multiprocessors)
        filled = asdict(AttentionBuffers(**buffers))
        splits = options["splits"] or 0
        fields = {**shape, **filled, **options, "splits": splits, "multiprocessors": multiprocessors}
        assert outcome(cpp_plan, fields) == expected, call
        refused += expected[0] is DeviceError
    assert refused > 1000


def cpp_row(cache: str, size: int) -> int:
    return int(planning.call("attention_row", {"cache": cache, "size": size}))


@pytest.mark.parametrize("cache", [*attention.CODE_BYTES, "int4"])
def test_rows_of_a_cache(cache: str) -> None:
    for size in (32, 64, 96, 128):
        assert outcome(cpp_row, cache, size) == outcome(attention.row_bytes, cache, size)
