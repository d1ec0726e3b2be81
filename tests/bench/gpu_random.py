"""Load a model of a published shape with random weights onto a device in seconds, without checkpoint and export.

The exporter makes the program from the shapes. Codes are random bytes, and scales keep the size of activations; norms
are ones. No value is zero, since multiplying zeros is faster.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.bundle import ModelInfo
from edgelm.bundle.gpu_layout import GpuKind, GpuMatrix
from edgelm.export.graph.base import rotary_tables
from edgelm.export.plan import GraphRequest
from edgelm.export.tensorrt.target import TensorrtTarget
from edgelm.models import decoder as decoder_of
from edgelm.models.rope import inverse_frequencies
from edgelm.models.spec import Rope
from edgelm.quant.recipe import Recipe
from edgelm.quant.scheme import Fp8Scheme, Scheme
from edgelm.runtimes.cuda.device import Device
from edgelm.runtimes.cuda.executor import Executor, Layout, Sizes
from edgelm.runtimes.cuda.kernels import sampling
from edgelm.runtimes.cuda.program import PROGRAM_FILE, Node, Program, matrix_of
from edgelm.synth import PUBLISHED

RECIPES: Mapping[str, Recipe] = {
    "bf16": Recipe.load("none"),
    "fp8": Recipe("fp8", Fp8Scheme(None), Recipe.load("fp8").rules[:1]),  # also embedding and head
    "int8": Recipe.load("int8"),
    "int4": Recipe("int4", Scheme(4, 32), Recipe.load("int4").rules[:1]),  # likewise
}
"""Recipes by name. Speed depends on the type of embedding and head; quality does not matter here."""

# Random bytes are drawn once and repeated, since drawing them for a whole model takes longer than the measurement.
_RANDOM = 64 << 20
_RANDOM_SCALES = 1 << 20


class _Shapes:
    """Stands in for a checkpoint: shapes and schemes only."""

    def __init__(self, recipe: Recipe, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.recipe = recipe
        self.shapes = shapes
        self.static_inputs: dict[str, float] = {}

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def scheme(self, name: str) -> Any:
        return self.recipe.scheme_for(name, self.shapes[name])


def random_program(config: Mapping[str, Any], recipe: Recipe) -> Program:
    """Return the program of a model with this config.json and recipe."""
    decoder = decoder_of(config)
    source: Any = _Shapes(recipe.for_model(decoder), decoder.tensor_shapes)
    request = GraphRequest(source, decoder, ModelInfo.of(decoder, "random"), "gpu", "bfloat16")
    return Program.from_json(TensorrtTarget().build(request).files[PROGRAM_FILE], PROGRAM_FILE)


class RandomWeights:
    """Random weights of a program on a device, with the interface of `DeviceWeights`."""

    def __init__(self, device: Device, program: Program, theta: float = 10000.0, seed: int = 0) -> None:
        self._program = program
        self.nbytes = program.weight_bytes
        self._base = device.allocate(self.nbytes)
        random = np.random.default_rng(seed)
        matrices = dict(matrix for node in program.nodes for matrix in _matrices(node))
        pools = {kind: _codes(kind, random) for kind in {matrix.kind for matrix in matrices.values()}}
        for name, weight in program.weights.items():
            at = self.address(name)
            if name in matrices:
                _upload_blob(device, at, matrices[name], pools, random)
            elif name in ("rope.cos", "rope.sin"):
                device.upload(
                    at,
                    rotary_tables(Rope(tuple(inverse_frequencies(theta, 2 * weight.dims[1]).tolist())), weight.dims[0])[
                        name == "rope.sin"
                    ],
                )
            elif len(weight.dims) == 1:
                device.upload(at, np.ones(weight.dims, np.float32))
            else:
                device.upload(at, random.standard_normal(weight.dims, np.float32) / np.float32(weight.dims[1] ** 0.5))

    def address(self, name: str) -> int:
        """Return the address of a weight on the device."""
        return self._base + self._program.weights[name].offset


def _matrices(node: Node) -> list[tuple[str, GpuMatrix]]:
    if node.op in ("QuantLinear", "QuantEmbedding"):
        return [(node.inputs[1], matrix_of(node))]
    if node.op == "SparseMoE":
        return [(node.inputs[2], matrix_of(node, "gate_up_")), (node.inputs[3], matrix_of(node, "down_"))]
    return []


def _codes(kind: GpuKind, random: np.random.Generator) -> NDArray[np.uint8]:
    """Return random codes; those of floats have a standard deviation near 0.02."""
    if kind in (GpuKind.BFLOAT16, GpuKind.FLOAT16):
        values = random.standard_normal(_RANDOM // 2, np.float32) * np.float32(0.02)
        if kind is GpuKind.FLOAT16:
            return values.astype(np.float16).view(np.uint8)
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    codes = random.integers(0, 256, _RANDOM, np.uint8)
    return codes & np.uint8(0xB7) if kind is GpuKind.FP8 else codes  # |value| below 2


def _upload_blob(
    device: Device, at: int, matrix: GpuMatrix, pools: Mapping[GpuKind, NDArray[np.uint8]], random: np.random.Generator
) -> None:
    codes, pool = matrix.count * matrix.codes_stride, pools[matrix.kind]
    for start in range(0, codes, _RANDOM):
        device.upload(at + start, pool[: min(_RANDOM, codes - start)])
    if matrix.kind.scale_bytes:
        spread = {GpuKind.INT4: 4.6, GpuKind.INT8: 74.0, GpuKind.FP8: 0.5}[matrix.kind]
        size, nbytes = matrix.kind.scale_bytes, matrix.count * matrix.scales_stride
        scales = (random.uniform(0.9, 1.1, min(nbytes, _RANDOM_SCALES) // size) * 0.02 / spread).astype(f"<f{size}")
        for start in range(0, nbytes, scales.nbytes):
            device.upload(at + matrix.scales_offset + start, scales[: (nbytes - start) // size])
    if matrix.zeros:
        middle = 8 if matrix.kind is GpuKind.INT4 else 128
        device.upload(at + matrix.zeros_offset, np.full(matrix.count * matrix.zeros_stride, middle, np.uint8))


def random_model(device: Device, name: str, kind: str, sizes: Sizes) -> Executor:
    """Return a model of a published shape ("olmoe-1b-7b", "fox-1-1.6b") with random weights of a kind of `RECIPES`."""
    return loaded(device, random_program(PUBLISHED[name], RECIPES[kind]), sizes)


def loaded(device: Device, program: Program, sizes: Sizes) -> Executor:
    """Return an executor of a program with random weights on a device."""
    layout = Layout(program, sizes, device.info)
    device.load([*layout.operators.kernels(), *(sampling.kernels() if layout.sampling else ())])
    weights: Any = RandomWeights(device, program)
    return Executor(device, weights, layout)


def again(model: Executor) -> Executor:
    """Return another executor with the same weights and its own memory."""
    return Executor(model.device, model._weights, model.layout)
