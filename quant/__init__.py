"""Quantise weight matrices: schemes, primitives, recipes, and readers of quantised checkpoints."""

from __future__ import annotations

from edgelm.quant.codec import dequantize, quantize
from edgelm.quant.recipe import PRESETS, Recipe, Rule
from edgelm.quant.scheme import AnyScheme, Fp8Scheme, Scheme, parse_scheme
from edgelm.quant.source import WeightSource
from edgelm.quant.tensor import QuantTensor

__all__ = [
    "PRESETS",
    "AnyScheme",
    "Fp8Scheme",
    "QuantTensor",
    "Recipe",
    "Rule",
    "Scheme",
    "WeightSource",
    "dequantize",
    "parse_scheme",
    "quantize",
]
