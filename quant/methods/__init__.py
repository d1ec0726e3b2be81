"""Calibration methods: choose quantised values by the error of a matrix's output instead of its weights.

The output error is tr(dW H dW^T) with H = sum of x x^T over the calibration inputs x.
"""

from __future__ import annotations

from edgelm.quant.methods.calibrate import Calibrated, calibrate
from edgelm.quant.methods.moments import Moments

__all__ = ["Calibrated", "Moments", "calibrate"]
