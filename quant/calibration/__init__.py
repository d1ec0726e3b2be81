"""Quantise a whole checkpoint with calibration text, layer by layer from disk.

- `options`: the options.
- `layer`: quantises one layer while hidden states pass through it.
- `coverage`: assigns calibration tokens to experts.
- `ranges`: static scales of activations.
- `resume`: keeps finished layers so that an interrupted run can resume.
- `report`: the results, `calibration.json`.
- `run`: the whole run.
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
