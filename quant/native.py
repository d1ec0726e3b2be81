"""Quantise to integers with the compiled kernel, or with `primitives` if there is none. Both agree bit for bit."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import lru_cache
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from edgelm.devices import allowed_cores
from edgelm.quant import primitives
from edgelm.quant.scheme import Scheme
from edgelm.quant.tensor import QuantTensor
from edgelm.system.platforms import LIBRARY_SUFFIX

ABI = 4
LIBRARY = f"_edgelm_quant{LIBRARY_SUFFIX}"
LIBRARY_VARIABLE = "EDGELM_QUANT_LIBRARY"
"""Environment variable: path of a library to load instead of the installed one; empty for no library."""

ISAS = {"auto": 0, "scalar": 1, "baseline": 2, "avx2": 3, "avx512": 4}
"""Instruction sets with their numbers in quantize.h."""

_OK, _NOT_FINITE, _TOO_LARGE = 0, 2, 3
_WEIGHT_TYPES = {np.dtype(np.float32): 0, np.dtype(np.uint16): 1}


class _Matrix(ctypes.Structure):
    # struct edgelm_quant_matrix
    _fields_ = (
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("symmetric", ctypes.c_int32),
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("threads", ctypes.c_int32),
        ("isa", ctypes.c_int32),
    )


class _QuantizeArguments(ctypes.Structure):
    # struct edgelm_quantize_arguments
    _fields_ = (
        ("matrix", _Matrix),
        ("weights", ctypes.c_void_p),
        ("row_stride", ctypes.c_int64),
        ("targets", ctypes.c_void_p),
        ("target_count", ctypes.c_int32),
        ("weight_type", ctypes.c_int32),
        ("bad_index", ctypes.c_int64),
    )


class _DequantizeArguments(ctypes.Structure):
    # struct edgelm_dequantize_arguments
    _fields_ = (("matrix", _Matrix), ("values", ctypes.c_void_p), ("row_stride", ctypes.c_int64))


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """Return the compiled kernel, or None if this installation has none.

    Raises:
        OSError: The library cannot be loaded, or belongs to another version of EdgeLM.
    """
    named = os.environ.get(LIBRARY_VARIABLE)
    if named is not None:
        path = Path(named) if named else None
    else:
        # An editable install has sources and compiled library in two folders; the package's path has both.
        places = (Path(place) / LIBRARY for place in sys.modules[__name__.rpartition(".")[0]].__path__)
        path = next((place for place in places if place.exists()), None)
    if path is None:
        return None
    found = ctypes.CDLL(str(path))
    abi = found.edgelm_quant_abi()
    if abi != ABI:
        raise OSError(
            f"{path} belongs to another version of EdgeLM (kernel interface {abi}, not {ABI}): install EdgeLM again"
        )
    return found


def isas() -> tuple[str, ...]:
    """Return the instruction sets that the kernel can use on this CPU; empty without a kernel."""
    kernel = library()
    return () if kernel is None else tuple(name for name, isa in ISAS.items() if kernel.edgelm_quant_has_isa(isa))


def quantize(
    weight: NDArray[np.float32] | NDArray[np.uint16],
    scheme: Scheme,
    *,
    name: str = "weight",
    threads: int | None = None,
    isa: str = "auto",
) -> QuantTensor:
    """Quantise a matrix to integers; see `primitives` for the algorithm.

    Args:
        weight: [N, K], float32, or bfloat16 as uint16. Rows may be strided; other strides cause a copy.
        scheme: The scheme; the result has `scheme.effective(K)`.
        name: Name of the tensor in errors.
        threads: Number of threads; None for every core that this process may use.
        isa: Instruction set, one of `isas()`; for tests and benchmarks.

    Raises:
        CheckpointError: A weight is not finite, or too large for a float16 scale.
        TypeError: The weights have another type.
    """
    kernel = library()
    if kernel is None:
        return primitives.quantize(weight, scheme, name=name)
    if weight.dtype not in _WEIGHT_TYPES:
        raise TypeError(f"weights are float32, or bfloat16 as uint16, not {weight.dtype}")
    rows, columns = weight.shape
    scheme = scheme.effective(columns)
    if columns != (width := scheme.padded(columns)):
        return quantize(primitives.fill(weight, width), scheme, name=name, threads=threads, isa=isa).cut(columns)
    row_bytes = columns * weight.itemsize
    if weight.strides[1] != weight.itemsize or weight.strides[0] % weight.itemsize or weight.strides[0] < row_bytes:
        weight = cast("NDArray[np.float32] | NDArray[np.uint16]", np.ascontiguousarray(weight))
    per_group = (rows, scheme.groups(columns))
    result = QuantTensor(
        np.empty((rows, scheme.code_bytes(columns)), np.uint8),
        np.empty(per_group, np.float16),
        np.empty(per_group, np.uint8) if scheme.has_zeros else None,
        scheme,
        (rows, columns),
    )
    targets = primitives.search_targets(scheme, columns)
    arguments = _QuantizeArguments(
        matrix=_matrix(result, threads, isa),
        weights=weight.ctypes.data,
        row_stride=max(weight.strides[0] // weight.itemsize, columns),
        targets=targets.ctypes.data,
        target_count=targets.size,
        weight_type=_WEIGHT_TYPES[weight.dtype],
    )
    status = kernel.edgelm_quantize(ctypes.byref(arguments))
    if status in (_NOT_FINITE, _TOO_LARGE):
        row, column = divmod(arguments.bad_index, columns)
        value = float(primitives.as_float32(weight[row : row + 1, column : column + 1])[0, 0])
        refuse = primitives.not_finite if status == _NOT_FINITE else primitives.too_large
        raise refuse(name, row, column, value)
    _require_ok(status, isa)
    return result


def dequantize(tensor: QuantTensor, *, threads: int | None = None, isa: str = "auto") -> NDArray[np.float32]:
    """Return float32 [N, K] = (code - zero) * scale."""
    kernel = library()
    if kernel is None:
        return primitives.dequantize(tensor)
    columns = tensor.shape[1]
    if columns != tensor.scheme.padded(columns):
        return np.ascontiguousarray(dequantize(tensor.padded(), threads=threads, isa=isa)[:, :columns])
    values = np.empty(tensor.shape, np.float32)
    arguments = _DequantizeArguments(
        matrix=_matrix(tensor, threads, isa), values=values.ctypes.data, row_stride=tensor.shape[1]
    )
    _require_ok(kernel.edgelm_dequantize(ctypes.byref(arguments)), isa)
    return values


def _matrix(tensor: QuantTensor, threads: int | None, isa: str) -> _Matrix:
    scheme = tensor.integers
    for array in (tensor.codes, tensor.scales, tensor.zeros):
        if array is not None and not array.flags.c_contiguous:
            raise ValueError("the arrays of a QuantTensor must be C-contiguous")
    return _Matrix(
        rows=tensor.shape[0],
        columns=tensor.shape[1],
        group=scheme.group_size(tensor.shape[1]),
        bits=scheme.bits,
        symmetric=scheme.symmetric,
        codes=tensor.codes.ctypes.data,
        scales=tensor.scales.ctypes.data,
        zeros=None if tensor.zeros is None else tensor.zeros.ctypes.data,
        threads=allowed_cores() if threads is None else max(1, threads),
        isa=ISAS[isa],
    )


def _require_ok(status: int, isa: str) -> None:
    # Shapes were checked in Python, so any other status is a bug of this module.
    assert status == _OK, f"the quantisation kernel ({isa}) returned status {status}"
