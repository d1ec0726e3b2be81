"""Launches of the kernels in linear.cuh: matmuls with quantised weights, and small kernels around them.

One of three kernels computes a matmul: "skinny" for few rows, bound by reading the weights; "gemm" on tensor cores for
many rows; "exact" in float32 throughout (activation f32). The choice depends on shapes alone, never on data.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace

from edgelm.bundle.gpu_layout import ROWS, TILE_BYTES, GpuKind, GpuMatrix, aligned
from edgelm.errors import DeviceError
from edgelm.runtimes.cuda.device import DeviceInfo, Launch

HEADER = "linear/linear.cuh"

ACTIVATIONS = ("bf16", "f16")
"""Types of activations: bf16 and f16 for tensor cores, f32 for the exact kernels."""

# LinearArgs, RowsArgs, RmsNormArgs, EmbeddingArgs, LastTokenArgs, TopArgs in the CUDA sources.
_LINEAR_ARGS = struct.Struct("<10Q3q8i2f3i4x")
_ROWS_ARGS = struct.Struct("<4Q3i2f4x")
_RMS_NORM_ARGS = struct.Struct("<4Qif")
_EMBEDDING_ARGS = struct.Struct("<5Q4i")
_LAST_TOKEN_ARGS = struct.Struct("<2Q2i")
_TOP_ARGS = struct.Struct("<4Q3i4x")

TYPES = {"int4": "Int4", "int8": "Int8", "fp8": "e4m3", "f16": "f16", "bf16": "bf16", "f32": "float"}
"""C++ names of the element types; int4 and int8 are types of weights."""
_SKINNY_WIDTHS = (8, 16, 32)
SKINNY_ROWS = 32
"""The largest number of rows for which a single matrix uses the skinny kernel."""
FUSED_ROWS = 8
"""The largest number of rows of x that the skinny kernel norms and rounds itself, in each of its blocks."""
# Tiles of the gemm kernels by name: rows of the matrix, tokens, warps along the rows.
_GEMM_TILES = {"256": (256, 128, 4), "128": (128, 128, 2), "64": (64, 64, 2)}
_GEMM_SPEED = {"256": 1.0, "128": 0.8, "64": 0.5}
"""Estimated relative speed of the kernels on a busy device; used only to choose one."""
_GEMM_THREADS = 256
_GEMM_STAGES = {"256": 3, "128": 3, "64": 6}
_SKINNY_THREADS = {8: 512, 16: 512, 32: 256}
_EXACT_TOKENS, _EXACT_WARPS = 4, 8
_ROW_THREADS = 256
_TOP_PART = 4096

# Shared memory per multiprocessor in KiB, by compute capability. A block may use 1 KiB less.
_SHARED_KB = {(8, 0): 164, (8, 6): 100, (8, 7): 164, (8, 9): 100, (9, 0): 228, (10, 0): 228, (11, 0): 228, (12, 0): 100}


def all_kernels() -> tuple[str, ...]:
    """Return the name of every kernel."""
    return tuple(_instantiations())


def instantiation(name: str) -> str:
    """Return the line of C++ that instantiates the kernel `name`."""
    args, threads, blocks, body = _instantiations()[name]
    return f"EDGELM_KERNEL({name}, {args}, {threads}, {blocks}, {body})"


def kernels_of(matrix: GpuMatrix, activation: str, rounding: float = 0.0) -> tuple[str, ...]:
    """Return every kernel that matmuls with this matrix may need, for any number of rows.

    Args:
        matrix: the weights.
        activation: bf16, f16 or f32.
        rounding: as in `Matmul`.

    Raises:
        DeviceError: there is no kernel for this matrix with this activation.
    """
    _check(matrix, activation)
    if activation == "f32":
        return (f"linear_exact_f32_{matrix.kind}",)
    names = [f"linear_skinny_{activation}_{matrix.kind}_n{width}" for width in _SKINNY_WIDTHS]
    fp8 = rounding != 0
    names += [_gemm_name(matrix, activation, tile, fp8) for tile in _gemm_tiles(_gemm_scales(matrix))]
    names.append(f"convert_rows_{activation}_{activation}")
    if rounding:
        names.append(f"convert_rows_{activation}_fp8")
    return tuple(names)


@dataclass(frozen=True)
class Matmul:
    """A matmul y[slot] = residual[slot] + f(W g(x[row of slot]) + bias), with addresses on the device; 0: absent.

    Attributes:
        matrix, blob: the weights' format and address. With `offsets` each matrix has its own rows.
        x: [x_rows, K]: float32 if `x_float`, otherwise of type `activation`.
        y: [rows, outputs]: float32 if `y_float`, otherwise of type `activation`.
        rows: slots, the rows of y. 0 is allowed.
        activation: bf16, f16, or f32 for exact matmuls; x and y are then float32.
        norm: float32 [K], weight of an RMSNorm of x; x must be float32.
        residual: float32 [rows, outputs], added at the end; may be y.
        bias: float32 [N] of one matrix that is not SwiGLU, added to the float32 sums before anything else.
        row_map: int32 [rows], the row of x of each slot; 0: row s for slot s.
        offsets: int32 [count + 1], matrix e has slots offsets[e] .. offsets[e + 1] - 1.
        x_rows: rows of x, if `row_map` is given.
        most_rows: upper limit of the slots per matrix; default: `rows`. Used only to choose kernels.
        rounding: rounding of x (after the norm) to FP8 E4M3: > 0: with this scale; < 0: with absmax / 448 of its row;
        0:
            none.
        epsilon: of the norm.
    """

    matrix: GpuMatrix
    blob: int
    x: int
    y: int
    rows: int
    activation: str = "bf16"
    x_float: bool = False
    y_float: bool = False
    norm: int = 0
    residual: int = 0
    bias: int = 0
    row_map: int = 0
    offsets: int = 0
    x_rows: int = 0
    most_rows: int = 0
    rounding: float = 0.0
    epsilon: float = 1e-5

    def __post_init__(self) -> None:
        """Raise DeviceError if the kernels cannot compute this."""
        _check(self.matrix, self.activation)
        if self.norm and not (self.x_float or self.activation == "f32"):
            raise DeviceError(f"a norm needs float32 x, and x is {self.activation}: pass x_float=True")
        if self.matrix.count > 1 and not self.offsets:
            raise DeviceError(f"a blob of {self.matrix.count} matrices needs offsets: pass them")
        if self.bias and (self.offsets or self.matrix.swiglu):
            raise DeviceError("a bias needs a single matrix without SwiGLU: pass bias=0")
        if self.row_map and not self.x_rows:
            raise DeviceError("a row_map needs x_rows: pass the number of rows of x")
        if self.rows < 0:
            raise DeviceError(f"rows is {self.rows}, expected 0 or more")

    @property
    def rows_of_x(self) -> int:
        """The number of rows of x."""
        return self.x_rows if self.row_map else self.rows

    @property
    def active(self) -> int:
        """The largest number of matrices that can have rows."""
        return min(self.matrix.count, self.rows) if self.offsets else 1

    def is_skinny(self) -> bool:
        """Whether the skinny kernel is used."""
        most = min(self.most_rows or self.rows, self.rows)
        # With many experts most have few rows, even if one expert may have all of them.
        return most <= SKINNY_ROWS or (self.offsets != 0 and self.rows <= self.matrix.count * 12)

    def prepares_x(self) -> bool:
        """Whether a separate kernel first converts x for the matmul."""
        if self.rows == 0 or self.activation == "f32" or not (self.x_float or self.rounding):
            return False
        return not self.is_skinny() or self.rows_of_x > FUSED_ROWS


def workspace_bytes(matmul: Matmul) -> int:
    """Return the bytes of scratch memory that `matmul_launches` needs for up to this number of rows."""
    if matmul.activation == "f32" or not (matmul.x_float or matmul.rounding):
        return 0
    rows = matmul.rows_of_x
    return aligned(2 * rows * matmul.matrix.columns) + (aligned(4 * rows) if matmul.rounding else 0)


def matmul_launches(matmul: Matmul, info: DeviceInfo, workspace: int = 0) -> list[Launch]:
    """Return the launches that compute a matmul.

    Args:
        matmul: the matmul.
        info: of the device.
        workspace: address of `workspace_bytes(matmul)` bytes, aligned to 256; needed if `matmul.prepares_x()`.

    Raises:
        DeviceError: the workspace is missing, or the shapes do not fit the device.
    """
    if matmul.rows == 0:
        return []
    if matmul.activation == "f32":
        return [_exact(matmul)]
    launches = []
    scales = 0
    if matmul.prepares_x():
        if not workspace:
            raise DeviceError(f"this matmul needs a workspace: pass the address of {workspace_bytes(matmul)} bytes")
        # The skinny kernel takes rounded x in the activations' type, which represents FP8 exactly.
        target = "fp8" if matmul.rounding and not matmul.is_skinny() else matmul.activation
        if matmul.rounding:
            cells = matmul.rows_of_x * matmul.matrix.columns
            scales = workspace + aligned(cells if target == "fp8" else 2 * cells)
        launches.append(
            convert_launch(
                matmul.x, workspace, matmul.rows_of_x, matmul.matrix.columns,
                source=matmul.activation, target=target, x_float=matmul.x_float, norm=matmul.norm,
                epsilon=matmul.epsilon, rounding=matmul.rounding, scales=scales,
            )
        )  # fmt: skip
        matmul = replace(matmul, x=workspace, x_float=False, norm=0, rounding=0.0)
    launches.append(_skinny(matmul, info, scales) if matmul.is_skinny() else _gemm(matmul, info, scales))
    return launches


def convert_launch(
    x: int,
    y: int,
    rows: int,
    columns: int,
    *,
    source: str,
    target: str,
    x_float: bool = True,
    norm: int = 0,
    epsilon: float = 1e-5,
    rounding: float = 0.0,
    scales: int = 0,
) -> Launch:
    """Return the launch that normalises, converts or rounds rows.

    Args:
        x: [rows, columns], float32 if `x_float`, otherwise of type `source`.
        y: [rows, columns] of type `target`: `source`, or fp8 (codes, reordered within each 16).
        rows: number of rows.
        columns: number of columns, which must be even.
        source: bf16 or f16.
        target: the type of y.
        x_float: whether x is float32 and not of type `source`.
        norm: float32 [columns], weight of an RMSNorm; 0: none.
        epsilon: of the norm.
        rounding: as in `Matmul`.
        scales: float32 [rows], receives the scales of rounding; 0: not needed.
    """
    name = f"convert_rows_{source}_{target}"
    if name not in _instantiations():
        raise DeviceError(f"there is no conversion from {source} to {target}: use bf16 or f16, to itself or to fp8")
    if columns % 2:
        raise DeviceError(f"rows have {columns} numbers, expected an even number")
    args = _ROWS_ARGS.pack(x, norm, y, scales, rows, columns, x_float, epsilon, rounding)
    return Launch(name, (rows, 1, 1), _ROW_THREADS, 4 * _ROW_THREADS // 32, args)


def rms_norm_launch(
    x: int, weight: int, y: int, rows: int, columns: int, *, source: str = "f32", residual: int = 0,
    epsilon: float = 1e-5,
) -> Launch:  # fmt: skip
    """Return the launch of y = residual + x / sqrt(mean(x^2) + epsilon) * weight.

    Args:
        x: [rows, columns] of type `source`.
        weight: float32 [columns].
        y: float32 [rows, columns]; may be x or residual.
        rows: number of rows.
        columns: number of columns, which must be even.
        source: bf16, f16 or f32.
        residual: float32 [rows, columns]; 0: none.
        epsilon: of the norm.

    Raises:
        DeviceError: there is no such kernel.
    """
    name = rms_norm_kernel(source)
    if columns % 2:
        raise DeviceError(f"a norm of {columns} columns, expected an even number")
    args = _RMS_NORM_ARGS.pack(x, weight, residual, y, columns, epsilon)
    return Launch(name, (rows, 1, 1), _ROW_THREADS, 4 * _ROW_THREADS // 32, args)


def rms_norm_kernel(source: str) -> str:
    """Return the name of the RMSNorm kernel for x of type `source`. Raises DeviceError if there is none."""
    if source not in (*ACTIVATIONS, "f32"):
        raise DeviceError(f"there is no norm of {source}, expected bf16, f16 or f32")
    return f"rms_norm_{source}_f32"


def embedding_launch(ids: int, matrix: GpuMatrix, blob: int, y: int, rows: int) -> Launch:
    """Return the launch of y[r, :] = table[ids[r], :], float32 [rows, K]; ids are int32.

    Raises:
        DeviceError: the table is not a single matrix, or is a SwiGLU matrix.
    """
    if matrix.swiglu or matrix.count != 1:
        raise DeviceError(f"an embedding's table is {matrix}, expected one matrix without SwiGLU")
    scales, zeros = _parts(matrix, blob)
    args = _EMBEDDING_ARGS.pack(
        ids, blob, scales, zeros, y, rows, matrix.rows, matrix.columns, matrix.group if matrix.kind.scale_bytes else 1
    )
    blocks = -(-matrix.columns // matrix.kind.columns * 4 // _ROW_THREADS)
    return Launch(f"quant_embedding_{matrix.kind}_f32", (rows, max(1, blocks), 1), _ROW_THREADS, 0, args)


def last_token_launch(x: int, y: int, batch: int, tokens: int, columns: int) -> Launch:
    """Return the launch of y[b, :] = x[b, tokens - 1, :], float32."""
    args = _LAST_TOKEN_ARGS.pack(x, y, tokens, columns)
    return Launch("last_token_f32", (batch, 1, 1), _ROW_THREADS, 0, args)


def argmax_workspace_bytes(rows: int, columns: int) -> int:
    """Return the bytes of scratch memory that `argmax_launches` needs."""
    return 2 * aligned(4 * rows * -(-columns // _TOP_PART))


def argmax_launches(x: int, ids: int, rows: int, columns: int, workspace: int) -> list[Launch]:
    """Return the launches of a row-wise argmax. Of equal values the first is chosen; NaN never is.

    Args:
        x: float32 [rows, columns].
        ids: int32 [rows], receives the indices; -1 if all values are NaN.
        rows: number of rows.
        columns: number of columns.
        workspace: address of `argmax_workspace_bytes(rows, columns)` bytes, aligned to 256.
    """
    parts = -(-columns // _TOP_PART)
    between = workspace + aligned(4 * rows * parts)
    args = _TOP_ARGS.pack(x, workspace, between, ids, columns, parts, _TOP_PART)
    shared = 8 * _ROW_THREADS // 32
    return [
        Launch("top_parts_f32", (parts, rows, 1), _ROW_THREADS, shared, args),
        Launch("top_all_f32", (rows, 1, 1), _ROW_THREADS, shared, args),
    ]


# -- the three kinds of matmuls --------------------------------------------------------------------------------------


def _exact(matmul: Matmul) -> Launch:
    blocks = -(-matmul.matrix.blocks // _EXACT_WARPS)
    experts = matmul.matrix.count if matmul.offsets else 1
    most = min(matmul.most_rows or matmul.rows, matmul.rows)
    depth = min(-(-most // _EXACT_TOKENS), 64)
    args = _args(replace(matmul, x_float=True, y_float=True))
    grid = (blocks, experts, depth)
    return Launch(f"linear_exact_f32_{matmul.matrix.kind}", grid, 32 * _EXACT_WARPS, 8 * _EXACT_TOKENS, args)


def _skinny(matmul: Matmul, info: DeviceInfo, scales: int) -> Launch:
    matrix = matmul.matrix
    most = min(matmul.most_rows or matmul.rows, matmul.rows)
    if matmul.offsets and most > 8:  # sized for an expert's usual share; an expert with more rows takes several turns
        most = min(most, 4 * -(-matmul.rows // matrix.count))
    width = next((one for one in _SKINNY_WIDTHS if one >= most), _SKINNY_WIDTHS[-1])
    x_tile = min(most, width)
    work = matmul.active * matrix.blocks
    # Two blocks of 8 warps per multiprocessor; one of 16 if loading x takes long or there is too little work.
    warps, on_one = (8, 2) if x_tile <= 2 and work >= 2 * info.multiprocessors else (_SKINNY_THREADS[width] // 32, 1)
    split = _skinny_split(matrix, warps, work, warps * on_one * info.multiprocessors)
    whole = _shared_limit(info)
    chunk = matrix.columns
    shared = _skinny_shared(matmul, warps, split, x_tile, chunk)
    if shared > whole - 1024:
        left = whole - 1024 - _skinny_shared(matmul, warps, split, x_tile, 0)
        chunk = left // (64 * x_tile) * 32 // 64 * 64
        if chunk < 64:
            raise DeviceError(
                f"{matrix.columns} columns with groups of {matrix.group} need more shared memory than this device's "
                f"{whole // 1024} KiB"
            )
        shared = _skinny_shared(matmul, warps, split, x_tile, chunk)
    on_one = min(on_one, whole // (shared + 1024))
    items = matmul.active * -(-matrix.blocks // (warps // split))
    name = f"linear_skinny_{matmul.activation}_{matrix.kind}_n{width}"
    args = _args(matmul, scales=scales, split=split, chunk=chunk, x_tile=x_tile)
    return Launch(name, (min(items, on_one * info.multiprocessors), 1, 1), 32 * warps, shared, args)


def _skinny_split(matrix: GpuMatrix, warps: int, work: int, warps_in_all: int) -> int:
    """Return the number of warps that divide the columns of 16 rows.

    As few as possible, for few sums to add, such that a warp's columns fit into its loads in flight; but enough that
    every warp has some.
    """
    units = -(-matrix.columns // max(32, matrix.kind.columns))
    ahead = 8 if matrix.kind.columns >= 32 else 4
    split = warps
    while split > 1 and -(-units // split) < ahead and work * (split // 2) >= warps_in_all:
        split //= 2
    return split


def _skinny_shared(matmul: Matmul, warps: int, split: int, x_tile: int, chunk: int) -> int:
    """Return the bytes of shared memory, as SkinnyShared computes them."""
    matrix = matmul.matrix
    width = next(one for one in _SKINNY_WIDTHS if one >= x_tile)
    groups = matrix.groups if matrix.kind.scale_bytes else 0
    block = groups * ROWS * (matrix.kind.scale_bytes + matrix.zeros)
    x = x_tile * (-(-chunk // 32) * 64 + 16)
    sums = 2 * warps * width * 64
    experts = 4 + 12 * matrix.count if matmul.offsets else 0
    return x + sums + 2 * (warps // split) * block + width * 8 + width * 8 * warps + -(-experts // 16) * 16


def _gemm(matmul: Matmul, info: DeviceInfo, scales: int) -> Launch:
    matrix = matmul.matrix
    fp8 = scales != 0
    whole = _shared_limit(info)
    best: tuple[float, Launch] | None = None
    for tile in _gemm_tiles(_gemm_scales(matrix)):
        rows, tokens, _ = _GEMM_TILES[tile]
        columns = 4 * (32 if fp8 else 16)
        weights = rows // ROWS * (columns // matrix.kind.columns) * TILE_BYTES
        shared = max(_GEMM_STAGES[tile] * (weights + tokens * 128), tokens * (rows + 4) * 4)
        if shared > whole - 1024:
            continue
        across = -(-matrix.blocks * ROWS // rows)
        experts = matrix.count if matmul.offsets else 0
        # The last tile of each expert is half full on average, and all `active` experts may have one.
        used = matmul.rows / tokens + matmul.active / 2 if experts else -(-matmul.rows // tokens)
        most = min(matmul.rows, matmul.rows // tokens + experts) if experts else -(-matmul.rows // tokens)
        time = math.ceil(across * used / info.multiprocessors) * rows * tokens / _GEMM_SPEED[tile]
        if best is None or time < best[0]:
            name = _gemm_name(matrix, matmul.activation, tile, fp8)
            best = time, Launch(name, (across, most, 1), _GEMM_THREADS, shared, _args(matmul, scales=scales))
    assert best is not None, "the smallest tile must fit every device"
    return best[1]


def _gemm_scales(matrix: GpuMatrix) -> str:
    return "plain" if not matrix.kind.scale_bytes else "row" if matrix.groups == 1 else "group"


def _gemm_tiles(scales: str) -> list[str]:
    """Return the tiles of a kernel. The largest has no registers left for scales or for unpacking weights."""
    return [tile for tile in _GEMM_TILES if scales == "plain" or tile != "256"]


def _gemm_name(matrix: GpuMatrix, activation: str, tile: str, fp8: bool) -> str:
    scales = _gemm_scales(matrix)
    # For FP8 times FP8, `activation` is only the type of y.
    inputs = f"fp8_fp8_{scales}_{activation}" if fp8 else f"{activation}_{matrix.kind}_{scales}"
    return f"linear_gemm_{inputs}_{tile}"


def _args(matmul: Matmul, *, scales: int = 0, split: int = 1, chunk: int = 0, x_tile: int = 0) -> bytes:
    matrix = matmul.matrix
    scales_at, zeros_at = _parts(matrix, matmul.blob)
    return _LINEAR_ARGS.pack(
        matmul.x, matmul.blob, scales_at, zeros_at, matmul.norm, matmul.residual, scales, matmul.y,
        matmul.row_map, matmul.offsets or matmul.bias,
        matrix.codes_stride, matrix.scales_stride, matrix.zeros_stride,
        matmul.rows, matrix.rows, matrix.columns, matrix.group, matrix.count if matmul.offsets else 0,
        matrix.swiglu, matmul.x_float, matmul.y_float, matmul.epsilon, matmul.rounding,
        split, chunk, x_tile,
    )  # fmt: skip


def _parts(matrix: GpuMatrix, blob: int) -> tuple[int, int]:
    return (
        blob + matrix.scales_offset if matrix.kind.scale_bytes else 0,
        blob + matrix.zeros_offset if matrix.zeros else 0,
    )


def _check(matrix: GpuMatrix, activation: str) -> None:
    if activation != "f32" and activation not in ACTIVATIONS:
        raise DeviceError(f"activation is {activation!r}, expected bf16, f16 or f32")
    kind = matrix.kind
    if activation != "f32" and kind in (GpuKind.FLOAT16, GpuKind.BFLOAT16, GpuKind.FLOAT32) and kind != activation:
        raise DeviceError(f"{kind} weights need {kind} activations, found {activation}")
    if matrix.columns % max(16, kind.columns) or matrix.columns < 16:
        raise DeviceError(f"{kind} has {matrix.columns} columns, expected a multiple of {max(16, kind.columns)}")
    if kind.scale_bytes and (matrix.group % 16 or matrix.columns % matrix.group):
        raise DeviceError(f"groups of {matrix.group} do not divide {matrix.columns} columns into multiples of 16")
    if matrix.swiglu and matrix.rows % 2:
        raise DeviceError(f"gate and up have {matrix.rows} rows together, expected an even number")


def _shared_limit(info: DeviceInfo) -> int:
    known = [capability for capability in _SHARED_KB if capability <= info.capability]
    return _SHARED_KB[max(known)] * 1024


# -- list of all kernels ---------------------------------------------------------------------------------------------


def _instantiations() -> dict[str, tuple[str, int, int, str]]:
    return dict(_all())


def _all() -> Iterator[tuple[str, tuple[str, int, int, str]]]:
    """Yield name and (struct, threads, blocks per multiprocessor, C++ of the body) of every kernel."""
    for a in ACTIVATIONS:
        for w in ("int4", "int8", "fp8", a):
            for width in _SKINNY_WIDTHS:
                body = f"linear_skinny<{a}, {TYPES[w]}, {width // 8}>"
                yield f"linear_skinny_{a}_{w}_n{width}", ("LinearArgs", _SKINNY_THREADS[width], 1, body)
            for scales in ("plain",) if w == a else ("row", "group"):
                yield from _gemms(f"{a}_{w}", "", a, w, scales)
        for scales in ("row", "group"):
            yield from _gemms("fp8_fp8", f"_{a}", a, "fp8", scales)
        yield f"convert_rows_{a}_{a}", ("RowsArgs", _ROW_THREADS, 1, f"convert_rows<{a}, {a}>")
        yield f"convert_rows_{a}_fp8", ("RowsArgs", _ROW_THREADS, 1, f"convert_rows<{a}, e4m3>")
    for w, kind in TYPES.items():
        yield f"linear_exact_f32_{w}", ("LinearArgs", 32 * _EXACT_WARPS, 1, f"linear_exact<{kind}>")
        yield f"quant_embedding_{w}_f32", ("EmbeddingArgs", _ROW_THREADS, 1, f"quant_embedding<{kind}>")
    for a, kind in (*((a, a) for a in ACTIVATIONS), ("f32", "float")):
        yield f"rms_norm_{a}_f32", ("RmsNormArgs", _ROW_THREADS, 1, f"rms_norm<{kind}>")
    yield "last_token_f32", ("LastTokenArgs", _ROW_THREADS, 1, "last_token<float>")
    yield "top_parts_f32", ("TopArgs", _ROW_THREADS, 1, "top_parts<float>")
    yield "top_all_f32", ("TopArgs", _ROW_THREADS, 1, "top_all<float>")


def _gemms(inputs: str, output: str, a: str, w: str, scales: str) -> Iterator[tuple[str, tuple[str, int, int, str]]]:
    fp8 = inputs == "fp8_fp8"
    flags = f"{str(fp8).lower()}, {str(scales == 'group').lower()}"
    for tile in _gemm_tiles(scales):
        rows, tokens, warps = _GEMM_TILES[tile]
        # Two blocks of the middle tile fit on a multiprocessor if there are no scales and no unpacking.
        blocks = 2 if (scales, tile) == ("plain", "128") else 1
        body = f"linear_gemm<{a}, {TYPES[w]}, {flags}, {rows}, {tokens}, {warps}>"
        yield f"linear_gemm_{inputs}_{scales}{output}_{tile}", ("LinearArgs", _GEMM_THREADS, blocks, body)
