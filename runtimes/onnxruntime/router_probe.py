"""Does a provider leave the routing weights of an MoE as the graph says? Asked at load, by a tiny graph of the bundle.

Needs nothing but numpy and ONNX Runtime: the graph and the answers come with the bundle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import RuntimeUnavailableError

if TYPE_CHECKING:
    import onnxruntime  # type: ignore[import-untyped]  # it has no type information

PROBE_FILE = "router_probe.onnx"
FOUND, EXPECTED, RENORMALISED = "found", "expected", "renormalised"
TOLERANCE = 0.05
"""Of the answer's norm. Low precision stays below 1 %; renormalising, or leaving it out, is off by a factor."""


def check_router(session: onnxruntime.InferenceSession, provider: str) -> None:
    """Run the probe.

    Raises:
        RuntimeUnavailableError: the provider computes another MoE, and which.
    """
    found, expected, renormalised = (
        np.asarray(value, np.float32) for value in session.run([FOUND, EXPECTED, RENORMALISED], {})
    )
    error = relative_error(found, expected)
    if error <= TOLERANCE:
        return
    if relative_error(found, renormalised) <= TOLERANCE:
        reason = "it ignores whether the weights of the chosen experts are to be renormalised"
    elif np.isfinite(error):
        reason = f"its answer to a known MoE is {error:.0%} off"
    else:
        reason = "its answer to a known MoE has values that are not numbers"
    raise RuntimeUnavailableError(
        f"{provider} does not compute this model's mixture of experts: {reason}; use another version of ONNX Runtime, "
        "or export for another target"
    )


def relative_error(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """The distance over the norm of what is expected; infinite where something is not a number."""
    with np.errstate(all="ignore"):
        error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    return error if np.isfinite(error) else float("inf")
