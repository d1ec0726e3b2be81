"""How many bytes does a token take in each type of cache?"""

from __future__ import annotations

import pytest

from edgelm.bundle.kv_cache import GPU_KV_TYPES, KV_TYPES, require_type, row_bytes
from edgelm.errors import EdgeLMError
from edgelm.runtimes.cuda import planning


@pytest.mark.parametrize(
    ("kv", "ops", "expected"),
    [
        ("float32", "native", 4 * 96),
        ("float16", "native", 2 * 96),
        ("bfloat16", "gpu", 2 * 96),
        ("int8", "native", 96 + 4),  # a float32 scale
        ("int8", "gpu", 96 + 4),
        ("fp8", "native", 96 + 2),  # a bfloat16 scale
        ("fp8", "gpu", 96 + 4),  # a float32 scale
    ],
)
def test_a_row_has_the_values_of_a_head_and_their_scale(kv: str, ops: str, expected: int) -> None:
    assert row_bytes(kv, 96, ops) == expected


def test_other_types_are_refused_with_the_valid_ones() -> None:
    assert KV_TYPES == ("float32", "float16", "int8", "fp8")
    assert [require_type(kv) for kv in KV_TYPES] == list(KV_TYPES)
    for refuse in (require_type, lambda kv: row_bytes(kv, 64)):
        with pytest.raises(EdgeLMError, match="kv is 'int4': the KV cache can be float32, float16, int8, fp8"):
            refuse("int4")


@pytest.mark.parametrize("kv", GPU_KV_TYPES)
def test_the_planning_in_cpp_counts_the_same_bytes(kv: str) -> None:
    found = planning.call("node_cache_row", {"kv": kv, "head_size": 96})
    assert int(found) == row_bytes(kv, 96, "gpu")


def test_the_planning_in_cpp_has_the_same_types() -> None:
    with pytest.raises(EdgeLMError, match=f"kv is 'int4': the KV cache can be {', '.join(GPU_KV_TYPES)}$"):
        planning.call("node_cache_row", {"kv": "int4", "head_size": 96})
