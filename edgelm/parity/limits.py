"""The limits by kind of recipe, and the other constants of the parity check: `tables/limits.json`.

Python and the C library both read that file, and docs/reference/parity-limits.md shows it, with the measurements by
which the values were chosen.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgelm.errors import ParityError


@dataclass(frozen=True)
class Limits:
    """Limits of a healthy bundle. Logits are in nats; errors are relative; shares are of positions.

    Against the quantised reference (the error of implementation and device): `kl_mean`, `kl_p99`, `kl_max`;
    `logit_error`, the median over positions, and `logit_error_p90`, the 90th percentile; `decode_error`, the median
    over decoding steps, at likely tokens; `clear_gap`, the top-1 minus top-2 logit from which a choice counts as clear;
    `top1_clear`, the least agreement over clear positions; `greedy_clear`, the clear choices of decoding that may
    differ; `perplexity`, the largest difference of the ratio of perplexities from 1.

    In the debug graph: `embedding_error`; `layer_base` and `layer_gain` as in diagnose.py; `bad_positions`, the share
    of positions that may exceed them; `router_near_tie`, the margin below which a choice of experts is a near-tie, in
    standard deviations of the router's logits; `head_error`, of the log-probabilities beyond the error of the layers.
    """

    kl_mean: float
    kl_p99: float
    kl_max: float
    logit_error: float
    logit_error_p90: float
    decode_error: float
    clear_gap: float
    top1_clear: float
    greedy_clear: int
    perplexity: float
    embedding_error: float
    layer_base: float
    layer_gain: float
    bad_positions: float
    router_near_tie: float
    head_error: float


_TABLE: dict[str, Any] = json.loads((Path(__file__).parent / "tables" / "limits.json").read_bytes())

SAME_PACK: float = _TABLE["same_pack"]
"""Largest relative difference of a stored pack and one recomputed on another machine.

Float32 matmuls in another order give about 1e-6, a near-tie flip of an expert more at single positions.
"""

_FIXED = {name: Limits(**values) for name, values in _TABLE["fixed"].items()}
LIMITS: dict[str, Limits] = {kind: _FIXED[entry["limits"]] for kind, entry in _TABLE["kinds"].items()}
"""From the finest kind to the coarsest."""


@dataclass(frozen=True)
class LossWarning:
    """Limits above which the loss against the float model is large for a kind of recipe: a warning, not a check.

    `kl` is the mean KL(float reference || device) in nats, `perplexity` the perplexity over the float reference's,
    minus 1.
    """

    kl: float
    perplexity: float


LOSS_WARNINGS = {kind: LossWarning(**entry["warning"]) for kind, entry in _TABLE["kinds"].items()}

# Least limits where values are float16 or bfloat16, which add noise of their own: every value is rounded to 11 or 8
# bits, and a near-tie of the router may tip. Those of float16 were chosen by measurement; those of bfloat16 are eight
# times as wide, as its steps are, up to what quantised bundles are allowed anyway.
_OF_VALUES: dict[str, dict[str, float]] = _TABLE["values"]
_OF_DEBUG_VALUES: dict[str, dict[str, float]] = _TABLE["debug_values"]
_TOP1: dict[str, float] = _TABLE["top1_clear"]

LIKELY: int = _TABLE["likely"]
"""Number of recorded tokens, the most probable ones, over which the error of a decoding step is taken.

For one token the native operators compute the logits of improbable ones with the high nibbles of the head alone
(docs/performance/schemes.md, "The head by its high nibbles"). Beyond the first few, tokens that the float reference
finds likely may be improbable to the quantised one.
"""


@dataclass(frozen=True)
class Noise:
    """Constants of the limits that are derived from the simulated rounding (`edgelm.parity.noise`).

    `factor` is the margin for kernels that round more coarsely, `z` the standard deviations between two samples.
    `largest`: the largest of a few hundred draws of small noise. A second sample's is rarely twice as large, so four
    times in KL. The costs of flips have a long tail, `largest_flip`. If the simulation has fewer than `flips`, one flip
    of `flip_kl` nats is allowed. A choice is clear if its gap is `clear` standard deviations of the rounding error.
    """

    factor: float
    z: float
    largest: float
    largest_flip: float
    flips: int
    flip_kl: float
    clear: float


NOISE = Noise(**_TABLE["noise"])


@dataclass(frozen=True)
class LayerRules:
    """Constants of the diagnosis by layers (`edgelm.parity.diagnose`).

    `floor`: updates below this share of the residual stream are measured against the stream: where one position carries
    a huge activation, the stream's own rounding would otherwise look like an error of the update. `single`: share of
    one earlier position's error that counts; with a gain of 8 an eighth is all of it. `suspect`: share of an expert's
    positions that are bad if it is guilty. `before_router` and `before_router_if_seen`: change of the router's logits,
    relative to that of the stream, from which the error came before the router; the second only where the change is
    above `router_rounding`, as float32 rounding moves router logits by about 1e-6.
    """

    floor: float
    single: float
    suspect: float
    before_router: float
    before_router_if_seen: float
    router_rounding: float


LAYER_RULES = LayerRules(**_TABLE["layers"])


def loosened(limits: Limits, shipped: str, debug: str) -> Limits:
    """Limits for a bundle whose graphs compute with values of these types ("float32", "float16", "bfloat16")."""
    least = {**_OF_VALUES[shipped], **_OF_DEBUG_VALUES[debug]}
    looser = {name: max(value, getattr(limits, name)) for name, value in least.items()}
    return replace(limits, **looser, top1_clear=min(limits.top1_clear, _TOP1[shipped]))


def kind_of(recipe_toml: str) -> str:
    """Return the kind of a recipe: the coarsest type of its default and its rules, "none" if all is float.

    Raises:
        ParityError: it uses a type there are no limits for.
    """
    kinds: list[str] = re.findall(r"""^\s*(?:default|scheme)\s*=\s*["']((?:int|fp)\d+)""", recipe_toml, re.MULTILINE)
    for kind in kinds:
        if kind not in LIMITS:
            raise ParityError(f"there are no parity limits for {kind}; there are: {', '.join(LIMITS)}")
    return max(kinds, key=list(LIMITS).index, default="none")
