"""Launches of the kernels in moe.cuh: router, choice of experts, sorting by expert, weighted sum."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from edgelm.bundle.gpu_layout import GpuMatrix, aligned
from edgelm.errors import DeviceError
from edgelm.runtimes.cuda.device import Launch
from edgelm.runtimes.cuda.kernels.linear import TYPES

HEADER = "moe/moe.cuh"

MAX_EXPERTS = 256
MAX_CHOSEN = 16
CHOOSE_TOKENS = 32
"""The largest number of tokens that one block chooses and sorts for: an expert's tokens are bits of one word."""
TILED_TOKENS = 257
"""From this number of tokens on the router is computed in tiles. For fewer, a block per few tokens and experts is
faster."""

_ACTIVATION_BYTES = {"bf16": 2, "f16": 2, "f32": 4}
# (tokens, experts, threads) per block of the router for few tokens, by kernel.
_ROUTERS = {"n1": (1, 2, 512), "n4": (4, 4, 512)}
_TILES, _TILE_THREADS = (32, 16, 8), 256  # tokens per block of the router in tiles
_PLACE_THREADS = 256
_COMBINE_THREADS = 128
DOWN_TOKENS = 32
"""The largest number of tokens for which the down matmul and the weighted sum are one launch."""
_DOWN_THREADS = 512
_DOWN_RINGS = {1: 8, 2: 8, 4: 6}  # tiles per warp in shared memory, by tiles of 8 tokens

# The structs of moe.cuh.
_ROUTER_ARGS = struct.Struct("<5Q3if")
_CHOOSE_ARGS = struct.Struct("<9Q4i")
_ROUTE_ARGS = struct.Struct(_ROUTER_ARGS.format + _CHOOSE_ARGS.format[1:] + "Q")
_COMBINE_ARGS = struct.Struct("<5Q3i4x")
_DOWN_ARGS = struct.Struct("<9Q3q7i4x")


@dataclass(frozen=True)
class MoeShape:
    """The shape of an MoE layer, with the letters of moe.cuh.

    Attributes:
        tokens: M, over all sequences.
        columns: D, columns of x; a multiple of 8.
        hidden: F, columns inside an expert.
        experts: E, 1 to 256.
        k: experts per token, 1 to 16 and at most E.
        normalize: whether a token's weights are divided by their sum.
        activation: type of the experts' activations: bf16, f16, or f32 for the exact kernels.
        epsilon: of the norm.
    """

    tokens: int
    columns: int
    hidden: int
    experts: int
    k: int
    normalize: bool = False
    activation: str = "bf16"
    epsilon: float = 1e-5

    def __post_init__(self) -> None:
        """Raise DeviceError if the kernels cannot compute this."""
        if self.tokens < 1:
            raise DeviceError(f"tokens is {self.tokens}, expected 1 or more")
        for name, value in (("columns", self.columns), ("hidden", self.hidden)):
            if value < 16 or value % 8:
                raise DeviceError(f"{name} is {value}, expected a multiple of 8, 16 or more")
        if not 1 <= self.experts <= MAX_EXPERTS:
            raise DeviceError(f"experts is {self.experts}, expected 1 to {MAX_EXPERTS}")
        if not 1 <= self.k <= min(MAX_CHOSEN, self.experts):
            raise DeviceError(f"k is {self.k}, expected 1 to {min(MAX_CHOSEN, self.experts)} of {self.experts} experts")
        if self.activation not in _ACTIVATION_BYTES:
            raise DeviceError(f"activation is {self.activation!r}, expected one of {', '.join(_ACTIVATION_BYTES)}")
        if self.tokens * self.k * max(self.columns, self.hidden) >= 1 << 40 or self.tokens * self.k >= 1 << 30:
            raise DeviceError(f"{self.tokens} tokens are too many for one launch: divide the prompt")

    @property
    def slots(self) -> int:
        """The number of (token, expert) pairs, M * k."""
        return self.tokens * self.k

    @property
    def most_active(self) -> int:
        """The largest number of experts that can have tokens."""
        return min(self.experts, self.slots)

    @property
    def blocks(self) -> int:
        """The number of blocks of 32 tokens."""
        return -(-self.tokens // CHOOSE_TOKENS)


@dataclass(frozen=True)
class MoeWorkspace:
    """Addresses of intermediate results. They are int32 or float32 unless stated otherwise.

    Attributes:
        logits: [M, E].
        normed: [M, D] of the activation's type, RMSNorm(x).
        chosen, chosen_weights, counts: [M, k], [M, k] and [ceil(M / 32), E]; used between two kernels only.
        offsets: [E + 1], the first slot of each expert.
        row_map: [M k], the token of each slot.
        slot_weights: [M k], the weight of each slot.
        slot_of: [M, k], a token's slots in ascending order, which is the order of its experts.
        active: [1 + min(E, M k), 4], the number of experts that have tokens, then index, first slot and slots of each.
        hidden: [M k, F] of the activation's type, the result of gate and up.
        outputs: [M k, D], the result of down.
    """

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


def _sizes(shape: MoeShape) -> dict[str, int]:
    width = _ACTIVATION_BYTES[shape.activation]
    many = shape.tokens > CHOOSE_TOKENS
    return {
        "logits": 4 * shape.tokens * shape.experts,
        "normed": width * shape.tokens * shape.columns,
        "chosen": 4 * shape.slots * many,
        "chosen_weights": 4 * shape.slots * many,
        "counts": 4 * shape.blocks * shape.experts * many,
        "offsets": 4 * (shape.experts + 1),
        "row_map": 4 * shape.slots,
        "slot_weights": 4 * shape.slots,
        "slot_of": 4 * shape.slots,
        "active": 16 * (1 + shape.most_active),
        "hidden": width * shape.slots * shape.hidden,
        "outputs": 4 * shape.slots * shape.columns,
    }


def workspace_bytes(shape: MoeShape) -> int:
    """Return the bytes that `workspace` divides. They never decrease with more tokens."""
    return sum(map(aligned, _sizes(shape).values()))


def workspace(shape: MoeShape, address: int) -> MoeWorkspace:
    """Lay out `workspace_bytes(shape)` bytes at `address`. Parts are aligned to 256 bytes if `address` is."""
    places = {}
    for name, size in _sizes(shape).items():
        places[name] = address
        address += aligned(size)
    return MoeWorkspace(**places)


def router_launch(shape: MoeShape, x: int, norm: int, router: int, logits: int, normed: int) -> Launch:
    """Return the launch that computes logits and normed rows.

    Args:
        shape: the layer's shape.
        x: address of [M, D] float32.
        norm: of [D] float32.
        router: of [E, D] float32.
        logits: of [M, E] float32, written.
        normed: of [M, D] of the activation's type, written.
    """
    args = _router_args(shape, x, norm, router, logits, normed)
    if shape.tokens >= TILED_TOKENS:
        # The largest tile that still uses most multiprocessors of a large GPU.
        tile = next((tile for tile in _TILES if shape.tokens > 96 * tile), _TILES[-1])
        grid = (-(-shape.tokens // tile), 1, 1)
        return Launch(f"moe_router_{shape.activation}_t{tile}", grid, _TILE_THREADS, 64 * (tile + 64) * 4, args)
    kind, grid, threads, shared = _router_blocks(shape)
    return Launch(f"moe_router_{shape.activation}_{kind}", grid, threads, shared, args)


def route_launches(
    shape: MoeShape, x: int, norm: int, router: int, logits: int, places: MoeWorkspace, counter: int = 0
) -> list[Launch]:
    """Return the launches of router, choice of experts and sorting. Up to 32 tokens, with a counter, it is one launch.

    Args:
        shape: the layer's shape.
        x, norm, router, logits: as in `router_launch`.
        places: all buffers but hidden and outputs are written.
        counter: address of an int32 that is 0; it is 0 again when the launches have ended. 0: no counter.
    """
    if not counter or shape.tokens > CHOOSE_TOKENS:
        first = router_launch(shape, x, norm, router, logits, places.normed)
        return [first, *choose_launches(shape, logits, places)]
    kind, grid, threads, shared = _router_blocks(shape)
    args = _router_args(shape, x, norm, router, logits, places.normed) + _choose_args(shape, logits, places)
    args += counter.to_bytes(8, "little")
    assert len(args) == _ROUTE_ARGS.size
    name = f"moe_route_{shape.activation}_{kind}_e{32 * _experts_per_lane(shape.experts)}"
    return [Launch(name, grid, threads, 16 + max(shared, _choose_shared(shape)), args)]


def _router_blocks(shape: MoeShape) -> tuple[str, tuple[int, int, int], int, int]:
    """Return name, grid, threads and shared memory of the router for few tokens."""
    kind = "n1" if shape.tokens <= 2 else "n4"
    tokens, experts, threads = _ROUTERS[kind]
    grid = (-(-shape.experts // experts), -(-shape.tokens // tokens), 1)
    return kind, grid, threads, 4 * (threads // 32) * tokens * (experts + 1)


def _router_args(shape: MoeShape, x: int, norm: int, router: int, logits: int, normed: int) -> bytes:
    return _ROUTER_ARGS.pack(x, norm, router, logits, normed, shape.tokens, shape.columns, shape.experts, shape.epsilon)


def _choose_args(shape: MoeShape, logits: int, places: MoeWorkspace) -> bytes:
    return _CHOOSE_ARGS.pack(
        logits, places.chosen, places.chosen_weights, places.counts, places.offsets, places.row_map,
        places.slot_weights, places.slot_of, places.active, shape.tokens, shape.experts, shape.k, shape.normalize,
    )  # fmt: skip


def _choose_shared(shape: MoeShape) -> int:
    return 12 * shape.experts + 8 * shape.slots


def choose_launches(shape: MoeShape, logits: int, places: MoeWorkspace) -> list[Launch]:
    """Return the launches of choice of experts and sorting: one up to 32 tokens, two for more.

    Args:
        shape: the layer's shape.
        logits: address of [M, E] float32.
        places: offsets, row_map, slot_weights, slot_of and active are written.
    """
    args = _choose_args(shape, logits, places)
    lanes = _experts_per_lane(shape.experts)
    if shape.tokens <= CHOOSE_TOKENS:
        return [Launch(f"moe_choose_e{32 * lanes}", (1, 1, 1), 32 * shape.tokens, _choose_shared(shape), args)]
    grid = (shape.blocks, 1, 1)
    return [
        Launch(f"moe_choose_many_e{32 * lanes}", grid, 32 * CHOOSE_TOKENS, 4 * shape.experts, args),
        Launch(f"moe_place_e{32 * lanes}", grid, _PLACE_THREADS, 12 * shape.experts, args),
    ]


def combine_launch(shape: MoeShape, x: int, outputs: int, slot_weights: int, slot_of: int, y: int) -> Launch:
    """Return the launch of y = x + weighted sum of the experts' outputs.

    Args:
        shape: the layer's shape.
        x: address of [M, D] float32.
        outputs: of [M k, D] float32, in the order of slots.
        slot_weights: of [M k] float32.
        slot_of: of [M, k] int32.
        y: of [M, D] float32, written; may be x.
    """
    args = _COMBINE_ARGS.pack(x, outputs, slot_weights, slot_of, y, shape.tokens, shape.columns, shape.k)
    grid = (shape.tokens, -(-shape.columns // (4 * _COMBINE_THREADS)), 1)
    return Launch("moe_combine_f32", grid, _COMBINE_THREADS, 0, args)


def down_launch(
    shape: MoeShape, matrix: GpuMatrix, weights: int, x: int, hidden: int, places: MoeWorkspace, y: int
) -> Launch:
    """Return the launch of y = x + weighted sum of the experts' down matmuls, for up to 32 tokens and 16-bit
    activations.

    Args:
        shape: the layer's shape.
        matrix: the experts' matrices [D, F].
        weights: address of their blob.
        x: of [M, D] float32.
        hidden: of [M k, F] of the activation's type, in the order of slots.
        places: active, slot_weights and slot_of are read.
        y: of [M, D] float32, written; may be x.

    Raises:
        DeviceError: there is no kernel for it, or the matrix does not fit the shape.
    """
    wanted = (shape.experts, shape.columns, shape.hidden, False)
    if (matrix.count, matrix.rows, matrix.columns, matrix.swiglu) != wanted:
        raise DeviceError(f"down is {matrix}, expected {shape.experts} matrices [{shape.columns}, {shape.hidden}]")
    if shape.hidden % matrix.kind.columns or (matrix.kind.scale_bytes and matrix.group % 16):
        raise DeviceError(f"{matrix} has partial tiles, or a group that is not a multiple of 16")
    if shape.tokens > DOWN_TOKENS or (shape.activation, matrix.kind) not in _downs():
        raise DeviceError(
            f"moe_down has no kernel for {shape.tokens} tokens of {shape.activation} with {matrix.kind} weights"
        )
    tiles = next(n for n in _DOWN_RINGS if shape.tokens <= 8 * n)
    warps = _DOWN_THREADS // 32
    # With few experts, several warps divide an expert's columns, as long as each has some tiles.
    split = 1
    while split * 2 * min(shape.most_active, 8) <= warps and split * 8 <= shape.hidden // matrix.kind.columns:
        split *= 2
    args = _DOWN_ARGS.pack(
        hidden, weights, weights + matrix.scales_offset, weights + matrix.zeros_offset if matrix.zeros else 0,
        places.active, places.slot_weights, places.slot_of, x, y, matrix.codes_stride,
        matrix.scales_stride, matrix.zeros_stride, shape.tokens, shape.columns, shape.hidden, matrix.group, shape.k,
        shape.most_active, split,
    )  # fmt: skip
    shared = _DOWN_RINGS[tiles] * _DOWN_THREADS * 16 + warps * (tiles * 8 * 20 + 2) * 4
    name = f"moe_down_{shape.activation}_{matrix.kind}_f32_n{8 * tiles}"
    return Launch(name, (matrix.blocks, 1, 1), _DOWN_THREADS, shared, args)


def all_kernels() -> tuple[str, ...]:
    """Return the name of every kernel."""
    routers = [
        f"moe_router_{a}_{kind}" for a in _ACTIVATION_BYTES for kind in (*_ROUTERS, *(f"t{tile}" for tile in _TILES))
    ]
    choices = [f"moe_{what}_e{32 * p}" for what in ("choose", "choose_many", "place") for p in (1, 2, 4, 8)]
    downs = [f"moe_down_{a}_{kind}_f32_n{8 * tiles}" for a, kind in _downs() for tiles in _DOWN_RINGS]
    routes = [f"moe_route_{a}_{kind}_e{32 * p}" for a in _ACTIVATION_BYTES for kind in _ROUTERS for p in (1, 2, 4, 8)]
    return (*routers, *choices, *routes, *downs, "moe_combine_f32")


def instantiation(name: str) -> str:
    """Return the line of C++ that instantiates the kernel `name`."""
    if name not in all_kernels():
        raise KeyError(name)
    if name == "moe_combine_f32":
        return f"EDGELM_KERNEL({name}, MoeCombineArgs, {_COMBINE_THREADS}, 1, moe_combine)"
    what, _, variant = name.rpartition("_")
    if what.startswith("moe_router_"):
        activation = TYPES[what.removeprefix("moe_router_")]
        if variant[0] == "t":
            body = f"moe_router_tiled<{activation}, {variant[1:]}>"
            return f"EDGELM_KERNEL({name}, MoeRouterArgs, {_TILE_THREADS}, 1, {body})"
        tokens, experts, threads = _ROUTERS[variant]
        return f"EDGELM_KERNEL({name}, MoeRouterArgs, {threads}, 1, moe_router<{activation}, {tokens}, {experts}>)"
    if what.startswith("moe_route_"):
        activation, kind = what.split("_")[2:]
        tokens, experts, threads = _ROUTERS[kind]
        body = f"moe_route<{TYPES[activation]}, {tokens}, {experts}, {int(variant[1:]) // 32}>"
        return f"EDGELM_KERNEL({name}, MoeRouteArgs, {threads}, 1, {body})"
    if what.startswith("moe_down_"):
        activation, kind = what.split("_")[2:4]
        body = f"moe_down<{TYPES[activation]}, {TYPES[kind]}, {int(variant[1:]) // 8}>"
        return f"EDGELM_KERNEL({name}, MoeDownArgs, {_DOWN_THREADS}, 1, {body})"
    threads = _PLACE_THREADS if what == "moe_place" else 32 * CHOOSE_TOKENS
    return f"EDGELM_KERNEL({name}, MoeChooseArgs, {threads}, 1, {what}<{int(variant[1:]) // 32}>)"


def _downs() -> list[tuple[str, str]]:
    return [(activation, kind) for activation in ("bf16", "f16") for kind in ("int4", "int8", "fp8", activation)]


def _experts_per_lane(experts: int) -> int:
    return next(p for p in (1, 2, 4, 8) if experts <= 32 * p)
