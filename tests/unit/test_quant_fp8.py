"""Is FP8 E4M3 rounded as the standard says (PyTorch is the oracle), and is a scaled matrix what was asked for?"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgelm.errors import CheckpointError, RecipeError
from edgelm.quant import Fp8Scheme, QuantTensor, dequantize, fp8, parse_scheme, primitives, quantize
from edgelm.quant.primitives import as_float32

SCHEMES = [Fp8Scheme(None), Fp8Scheme(16), Fp8Scheme(128)]


def codes_of_torch(values):
    # PyTorch's conversion does not saturate: what is past the largest number becomes NaN.
    clipped = torch.from_numpy(np.clip(values, -448, 448))
    return clipped.to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def test_every_code_stands_for_the_number_that_torch_says():
    codes = np.arange(256, dtype=np.uint8)
    expected = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    found = fp8.decode(codes)
    assert np.isnan(found[[0x7F, 0xFF]]).all()
    assert np.isnan(found).sum() == 2
    assert np.array_equal(found, expected, equal_nan=True)
    assert np.array_equal(np.signbit(found), np.signbit(expected))
    assert found[0x7E] == fp8.LARGEST


def test_every_number_and_every_tie_between_two_is_rounded_as_torch_does():
    numbers = fp8.decode(np.arange(127, dtype=np.uint8))
    ties = (numbers[1:] + numbers[:-1]) / np.float32(2)
    above, below = np.nextafter(ties, np.float32(1e9)), np.nextafter(ties, np.float32(0))
    for values in (numbers, ties, above, below):
        for signed in (values, -values):
            assert np.array_equal(fp8.encode(signed), codes_of_torch(signed))
    assert np.array_equal(fp8.encode(numbers), np.arange(127))
    even = np.arange(126) + np.arange(126) % 2
    assert np.array_equal(fp8.encode(ties), even)
    assert np.array_equal(fp8.encode(above), np.arange(1, 127))
    assert np.array_equal(fp8.encode(below), np.arange(126))


def test_any_float_is_rounded_as_torch_does_and_saturates():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 1_000_000, dtype=np.uint64).astype(np.uint32)
    values = np.concatenate(
        [
            bits.view(np.float32)[np.isfinite(bits.view(np.float32))],
            rng.uniform(-500, 500, 300_000).astype(np.float32),
            (rng.uniform(-1, 1, 300_000) * 2.0**-6).astype(np.float32),
            np.array([448, 448.00003, 464, 465, 480, 1e30, 2.0**-10, 2.0**-149, 0.0, -0.0], np.float32),
        ]
    )
    found = fp8.encode(values)
    assert np.array_equal(found, codes_of_torch(values))
    assert (found & 0x7F).max() == 0x7E  # never NaN
    assert (found[values >= 448] == 0x7E).all()


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("shape", [(1, 16), (3, 48), (17, 128), (150, 2048)], ids=str)
def test_a_matrix_has_the_scales_and_codes_of_the_formula(scheme, shape):
    weight = (0.02 * np.random.default_rng(1).standard_t(3, shape)).astype(np.float32)
    tensor = quantize(weight, scheme)
    scheme = tensor.scheme
    blocks = torch.from_numpy(weight).reshape(shape[0], scheme.groups(shape[1]), -1)
    scales = blocks.abs().amax(dim=2) / 448
    assert tensor.scales.dtype == np.float32
    assert np.array_equal(tensor.scales, scales.numpy())
    codes = (blocks / scales[:, :, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert np.array_equal(tensor.codes, codes.view(torch.uint8).reshape(shape).numpy())
    values = (codes.float() * scales[:, :, None]).reshape(shape).numpy()
    assert np.array_equal(dequantize(tensor), values)
    # Half a unit of three mantissa bits, 1/16 of the value, or half a step of 2**-9 below the smallest normal number.
    step = np.repeat(tensor.scales, scheme.group_size(shape[1]), axis=1) * np.float32(2.0**-9)
    assert (np.abs(values - weight) <= np.maximum(np.abs(weight) / 16, step / 2) * 1.00001).all()


def test_rows_and_smaller_blocks_keep_every_value():
    weight = np.random.default_rng(2).standard_normal((6, 256)).astype(np.float32)
    for scheme in (Fp8Scheme(None), Fp8Scheme(128)):
        tensor = quantize(weight, scheme)
        values = dequantize(tensor)
        assert np.array_equal(dequantize(tensor.rows(slice(2, 5))), values[2:5])
        assert np.array_equal(dequantize(tensor.regrouped(32)), values)
        assert tensor.regrouped(32).scheme == Fp8Scheme(32)
        assert tensor.nbytes == weight.size + 4 * tensor.scales.size


def test_bfloat16_and_rows_that_lie_apart_are_read():
    bf16 = (np.random.default_rng(3).standard_normal((9, 160)).astype(np.float32).view(np.uint32) >> 16).astype(
        np.uint16
    )
    for view in (bf16, bf16[::2, 16:144], bf16.T[:, :9].T):
        expected = quantize(np.ascontiguousarray(as_float32(view)), Fp8Scheme(32))
        found = quantize(view, Fp8Scheme(32))
        assert np.array_equal(found.codes, expected.codes)
        assert np.array_equal(found.scales, expected.scales)


def test_zeros_stay_zero_and_tiny_blocks_become_zero():
    weight = np.ones((4, 64), np.float32)
    weight[0] = 0
    weight[1] = 1e-36  # its scale would be a subnormal float32
    weight[2, 5] = 3e38
    tensor = quantize(weight, Fp8Scheme(None))
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


def test_a_block_shrinks_until_it_divides_the_row():
    assert quantize(np.ones((2, 96), np.float32), Fp8Scheme(128)).scheme == Fp8Scheme(32)
    assert quantize(np.ones((2, 50), np.float32), Fp8Scheme(None)).scales.shape == (2, 1)
    with pytest.raises(RecipeError, match=r"a.b.weight has rows of 40 values.*use fp8-row"):
        quantize(np.ones((2, 40), np.float32), Fp8Scheme(128), name="a.b.weight")


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_names_are_read_back(scheme):
    assert parse_scheme(scheme.name) == scheme
    assert scheme.bits_per_weight(2048) == 8 + 32 * scheme.groups(2048) / 2048


def test_what_only_integers_have_is_refused():
    tensor = quantize(np.ones((2, 64), np.float32), Fp8Scheme(32))
    with pytest.raises(TypeError, match="fp8-b32"):
        primitives.dequantize(tensor)
    for change in ({"scales": tensor.scales.astype(np.float16)}, {"zeros": np.zeros((2, 2), np.uint8)}):
        fields = {n: getattr(tensor, n) for n in ("codes", "scales", "zeros", "scheme", "shape")} | change
        with pytest.raises(ValueError, match="fp8-b32"):
            QuantTensor(**fields)
