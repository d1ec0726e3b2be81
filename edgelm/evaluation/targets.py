"""Targets of an evaluation: open bundles, checkpoints and recipes, check that they are one model, count their bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelm.bundle import MANIFEST, Bundle
from edgelm.errors import BundleError, EdgeLMError, RecipeError
from edgelm.evaluation.result import BUNDLE, CHECKPOINT, RECIPE
from edgelm.progress import Progress
from edgelm.quant.recipe import AUTO, FLOAT, PRESETS, Recipe
from edgelm.tokenization.tokenizer import Tokenizer

if TYPE_CHECKING:
    from edgelm.checkpoint import Checkpoint
    from edgelm.models.spec import Decoder
    from edgelm.quant.reference import QuantizedActivations
    from edgelm.quant.source import WeightSource


@dataclass
class BundleTarget:
    """A bundle, run by its runtime.

    `name` is its name in tables; `given` is the argument that named it.
    """

    name: str
    given: str
    bundle: Bundle

    kind = BUNDLE

    @property
    def recipe(self) -> str:
        """The recipe's name."""
        return self.bundle.manifest.recipe.name

    @property
    def stored_bytes(self) -> int:
        """Bytes of the weights, without RoPE tables, which the export computes."""
        return sum(tensor.size for tensor in self.bundle.manifest.tensors if not tensor.name.startswith("rope."))

    def hashes(self, progress: Progress) -> dict[str, dict[str, Any]]:
        """Check the files' hashes against the manifest, and return size and SHA-256 of each file.

        Raises:
            BundleError: a file differs from the exported one.
        """
        problems = self.bundle.verify(progress)
        if problems:
            raise BundleError(f"{self.bundle.path} is damaged: {problems[0]}; export it again")
        return {name: {"size": info.size, "sha256": info.sha256} for name, info in self.bundle.manifest.files.items()}

    def tokenizer(self) -> Tokenizer:
        """Return the bundle's tokenizer."""
        return Tokenizer.from_folder(self.bundle.path)

    def check(self, decoder: Decoder, checkpoint: Path) -> None:
        """Check that this is the same model as the float checkpoint.

        Raises:
            EdgeLMError: it is another model.
        """
        model = self.bundle.manifest.model
        facts = (
            ("family", model.family, decoder.family),
            ("layers", model.num_layers, decoder.num_layers),
            ("hidden size", model.hidden_size, decoder.hidden_size),
            ("vocabulary", model.vocab_size, decoder.vocab_size),
            ("experts", model.num_experts, decoder.num_experts),
        )
        different = [f"{what} {mine}, there {theirs}" for what, mine, theirs in facts if mine != theirs]
        if different:
            raise EdgeLMError(f"{self.bundle.path} is not the model of {checkpoint}: {'; '.join(different)}")

    def notes(self, reference_files: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Return a note where the bundle was not exported from the float checkpoint's weights."""
        source = self.bundle.manifest.source
        weights = {name: info.sha256 for name, info in source.files.items() if name.endswith(".safetensors")}
        float_weights = {info["sha256"] for name, info in reference_files.items() if name.endswith(".safetensors")}
        if not float_weights or not weights or set(weights.values()) <= float_weights:
            return []
        return [
            f"exported from {source.id}, whose weights are not the float checkpoint's: as it should be for a "
            "quantised checkpoint, a mistake for anything else"
        ]


@dataclass
class WeightTarget:
    """A checkpoint or a recipe: the PyTorch reference with dequantised weights.

    Activations and KV cache are float32 unless the recipe says otherwise.
    """

    name: str
    given: str
    kind: str
    source: WeightSource

    @property
    def recipe(self) -> str:
        """The recipe's name."""
        return self.source.recipe.name

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors in a quantised checkpoint."""
        return sum(self._stored(name, shape) for name, shape in self.source.shapes.items())

    def _stored(self, name: str, shape: tuple[int, ...]) -> int:
        scheme = self.source.scheme(name)
        if scheme is None:
            return self.source.checkpoint.tensors[name].nbytes
        rows, columns = shape
        each = scheme.scale_dtype.itemsize + scheme.has_zeros
        return rows * (scheme.code_bytes(columns) + scheme.groups(columns) * each)

    def hashes(self, progress: Progress) -> dict[str, dict[str, Any]]:
        """Return size and SHA-256 of the checkpoint's files, or of the recipe's text."""
        if self.kind == CHECKPOINT:
            return dict(self.source.checkpoint.hashes(progress))
        text = self.source.recipe.to_toml().encode()
        return {f"{self.recipe}.toml": {"size": len(text), "sha256": hashlib.sha256(text).hexdigest()}}

    def tokenizer(self) -> Tokenizer:
        """Return the checkpoint's tokenizer."""
        return Tokenizer.from_folder(self.source.checkpoint.path)

    def check(self, decoder: Decoder, checkpoint: Path) -> None:
        """Check that this is the same model as the float checkpoint.

        Raises:
            EdgeLMError: it is another model.
        """
        mine = self.source.checkpoint
        if mine.decoder != decoder:
            raise EdgeLMError(
                f"{mine.path} is not the model of {checkpoint}: their config.json describe different models"
            )

    def hooks(self) -> QuantizedActivations | None:
        """Return the hooks that quantise activations and KV cache as the recipe says; None where it keeps them float.

        Raises:
            RecipeError: activations are static, but the checkpoint has no calibrated scales for them.
        """
        from edgelm.quant.reference import quantized_activations

        return quantized_activations(self.source)

    def notes(self, reference_files: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Return notes on what the recipe quantises besides the weights."""
        del reference_files
        recipe = self.source.recipe
        activations = {recipe.activations, *(rule.activations for rule in recipe.rules)}
        asked = sorted(kind for kind in activations if kind not in (None, AUTO, FLOAT))
        notes = [f"activations are rounded as the recipe has it: {', '.join(asked)}"] if asked else []
        if recipe.kv not in (AUTO, "float32"):
            notes.append(f"keys and values are rounded to the recipe's cache, {recipe.kv}")
        return notes


Target = BundleTarget | WeightTarget


def open_targets(given: Sequence[str | Path], checkpoint: Checkpoint | None) -> list[Target]:
    """Open each target as a bundle, a checkpoint or a recipe, and give them distinct names.

    Raises:
        EdgeLMError: nothing is given; a target is none of the three, is another model than the float checkpoint, or has
            another tokenizer; or a recipe is given without a float checkpoint.
        BundleError, CheckpointError, RecipeError: a target cannot be opened.
    """
    if not given:
        raise EdgeLMError("there is nothing to evaluate: give a bundle, a quantised checkpoint or a recipe")
    paths = [str(item) for item in given]
    short = [Path(path).name or path for path in paths]
    names = [name if short.count(name) == 1 else path for name, path in zip(short, paths, strict=True)]
    if len(set(names)) < len(names):
        raise EdgeLMError(f"{next(name for name in names if names.count(name) > 1)} is given twice")
    targets = [_open(path, name, checkpoint) for path, name in zip(paths, names, strict=True)]
    if checkpoint is not None:
        for target in targets:
            target.check(checkpoint.decoder, checkpoint.path)
    first = Tokenizer.from_folder(checkpoint.path) if checkpoint is not None else targets[0].tokenizer()
    where = checkpoint.path if checkpoint is not None else paths[0]
    expected = first.fingerprint()
    for target in targets:
        if target.kind != RECIPE and target.tokenizer().fingerprint() != expected:
            raise EdgeLMError(f"{target.given} has another tokenizer than {where}: their numbers cannot be compared")
    return targets


def weight_count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the number of weights of a model."""
    return sum(prod(shape) for shape in shapes.values())


def _open(given: str, name: str, checkpoint: Checkpoint | None) -> Target:
    path = Path(given)
    if given not in PRESETS and path.is_dir():
        if (path / MANIFEST).is_file():
            return BundleTarget(name, given, Bundle.open(path))
        if not (path / "config.json").is_file():
            raise EdgeLMError(f"{path} is neither a bundle nor a checkpoint: it has no {MANIFEST} and no config.json")
        from edgelm.checkpoint import Checkpoint
        from edgelm.quant.source import WeightSource

        return WeightTarget(name, given, CHECKPOINT, WeightSource(Checkpoint.open(path)))
    if given not in PRESETS and not path.is_file():
        raise RecipeError(
            f"there is no bundle, checkpoint or recipe {given!r}: give a folder, {', '.join(PRESETS)}, or a .toml file"
        )
    recipe = Recipe.load(given)
    if checkpoint is None:
        raise EdgeLMError(f"the recipe {given} needs weights to quantise: give the float model with --checkpoint")
    from edgelm.quant.source import WeightSource

    return WeightTarget(name, given, RECIPE, WeightSource(checkpoint, recipe))
