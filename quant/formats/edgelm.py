"""Quantised tensors as a checkpoint holds them: EdgeLM's own format, and the protocol that the other formats share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import CheckpointError
from edgelm.quant.recipe import Recipe
from edgelm.quant.scheme import AnyScheme
from edgelm.quant.tensor import QuantTensor

if TYPE_CHECKING:
    from edgelm.checkpoint import Checkpoint, SafetensorsFile

METHOD = "edgelm"
FORMAT_VERSION = 1
PARTS = ("qweight", "scales", "zeros")
INPUT_SCALE = "input_scale"
"""A further part, float32: the calibrated scale of what the matrix multiplies, where its activations are static."""
COLUMNS = "columns"
"""A further part, int64 [1]: K, where the codes of a row do not fill its last byte."""


def part_name(tensor: str, part: str) -> str:
    """Return the key under which `part` of a quantised tensor is stored: "a.b.weight" -> "a.b.qweight"."""
    return f"{tensor.removesuffix('.weight')}.{part}"


def stored_arrays(name: str, tensor: QuantTensor) -> dict[str, NDArray[Any]]:
    """The arrays of a quantised tensor by the keys under which they are stored."""
    arrays = zip(PARTS, (tensor.codes, tensor.scales, tensor.zeros), strict=True)
    return {part_name(name, part): array for part, array in arrays if array is not None}


def read_stored(
    file: Checkpoint | SafetensorsFile, name: str, rows: slice | None, scheme: AnyScheme, columns: int
) -> QuantTensor:
    """Return rows [n, columns] of the tensor whose arrays `stored_arrays` gave.

    Raises:
        CheckpointError: they do not fit together.
    """
    codes, scales = (file.read_raw(part_name(name, part), rows) for part in PARTS[:2])
    zeros = file.read_raw(part_name(name, "zeros"), rows) if scheme.has_zeros else None
    try:
        return QuantTensor(codes, scales, zeros, scheme, (len(codes), columns))
    except ValueError as error:
        raise CheckpointError(f"{file.path}: {name} is damaged: {error}") from error


class Stored(Protocol):
    """A quantised checkpoint, its tensors under their float names.

    Attributes:
        recipe: which gives every matrix the scheme that it is stored in.
        shapes: of every tensor, quantised or not.
    """

    recipe: Recipe
    shapes: dict[str, tuple[int, ...]]

    def scheme(self, name: str) -> AnyScheme | None:
        """Return the scheme of a tensor, None where it is float."""

    def quantized(self, name: str, rows: slice | None) -> QuantTensor:
        """Return rows of a quantised matrix, None all of them. Raises `CheckpointError` where they are damaged."""

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor in the file, all its parts together."""

    def input_scale(self, name: str) -> float | None:
        """Return the static scale of a matrix's inputs, None where none is stored."""


class OwnWeights:
    """A checkpoint that `quantize_checkpoint` wrote.

    Raises:
        CheckpointError: parts are missing, or there is what the recipe does not describe.
    """

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe) -> None:
        self._checkpoint = checkpoint
        self.recipe = recipe
        self.shapes = self._logical_shapes()

    def scheme(self, name: str) -> AnyScheme | None:
        """Return the scheme of a tensor, None where it is float."""
        return self.recipe.scheme_for(name, self.shapes[name])

    def quantized(self, name: str, rows: slice | None) -> QuantTensor:
        """Return rows of a quantised matrix."""
        scheme = self.scheme(name)
        assert scheme is not None
        return read_stored(self._checkpoint, name, rows, scheme, self.shapes[name][1])

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor in the file, all its parts together."""
        tensors: Mapping[str, object] = self._checkpoint.tensors
        keys = [name] if name in tensors else [part_name(name, part) for part in (*PARTS, INPUT_SCALE, COLUMNS)]
        return sum(self._checkpoint.tensors[key].nbytes for key in keys if key in tensors)

    def input_scale(self, name: str) -> float | None:
        """Return the static scale of a matrix's inputs, None where none is stored."""
        key = part_name(name, INPUT_SCALE)
        if key not in self._checkpoint.tensors or name in self._checkpoint.tensors:
            return None
        return float(self._checkpoint.read_float32(key).reshape(-1)[0])

    def _columns(self, key: str, code_bytes: int, scheme: AnyScheme) -> int:
        stored = self._checkpoint.read_raw(key)
        if stored.dtype != np.int64 or stored.size != 1 or scheme.code_bytes(int(stored.flat[0])) != code_bytes:
            raise CheckpointError(
                f"{self._checkpoint.path}: {key} is {stored.tolist()}, which {code_bytes} bytes of {scheme.bits}-bit "
                "codes do not hold: the checkpoint is damaged, quantise again"
            )
        return int(stored.flat[0])

    def _logical_shapes(self) -> dict[str, tuple[int, ...]]:
        tensors, path = self._checkpoint.tensors, self._checkpoint.path
        shapes: dict[str, tuple[int, ...]] = {}
        for key, info in tensors.items():
            stem, _, part = key.rpartition(".")
            if part in (*PARTS, INPUT_SCALE, COLUMNS):
                if f"{stem}.qweight" not in tensors:
                    raise CheckpointError(f"{path} has {key} but not {stem}.qweight")
            else:
                shapes[key] = tuple(info.shape)
            if part != "qweight":
                continue
            name = f"{stem}.weight"
            scheme = self.recipe.match(name)
            if scheme is None or len(info.shape) != 2:
                raise CheckpointError(f"{path} has {key}, but its recipe keeps {name} float")
            for needed in PARTS if scheme.has_zeros else PARTS[:-1]:
                if f"{stem}.{needed}" not in tensors:
                    raise CheckpointError(f"{path} lacks {stem}.{needed} of the quantised {name}")
            columns = info.shape[1] * 8 // scheme.bits
            if f"{stem}.{COLUMNS}" in tensors:
                columns = self._columns(f"{stem}.{COLUMNS}", info.shape[1], scheme)
            shapes[name] = (info.shape[0], columns)
        for name, shape in shapes.items():
            if name in tensors and self.recipe.scheme_for(name, shape) is not None:
                raise CheckpointError(f"{path} holds {name} in float, but its recipe quantises it")
        return shapes
