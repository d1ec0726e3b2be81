"""What a calibration can be asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from edgelm.corpus import BUILTIN
from edgelm.errors import EdgeLMError
from edgelm.models.spec import MoE
from edgelm.quant.smoothing import TARGETS

SAMPLES = 128
LENGTH = 512


@dataclass(frozen=True)
class CoverageOptions:
    """How many tokens an expert must see for its quantised values to be chosen by them.

    Attributes:
        min_tokens: fewer than these are too few; None is as many as `needed` says.
        reach: where an expert sees too few, it borrows tokens for which it is among the `reach` times A most probable
            experts, A being how many the model chooses; 1 borrows none.

    Raises:
        EdgeLMError: a value is out of range.
    """

    min_tokens: int | None = None
    reach: int = 2

    def __post_init__(self) -> None:
        if self.min_tokens is not None and self.min_tokens < 0:
            raise EdgeLMError(f"an expert's least number of tokens is 0 or more, not {self.min_tokens}")
        if self.reach < 1:
            raise EdgeLMError(f"reach is 1 or more, not {self.reach}")

    def needed(self, moe: MoE) -> int:
        """Tokens that an expert needs: as many as its widest input has values, unless it was given.

        Measured on other tokens (docs/log.md): values found with half as many tokens as columns lose a third
        more than rounding to nearest does, with as many a tenth less, with twice as many four tenths less.
        """
        columns = max(moe.router.columns, moe.experts[0].gate.rows)
        return columns if self.min_tokens is None else self.min_tokens


@dataclass(frozen=True)
class CalibrationOptions:
    """What to calibrate with.

    Attributes:
        text: a UTF-8 file, a folder of them, or "builtin": Python's standard library.
        samples: windows of text.
        length: tokens of each.
        coverage: when an expert has seen enough.
        require_coverage: fail where an expert has not, in place of rounding it to nearest.
        smoothing: scale the float weights first, with the same text: for "activations" or for "weights"
            (`edgelm.quant.smoothing`); None does not.

    Raises:
        EdgeLMError: a value is out of range.
    """

    text: str | Path = BUILTIN
    samples: int = SAMPLES
    length: int = LENGTH
    coverage: CoverageOptions = field(default_factory=CoverageOptions)
    require_coverage: bool = False
    smoothing: str | None = None

    def __post_init__(self) -> None:
        if self.samples < 1 or self.length < 2:
            raise EdgeLMError(
                f"calibration takes at least one sample of at least two tokens, not {self.samples} of {self.length}"
            )
        if self.smoothing is not None and self.smoothing not in TARGETS:
            raise EdgeLMError(f"smoothing is for {' or '.join(TARGETS)}, not {self.smoothing!r}")
