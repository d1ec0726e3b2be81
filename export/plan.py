"""What is known of a bundle before its first byte is written, and what a target has to say about it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from edgelm.bundle import CalibrationInfo, ModelInfo, Requirement, TokenIds
from edgelm.checkpoint import Checkpoint
from edgelm.export import capabilities
from edgelm.export.capabilities import Capabilities
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
    """What a graph is to be built of; `dtype` is how matrices that the recipe keeps in float are stored."""

    source: WeightSource
    decoder: Decoder
    info: ModelInfo
    ops: str
    dtype: str


@dataclass(frozen=True)
class BuiltGraphs:
    """The graphs of a bundle, the weights that they share, the type of their cache, and what is needed to run them.

    `files` are the graphs' files by name, `file` that of the deployed one and `debug_file` that of the debug graph.
    `rounded` names the matrices whose inputs the graph rounds to int8, and in blocks of how many columns; None where
    that is not all that is rounded (on a GPU values are float16 or bfloat16 too). `finish` writes what else belongs to
    the bundle; the weights, `files` and the checkpoint's texts are in the folder then.
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
    """A kind of device, and how bundles for it are made."""

    name: str

    @abstractmethod
    def operator_set(self, ops: str, progress: Progress) -> str:
        """The operators to export for, given `ops` of the options.

        Raises:
            ExportError: this target has none of these.
        """

    @abstractmethod
    def float_dtype(self, asked: str, checkpoint: str, *, quantises: bool) -> str:
        """How float matrices are stored: what was asked for, "auto" being the checkpoint's type where that will do.

        Raises:
            ExportError: this target cannot compute with what was asked for.
        """

    @abstractmethod
    def capabilities(self, ops: str) -> Capabilities:
        """What the operators `ops` can compute."""

    @abstractmethod
    def notes(self, source: WeightSource) -> list[str]:
        """What a user should know whose recipe asks for what this kind of device does otherwise."""

    @abstractmethod
    def build(self, request: GraphRequest) -> BuiltGraphs:
        """Build the graphs and plan their weights.

        Raises:
            ExportError: the target cannot hold or compute what the recipe asks for.
        """

    def check(self, options: ExportOptions) -> None:
        """Refuse what can be refused before anything is read.

        Raises:
            EdgeLMError: something that the export would need at its end is missing.
        """
        del options

    def tools(self) -> Mapping[str, str]:
        """Versions of what else made a bundle, for its manifest."""
        return {}


@dataclass(frozen=True)
class Plan:
    """Everything that is known before the first byte is written."""

    info: ModelInfo
    ops: str
    tokens: TokenIds
    dtype: str
    graphs: BuiltGraphs


@dataclass(frozen=True)
class ExportJob:
    """One export from its plan to its manifest.

    Attributes:
        source: the weights.
        original: the float checkpoint that they were made from; None where it is the source's own, or unknown.
        out: the bundle's folder.
        options, progress: of the caller.
        tokenizer: the checkpoint's.
        golden: what the parity pack is made of.
        plan: the bundle's.
        calibration: how codes were chosen, where it was by calibration.
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
    """Plan the bundle of the weights that `source` gives.

    Raises:
        ExportError: the target cannot hold or compute what the recipe asks for.
    """
    decoder = source.checkpoint.decoder
    info = model_info(decoder, source.checkpoint.source_id)
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


def model_info(decoder: Decoder, name: str) -> ModelInfo:
    """What a manifest says of a model."""
    attention, moe = decoder.attention[0], decoder.first_moe
    return ModelInfo(
        family=decoder.family,
        name=name,
        hidden_size=decoder.hidden_size,
        num_layers=decoder.num_layers,
        num_heads=attention.heads,
        num_kv_heads=attention.kv_heads,
        head_dim=attention.head_dim,
        vocab_size=decoder.vocab_size,
        context_length=decoder.context_length,
        tied=decoder.tied,
        num_experts=decoder.num_experts,
        experts_per_token=decoder.active_experts,
        norm_topk_prob=moe is not None and moe.normalize,
    )


def float_dtype(source: WeightSource, options: ExportOptions, target: Target) -> str:
    """How the matrices that the recipe keeps in float are stored.

    Raises:
        ExportError: the target cannot compute with what was asked for.
    """
    quantises = any(source.scheme(name) is not None for name in source.shapes)
    return target.float_dtype(options.float_dtype, _most_floats(source), quantises=quantises)


def _most_floats(source: WeightSource) -> str:
    """The type of most values that stay float: scales are of another, and a calibrated checkpoint's routers too."""
    checkpoint, counts = source.checkpoint, dict[str, int]()
    routers = {name for name, matrix in checkpoint.decoder.matrices.items() if matrix.role == "router"}
    for name, shape in source.shapes.items():
        if source.scheme(name) is None and checkpoint.tensors[name].dtype in _STORED:
            dtype = _STORED[checkpoint.tensors[name].dtype]
            if name not in routers:
                counts[dtype] = counts.get(dtype, 0) + math.prod(shape)
    return max(counts, key=lambda dtype: counts[dtype], default="float32")
