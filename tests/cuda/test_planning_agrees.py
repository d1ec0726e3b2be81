"""Do the plans of C++ have the same bytes as those of Python, over all kinds, shapes and devices?"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator

import linear_calls
import moe_calls
import pytest

from edgelm.bundle.gpu_layout import GpuKind, GpuMatrix
from edgelm.errors import DeviceError
from edgelm.runtimes.cuda import planning, sparse_moe
from edgelm.runtimes.cuda.device import DeviceInfo
from edgelm.runtimes.cuda.kernels import linear, moe
from edgelm.runtimes.cuda.kernels.linear import Matmul
from edgelm.runtimes.cuda.kernels.moe import MoeShape

DEVICES = [
    DeviceInfo("A100", (8, 0), 108, 0, (12, 4)),
    DeviceInfo("RTX 3050", (8, 6), 16, 0, (12, 4)),
    DeviceInfo("Orin Nano", (8, 7), 8, 0, (12, 6)),
    DeviceInfo("RTX 4090", (8, 9), 128, 0, (13, 0)),
    DeviceInfo("H100", (9, 0), 132, 0, (13, 0)),
    DeviceInfo("B200", (10, 0), 148, 0, (13, 0)),
    DeviceInfo("B300", (10, 3), 160, 0, (13, 0)),
    DeviceInfo("Thor", (11, 0), 20, 0, (13, 0)),
    DeviceInfo("RTX 5090", (12, 0), 170, 0, (13, 0)),
    DeviceInfo("GB10", (12, 1), 48, 0, (13, 0)),
]
ROWS = [*range(35), 48, 63, 64, 65, 127, 128, 129, 191, 192, 255, 256, 257, 384, 511, 512, 1000, 1024, 2048, 4096]
WORKSPACE = 0x7F12_3400_0000
SHAPES = [(2048, 2048), (2560, 6912), (13824, 2560), (50304, 2048), (1024, 2048), (2048, 1024), (48, 128), (8, 4096)]


def _matrices(kind: GpuKind) -> Iterator[GpuMatrix]:
    for (rows, columns), swiglu in itertools.product(SHAPES, (False, True)):
        for group, zeros in [(32, True), (64, False), (128, True), (columns, False)] if kind.scale_bytes else [
            (columns, False)
        ]:  # fmt: skip
            yield GpuMatrix(kind, rows, columns, group, zeros and kind != GpuKind.FP8, swiglu)


def _activations(kind: GpuKind) -> tuple[str, ...]:
    return ("bf16", "f16", "f32") if kind.scale_bytes else ("f32",) if kind == "f32" else (kind.value, "f32")


def _same_matmul(matmul: Matmul, info: DeviceInfo) -> None:
    ours = linear_calls.Matmul(**{field.name: getattr(matmul, field.name) for field in dataclasses.fields(matmul)})
    assert linear_calls.workspace_bytes(ours) == linear.workspace_bytes(matmul)
    try:
        expected = linear.matmul_launches(matmul, info, WORKSPACE)
    except DeviceError as error:
        with pytest.raises(DeviceError) as found:
            linear_calls.matmul_launches(ours, info, WORKSPACE)
        assert str(found.value) == str(error)
        return
    assert linear_calls.matmul_launches(ours, info, WORKSPACE) == expected, (matmul, info)


@pytest.mark.parametrize("kind", list(GpuKind))
def test_do_plans_of_matmuls_agree(kind):
    random.seed(0)
    for matrix in _matrices(kind):
        for activation in _activations(kind):
            kernels = linear_calls.kernels_of(matrix, activation, -1.0), linear_calls.kernels_of(matrix, activation)
            assert kernels == (linear.kernels_of(matrix, activation, -1.0), linear.kernels_of(matrix, activation))
            for rows in ROWS:
                info = random.choice(DEVICES)
                x_float = random.random() < 0.5
                _same_matmul(
                    Matmul(
                        matrix, 1 << 44, 0x100, 0x200, rows, activation, x_float, random.random() < 0.5,
                        norm=0x300 * (x_float or activation == "f32") * random.randrange(2),
                        residual=0x400 * random.randrange(2), bias=0x500 * random.randrange(2) * (not matrix.swiglu),
                        rounding=random.choice([0.0, -1.0, 0.03]) * (kind == "fp8"),
                        epsilon=random.choice([1e-5, 1e-6]),
                    ),
                    info,
                )  # fmt: skip


@pytest.mark.parametrize("kind", list(GpuKind))
def test_do_plans_of_experts_matmuls_agree(kind):
    random.seed(1)
    for matrix, count in itertools.product(_matrices(kind), (1, 8, 64, 256)):
        if matrix.rows > 16384:
            continue
        for activation in _activations(kind):
            for rows in random.sample(ROWS, 12):
                many = dataclasses.replace(matrix, count=count)
                slots = rows * min(8, count)
                mapped = random.random() < 0.5
                _same_matmul(
                    Matmul(
                        many, 1 << 44, 0x100, 0x200, slots, activation, y_float=not mapped, offsets=0x600,
                        row_map=0x700 * mapped, x_rows=(rows or 1) * mapped, most_rows=rows * random.randrange(2),
                        rounding=random.choice([0.0, -1.0]) * (kind == "fp8"),
                    ),
                    random.choice(DEVICES),
                )  # fmt: skip


def test_do_plans_of_rows_agree():
    matrices = [matrix for kind in GpuKind for matrix in _matrices(kind) if not matrix.swiglu]
    for matrix, rows in itertools.product(matrices, (1, 7, 4096)):
        arguments = (0x100, matrix, 1 << 44, 0x200, rows)
        assert linear_calls.embedding_launch(*arguments) == linear.embedding_launch(*arguments)
    for rows, columns in itertools.product((1, 3, 32, 4096), (2, 2048, 4096, 4098, 50304, 262144)):
        last = (0x100, 0x200, rows, 17, columns)
        assert linear_calls.last_token_launch(*last) == linear.last_token_launch(*last)
        top = (0x100, 0x200, rows, columns, WORKSPACE)
        assert linear_calls.argmax_launches(*top) == linear.argmax_launches(*top)
        assert linear_calls.argmax_workspace_bytes(rows, columns) == linear.argmax_workspace_bytes(rows, columns)
        for source, residual in itertools.product(("bf16", "f16", "f32"), (0, 0x300)):
            norm = (0x100, 0x200, 0x400, rows, columns)
            assert linear_calls.rms_norm_launch(
                *norm, source=source, residual=residual, epsilon=1e-6
            ) == linear.rms_norm_launch(*norm, source=source, residual=residual, epsilon=1e-6)
        for source, fp8, x_float in itertools.product(("bf16", "f16"), (False, True), (False, True)):
            options = {
                "source": source, "target": "fp8" if fp8 else source, "x_float": x_float, "norm": 0x300 * x_float,
                "rounding": -1.0 * fp8, "scales": 0x500 * fp8,
            }  # fmt: skip
            assert linear_calls.convert_launch(0x100, 0x200, rows, columns, **options) == linear.convert_launch(
                0x100, 0x200, rows, columns, **options
            )


def test_do_plans_of_experts_agree():
    random.seed(2)
    layers = [(2048, 1024, 64, 8, False), (64, 32, 4, 2, True), (4096, 1536, 128, 8, True), (2048, 768, 256, 16, True)]
    layers += [(128, 64, 1, 1, False), (4096, 14336, 8, 2, True)]
    kinds = list(itertools.product(GpuKind, ("bf16", "f16", "f32")))
    for (columns, hidden, experts, k, normalize), (kind, activation) in itertools.product(layers, kinds):
        if activation not in _activations(kind) or hidden % kind.columns or columns % max(16, kind.columns):
            continue
        group = 32 if kind.scale_bytes else columns
        gate_up = GpuMatrix(kind, 2 * hidden, columns, group, kind == "int4", True, experts)
        down = GpuMatrix(kind, columns, hidden, 32 if kind.scale_bytes else hidden, kind == "int4", False, experts)
        for tokens, counters in itertools.product((1, 2, 3, 8, 9, 16, 17, 32, 33, 256, 257, 2000, 4096), (0, 0x900)):
            shape = MoeShape(tokens, columns, hidden, experts, k, normalize, activation, 1e-6)
            ours = moe_calls.MoeShape(**dataclasses.asdict(shape))
            assert moe_calls.workspace_bytes(ours) == moe.workspace_bytes(shape)
            places = moe.workspace(shape, WORKSPACE)
            own_places = moe_calls.workspace(ours, WORKSPACE)
            assert dataclasses.asdict(own_places) == dataclasses.asdict(places)
            router = (0x100, 0x200, 0x300, 0x400)
            pairs = [
                ([moe_calls.router_launch(ours, *router, 0x500)], [moe.router_launch(shape, *router, 0x500)]),
                (
                    moe_calls.route_launches(ours, *router, own_places, counters),
                    moe.route_launches(shape, *router, places, counters),
                ),
                (moe_calls.choose_launches(ours, 0x400, own_places), moe.choose_launches(shape, 0x400, places)),
                ([moe_calls.combine_launch(ours, 1, 2, 3, 4, 5)], [moe.combine_launch(shape, 1, 2, 3, 4, 5)]),
            ]
            if tokens <= moe.DOWN_TOKENS and activation != "f32":
                pairs.append(
                    (
                        [moe_calls.down_launch(ours, down, 1 << 44, 1, 2, own_places, 3)],
                        [moe.down_launch(shape, down, 1 << 44, 1, 2, places, 3)],
                    )
                )
            for rounding in (0.0, -1.0) if kind == "fp8" else (0.0,):
                call = sparse_moe.SparseMoe(shape, gate_up, down, rounding)
                own = moe_calls.SparseMoe(ours, gate_up, down, rounding)
                assert moe_calls.sparse_moe_workspace_bytes(own) == sparse_moe.workspace_bytes(call)
                assert moe_calls.sparse_moe_kernels(own) == sparse_moe.kernels_of(call)
                buffers = (1 << 40, 2 << 40, 3 << 40, 4 << 40, 5 << 40, 6 << 40, WORKSPACE, counters, counters)
                info = random.choice(DEVICES)
                pairs.append(
                    (
                        moe_calls.sparse_moe_launches(own, moe_calls.SparseMoeBuffers(*buffers), info),
                        sparse_moe.moe_launches(call, sparse_moe.SparseMoeBuffers(*buffers), info),
                    )
                )
            for found, expected in pairs:
                assert found == expected, (shape, kind)


def test_do_lists_of_kernels_agree():
    lines = [line.split("\t") for line in planning.call("kernels", {}).decode().splitlines()]
    expected = [
        [module.HEADER, name, module.instantiation(name)] for module in (linear, moe) for name in module.all_kernels()
    ]
    assert [line for line in lines if not line[1].startswith("attention_")] == expected
