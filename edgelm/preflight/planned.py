"""What an export would write for a checkpoint: every tensor of the weights file with its size, from the spec alone.

The exporters plan their weights file while they build a graph, which needs onnx and the checkpoint. This plans the same
tensors from config.json and the recipe, on any device; tests/export/test_preflight_sizes.py compares the two tensor by
tensor. The operators of the native set are kept too: their shapes are what is measured to predict speed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from edgelm.bundle import ModelInfo
from edgelm.bundle.cpu_layout import HEADER_BYTES, Kind, PackedMatrix, aligned
from edgelm.bundle.formats import (
    BlockFormat,
    CpuFormat,
    GpuFormat,
    block_format,
    block_of,
    cpu_format,
    float_format,
    gpu_format,
)
from edgelm.bundle.ort_providers import CPU, CUDA
from edgelm.errors import ExportError
from edgelm.models.spec import Attention, Block, Decoder, Dense, Matrix, MoE, Norm, Rope
from edgelm.quant.recipe import AUTO, Recipe
from edgelm.quant.scheme import AnyScheme, Scheme

TARGETS = ("cpu", "cuda", "tensorrt")
PAGE = 4096
_FLOAT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_PROVIDERS = {"cpu": CPU, "cuda": CUDA}
_INT8_ACTIVATIONS = (AUTO, "int8-token", "int8-static")
_PORTABLE_BITS = (4, 8)

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
    if target == "tensorrt" and asked == AUTO:
        return stored if stored in ("float16", "bfloat16") else "bfloat16"
    return asked if target == "tensorrt" else _PROVIDERS[target].float_dtype(asked, stored, quantises=quantises)


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
    """
    recipe = recipe.for_model(decoder)
    shapes = decoder.tensor_shapes

    def of_recipe(tensor: str) -> AnyScheme | None:
        return recipe.scheme_for(tensor, shapes[tensor])

    ops = {"cuda": "portable", "tensorrt": "gpu"}.get(target, ops)
    kind = {"native": _Native, "portable": _Portable, "gpu": _Gpu}[ops]
    made = kind(decoder, recipe, target, dtype, scheme or of_recipe)
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

    def kv(self) -> str:
        """Return the type of the KV cache by default."""
        return "float16" if self.recipe.kv == AUTO else self.recipe.kv

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
        """Return whether the activations of a matmul are rounded to int8 (`edgelm.export.activations`)."""
        return all(
            self.recipe.activations_for(matrix.name) in _INT8_ACTIVATIONS
            for matrix in matrices
            if isinstance(self.scheme(matrix.name), Scheme)
        )

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
        exact = self.recipe.default is None and all(rule.scheme is None for rule in self.recipe.rules)
        return self.recipe.kv if self.recipe.kv != AUTO else "float32" if exact else "float16"

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
                matrix = self._packed(matrices, swiglu=len(matrices) == 2)
                if matrix is None:
                    raise ExportError(
                        f"the recipe stores {expert.gate.name} and {expert.up.name} in types that cannot be combined: "
                        "gate and up are one matmul, so make both integers, both fp8 or both float"
                    )
                place = aligned(place) + matrix.nbytes
                found[name, matrix] = found.get((name, matrix), 0) + 1
        self.tensors[f"{stem}.experts"] = place
        int8 = self.int8([part.experts[0].gate])
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
        less = any(scheme is not None and scheme.bits < 8 for scheme in map(self.scheme, names))
        return less and self.int8((self.decoder.head,))

    def _packed(self, matrices: Sequence[Matrix], *, swiglu: bool = False) -> PackedMatrix | None:
        """Return how stacked matrices are stored; None if no format holds all of them."""
        schemes = [self.scheme(matrix.name) for matrix in matrices]
        quantized = [scheme for scheme in schemes if scheme is not None]
        columns, rows = matrices[0].columns, sum(matrix.rows for matrix in matrices)
        fmt: CpuFormat | None = float_format(self.dtype, columns)
        if quantized:
            same = len(quantized) == len(schemes)
            fmt = cpu_format(quantized, columns, matrices[0].name) if same else None
        return None if fmt is None else fmt.matrix(rows, columns, swiglu=swiglu)

    def _stored(
        self, matrices: Sequence[Matrix], stem: str, *, swiglu: bool = False, split: bool = False
    ) -> PackedMatrix | None:
        matrix = self._packed(matrices, swiglu=swiglu)
        if matrix is None:
            return None
        if split and matrix.kind is Kind.INT8 and not matrix.zeros:
            matrix = replace(matrix, kind=Kind.INT8_SPLIT)
            matrix = matrix.with_low_offset(aligned(matrix.first_bytes, PAGE))
            self.tensors[f"{stem}.lower"] = matrix.low_bytes
        self.tensors.setdefault(stem, matrix.first_bytes)
        return matrix


class _Gpu(_Builder):
    """As `edgelm.export.graph.gpu`."""

    def kv(self) -> str:
        if self.recipe.kv == "float32":
            raise ExportError(
                f'recipe {self.recipe.name} has kv = "float32", which is not supported on GPUs: leave kv out, or '
                "choose float16, int8 or fp8"
            )
        return super().kv()

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
        fmt: GpuFormat | None = gpu_format([self.scheme(name) for name in names], self.dtype, columns, stem)
        if fmt is None:
            raise ExportError(
                f"the recipe gives {names[0]} .. {names[-1]} types that one matmul on a GPU cannot have: make all of "
                "them integers, all FP8 or all float"
            )
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
        if self.recipe.kv not in (AUTO, self.compute):
            raise ExportError(
                f'recipe {self.recipe.name} has kv = "{self.recipe.kv}", but portable operators support only '
                f"{self.compute} caches here: export for the CPU with --ops native, or leave kv out of the recipe"
            )
        return self.compute

    def embedding(self, table: Matrix) -> None:
        scheme = self.scheme(table.name)
        if scheme is not None and scheme.has_zeros and self.provider.whole_zero_rows:
            fmt = self._format((table,))
            if fmt.blocks(table.columns) * fmt.bits % 8:
                raise ExportError(
                    f"{table.name} has {fmt.blocks(table.columns)} groups per row with zero points of {fmt.bits} bits, "
                    f"which {self.provider.title} computes wrongly: give it a symmetric scheme in the recipe"
                )
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
        del layer
        self.tensors[part.router.name] = 4 * part.router.rows * part.router.columns
        flat = [matrix for expert in part.experts for matrix in expert.matrices]
        one, count = part.experts[0], len(part.experts)
        shapes = (("gate_up", 2 * one.gate.rows, one.gate.columns), ("down", one.down.rows, one.down.columns))
        kept = [matrix.name for matrix in flat if self.scheme(matrix.name) is None]
        if kept and len(kept) < len(flat):
            raise ExportError(
                f"{kept[0]} stays float in this recipe, which quantises other experts of its layer: the experts of a "
                "layer are one operator, so quantise all of them or none"
            )
        if kept:
            for which, rows, columns in shapes:
                self.tensors[f"{stem}.{which}"] = count * rows * columns * _FLOAT_BYTES[self.dtype]
            return
        fmt = self._format(flat)
        for name, columns in ((one.gate.name, one.gate.columns), (one.down.name, one.down.columns)):
            problem = self.provider.expert_problem(fmt.block, columns)
            if problem is not None:
                raise ExportError(f"{name} {problem}")
        int8 = self.int8(flat)
        if self.provider.rounds_activations and not int8 and fmt.bits == 8:
            raise ExportError(
                f"{flat[0].name} has float activations in this recipe, but ONNX Runtime's MoE operator always rounds "
                "the inputs of 8-bit experts to int8: export with --ops native, or leave activations out of the recipe"
            )
        for which, rows, columns in shapes:
            self._quantized(f"{stem}.{which}", count * rows, columns, fmt)

    def head(self, matrix: Matrix) -> None:
        self._matrices((matrix,), matrix.name.removesuffix(".weight"))

    def _format(self, matrices: Sequence[Matrix]) -> BlockFormat:
        found = []
        for matrix in matrices:
            scheme = self.scheme(matrix.name)
            if not isinstance(scheme, Scheme) or scheme.bits not in _PORTABLE_BITS:
                raise ExportError(
                    f"{matrix.name} is {'float' if scheme is None else scheme.name} in this recipe, but ONNX Runtime's "
                    "own operators support only int4 and int8: choose another recipe, or native operators"
                )
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
