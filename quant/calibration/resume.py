"""The resume folder of a calibration: it keeps finished layers, so that an interrupted run can resume.

    state.json                    the settings of the run
    layer-00000.safetensors       quantised values and scales of a finished layer; its report is in the metadata
    head.safetensors              the same for the head
    stream-00001.safetensors      the residual streams before the next layer, of the quantised and the float model
    smoothing.safetensors         the scales of smoothing, if it was asked for

Each file is written under a temporary name and then renamed, and a layer's file before the stream that follows it. So
the last stream says where to resume.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgelm.checkpoint import Checkpoint, SafetensorsFile, SafetensorsWriter, TensorSpec
from edgelm.errors import CheckpointError, EdgeLMError
from edgelm.files import atomic_file, lock_folder
from edgelm.json_dataclass import ErrorFactory, read_json
from edgelm.output_paths import OutputKind, check_output, first_unlisted, resolved
from edgelm.progress import Progress
from edgelm.quant.calibration.report import LayerReport
from edgelm.quant.formats.edgelm import read_stored, stored_arrays
from edgelm.quant.recipe import Recipe
from edgelm.quant.scaled_checkpoint import Scaling
from edgelm.quant.source import WeightSource, part_name
from edgelm.quant.tensor import QuantTensor

SUFFIX = ".calibrating"
_STATE = "state.json"
_HEAD = "head.safetensors"
_SMOOTHING = "smoothing.safetensors"
_ROWS, _COLUMNS = "rows/", "columns/"
_REPORT = "report"
_STREAM, _REFERENCE = "x", "reference"
# The order in which files are removed. A run that ends in between leaves nothing that the next one would resume.
_NAMES = (
    r"head\.safetensors",
    r"stream-\d{5}\.safetensors",
    r"smoothing\.safetensors",
    r"layer-\d{5}\.safetensors",
    r"\.[a-z0-9.-]+\.partial-[0-9a-f]+",
    r"lock",
    r"state\.json",
)


class ResumeFolder:
    """The finished part of one calibration. Open it with `open_resume`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def next_layer(self) -> int | None:
        """Return the layer to resume at; None if nothing is done."""
        numbers = [path.stem.rpartition("-")[2] for path in self.path.glob("stream-?????.safetensors")]
        found = [int(number) for number in numbers if number.isdecimal()]
        # There are two if the run ended between writing one and removing the other.
        return max(found, default=None)

    @property
    def is_worth_keeping(self) -> bool:
        """Whether the folder holds work that a new run would have to repeat."""
        return self.next_layer() is not None or (self.path / _SMOOTHING).is_file()

    def save_smoothing(self, scaling: Mapping[str, Scaling]) -> None:
        """Write the scales of smoothing. Computed again, they might differ from those of the finished layers."""
        arrays: dict[str, NDArray[Any]] = {}
        for name, found in scaling.items():
            arrays |= {} if found.rows is None else {_ROWS + name: found.rows}
            arrays |= {} if found.columns is None else {_COLUMNS + name: found.columns}
        _write(self.path / _SMOOTHING, arrays, {})

    def load_smoothing(self) -> dict[str, Scaling] | None:
        """Read the scales of smoothing; None if there are none yet."""
        path = self.path / _SMOOTHING
        if not path.is_file():
            return None
        with SafetensorsFile(path) as file:
            parts = {key: cast("NDArray[np.float32]", file.read_raw(key)) for key in file.tensors}
        names = dict.fromkeys(key.removeprefix(_ROWS).removeprefix(_COLUMNS) for key in parts)
        return {name: Scaling(parts.get(_ROWS + name), parts.get(_COLUMNS + name)) for name in names}

    def save_streams(self, layer: int, x: Tensor, reference: Tensor) -> None:
        """Write both residual streams, [S, T, D] and [R, T, D], before `layer`; remove earlier ones."""
        _write(self._stream(layer), {_STREAM: x.numpy(), _REFERENCE: reference.numpy()}, {})
        self._stream(layer - 1).unlink(missing_ok=True)

    def load_streams(self, layer: int) -> tuple[Tensor, Tensor]:
        """Read both residual streams before `layer`."""
        found = []
        with SafetensorsFile(self._stream(layer)) as file:
            for name in (_STREAM, _REFERENCE):
                info = file.tensors[name]
                found.append(torch.empty(info.shape))  # memory allocated by torch, see layer.aligned
                file.read_into(found[-1].numpy(), info.offset)
        return found[0], found[1]

    def save_layer(
        self,
        layer: int,
        tensors: Mapping[str, QuantTensor],
        floats: Mapping[str, NDArray[np.float32]],
        report: LayerReport,
    ) -> None:
        """Write a finished layer: its quantised matrices, and the float ones that were refitted."""
        self._save(self._layer(layer), tensors, report, floats)

    def save_head(self, tensors: Mapping[str, QuantTensor], report: LayerReport) -> None:
        """Write the finished head."""
        self._save(self.path / _HEAD, tensors, report)

    def layer_report(self, layer: int) -> LayerReport:
        """Read the report of a finished layer."""
        return _report(self._layer(layer))

    def head_report(self) -> LayerReport | None:
        """Read the report of the head; None if it is not finished."""
        path = self.path / _HEAD
        return _report(path) if path.is_file() else None

    def files(self, layers: int) -> list[Path]:
        """Return all files of tensors: one per layer, and the head's."""
        return [*(self._layer(layer) for layer in range(layers)), self.path / _HEAD]

    def _save(
        self,
        path: Path,
        tensors: Mapping[str, QuantTensor],
        report: LayerReport,
        floats: Mapping[str, NDArray[np.float32]] | None = None,
    ) -> None:
        arrays: dict[str, NDArray[Any]] = dict(floats or {})
        for name, tensor in tensors.items():
            arrays |= stored_arrays(name, tensor)
        _write(path, arrays, {_REPORT: report.to_json()})

    def _layer(self, layer: int) -> Path:
        return self.path / f"layer-{layer:05d}.safetensors"

    def _stream(self, layer: int) -> Path:
        return self.path / f"stream-{layer:05d}.safetensors"


_DTYPES = {"uint8": "U8", "float16": "F16", "float32": "F32"}


def _write(path: Path, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> None:
    specs = {name: TensorSpec(_DTYPES[array.dtype.name], array.shape) for name, array in arrays.items()}
    with atomic_file(path) as partial, SafetensorsWriter(partial, specs, metadata) as writer:
        for name, array in arrays.items():
            writer.write(name, array)


def _report(path: Path) -> LayerReport:
    with SafetensorsFile(path) as file:
        if _REPORT not in file.metadata:
            raise CheckpointError(f"{path} has no report: remove the folder {path.parent} and calibrate again")
        return LayerReport.from_json(file.metadata[_REPORT], path)


@contextlib.contextmanager
def open_resume(path: Path, asked: Mapping[str, Any], progress: Progress) -> Iterator[ResumeFolder]:
    """Open the resume folder: make it, or resume if it holds the same run. It is removed if the block succeeds.

    Args:
        path: The folder.
        asked: Everything that the result depends on, by names for messages.
        progress: Gets notes on what happens to an existing folder.

    Raises:
        EdgeLMError: Another process uses the folder, or it holds something else.
    """
    wanted = json.loads(json.dumps(asked))
    path.mkdir(parents=True, exist_ok=True)
    with lock_folder(path, f"another process is calibrating into {path}: wait for it"):
        _clear_unless(path, wanted, progress)
        state = path / _STATE
        if not state.is_file():
            with atomic_file(state) as partial:
                partial.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8", newline="\n")
        folder = ResumeFolder(path)
        try:
            yield folder
        except BaseException:
            if not folder.is_worth_keeping:
                _remove(path)
            else:
                progress.note(f"finished work is kept in {path}: run the same command again to resume")
            raise
        _remove(path)


def _clear_unless(path: Path, wanted: Mapping[str, Any], progress: Progress) -> None:
    """Remove another run's files from the folder, unless its settings are `wanted`."""
    if not (path / _STATE).exists():
        # A run ended before its first file, or while it removed its files.
        _empty(path)
        return
    try:
        found = read_json(path / _STATE, ErrorFactory(EdgeLMError, f"remove the folder {path}"))
    except EdgeLMError:
        found = None
    if found == wanted:
        return
    if not isinstance(found, dict) or "format" not in found:
        # EdgeLM did not write this folder, so it is not removed.
        raise EdgeLMError(f"{path} is in the way: its {_STATE} is not from a calibration. Remove or move the folder")
    differing = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
    progress.note(f"{path} holds an interrupted calibration with another {', '.join(differing)}: starting again")
    _empty(path)


def _refusal(folder: Path) -> str | None:
    name = first_unlisted(folder, lambda path: any(re.fullmatch(pattern, path) for pattern in _NAMES))
    return None if name is None else f"holds {name}, which no calibration left there"


RESUME = OutputKind("the resume folder of a calibration", _refusal)


def resume_place(out: Path, source: Path) -> Path:
    """Return the resume folder of a calibration that writes to `out`.

    Raises:
        EdgeLMError: Something else is at its path.
    """
    place = resolved(out)
    return check_output(place.with_name(place.name + SUFFIX), RESUME, sources=[source], overwrite=True)


def _empty(path: Path) -> None:
    names = [entry.name for entry in path.iterdir()]
    for pattern in _NAMES:
        for name in names:
            if re.fullmatch(pattern, name):
                (path / name).unlink(missing_ok=True)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # the result is complete, and other files in the folder keep it
        _empty(path)
        path.rmdir()


class CalibratedSource(WeightSource):
    """A float checkpoint and its recipe, with the quantised values that a calibration found.

    Attributes:
        input_scales: Input scales of matrices with static activations, if they were asked for.
    """

    def __init__(
        self, checkpoint: Checkpoint, recipe: Recipe, files: Sequence[SafetensorsFile], *, threads: int | None = None
    ) -> None:
        super().__init__(checkpoint, recipe, threads=threads)
        self._found = {name: file for file in files for name in file.tensors}
        # Routers that were refitted to the quantised model's hidden states.
        self.replaced = {
            name: cast("NDArray[np.float32]", file.read_raw(name))
            for name, file in self._found.items()
            if name in self.shapes
        }
        self.input_scales: Mapping[str, float] = {}

    def input_scale(self, name: str) -> float | None:
        """See `WeightSource.input_scale`."""
        return self.input_scales.get(name)

    def quantized(self, name: str, rows: slice | None = None) -> QuantTensor:
        """See `WeightSource.quantized`; matrices without calibrated values (the embedding) are rounded to nearest."""
        file = self._found.get(part_name(name, "qweight"))
        scheme = self.scheme(name)
        if file is None or scheme is None:
            return super().quantized(name, rows)
        try:
            return read_stored(file, name, rows, scheme, self.shape(name)[1])
        except CheckpointError as error:
            raise CheckpointError(f"{error}: remove the folder {file.path.parent} and calibrate again") from error
