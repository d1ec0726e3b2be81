"""The report of a calibration, `calibration.json`, stored beside the config.json of the checkpoint."""

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
        scheme: Name of the scheme.
        method: Method whose values were kept.
        error: Squared error of the outputs on the calibration tokens, relative to the outputs' square; None if it was
            not measured.
        errors: The same for every method that was tried.
    """

    scheme: str
    method: str
    error: float | None
    errors: dict[str, float] = field(default_factory=dict)


@dataclass
class LayerReport:
    """How one layer was quantised.

    Attributes:
        tensors: Reports of its matrices, by full name.
        tokens: Tokens that chose each expert; empty for a dense layer.
        borrowed: Further tokens of each expert, which nearly chose it.
        fallbacks: Experts that had too few tokens and were rounded to nearest.
    """

    tensors: dict[str, TensorReport] = field(default_factory=dict)
    tokens: list[Count] = field(default_factory=list)
    borrowed: list[Count] = field(default_factory=list)
    fallbacks: list[Count] = field(default_factory=list)

    @property
    def mean_error(self) -> float | None:
        """Mean relative error of the matrices; None if none was measured."""
        errors = [tensor.error for tensor in self.tensors.values() if tensor.error is not None]
        return sum(errors) / len(errors) if errors else None

    def to_json(self) -> str:
        """Return JSON, which `from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str, where: Path) -> LayerReport:
        """Read what `to_json` wrote.

        Raises:
            CheckpointError: It is damaged.
        """
        return from_data(cls, parse(text, where, _ERRORS), where, _ERRORS).checked(where)

    def checked(self, where: Path) -> LayerReport:
        """Check that the lists agree, and return the report itself.

        Raises:
            CheckpointError: They do not.
        """
        experts = len(self.tokens)
        if len(self.borrowed) != experts or any(expert >= experts for expert in self.fallbacks):
            raise _ERRORS.at(where, f"a layer has tokens of {experts} experts, but borrowed or fallbacks of others")
        return self


@dataclass(frozen=True)
class CalibrationReport:
    """Report of a whole calibration.

    Attributes:
        text: Name of the calibration text.
        sha256: SHA-256 of its documents.
        samples: Number of windows.
        length: Tokens per window.
        min_tokens: Tokens that an expert needed; 0 for a dense model.
        layers: Reports of the layers, in order.
        head: Report of the head alone.
        smoothing: What the float weights were smoothed for, "activations" or "weights"; None if they were not.
        format_version: Version of the file format.
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
        """Reports of all matrices in the layers and the head, by name."""
        return {name: entry for part in (*self.layers, self.head) for name, entry in part.tensors.items()}

    @property
    def methods(self) -> dict[str, int]:
        """Number of matrices by the method whose values were kept."""
        return dict(sorted(Counter(entry.method for entry in self.tensors.values()).items()))

    @property
    def fallbacks(self) -> tuple[ExpertFallback, ...]:
        """Experts that were rounded to nearest because they had too few tokens."""
        return tuple(
            ExpertFallback(index, expert, layer.tokens[expert] + layer.borrowed[expert])
            for index, layer in enumerate(self.layers)
            for expert in layer.fallbacks
        )

    @property
    def info(self) -> CalibrationInfo:
        """The summary for a bundle's manifest."""
        return CalibrationInfo(
            self.text, self.sha256, self.samples, self.length, self.methods, self.fallbacks, self.smoothing
        )

    def write(self, folder: Path) -> None:
        """Write `calibration.json` into a folder. It holds no times, so equal runs write equal files."""
        data = asdict(self) | {"methods": self.methods, "fallbacks": [asdict(entry) for entry in self.fallbacks]}
        (folder / CALIBRATION_FILE).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8", newline="\n")

    @classmethod
    def read(cls, folder: Path) -> CalibrationReport | None:
        """Read a checkpoint's report; None if it has none.

        Raises:
            CheckpointError: The file is damaged, or of another version.
        """
        path = folder / CALIBRATION_FILE
        if not path.exists():
            return None
        data = require_format(read_json(path, _ERRORS), "format_version", FORMAT_VERSION, path, _ERRORS)
        # The ignored fields are derived from the others; they are there for people.
        report = from_data(cls, data, path, _ERRORS, ignored=("methods", "fallbacks"))
        for layer in (*report.layers, report.head):
            layer.checked(path)
        return report
