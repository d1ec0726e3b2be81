"""Options of calibration."""

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
    """How many calibration tokens an expert needs; with fewer it is rounded to nearest.

    Attributes:
        min_tokens: Tokens that an expert needs; None for the default of `needed`.
        reach: An expert with too few tokens borrows tokens for which it is among the `reach` * A most probable experts,
            where A is the number of experts that the model chooses per token. 1 borrows none.

    Raises:
        EdgeLMError: A value is out of range.
    """

    min_tokens: int | None = None
    reach: int = 2

    def __post_init__(self) -> None:
        if self.min_tokens is not None and self.min_tokens < 0:
            raise EdgeLMError(f"min_tokens is {self.min_tokens}: give 0 or more tokens per expert")
        if self.reach < 1:
            raise EdgeLMError(f"reach is {self.reach}: give 1 or more")

    def needed(self, moe: MoE) -> int:
        """Return the tokens that an expert needs: `min_tokens`, by default the columns of its widest matrix.

        Error on other tokens compared with rounding to nearest (docs/log.md): a third more with half as many tokens as
        columns, a tenth less with as many, four tenths less with twice as many.
        """
        columns = max(moe.router.columns, moe.experts[0].gate.rows)
        return columns if self.min_tokens is None else self.min_tokens


@dataclass(frozen=True)
class CalibrationOptions:
    """Options of calibration.

    Attributes:
        text: Calibration text: a UTF-8 file, a folder of them, or "builtin" (Python's standard library).
        samples: Number of windows of text.
        length: Tokens per window.
        coverage: Tokens that each expert needs.
        require_coverage: Fail if an expert has too few tokens, instead of rounding it to nearest.
        smoothing: Scale the float weights first, with the same text: for "activations" or for "weights"
            (`edgelm.quant.smoothing`). None for no smoothing.

    Raises:
        EdgeLMError: A value is out of range.
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
                f"calibration needs at least one sample of at least two tokens, not {self.samples} of {self.length}"
            )
        if self.smoothing is not None and self.smoothing not in TARGETS:
            raise EdgeLMError(f"there is no smoothing for {self.smoothing!r}: give {' or '.join(TARGETS)}")
