"""`WeightSource`: read a checkpoint's tensors, quantised by a recipe or as they were stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from edgelm.checkpoint.safetensors import FLOAT_DTYPES
from edgelm.devices import allowed_cores
from edgelm.errors import CheckpointError, RecipeError
from edgelm.quant import codec
from edgelm.quant.formats import FORMATS, FormatWeights, recipe_of
from edgelm.quant.formats.edgelm import FORMAT_VERSION, METHOD, PARTS, OwnWeights, Stored, part_name
from edgelm.quant.recipe import STATIC_ACTIVATIONS, Recipe
from edgelm.quant.scheme import AnyScheme
from edgelm.quant.tensor import QuantTensor

if TYPE_CHECKING:
    from edgelm.checkpoint import Checkpoint, WeightReader

__all__ = ["FORMAT_VERSION", "METHOD", "PARTS", "WeightSource", "part_name", "stored_recipe"]


def stored_recipe(config: Mapping[str, object]) -> Recipe | None:
    """Return the recipe of a quantised checkpoint from its config.json, or None if it is not quantised.

    For a checkpoint of another tool the recipe has a name such as "gptq-int4-g128" and a default, but no rules. The
    exceptions are known only from the tensors; `WeightSource.recipe` has them.

    Raises:
        CheckpointError: The quantisation format is not supported, or was written by a newer version.
        RecipeError: The stored recipe is malformed.
    """
    entry = config.get("quantization_config")
    if entry is None:
        return None
    if not isinstance(entry, dict):
        raise CheckpointError(
            f"config.json: quantization_config is {entry!r}, not an object: fetch the file again, or start from the "
            "float checkpoint"
        )
    if entry.get("quant_method") != METHOD:
        return recipe_of(entry)
    if entry.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"config.json has quantization_config.format_version {entry.get('format_version')!r}, but this version "
            f"reads {FORMAT_VERSION}: use the EdgeLM that wrote it, or quantise again"
        )
    return Recipe.from_toml(str(entry.get("recipe")), "config.json: quantization_config.recipe")


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Raise if a checkpoint is quantised.

    Raises:
        RecipeError: It is.
    """
    if stored_recipe(checkpoint.config) is not None:
        raise RecipeError(f"{checkpoint.path} is already quantised: start from the float checkpoint")


def float_source(checkpoint: Checkpoint, recipe: Recipe) -> WeightSource:
    """Return the source of a float checkpoint, with one kernel thread, for callers that run one thread per tensor.

    Raises:
        RecipeError: The checkpoint is quantised already, or the recipe quantises none of its tensors.
    """
    refuse_quantized(checkpoint)
    source = WeightSource(checkpoint, recipe, threads=1)
    if not any(source.scheme(name) for name in source.shapes):
        raise RecipeError(
            f'the recipe "{recipe.name}" quantises none of the tensors of {checkpoint.path}: choose another recipe'
        )
    return source


def _schemes(recipe: Recipe) -> tuple[object, ...]:
    """Return the part of a recipe that determines the schemes: neither activations, method nor cache."""
    return (recipe.default, *((rule.pattern, rule.role, rule.scheme) for rule in recipe.rules))


def _open_stored(checkpoint: Checkpoint) -> Stored | None:
    """Open the checkpoint's quantised tensors, in any format; None if it is float."""
    recipe = stored_recipe(checkpoint.config)
    if recipe is None:
        return None
    recipe = recipe.for_model(checkpoint.decoder)
    entry = checkpoint.config["quantization_config"]
    return OwnWeights(checkpoint, recipe) if entry["quant_method"] == METHOD else FormatWeights(checkpoint, entry)


def _refuse_without_config(checkpoint: Checkpoint) -> None:
    """Refuse quantised weights without a `quantization_config`. AutoGPTQ and AutoAWQ used to write it to another file.

    Raises:
        CheckpointError: Names one of the tensors.
    """
    for key, info in checkpoint.tensors.items():
        if key.endswith((".qweight", ".weight_packed")) or (key.endswith(".weight") and info.dtype not in FLOAT_DTYPES):
            raise CheckpointError(
                f"{checkpoint.path}: {key} of type {info.dtype} is quantised, but config.json has no "
                "quantization_config: copy the contents of quantize_config.json or quant_config.json there, with a "
                f"quant_method ({METHOD}, {', '.join(FORMATS)}), or start from the float checkpoint"
            )


class WeightSource:
    """Reads the tensors of a checkpoint by their float names, quantised when read or as they were stored.

    Args:
        checkpoint: A float checkpoint, one written by `quantize_checkpoint`, or one of another tool
            (`edgelm.quant.formats`).
        recipe: How to quantise. None is the stored recipe of a quantised checkpoint, and "none" for a float one.
        threads: Threads of the quantisation kernel; None for every core that this process may use.

    Raises:
        RecipeError: A pattern matches no tensor, or the checkpoint is quantised with another recipe.
        CheckpointError: The quantisation format is not supported, or parts of a tensor are missing.
    """

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe | None = None, *, threads: int | None = None) -> None:
        self._stored = _open_stored(checkpoint)
        stored = None if self._stored is None else self._stored.recipe
        if stored is not None and recipe is not None and _schemes(stored) != _schemes(recipe):
            raise RecipeError(
                f'{checkpoint.path} is already quantised with the recipe "{stored.name}", not "{recipe.name}": leave '
                "the recipe out, or start from the float checkpoint"
            )
        self.checkpoint = checkpoint
        # The schemes of a quantised checkpoint are fixed, but activations and the cache's type can still be chosen.
        self.recipe = (recipe or stored or Recipe.load("none")).for_model(checkpoint.decoder)
        self.is_stored_quantized = stored is not None
        if stored is None:
            _refuse_without_config(checkpoint)
        # Called once, because it reads a dozen files of the system and there are thousands of tensors.
        self._threads = allowed_cores() if threads is None else threads
        self.shapes: Mapping[str, tuple[int, ...]] = (
            {name: tuple(info.shape) for name, info in checkpoint.tensors.items()}
            if self._stored is None
            else self._stored.shapes
        )
        """Shape of every tensor under its float name."""
        self.replaced: Mapping[str, NDArray[np.float32]] = {}
        """Float tensors that replace the checkpoint's; calibration refits some."""
        self.recipe.check(self.shapes)

    def scheme(self, name: str) -> AnyScheme | None:
        """Return the scheme of a tensor; None if it stays float."""
        shape = self.shape(name)
        return self.recipe.scheme_for(name, shape) if self._stored is None else self._stored.scheme(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, as in float.

        Raises:
            CheckpointError: The checkpoint has no such tensor.
        """
        if name not in self.shapes:
            raise CheckpointError(f"{self.checkpoint.path} has no tensor {name}")
        return self.shapes[name]

    def check_tensors(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Check that the checkpoint has exactly the tensors that the model needs.

        Raises:
            CheckpointError: Names tensors that are missing, unknown, or of another shape.
        """
        missing, extra = sorted(set(expected) - set(self.shapes)), sorted(set(self.shapes) - set(expected))
        wrong = [name for name in sorted(expected) if name in self.shapes and self.shapes[name] != expected[name]]
        for what, names in ((f"lacks {len(missing)}", missing), (f"has {len(extra)} unknown", extra)):
            if names:
                raise CheckpointError(
                    f"{self.checkpoint.path} {what} tensor(s): {', '.join(names[:5])}. Fetch the checkpoint again; if "
                    "that does not help, config.json describes another model"
                )
        if wrong:
            name = wrong[0]
            raise CheckpointError(
                f"{self.checkpoint.path}: {name} has shape {self.shapes[name]}, but {expected[name]} is expected: "
                "config.json describes another model"
            )

    def quantized(self, name: str, rows: slice | None = None) -> QuantTensor:
        """Return a tensor, or some of its rows, quantised.

        Raises:
            RecipeError: The recipe does not quantise it.
            CheckpointError: There is no such tensor, or its weights cannot be quantised.
        """
        scheme = self.scheme(name)
        if scheme is None:
            raise RecipeError(f"the recipe {self.recipe.name} does not quantise {name}: read its float values instead")
        if self._stored is not None:
            return self._stored.quantized(name, rows)
        if self.checkpoint.tensors[name].dtype == "BF16":
            weight = cast("NDArray[np.uint16]", self.checkpoint.read_raw(name, rows))
            return codec.quantize(weight, scheme, name=name, threads=self._threads)
        return codec.quantize(self.checkpoint.read_float32(name, rows), scheme, name=name, threads=self._threads)

    def float32(self, name: str, rows: slice | None = None) -> NDArray[np.float32]:
        """Return a float tensor, or some of its rows, from `replaced` or the checkpoint, before quantisation.

        Raises:
            RecipeError: The checkpoint has it only quantised.
            CheckpointError: There is no such tensor.
        """
        if self.is_stored_quantized and self.scheme(name) is not None:
            raise RecipeError(
                f"{self.checkpoint.path} has only quantised values of {name}: start from the float checkpoint"
            )
        self.shape(name)
        if name in self.replaced:
            return self.replaced[name] if rows is None else self.replaced[name][rows]
        return self.checkpoint.read_float32(name, rows)

    def dequantized(self) -> WeightReader:
        """Return a reader of the dequantised values, which are the weights of the quantised reference."""
        return _Dequantized(self)

    def dequantized_float32(self, name: str, rows: slice | None = None) -> NDArray[np.float32]:
        """Return a tensor, or some of its rows, in float32; dequantised if the recipe quantises it."""
        if self.scheme(name) is None:
            return self.float32(name, rows)
        return codec.dequantize(self.quantized(name, rows), threads=self._threads)

    def nbytes(self, name: str) -> int:
        """Return the bytes of a tensor in the checkpoint; all its parts if it is quantised."""
        return self.checkpoint.info(name).nbytes if self._stored is None else self._stored.nbytes(name)

    def activations(self, recipe: Recipe | None = None) -> dict[str, str]:
        """Return the activation type of each quantised matrix's matmul, by name; see `Recipe.activations_for`.

        The embedding is left out unless it is also the head, since a lookup is not a matmul. `recipe` replaces the
        source's own.
        """
        decoder, recipe = self.checkpoint.decoder, recipe or self.recipe
        looked_up = None if decoder.tied else decoder.embed.name
        names = (name for name in self.shapes if name != looked_up and self.scheme(name) is not None)
        return {name: recipe.activations_for(name) for name in names}

    @property
    def static_inputs(self) -> list[str]:
        """Names of the quantised matrices with static activations."""
        return [name for name, kind in self.activations().items() if kind in STATIC_ACTIVATIONS]

    def input_scale(self, name: str) -> float | None:
        """Return the stored static scale of a matrix's input, x = code * scale; None if there is none.

        Raises:
            CheckpointError: It is not a positive number.
        """
        return None if self._stored is None else self._stored.input_scale(name)


class _Dequantized:
    def __init__(self, source: WeightSource) -> None:
        self._source = source

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def read_float32(self, name: str, rows: slice | None = None) -> NDArray[np.float32]:
        return self._source.dequantized_float32(name, rows)
