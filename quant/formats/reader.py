"""Open another tool's checkpoint with the interface of our own (`edgelm.quant.formats.edgelm.Stored`)."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from edgelm.errors import CheckpointError, UnsupportedConfigError
from edgelm.models.spec import EMBEDDING, HEAD
from edgelm.quant.formats.awq import Awq
from edgelm.quant.formats.base import Format, Matrix, float32_of
from edgelm.quant.formats.compressed_tensors import CompressedTensors
from edgelm.quant.formats.config import ADVICE, Settings, unsupported
from edgelm.quant.formats.fp8 import Fp8
from edgelm.quant.formats.gptq import Gptq
from edgelm.quant.recipe import AUTO, FLOAT, Recipe, Rule, of_role
from edgelm.quant.scheme import AnyScheme
from edgelm.quant.tensor import QuantTensor

if TYPE_CHECKING:
    from edgelm.checkpoint import Checkpoint

FORMATS: Mapping[str, type[Format]] = {
    "gptq": Gptq,
    "awq": Awq,
    "compressed-tensors": CompressedTensors,
    "fp8": Fp8,
}
"""Supported values of `quantization_config.quant_method`, besides EdgeLM's own."""

# Settings that add computations to a matmul; the compressed-tensors reader checks its own.
_ADDITIONS = ("sparsity_config", "rotation", "adapter")

_KEPT = 2
"""Tensors that each thread keeps in memory, because an expert's gate and up are read alternately."""


def format_of(settings: Settings) -> Format:
    """Return the reader for a `quantization_config`.

    Raises:
        UnsupportedConfigError: The format, or a value of one of its fields, is not supported.
    """
    method = settings.get("quant_method")
    if not isinstance(method, str) or method not in FORMATS:
        raise UnsupportedConfigError(
            f"config.json says that the weights are quantised by {method!r}, but only edgelm, {', '.join(FORMATS)} are "
            f"supported: {ADVICE}"
        )
    if method != "compressed-tensors":
        for key in _ADDITIONS:
            if settings.get(key):
                raise unsupported(key, settings[key], "none")
    return FORMATS[method](settings)


def recipe_of(settings: Settings) -> Recipe:
    """Return the recipe as far as the config alone determines it: the name, the default, and the usual exceptions.

    `FormatWeights.recipe` is exact.

    Raises:
        UnsupportedConfigError: As `format_of`.
    """
    found = format_of(settings)
    kept = (EMBEDDING, "router", *(() if settings.get("lm_head") else (HEAD,)))
    return Recipe(found.name, found.default, tuple(of_role(role, None) for role in kept))


class FormatWeights:
    """The tensors of another tool's checkpoint, read by their float names.

    Attributes:
        shapes: Shape of every tensor, as in float.
        recipe: A recipe that gives every matrix its stored scheme.

    Raises:
        CheckpointError: A part is missing, or a scheme cannot be represented exactly. Values are checked later, when
            they are read.
    """

    def __init__(self, checkpoint: Checkpoint, settings: Settings) -> None:
        self._checkpoint = checkpoint
        self._format = format_of(settings)
        self._matrices = self._format.matrices(checkpoint)
        if not self._matrices:
            raise CheckpointError(
                f"{checkpoint.path}: config.json says that the weights are quantised by {settings['quant_method']!r}, "
                "but no tensor is stored that way: fetch the checkpoint again"
            )
        parts = {key for matrix in self._matrices.values() for key in matrix.parts.values()}
        rest = {key: info for key, info in checkpoint.tensors.items() if key not in parts}
        for key, info in rest.items():
            if info.dtype.startswith("F8") or key in self._matrices:
                raise CheckpointError(
                    f"{checkpoint.path}: {key} of type {info.dtype} does not agree with the quantization_config in "
                    f"config.json: fetch the checkpoint again, or {ADVICE}"
                )
        self.shapes: dict[str, tuple[int, ...]] = {key: info.shape for key, info in rest.items()}
        self.shapes |= {name: matrix.shape for name, matrix in self._matrices.items()}
        self._schemes = {name: matrix.scheme for name, matrix in self._matrices.items()}
        self.recipe = derived_recipe(self._format.name, self._format.default, self.shapes, self._matrices)
        self._kept = threading.local()

    def scheme(self, name: str) -> AnyScheme | None:
        """Return the scheme of a tensor; None if it is float."""
        return self._schemes.get(name)

    def quantized(self, name: str, rows: slice | None) -> QuantTensor:
        """Return rows of a quantised matrix; None for all rows.

        Raises:
            CheckpointError: A value cannot be represented exactly.
        """
        matrix = self._matrices[name]
        start, stop, _ = (rows or slice(None)).indices(matrix.shape[0])
        if not self._format.reads_whole:
            return self._format.read(self._checkpoint, matrix, slice(start, stop))
        return self._whole(matrix).rows(slice(start, stop))

    def _whole(self, matrix: Matrix) -> QuantTensor:
        """Return the whole matrix, cached for this thread's next rows."""
        kept: dict[str, QuantTensor] = self._kept.__dict__
        found = kept.pop(matrix.name, None)
        if found is None:
            while len(kept) >= _KEPT:
                kept.pop(next(iter(kept)))
            found = self._format.read(self._checkpoint, matrix, slice(0, matrix.shape[0]))
        kept[matrix.name] = found
        return found

    def nbytes(self, name: str) -> int:
        """Return the bytes of a tensor in the file, with all its parts."""
        matrix = self._matrices.get(name)
        keys = [name] if matrix is None else matrix.parts.values()
        return sum(self._checkpoint.tensors[key].nbytes for key in keys)

    def input_scale(self, name: str) -> float | None:
        """Return the stored static scale of a matrix's input, x = code * scale; None if there is none.

        Raises:
            CheckpointError: It is not a positive, finite number.
        """
        matrix = self._matrices.get(name)
        if matrix is None or "input_scale" not in matrix.parts:
            return None
        value = float(float32_of(self._checkpoint, matrix.parts["input_scale"]).reshape(-1)[0])
        if value <= 0:
            raise CheckpointError(
                f"{self._checkpoint.path}: {matrix.parts['input_scale']} is {value}, but a scale must be positive: "
                "fetch the checkpoint again"
            )
        return value


def derived_recipe(
    name: str, default: AnyScheme, shapes: Mapping[str, tuple[int, ...]], matrices: Mapping[str, Matrix]
) -> Recipe:
    """Return a recipe that gives each matrix its stored scheme, and keeps the other tensors of `shapes` float.

    Tensors whose names differ only in numbers share a rule if they agree.
    """
    wanted = {tensor: _written(tensor, matrices.get(tensor)) for tensor, shape in shapes.items() if len(shape) == 2}
    common = Counter(rule.activations for rule in wanted.values() if rule.scheme is not None).most_common(1)[0][0]
    assert common is not None
    usual = Rule("*", default, common)
    names: dict[str, list[str]] = {}
    for tensor in wanted:
        names.setdefault(re.sub(r"\.\d+(?=\.)", ".*", tensor), []).append(tensor)
    single: list[Rule] = []
    shared: list[Rule] = []
    for pattern in names:
        alike = [tensor for tensor in wanted if fnmatchcase(tensor, pattern)]
        kinds = {(wanted[tensor].scheme, wanted[tensor].activations) for tensor in alike}
        if kinds == {(usual.scheme, usual.activations)}:
            continue
        if len(kinds) == 1:
            scheme, activations = kinds.pop()
            shared.append(_rule(pattern, scheme, activations, common))
            continue
        for tensor in names[pattern]:
            rule = wanted[tensor]
            if (rule.scheme, rule.activations) != (usual.scheme, usual.activations):
                single.append(_rule(tensor, rule.scheme, rule.activations, common))
    return Recipe(name, default, (*single, *shared), activations=common)


def _written(tensor: str, matrix: Matrix | None) -> Rule:
    if matrix is None:
        return Rule(tensor, None, FLOAT)
    return Rule(tensor, matrix.written, matrix.activations or AUTO)


def _rule(pattern: str, scheme: AnyScheme | None, activations: str | None, common: str) -> Rule:
    # A rule for a float matrix states its float activations only if the recipe states activations at all.
    said = None if activations == common or (scheme is None and common == AUTO) else activations
    return Rule(pattern, scheme, said)
