"""The table of limits by kind of recipe. The check and the tests read it, and docs/reference/parity-limits.md shows it.

How the values were chosen, with the measurements, is in docs/reference/parity-limits.md.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

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


# Largest relative difference of a stored pack and one recomputed on another machine: float32 matmuls in another order
# give about 1e-6, a near-tie flip of an expert more at single positions.
SAME_PACK = 1e-3


_QUANTISED = Limits(
    kl_mean=1e-2, kl_p99=0.1, kl_max=1.0, logit_error=0.1, logit_error_p90=0.3, decode_error=0.1,
    clear_gap=0.5, top1_clear=0.97, greedy_clear=0, perplexity=0.05,
    embedding_error=1e-5, layer_base=1e-4, layer_gain=8.0, bad_positions=0.0, router_near_tie=1e-3, head_error=1e-4,
)  # fmt: skip

# From the finest kind to the coarsest.
LIMITS: dict[str, Limits] = {
    "none": Limits(
        kl_mean=1e-6, kl_p99=1e-5, kl_max=1e-4, logit_error=1e-4, logit_error_p90=3e-4, decode_error=1e-4,
        clear_gap=1e-2, top1_clear=1.0, greedy_clear=0, perplexity=1e-4,
        embedding_error=1e-5, layer_base=1e-4, layer_gain=8.0, bad_positions=0.0, router_near_tie=1e-3, head_error=1e-4,
    ),
    **dict.fromkeys(("int8", "int6", "fp8", "int5", "int4", "int3"), _QUANTISED),
}  # fmt: skip


@dataclass(frozen=True)
class LossWarning:
    """Limits above which the loss against the float model is large for a kind of recipe: a warning, not a check.

    `kl` is the mean KL(float reference || device) in nats, `perplexity` the perplexity over the float reference's,
    minus 1.
    """

    kl: float
    perplexity: float


LOSS_WARNINGS: dict[str, LossWarning] = {
    "none": LossWarning(1e-2, 0.02),
    "int8": LossWarning(0.03, 0.05),
    "int6": LossWarning(0.06, 0.08),
    "fp8": LossWarning(0.1, 0.1),
    "int5": LossWarning(0.15, 0.15),
    "int4": LossWarning(0.3, 0.3),
    "int3": LossWarning(0.5, 0.5),
}


# Least limits where values are float16 or bfloat16, which add noise of their own: every value is rounded to 11 or 8
# bits, and a near-tie of the router may tip. Those of float16 were chosen by measurement; those of bfloat16 are eight
# times as wide, as its steps are, up to what quantised bundles are allowed anyway.
_OF_VALUES: dict[str, dict[str, float]] = {
    "float32": {},
    "float16": {
        "kl_mean": 1e-3, "kl_p99": 1e-2, "kl_max": 0.5, "logit_error": 1e-2, "logit_error_p90": 0.1,
        "decode_error": 1e-2, "clear_gap": 0.1, "perplexity": 1e-2,
    },
    "bfloat16": {
        "kl_mean": 1e-2, "kl_p99": 0.1, "kl_max": 1.0, "logit_error": 0.1, "logit_error_p90": 0.3,
        "decode_error": 0.1, "clear_gap": 0.5, "perplexity": 0.05,
    },
}  # fmt: skip
_OF_DEBUG_VALUES: dict[str, dict[str, float]] = {
    "float32": {},
    "float16": {"embedding_error": 1e-3, "layer_base": 1e-2, "router_near_tie": 2e-2, "head_error": 5e-3},
    "bfloat16": {"embedding_error": 8e-3, "layer_base": 8e-2, "router_near_tie": 0.16, "head_error": 4e-2},
}
_TOP1 = {"float32": 1.0, "float16": 0.99, "bfloat16": 0.97}


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
