"""A checkpoint seen through a recipe: quantised where the recipe says so, float elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from edgelm.devices import allowed_cores
from edgelm.errors import CheckpointError, RecipeError
from edgelm.quant import codec
from edgelm.quant.recipe import Recipe
from edgelm.quant.scheme import AnyScheme
from edgelm.quant.tensor import QuantTensor

if TYPE_CHECKING:
    from edgelm.checkpoint import Checkpoint, WeightReader

METHOD = "edgelm"
FORMAT_VERSION = 1
PARTS = ("qweight", "scales", "zeros")


def part_name(tensor: str, part: str) -> str:
    """Return the key under which `part` of a quantised tensor is stored: "a.b.weight" -> "a.b.qweight"."""
    return f"{tensor.removesuffix('.weight')}.{part}"


def stored_recipe(config: Mapping[str, object]) -> Recipe | None:
    """Return the recipe of a quantised checkpoint from its config.json, None where it is not quantised.

    Raises:
        CheckpointError: it was quantised by something else, or by a newer version.
        RecipeError: the recipe in it is malformed.
    """
    entry = config.get("quantization_config")
    if entry is None:
        return None
    if not isinstance(entry, dict) or entry.get("quant_method") != METHOD:
        method = entry.get("quant_method") if isinstance(entry, dict) else entry
        raise CheckpointError(
            f"config.json says that the weights are quantised by {method!r}, which is not supported: "
            "start from the float checkpoint"
        )
    if entry.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"config.json has quantization_config.format_version {entry.get('format_version')!r}, this version reads "
            f"{FORMAT_VERSION}: use the EdgeLM that wrote it, or quantise again"
        )
    return Recipe.from_toml(str(entry.get("recipe")), "config.json: quantization_config.recipe")


class WeightSource:
    """Gives each tensor of `checkpoint` by its float name, quantised on the fly or as it was stored.

    Args:
        checkpoint: float, or written by `quantize_checkpoint`.
        recipe: None is the stored recipe of a quantised checkpoint, and "none" for a float one.
        threads: for the quantisation kernel; None is all cores this process may use.

    Raises:
        RecipeError: a pattern matches nothing, or the checkpoint is quantised with another recipe.
        CheckpointError: quantised by something else, or parts of a tensor are missing.
    """

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe | None = None, *, threads: int | None = None) -> None:
        stored = stored_recipe(checkpoint.config)
        if (
            stored is not None
            and recipe is not None
            and (stored.default, stored.rules) != (recipe.default, recipe.rules)
        ):
            raise RecipeError(
                f'{checkpoint.path} is already quantised with the recipe "{stored.name}", "{recipe.name}" is another: '
                "leave the recipe out, or start from the float checkpoint"
            )
        self.checkpoint = checkpoint
        self.recipe = stored or recipe or Recipe.load("none")
        self.is_stored_quantized = stored is not None
        # Asked once: finding out reads a dozen files of the system, and there are thousands of tensors.
        self._threads = allowed_cores() if threads is None else threads
        self.shapes: Mapping[str, tuple[int, ...]] = self._logical_shapes()
        """Shape of every tensor under its float name."""
        self.recipe.check(self.shapes)

    def scheme(self, name: str) -> AnyScheme | None:
        """Return the scheme of a tensor, None where it stays float."""
        return self.recipe.scheme_for(name, self.shape(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the float tensor.

        Raises:
            CheckpointError: the checkpoint has no such tensor.
        """
        if name not in self.shapes:
            raise CheckpointError(f"{self.checkpoint.path} has no tensor {name}")
        return self.shapes[name]

    def check_tensors(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Compare with what the model needs, quantised or not.

        Raises:
            CheckpointError: naming tensors that are missing, too many, or of another shape.
        """
        missing, extra = sorted(set(expected) - set(self.shapes)), sorted(set(self.shapes) - set(expected))
        wrong = [name for name in sorted(expected) if name in self.shapes and self.shapes[name] != expected[name]]
        for what, names in (("lacks", missing), ("has, and the model does not know,", extra)):
            if names:
                raise CheckpointError(f"{self.checkpoint.path} {what} {len(names)} tensor(s): {', '.join(names[:5])}")
        if wrong:
            name = wrong[0]
            raise CheckpointError(
                f"{self.checkpoint.path}: {name} has shape {self.shapes[name]}, the config wants {expected[name]}"
            )

    def quantized(self, name: str, rows: slice | None = None) -> QuantTensor:
        """Return a tensor, or some of its rows, quantised.

        Raises:
            RecipeError: the recipe keeps it float.
            CheckpointError: no such tensor, or its weights cannot be quantised.
        """
        scheme = self.scheme(name)
        if scheme is None:
            raise RecipeError(f"the recipe {self.recipe.name} keeps {name} in float")
        if self.is_stored_quantized:
            return self._stored(name, scheme, rows)
        if self.checkpoint.tensors[name].dtype == "BF16":
            weight = cast("NDArray[np.uint16]", self.checkpoint.read_raw(name, rows))
            return codec.quantize(weight, scheme, name=name, threads=self._threads)
        return codec.quantize(self.checkpoint.read_float32(name, rows), scheme, name=name, threads=self._threads)

    def float32(self, name: str, rows: slice | None = None) -> NDArray[np.float32]:
        """Return a tensor, or some of its rows, as stored in the checkpoint, before any quantisation.

        Raises:
            RecipeError: the checkpoint holds it in quantised form only.
            CheckpointError: no such tensor.
        """
        if self.is_stored_quantized and self.scheme(name) is not None:
            raise RecipeError(f"{self.checkpoint.path} holds {name} quantised: its float values are gone")
        self.shape(name)
        return self.checkpoint.read_float32(name, rows)

    def dequantized(self) -> WeightReader:
        """Return a reader of the values that a device computes with: the weights of the quantised reference."""
        return _Dequantized(self)

    def dequantized_float32(self, name: str, rows: slice | None = None) -> NDArray[np.float32]:
        """Return float32 values, through quantisation where the recipe quantises the tensor."""
        if self.scheme(name) is None:
            return self.float32(name, rows)
        return codec.dequantize(self.quantized(name, rows), threads=self._threads)

    def _stored(self, name: str, scheme: AnyScheme, rows: slice | None) -> QuantTensor:
        shape = self.shape(name)
        codes = self.checkpoint.read_raw(part_name(name, "qweight"), rows)
        scales = self.checkpoint.read_raw(part_name(name, "scales"), rows)
        zeros = self.checkpoint.read_raw(part_name(name, "zeros"), rows) if scheme.has_zeros else None
        try:
            return QuantTensor(
                cast("NDArray[np.uint8]", codes),
                scales,
                cast("NDArray[np.uint8] | None", zeros),
                scheme,
                (codes.shape[0], shape[1]),
            )
        except ValueError as error:
            raise CheckpointError(f"{self.checkpoint.path}: {name} is damaged: {error}") from error

    def _logical_shapes(self) -> dict[str, tuple[int, ...]]:
        tensors = self.checkpoint.tensors
        if not self.is_stored_quantized:
            return {name: tuple(info.shape) for name, info in tensors.items()}
        shapes: dict[str, tuple[int, ...]] = {}
        for key, info in tensors.items():
            stem, _, part = key.rpartition(".")
            if part in PARTS:
                if f"{stem}.qweight" not in tensors:
                    raise CheckpointError(f"{self.checkpoint.path} has {key} but not {stem}.qweight")
            else:
                shapes[key] = tuple(info.shape)
            if part != "qweight":
                continue
            name = f"{stem}.weight"
            scheme = self.recipe.match(name)
            if scheme is None or len(info.shape) != 2:
                raise CheckpointError(f"{self.checkpoint.path} has {key}, but its recipe keeps {name} float")
            for needed in PARTS if scheme.has_zeros else PARTS[:-1]:
                if f"{stem}.{needed}" not in tensors:
                    raise CheckpointError(f"{self.checkpoint.path} lacks {stem}.{needed} of the quantised {name}")
            shapes[name] = (info.shape[0], info.shape[1] * 8 // scheme.bits)
        for name, shape in shapes.items():
            if name in tensors and self.recipe.scheme_for(name, shape) is not None:
                raise CheckpointError(f"{self.checkpoint.path} holds {name} in float, but its recipe quantises it")
        return shapes


class _Dequantized:
    def __init__(self, source: WeightSource) -> None:
        self._source = source

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def read_float32(self, name: str, rows: slice | None = None) -> NDArray[np.float32]:
        return self._source.dequantized_float32(name, rows)
