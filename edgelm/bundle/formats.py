"""Formats of quantised matrices and types of the KV cache in each operator set: what a recipe becomes in a bundle.

The export packs matrices in these formats, and the preflight computes sizes and speeds from them before anything is
packed. A matrix that is stacked with others of more bits or smaller groups takes the finest format of all, which holds
each of them exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgelm.bundle.cpu_layout import Kind, PackedMatrix, Scales, stored_group
from edgelm.bundle.gpu_layout import GpuKind, GpuMatrix
from edgelm.errors import ExportError
from edgelm.quant.recipe import AUTO, Recipe
from edgelm.quant.scheme import MIN_GROUP, Fp8Scheme, Scheme

GPU_ACTIVATIONS = ("bfloat16", "float16")
"""Types of activations that the GPU kernels compute with."""
_CPU_FLOATS = {"float16": Kind.FLOAT16, "bfloat16": Kind.BFLOAT16, "float32": Kind.FLOAT32}
_CPU_INTEGERS = {3: Kind.INT3, 4: Kind.INT4, 5: Kind.INT5, 6: Kind.INT6, 8: Kind.INT8}
_GPU_FLOATS = {"float16": GpuKind.FLOAT16, "bfloat16": GpuKind.BFLOAT16, "float32": GpuKind.FLOAT32}


@dataclass(frozen=True)
class CpuFormat:
    """Format of a packed matrix with any number of rows.

    Attributes:
        kind: Type of the weights.
        scales: Type of the scales.
        zeros: Whether zero points are stored.
        group: Columns that share a scale.
    """

    kind: Kind
    scales: Scales
    zeros: bool
    group: int

    @property
    def split(self) -> CpuFormat:
        """The format of the same matrix in split nibbles; only int8 without zero points has one, others stay."""
        return replace(self, kind=Kind.INT8_SPLIT) if self.kind is Kind.INT8 and not self.zeros else self

    def matrix(self, rows: int, columns: int, *, swiglu: bool = False) -> PackedMatrix:
        """Return the description of a matrix of this format."""
        return PackedMatrix(self.kind, self.scales, self.zeros, swiglu, rows, columns, self.group)


def float_format(dtype: str, columns: int) -> CpuFormat:
    """Return the format of an unquantised matrix; `dtype` is "float16", "bfloat16" or "float32"."""
    return CpuFormat(_CPU_FLOATS[dtype], Scales.NONE, False, columns)


def cpu_format(schemes: Sequence[Any], columns: int, name: str) -> CpuFormat | None:
    """Return the format that holds rows of all these schemes exactly, or None if there is none.

    Args:
        schemes: Effective schemes (`edgelm.quant.scheme`), each with its final group.
        columns: Columns of every row.
        name: Name of the matrix in errors.

    Raises:
        ExportError: The layout does not support one of the schemes: FP8 E5M2.
    """
    _require_e4m3(schemes, name, "native operators")
    finest = min((scheme.group for scheme in schemes if scheme.group is not None), default=None)
    integer = [isinstance(scheme, Scheme) for scheme in schemes]
    if not any(integer):
        return CpuFormat(Kind.FP8, Scales.FLOAT32, False, stored_group(Kind.FP8, finest, columns))
    if not all(integer):
        return None
    kind = _CPU_INTEGERS[max(scheme.bits for scheme in schemes)]
    zeros = not all(scheme.symmetric for scheme in schemes)
    return CpuFormat(kind, Scales.FLOAT16, zeros, stored_group(kind, finest, columns))


def _require_e4m3(schemes: Sequence[Any], name: str, who: str) -> None:
    for scheme in schemes:
        if isinstance(scheme, Fp8Scheme) and scheme.form != "e4m3":
            raise ExportError(
                f"{name} is {scheme.name} in this recipe, but the {who} support only E4M3 of the FP8 types: choose "
                f"{Fp8Scheme(scheme.group).name} in the recipe, or keep it float"
            )


def require_gate_and_up(fmt: CpuFormat | None, gate: str, up: str) -> CpuFormat:
    """Return the format of an expert's gate and up, whose names are given.

    Raises:
        ExportError: There is none.
    """
    if fmt is None:
        raise ExportError(
            f"the recipe stores {gate} and {up} in types that cannot be combined: gate and up are one matmul, so make "
            "both integers, both fp8 or both float"
        )
    return fmt


def splits_head(layer_schemes: Iterable[Any]) -> bool:
    """Return whether an int8 head with int8 activations is stored as split nibbles.

    Most logits are then computed from the high nibbles only. That is right only if some matrix of the layers has fewer
    than 8 bits: then the layers lose more than the head does.
    """
    return any(scheme is not None and scheme.bits < 8 for scheme in layer_schemes)


@dataclass(frozen=True)
class GpuFormat:
    """Format of a packed matrix with any number of rows.

    Attributes:
        kind: Type of the weights.
        group: Columns that share a scale.
        zeros: Whether zero points are stored.
    """

    kind: GpuKind
    group: int
    zeros: bool = False

    def matrix(self, rows: int, columns: int, *, swiglu: bool = False, count: int = 1) -> GpuMatrix:
        """Return the description of a blob of `count` matrices; with `swiglu`, `rows` counts gate and up together."""
        return GpuMatrix(self.kind, rows, columns, self.group, self.zeros, swiglu, count)


def gpu_format(schemes: Sequence[Any], dtype: str, columns: int, name: str) -> GpuFormat | None:
    """Return the format that holds rows of all these schemes exactly, or None if there is none.

    Args:
        schemes: Effective schemes (`edgelm.quant.scheme`); None for an unquantised matrix.
        dtype: Type of unquantised matrices: "float16", "bfloat16" or "float32".
        columns: Columns of every row.
        name: Name of the matrix in errors.

    Raises:
        ExportError: The layout does not support one of the schemes, or rows of this width.
    """
    quantized = [scheme for scheme in schemes if scheme is not None]
    if quantized and len(quantized) < len(schemes):
        return None
    fp8 = [isinstance(scheme, Fp8Scheme) for scheme in quantized]
    if any(fp8) and not all(fp8):
        return None
    if not quantized:
        fmt = GpuFormat(_GPU_FLOATS[dtype], columns)
    else:
        _require_e4m3(quantized, name, "GPU kernels")
        group = min(scheme.group_size(columns) for scheme in quantized)
        if all(fp8):
            fmt = GpuFormat(GpuKind.FP8, group)
        else:
            kind = GpuKind.INT4 if max(scheme.bits for scheme in quantized) <= 4 else GpuKind.INT8
            fmt = GpuFormat(kind, group, not all(scheme.symmetric for scheme in quantized))
    if columns % fmt.kind.columns:
        stored = quantized[0].name if quantized else dtype
        kinds = {"int8 or fp8": GpuKind.INT8, "float16 or bfloat16": GpuKind.FLOAT16, "float32": GpuKind.FLOAT32}
        fitting = [text for text, kind in kinds.items() if columns % kind.columns == 0]
        raise ExportError(
            f"{name} is {stored} with rows of {columns} ({width_field(name)} in config.json), but the GPU kernels "
            f"support {fmt.kind.label} only in rows of a multiple of {fmt.kind.columns}. "
            + (f"Choose {' or '.join(fitting)} for it in the recipe" if fitting else "Export for the CPU: --target cpu")
        )
    return fmt


def require_gpu_format(
    schemes: Sequence[Any], dtype: str, columns: int, name: str, members: Sequence[str]
) -> GpuFormat:
    """Return the format of matrices that are one matmul on a GPU; as `gpu_format`.

    Raises:
        ExportError: There is none: `members`, the names of the matrices, have types that cannot be combined.
    """
    found = gpu_format(schemes, dtype, columns, name)
    if found is None:
        said = ", ".join("float" if s is None else s.name for s in dict.fromkeys(schemes))
        raise ExportError(
            f"the recipe has {said} for {members[0]} .. {members[-1]}, which are one matmul on a GPU: make all of them "
            "integers, all FP8 or all float"
        )
    return found


def gpu_float_type(asked: str, stored: str) -> str:
    """Return the type of activations and float matrices on a GPU; for "auto" that of the checkpoint, if it can be.

    Raises:
        ExportError: The kernels do not compute with the type asked for.
    """
    if asked == AUTO:
        return stored if stored in GPU_ACTIVATIONS else "bfloat16"
    if asked not in GPU_ACTIVATIONS:
        raise ExportError(
            f"the GPU kernels compute in bfloat16 or float16, not {asked}: export with --dtype bf16 or fp16, or with "
            "--target cpu"
        )
    return asked


# MLAS has n-bit kernels for this block size. One scale per row is stored as equal scales of such blocks.
ROW_BLOCK = 128


@dataclass(frozen=True)
class BlockFormat:
    """Format of an n-bit operator's weight.

    Attributes:
        bits: Bits of a code.
        block: Weights that share a scale.
        zeros: Whether zero points are stored.
    """

    bits: int
    block: int
    zeros: bool

    def code_bytes(self, columns: int) -> int:
        """Return the bytes of one row's codes."""
        return columns * self.bits // 8

    def blocks(self, columns: int) -> int:
        """Return the number of blocks, and so of scales, in one row."""
        return columns // self.block

    def zero_bytes(self, columns: int) -> int:
        """Return the bytes of one row's packed zero points."""
        return -(-self.blocks(columns) * self.bits // 8)


def width_field(name: str) -> str:
    """Return the field of config.json that determines the number of columns of a matrix, for messages."""
    if name.endswith("down_proj.weight"):
        return "intermediate_size"
    return "num_attention_heads * head_dim" if name.endswith("o_proj.weight") else "hidden_size"


def block_of(scheme: Scheme, columns: int, name: str = "the matrix") -> int:
    """Return the weights per block for rows of `columns` weights of an effective scheme.

    Raises:
        ExportError: No supported block divides the row.
    """
    largest = columns & -columns  # power of two that divides the row
    if largest < MIN_GROUP:
        raise ExportError(
            f"{name} is {scheme.name} with rows of {columns} ({width_field(name)} in config.json), but ONNX Runtime's "
            f"own operators support quantised rows only in multiples of {MIN_GROUP}. Export with --target cpu --ops "
            "native, which supports any width, or keep such matrices float in the recipe"
        )
    return min(largest, ROW_BLOCK) if scheme.group is None else scheme.group


def block_format(schemes: Sequence[tuple[str, Scheme, int]], largest: int | None = None) -> BlockFormat:
    """Return the format that holds all matrices `(name, scheme, columns)` exactly.

    It has the most bits and the smallest block of all, and zero points if any has them. A group larger than `largest`
    is stored as several blocks of that many weights with equal scales.

    Raises:
        ExportError: No supported block divides the rows of one matrix.
    """
    block = min(block_of(scheme, columns, name) for name, scheme, columns in schemes)
    return BlockFormat(
        bits=max(scheme.bits for _, scheme, _ in schemes),
        block=block if largest is None else min(block, largest),
        zeros=not all(scheme.symmetric for _, scheme, _ in schemes),
    )


def native_kv(recipe: Recipe) -> str:
    """Return the default type of the KV cache of native operators.

    It is the recipe's, if given; otherwise float16, or float32 if the recipe quantises nothing.
    """
    exact = recipe.default is None and all(rule.scheme is None for rule in recipe.rules)
    return recipe.kv if recipe.kv != AUTO else "float32" if exact else "float16"


def gpu_kv(recipe: Recipe) -> str:
    """Return the type of the KV cache of the GPU kernels.

    Raises:
        ExportError: They do not have the recipe's.
    """
    if recipe.kv == "float32":
        raise ExportError(
            f'recipe {recipe.name} has kv = "float32", which is not supported on GPUs: leave kv out, or choose '
            "float16, int8 or fp8"
        )
    # float16 is finer than bfloat16, and keys and values stay far below its limit of 65504.
    return "float16" if recipe.kv == AUTO else recipe.kv


def portable_kv(recipe: Recipe, compute: str) -> str:
    """Return the type of the KV cache of portable operators, which is the activations' type `compute`.

    Raises:
        ExportError: The recipe asks for another.
    """
    if recipe.kv not in (AUTO, compute):
        raise ExportError(
            f'recipe {recipe.name} has kv = "{recipe.kv}", but portable operators support only {compute} caches here: '
            "export for the CPU with --ops native, or leave kv out of the recipe"
        )
    return compute
