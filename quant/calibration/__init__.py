"""Calibrated quantisation of a whole checkpoint, layer by layer from disk.

`options` says what can be asked for, `layer` takes hidden states through one layer while quantising it, `coverage`
sees that every expert has tokens of its own, `resume` keeps what is done so that an interrupted run goes on, `report`
says what came of it, and `run` puts them together.
"""

from edgelm.quant.calibration.options import CalibrationOptions, CoverageOptions
from edgelm.quant.calibration.report import CALIBRATION_FILE, CalibrationReport
from edgelm.quant.calibration.run import CalibratedSummary, calibrate_checkpoint, calibrated

__all__ = [
    "CALIBRATION_FILE",
    "CalibratedSummary",
    "CalibrationOptions",
    "CalibrationReport",
    "CoverageOptions",
    "calibrate_checkpoint",
    "calibrated",
]
