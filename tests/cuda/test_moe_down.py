"""Is the kernel that fuses the down matmul and the weighted sum right, for any choice of experts and every format?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import moe_calls as moe
import numpy as np
import pytest
from gpu_packing import from_bf16, pack, random_numbers, to_bf16
from kernel_device import kernel_device, order_threads, release
from moe_calls import MoeShape, MoeWorkspace
from numpy.typing import NDArray

from edgelm.bundle.gpu_layout import GpuKind, GpuMatrix
from edgelm.errors import DeviceError
from edgelm.runtimes.cuda.device import Device

Array = NDArray[Any]
U = 2.0**-24  # unit roundoff of float32
STEP = 2 * U  # a tensor core truncates where float32 rounds


@pytest.fixture(scope="module")
def gpu() -> Iterator[Device]:
    device = kernel_device([name for name in moe.all_kernels() if name.startswith(("moe_down_", "moe_choose_"))])
    yield device
    release(device)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(23)


def put(gpu: Device, array: Array) -> int:
    address = gpu.allocate(array.nbytes)
    gpu.upload(address, array)
    return address


@dataclass(frozen=True)
class Case:
    """A layer's sizes and format, its logits [M, E], and the order of warps."""

    shape: MoeShape
    kind: GpuKind
    logits: Array
    group: int = 0
    zeros: bool = False
    seed: int = 0


def check(gpu: Device, rng: np.random.Generator, case: Case) -> None:
    """Run the launches for random weights and hidden values, and compare with float64."""
    shape = case.shape
    order_threads(gpu, case.seed)
    matrix = GpuMatrix(
        case.kind, shape.columns, shape.hidden, case.group or shape.hidden, case.zeros, count=shape.experts
    )
    experts = [random_numbers(rng, matrix) for _ in range(shape.experts)]
    hidden = rng.standard_normal((shape.slots, shape.hidden)).astype(np.float16 if shape.activation == "f16" else "f4")
    stored = hidden if shape.activation == "f16" else to_bf16(hidden)
    x = rng.standard_normal((shape.tokens, shape.columns)).astype(np.float32)
    places = moe.workspace(shape, gpu.allocate(moe.workspace_bytes(shape)))
    y = put(gpu, x)
    blob = put(gpu, pack(matrix, experts))
    for launch in (
        *moe.choose_launches(shape, put(gpu, case.logits.astype(np.float32)), places),
        moe.down_launch(shape, matrix, blob, y, put(gpu, stored), places, y),
    ):
        gpu.launch(launch)
    gpu.synchronize()
    out = np.empty_like(x)
    gpu.download(y, out)

    values = (hidden if shape.activation == "f16" else from_bf16(stored)).astype(np.float64)
    expected, tolerance = weighted_sum(gpu, shape, places, x, values, [expert.dense for expert in experts])
    error = np.abs(out - expected)
    worst = np.unravel_index(np.argmax(np.nan_to_num(error, nan=np.inf) - tolerance), error.shape)
    assert error[worst] <= tolerance[worst], f"{worst}: {out[worst]}, expected {expected[worst]} in {case}"


def weighted_sum(
    gpu: Device, shape: MoeShape, places: MoeWorkspace, x: Array, hidden: Array, dense: list[Array]
) -> tuple[Array, Array]:
    """Return the sum in float64, and the tolerance for float32."""
    offsets, slot_of = np.empty(shape.experts + 1, np.int32), np.empty((shape.tokens, shape.k), np.int32)
    weights = np.empty(shape.slots, np.float32)
    for address, array in ((places.offsets, offsets), (places.slot_of, slot_of), (places.slot_weights, weights)):
        gpu.download(address, array)
    expected, most = x.astype(np.float64), np.abs(x).astype(np.float64)
    for token, slots in enumerate(slot_of):
        for slot in slots:
            expert = dense[int(np.searchsorted(offsets, slot, "right")) - 1]
            expected[token] += weights[slot] * (expert @ hidden[slot])
            most[token] += weights[slot] * (np.abs(expert) @ np.abs(hidden[slot]))
    # Terms: columns, scales of groups, parts of warps, sum over experts.
    return expected, (shape.hidden + shape.hidden / 16 + shape.k + 20) * STEP * most


@pytest.mark.parametrize("tokens", [*range(1, 18), 24, 25, 32])
def test_few_tokens(gpu: Device, rng: np.random.Generator, tokens: int) -> None:
    kind = list(GpuKind)[tokens % 3]
    for experts, k in ((8, 2), (32, 8)):
        shape = MoeShape(tokens, 32, 128, experts, k, activation=("bf16", "f16")[tokens % 2])
        logits = rng.standard_normal((tokens, experts))
        check(gpu, rng, Case(shape, kind, logits, group=64, seed=(0, 1, 7)[tokens % 3]))


@pytest.mark.parametrize("activation", ["bf16", "f16"])
@pytest.mark.parametrize(
    ("kind", "group", "zeros"),
    [
        ("int4", 0, False), ("int4", 16, True), ("int4", 64, True), ("int4", 32, False), ("int4", 320, False),
        ("int4", 128, True), ("int8", 0, True), ("int8", 16, False), ("int8", 64, True), ("int8", 32, False),
        ("int8", 128, True), ("fp8", 0, False), ("fp8", 320, False),
        ("16", 0, False),
    ],
)  # fmt: skip
def test_every_format(
    gpu: Device, rng: np.random.Generator, activation: str, kind: str, group: int, zeros: bool
) -> None:
    weights = GpuKind(activation if kind == "16" else kind)
    for tokens, experts, k in ((1, 4, 1), (3, 4, 4), (20, 6, 3)):
        shape = MoeShape(tokens, 40, 640, experts, k, activation=activation)  # 40: half of the last 16 rows
        check(gpu, rng, Case(shape, weights, rng.standard_normal((tokens, experts)), group, zeros))


@pytest.mark.parametrize("seed", [0, 1, 7])
@pytest.mark.parametrize("tokens", [1, 8, 9, 32])
def test_any_choice_of_experts(gpu: Device, rng: np.random.Generator, tokens: int, seed: int) -> None:
    one = np.zeros((tokens, 64))
    one[:, 37] = 9
    for k in (1, 8):
        shape = MoeShape(tokens, 16, 32, 64, k)
        for logits in (one, rng.standard_normal((tokens, 64)) * 3):
            check(gpu, rng, Case(shape, GpuKind.BFLOAT16, logits, seed=seed))


@pytest.mark.parametrize(("kind", "group"), [("int4", 32), ("int4", 128), ("int8", 64), ("fp8", 0), ("bf16", 0)])
@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 8, 11, 32])
def test_an_expert_of_several_rounds_has_any_number_of_slots(
    gpu: Device, rng: np.random.Generator, tokens: int, kind: str, group: int
) -> None:
    shape = MoeShape(tokens, 16, 1664, 3, 2)  # four warps share an expert, and none has whole rounds
    logits = rng.standard_normal((tokens, 3))
    logits[:, 0] += 9  # all tokens choose expert 0
    check(gpu, rng, Case(shape, GpuKind(kind), logits, group, zeros=kind[:3] == "int", seed=(0, 1, 7)[tokens % 3]))


@pytest.mark.parametrize(
    ("kind", "hidden", "group", "experts", "kernel"),
    [
        ("int4", 1024, 32, 64, "int4_g32"), ("int4", 1024, 64, 64, "int4_g64"), ("int4", 1024, 128, 64, "int4_g128"),
        ("int8", 1024, 128, 64, "int8_g128"), ("int4", 1024, 256, 64, "int4"), ("int8", 1024, 1024, 64, "int8"),
        ("fp8", 1024, 128, 64, "fp8"), ("bf16", 1024, 1024, 64, "bf16"),
        # Two warps share an expert's 10 tiles, and the second begins in the middle of a group.
        ("int4", 640, 128, 64, "int4"), ("int4", 640, 64, 64, "int4_g64"),
    ],
)  # fmt: skip
def test_common_groups_are_constants_of_the_kernel(
    kind: str, hidden: int, group: int, experts: int, kernel: str
) -> None:
    shape = MoeShape(1, 64, hidden, experts, 8)
    matrix = GpuMatrix(GpuKind(kind), 64, hidden, group, count=experts)
    launch = moe.down_launch(shape, matrix, 0, 0, 0, moe.workspace(shape, 0), 0)
    assert launch.kernel == f"moe_down_bf16_{kernel}_f32_n8"
    assert launch.kernel in moe.sparse_moe_kernels(
        moe.SparseMoe(shape, GpuMatrix(GpuKind(kind), 2 * hidden, 64, 64, swiglu=True, count=experts), matrix)
    )
    assert launch.shared <= 99 << 10


def test_a_token_of_nans_does_not_affect_its_neighbours(gpu: Device, rng: np.random.Generator) -> None:
    shape = MoeShape(3, 16, 64, 4, 2)
    matrix = GpuMatrix(GpuKind.INT4, 16, 64, 64, count=4)
    blob = put(gpu, pack(matrix, [random_numbers(rng, matrix) for _ in range(4)]))
    logits = rng.standard_normal((3, 4)).astype(np.float32)
    hidden = to_bf16(rng.standard_normal((6, 64)).astype(np.float32))
    places = moe.workspace(shape, gpu.allocate(moe.workspace_bytes(shape)))
    x, y = put(gpu, np.zeros((3, 16), np.float32)), gpu.allocate(3 * 16 * 4)
    results = []
    slots = np.empty((3, 2), np.int32)
    for damaged in (False, True):
        for launch in moe.choose_launches(shape, put(gpu, logits), places):
            gpu.launch(launch)
        gpu.download(places.slot_of, slots)
        if damaged:
            hidden[slots[1, 0], 5] = 0x7FC0
        gpu.launch(moe.down_launch(shape, matrix, blob, x, put(gpu, hidden), places, y))
        results.append(np.empty((3, 16), np.float32))
        gpu.download(y, results[-1])
    assert np.isnan(results[1][1]).all()
    assert (results[0][[0, 2]] == results[1][[0, 2]]).all()
    assert np.isfinite(results[0]).all()


def test_unsupported_shapes_and_types_are_refused() -> None:
    places = moe.workspace(MoeShape(33, 64, 64, 8, 2), 0)

    def launch(matrix: GpuMatrix, tokens: int = 4, activation: str = "bf16") -> None:
        moe.down_launch(MoeShape(tokens, 64, 64, 8, 2, activation=activation), matrix, 0, 0, 0, places, 0)

    good = GpuMatrix(GpuKind.INT4, 64, 64, 64, count=8)
    launch(good)
    for bad, tokens, activation, message in (
        (GpuMatrix(GpuKind.INT4, 64, 64, 64, count=7), 4, "bf16", r"expected 8 matrices \[64, 64\]"),
        (GpuMatrix(GpuKind.INT4, 64, 64, 64, swiglu=True, count=8), 4, "bf16", "expected 8 matrices"),
        (GpuMatrix(GpuKind.INT8, 64, 64, 8, count=8), 4, "bf16", "not a multiple of 16"),
        (good, 33, "bf16", "33 tokens of bf16 with int4"),
        (good, 4, "f32", "4 tokens of f32"),
        (GpuMatrix(GpuKind.FLOAT16, 64, 64, 64, count=8), 4, "bf16", "bf16 with f16 weights"),
    ):
        with pytest.raises(DeviceError, match=message):
            launch(bad, tokens, activation)
