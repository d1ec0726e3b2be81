"""Bits where they matter: a scheme for every matrix, so that the model loses least within a budget of bytes."""

from __future__ import annotations

from edgelm.quant.mixed_precision.choose import SCHEMES, TOKENS, BudgetResult, budget_recipe, parse_candidates

__all__ = ["SCHEMES", "TOKENS", "BudgetResult", "budget_recipe", "parse_candidates"]
