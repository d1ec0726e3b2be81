"""Do the GPU matmul kernels compute the right results, for every kernel, weight format and shape?"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import linear_calls as linear
import numpy as np
import pytest
from gpu_packing import Numbers, from_bf16, pack, random_numbers, to_bf16
from kernel_device import kernel_device, order_threads, release
from linear_calls import Matmul
from numpy.typing import NDArray

from edgelm.bundle.gpu_layout import GpuKind, GpuMatrix
from edgelm.errors import BundleError, DeviceError
from edgelm.quant import fp8
from edgelm.runtimes.cuda.device import Device, DeviceInfo

Array = NDArray[Any]
U = 2.0**-24  # unit roundoff of float32
# A tensor core truncates where float32 rounds, and has its own order of summation.
STEP = 2 * U
ROUNDOFF = {"bf16": 2.0**-8, "f16": 2.0**-11, "f32": U}
KINDS = {"bf16": ("int4", "int8", "fp8", "bf16"), "f16": ("int4", "int8", "fp8", "f16"), "f32": tuple(GpuKind)}


@pytest.fixture(scope="module", params=[(8, 0), (9, 0)], ids=["sm80", "sm90"])
def gpu(request: pytest.FixtureRequest) -> Iterator[Device]:
    # Newer devices differ only in FP8 instructions.
    names = linear.all_kernels()
    found = names if request.param == (8, 0) else [name for name in names if re.search("fp8|convert", name)]
    device = kernel_device(found, capability=request.param, lazy=True)
    yield device
    release(device)


@pytest.fixture(scope="module")
def sm80() -> Iterator[Device]:
    device = kernel_device(linear.all_kernels(), lazy=True)
    yield device
    release(device)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def stored(values: Array, kind: str) -> Array:
    """Convert numbers to the bits that a device stores."""
    if kind == "bf16":
        return to_bf16(values)
    return values.astype(np.float16 if kind == "f16" else np.float32)


def value(array: Array, kind: str) -> NDArray[np.float64]:
    return (from_bf16(array) if kind == "bf16" else array).astype(np.float64)


def rounded(values: Array, kind: str) -> NDArray[np.float64]:
    return value(stored(values, kind), kind)


def put(device: Device, array: Array) -> int:
    address = device.allocate(max(array.nbytes, 1))
    device.upload(address, array)
    return address


def get(device: Device, address: int, shape: tuple[int, ...], kind: str) -> NDArray[np.float64]:
    out = np.empty(shape, np.uint16 if kind == "bf16" else np.float16 if kind == "f16" else np.float32)
    device.download(address, out)
    return value(out, kind)


def assert_close(y: Array, expected: Array, tolerance: Array) -> None:
    error = np.abs(y - expected)
    if error.size == 0:
        return
    worst = np.unravel_index(np.argmax(np.nan_to_num(error, nan=np.inf) - tolerance), error.shape)
    assert (error <= tolerance).all(), f"{worst}: {y[worst]} for {expected[worst]}, tolerance {tolerance[worst]}"


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


@dataclass
class Case:
    """A matmul and its expected result."""

    matrix: GpuMatrix
    rows: int
    activation: str = "bf16"
    x_float: bool = False
    y_float: bool = True
    norm: bool = False
    residual: bool = False
    bias: bool = False
    rounding: float = 0.0
    owners: Array | None = None  # the expert of each slot, sorted
    row_map: Array | None = None
    x_rows: int = 0

    def run(self, device: Device, rng: np.random.Generator, force: str = "", info: DeviceInfo | None = None) -> None:
        """Compute it on the device and compare. The name of the chosen kernel must contain `force`."""
        matrix, k = self.matrix, self.matrix.columns
        numbers = [random_numbers(rng, matrix) for _ in range(matrix.count)]
        x_rows = self.x_rows or self.rows
        x_kind = "f32" if self.x_float else self.activation
        x = stored(rng.standard_normal((x_rows, k)).astype(np.float32), x_kind)
        norm = rng.uniform(0.5, 1.5, k).astype(np.float32)
        residual = rng.standard_normal((self.rows, matrix.outputs)).astype(np.float32)
        bias = rng.standard_normal(matrix.outputs).astype(np.float32)
        y_kind = "f32" if self.y_float else self.activation
        y = device.allocate(max(1, self.rows * matrix.outputs * (4 if y_kind == "f32" else 2)))
        matmul = Matmul(
            matrix, put(device, pack(matrix, numbers)), put(device, x), y, self.rows, self.activation,
            x_float=self.x_float, y_float=self.y_float, rounding=self.rounding, x_rows=x_rows,
            norm=put(device, norm) if self.norm else 0, residual=put(device, residual) if self.residual else 0,
            bias=put(device, bias) if self.bias else 0,
            row_map=0 if self.row_map is None else put(device, self.row_map.astype(np.int32)),
            offsets=0 if self.owners is None else put(device, self.offsets()),
        )  # fmt: skip
        size = linear.workspace_bytes(matmul)
        launches = linear.matmul_launches(matmul, info or device.info, device.allocate(size) if size else 0)
        assert force in launches[-1].kernel if launches else not force
        for launch in launches:
            assert launch.kernel in linear.kernels_of(matrix, self.activation, self.rounding)
            device.launch(launch)
        device.synchronize()
        expected, tolerance = self.answer(numbers, value(x, x_kind), norm, bias, residual)
        assert_close(get(device, y, expected.shape, y_kind), expected, tolerance)

    def offsets(self) -> NDArray[np.int32]:
        assert self.owners is not None
        return np.searchsorted(self.owners, np.arange(self.matrix.count + 1)).astype(np.int32)

    def answer(
        self, numbers: list[Numbers], x: Array, norm: Array, bias: Array, residual: Array
    ) -> tuple[Array, Array]:
        """Return y in float64, and the kernels' tolerance."""
        k = self.matrix.columns
        uncertain = 0.0  # relative error of the operands
        if self.norm:
            x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * norm
            uncertain = k * U
        if self.rounding:
            scale = np.float32(self.rounding)
            if self.rounding < 0:
                scale = (np.abs(x).max(-1, keepdims=True) / 448).astype(np.float32)
            x = np.asarray(fp8.decode(fp8.encode(x.astype(np.float32) / scale)), np.float64) * scale
            uncertain *= 2.0**-4 / U if self.norm else 1
        elif self.activation != "f32":
            # A number near a tie may have been rounded the other way.
            x, uncertain = rounded(x, self.activation), uncertain and ROUNDOFF[self.activation]
        rows = np.arange(self.rows) if self.row_map is None else self.row_map
        owners = np.zeros(self.rows, np.int64) if self.owners is None else self.owners
        dense = np.stack([one.dense for one in numbers])
        x = x[rows]
        plain = np.einsum("mk,mnk->mn", x, dense[owners])
        magnitude = np.einsum("mk,mnk->mn", np.abs(x), np.abs(dense)[owners])
        # Codes and zero points are multiplied before scales are applied, so their magnitudes matter.
        error = magnitude * (k * STEP + uncertain + 4 * U)
        if self.matrix.swiglu:
            gate, up = np.split(plain, 2, -1)
            gate_error, up_error = np.split(error, 2, -1)
            plain = silu(gate) * up
            error = np.abs(up) * 1.1 * gate_error + np.abs(silu(gate)) * up_error + 1.1 * gate_error * up_error
            error += 8 * U * np.abs(plain)
        if self.bias:
            plain = plain + bias
            error = error + 2 * U * np.abs(plain)
        if self.residual:
            plain = plain + residual
        error = error + 2 * U * np.abs(plain)
        if not self.y_float:
            error = error + ROUNDOFF[self.activation] * np.abs(plain)
        return plain, error


def matrix_of(kind: str, rows: int = 40, columns: int = 192, group: int = 0, **rest: Any) -> GpuMatrix:
    return GpuMatrix(GpuKind(kind), rows, columns, group or columns, **rest)


@pytest.mark.parametrize("rows", [*range(1, 18), 32, 33, 65])
def test_any_number_of_rows(sm80: Device, rng: np.random.Generator, rows: int) -> None:
    Case(matrix_of("int4", group=64), rows).run(sm80, rng, "skinny" if rows <= 32 else "gemm")
    Case(matrix_of("bf16", columns=112), rows).run(sm80, rng)


@pytest.mark.parametrize("activation", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("kind", GpuKind)
def test_every_kind_of_weights(sm80: Device, rng: np.random.Generator, kind: str, activation: str) -> None:
    if kind not in KINDS[activation]:
        with pytest.raises(DeviceError, match=r"need .* activations, found"):
            linear.matmul_launches(Matmul(matrix_of(kind), 1, 1, 1, 1, activation), sm80.info)
        return
    for rows in (3, 20, 70):
        for group in (0, 64) if matrix_of(kind).kind.scale_bytes else (0,):
            Case(matrix_of(kind, group=group), rows, activation, y_float=activation == "f32").run(sm80, rng)


TILES = pytest.mark.parametrize(("rows", "tokens", "tile"), [(250, 120, "256"), (120, 121, "128"), (60, 60, "64")])


@TILES
def test_every_tile_of_the_tensor_cores(
    sm80: Device, rng: np.random.Generator, rows: int, tokens: int, tile: str
) -> None:
    info = replace(sm80.info, multiprocessors=1)
    Case(matrix_of("bf16", rows, 80), tokens, residual=True).run(sm80, rng, f"plain_{tile}", info)
    Case(matrix_of("bf16", rows, 64 * 9), tokens).run(sm80, rng, f"plain_{tile}", info)
    Case(matrix_of("bf16", rows, 96, swiglu=True), tokens).run(sm80, rng, f"plain_{tile}", info)
    smaller = "128" if tile == "256" else tile  # quantised weights have no larger tile
    Case(matrix_of("fp8", rows, 128), tokens, y_float=False).run(sm80, rng, f"row_{smaller}", info)
    Case(matrix_of("int4", rows, 128), tokens, y_float=False).run(sm80, rng, f"row_{smaller}", info)
    Case(matrix_of("int8", rows, 96, swiglu=True), tokens).run(sm80, rng, f"row_{smaller}", info)
    owners = np.sort(rng.integers(0, 3, tokens))
    Case(matrix_of("bf16", rows, 80, count=3), tokens, owners=owners).run(sm80, rng, "gemm_bf16_bf16_plain_", info)


@TILES
def test_every_tile_of_tensor_cores_for_fp8(
    gpu: Device, rng: np.random.Generator, rows: int, tokens: int, tile: str
) -> None:
    info = replace(gpu.info, capability=(8, 0), multiprocessors=1)
    case = Case(matrix_of("fp8", rows, 160), tokens, rounding=-1)
    case.run(gpu, rng, f"fp8_fp8_row_bf16_{'128' if tile == '256' else tile}", info)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("group", [16, 32, 48, 64, 96, 192])
@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
def test_every_group(sm80: Device, rng: np.random.Generator, kind: str, group: int, zeros: bool) -> None:
    if zeros and kind == "fp8":
        return
    for rows in (2, 40):
        for activation in ("bf16", "f16"):
            Case(matrix_of(kind, group=group, zeros=zeros), rows, activation).run(sm80, rng)
    Case(matrix_of(kind, group=group, zeros=zeros), 5, "f32").run(sm80, rng)


@pytest.mark.parametrize("seed", [0, 1, 7])
@pytest.mark.parametrize("rows", [5, 70])
def test_the_order_of_warps_does_not_change_results(
    sm80: Device, rng: np.random.Generator, rows: int, seed: int
) -> None:
    order_threads(sm80, seed)
    try:
        for kind in KINDS["bf16"]:
            Case(matrix_of(kind, 72, 704), rows, norm=True, x_float=True, residual=True).run(sm80, rng)
        Case(matrix_of("int4", 72, 704), rows, "f32", norm=True, residual=True).run(sm80, rng)
    finally:
        order_threads(sm80, 0)


@pytest.mark.parametrize("activation", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("rows", [1, 19, 40, 66])
def test_norm_residual_and_swiglu_around_the_matmul(
    sm80: Device, rng: np.random.Generator, rows: int, activation: str
) -> None:
    exact = activation == "f32"
    for y_float in (True,) if exact else (True, False):
        matrix = matrix_of("int8", 48, 128, 32, swiglu=True)
        Case(matrix, rows, activation, True, y_float, norm=True).run(sm80, rng)
        Case(replace(matrix, rows=88), rows, activation, exact, y_float).run(sm80, rng)
        Case(matrix_of("int4", 50, 128), rows, activation, True, y_float, norm=True, residual=True).run(sm80, rng)
        Case(matrix_of("int4", 51, 128), rows, activation, exact, y_float, residual=True).run(sm80, rng)


@pytest.mark.parametrize("activation", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("rows", [1, 9, 19, 40, 130])
def test_a_bias_is_added_to_float32_sums(sm80: Device, rng: np.random.Generator, rows: int, activation: str) -> None:
    exact = activation == "f32"
    for y_float in (True,) if exact else (True, False):
        for outputs in (50, 51, 72):
            Case(matrix_of("int4", outputs, 128), rows, activation, exact, y_float, bias=True).run(sm80, rng)
        case = Case(matrix_of("int8", 52, 128, 32), rows, activation, True, y_float, norm=True, bias=True)
        case.run(sm80, rng)
        replace(case, residual=True).run(sm80, rng)


@pytest.mark.parametrize("rounding", [-1.0, 0.01])
@pytest.mark.parametrize("activation", ["bf16", "f16", "f32"])
def test_activations_in_fp8(gpu: Device, rng: np.random.Generator, activation: str, rounding: float) -> None:
    for rows in (1, 9, 37, 70):
        for group in (128, 256):
            for x_float in (False, True):
                case = Case(matrix_of("fp8", 40, 256, group), rows, activation, x_float, rounding=rounding)
                case.run(gpu, rng)
    Case(matrix_of("fp8", 40, 128), 3, activation, True, norm=True, rounding=rounding).run(gpu, rng)
    Case(matrix_of("fp8", 40, 128), 35, activation, True, norm=True, rounding=rounding).run(gpu, rng)


GROUPINGS = {
    "few": [0, 0, 2, 5, 5, 5],
    "one": [3] * 40,
    "last": [5],
    "all": [*range(6)] * 3,
    "many": [*[0] * 70, *[2] * 5, *[4] * 140, 5],
    "none": [],
}


@pytest.mark.parametrize("activation", ["bf16", "f32"])
@pytest.mark.parametrize("which", GROUPINGS)
@pytest.mark.parametrize("kind", ["int4", "bf16", "fp8"])
def test_rows_of_several_experts(
    sm80: Device, rng: np.random.Generator, kind: str, which: str, activation: str
) -> None:
    if (kind, activation) == ("bf16", "f32"):
        kind = "f32"
    owners = np.sort(np.array(GROUPINGS[which], np.int64))
    x_rows = max(1, len(owners) // 2)
    row_map = rng.integers(0, x_rows, len(owners))
    group = 64 if kind == "int4" else 0
    for swiglu in (True, False):
        matrix = matrix_of(kind, 48, 128, group, swiglu=swiglu, count=6)
        exact = activation == "f32"
        case = Case(matrix, len(owners), activation, exact, exact, owners=owners)
        case.run(sm80, rng)
        replace(case, row_map=row_map, x_rows=x_rows).run(sm80, rng)


def test_columns_that_do_not_fit_into_shared_memory(rng: np.random.Generator) -> None:
    device = kernel_device(linear.all_kernels(), capability=(8, 6), lazy=True)
    for kind in ("bf16", "int4"):
        Case(matrix_of(kind, 40, 2560 + 64), 20, x_float=True, norm=True).run(device, rng, "skinny")
    Case(matrix_of("bf16", 40, 2560 + 16), 20).run(device, rng, "skinny")
    Case(matrix_of("bf16", 20, 6720 + 16), 8, x_float=True, norm=True).run(device, rng, "skinny")
    release(device)


SKINNY_KERNELS = {
    ("int4", 16): "any", ("int4", 32): "g32", ("int4", 64): "g64", ("int4", 128): "g128", ("int4", 0): "any",
    ("int8", 32): "g32", ("int8", 48): "any", ("int8", 128): "g128", ("fp8", 32): "any", ("fp8", 128): "g128",
}  # fmt: skip


def test_common_groups_have_kernels_of_their_own() -> None:
    info = DeviceInfo("test", (9, 0), 132, 1 << 30, (13, 0))
    for (kind, group), expected in SKINNY_KERNELS.items():
        for rows, experts, end in ((1, 1, "n8"), (8, 4, "experts_n8"), (20, 1, "n32"), (20, 2, "n32")):
            matrix = matrix_of(kind, 48, 384, group, count=experts)
            matmul = Matmul(matrix, 1, 1, 1, rows, offsets=experts > 1)
            (launch,) = linear.matmul_launches(matmul, info)
            assert launch.kernel == f"linear_skinny_bf16_{kind}_{expected}_{end}"
            assert launch.kernel in linear.kernels_of(matrix, "bf16")
            assert len([name for name in linear.kernels_of(matrix, "bf16") if "skinny" in name]) == 3


@pytest.mark.parametrize(("kind", "group"), [("int4", 128), ("int4", 32), ("int8", 64), ("fp8", 128), ("bf16", 0)])
def test_every_length_of_the_ring_and_any_part_of_the_columns(rng: np.random.Generator, kind: str, group: int) -> None:
    device = kernel_device(linear.all_kernels(), capability=(8, 6), lazy=True)
    lengths = set()
    # Three tiles of int4 for each of 16 warps: those of a slot are of two groups. Then fewer tiles than warps.
    for columns, rows in ((3072, 1), (3072, 2), (3072, 8), (5632, 4), (384, 3), (3200, 1)):
        case = Case(matrix_of(kind, 24, columns, group), rows)
        case.run(device, rng, "skinny")
        matmul = Matmul(case.matrix, 1, 1, 1, rows)
        lengths.add(linear.skinny_plan(linear.matmul_launches(matmul, device.info)[0])["ahead"])
    assert lengths >= ({4, 2} if kind == "bf16" else {4, 2, 1})
    release(device)


@pytest.mark.parametrize("experts", [1, 16])
def test_blocks_of_threads_have_the_same_number_of_items_or_one_more(experts: int) -> None:
    info = DeviceInfo("test", (9, 0), 132, 1 << 30, (13, 0))
    for rows in (2048, 3072, 11264, 256_000):
        matrix = matrix_of("int4", rows, 2048, 32, count=experts)
        (launch,) = linear.matmul_launches(Matmul(matrix, 1, 1, 1, experts, offsets=experts > 1), info)
        plan = linear.skinny_plan(launch)
        items, grid = experts * plan["strips"], launch.grid[0]
        assert plan["strips"] * plan["at_a_time"] >= matrix.blocks > (plan["strips"] - 1) * plan["at_a_time"]
        assert plan["items_each"] * grid + plan["items_left"] == items and plan["items_left"] < grid
        # What the device computes with experts: exact for every number of items.
        for n in {*range(0, items, 97), items}:
            assert n * plan["grid_factor"] >> 31 == n // grid
            assert n * plan["strips_factor"] >> 31 == n // plan["strips"]


def test_norms_and_conversions(gpu: Device, rng: np.random.Generator) -> None:
    x = rng.standard_normal((5, 96)).astype(np.float32)
    norm = rng.uniform(0.5, 1.5, 96).astype(np.float32)
    x64 = x.astype(np.float64)
    expected = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-5) * norm
    for target in ("bf16", "f16"):
        y = gpu.allocate(2 * x.size)
        launch = linear.convert_launch(put(gpu, x), y, 5, 96, source=target, target=target, norm=put(gpu, norm))
        gpu.launch(launch)
        smallest = 2.0**-25 if target == "f16" else 0  # half of its smallest step
        tolerance = (ROUNDOFF[target] + 64 * U) * np.abs(expected) + smallest
        assert_close(get(gpu, y, x.shape, target), expected, tolerance)


@pytest.mark.parametrize("source", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("columns", [2, 96, 514, 2048])
def test_a_residual_is_added_to_a_norm(sm80: Device, rng: np.random.Generator, columns: int, source: str) -> None:
    x = stored(rng.standard_normal((5, columns)).astype(np.float32), source)
    weight, residual = (rng.standard_normal(size).astype(np.float32) for size in (columns, (5, columns)))
    exact = value(x, source)
    normed = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 0.25) * weight
    x_at, weight_at, residual_at = (put(sm80, array) for array in (x, weight, residual))

    def launched(y: int, added: int) -> Array:
        launch = linear.rms_norm_launch(
            x_at, weight_at, y, 5, columns, source=source, residual=added, epsilon=0.25
        )  # fmt: skip
        sm80.launch(launch)
        return get(sm80, y, x.shape, "f32")

    y = sm80.allocate(4 * x.size)
    assert_close(launched(y, 0), normed, 64 * U * np.abs(normed))
    found = launched(y, residual_at)
    assert_close(found, normed + residual, 64 * U * np.abs(normed) + U * np.abs(normed + residual))
    np.testing.assert_array_equal(launched(residual_at, residual_at), found)  # in place, over the residual


def test_codes_of_activations_are_the_nearest_in_their_order(gpu: Device, rng: np.random.Generator) -> None:
    x = rng.standard_normal((3, 64)).astype(np.float32)
    x[2] = 0
    y, scales = gpu.allocate(x.size), gpu.allocate(12)
    gpu.launch(linear.convert_launch(put(gpu, x), y, 3, 64, source="bf16", target="fp8", rounding=-1, scales=scales))
    codes, found = np.empty((3, 64), np.uint8), np.empty((3, 1), np.float32)
    gpu.download(y, codes)
    gpu.download(scales, found)
    expected = np.abs(x).max(-1, keepdims=True) / np.float32(448)
    expected[2] = 1
    np.testing.assert_array_equal(found, expected)
    order = [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
    permuted = np.asarray(fp8.encode(x / expected)).reshape(3, 4, 16)[:, :, order].reshape(3, 64)
    np.testing.assert_array_equal(codes, permuted)


@pytest.mark.parametrize("kind", GpuKind)
def test_rows_of_an_embedding(sm80: Device, rng: np.random.Generator, kind: str) -> None:
    scaled = matrix_of(kind).kind.scale_bytes
    matrix = matrix_of(kind, 40, 192, 64 if scaled else 0, zeros=scaled == 2)
    numbers = random_numbers(rng, matrix)
    ids = np.array([0, 39, 7, 8, 23, 24, 7], np.int32)
    y = sm80.allocate(4 * 7 * 192)
    sm80.launch(linear.embedding_launch(put(sm80, ids), matrix, put(sm80, pack(matrix, [numbers])), y, 7))
    assert_close(get(sm80, y, (7, 192), "f32"), numbers.dense[ids], U * np.abs(numbers.dense[ids]))


def test_rows_of_last_tokens(sm80: Device, rng: np.random.Generator) -> None:
    x = rng.standard_normal((3, 4, 70)).astype(np.float32)
    y = sm80.allocate(4 * 3 * 70)
    sm80.launch(linear.last_token_launch(put(sm80, x), y, 3, 4, 70))
    np.testing.assert_array_equal(get(sm80, y, (3, 70), "f32"), x[:, -1])


@pytest.mark.parametrize("columns", [1, 5, 4096, 9001])
def test_the_largest_and_the_first_of_equals(sm80: Device, rng: np.random.Generator, columns: int) -> None:
    x = rng.integers(-20, 20, (4, columns)).astype(np.float32)
    x[1] = -np.inf
    x[2, : columns // 2] = np.nan
    x[3] = np.nan
    expected = [-1 if np.isnan(row).all() else int(np.nanargmax(row)) for row in x]
    ids, workspace = sm80.allocate(16), sm80.allocate(linear.argmax_workspace_bytes(4, columns))
    for launch in linear.argmax_launches(put(sm80, x), ids, 4, columns, workspace):
        sm80.launch(launch)
    sm80.synchronize()
    found = np.empty(4, np.int32)
    sm80.download(ids, found)
    assert found.tolist() == expected


def test_impossible_arguments_are_refused() -> None:
    info = DeviceInfo("test", (8, 6), 4, 1 << 30, (13, 0))
    for wrong, message in (
        ({"norm": 1}, "a norm needs float32 x, and x is bf16"),
        ({"matrix": matrix_of("int8", count=4)}, "a blob of 4 matrices needs offsets"),
        ({"bias": 1, "offsets": 1}, "a bias needs a single matrix without SwiGLU"),
        ({"bias": 1, "matrix": matrix_of("int8", swiglu=True)}, "a bias needs a single matrix without SwiGLU"),
        ({"row_map": 1}, "a row_map needs x_rows"),
        ({"activation": "f64"}, "activation is 'f64', expected bf16, f16 or f32"),
        ({"rows": -1}, "rows is -1, expected 0 or more"),
        ({"rows": 1 << 31}, "2147483648 rows of 192 are too many for one launch"),
        ({"rounding": -1.0}, "x is rounded to FP8, which needs fp8 weights, found int8"),
        ({"matrix": matrix_of("int8", columns=128, group=8)}, "groups of 8 do not divide 128 columns into multiples"),
        (
            {"matrix": matrix_of("f32", columns=24), "activation": "f32"},
            "24 columns, expected a multiple of 16",
        ),
    ):
        request = replace(Matmul(matrix_of("int8"), 1, 1, 1, 1), **wrong)
        for plan in (lambda one: linear.matmul_launches(one, info, 1), linear.workspace_bytes):
            with pytest.raises(DeviceError, match=message):
                plan(request)
    for matrix, message in (
        (matrix_of("int4", columns=72), "of 72 columns in groups of 72, which no int4 matrix has"),
        (matrix_of("int8", columns=128, group=48), "of 128 columns in groups of 48, which no int8 matrix has"),
        (replace(matrix_of("int8"), count=1 << 31), "a matrix has a size of 2147483648"),
        (replace(matrix_of("int8"), count=(1 << 31) - 1, rows=1 << 30), "too large"),
    ):
        with pytest.raises(BundleError, match=message):
            linear.matmul_launches(Matmul(matrix, 1, 1, 1, 1), info)
    with pytest.raises(DeviceError, match="needs a workspace: pass the address of 18432 bytes"):
        linear.matmul_launches(Matmul(matrix_of("int8"), 1, 1, 1, 48, x_float=True), info)
    with pytest.raises(DeviceError, match=r"an embedding's table is .*, expected one matrix"):
        linear.embedding_launch(1, matrix_of("int8", count=2), 1, 1, 1)
    with pytest.raises(DeviceError, match="there is no norm of int8, expected bf16, f16 or f32"):
        linear.rms_norm_launch(1, 1, 1, 1, 64, source="int8")
    with pytest.raises(DeviceError, match="a norm of 63 columns, expected an even number"):
        linear.rms_norm_launch(1, 1, 1, 1, 63)
    assert linear.matmul_launches(Matmul(matrix_of("int8"), 1, 1, 1, 0), info) == []
