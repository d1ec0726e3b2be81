"""What a calibration came to: `calibration.json` beside the config.json of the checkpoint it made."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from edgelm.bundle import CalibrationInfo, ExpertFallback
from edgelm.errors import CheckpointError
from edgelm.json_dataclass import Count, ErrorFactory, from_data, parse, read_json, require_format

CALIBRATION_FILE = "calibration.json"
FORMAT_VERSION = 1
_ERRORS = ErrorFactory(CheckpointError, "calibrate again, or remove it")


@dataclass(frozen=True)
class TensorReport:
    """How one matrix was quantised.

    Attributes:
        scheme: its name.
        method: that found the quantised values kept.
        error: squared error of the matrix's outputs on the calibration tokens, relative to the outputs' own square.
            None where no tokens were looked at.
        errors: the same for every method that was tried.
    """

    scheme: str
    method: str
    error: float | None
    errors: dict[str, float] = field(default_factory=dict)


@dataclass
class LayerReport:
    """One layer.

    Attributes:
        tensors: by full name.
        tokens: that each expert was chosen for; empty for a dense layer.
        borrowed: tokens that each expert took besides, which route near it.
        fallbacks: experts that saw too few tokens all the same and were rounded to nearest.
    """

    tensors: dict[str, TensorReport] = field(default_factory=dict)
    tokens: list[Count] = field(default_factory=list)
    borrowed: list[Count] = field(default_factory=list)
    fallbacks: list[Count] = field(default_factory=list)

    @property
    def mean_error(self) -> float | None:
        """Mean relative error of the matrices, None where none was measured."""
        errors = [tensor.error for tensor in self.tensors.values() if tensor.error is not None]
        return sum(errors) / len(errors) if errors else None

    def to_json(self) -> str:
        """As `from_json` reads it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str, where: Path) -> LayerReport:
        """Read what `to_json` wrote.

        Raises:
            CheckpointError: it is damaged.
        """
        return from_data(cls, parse(text, where, _ERRORS), where, _ERRORS).checked(where)

    def checked(self, where: Path) -> LayerReport:
        """Itself. Raises CheckpointError where its lists do not belong together."""
        experts = len(self.tokens)
        if len(self.borrowed) != experts or any(expert >= experts for expert in self.fallbacks):
            raise _ERRORS.at(where, f"a layer has tokens of {experts} experts, and borrowed or fallbacks of others")
        return self


@dataclass(frozen=True)
class CalibrationReport:
    """The whole run.

    Attributes:
        text: name of the text.
        sha256: of its documents.
        samples: windows of it.
        length: tokens of each.
        min_tokens: an expert needed; 0 for a dense model.
        layers: in order.
        head: the head, and nothing else.
        smoothing: what the float weights were scaled for first, "activations" or "weights"; None: they were not.
        format_version: of the file.
    """

    text: str
    sha256: str
    samples: Count
    length: Count
    min_tokens: Count
    layers: list[LayerReport]
    head: LayerReport
    smoothing: str | None = None
    format_version: int = FORMAT_VERSION

    @property
    def tensors(self) -> dict[str, TensorReport]:
        """All matrices that saw calibration tokens, or whose expert ought to have."""
        return {name: entry for part in (*self.layers, self.head) for name, entry in part.tensors.items()}

    @property
    def methods(self) -> dict[str, int]:
        """Matrices by the method that found their codes."""
        return dict(sorted(Counter(entry.method for entry in self.tensors.values()).items()))

    @property
    def fallbacks(self) -> tuple[ExpertFallback, ...]:
        """Experts that were rounded to nearest because they saw too few tokens."""
        return tuple(
            ExpertFallback(index, expert, layer.tokens[expert] + layer.borrowed[expert])
            for index, layer in enumerate(self.layers)
            for expert in layer.fallbacks
        )

    @property
    def info(self) -> CalibrationInfo:
        """The summary that a bundle's manifest holds."""
        return CalibrationInfo(
            self.text, self.sha256, self.samples, self.length, self.methods, self.fallbacks, self.smoothing
        )

    def write(self, folder: Path) -> None:
        """Write `calibration.json`; no times in it, so that equal runs write equal files."""
        data = asdict(self) | {"methods": self.methods, "fallbacks": [asdict(entry) for entry in self.fallbacks]}
        (folder / CALIBRATION_FILE).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> CalibrationReport | None:
        """Read a checkpoint's report; None where it has none.

        Raises:
            CheckpointError: the file is damaged or of another version.
        """
        path = folder / CALIBRATION_FILE
        if not path.exists():
            return None
        data = require_format(read_json(path, _ERRORS), "format_version", FORMAT_VERSION, path, _ERRORS)
        # What can be counted from the rest stands there for people.
        report = from_data(cls, data, path, _ERRORS, ignored=("methods", "fallbacks"))
        for layer in (*report.layers, report.head):
            layer.checked(path)
        return report
