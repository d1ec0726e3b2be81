"""Does the exporter write what the operators read? Two independent packers and the embedding lookup must agree."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from operator_models import Array, run
from packed_weights import pack

from edgelm.bundle.cpu_layout import Kind, Scales
from edgelm.export.packing.cpu import Format, common_format, float_format, pack_codes, pack_floats
from edgelm.quant.codec import dequantize, quantize
from edgelm.quant.primitives import unpack
from edgelm.quant.scheme import parse_scheme
from edgelm.quant.tensor import QuantTensor

ROWS, COLUMNS = 70, 128


def tensor(scheme: str, seed: int = 0) -> QuantTensor:
    values = np.random.default_rng(seed).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    return quantize(values, parse_scheme(scheme))


def exported(tensors: list[QuantTensor], fmt: Format) -> Array:
    """Pack one matrix, or gate and up, with the exporter's packer."""
    matrix = fmt.matrix(ROWS * len(tensors), COLUMNS, swiglu=len(tensors) == 2)
    out = np.zeros((matrix.tiles, matrix.records, matrix.record_bytes), np.uint8)
    low = np.zeros((matrix.tiles, matrix.low_bytes // matrix.tiles), np.uint8)
    for i, part in enumerate(tensors):
        pack_codes(part, fmt, out[i :: len(tensors)], low[i :: len(tensors)])
    if fmt.kind is Kind.INT8_SPLIT:
        matrix = matrix.with_low_offset(matrix.first_bytes)
    return np.frombuffer(matrix.header() + out.tobytes() + low.tobytes(), np.uint8)


def formatted(scheme: str) -> tuple[QuantTensor, Format]:
    made = tensor(scheme)
    fmt = common_format([made.scheme], COLUMNS, "x")
    assert fmt is not None
    return made, fmt


def codes_of(made: QuantTensor) -> NDArray[np.uint8]:
    bits = made.scheme.bits
    return unpack(made.codes, bits) if bits < 8 else made.codes


@pytest.mark.parametrize("symmetry", ["sym", "asym"])
@pytest.mark.parametrize("group", ["g32", "g64", "row"])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_integers(bits: int, group: str, symmetry: str) -> None:
    made, fmt = formatted(f"int{bits}-{group}-{symmetry}")
    ours = pack(f"int{bits}", codes_of(made), fmt.group, scales=made.scales, zeros=made.zeros)
    assert exported([made], fmt).tobytes() == ours.tobytes()


def test_split_nibbles() -> None:
    made = tensor("int8-g64-sym")
    ours = pack("split", codes_of(made), 64, scales=made.scales)
    assert exported([made], Format(Kind.INT8_SPLIT, Scales.FLOAT16, False, 64)).tobytes() == ours.tobytes()


def test_gate_and_up() -> None:
    gate, up = tensor("int4-g32-asym", 1), tensor("int4-g32-asym", 2)
    fmt = common_format([gate.scheme, up.scheme], COLUMNS, "x")
    assert fmt is not None
    codes, scales, zeros = (
        np.concatenate(pair)
        for pair in ((codes_of(gate), codes_of(up)), (gate.scales, up.scales), (gate.zeros, up.zeros))
    )
    ours = pack("int4", codes, 32, scales=scales, zeros=zeros, swiglu=True)
    assert exported([gate, up], fmt).tobytes() == ours.tobytes()


@pytest.mark.parametrize("scheme", ["fp8-row", "fp8-b64"])
def test_fp8(scheme: str) -> None:
    made, fmt = formatted(scheme)
    ours = pack("fp8", made.codes, fmt.group, scales=made.scales)
    assert exported([made], fmt).tobytes() == ours.tobytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_floats(dtype: str) -> None:
    values = np.random.default_rng(0).standard_normal((ROWS, 50)).astype(np.float32)
    stored = (values.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else values.astype(dtype)
    matrix = float_format(dtype, 50).matrix(ROWS, 50)
    out = np.zeros((matrix.tiles, 1, matrix.record_bytes), np.uint8)
    pack_floats(stored, out)
    assert matrix.header() + out.tobytes() == pack(dtype, stored, 50).tobytes()


@pytest.mark.parametrize(
    "scheme", ["int3-g32-sym", "int4-g64-asym", "int5-g32-asym", "int6-g64-sym", "int8-row-sym", "fp8-b64"]
)
def test_the_operators_read_the_checkpoints_values(scheme: str) -> None:
    made, fmt = formatted(scheme)
    (y,) = run("QuantEmbedding", {"ids": np.arange(ROWS)[None], "table": exported([made], fmt)})
    assert y[0].tobytes() == dequantize(made).tobytes()
