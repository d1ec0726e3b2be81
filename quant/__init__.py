"""Quantisation of weight matrices: schemes, primitives, recipes, and checkpoints seen through a recipe."""

from __future__ import annotations

from edgelm.quant.native import dequantize, quantize
from edgelm.quant.recipe import PRESETS, Recipe, Rule
from edgelm.quant.scheme import Scheme
from edgelm.quant.source import WeightSource
from edgelm.quant.tensor import QuantTensor

__all__ = ["PRESETS", "QuantTensor", "Recipe", "Rule", "Scheme", "WeightSource", "dequantize", "quantize"]
