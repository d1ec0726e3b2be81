"""What a calibration came to: `calibration.json` beside the config.json of the checkpoint it made."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edgelm.bundle import CalibrationInfo, ExpertFallback
from edgelm.errors import CheckpointError

CALIBRATION_FILE = "calibration.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class TensorReport:
    """How one matrix was quantised.

    Attributes:
        scheme: its name.
        method: that found the codes kept.
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
    tokens: list[int] = field(default_factory=list)
    borrowed: list[int] = field(default_factory=list)
    fallbacks: list[int] = field(default_factory=list)

    @property
    def mean_error(self) -> float | None:
        """Mean relative error of the matrices, None where none was measured."""
        errors = [tensor.error for tensor in self.tensors.values() if tensor.error is not None]
        return sum(errors) / len(errors) if errors else None

    def to_json(self) -> str:
        """As `from_json` reads it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> LayerReport:
        """Read what `to_json` wrote."""
        return cls.from_dict(json.loads(text))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LayerReport:
        """Read what `asdict` made."""
        tensors = {name: TensorReport(**entry) for name, entry in data["tensors"].items()}
        return cls(tensors, data["tokens"], data["borrowed"], data["fallbacks"])


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
    samples: int
    length: int
    min_tokens: int
    layers: list[LayerReport]
    head: LayerReport
    smoothing: str | None = None
    format_version: int = FORMAT_VERSION

    @property
    def tensors(self) -> dict[str, TensorReport]:
        """All matrices that met calibration tokens, or whose expert ought to have."""
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
        if not path.is_file():
            return None
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["format_version"] != FORMAT_VERSION:
                raise CheckpointError(
                    f"{path} has format_version {data['format_version']!r}, this version reads {FORMAT_VERSION}: "
                    "use the EdgeLM that wrote it, or calibrate again"
                )
            del data["methods"], data["fallbacks"]
            layers = [LayerReport.from_dict(layer) for layer in data.pop("layers")]
            return cls(layers=layers, head=LayerReport.from_dict(data.pop("head")), **data)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is damaged ({error!r}): calibrate again, or remove it") from error
