"""Do the calibrated methods have a smaller output error than rounding to nearest, and report it correctly?"""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest
import torch

from edgelm.errors import CheckpointError
from edgelm.quant import dequantize, native, parse_scheme, quantize
from edgelm.quant.methods import Calibrated, Moments, calibrate
from edgelm.quant.methods.drift import Drift
from edgelm.quant.methods.feedback import Block, fit_scale, recode_block, round_block
from edgelm.quant.methods.gptq import gptq
from edgelm.quant.methods.grids import grid, inverse
from edgelm.quant.methods.moments import Factor

K, N = 128, 40
INTEGERS = ("int3-g64-sym", "int4-g32-sym", "int4-g32-asym", "int5-g32-sym", "int6-row-asym", "int8-g128-sym")
SCHEMES = (*INTEGERS, "int4-row-sym", "fp8-row", "fp8-b32", "fp8e5m2-row")


@pytest.fixture(scope="module")
def inputs() -> torch.Tensor:
    """Correlated inputs of very different magnitudes, like hidden states."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(2000, K, generator=generator) @ torch.randn(K, K, generator=generator)
    return mixed * torch.exp(torch.randn(K, generator=generator))


@pytest.fixture(scope="module")
def weight() -> np.ndarray:
    return (0.05 * np.random.default_rng(1).standard_normal((N, K))).astype(np.float32)


def moments_of(inputs: torch.Tensor) -> Moments:
    moments = Moments.zeros(inputs.shape[1])
    for part in torch.split(inputs, 700):
        moments.add(part)
    return moments


def output_error(weight: np.ndarray, made: Calibrated, inputs: torch.Tensor) -> float:
    outputs = inputs.double() @ torch.from_numpy(weight).double().T
    found = inputs.double() @ torch.from_numpy(dequantize(made.tensor)).double().T
    return float((found - outputs).square().sum() / outputs.square().sum())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_method_beats_rounding_and_reports_its_error(inputs, weight, scheme):
    moments = moments_of(inputs)
    made = {m: calibrate(weight, parse_scheme(scheme), moments, method=m) for m in ("rtn", "search", "gptq", "auto")}
    for method, result in made.items():
        assert result.error == pytest.approx(output_error(weight, result, inputs), rel=0.02)
        assert result.tensor.scheme == parse_scheme(scheme)
        assert method in (result.method, "auto")
    assert made["search"].error < made["rtn"].error
    assert made["gptq"].error < 0.75 * made["search"].error
    assert made["auto"].method == "gptq"
    assert set(made["auto"].errors) == {"rtn", "search", "gptq"}
    assert np.array_equal(made["auto"].tensor.codes, made["gptq"].tensor.codes)


def test_without_correlation_the_methods_equal_a_weighted_search(weight):
    """If H is diagonal there is no error to feed back, so GPTQ equals a search weighted by column."""
    moments = Moments(torch.diag(torch.linspace(1, 50, K)), 100_000)
    search, corrected = (calibrate(weight, parse_scheme("int4-g32-sym"), moments, method=m) for m in ("search", "gptq"))
    assert corrected.error <= search.error * 1.001
    assert corrected.error > 0.8 * search.error


@pytest.mark.parametrize("group", [32, 64, K])
def test_the_factor_is_that_of_the_damped_moments_with_groups_kept_together(inputs, group):
    moments = moments_of(inputs)
    factor = Factor(moments.hessian, group, 0.01)
    unit = factor.feedback + torch.eye(K)
    rebuilt = (unit * factor.importance) @ unit.T
    damped = moments.hessian + 0.01 * moments.hessian.diagonal().mean() * torch.eye(K)
    expected = damped[factor.order][:, factor.order]
    assert torch.allclose(rebuilt, expected, rtol=1e-4, atol=1e-5 * float(expected.max()))
    assert torch.equal(factor.feedback, factor.feedback.triu(1))
    assert torch.equal(factor.order.view(-1, group) // group, factor.groups[:, None].expand(-1, group))
    assert sorted(factor.order.tolist()) == list(range(K))


def test_the_first_pass_is_gptq_as_in_its_paper(inputs, weight):
    """Compared with the paper's form: Cholesky factor of the inverse, columns updated one by one, the same scales."""
    factor = moments_of(inputs).factor(K, 0.01)
    numbers = grid(parse_scheme("int4-row-sym"), K)
    weights = torch.from_numpy(weight).T.contiguous()
    found = gptq(weights, numbers, factor, K, sweeps=0)
    upper = torch.linalg.cholesky(torch.linalg.inv(factor.hessian.double()), upper=True)
    left = weights[factor.order].double()
    scale = found.scales[0].double()
    expected = torch.empty_like(left)
    for j in range(K):
        expected[j] = (left[j] / scale).round().clamp(-8, 7)
        error = (left[j] - expected[j] * scale) / upper[j, j]
        left[j:] -= upper[j, j:, None] * error
    same = (found.values[factor.order].double() == expected).double().mean()
    assert same > 0.999  # ties may be rounded differently in float32


def test_every_sweep_lowers_the_error(inputs, weight):
    moments = moments_of(inputs)
    factor = moments.factor(32, 0.01)
    numbers = grid(parse_scheme("int4-g32-sym"), K)
    weights = torch.from_numpy(weight).T.contiguous()
    errors = []
    for sweeps in (0, 1, 2, 4):
        found = gptq(weights, numbers, factor, 32, sweeps)
        wrong = (weights - found.values * found.scales.repeat_interleave(32, 0)).T
        errors.append(moments.output_energy(wrong))
    assert errors[1] < 0.97 * errors[0]
    # Scales are rounded to float16 after they are fitted, which may matter in the last sweeps.
    assert errors[2] < 1.001 * errors[1]
    assert errors[3] < 1.001 * errors[2]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("rows", [1, 31, 40, 300])
def test_the_compiled_loops_agree_with_torch(scheme, rows, monkeypatch):
    if native.library() is None:
        assert not os.environ.get("CI"), "the compiled quantiser is missing: CI must test it"
        pytest.skip("this installation has no compiled quantiser")
    generator = torch.Generator().manual_seed(rows)
    columns = 48
    weights = torch.randn(columns, rows, generator=generator) * 0.05
    coupling = torch.randn(columns, columns, generator=generator) * 0.1
    hessian = coupling @ coupling.T + torch.eye(columns)
    importance = torch.rand(columns, generator=generator)
    target = weights + 0.01 * torch.randn(columns, rows, generator=generator)
    numbers = grid(parse_scheme(scheme), columns)
    results = []
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr(native, "library", lambda: None)
        trials, lowest = numbers.trials(target)
        scale = fit_scale(target, importance, trials, lowest, numbers)
        block = Block(weights, torch.empty_like(weights), torch.empty_like(weights), scale, lowest)
        round_block(block, target, coupling, numbers)
        first = block.values.clone(), block.error.clone()
        recode_block(block, hessian @ block.error, hessian, numbers)
        results.append((scale, *first, block.values, block.error))
    for compiled_array, torch_array in zip(*results, strict=True):
        close = torch.isclose(compiled_array, torch_array, rtol=1e-4, atol=1e-6)
        assert close.double().mean() > 0.99  # ties, and their effects in the same row


@pytest.mark.parametrize("scheme", ["int4-g32-sym", "int4-g32-asym", "fp8-row"])
def test_degenerate_inputs_and_weights(scheme, weight):
    """Inputs that are always zero, a single one, equal ones, fewer than columns; and weights that are zero."""
    dead = torch.randn(50, K, generator=torch.Generator().manual_seed(2))
    dead[:, 5:70] = 0
    same = torch.ones(30, K)
    none = torch.zeros(10, K)
    one = torch.randn(1, K, generator=torch.Generator().manual_seed(3))
    for inputs in (dead, same, none, one):
        for matrix in (weight, np.zeros_like(weight)):
            made = calibrate(matrix, parse_scheme(scheme), moments_of(inputs), method="gptq")
            values = dequantize(made.tensor)
            assert np.isfinite(values).all()
            plain = np.abs(dequantize(quantize(matrix, parse_scheme(scheme))) - matrix).max()
            # A group without inputs is rounded as without calibration.
            untouched = np.abs(values - matrix)[:, 32:64] if inputs is dead else np.zeros(1)
            assert untouched.max() <= 1.5 * plain


def test_without_inputs_weights_are_rounded_to_nearest(weight):
    assert calibrate(weight, parse_scheme("int4-g32-sym"), None).method == "rtn"
    assert calibrate(weight, parse_scheme("int4-g32-sym"), Moments.zeros(K)).method == "rtn"


def test_many_rows_are_processed_in_parts(inputs, monkeypatch):
    matrix = (0.05 * np.random.default_rng(4).standard_normal((70, K))).astype(np.float32)
    moments = moments_of(inputs)
    whole = calibrate(matrix, parse_scheme("int4-g32-asym"), moments, method="gptq").tensor
    monkeypatch.setattr(sys.modules["edgelm.quant.methods.calibrate"], "_CHUNK", 32)
    parts = calibrate(matrix, parse_scheme("int4-g32-asym"), moments, method="gptq").tensor
    assert np.mean(whole.codes == parts.codes) > 0.999  # products of other shapes may round differently
    assert parts.codes.shape == whole.codes.shape


@pytest.mark.parametrize("scheme", ["int4-g32-sym", "int3-g16-asym", "int4-row-asym", "fp8-b32"])
def test_rows_of_any_width_gain_equally(scheme):
    torch.manual_seed(5)
    inputs = torch.randn(300, 75) @ torch.randn(75, 75)
    weight = torch.randn(12, 75).numpy()
    moments = Moments.zeros(75)
    moments.add(inputs)
    found = calibrate(weight, parse_scheme(scheme), moments)
    assert found.tensor.shape == (12, 75)
    assert found.tensor.scheme == parse_scheme(scheme)
    missing = torch.from_numpy(weight - dequantize(found.tensor)) @ inputs.T
    exact = torch.from_numpy(weight) @ inputs.T
    assert float(missing.square().sum() / exact.square().sum()) == pytest.approx(found.error, rel=1e-3)
    assert found.method == "gptq"
    assert found.errors["gptq"] < 0.8 * found.errors["rtn"]


def test_wrong_use_is_refused(weight):
    with pytest.raises(ValueError, match="is not one of auto, gptq, search, rtn"):
        calibrate(weight, parse_scheme("int4-g32-sym"), None, method="best")
    with pytest.raises(ValueError, match="rows of 128, its inputs have 64"):
        calibrate(weight, parse_scheme("int4-g32-sym"), Moments(torch.eye(64), 1))
    with pytest.raises(ValueError, match="float32"):
        Moments(torch.eye(4).double(), 1)
    broken = Moments(torch.full((K, K), torch.nan), 3)
    with pytest.raises(CheckpointError, match=r"inputs of a\.weight are not finite"):
        calibrate(weight, parse_scheme("int4-g32-sym"), broken, name="a.weight")


def test_drift_is_corrected_as_far_as_a_matrix_can(inputs):
    """W' is the minimum, compared with least squares on the inputs themselves."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(N, K, generator=generator)
    drifted = inputs + 0.3 * inputs.std() * torch.randn(inputs.shape, generator=generator)
    residual = torch.randn(len(inputs), N, generator=generator)
    drift = Drift()
    for part in (slice(0, 900), slice(900, None)):
        drift.add(drifted[part], inputs[part], residual[part])
    found = drift.corrected(weight, damping=0.1)
    damping = 0.1 * float((drifted.double().square().sum(0)).mean())
    rows = torch.cat([drifted.double(), damping**0.5 * torch.eye(K, dtype=torch.float64)])
    wanted = torch.cat([inputs.double() @ weight.double().T + residual, damping**0.5 * weight.double().T])
    expected = torch.linalg.lstsq(rows, wanted).solution.T
    assert torch.allclose(found.double(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_without_drift_nothing_changes(inputs):
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(6))
    assert torch.equal(Drift().corrected(weight), weight)
    drift = Drift()
    drift.add(inputs, inputs)
    assert torch.equal(drift.corrected(weight), weight)


def test_the_inverse_of_a_scale_of_zero_is_zero():
    assert inverse(torch.tensor([0.0, 2.0, -0.5])).tolist() == [0.0, 0.5, -2.0]
