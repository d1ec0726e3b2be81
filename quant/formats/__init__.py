"""Checkpoints that others quantised, read without another rounding: GPTQ, AWQ, compressed-tensors and FP8.

Whatever a format can hold that EdgeLM's schemes cannot is refused, with the tensor and what to do about it.
"""

from __future__ import annotations

from edgelm.quant.formats.reader import FORMATS, FormatWeights, format_of, recipe_of

__all__ = ["FORMATS", "FormatWeights", "format_of", "recipe_of"]
