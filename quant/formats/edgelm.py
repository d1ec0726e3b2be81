"""EdgeLM's own quantised checkpoints; the interface that all readers of quantised checkpoints share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgelm.checkpoint.writer import TensorSpec
from edgelm.errors import CheckpointError, RecipeError
from edgelm.quant.formats.layout import Block, Layout, Planned
from edgelm.quant.recipe import Recipe
from edgelm.quant.scheme import AnyScheme
from edgelm.quant.tensor import QuantTensor

if TYPE_CHECKING:
    from edgelm.checkpoint import Checkpoint, SafetensorsFile

METHOD = "edgelm"
FORMAT_VERSION = 1
PARTS = ("qweight", "scales", "zeros")
INPUT_SCALE = "input_scale"
"""Optional part, float32: the calibrated scale of the matrix's input, if its activations are static."""
COLUMNS = "columns"
"""Optional part, int64 [1]: K, if the codes of a row do not fill its last byte."""


def part_name(tensor: str, part: str) -> str:
    """Return the key under which `part` of a quantised tensor is stored: "a.b.weight" -> "a.b.qweight"."""
    return f"{tensor.removesuffix('.weight')}.{part}"


def stored_arrays(name: str, tensor: QuantTensor) -> dict[str, NDArray[Any]]:
    """Return the arrays of a quantised tensor by their keys in the file."""
    arrays = zip(PARTS, (tensor.codes, tensor.scales, tensor.zeros), strict=True)
    return {part_name(name, part): array for part, array in arrays if array is not None}


class OwnLayout(Layout):
    """Layout of `OwnWeights`. It holds every scheme of a matrix whose name ends in ".weight"."""

    def check(self, weights: Planned) -> None:
        """See `Layout.check`."""
        for name in weights.shapes:
            if weights.scheme(name) is not None and not name.endswith(".weight"):
                raise RecipeError(
                    f'{name} cannot be stored quantised, because it does not end in ".weight": keep it float by a rule'
                )

    def parts(self, name: str, shape: tuple[int, int], scheme: AnyScheme) -> dict[str, TensorSpec]:
        """See `Layout.parts`."""
        rows, columns = shape
        specs = {
            part_name(name, "qweight"): TensorSpec("U8", (rows, scheme.code_bytes(columns))),
            part_name(name, "scales"): TensorSpec(
                f"F{8 * scheme.scale_dtype.itemsize}", (rows, scheme.groups(columns))
            ),
        }
        if scheme.has_zeros:
            specs[part_name(name, "zeros")] = TensorSpec("U8", (rows, scheme.groups(columns)))
        if columns * scheme.bits % 8:
            specs[part_name(name, COLUMNS)] = TensorSpec("I64", (1,))
        return specs

    def blocks(self, name: str, shape: tuple[int, int], start: int, found: QuantTensor) -> Iterator[Block]:
        """See `Layout.blocks`."""
        for key, array in stored_arrays(name, found).items():
            yield key, start, array
        if start == 0 and shape[1] * found.scheme.bits % 8:
            yield part_name(name, COLUMNS), 0, np.array([shape[1]], np.int64)

    def settings(self, weights: Planned) -> dict[str, object]:
        """See `Layout.settings`."""
        return {"quant_method": METHOD, "format_version": FORMAT_VERSION, "recipe": weights.recipe.to_toml()}


OWN = OwnLayout()


def read_stored(
    file: Checkpoint | SafetensorsFile, name: str, rows: slice | None, scheme: AnyScheme, columns: int
) -> QuantTensor:
    """Read rows [n, columns] of a tensor stored with the keys of `stored_arrays`.

    Raises:
        CheckpointError: Shapes or types of the arrays do not agree.
    """
    codes, scales = (file.read_raw(part_name(name, part), rows) for part in PARTS[:2])
    zeros = file.read_raw(part_name(name, "zeros"), rows) if scheme.has_zeros else None
    try:
        return QuantTensor(codes, scales, zeros, scheme, (len(codes), columns))
    except ValueError as error:
        raise CheckpointError(f"{file.path}: {name} is damaged: {error}") from error


class Stored(Protocol):
    """Interface of a quantised checkpoint whose tensors are read by their float names.

    Attributes:
        recipe: A recipe that gives every matrix its stored scheme.
        shapes: Shape of every tensor, as in float.
    """

    recipe: Recipe
    shapes: dict[str, tuple[int, ...]]

    def scheme(self, name: str) -> AnyScheme | None:
        """Return the scheme of a tensor; None if it is float."""

    def quantized(self, name: str, rows: slice | None) -> QuantTensor:
        """Return rows of a quantised matrix; None for all rows. Raises `CheckpointError` if they are damaged."""

    def nbytes(self, name: str) -> int:
        """Return the bytes of a tensor in the file, with all its parts."""

    def input_scale(self, name: str) -> float | None:
        """Return the stored static scale of a matrix's input; None if there is none."""


class OwnWeights:
    """A checkpoint that `quantize_checkpoint` wrote.

    Raises:
        CheckpointError: Parts of a tensor are missing, or the tensors contradict the recipe.
    """

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe) -> None:
        self._checkpoint = checkpoint
        self.recipe = recipe
        self.shapes = self._logical_shapes()

    def scheme(self, name: str) -> AnyScheme | None:
        """Return the scheme of a tensor; None if it is float."""
        return self.recipe.scheme_for(name, self.shapes[name])

    def quantized(self, name: str, rows: slice | None) -> QuantTensor:
        """Return rows of a quantised matrix."""
        scheme = self.scheme(name)
        assert scheme is not None
        return read_stored(self._checkpoint, name, rows, scheme, self.shapes[name][1])

    def nbytes(self, name: str) -> int:
        """Return the bytes of a tensor in the file, with all its parts."""
        tensors: Mapping[str, object] = self._checkpoint.tensors
        keys = [name] if name in tensors else [part_name(name, part) for part in (*PARTS, INPUT_SCALE, COLUMNS)]
        return sum(self._checkpoint.tensors[key].nbytes for key in keys if key in tensors)

    def input_scale(self, name: str) -> float | None:
        """Return the stored static scale of a matrix's input; None if there is none."""
        key = part_name(name, INPUT_SCALE)
        if key not in self._checkpoint.tensors or name in self._checkpoint.tensors:
            return None
        return float(self._checkpoint.read_float32(key).reshape(-1)[0])

    def _columns(self, key: str, code_bytes: int, scheme: AnyScheme) -> int:
        stored = self._checkpoint.read_raw(key)
        if stored.dtype != np.int64 or stored.size != 1 or scheme.code_bytes(int(stored.flat[0])) != code_bytes:
            raise CheckpointError(
                f"{self._checkpoint.path}: {key} is {stored.tolist()}, which does not agree with {code_bytes} bytes of "
                f"{scheme.bits}-bit codes: the checkpoint is damaged, so quantise again"
            )
        return int(stored.flat[0])

    def _logical_shapes(self) -> dict[str, tuple[int, ...]]:
        tensors, path = self._checkpoint.tensors, self._checkpoint.path
        shapes: dict[str, tuple[int, ...]] = {}
        for key, info in tensors.items():
            stem, _, part = key.rpartition(".")
            if part in (*PARTS, INPUT_SCALE, COLUMNS):
                if f"{stem}.qweight" not in tensors:
                    raise CheckpointError(f"{path} has {key} but not {stem}.qweight: quantise again")
            else:
                shapes[key] = tuple(info.shape)
            if part != "qweight":
                continue
            name = f"{stem}.weight"
            scheme = self.recipe.match(name)
            if scheme is None or len(info.shape) != 2:
                raise CheckpointError(f"{path} has {key}, but its recipe keeps {name} float: quantise again")
            for needed in PARTS if scheme.has_zeros else PARTS[:-1]:
                if f"{stem}.{needed}" not in tensors:
                    raise CheckpointError(f"{path} lacks {stem}.{needed} of the quantised {name}: quantise again")
            columns = info.shape[1] * 8 // scheme.bits
            if f"{stem}.{COLUMNS}" in tensors:
                columns = self._columns(f"{stem}.{COLUMNS}", info.shape[1], scheme)
            shapes[name] = (info.shape[0], columns)
        for name, shape in shapes.items():
            if name in tensors and self.recipe.scheme_for(name, shape) is not None:
                raise CheckpointError(f"{path} holds {name} in float, but its recipe quantises it: quantise again")
        return shapes
