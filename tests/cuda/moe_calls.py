"""Requests to the launch planning in C++ (csrc/cuda/host): kernels of moe.cuh, and SparseMoE.

The comments of moe.h and sparse_moe.h describe the fields. Addresses are integers; 0: absent.
"""

from __future__ import annotations

from dataclasses import dataclass

from linear_calls import device_fields, fields_of, kernels_in, request_of

from edgelm.bundle.gpu_layout import GpuMatrix
from edgelm.runtimes.cuda import planning
from edgelm.runtimes.cuda.device import DeviceInfo, Launch


@dataclass(frozen=True)
class MoeShape:
    """`MoeShape` of moe.h."""

    tokens: int
    columns: int
    hidden: int
    experts: int
    k: int
    normalize: bool = False
    activation: str = "bf16"
    epsilon: float = 1e-5

    @property
    def slots(self) -> int:
        """The number of (token, expert) pairs."""
        return self.tokens * self.k

    @property
    def most_active(self) -> int:
        """The largest number of experts that can have tokens."""
        return min(self.experts, self.slots)


@dataclass(frozen=True)
class MoeWorkspace:
    """Addresses of intermediate results: `MoeWorkspace` of moe.h."""

    logits: int
    normed: int
    chosen: int
    chosen_weights: int
    counts: int
    offsets: int
    row_map: int
    slot_weights: int
    slot_of: int
    active: int
    hidden: int
    outputs: int


@dataclass(frozen=True)
class SparseMoe:
    """`SparseMoe` of sparse_moe.h."""

    shape: MoeShape
    gate_up: GpuMatrix
    down: GpuMatrix
    rounding: float = 0.0

    def request(self) -> dict[str, planning.Field]:
        """Return the fields of the call."""
        return request_of(self.shape, gate_up=self.gate_up, down=self.down, rounding=self.rounding)


@dataclass(frozen=True)
class SparseMoeBuffers:
    """`SparseMoeBuffers` of sparse_moe.h."""

    x: int
    norm: int
    router: int
    gate_up: int
    down: int
    y: int
    workspace: int
    logits: int = 0
    counters: int = 0


def all_kernels() -> tuple[str, ...]:
    """Return the name of every kernel of moe.cuh."""
    return kernels_in("moe/moe.cuh")


def workspace(shape: MoeShape, address: int) -> MoeWorkspace:
    """Lay out `workspace_bytes(shape)` bytes at `address`."""
    return MoeWorkspace(*_workspace(shape, address)[:-1])


def workspace_bytes(shape: MoeShape) -> int:
    """Return the bytes that `workspace` divides."""
    return _workspace(shape, 0)[-1]


def _workspace(shape: MoeShape, address: int) -> list[int]:
    return [int(part) for part in planning.call("moe_workspace", request_of(shape, workspace=address)).split()]


def router_launch(shape: MoeShape, x: int, norm: int, router: int, logits: int, normed: int, tile: int = 0) -> Launch:
    """Return the launch that computes logits and normed rows."""
    fields = request_of(shape, x=x, norm=norm, router=router, logits=logits, normed=normed, tile=tile)
    (launch,) = planning.launches("moe_router", fields)
    return launch


def route_launches(
    shape: MoeShape, x: int, norm: int, router: int, logits: int, places: MoeWorkspace, counter: int = 0
) -> list[Launch]:
    """Return the launches of router, choice of experts and sorting."""
    fields = request_of(shape, x=x, norm=norm, router=router, logits=logits, at=places, counter=counter)
    return planning.launches("moe_route", fields)


def choose_launches(shape: MoeShape, logits: int, places: MoeWorkspace) -> list[Launch]:
    """Return the launches of choice of experts and sorting."""
    return planning.launches("moe_choose", request_of(shape, logits=logits, at=places))


def combine_launch(shape: MoeShape, x: int, outputs: int, slot_weights: int, slot_of: int, y: int) -> Launch:
    """Return the launch of y = x + weighted sum of the experts' outputs."""
    fields = request_of(shape, x=x, outputs=outputs, slot_weights=slot_weights, slot_of=slot_of, y=y)
    (launch,) = planning.launches("moe_combine", fields)
    return launch


def down_launch(
    shape: MoeShape, matrix: GpuMatrix, weights: int, x: int, hidden: int, places: MoeWorkspace, y: int
) -> Launch:
    """Return the launch of y = x + weighted sum of the experts' down matmuls."""
    fields = request_of(shape, down=matrix, weights=weights, x=x, hidden_rows=hidden, at=places, y=y)
    (launch,) = planning.launches("moe_down", fields)
    return launch


def sparse_moe_workspace_bytes(call: SparseMoe) -> int:
    """Return the bytes of scratch memory that `sparse_moe_launches` needs."""
    return int(planning.call("sparse_moe_workspace", call.request()))


def sparse_moe_launches(call: SparseMoe, buffers: SparseMoeBuffers, info: DeviceInfo) -> list[Launch]:
    """Return the launches of one SparseMoE."""
    fields = call.request() | fields_of(at=buffers) | device_fields(info)
    return planning.launches("sparse_moe", fields)


def sparse_moe_kernels(call: SparseMoe) -> tuple[str, ...]:
    """Return all kernels that such a call may launch."""
    return tuple(planning.call("sparse_moe_kernels", call.request()).decode().split())
