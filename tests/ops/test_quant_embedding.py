"""Does QuantEmbedding return rows of the table?"""

from __future__ import annotations

import re

import numpy as np
import pytest
from operator_models import Array, run
from packed_weights import KINDS, random_matrix

TABLE = random_matrix(np.random.default_rng(5), "int4", 50, 64, group=32).blob


@pytest.mark.parametrize("tokens", [1, 3, 50])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_the_tables(rng: np.random.Generator, kind: str, tokens: int) -> None:
    matrix = random_matrix(rng, kind, 70, 96, group=32)
    ids = rng.integers(0, 70, (2, tokens))
    ids[0, 0], ids[1, -1] = 0, 69
    (y,) = run("QuantEmbedding", {"ids": ids, "table": matrix.blob}, threads=2)
    # code * scale is exact for float16 scales, and rounded once for fp8's float32 scales.
    assert y.tobytes() == matrix.dense[ids].astype(np.float32).tobytes()


def test_zero_points_count(rng: np.random.Generator) -> None:
    matrix = random_matrix(rng, "int4", 40, 64, group=64, zeros=True)
    (y,) = run("QuantEmbedding", {"ids": np.arange(40)[None], "table": matrix.blob})
    assert y[0].tobytes() == matrix.dense.astype(np.float32).tobytes()


def test_no_ids_give_no_rows() -> None:
    (y,) = run("QuantEmbedding", {"ids": np.zeros((1, 0), np.int64), "table": TABLE})
    assert y.shape == (1, 0, 64)


@pytest.mark.parametrize(
    ("ids", "table", "message"),
    [
        ([[1, 50]], TABLE, "id 50 at position 1 is outside 0..49, the table has 50 rows"),
        ([[1, 2], [-1, 3]], TABLE, "id -1 at position 2 is outside 0..49, the table has 50 rows"),
        ([[1]], TABLE[1:], "table: not a packed matrix, it does not begin with EDLM"),
        (
            [[1]],
            random_matrix(np.random.default_rng(5), "int4", 64, 32, swiglu=True).blob,
            "table is a SwiGLU matrix",
        ),
    ],
)
def test_what_does_not_fit_is_named(ids: list[list[int]], table: Array, message: str) -> None:
    with pytest.raises(Exception, match=re.escape(f"QuantEmbedding embed_tokens: {message}")):
        run("QuantEmbedding", {"ids": np.array(ids), "table": table}, node="embed_tokens")
