"""Mixed precision: choose a scheme for every matrix so that the model loses least at a given size."""

from __future__ import annotations

from edgelm.quant.mixed_precision.choose import (
    SCHEMES,
    TOKENS,
    MixedPrecision,
    mixed_precision_recipe,
    parse_candidates,
)

__all__ = ["SCHEMES", "TOKENS", "MixedPrecision", "mixed_precision_recipe", "parse_candidates"]
