"""Does the GPU layout hold the same values, whatever the scheme, the shape and the stored format?"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from unpack_gpu import unpack_matrix

from edgelm.bundle.gpu_layout import GpuKind, GpuMatrix
from edgelm.errors import ExportError
from edgelm.export.graph.base import stored_as
from edgelm.export.packing.gpu import (
    BlobWriter,
    GpuFormat,
    Rows,
    gpu_format,
    interleaved,
    quantized_rows,
    stacked,
)
from edgelm.quant.codec import dequantize, quantize
from edgelm.quant.scheme import parse_scheme
from edgelm.quant.tensor import QuantTensor

COLUMNS = 128


def weight(rows: int, columns: int = COLUMNS, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def quantised(scheme: str, rows: int, columns: int = COLUMNS, seed: int = 0) -> QuantTensor:
    return quantize(weight(rows, columns, seed), parse_scheme(scheme))


def blob_of(matrix: GpuMatrix, blocks: list[Rows]) -> bytes:
    found: list[bytes] = []
    writer = BlobWriter(matrix, lambda part: found.append(part.tobytes()))
    for rows in blocks:
        writer.add(rows)
    writer.finish()
    return b"".join(found)


@pytest.mark.parametrize("rows", [16, 5, 40])
@pytest.mark.parametrize(
    "scheme",
    ["int3-g32-sym", "int4-g32-sym", "int4-g16-asym", "int4-row-asym", "int5-g64-sym", "int6-g32-asym",
     "int8-g32-sym", "int8-row-asym", "fp8-row", "fp8-b32"],
)  # fmt: skip
def test_does_every_scheme_round_trip_exactly(scheme: str, rows: int) -> None:
    tensor = quantised(scheme, rows)
    fmt = gpu_format([tensor.scheme], "bfloat16", COLUMNS, "w")
    assert fmt is not None
    matrix = fmt.matrix(rows, COLUMNS)
    blob = blob_of(matrix, [quantized_rows(tensor, fmt)])
    assert np.array_equal(unpack_matrix(blob, matrix), dequantize(tensor))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_do_floats_round_trip_exactly(dtype: str) -> None:
    values = stored_as(weight(24), dtype, "w")
    fmt = gpu_format([None], dtype, COLUMNS, "w")
    assert fmt is not None
    matrix = fmt.matrix(24, COLUMNS)
    found = unpack_matrix(blob_of(matrix, [Rows(values)]), matrix)
    exact = (values.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else values.astype(np.float32)
    assert np.array_equal(found, exact)


@pytest.mark.parametrize(
    ("schemes", "kind"),
    [
        (("int4-g32-sym", "int8-g64-sym", "int3-row-asym"), GpuKind.INT8),
        (("int3-g32-sym", "int4-g16-asym"), GpuKind.INT4),
        (("fp8-row", "fp8-b32"), GpuKind.FP8),
    ],
)
def test_do_stacked_matrices_share_the_most_bits_and_the_smallest_group(
    schemes: tuple[str, ...], kind: GpuKind
) -> None:
    tensors = [quantised(scheme, 16, seed=i) for i, scheme in enumerate(schemes)]
    fmt = gpu_format([tensor.scheme for tensor in tensors], "bfloat16", COLUMNS, "w")
    assert fmt is not None
    assert (fmt.kind, fmt.group) == (kind, min(tensor.scheme.group_size(COLUMNS) for tensor in tensors))
    matrix = fmt.matrix(16 * len(tensors), COLUMNS)
    blob = blob_of(matrix, [stacked([quantized_rows(tensor, fmt) for tensor in tensors])])
    assert np.array_equal(unpack_matrix(blob, matrix), np.concatenate([dequantize(tensor) for tensor in tensors]))


@pytest.mark.parametrize("scheme", ["int4-g32-asym", "int8-g32-sym", "fp8-row"])
@pytest.mark.parametrize("width", [16, 12, 24])
def test_do_gate_and_up_of_several_experts_alternate_by_eight_rows(scheme: str, width: int) -> None:
    pairs = [[quantised(scheme, width, seed=2 * e + i) for i in range(2)] for e in range(3)]
    fmt = gpu_format([pairs[0][0].scheme], "bfloat16", COLUMNS, "w")
    assert fmt is not None
    matrix = fmt.matrix(2 * width, COLUMNS, swiglu=True, count=3)
    blob = blob_of(matrix, [interleaved(*(quantized_rows(part, fmt) for part in pair)) for pair in pairs])
    for e, pair in enumerate(pairs):
        assert np.array_equal(unpack_matrix(blob, matrix, e), np.concatenate([dequantize(part) for part in pair]))


def test_does_a_matrix_in_blocks_of_rows_give_the_bytes_of_it_whole() -> None:
    tensor = quantised("int4-g32-asym", 72)
    fmt = GpuFormat(GpuKind.INT4, 32, zeros=True)
    matrix = fmt.matrix(72, COLUMNS)
    parts = [tensor.rows(slice(start, start + 32)) for start in (0, 32, 64)]
    assert blob_of(matrix, [quantized_rows(part, fmt) for part in parts]) == blob_of(
        matrix, [quantized_rows(tensor, fmt)]
    )


def test_is_there_no_format_for_floats_beside_integers_or_fp8_beside_integers() -> None:
    integers, fp8 = parse_scheme("int8-g32-sym"), parse_scheme("fp8-row")
    assert gpu_format([None, integers], "bfloat16", COLUMNS, "w") is None
    assert gpu_format([fp8, integers], "bfloat16", COLUMNS, "w") is None


@pytest.mark.parametrize(
    ("scheme", "columns", "said"),
    [
        ("int4-g32-sym", 96, "rows of 96.*multiple of 64"),
        ("fp8-row", 80, "rows of 80.*multiple of 32"),
        (None, 40, "rows of 40.*multiple of 16"),
        ("fp8e5m2-row", 128, "E4M3"),
    ],
)
def test_is_what_the_layout_does_not_support_named(scheme: str | None, columns: int, said: str) -> None:
    parsed = None if scheme is None else parse_scheme(scheme).effective(columns)
    with pytest.raises(ExportError, match=f"layers.0.attn.q_proj.*{said}"):
        gpu_format([parsed], "bfloat16", columns, "layers.0.attn.q_proj")
