"""Does unpacking tiles give back the rows that they were packed from?"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from edgelm.bundle.gpu_layout import GpuKind, GpuMatrix
from edgelm.errors import BundleError
from edgelm.export.packing.gpu import BlobWriter, interleaved
from edgelm.export.packing.gpu import Rows as Packed
from edgelm.json_dataclass import ErrorFactory, from_data
from edgelm.runtimes.tensorrt.rowmajor import Rows, parts_of, write

ERRORS = ErrorFactory(BundleError, "export the bundle again")


def packed(folder: Path, matrix: GpuMatrix, rows: list[Packed], before: int) -> Path:
    """Write a weights file with one blob at offset `before`."""
    path = folder / "weights.bin"
    with path.open("wb") as stream:
        stream.write(bytes(before))
        writer = BlobWriter(matrix, lambda data: stream.write(data.tobytes()))
        writer.add(interleaved(*rows) if matrix.swiglu else rows[0])
        writer.finish()
    return path


@pytest.mark.parametrize("rows", [16, 40, 41])
@pytest.mark.parametrize("kind", [GpuKind.BFLOAT16, GpuKind.FLOAT16, GpuKind.INT8, GpuKind.FP8])
@pytest.mark.parametrize("swiglu", [False, True])
def test_rows_come_back(tmp_path: Path, kind: GpuKind, rows: int, swiglu: bool) -> None:
    rng = np.random.default_rng(rows)
    wide = kind in (GpuKind.BFLOAT16, GpuKind.FLOAT16)
    made = []
    for _ in range(1 + swiglu):
        codes = rng.integers(0, 1 << (16 if wide else 8), (rows, 96)).astype(np.uint16 if wide else np.uint8)
        scales = None if wide else rng.random((rows, 1)).astype(np.float32 if kind is GpuKind.FP8 else np.float16)
        made.append(Packed(codes, scales))
    matrix = GpuMatrix(kind, rows * len(made), 96, 96, swiglu=swiglu)
    weights = packed(tmp_path, matrix, made, before=4096)
    entries, place = [], 0
    for part in parts_of(matrix):
        for what in ("values",) if wide else ("values", "scales"):
            entries.append(Rows(f"{part}.{what}", matrix, 4096, part, what, place))
            place += entries[-1].nbytes
    documents = json.loads(json.dumps([dataclasses.asdict(entry) for entry in entries]))
    entries = [from_data(Rows, document, tmp_path, ERRORS) for document in documents]
    out = tmp_path / "rows.bin"
    write(entries, weights, out)
    data = out.read_bytes()
    assert len(data) == place
    for entry in entries:
        source = made[parts_of(matrix).index(entry.part)]
        found = data[entry.offset : entry.offset + entry.nbytes]
        if entry.what == "scales":
            assert np.array_equal(np.frombuffer(found, np.float32), source.scales[:, 0].astype(np.float32))
        elif kind is GpuKind.INT8:
            signed = np.frombuffer(found, np.int8).reshape(rows, 96).astype(int)
            assert np.array_equal(signed, source.codes.astype(int) - 128)
        else:
            assert np.array_equal(np.frombuffer(found, source.codes.dtype).reshape(rows, 96), source.codes)


def test_a_weights_file_that_ends_early_is_named(tmp_path: Path) -> None:
    matrix = GpuMatrix(GpuKind.BFLOAT16, 16, 64, 64)
    (tmp_path / "weights.bin").write_bytes(bytes(100))
    with pytest.raises(BundleError, match=r"weights.bin is too short, it ends within a: copy or export"):
        write([Rows("a", matrix, 0, "all", "values", 0)], tmp_path / "weights.bin", tmp_path / "rows.bin")
    with pytest.raises(BundleError, match="name is 1, expected a text"):
        from_data(Rows, {"name": 1}, tmp_path, ERRORS)
    with pytest.raises(BundleError, match=r'"a" is not a row-major matrix .*16 rows of 50 columns in groups of 50'):
        Rows("a", GpuMatrix(GpuKind.BFLOAT16, 16, 50, 50), 0, "all", "values", 0).check(tmp_path)
