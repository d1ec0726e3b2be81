"""Compute the reference anew from a checkpoint, for `edgelm parity --checkpoint`. Needs the extra `export`."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgelm.bundle import Bundle
from edgelm.checkpoint import Checkpoint, WeightReader, bf16_to_float32, float32_to_bf16
from edgelm.errors import ParityError
from edgelm.parity.golden import GoldenOptions, make_pack
from edgelm.parity.pack import ParityPack
from edgelm.parity.prompts import Prompt
from edgelm.progress import Progress
from edgelm.quant.recipe import Recipe
from edgelm.quant.source import WeightSource
from edgelm.tokenization.tokenizer import Tokenizer


def recomputed_pack(bundle: Bundle, stored: ParityPack, checkpoint: Path | str, progress: Progress) -> ParityPack:
    """Make the pack that an export of `checkpoint` with the bundle's recipe would make, for the stored pack's prompts.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        ParityError: the checkpoint is another model, or it is float and the bundle is calibrated.
        RecipeError: it is quantised with another recipe than the bundle's.
    """
    opened = Checkpoint.open(checkpoint, progress=progress)
    _check_model(bundle, opened)
    recipe = Recipe.from_toml(bundle.manifest.recipe.toml, f"the recipe of {bundle.path}")
    source = WeightSource(opened, recipe)
    if bundle.manifest.calibration is not None and not source.is_stored_quantized:
        raise ParityError(
            f"{bundle.path} is calibrated, so its reference cannot be computed from the float checkpoint "
            f"{opened.path}. Leave --checkpoint out: the parity pack holds the reference's results"
        )
    options = GoldenOptions(
        prompts=tuple(Prompt(prompt.name, prompt.text) for prompt in stored.prompts),
        greedy_tokens=max(len(prompt.greedy) for prompt in stored.prompts),
        greedy_prompts=sum(bool(prompt.greedy) for prompt in stored.prompts),
        max_prompt_tokens=max(prompt.length for prompt in stored.prompts),
    )
    reference, quantized = references(source, bundle.manifest.dtype)
    return make_pack(reference, quantized, opened.decoder, Tokenizer.from_folder(opened.path), options, progress)


def _check_model(bundle: Bundle, checkpoint: Checkpoint) -> None:
    """Check that a checkpoint has the shape of the bundle's model."""
    model, decoder = bundle.manifest.model, checkpoint.decoder
    facts = (
        ("layers", model.num_layers, decoder.num_layers),
        ("hidden size", model.hidden_size, decoder.hidden_size),
        ("vocabulary", model.vocab_size, decoder.vocab_size),
        ("experts", model.num_experts, decoder.num_experts),
    )
    different = [f"{what} {mine}, there {theirs}" for what, mine, theirs in facts if mine != theirs]
    if different:
        raise ParityError(f"{bundle.path} is not the model of {checkpoint.path}: {'; '.join(different)}")


def references(
    source: WeightSource, dtype: str, original: WeightReader | None = None
) -> tuple[WeightReader, WeightReader | None]:
    """Return the weights of the float reference and of the quantised reference (None if they are the same).

    `dtype` is the data type of the matrices that the recipe keeps in float. If it rounds them, the device computes with
    the rounded values. `original` is the float checkpoint that a quantised or smoothed `source` was
    made from.
    """
    quantises = any(source.scheme(name) is not None for name in source.shapes)
    rounded = {name for name in source.shapes if _is_rounded(source, name, dtype)}
    computed: WeightReader = source.dequantized()
    if rounded:
        computed = AsStored(computed, rounded, dtype)
    if source.is_stored_quantized and original is not None:
        return original, computed
    if source.is_stored_quantized:
        # There are no float weights: the reference is the PyTorch model with the dequantised weights.
        return source.dequantized(), computed if rounded else None
    exact = source.checkpoint if original is None else original
    return exact, computed if rounded or quantises else None


def _is_rounded(source: WeightSource, name: str, dtype: str) -> bool:
    # Vectors and the router are always stored in float32.
    if dtype == "float32" or source.scheme(name) is not None:
        return False
    matrix = source.checkpoint.decoder.matrices.get(name)
    if matrix is None or matrix.role == "router":
        return False
    return source.checkpoint.info(name).dtype != {"float16": "F16", "bfloat16": "BF16"}[dtype]


class AsStored:
    """Reader of weights, of which some are rounded to float16 or bfloat16 as the bundle stores them."""

    def __init__(self, reader: WeightReader, rounded: Collection[str], dtype: str) -> None:
        self._reader = reader
        self._rounded = rounded
        self._dtype = dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._reader.shape(name)

    def read_float32(self, name: str, rows: slice | None = None) -> NDArray[np.float32]:
        """Read a tensor, or some rows of its first axis, rounded as the bundle stores it."""
        values = self._reader.read_float32(name, rows)
        if name not in self._rounded:
            return values
        if self._dtype == "float16":
            return values.astype(np.float16).astype(np.float32)
        return bf16_to_float32(float32_to_bf16(values))
