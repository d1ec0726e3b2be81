"""Does the layout of portable operators hold the same values, whatever the scheme and the stored format?"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from edgelm.errors import ExportError
from edgelm.export.packing.ort import BlockFormat, block_of, codes_in, common_format, interleave, scales_in, zeros_in
from edgelm.quant.primitives import dequantize, quantize, unpack
from edgelm.quant.scheme import Scheme

ROWS, COLUMNS = 6, 256


def as_operator_computes(
    codes: NDArray[np.uint8], scales: NDArray[np.float32], zeros: NDArray[np.uint8] | None, fmt: BlockFormat
) -> NDArray[np.float32]:
    """Compute MatMulNBits' documented formula, without any of the package's layout code."""
    values = unpack(codes, fmt.bits).astype(np.float32)
    blocks = scales.shape[1]
    if zeros is None:
        points = np.full((len(codes), blocks), 1 << (fmt.bits - 1), np.float32)
    elif fmt.bits == 8:
        points = zeros.astype(np.float32)
    else:
        nibbles = np.stack([zeros & 15, zeros >> 4], axis=2).reshape(len(zeros), -1)
        points = nibbles[:, :blocks].astype(np.float32)
    return (values - np.repeat(points, fmt.block, axis=1)) * np.repeat(scales, fmt.block, axis=1)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [16, 32, 64, 128, None])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("coarser", ["own format", "finer, wider, with zeros"])
def test_every_scheme_means_the_same_in_every_format(
    bits: int, group: int | None, symmetric: bool, coarser: str
) -> None:
    weight = np.random.default_rng(bits).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    scheme = Scheme(bits, group, symmetric)
    tensor = quantize(weight, scheme)
    fmt = common_format([("x", scheme, COLUMNS)])
    if coarser != "own format":
        fmt = common_format([("x", scheme, COLUMNS), ("y", Scheme(8, 16, False), COLUMNS)])
        assert fmt == BlockFormat(8, 16, True)
    zeros = zeros_in(tensor, fmt) if fmt.zeros else None
    if zeros is not None:
        assert zeros.shape == (ROWS, fmt.zero_bytes(COLUMNS))
    codes, scales = codes_in(tensor, fmt), scales_in(tensor, fmt)
    assert codes.shape == (ROWS, fmt.code_bytes(COLUMNS))
    assert scales.shape == (ROWS, fmt.blocks(COLUMNS))
    np.testing.assert_array_equal(as_operator_computes(codes, scales, zeros, fmt), dequantize(tensor))


def test_odd_number_of_four_bit_zero_points_is_padded() -> None:
    weight = np.random.default_rng(0).standard_normal((3, 96)).astype(np.float32) + 1
    tensor = quantize(weight, Scheme(4, 32, False))
    fmt = common_format([("x", Scheme(4, 32, False), 96)])
    zeros = zeros_in(tensor, fmt)
    assert zeros.shape == (3, 2)
    np.testing.assert_array_equal(
        as_operator_computes(codes_in(tensor, fmt), scales_in(tensor, fmt), zeros, fmt), dequantize(tensor)
    )


def test_rows_alternate_between_gate_and_up() -> None:
    gate, up = np.array([[1, 2], [3, 4]]), np.array([[5, 6], [7, 8]])
    np.testing.assert_array_equal(interleave(gate, up), [[1, 2], [5, 6], [3, 4], [7, 8]])


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("model.layers.1.mlp.down_proj.weight", "intermediate_size"),
        ("model.layers.1.self_attn.o_proj.weight", r"num_attention_heads \* head_dim"),
        ("lm_head.weight", "hidden_size"),
    ],
)
@pytest.mark.parametrize("group", [None, 32])
def test_a_row_that_no_block_divides_is_refused_by_name_width_and_field(
    name: str, field: str, group: int | None
) -> None:
    assert block_of(Scheme(8, None), 48) == 16
    with pytest.raises(ExportError, match=rf"{name} is int8-.* rows of 100 \({field} in config.json\).*--ops native"):
        block_of(Scheme(8, group), 100, name)
