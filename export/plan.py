"""Plan a bundle before its first byte is written; the interface of targets."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from edgelm.bundle import CalibrationInfo, ModelInfo, Requirement, TokenIds, capabilities
from edgelm.bundle.capabilities import Capabilities
from edgelm.checkpoint import Checkpoint
from edgelm.export.options import ExportOptions
from edgelm.export.packing.weights_file import WeightsPlan
from edgelm.models.spec import Decoder
from edgelm.parity.golden import GoldenOptions
from edgelm.progress import Progress
from edgelm.quant.source import WeightSource
from edgelm.tokenization.tokenizer import Tokenizer

GRAPH_FILE = "model.onnx"
DEBUG_FILE = "model.debug.onnx"
WEIGHTS_FILE = "model.onnx.data"
_STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class GraphRequest:
    """Input of `Target.build`; `dtype` is the type of the matrices that the recipe does not quantise."""

    source: WeightSource
    decoder: Decoder
    info: ModelInfo
    ops: str
    dtype: str


@dataclass(frozen=True)
class BuiltGraphs:
    """The graphs of a bundle and the plan of their weights.

    Attributes:
        files: Contents of the graph files, by file name.
        file: Name of the deployed graph.
        debug_file: Name of the debug graph, which also returns intermediate values.
        weights: Layout of the weights file, which both graphs share.
        kv: Type of the KV cache.
        finish: Write the target's other files into the bundle's folder. It is called when the weights, `files` and the
            tokenizer files are there.
        rounded: Matrices whose inputs the graph rounds to int8, each with its block size in columns. None if the graph
            rounds other values too, as on a GPU, where activations are float16 or bfloat16.
        requires: Packages and versions that the graphs need.
    """

    files: Mapping[str, bytes]
    file: str
    debug_file: str
    weights: WeightsPlan
    kv: str
    finish: Callable[[Path, ExportJob], None]
    rounded: Mapping[str, int] | None = None
    requires: tuple[Requirement, ...] = ()


class Target(ABC):
    """A kind of device that bundles are exported for."""

    name: str

    @abstractmethod
    def operator_set(self, ops: str, progress: Progress) -> str:
        """Return the operator set to export with; `ops` is the option of that name.

        Raises:
            ExportError: This target does not have the operator set.
        """

    @abstractmethod
    def float_dtype(self, asked: str, checkpoint: str, *, quantises: bool) -> str:
        """Return the type in which float matrices are stored.

        Args:
            asked: The option `dtype`; "auto" is the checkpoint's type if the target can compute with it.
            checkpoint: The type of most of the checkpoint's float values.
            quantises: Whether the recipe quantises any matrix.

        Raises:
            ExportError: This target cannot compute with the type asked for.
        """

    @abstractmethod
    def capabilities(self, ops: str) -> Capabilities:
        """Return the features that the operator set `ops` supports."""

    @abstractmethod
    def notes(self, source: WeightSource) -> list[str]:
        """Return notes for the user on settings of the recipe that this device replaces with others."""

    @abstractmethod
    def build(self, request: GraphRequest) -> BuiltGraphs:
        """Build the graphs and plan their weights.

        Raises:
            ExportError: The target does not support what the recipe asks for.
        """

    def check(self, options: ExportOptions) -> None:
        """Check, before the checkpoint is read, that everything the target needs at the end of an export is there.

        Raises:
            EdgeLMError: Something is missing.
        """
        del options

    def tools(self, options: ExportOptions) -> Mapping[str, str]:
        """Return the versions of this target's tools, for the manifest."""
        del options
        return {}


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before the first byte is written."""

    info: ModelInfo
    ops: str
    tokens: TokenIds
    dtype: str
    graphs: BuiltGraphs


@dataclass(frozen=True)
class ExportJob:
    """One export from its plan to its manifest.

    Attributes:
        source: The weights.
        original: The float checkpoint that they were quantised from; None if unknown, or if `source` reads it itself.
        out: The bundle's folder.
        options: The caller's options.
        progress: Where progress is reported.
        tokenizer: The checkpoint's tokenizer.
        golden: Prompts and sizes of the parity pack.
        plan: The bundle's plan.
        calibration: How the weights were calibrated; None if they were not.
    """

    source: WeightSource
    original: Checkpoint | None
    out: Path
    options: ExportOptions
    progress: Progress
    tokenizer: Tokenizer
    golden: GoldenOptions
    plan: Plan
    calibration: CalibrationInfo | None = None


def make_plan(
    source: WeightSource,
    tokenizer: Tokenizer,
    options: ExportOptions,
    target: Target,
    progress: Progress,
) -> Plan:
    """Plan the bundle of the weights that `source` reads.

    Raises:
        ExportError: The target does not support what the model or the recipe asks for.
    """
    decoder = source.checkpoint.decoder
    info = ModelInfo.of(decoder, source.checkpoint.source_id)
    dtype = float_dtype(source, options, target)
    ops = target.operator_set(options.ops, progress)
    capabilities.check(decoder, target.capabilities(ops))
    return Plan(
        info=info,
        ops=ops,
        tokens=TokenIds(tokenizer.bos_id, tuple(tokenizer.eos_ids), tokenizer.pad_id),
        dtype=dtype,
        graphs=target.build(GraphRequest(source, decoder, info, ops, dtype)),
    )


def float_dtype(source: WeightSource, options: ExportOptions, target: Target) -> str:
    """Return the type in which the matrices that the recipe does not quantise are stored.

    Raises:
        ExportError: The target cannot compute with the type asked for.
    """
    quantises = any(source.scheme(name) is not None for name in source.shapes)
    return target.float_dtype(options.float_dtype, _most_floats(source), quantises=quantises)


def _most_floats(source: WeightSource) -> str:
    """Return the type of most values that stay float.

    Routers do not count: those of a calibrated checkpoint have another type.
    """
    checkpoint, counts = source.checkpoint, dict[str, int]()
    routers = {name for name, matrix in checkpoint.decoder.matrices.items() if matrix.role == "router"}
    for name, shape in source.shapes.items():
        if source.scheme(name) is None and checkpoint.tensors[name].dtype in _STORED:
            dtype = _STORED[checkpoint.tensors[name].dtype]
            if name not in routers:
                counts[dtype] = counts.get(dtype, 0) + math.prod(shape)
    return max(counts, key=lambda dtype: counts[dtype], default="float32")
