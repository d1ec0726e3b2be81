"""Do codes, scales and zero points follow the formulas, beat plain rounding, and agree in all implementations?"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from edgelm.errors import CheckpointError, RecipeError
from edgelm.quant import QuantTensor, Scheme, native, parse_scheme, primitives
from edgelm.quant.quality import plain_rounding

SCHEMES = [Scheme(b, g, s) for b, g, s in itertools.product((3, 4, 5, 6, 8), (16, 32, 64, 128, None), (True, False))]
SHAPES = [(1, 16), (3, 48), (17, 128), (2, 1008), (5, 2048)]


def weights(shape, kind="normal", seed=0):
    rng = np.random.default_rng(seed)
    values = {
        "normal": lambda: rng.standard_normal(shape) * 0.02,
        "heavy": lambda: rng.standard_t(2, shape) * 0.01,
        "one-sided": lambda: np.abs(rng.standard_normal(shape)) * (rng.random(shape) < 0.2),
        "scales": lambda: rng.standard_normal(shape) * 10.0 ** rng.uniform(-12, 4, (shape[0], 1)),
        "constant": lambda: np.full(shape, -0.3),
    }[kind]()
    return values.astype(np.float32)


KINDS = ["normal", "heavy", "one-sided", "scales", "constant"]


def group_errors(weight, values, scheme):
    difference = (weight.astype(np.float64) - values).reshape(weight.shape[0], scheme.groups(weight.shape[1]), -1)
    return np.square(difference).sum(axis=2)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantised_values_follow_the_formula_exactly(scheme, shape):
    weight = weights(shape)
    tensor = primitives.quantize(weight, scheme)
    rows, columns = shape
    codes = primitives.unpack(tensor.codes, scheme.bits)
    assert codes.shape == shape
    assert codes.max() < scheme.levels
    group = columns // tensor.scales.shape[1]
    expected = np.empty(shape, np.float64)
    for row, column in itertools.product(range(rows), range(columns)):
        zero = scheme.symmetric_zero if tensor.zeros is None else int(tensor.zeros[row, column // group])
        expected[row, column] = (int(codes[row, column]) - zero) * float(tensor.scales[row, column // group])
    assert np.array_equal(primitives.dequantize(tensor), expected)  # exact: 9-bit times 11-bit fits float32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_no_group_is_worse_than_plain_rounding(scheme, kind):
    weight = weights((16, 512), kind)
    tensor = primitives.quantize(weight, scheme)
    ours = group_errors(weight, primitives.dequantize(tensor), tensor.scheme)
    plain = group_errors(weight, plain_rounding(weight, tensor.scheme), tensor.scheme)
    # The code compares float32 sums of up to 512 squares.
    assert (ours <= plain * (1 + 3e-5) + 1e-30).all(), (ours - plain).max()


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_every_code_is_the_nearest_to_its_weight(scheme):
    weight = weights((8, 256), "heavy")
    tensor = primitives.quantize(weight, scheme)
    zero = scheme.symmetric_zero if tensor.zeros is None else tensor.zeros[:, :, None].astype(int)
    scale = tensor.scales.astype(np.float64)[:, :, None]
    grouped = weight.reshape(8, tensor.scales.shape[1], -1).astype(np.float64)
    codes = primitives.unpack(tensor.codes, scheme.bits).reshape(grouped.shape).astype(int)
    error = np.abs(grouped - (codes - zero) * scale)
    for other in (codes - 1, codes + 1):
        allowed = (other >= 0) & (other < scheme.levels)
        assert (error <= np.abs(grouped - (other - zero) * scale) + 1e-7 * np.abs(grouped))[allowed].all()


@pytest.mark.parametrize("bits", [3, 4, 5, 6, 8])
@pytest.mark.parametrize("columns", [8, 16, 40, 256])
def test_packing_round_trips(bits, columns):
    codes = np.random.default_rng(columns).integers(0, 1 << bits, (7, columns), dtype=np.uint8)
    packed = primitives.pack(codes, bits)
    assert packed.shape == (7, columns * bits // 8)
    assert np.array_equal(primitives.unpack(packed, bits), codes)


def test_the_even_value_is_in_the_low_nibble():
    assert primitives.pack(np.array([[0x1, 0xF, 0x3, 0x8]], np.uint8), 4).tolist() == [[0xF1, 0x83]]


@pytest.mark.parametrize(("bits", "codes_of_word"), [(3, 8), (5, 8), (6, 4)])
def test_codes_of_odd_widths_fill_bytes_from_the_lowest_bit(bits, codes_of_word):
    most = (1 << bits) - 1
    codes = np.array([range(1, codes_of_word + 1), [0] * (codes_of_word - 1) + [most]], np.uint8) & most
    packed = primitives.pack(codes, bits)
    assert packed.shape == (2, codes_of_word * bits // 8)
    numbers = [sum(int(code) << bits * i for i, code in enumerate(row)) for row in codes]
    assert [int.from_bytes(row.tobytes(), "little") for row in packed] == numbers


def test_bfloat16_weights_are_quantised_like_their_float32_values():
    bf16 = (weights((6, 128)).view(np.uint32) >> 16).astype(np.uint16)
    short, wide = (primitives.quantize(w, Scheme(4, 32)) for w in (bf16, primitives.as_float32(bf16)))
    assert np.array_equal(short.codes, wide.codes)
    assert np.array_equal(short.scales, wide.scales)


def test_weights_of_another_type_are_refused():
    for quantize in (primitives.quantize, native.quantize):
        with pytest.raises(TypeError, match="float64"):
            quantize(np.zeros((2, 32)), Scheme(4, 32))


@pytest.mark.parametrize("quantize", [primitives.quantize, native.quantize])
@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_stay_exactly_zero(quantize, symmetric):
    weight = weights((4, 96))
    weight[1] = 0
    weight[2, 32:64] = -0.0
    weight[3, :32] = 1e-9  # the scale is below the smallest float16
    tensor = quantize(weight, Scheme(4, 32, symmetric))
    values = native.dequantize(tensor)
    assert (values[1] == 0).all()
    assert (values[2, 32:64] == 0).all()
    assert (values[3, :32] == 0).all()
    assert tensor.scales[1].tolist() == [0, 0, 0]
    assert (values[0] != 0).any()


@pytest.mark.parametrize("quantize", [primitives.quantize, native.quantize])
@pytest.mark.parametrize(("value", "said"), [(np.nan, "nan"), (np.inf, "inf"), (-np.inf, "-inf")])
def test_a_weight_that_is_not_finite_is_named(quantize, value, said):
    weight = weights((70, 4096))  # several chunks
    weight[66, 2500] = value
    weight[69, 1] = np.nan
    with pytest.raises(CheckpointError, match=rf"model\.x\.weight\[66, 2500\] is {said}\b"):
        quantize(weight, Scheme(4, 32), name="model.x.weight")


@pytest.mark.parametrize("quantize", [primitives.quantize, native.quantize])
@pytest.mark.parametrize("bits", [3, 4, 5, 6, 8])
def test_scales_beyond_float16_are_refused(quantize, bits):
    weight = weights((2, 64))
    limit = 65504 * (2 ** (bits - 1) - 1)
    weight[1, 7] = -limit
    tensor = quantize(weight, Scheme(bits, 32))
    assert np.isfinite(tensor.scales).all()
    assert native.dequantize(tensor)[1, 7] == pytest.approx(-limit, rel=0.08)
    weight[1, 7] = -1.001 * limit
    with pytest.raises(CheckpointError, match=r"w\[1, 7\].*float16"):
        quantize(weight, Scheme(bits, 32), name="w")


def test_scales_may_be_float16_subnormals():
    weight = weights((4, 64)) * np.float32(2e-5)  # scales about 1e-7, two units of the smallest subnormal
    tensor = primitives.quantize(weight, Scheme(4, 32))
    assert (np.abs(tensor.scales) < 6.2e-5).all()
    assert np.square(weight - primitives.dequantize(tensor)).sum() < np.square(weight).sum()


@pytest.mark.parametrize(
    ("group", "columns", "expected"), [(32, 64, 32), (128, 96, 32), (64, 48, 16), (32, 16, 16), (None, 50, None)]
)
def test_a_group_shrinks_until_it_divides_the_row(group, columns, expected):
    tensor = primitives.quantize(weights((3, columns)), Scheme(8, group))
    assert tensor.scheme.group == expected
    assert tensor.scales.shape == (3, 1 if expected is None else columns // expected)


@pytest.mark.parametrize("columns", [1, 7, 20, 40, 100, 257])
@pytest.mark.parametrize(
    "scheme",
    [
        *(Scheme(3, 32), Scheme(3, None), Scheme(4, 16, False), Scheme(4, None), Scheme(5, 64)),
        *(Scheme(6, None, False), Scheme(8, 32, False), Scheme(8, None)),
    ],
    ids=lambda scheme: scheme.name,
)
def test_rows_of_any_width_end_with_a_shorter_group(scheme, columns):
    values = weights((5, columns))
    tensor = primitives.quantize(values, scheme)
    assert tensor.scheme == scheme
    for isa in native.isas():
        found = native.quantize(values, scheme, isa=isa)
        for part in ("codes", "scales", "zeros"):
            np.testing.assert_array_equal(getattr(found, part), getattr(tensor, part))
        np.testing.assert_array_equal(native.dequantize(found, isa=isa), primitives.dequantize(tensor))
    # The last group equals that of a matrix with these columns only.
    start = 0 if scheme.group is None else (columns - 1) // scheme.group * scheme.group
    alone = primitives.quantize(np.ascontiguousarray(values[:, start:]), scheme.with_group(None))
    np.testing.assert_array_equal(tensor.scales[:, -1:], alone.scales)
    np.testing.assert_array_equal(primitives.dequantize(tensor)[:, start:], primitives.dequantize(alone))
    unpacked = primitives.unpack(tensor.codes, scheme.bits, columns)
    assert unpacked.shape == (5, columns)
    repacked = primitives.pack(unpacked, scheme.bits)
    np.testing.assert_array_equal(primitives.unpack(repacked, scheme.bits, columns), unpacked)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_names_of_schemes_are_read_back(scheme):
    assert parse_scheme(scheme.name) == scheme


@pytest.mark.parametrize(
    "name",
    [
        "int2-row-sym",
        "fp8",
        "fp8-b100",
        "fp8-b8",
        "fp8-row-sym",
        "int7-g32-sym",
        "int4-g32",
        "int4-g0-sym",
        "int4-g48-sym",
        "int4-g8-sym",
        "INT4-row-sym",
        "",
    ],
)
def test_other_scheme_names_are_refused(name):
    with pytest.raises(RecipeError, match=r"fp8-row, fp8-b<block>|power of two"):
        parse_scheme(name)


def test_a_tensor_whose_arrays_do_not_fit_is_refused():
    good = primitives.quantize(weights((4, 64)), Scheme(4, 32, symmetric=False))
    for change in (
        {"codes": good.codes[:, 1:]},
        {"scales": good.scales.astype(np.float32)},
        {"zeros": None},
        {"zeros": good.zeros[:3]},
        {"scheme": Scheme(4, 32)},
    ):
        fields = {n: getattr(good, n) for n in ("codes", "scales", "zeros", "scheme", "shape")} | change
        with pytest.raises(ValueError, match=r"int4-g32"):
            QuantTensor(**fields)


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(4, 128),
        Scheme(8, None),
        Scheme(4, 64, symmetric=False),
        Scheme(3, 64, symmetric=False),
        Scheme(5, 64, symmetric=False),
        Scheme(6, 128),
    ],
    ids=lambda s: s.name,
)
def test_rows_keep_every_value(scheme):
    tensor = primitives.quantize(weights((6, 256)), scheme)
    values = primitives.dequantize(tensor)
    assert np.array_equal(primitives.dequantize(tensor.rows(slice(2, 5))), values[2:5])
    assert np.array_equal(native.dequantize(tensor.rows(slice(2, 5))), values[2:5])


needs_kernel = pytest.mark.skipif(native.library() is None, reason="this installation has no compiled kernel")


@needs_kernel
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_the_kernel_gives_the_same_bytes_as_numpy(scheme, kind):
    assert native.isas()
    for shape in SHAPES:
        weight = weights(shape, kind)
        expected = primitives.quantize(weight, scheme)
        values = primitives.dequantize(expected)
        for isa in native.isas():
            found = native.quantize(weight, scheme, isa=isa, threads=3)
            where = f"{isa} {shape}"
            assert np.array_equal(found.codes, expected.codes), where
            assert found.scales.tobytes() == expected.scales.tobytes(), where
            assert (found.zeros is None) == (expected.zeros is None)
            assert found.zeros is None or np.array_equal(found.zeros, expected.zeros), where
            assert native.dequantize(expected, isa=isa, threads=3).tobytes() == values.tobytes(), where


@needs_kernel
def test_the_kernel_reads_strided_rows():
    wide = weights((9, 160))
    for view in (
        wide[:, :128],
        wide[::2, 16:144],
        wide[::-1, :128],
        wide.T[:, 1:9],
        np.broadcast_to(wide[0], (5, 160)),
    ):
        scheme = Scheme(8, None)
        expected = primitives.quantize(np.ascontiguousarray(view), scheme)
        assert np.array_equal(native.quantize(view, scheme).codes, expected.codes), view.strides


@needs_kernel
def test_without_the_library_numpy_is_used(monkeypatch):
    weight = weights((4, 64))
    compiled = native.quantize(weight, Scheme(4, 32))
    monkeypatch.setenv(native.LIBRARY_VARIABLE, "")
    native.library.cache_clear()
    try:
        assert native.library() is None
        assert native.isas() == ()
        plain = native.quantize(weight, Scheme(4, 32))
    finally:
        monkeypatch.undo()
        native.library.cache_clear()
    assert np.array_equal(plain.codes, compiled.codes)


def test_zero_rows_are_allowed():
    for quantize, dequantize in ((primitives.quantize, primitives.dequantize), (native.quantize, native.dequantize)):
        for bits in (3, 4, 8):
            assert dequantize(quantize(np.zeros((0, 64), np.float32), Scheme(bits, 32))).shape == (0, 64)
