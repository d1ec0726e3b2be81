"""Does the native layout hold the same values, whatever the scheme, the shape and the stored format?"""

from __future__ import annotations

import struct
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from numpy.typing import NDArray
from unpack_native import unpack_matrix

from edgelm.bundle.cpu_layout import (
    HEADER_BYTES,
    TILE,
    Kind,
    PackedMatrix,
    Scales,
    experts_header,
    parse_matrix,
    read_matrices,
)
from edgelm.errors import BundleError
from edgelm.export.packing.cpu import (
    Format,
    common_format,
    float_format,
    pack_codes,
    pack_floats,
    stacked,
)
from edgelm.export.packing.repack import upcast
from edgelm.quant.codec import quantize
from edgelm.quant.primitives import unpack
from edgelm.quant.scheme import parse_scheme
from edgelm.quant.tensor import QuantTensor

COLUMNS = 256


def weight(rows: int, columns: int = COLUMNS, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def packed(tensors: list[QuantTensor], fmt: Format, *, swiglu: bool = False) -> tuple[PackedMatrix, bytes]:
    """Pack one matrix of stacked tensors, or of gate and up."""
    matrix = fmt.matrix(sum(t.shape[0] for t in tensors), tensors[0].shape[1], swiglu=swiglu)
    out = np.zeros((matrix.tiles, matrix.records, matrix.record_bytes), np.uint8)
    lower = np.zeros((matrix.tiles, matrix.low_bytes // matrix.tiles), np.uint8)
    if swiglu:
        pack_codes(tensors[0], fmt, out[0::2])
        pack_codes(tensors[1], fmt, out[1::2])
    else:
        pack_codes(stacked(tensors, fmt), fmt, out, lower)
    if fmt.kind is Kind.INT8_SPLIT:
        matrix = matrix.with_low_offset(matrix.first_bytes + 192)
        return matrix, matrix.header() + out.tobytes() + bytes(192) + lower.tobytes()
    return matrix, matrix.header() + out.tobytes()


def assert_same(tensor: QuantTensor, found: tuple[NDArray[np.generic], ...], bits: int) -> None:
    """Check codes with their new bits, and repeated scales and zero points."""
    codes, scales, zeros = found
    old, groups = tensor.scheme.bits, scales.shape[1]
    np.testing.assert_array_equal(codes, upcast(unpack(tensor.codes, old, tensor.shape[1]), old, bits))
    times = -(-groups // tensor.scales.shape[1])
    np.testing.assert_array_equal(scales, np.repeat(tensor.scales, times, axis=1)[:, :groups])
    middle = np.full(tensor.scales.shape, 1 << (old - 1), np.uint8)
    expected = upcast(middle if tensor.zeros is None else tensor.zeros, old, bits)
    np.testing.assert_array_equal(zeros, np.repeat(expected, times, axis=1)[:, :groups])


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 70])
@pytest.mark.parametrize("group", ["g32", "g64", "row"])
@pytest.mark.parametrize("symmetry", ["sym", "asym"])
@pytest.mark.parametrize("bits", [3, 4, 5, 6, 8])
def test_every_integer_scheme_round_trips(bits: int, symmetry: str, group: str, rows: int) -> None:
    tensor = quantize(weight(rows), parse_scheme(f"int{bits}-{group}-{symmetry}"))
    fmt = common_format([tensor.scheme], COLUMNS, "x")
    assert fmt is not None
    assert (fmt.kind, fmt.zeros) == (Kind(bits), symmetry == "asym")
    matrix, data = packed([tensor], fmt)
    assert parse_matrix(data[:HEADER_BYTES], "x") == matrix
    assert matrix.nbytes == len(data)
    assert_same(tensor, unpack_matrix(matrix, data), bits)


@pytest.mark.parametrize("columns", [32, 96, 160])
def test_any_number_of_blocks(columns: int) -> None:
    for bits in (3, 4, 5, 6, 8):
        tensor = quantize(weight(40, columns), parse_scheme(f"int{bits}-g32-sym"))
        fmt = common_format([tensor.scheme], columns, "x")
        assert fmt is not None
        assert_same(tensor, unpack_matrix(*packed([tensor], fmt)), bits)


@pytest.mark.parametrize(
    "name", ["int8-g128-sym", "int8-row-sym", "int4-g32-sym", "int3-g64-sym", "int5-g32-sym", "int6-row-sym"]
)
def test_split_nibbles_hold_eight_bits(name: str) -> None:
    tensor = quantize(weight(50), parse_scheme(name))
    group = tensor.scheme.group_size(COLUMNS)
    matrix, data = packed([tensor], Format(Kind.INT8_SPLIT, Scales.FLOAT16, False, group))
    assert_same(tensor, unpack_matrix(matrix, data), 8)


@pytest.mark.parametrize("bits", [3, 4, 5, 6, 8])
@pytest.mark.parametrize("rows", [32, 40, 96])
def test_gate_and_up_lie_in_alternating_tiles(bits: int, rows: int) -> None:
    gate, up = (quantize(weight(rows, seed=i), parse_scheme(f"int{bits}-g32-asym")) for i in range(2))
    fmt = common_format([gate.scheme, up.scheme], COLUMNS, "x")
    assert fmt is not None
    matrix, data = packed([gate, up], fmt, swiglu=True)
    assert matrix.tiles == 2 * -(-rows // TILE)
    codes, scales, zeros = unpack_matrix(matrix, data)
    for i, tensor in enumerate((gate, up)):
        mine = slice(i * rows, (i + 1) * rows)
        assert_same(tensor, (codes[mine], scales[mine], zeros[mine]), bits)
    second = data[HEADER_BYTES + matrix.records * matrix.record_bytes :]
    np.testing.assert_array_equal(np.frombuffer(second, np.float16, TILE), up.scales[:TILE, 0])


MIXES = [
    (["int4-g32-sym", "int4-g128-sym"], Kind.INT4, 32, False),
    (["int4-g64-asym", "int8-row-sym", "int3-g32-sym"], Kind.INT8, 32, True),
    (["int3-row-sym", "int4-row-sym"], Kind.INT4, COLUMNS, False),
    (["int4-g32-sym", "int5-g64-asym"], Kind.INT5, 32, True),
    (["int6-g64-sym", "int3-g64-sym", "int5-row-sym"], Kind.INT6, 64, False),
    (["int6-g128-asym", "int8-g32-sym"], Kind.INT8, 32, True),
]


@pytest.mark.parametrize(("names", "kind", "group", "zeros"), MIXES)
def test_stacked_matrices_of_different_schemes_are_upcast_exactly(
    names: list[str], kind: Kind, group: int, zeros: bool
) -> None:
    tensors = [quantize(weight(17 + i, seed=i), parse_scheme(name)) for i, name in enumerate(names)]
    fmt = common_format([t.scheme for t in tensors], COLUMNS, "x")
    assert fmt == Format(kind, Scales.FLOAT16, zeros, group)
    found = unpack_matrix(*packed(tensors, fmt))
    first = 0
    for tensor in tensors:
        mine = slice(first, first + tensor.shape[0])
        assert_same(tensor, (found[0][mine], found[1][mine], found[2][mine]), int(kind))
        first = mine.stop


@pytest.mark.parametrize("name", ["fp8-row", "fp8-b64"])
def test_fp8_round_trips(name: str) -> None:
    tensor = quantize(weight(45), parse_scheme(name))
    fmt = common_format([tensor.scheme], COLUMNS, "x")
    assert fmt == Format(Kind.FP8, Scales.FLOAT32, False, tensor.scheme.group_size(COLUMNS))
    codes, scales = unpack_matrix(*packed([tensor], fmt))
    np.testing.assert_array_equal(codes, tensor.codes)
    np.testing.assert_array_equal(scales, tensor.scales)


def test_fp8_of_different_blocks_is_stacked_exactly() -> None:
    tensors = [quantize(weight(20, seed=i), parse_scheme(name)) for i, name in enumerate(["fp8-row", "fp8-b64"])]
    fmt = common_format([t.scheme for t in tensors], COLUMNS, "x")
    assert fmt is not None
    assert fmt.group == 64
    codes, scales = unpack_matrix(*packed(tensors, fmt))
    np.testing.assert_array_equal(codes, np.concatenate([t.codes for t in tensors]))
    np.testing.assert_array_equal(scales, np.concatenate([np.repeat(tensors[0].scales, 4, axis=1), tensors[1].scales]))


@pytest.mark.parametrize(
    ("dtype", "stored"), [("float16", np.float16), ("bfloat16", np.uint16), ("float32", np.float32)]
)
@pytest.mark.parametrize("columns", [256, 50])
def test_float_matrices_round_trip(dtype: str, stored: type[np.generic], columns: int) -> None:
    values = (weight(45, columns) * 100).astype(stored)
    fmt = float_format(dtype, columns)
    matrix = fmt.matrix(45, columns)
    out = np.zeros((matrix.tiles, 1, matrix.record_bytes), np.uint8)
    pack_floats(values, out)
    (found,) = unpack_matrix(matrix, matrix.header() + out.tobytes())
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize("columns", [1, 12, 16, 33, 48, 100, 129])
@pytest.mark.parametrize("group", ["g16", "g32", "g64", "row"])
def test_rows_of_any_width_round_trip(group: str, columns: int) -> None:
    for bits, symmetry in ((3, "sym"), (4, "asym"), (4, "sym"), (5, "asym"), (6, "sym"), (8, "asym"), (8, "sym")):
        tensor = quantize(weight(37, columns), parse_scheme(f"int{bits}-{group}-{symmetry}"))
        fmt = common_format([tensor.scheme], columns, "x")
        assert fmt is not None
        matrix, data = packed([tensor], fmt)
        assert parse_matrix(data[:HEADER_BYTES], "x") == matrix
        assert matrix.nbytes == len(data)
        assert_same(tensor, unpack_matrix(matrix, data), bits)
        if (bits, symmetry) == (8, "sym"):
            split = Format(Kind.INT8_SPLIT, fmt.scales, False, fmt.group)
            assert_same(tensor, unpack_matrix(*packed([tensor], split)), 8)
    tensor = quantize(weight(37, columns), parse_scheme(f"fp8-{group.replace('g', 'b')}"))
    fmt = common_format([tensor.scheme], columns, "x")
    assert fmt is not None
    codes, scales = unpack_matrix(*packed([tensor], fmt))
    np.testing.assert_array_equal(codes, tensor.codes)
    np.testing.assert_array_equal(scales, tensor.scales)


@pytest.mark.parametrize("columns", [20, 48, 90, 100])
@pytest.mark.parametrize(
    "names",
    [
        ["int4-g64-sym", "int4-g32-asym", "int3-row-sym"],
        ["int4-g16-sym", "int8-g128-sym"],
        ["int4-row-sym", "int5-row-sym"],
    ],
)
def test_stacked_rows_of_any_width_round_trip(names: list[str], columns: int) -> None:
    tensors = [quantize(weight(17 + i, columns, seed=i), parse_scheme(name)) for i, name in enumerate(names)]
    fmt = common_format([t.scheme for t in tensors], columns, "x")
    assert fmt is not None
    found, first = unpack_matrix(*packed(tensors, fmt)), 0
    for tensor in tensors:
        mine = slice(first, first + tensor.shape[0])
        assert_same(tensor, (found[0][mine], found[1][mine], found[2][mine]), int(fmt.kind))
        first = mine.stop
    blocks = [quantize(weight(9, columns, seed=i), parse_scheme(name)) for i, name in enumerate(("fp8-b64", "fp8-row"))]
    fmt = common_format([t.scheme for t in blocks], columns, "x")
    assert fmt is not None
    codes, scales = unpack_matrix(*packed(blocks, fmt))
    np.testing.assert_array_equal(codes, np.concatenate([t.codes for t in blocks]))
    np.testing.assert_array_equal(scales[:9], blocks[0].scales)
    np.testing.assert_array_equal(scales[9:], np.repeat(blocks[1].scales, scales.shape[1], axis=1))


def test_integers_and_fp8_have_no_common_format() -> None:
    assert common_format([parse_scheme("int8-row-sym"), parse_scheme("fp8-row")], COLUMNS, "x") is None


def test_experts_are_found_through_their_table() -> None:
    fmt = Format(Kind.INT4, Scales.FLOAT16, False, 32)
    first, second = fmt.matrix(64, 64, swiglu=True), fmt.matrix(64, 32)
    table = HEADER_BYTES + 16
    size = table + 48 + first.nbytes + second.nbytes
    data = experts_header([(table + 48, table + 48 + first.nbytes)], size) + bytes(48)
    data += first.header() + bytes(first.nbytes - 64) + second.header() + bytes(second.nbytes - 64)
    found = read_matrices(BytesIO(b"xyz" + data), 3, "moe")
    assert found == [(table + 48, first), (table + 48 + first.nbytes, second)]
    assert read_matrices(BytesIO(np.ones(64, np.float32).tobytes()), 0, "a norm") == []
    for place, message in ((table + 49, "a multiple of 64"), (size + 64, "within"), (-64, "within")):
        damaged = experts_header([(place, table + 48)], size) + data[table:]
        with pytest.raises(BundleError, match=f"moe: gate_up of expert 0 begins at byte {place} of {size}.*{message}"):
            read_matrices(BytesIO(damaged), 0, "moe")
    for cut in (20, HEADER_BYTES + 8):
        with pytest.raises(BundleError, match="moe has a header of packed experts that cannot be"):
            read_matrices(BytesIO(data[:cut]), 0, "moe")


def test_a_damaged_header_is_reported() -> None:
    matrix = Format(Kind.INT4, Scales.FLOAT16, False, 32).matrix(64, 64)
    header = matrix.header()
    for broken, message in (
        (b"X" + header[1:], "does not begin with EDLM"),
        (header[:4] + b"\x02" + header[5:], "layout version 2"),
        (header[:5] + b"\x63" + header[6:], "99 is not a valid Kind"),
        (header[:8] + struct.pack("<q", 65 * 32) + header[16:], "contradict"),
        (header[:16] + struct.pack("<q", 2**62) + header[24:], "contradict"),
        (header[:24] + struct.pack("<q", 48) + header[32:], "contradict"),
    ):
        with pytest.raises(BundleError, match=message):
            parse_matrix(broken, "w")
    assert replace(matrix, rows=33).first_bytes == matrix.first_bytes
