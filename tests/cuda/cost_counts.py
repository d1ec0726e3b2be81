"""Counts the instructions that a decode step's launches execute: plans, compiles, and executes machine code on the CPU.

The launches are those that the runtime plans for the published shapes. NVRTC compiles their kernels, nvdisasm reads
them, and `sass` executes some blocks of each launch with its real arguments.
"""

from __future__ import annotations

import collections
import functools
import statistics
import struct
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "bench"), str(ROOT / "tests" / "cuda")]

import gpu_random  # noqa: E402
import sass  # noqa: E402
from gpu_dry import DryDevice  # noqa: E402
from sass import Code, Memory, Trace  # noqa: E402

from edgelm.bundle.kv_cache import row_bytes  # noqa: E402
from edgelm.runtimes.base import _LOGITS_BYTES  # noqa: E402
from edgelm.runtimes.cuda.device import DeviceInfo, Launch  # noqa: E402
from edgelm.runtimes.cuda.executor import Executor, Layout, Sizes  # noqa: E402
from edgelm.runtimes.cuda.kernels import nvrtc, sources  # noqa: E402
from edgelm.runtimes.cuda.model import DEFAULT_CHUNK  # noqa: E402
from edgelm.runtimes.cuda.program import Node, Program, matrix_of  # noqa: E402
from edgelm.synth import PUBLISHED  # noqa: E402

MODELS = ("fox-1-1.6b", "olmoe-1b-7b")
KINDS = tuple(gpu_random.RECIPES)
CONTEXT = 512
"""Tokens in the cache when the step begins."""
CAPACITY = 4096
# Addresses whose halves are no sizes of a published model.
_WEIGHTS = 0x71234 << 32
_BUFFERS = 0x75678 << 32
_MOST = 12_000
"""Instructions of a warp that are executed at most; what follows repeats."""
_STREAMING = ("linear_skinny", "moe_down")
"""Kernels whose weights go to tensor cores; their main loop has the mma instructions."""


@dataclass(frozen=True)
class Stream:
    """Memory that a step reads once: its addresses, and the bytes that are read of it, and of codes among them."""

    start: int
    end: int
    name: str
    nbytes: int
    nbytes_of_codes: int = 0


@dataclass(frozen=True, eq=False)
class Plan:
    """A decode step: its launches in order, and what they read."""

    program: Program
    layout: Layout
    base: int
    launches: list[Launch]

    def memory(self) -> Memory:
        """Return memory with the token, the number of cached tokens and zeroed counters."""
        memory = Memory()
        memory.write(self.base + self.layout.ids, (1).to_bytes(4, "little"))
        memory.write(self.base + self.layout.lengths, CONTEXT.to_bytes(4, "little"))
        start, nbytes = self.layout.zeroed[1]
        memory.write(self.base + start, bytes(nbytes))
        return memory

    def sizes(self, launch: Launch) -> tuple[int, ...]:
        """Return the words of a launch's arguments that are no addresses."""
        words = struct.unpack(f"<{len(launch.args) // 8}Q", launch.args[: len(launch.args) // 8 * 8])
        regions = ((_WEIGHTS, self.program.weight_bytes), (self.base, self.layout.nbytes))
        return tuple(0 if any(start <= word <= start + size for start, size in regions) else word for word in words)

    @functools.cached_property
    def streams(self) -> list[Stream]:
        """The matrices of the program, and the keys and values."""
        return [stream for node in self.program.nodes for stream in self._streams(node)]

    def _streams(self, node: Node) -> Iterator[Stream]:
        if node.op in ("QuantLinear", "SparseMoE"):
            blobs = [("", 1)] if node.op == "QuantLinear" else [("gate_up_", 2), ("down_", 3)]
            for prefix, index in blobs:
                matrix = matrix_of(node, prefix) if prefix else matrix_of(node)
                start = _WEIGHTS + self.program.weights[node.inputs[index]].offset
                chosen = node.integer("k") if prefix else matrix.count
                # Loads of codes begin a matrix; scales lie behind all codes.
                codes = matrix.codes_stride
                yield Stream(
                    start, start + matrix.count * codes, self._part(node, node.inputs[index]),
                    matrix.nbytes * chosen // matrix.count, chosen * codes,
                )  # fmt: skip
        if node.op == "SparseMoE":
            router = self.program.weights[node.inputs[1]]
            yield Stream(_WEIGHTS + router.offset, _WEIGHTS + router.offset + router.size, "router", router.size)
        if node.op == "GroupQueryAttention":
            row = node.integer("kv_num_heads") * row_bytes(self.layout.sizes.kv, node.integer("head_size"))
            for name in node.inputs[1:3]:
                start = self.base + self.layout.offsets[name]
                yield Stream(start, start + self.layout.operators.cache_bytes(node, 1), "attention", CONTEXT * row)

    def _part(self, node: Node, name: str) -> str:
        """Return what a matrix is for, without the number of its layer."""
        if node.name == [one for one in self.program.nodes if one.op == "QuantLinear"][-1].name:
            return "head"
        return name.removesuffix(".weight").rpartition(".")[2].removesuffix("_proj")


class _Addresses:
    """Weights without data."""

    def __init__(self, program: Program) -> None:
        self._program = program

    def address(self, name: str) -> int:
        return _WEIGHTS + self._program.weights[name].offset


def plan(model: str, kind: str, *, sm: int = 90, multiprocessors: int = 132) -> Plan:
    """Return the decode step of one sequence that chooses its token on the device."""
    program = gpu_random.random_program(dict(PUBLISHED[model]), gpu_random.RECIPES[kind])
    device = DryDevice()
    device._next = _BUFFERS
    device.info = DeviceInfo("planned", (sm // 10, sm % 10), multiprocessors, 143_771 << 20, (13, 0))
    layout = Layout(program, Sizes(1, CAPACITY, tokens=1, logits=1, kv="float16"), device.info)
    weights: Any = _Addresses(program)
    executor = Executor(device, weights, layout)
    return Plan(program, layout, executor._base, executor.decode_launches(1))


def memory(model: str, kind: str) -> dict[str, int]:
    """Return the bytes that `edgelm run` reserves on an H200 for a context of 4,096, by what they are for."""
    program = gpu_random.random_program(dict(PUBLISHED[model]), gpu_random.RECIPES[kind])
    rows = max(1, min(DEFAULT_CHUNK, _LOGITS_BYTES // (4 * program.values["logits"].width)))
    reserved = Layout(program, Sizes(1, CAPACITY, DEFAULT_CHUNK, rows, "float16"), DryDevice().info).plan
    return {
        "weights": program.weight_bytes, "caches": reserved.caches, "values": reserved.values,
        "workspace": reserved.workspace,
    }  # fmt: skip


@functools.lru_cache(maxsize=256)
def compiled(kernel: str, sm: int, lines: bool = False) -> Code:
    """Return a kernel's machine code."""
    options = ("-lineinfo",) if lines else ()
    unit = sources.translation_unit([kernel])
    image = nvrtc.compile_kernels(*unit, f"sm_{sm}", [kernel], options=options).image
    return sass.disassemble(image, sm)[kernel]


@functools.lru_cache(maxsize=256)
def loop_of(code: Code) -> frozenset[int]:
    """Return the indices of the instructions of the smallest loop that has mma instructions.

    It is a natural loop of the control-flow graph: the instructions that lead back to its start.
    """
    before: dict[int, list[int]] = collections.defaultdict(list)
    back: dict[int, list[int]] = collections.defaultdict(list)
    for index, ins in enumerate(code.instructions):
        if ins.name == "BRA":
            target = sass.target(code, ins.operands[-1])
            before[target].append(index)
            if target <= index:
                back[target].append(index)
        always = ins.name in ("BRA", "EXIT", "RET") and not ins.guard and len(ins.operands) < 2
        if not always:
            before[index + 1].append(index)
    loops = []
    for start, ends in back.items():
        members, left = {start}, list(ends)
        while left:
            index = left.pop()
            if index not in members:
                members.add(index)
                left += before[index]
        if 0 not in members and any(code.instructions[index].name in ("HMMA", "QMMA") for index in members):
            loops.append(members)
    return frozenset(min(loops, key=len, default=set()))


@dataclass(frozen=True)
class Counts:
    """Instructions of the launches of a step that differ in addresses only.

    Attributes:
        kernel: its name.
        part: what it reads: a matrix, the router, attention's cache, or "".
        times: launches of this kind in a step.
        blocks: of a launch.
        warps: of a block.
        before: instructions that a warp issues before its first load from a stream.
        divisions: integer divisions among them.
        tiles: tiles of 512 bytes that the warp with the most of them multiplies.
        per_tile: instructions of the main loop per tile.
        rest: all other instructions of that warp.
        warp: all instructions of that warp.
        first: all instructions of the warp that issues most.
        block: instructions of all warps of a block, mean of the executed blocks.
        largest: the same of the block that issues most.
        nbytes: bytes of the streams that the launch reads.
    """

    kernel: str
    part: str
    times: int
    blocks: int
    warps: int
    before: int
    divisions: int
    tiles: int
    per_tile: float
    rest: int
    warp: int
    first: int
    block: int
    largest: int
    nbytes: int


@dataclass(frozen=True)
class Executed:
    """Counts with the code and the traces that they come from."""

    counts: Counts
    code: Code
    traces: list[Trace]


def _mmas_per_tile(launch: Launch) -> int:
    """How many HMMA a tile of 512 bytes has, by the type of its weights."""
    for kind, count in (("int4", 4), ("int8", 2), ("fp8", 2)):
        if f"_{kind}_" in launch.kernel:
            return count
    return 1


def _whole(trace: Trace, tiles: int, all_tiles: int) -> int:
    """Return the instructions of a warp; of one that was cut, as many more as its other tiles take.

    What a tile takes is measured over the second half of the tiles that were multiplied, which includes all work at the
    end of items.
    """
    if not trace.cut:
        return trace.issued
    assert tiles >= 16, "too few tiles to tell what one takes"
    starts = trace.mmas[:: len(trace.mmas) // tiles]
    middle = len(starts) // 2
    each = (starts[-1] - starts[middle]) / (len(starts) - 1 - middle)
    return round(trace.issued + (all_tiles - tiles) * each)


def count(launch: Launch, times: int, code: Code, traces: list[Trace], streams: Sequence[Stream]) -> Executed:
    """Divide the instructions of the warp that multiplies most tiles into parts."""
    names = [ins.name for ins in code.instructions]
    streaming = launch.kernel.startswith(_STREAMING)
    per_tile = _mmas_per_tile(launch)
    warps, blocks = launch.block // 32, launch.grid[0] * launch.grid[1] * launch.grid[2]

    def stream_of(address: int) -> Stream | None:
        return next((one for one in streams if one.start <= address < one.end), None)

    # An embedding reads one row of its matrix, which may be the head's too.
    embeds = launch.kernel.startswith("quant_embedding")
    read = set() if embeds else {stream_of(load.first) for one in traces for load in one.loads} - {None}
    codes = sum(one.nbytes_of_codes for one in read if one)
    for one in traces:
        one.mmas = [issued for issued, index in one.marks if names[index] in ("HMMA", "QMMA")]
    done = {id(one): len(one.mmas) // per_tile if streaming else 0 for one in traces}
    issued = {id(one): _whole(one, done[id(one)], round(codes / 512 / blocks / warps)) for one in traces}
    trace = max(traces, key=lambda one: (done[id(one)], -one.issued if streaming else one.issued))
    tiles = done[id(trace)]
    before = next((load.issued for load in trace.loads if stream_of(load.first)), 0)
    divisions = sum(names[index] == "I2F" and at < before for at, index in trace.marks)
    inside = int(trace.counts[sorted(loop_of(code))].sum()) if tiles else 0
    each = inside / tiles if tiles else 0.0
    if trace.cut:
        tiles = round(codes / 512 / blocks / warps)
        inside = round(each * tiles)
    totals = collections.Counter[tuple[int, int, int]]()
    for one in traces:
        totals[one.block] += issued[id(one)]
    mean = statistics.mean(totals.values())
    if tiles:  # the executed blocks may have more or fewer tiles than the mean of all
        start = before * warps
        multiplied = sum(done.values()) / len(totals)
        mean = start + (mean - start) * (codes / 512 / blocks / multiplied if not trace.cut else 1)
    whole = issued[id(trace)]
    part = min((one.name for one in read if one), default="")
    counts = Counts(
        launch.kernel, part, times, blocks, warps, before, divisions, tiles, round(each, 1), whole - before - inside,
        whole, max(issued.values()), round(mean), max(totals.values()), sum(one.nbytes for one in read if one),
    )  # fmt: skip
    return Executed(counts, code, traces)


def _sampled(launch: Launch, most: int) -> list[tuple[int, int, int]]:
    """Some blocks of a launch; all of a kernel that routes, since the last one to end chooses.

    The steps between them are irregular, so that blocks with more items than others are among them.
    """
    blocks = list(sass.iterate_blocks(launch.grid))
    if launch.kernel.startswith("moe_route"):
        return blocks
    return [blocks[index] for index in dict.fromkeys(int(len(blocks) * (i * 0.618 % 1)) for i in range(most))]


def counts_of(plan: Plan, sm: int, *, kernel: str = "", blocks: int = 3, lines: bool = False) -> Iterable[Executed]:
    """Execute some blocks of every different launch of a step, in order; yield those of kernels named like `kernel`.

    Launches of one kernel that differ in addresses only are executed once.
    """
    memory = plan.memory()
    groups: dict[Any, list[Launch]] = {}
    for launch in plan.launches:
        groups.setdefault((launch.kernel, launch.grid, launch.block, plan.sizes(launch)), []).append(launch)
    for launches in groups.values():
        launch = launches[0]
        wanted = kernel in launch.kernel
        # Routing decides what later kernels do.
        if not wanted and not (launch.kernel.startswith("moe_route") and any(kernel in one[0] for one in groups)):
            continue
        code = compiled(launch.kernel, sm, lines)
        traces: list[Trace] = []
        for block in _sampled(launch, blocks):
            arguments = sass.Launched(launch.grid, launch.block, launch.shared, launch.args)
            traces += sass.execute(code, arguments, block, memory, _MOST)
        if wanted:
            yield count(launch, len(launches), code, traces, plan.streams)
