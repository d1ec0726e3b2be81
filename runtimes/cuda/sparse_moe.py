"""Launches of SparseMoE: the kernels of moe.cuh around the grouped matmuls of linear.cuh."""

from __future__ import annotations

from dataclasses import dataclass

from edgelm.bundle.gpu_layout import GpuMatrix
from edgelm.runtimes.cuda.device import DeviceInfo, Launch
from edgelm.runtimes.cuda.kernels import linear, moe
from edgelm.runtimes.cuda.kernels.linear import Matmul
from edgelm.runtimes.cuda.kernels.moe import MoeShape, MoeWorkspace

COUNTER_BYTES = 4
"""Bytes of `SparseMoeBuffers.counters`."""


@dataclass(frozen=True)
class SparseMoe:
    """A call of the operator: shape, the formats of the experts' two blobs, and `rounding` of their matmuls."""

    shape: MoeShape
    gate_up: GpuMatrix
    down: GpuMatrix
    rounding: float = 0.0

    @property
    def fuses_down(self) -> bool:
        """Whether the down matmul and the weighted sum are one launch."""
        return self.shape.activation != "f32" and self.rounding == 0 and self.shape.tokens <= moe.DOWN_TOKENS

    def first(self, normed: int, blob: int, hidden: int, places: MoeWorkspace) -> Matmul:
        """Return the matmul of gate and up for all slots."""
        shape = self.shape
        return Matmul(
            self.gate_up, blob, normed, hidden, shape.slots, activation=shape.activation, row_map=places.row_map,
            offsets=places.offsets, x_rows=shape.tokens, most_rows=shape.tokens, rounding=self.rounding,
        )  # fmt: skip

    def second(self, hidden: int, blob: int, outputs: int, places: MoeWorkspace) -> Matmul:
        """Return the matmul of down for all slots."""
        shape = self.shape
        return Matmul(
            self.down, blob, hidden, outputs, shape.slots, activation=shape.activation, y_float=True,
            offsets=places.offsets, most_rows=shape.tokens, rounding=self.rounding,
        )  # fmt: skip


@dataclass(frozen=True)
class SparseMoeBuffers:
    """Addresses on the device.

    Attributes:
        x: float32 [M, D].
        norm: float32 [D].
        router: float32 [E, D].
        gate_up, down: the experts' weights.
        y: float32 [M, D], written; may be x.
        workspace: `workspace_bytes` of scratch memory.
        logits: float32 [M, E], receives the router's logits; 0: not needed.
        counters: `COUNTER_BYTES` of zeros, or 0. The launches reset them to zeros. They save a launch for few tokens.
    """

    x: int
    norm: int
    router: int
    gate_up: int
    down: int
    y: int
    workspace: int
    logits: int = 0
    counters: int = 0


def workspace_bytes(call: SparseMoe) -> int:
    """Return the bytes of scratch memory that `moe_launches` needs."""
    places = moe.workspace(call.shape, 0)
    matmuls = [call.first(0, 0, 0, places), call.second(0, 0, 0, places)]
    return moe.workspace_bytes(call.shape) + max(map(linear.workspace_bytes, matmuls))


def moe_launches(call: SparseMoe, buffers: SparseMoeBuffers, info: DeviceInfo) -> list[Launch]:
    """Return the launches of one SparseMoE."""
    shape = call.shape
    places = moe.workspace(shape, buffers.workspace)
    scratch = buffers.workspace + moe.workspace_bytes(shape)
    logits = buffers.logits or places.logits
    launches = [
        *moe.route_launches(shape, buffers.x, buffers.norm, buffers.router, logits, places, buffers.counters),
        *linear.matmul_launches(call.first(places.normed, buffers.gate_up, places.hidden, places), info, scratch),
    ]
    if call.fuses_down:
        down = moe.down_launch(shape, call.down, buffers.down, buffers.x, places.hidden, places, buffers.y)
        return [*launches, down]
    second = call.second(places.hidden, buffers.down, places.outputs, places)
    return [
        *launches,
        *linear.matmul_launches(second, info, scratch),
        moe.combine_launch(shape, buffers.x, places.outputs, places.slot_weights, places.slot_of, buffers.y),
    ]


def kernels_of(call: SparseMoe) -> tuple[str, ...]:
    """Return all kernels that such a call may launch, for any number of tokens."""
    shape, activation = call.shape, call.shape.activation
    lanes = next(e for e in (32, 64, 128, 256) if shape.experts <= e)
    wanted = [f"moe_router_{activation}_", f"moe_down_{activation}_{call.down.kind}_", "moe_combine_"]
    by_experts = ("moe_choose_", "moe_place_", f"moe_route_{activation}_")
    names = [name for name in moe.all_kernels() if name.startswith(tuple(wanted))]
    names += [name for name in moe.all_kernels() if name.startswith(by_experts) and name.endswith(f"_e{lanes}")]
    for matrix in (call.gate_up, call.down):
        names += linear.kernels_of(matrix, activation, call.rounding)
    return tuple(names)
