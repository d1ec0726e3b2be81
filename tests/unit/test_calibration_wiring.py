"""Does calibration use the right target, damping and order of columns for each matrix, also for rarely used experts?"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_calibration import CONFIGS, INT4, inputs_of_matrices, sample_ids
from torch import Tensor

from edgelm.checkpoint import Checkpoint
from edgelm.corpus import standard_library
from edgelm.quant import dequantize, parse_scheme, quantize
from edgelm.quant.calibration import CoverageOptions, calibrate_checkpoint
from edgelm.quant.calibration import layer as stream
from edgelm.quant.methods import Moments, calibrate
from edgelm.quant.methods.moments import Factor
from edgelm.synth import write_random_checkpoint


@dataclass(frozen=True)
class Case:
    """A family, changes of its config, the amount of text, and the tokens that an expert needs."""

    family: str
    changes: dict[str, Any] = field(default_factory=dict)
    samples: int = 24
    length: int = 24
    coverage: CoverageOptions = field(default_factory=lambda: CoverageOptions(min_tokens=0))


MANY = {"num_experts": 20}
CASES = {
    "olmoe": Case("olmoe"),
    "fox": Case("fox"),
    "16 tokens for 20 experts": Case("olmoe", MANY, 2, 8),
    "16 tokens for 20 experts that want two": Case("olmoe", MANY, 2, 8, CoverageOptions(min_tokens=2, reach=1)),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "some.txt"
    path.write_text("".join(standard_library()[0][10:200:40])[:40_000], encoding="utf-8")
    return path


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Tensor, int]]:
    """Record the weights [N, K] that each matrix is quantised from, and the number of tokens of its inputs."""
    found: dict[str, tuple[Tensor, int]] = {}

    def spy(weight: Any, scheme: Any, moments: Moments | None, *, method: str, name: str) -> Any:
        found[name] = torch.from_numpy(weight.copy()), 0 if moments is None else moments.tokens
        return calibrate(weight, scheme, moments, method=method, name=name)

    monkeypatch.setattr(stream, "calibrate", spy)
    return found


def nearest(weight: Tensor, inputs: Tensor, reference: Tensor, residual: Tensor | None, damping: float) -> Tensor:
    """Return W' that minimises |W' x - (W x~ + r)|^2 + a |W' - W|^2, by least squares on the inputs themselves.

    x are the quantised model's `inputs`, x~ those of the float model (`reference`), [n, K]. r [n, N] is the difference
    of their residual streams. a is `damping` times the mean square of an input over all tokens.
    """
    x, weight = inputs.double(), weight.double()
    wanted = reference.double() @ weight.T + (0 if residual is None else residual.double())
    root = (damping * float(x.square().sum(0).mean())) ** 0.5
    rows = torch.cat([x, root * torch.eye(x.shape[1], dtype=torch.float64)])
    return torch.linalg.lstsq(rows, torch.cat([wanted, root * weight.T])).solution.T


@pytest.mark.parametrize("case", CASES)
def test_each_matrix_has_the_float_models_output_as_target(
    tmp_path: Path, text: Path, calls: dict[str, tuple[Tensor, int]], case: str
) -> None:
    """Some matrices correct the drift of their inputs, some also that of the residual stream, some neither.

    Experts with too few tokens are rounded to nearest; the others are calibrated on their own tokens. Their outputs are
    right if the matrices after them get the right targets.
    """
    what = CASES[case]
    path = write_random_checkpoint(CONFIGS[what.family] | what.changes, tmp_path / "c", seed=3)
    made = calibrate_checkpoint(
        path,
        tmp_path / "q",
        INT4,
        text=text,
        samples=what.samples,
        length=what.length,
        coverage=what.coverage,
        threads=1,
    )
    ids = sample_ids(path, text, what.samples, what.length)
    behind: dict[str, Tensor] = {}
    ahead: dict[str, Tensor] = {}
    inputs, _ = inputs_of_matrices(path, tmp_path / "q", ids, behind)
    references, _ = inputs_of_matrices(path, path, ids, ahead)
    blind = {
        name
        for name, rows in inputs.items()
        if ".experts." in name and (not len(rows) or len(rows) < (what.coverage.min_tokens or 0))
    }
    assert bool(blind) == bool(what.changes)
    for index, layer in enumerate(made.report.layers):
        starved = {expert for expert, count in enumerate(layer.tokens) if count < (what.coverage.min_tokens or 0)}
        assert set(layer.fallbacks) == starved, index
    with Checkpoint.open(path) as original, Checkpoint.open(tmp_path / "q") as opened:
        for name, (target, tokens) in calls.items():
            weight = torch.from_numpy(original.read_float32(name))
            assert tokens == (0 if name in blind else len(inputs[name])), name
            x, wanted = inputs[name], references[name]
            if ".experts." in name:
                # An expert has too few tokens to measure a drift: gate and up use that of all tokens, down none.
                if name in blind or ".down_proj." in name:
                    assert torch.equal(target, weight), name
                    continue
                block = f"{name.partition('.experts.')[0]}.normed"
                x, wanted = behind[block], ahead[block]
            residual = ahead[name] - behind[name] if name in ahead else None
            assert_moved_alike(name, weight, target, nearest(weight, x, wanted, residual, 0.1))
        for name in (name for name in original.tensors if name.endswith(".mlp.gate.weight")):
            weight = torch.from_numpy(original.read_float32(name))
            block = name.replace(".gate.weight", ".normed")
            expected = nearest(weight, behind[block], ahead[block], None, 0.01)
            assert_moved_alike(name, weight, torch.from_numpy(opened.read_float32(name)), expected)


def assert_moved_alike(name: str, weight: Tensor, found: Tensor, expected: Tensor) -> None:
    """Check that found - weight equals expected - weight, up to the float32 rounding of the moments (6e-5 of it)."""
    moved = expected - weight
    assert float(moved.norm()) > 5e-4 * float(weight.norm()), name
    assert float((found - expected).norm()) < 1e-3 * float(moved.norm()), name


def test_damping_is_larger_for_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The damping is (0.01 + columns / tokens) times the mean diagonal of H."""
    used: list[float] = []
    factor = Moments.factor

    def spy(moments: Moments, group: int, damping: float) -> Factor:
        used.append(damping)
        return factor(moments, group, damping)

    monkeypatch.setattr(Moments, "factor", spy)
    weight = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    for tokens in (16, 6400):
        moments = Moments.zeros(64)
        moments.add(torch.randn(tokens, 64, generator=torch.Generator().manual_seed(1)))
        calibrate(weight, parse_scheme("int4-g32-sym"), moments, method="gptq")
    assert used == pytest.approx([0.01 + 64 / 16, 0.01 + 64 / 6400])


def test_columns_with_the_largest_inputs_are_rounded_first() -> None:
    """Groups are sorted by the sum of squares of their inputs, and columns in a group by their own, largest first."""
    squares = torch.rand(96, generator=torch.Generator().manual_seed(0))
    squares += torch.tensor([1.0, 9.0, 4.0]).repeat_interleave(32)
    factor = Factor(torch.diag(squares), 32, 0.01)
    assert factor.groups.tolist() == [1, 2, 0]
    for position, group in enumerate(factor.groups.tolist()):
        columns = factor.order[32 * position : 32 * position + 32]
        assert sorted(columns.tolist()) == list(range(32 * group, 32 * group + 32))
        inside = squares[columns]
        assert torch.equal(inside, inside.sort(descending=True).values)


def test_an_expert_with_one_token_keeps_usable_weights() -> None:
    """With one token, the weights must stay close to those rounded to nearest, or the error of other tokens grows.

    With the damping for many tokens, GPTQ's error of these weights is 1.4 to 1.7 times that of rounding to nearest;
    with the damping for one token it is 1.003 times.
    """
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(32, 64, generator=generator).numpy()
    scheme = parse_scheme("int4-g32-sym")
    moments = Moments.zeros(64)
    moments.add(torch.randn(1, 64, generator=generator))
    plain, found = quantize(weight, scheme), calibrate(weight, scheme, moments, method="gptq")
    errors = [float(np.square(dequantize(tensor) - weight).sum()) for tensor in (plain, found.tensor)]
    assert errors[1] < 1.05 * errors[0]
