"""The reference computed anew from the checkpoint, for `edgelm parity --checkpoint`. Needs `edgelm[export]`."""

from __future__ import annotations

from pathlib import Path

from edgelm.bundle import Bundle
from edgelm.checkpoint import Checkpoint, WeightReader
from edgelm.parity.golden import GoldenOptions, make_pack
from edgelm.parity.pack import ParityPack
from edgelm.parity.prompts import Prompt
from edgelm.progress import Progress
from edgelm.quant.recipe import Recipe
from edgelm.quant.source import WeightSource
from edgelm.tokenizer import Tokenizer


def live_pack(bundle: Bundle, stored: ParityPack, checkpoint: Path | str, progress: Progress) -> ParityPack:
    """Make the pack that an export of `checkpoint` with the bundle's recipe would make, for the stored pack's prompts.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        RecipeError: it is quantised with another recipe than the bundle's.
    """
    opened = Checkpoint.open(checkpoint, progress=progress)
    recipe = Recipe.from_toml(bundle.manifest.recipe.toml, f"the recipe of {bundle.path}")
    source = WeightSource(opened, recipe)
    options = GoldenOptions(
        prompts=tuple(Prompt(prompt.name, prompt.text) for prompt in stored.prompts),
        greedy_tokens=max(len(prompt.greedy) for prompt in stored.prompts),
        greedy_prompts=sum(bool(prompt.greedy) for prompt in stored.prompts),
        max_prompt_tokens=max(prompt.length for prompt in stored.prompts),
    )
    reference, quantized = references(source)
    return make_pack(reference, quantized, opened.config, Tokenizer.from_folder(opened.path), options, progress)


def references(source: WeightSource) -> tuple[WeightReader, WeightReader | None]:
    """The float reference's weights and the quantised reference's (None where they are the same)."""
    if source.is_stored_quantized:
        # The float weights are gone: the reference is the PyTorch model of what the checkpoint holds.
        return source.dequantized(), None
    quantises = any(source.scheme(name) is not None for name in source.shapes)
    return source.checkpoint, source.dequantized() if quantises else None
