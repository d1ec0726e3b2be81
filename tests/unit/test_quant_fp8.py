"""Is FP8 rounded as in the standard (compared with PyTorch), and are scales and codes of a matrix correct?"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgelm.errors import CheckpointError
from edgelm.quant import Fp8Scheme, QuantTensor, dequantize, fp8, parse_scheme, primitives, quantize
from edgelm.quant.primitives import as_float32

E5M2 = Fp8Scheme(None, "e5m2")
SCHEMES = [Fp8Scheme(None), Fp8Scheme(16), Fp8Scheme(128), E5M2, Fp8Scheme(32, "e5m2")]
TORCH = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
BOTH = pytest.mark.parametrize("name", TORCH)


def codes_of_torch(values, name):
    # PyTorch's conversion does not saturate: values above the largest number become NaN or infinity.
    largest = float(torch.finfo(TORCH[name]).max)
    clipped = torch.from_numpy(np.clip(values, -largest, largest))
    return clipped.to(TORCH[name]).view(torch.uint8).numpy()


@BOTH
def test_every_code_has_the_value_of_torch(name):
    form = fp8.FORMS[name]
    codes = np.arange(256, dtype=np.uint8)
    expected = torch.from_numpy(codes).view(TORCH[name]).float().numpy()
    found = fp8.decode(codes, form)
    assert np.array_equal(found, expected, equal_nan=True)
    assert np.array_equal(np.signbit(found), np.signbit(expected))
    assert np.isfinite(found).sum() == 2 * (form.top + 1)
    assert found[form.top] == form.largest == torch.finfo(TORCH[name]).max
    assert form.smallest_normal == torch.finfo(TORCH[name]).smallest_normal


def test_the_largest_and_smallest_are_those_of_the_specification():
    assert (fp8.E4M3.largest, fp8.decode(np.array([1], np.uint8))[0]) == (448, 2.0**-9)
    assert (fp8.E5M2.largest, fp8.decode(np.array([1], np.uint8), fp8.E5M2)[0]) == (57344, 2.0**-16)
    assert fp8.decode(np.array([0x7C, 0xFC], np.uint8), fp8.E5M2).tolist() == [np.inf, -np.inf]
    assert fp8.LARGEST == 448


@BOTH
def test_every_number_and_every_tie_is_rounded_as_in_torch(name):
    form = fp8.FORMS[name]
    count = form.top + 1
    numbers = fp8.decode(np.arange(count, dtype=np.uint8), form)
    ties = (numbers[1:] + numbers[:-1]) / np.float32(2)
    above, below = np.nextafter(ties, np.float32(1e9)), np.nextafter(ties, np.float32(0))
    for values in (numbers, ties, above, below):
        for signed in (values, -values):
            assert np.array_equal(fp8.encode(signed, form), codes_of_torch(signed, name))
    assert np.array_equal(fp8.encode(numbers, form), np.arange(count))
    even = np.arange(count - 1) + np.arange(count - 1) % 2
    assert np.array_equal(fp8.encode(ties, form), even)
    assert np.array_equal(fp8.encode(above, form), np.arange(1, count))
    assert np.array_equal(fp8.encode(below, form), np.arange(count - 1))


@BOTH
def test_any_float_is_rounded_as_in_torch_and_saturates(name):
    form = fp8.FORMS[name]
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 1_000_000, dtype=np.uint64).astype(np.uint32)
    past = form.largest * np.array([1, 1.0000001, 1.03, 1.04, 1.08, 1.2, 1e30], np.float32)
    values = np.concatenate(
        [
            bits.view(np.float32)[np.isfinite(bits.view(np.float32))],
            rng.uniform(-1.2, 1.2, 300_000).astype(np.float32) * form.largest,
            rng.uniform(-1, 1, 300_000).astype(np.float32) * form.smallest_normal,
            past,
            np.array([2.0**-10, 2.0**-17, 2.0**-149, 0.0, -0.0], np.float32),
        ]
    )
    found = fp8.encode(values, form)
    assert np.array_equal(found, codes_of_torch(values, name))
    assert (found & 0x7F).max() == form.top  # never infinite, never NaN
    assert (found[values >= form.largest] == form.top).all()


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("shape", [(1, 16), (3, 48), (17, 128), (150, 2048)], ids=str)
def test_a_matrix_has_the_scales_and_codes_of_the_formula(scheme, shape):
    weight = (0.02 * np.random.default_rng(1).standard_t(3, shape)).astype(np.float32)
    tensor = quantize(weight, scheme)
    scheme = tensor.scheme
    blocks = torch.from_numpy(weight).reshape(shape[0], scheme.groups(shape[1]), -1)
    largest, kind = float(fp8.FORMS[scheme.form].largest), TORCH[scheme.form]
    scales = blocks.abs().amax(dim=2) / largest
    assert tensor.scales.dtype == np.float32
    assert np.array_equal(tensor.scales, scales.numpy())
    codes = (blocks / scales[:, :, None]).clamp(-largest, largest).to(kind)
    assert np.array_equal(tensor.codes, codes.view(torch.uint8).reshape(shape).numpy())
    values = (codes.float() * scales[:, :, None]).reshape(shape).numpy()
    assert np.array_equal(dequantize(tensor), values)
    # Half a unit of three (two) mantissa bits, 1/16 (1/8) of the value, or half a step below the smallest normal one.
    smallest, share = (2.0**-9, 1 / 16) if scheme.form == "e4m3" else (2.0**-16, 1 / 8)
    step = np.repeat(tensor.scales, scheme.group_size(shape[1]), axis=1) * np.float32(smallest)
    assert (np.abs(values - weight) <= np.maximum(np.abs(weight) * share, step / 2) * 1.00001).all()


def test_rows_keep_every_value():
    weight = np.random.default_rng(2).standard_normal((6, 256)).astype(np.float32)
    for scheme in (Fp8Scheme(None), Fp8Scheme(128), Fp8Scheme(128, "e5m2")):
        tensor = quantize(weight, scheme)
        values = dequantize(tensor)
        assert np.array_equal(dequantize(tensor.rows(slice(2, 5))), values[2:5])
        assert tensor.nbytes == weight.size + 4 * tensor.scales.size


def test_bfloat16_and_strided_rows_are_read():
    bf16 = (np.random.default_rng(3).standard_normal((9, 160)).astype(np.float32).view(np.uint32) >> 16).astype(
        np.uint16
    )
    for view in (bf16, bf16[::2, 16:144], bf16.T[:, :9].T):
        expected = quantize(np.ascontiguousarray(as_float32(view)), Fp8Scheme(32))
        found = quantize(view, Fp8Scheme(32))
        assert np.array_equal(found.codes, expected.codes)
        assert np.array_equal(found.scales, expected.scales)


@BOTH
def test_zeros_stay_zero_and_tiny_blocks_become_zero(name):
    weight = np.ones((4, 64), np.float32)
    weight[0] = 0
    weight[1] = 1e-36 if name == "e4m3" else 1e-34  # its scale would be a subnormal float32
    weight[2, 5] = 3e38
    tensor = quantize(weight, Fp8Scheme(None, name))
    values = dequantize(tensor)
    assert (values[:2] == 0).all()
    assert tensor.scales[:2].tolist() == [[0], [0]]
    assert values[2, 5] == pytest.approx(3e38, rel=1e-6)
    assert np.array_equal(values[3], weight[3])
    assert quantize(np.zeros((0, 64), np.float32), Fp8Scheme(32)).codes.shape == (0, 64)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_named(value):
    weight = np.ones((200, 4096), np.float32)  # several chunks
    weight[166, 2500] = value
    with pytest.raises(CheckpointError, match=rf"model\.x\.weight\[166, 2500\] is {value}\b"):
        quantize(weight, Fp8Scheme(128), name="model.x.weight")


def test_a_block_shrinks_until_it_divides_the_row_or_the_last_is_shorter():
    assert quantize(np.ones((2, 96), np.float32), Fp8Scheme(128)).scheme == Fp8Scheme(32)
    assert quantize(np.ones((2, 50), np.float32), Fp8Scheme(None)).scales.shape == (2, 1)
    values = np.random.default_rng(0).standard_normal((2, 40)).astype(np.float32)
    tensor, tail = quantize(values, Fp8Scheme(32)), quantize(values[:, 32:], Fp8Scheme(None))
    assert tensor.scheme == Fp8Scheme(32)
    np.testing.assert_array_equal(tensor.scales[:, 1:], tail.scales)
    np.testing.assert_array_equal(tensor.codes[:, 32:], tail.codes)
    np.testing.assert_array_equal(dequantize(tensor)[:, 32:], dequantize(tail))


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_names_are_read_back(scheme):
    assert parse_scheme(scheme.name) == scheme
    assert scheme.bits_per_weight(2048) == 8 + 32 * scheme.groups(2048) / 2048


def test_options_of_integer_schemes_are_refused():
    tensor = quantize(np.ones((2, 64), np.float32), Fp8Scheme(32))
    with pytest.raises(TypeError, match="fp8-b32"):
        primitives.dequantize(tensor)
    with pytest.raises(TypeError, match="int8-row-sym"):
        fp8.dequantize(quantize(np.ones((2, 64), np.float32), parse_scheme("int8-row-sym")))
    for change in ({"scales": tensor.scales.astype(np.float16)}, {"zeros": np.zeros((2, 2), np.uint8)}):
        fields = {n: getattr(tensor, n) for n in ("codes", "scales", "zeros", "scheme", "shape")} | change
        with pytest.raises(ValueError, match="fp8-b32"):
            QuantTensor(**fields)
