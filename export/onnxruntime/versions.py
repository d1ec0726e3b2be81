"""Find the oldest ONNX Runtime that loads a portable graph and computes it correctly on the CPU.

The versions are measured: wheels from 1.17 to 1.32 ran the operators over a grid of shapes, and whole bundles with
prompts in one step and in chunks, compared with numpy and with 1.31.1. A version counts only if its results are right:
1.18 and 1.19 load GroupQueryAttention but compute chunks after the first wrongly, and 1.23 to 1.26 read some zero
points wrongly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx

from edgelm.bundle import Requirement, version_numbers
from edgelm.export.graph.onnx_builder import DEFAULTS, MICROSOFT

PACKAGE = "onnxruntime"

Found = Iterator[tuple[str, str]]


def onnxruntime_for(*models: onnx.ModelProto) -> tuple[Requirement, ...]:
    """Return, for each feature that the models use, the oldest version that computes it correctly; newest first."""
    found = {pair for model in models for pair in _features(model)}
    ordered = sorted(found, key=lambda pair: (version_numbers(pair[0]), pair[1]), reverse=True)
    return tuple(Requirement(PACKAGE, version, feature) for version, feature in ordered)


def _features(model: onnx.ModelProto) -> Found:
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.domain != MICROSOFT:
            continue
        attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
        values = {**DEFAULTS.get(node.op_type, {}), **attributes}
        if node.op_type == "GroupQueryAttention":
            yield "1.20.0", "attention over a prompt that comes in chunks (GroupQueryAttention)"
        elif node.op_type == "MatMulNBits" and values["bits"] == 8:
            yield "1.23.0", "8-bit matrices (MatMulNBits)"
        elif node.op_type == "GatherBlockQuantized":
            yield from _embedding(node, values, shapes)
        elif node.op_type == "MoE":
            yield "1.23.2", "a MoE of float experts (MoE)"
        elif node.op_type == "QMoE":
            yield from _experts(node, values, shapes)


def _embedding(node: onnx.NodeProto, values: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]]) -> Found:
    if values["bits"] == 8:
        yield "1.23.0", "an 8-bit embedding (GatherBlockQuantized)"
    elif len(node.input) < 4:
        yield "1.22.0", "a 4-bit embedding (GatherBlockQuantized)"
    elif shapes[node.input[2]][-1] % 2:
        yield "1.27.0", "4-bit zero points of an embedding with an odd number of groups a row (GatherBlockQuantized)"
    else:
        yield "1.23.0", "4-bit zero points of an embedding (GatherBlockQuantized)"


def _experts(node: onnx.NodeProto, values: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]]) -> Found:
    yield "1.25.0", "a MoE of quantised experts that takes its routing weights as they are (QMoE)"
    if values["accuracy_level"]:
        yield "1.31.0", 'int8 activations of 4-bit experts (QMoE\'s accuracy_level; activations = "float" does without)'
    if 1 in (shapes[node.input[i]][-1] for i in (3, 6)):
        yield "1.31.0", "experts with one group a row (QMoE)"
