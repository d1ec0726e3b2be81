"""What `edgelm compare` reads of reports: the fields that it needs, with their types.

Fields that are not here are ignored, so that reports of later versions can be read. Fields with a default may be
missing: reports of earlier versions lack them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from edgelm.errors import ReportError
from edgelm.json_dataclass import Count, ErrorFactory, Range, from_data, parse, read_bytes, without_unknown

MAX_BYTES = 64 << 20
_ADVICE = "give what `edgelm parity --json` or `edgelm bench --json` wrote"
_ERRORS = ErrorFactory(ReportError, _ADVICE)
FORMAT_VERSION = 1

Share = Annotated[float, Range(0, 1)]
Positive = Annotated[float, Range(0)]


@dataclass(frozen=True)
class DeviceDocument:
    """`edgelm.devices.Device`."""

    cpu: str
    architecture: str = ""
    system: str = ""
    logical_cores: Count | None = None
    physical_cores: Count | None = None
    memory_total: Count | None = None
    instruction_sets: tuple[str, ...] = ()


@dataclass(frozen=True)
class CheckDocument:
    """A check of a parity report."""

    name: str
    passed: bool | None
    value: float | None = None
    limit: float | None = None


@dataclass(frozen=True)
class LayerDocument:
    """A layer of a parity report's diagnosis."""

    layer: int
    error: float | None


@dataclass(frozen=True)
class DiagnosisDocument:
    """The diagnosis of a parity report."""

    layers: tuple[LayerDocument, ...]


@dataclass(frozen=True)
class CheckSpeedDocument:
    """The speed of the check's own runs."""

    load_s: Positive | None
    prefill_tokens_per_s: Positive | None
    decode_tokens_per_s: Positive | None


@dataclass(frozen=True)
class LossDocument:
    """The loss against the float model."""

    known: bool
    kl: float | None
    kl_reference: float | None


@dataclass(frozen=True)
class FileDocument:
    """A file of a bundle."""

    size: Count | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class ModelDocument:
    """A model's name."""

    name: str


@dataclass(frozen=True, kw_only=True)
class ReportDocument:
    """What both kinds of reports have: the bundle, the settings of the run and the device."""

    bundle: str
    recipe: str
    runtime: str
    threads: Count
    device: DeviceDocument
    notes: tuple[str, ...] = ()
    ops: str | None = None
    kv: str | None = None
    isa: str | None = None
    engine: str | None = None
    resident_peak: Count | None = None
    created: str | None = None
    made_by: str | None = None


@dataclass(frozen=True, kw_only=True)
class ParityDocument(ReportDocument):
    """A report of `edgelm parity --json` or of libedgelm."""

    passed: bool
    checks: tuple[CheckDocument, ...]
    kl_mean: float | None
    float_loss: LossDocument
    top1: Share | None
    first_diverged_layer: int | None
    cause: str | None
    diagnosis: DiagnosisDocument | None
    speed: CheckSpeedDocument | None
    model: ModelDocument
    source: str
    files: dict[str, FileDocument]
    tools: dict[str, str]


@dataclass(frozen=True)
class SpreadDocument:
    """Median and extremes of the runs."""

    median: Positive
    low: Positive
    high: Positive


@dataclass(frozen=True)
class EnergyDocument:
    """Energy of a benchmark's runs, in joules per token."""

    prefill_joules_per_token: SpreadDocument | None = None
    decode_joules_per_token: SpreadDocument | None = None


@dataclass(frozen=True, kw_only=True)
class BenchDocument(ReportDocument):
    """A result of `edgelm bench --json`."""

    model: str
    # With field(), these must be there: without it they would have the defaults of the base class.
    ops: str = field()
    kv: str = field()
    batch: Count
    prompt_tokens: Count
    new_tokens: Count
    load_seconds: Positive
    prefill_tokens_per_second: SpreadDocument
    decode_tokens_per_second: SpreadDocument
    resident_peak: Count | None = field()
    files: dict[str, Count]
    sha256: dict[str, str] | None = None
    energy: EnergyDocument | None = None


def read_report(path: Path) -> tuple[tuple[ParityDocument | BenchDocument, ...], list[str]]:
    """Read a file.

    Returns:
        Its reports, one for a parity report and one for each result of a benchmark, and notes about it.

    Raises:
        ReportError: the file cannot be read, is no such report, or lacks a field.
    """
    return to_documents(parse(_text(read_bytes(path, _ERRORS, MAX_BYTES), path), path, _ERRORS), path)


def to_documents(data: Any, path: Path) -> tuple[tuple[ParityDocument | BenchDocument, ...], list[str]]:
    """Convert the parsed contents of a file; as `read_report`."""
    if not isinstance(data, dict):
        raise _ERRORS.at(path, "holds no report")
    kind, version = data.get("format"), data.get("format_version")
    notes = []
    if type(version) is int and version > FORMAT_VERSION:
        notes.append(
            f"{path.name} was written by a newer EdgeLM (format version {version}): what this one does not know is "
            "ignored"
        )
    if kind == "edgelm-parity":
        return (_convert(ParityDocument, data, path),), notes
    if kind == "edgelm-bench" and "results" in data:
        found = data["results"]
        if not isinstance(found, list) or not found:
            raise _ERRORS.at(path, "has no result: every combination of the benchmark was left out")
        return tuple(_convert(BenchDocument, item, f"{path}, result {i}") for i, item in enumerate(found, 1)), notes
    # Earlier versions wrote no `format`.
    if kind == "edgelm-bench" or (kind is None and {"decode_tokens_per_second", "load_seconds"} & data.keys()):
        return (_convert(BenchDocument, data, path),), notes
    other = f": it is of the format {kind[:40]!r}" if isinstance(kind, str) else ""
    raise _ERRORS.at(path, f"is no report of a parity check or of a benchmark{other}")


def _convert(cls: Any, data: Any, where: Path | str) -> Any:
    return from_data(cls, without_unknown(cls, data), where, _ERRORS)


def _text(data: bytes, path: Path) -> str:
    """Decode a file. Windows PowerShell writes what it redirects to a file as UTF-16.

    Raises:
        ReportError: it is empty, or neither UTF-8 nor UTF-16.
    """
    if not data.strip():
        raise _ERRORS.at(path, "is empty")
    try:
        return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise _ERRORS.at(path, f"is no text ({error.reason})") from error
