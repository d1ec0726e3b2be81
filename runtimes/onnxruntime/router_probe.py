"""Checks at load time, with a tiny graph in the bundle, whether a provider computes MoE routing as the graph specifies.

Needs only numpy and ONNX Runtime: the graph and the expected results are in the bundle.
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
"""Relative to the norm of the result. Low precision stays below 1 %; wrong renormalisation is off by a factor."""


def check_router(session: onnxruntime.InferenceSession, provider: str) -> None:
    """Run the probe and check its result.

    Raises:
        RuntimeUnavailableError: the result is wrong; the message says how.
    """
    found, expected, renormalised = (
        np.asarray(value, np.float32) for value in session.run([FOUND, EXPECTED, RENORMALISED], {})
    )
    error = relative_error(found, expected)
    if error <= TOLERANCE:
        return
    if relative_error(found, renormalised) <= TOLERANCE:
        reason = "it ignores whether the weights of the chosen experts must be renormalised"
    elif np.isfinite(error):
        reason = f"its result for a known MoE is {error:.0%} off"
    else:
        reason = "its result for a known MoE has NaN or infinite values"
    raise RuntimeUnavailableError(
        f"{provider} does not compute this model's MoE correctly: {reason}; use another version of ONNX Runtime, "
        "or export for another target"
    )


def relative_error(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Return the distance divided by the norm of `expected`; infinite if a value is not finite."""
    with np.errstate(all="ignore"):
        error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    return error if np.isfinite(error) else float("inf")
