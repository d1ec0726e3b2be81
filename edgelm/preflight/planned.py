"""What an export would write for a checkpoint: every tensor of the weights file with its size, from the spec alone.

The exporters plan their weights file while they build a graph, which needs onnx and the checkpoint. This plans the same
tensors from config.json and the recipe, on any device; tests/export/test_preflight_sizes.py compares the two tensor by
tensor. The operators of the native set are kept too: their shapes are what is measured to predict speed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgelm.bundle import ModelInfo
from edgelm.bundle.activations import CPU as CPU_ACTIVATIONS
from edgelm.bundle.activations import INT8
from edgelm.bundle.cpu_layout import HEADER_BYTES, Kind, PackedMatrix, aligned
from edgelm.bundle.formats import (
    BlockFormat,
    CpuFormat,
    block_format,
    block_of,
    cpu_format,
    float_format,
    gpu_float_type,
    gpu_kv,
    native_kv,
    portable_kv,
    require_gate_and_up,
    require_gpu_format,
    splits_head,
)
from edgelm.bundle.ort_providers import CPU, CUDA, SOME_EXPERTS_FLOAT
from edgelm.errors import ExportError
from edgelm.models.spec import Attention, Block, Decoder, Dense, Matrix, MoE, Norm, Rope
from edgelm.quant.recipe import Recipe
from edgelm.quant.scheme import AnyScheme, Scheme

TARGETS = ("cpu", "cuda", "tensorrt")
PAGE = 4096
_FLOAT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_PROVIDERS = {"cpu": CPU, "cuda": CUDA}

SchemeOf = Callable[[str], AnyScheme | None]


@dataclass(frozen=True)
class Matmul:
    """A matmul of the native operators.

    Attributes:
        part: "qkv", "o", "gate and up", "down", "router" or "head".
        matrix: how its weights are stored.
        count: matrices of this shape in the layer, such as its experts.
        active: how many of them a token uses.
        layer: the layer; None for the head.
        int8: whether activations are rounded to int8.
    """

    part: str
    matrix: PackedMatrix
    count: int = 1
    active: int = 1
    layer: int | None = None
    int8: bool = True


@dataclass(frozen=True)
class Planned:
    """A bundle that does not exist yet.

    Attributes:
        decoder: the model.
        info: its shapes, as a manifest has them.
        recipe: how it is quantised.
        target, ops: kind of device and operator set.
        dtype: type of the matrices that the recipe does not quantise.
        kv: type of the KV cache by default.
        tensors: name and size in bytes of each tensor of the weights file.
        matmuls: the matmuls in the order of the forward pass; empty for other operator sets than "native".
    """

    decoder: Decoder
    info: ModelInfo
    recipe: Recipe
    target: str
    ops: str
    dtype: str
    kv: str
    tensors: dict[str, int]
    matmuls: tuple[Matmul, ...] = ()

    @property
    def weights_bytes(self) -> int:
        """Size of the weights file: tensors begin at pages."""
        return sum(aligned(size, PAGE) for size in self.tensors.values())


def float_type(asked: str, stored: str, target: str, *, quantises: bool) -> str:
    """Return the type in which the matrices are stored that the recipe does not quantise, as the exporters choose it.

    Args:
        asked: "auto", or a type.
        stored: the type of most of the checkpoint's float values.
        target: kind of device.
        quantises: whether the recipe quantises any matrix.
    """
    if target == "tensorrt":
        return gpu_float_type(asked, stored)
    return _PROVIDERS[target].float_dtype(asked, stored, quantises=quantises)


def plan(
    decoder: Decoder,
    recipe: Recipe,
    *,
    name: str = "model",
    target: str = "cpu",
    ops: str = "native",
    dtype: str = "bfloat16",
    scheme: SchemeOf | None = None,
) -> Planned:
    """Plan the bundle of a model.

    Args:
        decoder: the spec.
        recipe: how to quantise it.
        name: hub id or folder, for the manifest.
        target: "cpu", "cuda" or "tensorrt".
        ops: on a CPU "native" or "portable"; other targets have one operator set.
        dtype: type of the matrices that the recipe does not quantise.
        scheme: the scheme of each tensor, for a checkpoint that is quantised already; None for the recipe's.

    Raises:
        ExportError: the target does not support what the recipe asks for.
        RecipeError: a pattern of the recipe matches no tensor.
    """
    recipe = recipe.for_model(decoder)
    shapes = decoder.tensor_shapes
    if scheme is None:
        recipe.check(shapes)

    def of_recipe(tensor: str) -> AnyScheme | None:
        return recipe.scheme_for(tensor, shapes[tensor])

    ops = {"cuda": "portable", "tensorrt": "gpu"}.get(target, ops)
    kinds: dict[str, type[_Builder]] = {"native": _Native, "portable": _Portable, "gpu": _Gpu}
    made = kinds[ops](decoder, recipe, target, dtype, scheme or of_recipe)
    made.build()
    return Planned(
        decoder=decoder,
        info=ModelInfo.of(decoder, name),
        recipe=recipe,
        target=target,
        ops=ops,
        dtype=dtype,
        kv=made.kv(),
        tensors=made.tensors,
        matmuls=tuple(made.matmuls),
    )


class _Builder(ABC):
    """Walks over a decoder and notes the tensors that an operator set stores. `vector`: bytes of a norm's values."""

    vector = 4

    def __init__(self, decoder: Decoder, recipe: Recipe, target: str, dtype: str, scheme: SchemeOf) -> None:
        self.decoder = decoder
        self.recipe = recipe
        self.target = target
        self.dtype = dtype
        self.scheme = scheme
        self.tensors: dict[str, int] = {}
        self.matmuls: list[Matmul] = []
        self._tables: dict[Rope | None, str] = {}

    def build(self) -> None:
        decoder = self.decoder
        self.rotary(decoder.attention[0].rope)
        self.embedding(decoder.embed)
        for block in decoder.blocks:
            self.block(block)
        self.norm(decoder.norm)
        self.head(decoder.head)

    def block(self, block: Block) -> None:
        part, stem = block.part, f"layers.{block.layer}"
        self.norm(block.before)
        if isinstance(part, Attention):
            self.linear((part.q, part.k, part.v), f"{stem}.attn.qkv", "qkv")
            self.rotary(part.rope)
            self.norm(part.q_norm)
            self.norm(part.k_norm)
            self.linear((part.o,), f"{stem}.attn.o", "o")
        elif isinstance(part, Dense):
            self.linear((part.gate, part.up), f"{stem}.mlp.gate_up", "gate and up", swiglu=True)
            self.linear((part.down,), f"{stem}.mlp.down", "down")
        else:
            self.moe(part, f"{stem}.moe", block.layer)
        self.norm(block.after)

    @abstractmethod
    def kv(self) -> str:
        """Return the type of the KV cache by default."""

    def positions(self) -> int:
        """Return the rows of a RoPE table."""
        return self.decoder.context_length

    def rotary(self, rope: Rope | None) -> None:
        if rope in self._tables:
            return
        stem = f"rope.{len(self._tables)}" if self._tables else "rope"
        self._tables[rope] = stem
        for half in ("cos", "sin"):
            size = self.vector * self.positions() * (self.decoder.attention[0].head_dim // 2)
            self.tensors[f"{stem}.{half}"] = size

    def norm(self, norm: Norm | None) -> None:
        if norm is not None:
            self.tensors[norm.name] = self.vector * norm.size

    def bias(self, matrices: Sequence[Matrix], stem: str) -> None:
        if any(matrix.bias for matrix in matrices):
            self.tensors[f"{stem}.bias"] = self.vector * sum(matrix.rows for matrix in matrices)

    def int8(self, matrices: Sequence[Matrix]) -> bool:
        """Return whether the activations of a matmul are rounded to int8."""
        return CPU_ACTIVATIONS.of_matmul(self, [matrix.name for matrix in matrices]) == INT8

    def experts_activations(self, part: MoE, layer: int) -> str:
        """Return the type of the activations of a layer's experts."""
        names = [matrix.name for expert in part.experts for matrix in expert.matrices]
        return CPU_ACTIVATIONS.of_experts(self, names, layer)

    @abstractmethod
    def embedding(self, table: Matrix) -> None:
        """Plan the embedding table."""

    @abstractmethod
    def linear(self, matrices: Sequence[Matrix], out: str, part: str, *, swiglu: bool = False) -> None:
        """Plan matrices that are multiplied with one input, as tensors named `out`."""

    @abstractmethod
    def moe(self, part: MoE, stem: str, layer: int) -> None:
        """Plan router and experts of a layer."""

    @abstractmethod
    def head(self, matrix: Matrix) -> None:
        """Plan the output head."""


class _Native(_Builder):
    """As `edgelm.export.graph.native`."""

    def kv(self) -> str:
        return native_kv(self.recipe)

    def embedding(self, table: Matrix) -> None:
        self._stored((table,), table.name, split=self.decoder.tied and self._splits_head())

    def linear(self, matrices: Sequence[Matrix], out: str, part: str, *, swiglu: bool = False) -> None:
        stem = matrices[0].name if len(matrices) == 1 else f"{out}.weight"
        found = self._stored(matrices, stem, swiglu=swiglu)
        if found is not None:
            self._matmul(part, found, matrices)
            self.bias(matrices, out)
            return
        for i, matrix in enumerate(matrices):
            alone = self._stored((matrix,), matrix.name)
            assert alone is not None, "one matrix has one format"
            self._matmul(part, alone, (matrix,))
            self.bias((matrix,), f"{out}.{i}")

    def moe(self, part: MoE, stem: str, layer: int) -> None:
        router = float_format("float32", part.router.columns).matrix(part.router.rows, part.router.columns)
        self.tensors[part.router.name] = router.nbytes
        self.matmuls.append(Matmul("router", router, layer=layer, int8=False))
        place = HEADER_BYTES + 16 * len(part.experts)
        found: dict[tuple[str, PackedMatrix], int] = {}
        for expert in part.experts:
            for name, matrices in (("gate and up", (expert.gate, expert.up)), ("down", (expert.down,))):
                fmt = require_gate_and_up(self._format(matrices), expert.gate.name, expert.up.name)
                matrix = _packed(fmt, matrices, swiglu=len(matrices) == 2)
                place = aligned(place) + matrix.nbytes
                found[name, matrix] = found.get((name, matrix), 0) + 1
        self.tensors[f"{stem}.experts"] = place
        int8 = self.experts_activations(part, layer) == INT8
        for (name, matrix), count in found.items():
            active = part.k * count / len(part.experts)
            self.matmuls.append(Matmul(name, matrix, count, max(1, round(active)), layer, int8))

    def head(self, matrix: Matrix) -> None:
        found = self._stored((matrix,), matrix.name, split=self._splits_head())
        assert found is not None, "one matrix has one format"
        self._matmul("head", found, (matrix,))

    def _matmul(self, part: str, found: PackedMatrix, matrices: Sequence[Matrix]) -> None:
        self.matmuls.append(Matmul(part, found, layer=matrices[0].layer, int8=self.int8(matrices)))

    def _splits_head(self) -> bool:
        names = (name for name, matrix in self.decoder.matrices.items() if matrix.layer is not None)
        return splits_head(map(self.scheme, names)) and self.int8((self.decoder.head,))

    def _format(self, matrices: Sequence[Matrix]) -> CpuFormat | None:
        """Return the format of stacked matrices; None if none holds all of them."""
        schemes = [self.scheme(matrix.name) for matrix in matrices]
        quantized = [scheme for scheme in schemes if scheme is not None]
        columns = matrices[0].columns
        if not quantized:
            return float_format(self.dtype, columns)
        return cpu_format(quantized, columns, matrices[0].name) if len(quantized) == len(schemes) else None

    def _stored(
        self, matrices: Sequence[Matrix], stem: str, *, swiglu: bool = False, split: bool = False
    ) -> PackedMatrix | None:
        fmt = self._format(matrices)
        if fmt is None:
            return None
        matrix = _packed(fmt.split if split else fmt, matrices, swiglu=swiglu)
        if matrix.kind is Kind.INT8_SPLIT:
            matrix = matrix.with_low_offset(aligned(matrix.first_bytes, PAGE))
            self.tensors[f"{stem}.lower"] = matrix.low_bytes
        self.tensors.setdefault(stem, matrix.first_bytes)
        return matrix


def _packed(fmt: CpuFormat, matrices: Sequence[Matrix], *, swiglu: bool) -> PackedMatrix:
    """Return how stacked matrices are stored."""
    return fmt.matrix(sum(matrix.rows for matrix in matrices), matrices[0].columns, swiglu=swiglu)


class _Gpu(_Builder):
    """As `edgelm.export.graph.gpu`."""

    def kv(self) -> str:
        return gpu_kv(self.recipe)

    def positions(self) -> int:
        return aligned(self.decoder.context_length, 64)

    def embedding(self, table: Matrix) -> None:
        self._blob([(table,)], table.name)

    def linear(self, matrices: Sequence[Matrix], out: str, part: str, *, swiglu: bool = False) -> None:
        del part
        self._blob([matrices], matrices[0].name if len(matrices) == 1 else f"{out}.weight", swiglu=swiglu)
        self.bias(matrices, out)

    def moe(self, part: MoE, stem: str, layer: int) -> None:
        del layer
        self.tensors[part.router.name] = 4 * part.router.rows * part.router.columns
        self._blob([(expert.gate, expert.up) for expert in part.experts], f"{stem}.gate_up", swiglu=True)
        self._blob([(expert.down,) for expert in part.experts], f"{stem}.down")

    def head(self, matrix: Matrix) -> None:
        self._blob([(matrix,)], matrix.name)

    def _blob(self, groups: Sequence[Sequence[Matrix]], stem: str, *, swiglu: bool = False) -> None:
        names = [matrix.name for matrices in groups for matrix in matrices]
        columns = groups[0][0].columns
        fmt = require_gpu_format([self.scheme(name) for name in names], self.dtype, columns, stem, names)
        rows = sum(matrix.rows for matrix in groups[0])
        self.tensors[stem] = fmt.matrix(rows, columns, swiglu=swiglu, count=len(groups)).nbytes


class _Portable(_Builder):
    """As `edgelm.export.graph.portable`."""

    def __init__(self, decoder: Decoder, recipe: Recipe, target: str, dtype: str, scheme: SchemeOf) -> None:
        super().__init__(decoder, recipe, target, dtype, scheme)
        self.provider = _PROVIDERS[target]
        self.compute = self.provider.compute_type(dtype)
        self.vector = _FLOAT_BYTES[self.compute]

    def kv(self) -> str:
        return portable_kv(self.recipe, self.compute)

    def embedding(self, table: Matrix) -> None:
        scheme = self.scheme(table.name)
        if scheme is not None and scheme.has_zeros:
            fmt = self._format((table,))
            _refuse(table.name, self.provider.table_problem(fmt.blocks(table.columns), fmt.bits))
        self._matrices((table,), table.name.removesuffix(".weight"))

    def linear(self, matrices: Sequence[Matrix], out: str, part: str, *, swiglu: bool = False) -> None:
        del part, swiglu
        quantized = [self.scheme(matrix.name) is not None for matrix in matrices]
        if len(matrices) == 1:
            self._matrices(matrices, matrices[0].name.removesuffix(".weight"))
        elif all(quantized):
            self._matrices(matrices, f"{out}.product" if any(matrix.bias for matrix in matrices) else out)
        else:
            for matrix in matrices:
                self._matrices((matrix,), matrix.name.removesuffix(".weight"))
        self.bias(matrices, out)

    def moe(self, part: MoE, stem: str, layer: int) -> None:
        self.tensors[part.router.name] = 4 * part.router.rows * part.router.columns
        flat = [matrix for expert in part.experts for matrix in expert.matrices]
        one, count = part.experts[0], len(part.experts)
        shapes = (("gate_up", 2 * one.gate.rows, one.gate.columns), ("down", one.down.rows, one.down.columns))
        kept = [matrix.name for matrix in flat if self.scheme(matrix.name) is None]
        if kept and len(kept) < len(flat):
            _refuse(kept[0], SOME_EXPERTS_FLOAT)
        if kept:
            for which, rows, columns in shapes:
                self.tensors[f"{stem}.{which}"] = count * rows * columns * _FLOAT_BYTES[self.dtype]
            return
        fmt = self._format(flat)
        for name, columns in ((one.gate.name, one.gate.columns), (one.down.name, one.down.columns)):
            _refuse(name, self.provider.expert_problem(fmt.block, columns))
        kind = self.experts_activations(part, layer)
        _refuse(flat[0].name, self.provider.expert_activations_problem(kind, fmt.bits))
        for which, rows, columns in shapes:
            self._quantized(f"{stem}.{which}", count * rows, columns, fmt)

    def head(self, matrix: Matrix) -> None:
        self._matrices((matrix,), matrix.name.removesuffix(".weight"))

    def _format(self, matrices: Sequence[Matrix]) -> BlockFormat:
        found = []
        for matrix in matrices:
            scheme = self.scheme(matrix.name)
            _refuse(matrix.name, self.provider.scheme_problem(scheme))
            assert isinstance(scheme, Scheme), matrix.name
            block_of(scheme, matrix.columns, matrix.name)
            found.append((matrix.name, scheme, matrix.columns))
        return block_format(found, self.provider.largest_block())

    def _matrices(self, matrices: Sequence[Matrix], stem: str) -> None:
        rows, columns = sum(matrix.rows for matrix in matrices), matrices[0].columns
        if self.scheme(matrices[0].name) is None:
            self.tensors[matrices[0].name] = rows * columns * _FLOAT_BYTES[self.dtype]
        else:
            self._quantized(stem, rows, columns, self._format(matrices))

    def _quantized(self, stem: str, rows: int, columns: int, fmt: BlockFormat) -> None:
        self.tensors[f"{stem}.qweight"] = rows * fmt.code_bytes(columns)
        self.tensors[f"{stem}.scales"] = rows * fmt.blocks(columns) * _FLOAT_BYTES[self.compute]
        if fmt.zeros:
            self.tensors[f"{stem}.zeros"] = rows * fmt.zero_bytes(columns)


def _refuse(name: str, problem: str | None) -> None:
    """Raise an `ExportError` about the matrix `name` if there is a problem."""
    if problem is not None:
        raise ExportError(f"{name} {problem}")
