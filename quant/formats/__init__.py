"""Read checkpoints that other tools quantised: GPTQ, AWQ, compressed-tensors and FP8.

The values are read exactly, without rounding again. Whatever EdgeLM's schemes cannot hold exactly is refused, with the
tensor's name and advice.
"""

from __future__ import annotations

from edgelm.quant.formats.reader import FORMATS, FormatWeights, format_of, recipe_of

__all__ = ["FORMATS", "FormatWeights", "format_of", "recipe_of"]
