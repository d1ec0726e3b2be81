"""Do the launches of a whole SparseMoE compute it, for few and many tokens, in every format of the experts?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import linear_calls as linear
import moe_calls as moe
import numpy as np
import pytest
from gpu_packing import from_bf16, pack, random_numbers, to_bf16
from kernel_device import kernel_device, order_threads
from moe_calls import MoeShape, SparseMoe, SparseMoeBuffers
from numpy.typing import NDArray

from edgelm.bundle.gpu_layout import GpuKind, GpuMatrix
from edgelm.quant import fp8
from edgelm.runtimes.cuda.device import Device

Array = NDArray[Any]
U = 2.0**-24  # unit roundoff of float32
STEP = 2 * U  # a tensor core truncates where float32 rounds
ROUNDOFF = {"bf16": 2.0**-8, "f16": 2.0**-11, "f32": U}


@dataclass(frozen=True)
class Result:
    """Results of the launches: y [M, D], router logits [M, E], and the names of the kernels."""

    y: Array
    logits: Array
    kernels: list[str]


class Layer:
    """A random layer on a device.

    Args:
        device: the device.
        rng: source of the random weights.
        call: the operator's call.
    """

    def __init__(self, device: Device, rng: np.random.Generator, call: SparseMoe) -> None:
        self.device, self.call, shape = device, call, call.shape
        self.counted = True
        self.x = (rng.standard_normal((shape.tokens, shape.columns)) * 3).astype(np.float32)
        self.norm = rng.uniform(0.5, 1.5, shape.columns).astype(np.float32)
        self.router = rng.standard_normal((shape.experts, shape.columns)).astype(np.float32) / 4
        self.gate_up = [random_numbers(rng, call.gate_up) for _ in range(shape.experts)]
        self.down = [random_numbers(rng, call.down) for _ in range(shape.experts)]
        self._weights = [
            self.put(array)
            for array in (self.norm, self.router, pack(call.gate_up, self.gate_up), pack(call.down, self.down))
        ]

    def put(self, array: Array) -> int:
        address = self.device.allocate(array.nbytes)
        self.device.upload(address, array)
        return address

    def run(self, *, seed: int = 0, in_place: bool = False) -> Result:
        call, shape = self.call, self.call.shape
        order_threads(self.device, seed)
        result = np.empty_like(self.x), np.empty((shape.tokens, shape.experts), np.float32)
        x = self.put(self.x)
        y = x if in_place else self.device.allocate(self.x.nbytes)
        logits = self.device.allocate(result[1].nbytes)
        workspace = self.device.allocate(moe.sparse_moe_workspace_bytes(call))
        norm, router, gate_up, down = self._weights
        counters = self.put(np.zeros(1, np.int32)) if self.counted else 0
        buffers = SparseMoeBuffers(x, norm, router, gate_up, down, y, workspace, logits, counters)
        launches = moe.sparse_moe_launches(call, buffers, self.device.info)
        assert {launch.kernel for launch in launches} <= set(moe.sparse_moe_kernels(call))
        for launch in launches:
            self.device.launch(launch)
        self.device.synchronize()
        for address, out in zip((y, logits), result, strict=True):
            self.device.download(address, out)
        return Result(*result, [launch.kernel for launch in launches])

    def expected(self, logits: Array) -> tuple[Array, Array]:
        """Return y in float64 for the choices of float32 logits, and the tolerance."""
        shape, call = self.call.shape, self.call
        normed = self.normed()
        order, weights = routing(logits, shape.k, shape.normalize)
        roundoff = ROUNDOFF[shape.activation]
        y, error = self.x.astype(np.float64), (shape.k + 2) * U * np.abs(self.x)
        for token, x in enumerate(normed):
            x_error = (roundoff + 20 * U) * np.abs(x)
            for expert, weight in zip(order[token], weights[token], strict=True):
                gate_up, down = self.gate_up[expert].dense, self.down[expert].dense
                gate, up = np.split(gate_up @ x, 2)
                terms = shape.columns + call.gate_up.groups + 20
                errors = np.abs(gate_up) @ x_error + terms * STEP * (np.abs(gate_up) @ np.abs(x))
                gate_error, up_error = np.split(errors, 2)
                silu = gate / (1 + np.exp(-gate))
                # The derivative of silu is at most 1.1.
                hidden = silu * up
                wrong = 1.1 * gate_error * (np.abs(up) + up_error) + np.abs(silu) * up_error
                wrong = wrong + (roundoff + 8 * U) * (np.abs(hidden) + wrong)
                terms = shape.hidden + call.down.groups + 20
                size = np.abs(down) @ (np.abs(hidden) + wrong)
                y[token] += weight * (down @ hidden)
                # The error of the weight itself: a softmax of E logits.
                error[token] += weight * (np.abs(down) @ wrong + (terms * STEP + (shape.experts + 60) * U) * size)
        return y, error

    def normed(self) -> NDArray[np.float64]:
        x = self.x.astype(np.float64)
        return np.asarray(x / np.sqrt((x * x).mean(-1, keepdims=True) + self.call.shape.epsilon) * self.norm)


def routing(logits: Array, k: int, normalize: bool) -> tuple[Array, Array]:
    wide = logits.astype(np.float64)
    powers = np.exp(wide - wide.max(-1, keepdims=True))
    probabilities = powers / powers.sum(-1, keepdims=True)
    order = np.argsort(-probabilities, axis=-1, kind="stable")[:, :k]
    weights = np.take_along_axis(probabilities, order, -1)
    return order, weights / weights.sum(-1, keepdims=True) if normalize else weights


def layer(device: Device, rng: np.random.Generator, shape: MoeShape, kinds: str, rounding: float = 0) -> Layer:
    """Return experts whose gate_up and down have two kinds, e.g. "int4/int8"; integers have groups of 32 and zero
    points."""

    def matrix(kind: GpuKind, rows: int, columns: int, swiglu: bool) -> GpuMatrix:
        integer = kind in (GpuKind.INT4, GpuKind.INT8)
        return GpuMatrix(kind, rows, columns, 32 if integer else columns, integer, swiglu, shape.experts)

    first, second = map(GpuKind, kinds.split("/"))
    gate_up = matrix(first, 2 * shape.hidden, shape.columns, True)
    return Layer(device, rng, SparseMoe(shape, gate_up, matrix(second, shape.columns, shape.hidden, False), rounding))


def check(found: Layer, result: Result) -> None:
    router, normed = found.router.astype(np.float64), found.normed()
    logits = normed @ router.T
    most = (2 * found.call.shape.columns + 20) * U * (np.abs(normed) @ np.abs(router).T)
    assert (np.abs(result.logits - logits) <= most).all()
    # The choices must be those of the exact logits wherever these differ by more than the tolerance.
    shape = found.call.shape
    order, _ = routing(logits, shape.k + 1 if shape.k < shape.experts else shape.k, False)
    sorted_logits = np.take_along_axis(logits, order, -1)
    clear = (sorted_logits[:, shape.k - 1] - sorted_logits[:, -1] > 2 * most.max(-1)) | (shape.k == shape.experts)
    assert clear.mean() > 0.9
    chosen, _ = routing(result.logits, shape.k, False)
    assert (np.sort(chosen, -1) == np.sort(order[:, : shape.k], -1))[clear].all()

    y, tolerance = found.expected(result.logits)
    error = np.abs(result.y - y)
    worst = np.unravel_index(np.argmax(np.nan_to_num(error, nan=np.inf) - tolerance), error.shape)
    assert error[worst] <= tolerance[worst], f"{worst}: {result.y[worst]}, expected {y[worst]} +- {tolerance[worst]}"
    # The test is meaningful only if the terms are larger than the tolerance.
    assert (tolerance < np.abs(y - found.x)).mean() > (0.2 if shape.activation == "bf16" else 0.8)


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    """A device with all kernels, compiled in the same parts as other tests compile them, to share their cache."""
    made = kernel_device(
        linear.all_kernels(),
        [name for name in moe.all_kernels() if not name.startswith("moe_down_")],
        [name for name in moe.all_kernels() if name.startswith(("moe_down_", "moe_choose_"))],
    )
    yield made
    made.close()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(31)


@pytest.mark.parametrize("tokens", [1, 7, 40])
@pytest.mark.parametrize("kinds", ["f32/f32", "int4/int8", "bf16/fp8", "int8/f16"])
def test_exact(device: Device, rng: np.random.Generator, kinds: str, tokens: int) -> None:
    found = layer(device, rng, MoeShape(tokens, 64, 64, 8, 3, True, activation="f32"), kinds)
    check(found, found.run())


@pytest.mark.parametrize("tokens", [1, 2, 9, 17, 32, 33, 70])
@pytest.mark.parametrize("kinds", ["int4/int4", "int8/bf16", "fp8/fp8", "bf16/int4"])
def test_on_tensor_cores(device: Device, rng: np.random.Generator, kinds: str, tokens: int) -> None:
    activation = "bf16" if "bf16" in kinds or tokens % 2 else "f16"
    found = layer(device, rng, MoeShape(tokens, 128, 64, 8, 2, activation=activation), kinds)
    result = found.run(seed=tokens % 3)
    check(found, result)
    assert len(result.kernels) <= (3 if tokens <= 32 else 6), result.kernels
    found.counted = False
    again = found.run()
    assert again.y.tobytes() == result.y.tobytes()
    assert again.logits.tobytes() == result.logits.tobytes()
    assert len(again.kernels) <= (4 if tokens <= 32 else 6), again.kernels


@pytest.mark.parametrize("tokens", [1, 12, 70])
def test_activations_in_fp8(device: Device, rng: np.random.Generator, tokens: int) -> None:
    found = layer(device, rng, MoeShape(tokens, 64, 64, 8, 2), "fp8/fp8", rounding=-1)
    result = found.run()
    terms = [np.zeros_like(found.x, np.float64) for _ in range(2)]
    order, weights = routing(result.logits, 2, False)
    for rounds, out in zip((True, False), terms, strict=True):
        for token, x in enumerate(found.normed()):
            for expert, weight in zip(order[token], weights[token], strict=True):
                gate, up = np.split(found.gate_up[expert].dense @ in_fp8(x, rounds), 2)
                out[token] += weight * (found.down[expert].dense @ in_fp8(gate / (1 + np.exp(-gate)) * up, rounds))
    # A value near a tie may be rounded the other way, an error much smaller than that of all the rounding.
    wrong, lost = (np.linalg.norm(result.y - found.x - part) / np.linalg.norm(part) for part in terms)
    assert wrong < 0.01
    assert lost > 3 * wrong


def in_fp8(row: Array, rounds: bool) -> Array:
    """Return a row as bfloat16, rounded to E4M3 with its own scale."""
    row = from_bf16(to_bf16(row)).astype(np.float64)
    scale = np.abs(row).max() / 448
    return np.asarray(fp8.decode(fp8.encode((row / scale).astype(np.float32))) * scale if rounds else row)


@pytest.mark.parametrize("tokens", [4, 50])
def test_results_do_not_depend_on_the_order_of_threads_or_on_in_place_output(
    device: Device, rng: np.random.Generator, tokens: int
) -> None:
    for activation in ("bf16", "f32"):
        found = layer(device, rng, MoeShape(tokens, 64, 64, 16, 4, activation=activation), "int4/int8")
        results = [found.run(seed=seed, in_place=seed == 1) for seed in (0, 1, 7)]
        assert len({result.y.tobytes() for result in results}) == 1
        assert len({result.logits.tobytes() for result in results}) == 1
