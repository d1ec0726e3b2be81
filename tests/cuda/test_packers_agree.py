"""Do the exporter's packer and that of the kernels' tests write the same layout?"""

from __future__ import annotations

import numpy as np
import pytest
from gpu_packing import Numbers, pack, random_numbers, to_bf16

from edgelm.bundle.gpu_layout import GpuKind, GpuMatrix
from edgelm.export.packing.gpu import BlobWriter, Rows, interleaved


def rows_of(matrix: GpuMatrix, numbers: Numbers, part: slice) -> Rows:
    codes = numbers.codes[part]
    if matrix.kind is GpuKind.INT4:
        codes = codes[:, 0::2] | codes[:, 1::2] << 4
    elif matrix.kind is GpuKind.BFLOAT16:
        codes = to_bf16(codes)
    elif matrix.kind is GpuKind.FLOAT16:
        codes = codes.astype(np.float16)
    scales, zeros = (None if values is None else values[part] for values in (numbers.scales, numbers.zeros))
    return Rows(codes, scales, zeros)


@pytest.mark.parametrize("kind", list(GpuKind))
@pytest.mark.parametrize(
    ("rows", "swiglu", "count", "zeros"),
    [(48, False, 1, False), (21, False, 2, True), (40, True, 2, True), (32, True, 3, False)],
)
def test_do_both_packers_write_the_same_bytes(kind: GpuKind, rows: int, swiglu: bool, count: int, zeros: bool) -> None:
    scaled, integers = kind.scale_bytes > 0, kind in (GpuKind.INT4, GpuKind.INT8)
    matrix = GpuMatrix(kind, rows, 128, 32 if scaled else 128, zeros and integers, swiglu, count)
    rng = np.random.default_rng(rows)
    matrices = [random_numbers(rng, matrix) for _ in range(count)]
    found: list[bytes] = []
    writer = BlobWriter(matrix, lambda part: found.append(part.tobytes()))
    half = rows // 2
    for numbers in matrices:
        if swiglu:
            writer.add(interleaved(*(rows_of(matrix, numbers, part) for part in (slice(half), slice(half, rows)))))
        else:
            writer.add(rows_of(matrix, numbers, slice(rows)))
    writer.finish()
    assert b"".join(found) == pack(matrix, matrices).tobytes()
