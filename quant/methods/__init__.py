"""Codes found with calibration data: what a matrix multiplies decides which of its errors matter.

Everything here minimises the error of the *output*, `tr(dW H dW^T)` with `H = sum of x x^T` over the calibration
inputs x, in place of the error of the weights.
"""

from __future__ import annotations

from edgelm.quant.methods.calibrate import Calibrated, calibrate
from edgelm.quant.methods.moments import Moments

__all__ = ["Calibrated", "Moments", "calibrate"]
