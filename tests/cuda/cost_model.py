"""How many instructions do the kernels of a decode step execute, and how fast could a GPU be? Nothing runs on a GPU.

    python tests/cuda/cost_model.py --kernel linear_skinny_bf16_int4_n8 --sm 90   # the launches of a kernel
    python tests/cuda/cost_model.py --kernel moe_down --kind int4 --lines         # and counts by source line
    python tests/cuda/cost_model.py --model fox-1-1.6b --kind int4                # every launch of a decode step

`--kernel` takes a part of a name. `--sass` prints the code with how often a warp issued each instruction.

The launches are those that the runtime plans for the published shapes. NVRTC compiles their kernels, nvdisasm reads
them, and `sass.py` executes some blocks of each launch on the CPU with its real arguments. So a count is what a warp
issues, branches and loops included. Columns:

blocks, warps   of the launch
before          instructions that a warp issues before its first load of weights; divs: integer divisions among them
tiles           tiles of 512 bytes of weights that a warp multiplies, the most of the executed warps
tile            instructions of the main loop per tile; a loop is the smallest one with products of tensor cores
rest            all other instructions of that warp: waiting, norm, staging x, adding the warps' sums, writing results
warp, first     all instructions of that warp, and of the warp of the block that issues most
"""

from __future__ import annotations

import argparse
import collections
import functools
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "bench"), str(ROOT / "tests" / "cuda")]

import gpu_random  # noqa: E402
import sass  # noqa: E402
from gpu_dry import DryDevice  # noqa: E402
from sass import Code, Memory, Trace  # noqa: E402

from edgelm.runtimes.cuda.device import DeviceInfo, Launch  # noqa: E402
from edgelm.runtimes.cuda.executor import Executor, Layout, Sizes  # noqa: E402
from edgelm.runtimes.cuda.kernels import nvrtc, sources  # noqa: E402
from edgelm.runtimes.cuda.program import Program, matrix_of  # noqa: E402
from edgelm.synth import PUBLISHED  # noqa: E402

MODELS = ("fox-1-1.6b", "olmoe-1b-7b")
CONTEXT = 512
CAPACITY = 4096
_WEIGHTS = 1 << 44
_STREAMING = ("linear_skinny", "moe_down")
"""Kernels whose weights go to tensor cores; their main loop has the products."""


@dataclass(frozen=True)
class Plan:
    """A decode step: its launches in order, and what a kernel reads from memory that decides how much it does."""

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

    def weights(self) -> list[tuple[int, int]]:
        """Return (start, end) of the codes of every matrix."""
        found = []
        for node in self.program.nodes:
            blobs = {"QuantLinear": [("", 1)], "SparseMoE": [("gate_up_", 2), ("down_", 3)]}.get(node.op, [])
            for prefix, index in blobs:
                matrix = matrix_of(node, prefix) if prefix else matrix_of(node)
                start = _WEIGHTS + self.program.weights[node.inputs[index]].offset
                found.append((start, start + matrix.count * matrix.codes_stride))
        return found


class _Addresses:
    """Weights without data."""

    def __init__(self, program: Program) -> None:
        self._program = program

    def address(self, name: str) -> int:
        return _WEIGHTS + self._program.weights[name].offset


def plan(model: str, kind: str, *, sm: int = 90, multiprocessors: int = 132, context: int = CAPACITY) -> Plan:
    """Return the decode step of one sequence that chooses its token on the device."""
    program = gpu_random.random_program(dict(PUBLISHED[model]), gpu_random.RECIPES[kind])
    device = DryDevice()
    device.info = DeviceInfo("planned", (sm // 10, sm % 10), multiprocessors, 143_771 << 20, (13, 0))
    layout = Layout(program, Sizes(1, context, tokens=1, logits=1, kv="float16"), device.info)
    weights: Any = _Addresses(program)
    executor = Executor(device, weights, layout)
    return Plan(program, layout, executor._base, list(executor._launches(1, 1, 0, False, True)))


@functools.lru_cache(maxsize=256)
def compiled(kernel: str, sm: int, lines: bool = False) -> Code:
    """Return a kernel's machine code."""
    options = ("-lineinfo",) if lines else ()
    unit = sources.translation_unit([kernel])
    image = nvrtc.compile_kernels(*unit, f"sm_{sm}", [kernel], options=options).image
    return sass.disassemble(image, sm)[kernel]


def launched(launch: Launch) -> sass.Launched:
    """Return a launch as `sass.execute` takes it."""
    return sass.Launched(launch.grid, launch.block, launch.shared, launch.args)


@dataclass(frozen=True)
class Counts:
    """Instructions of a launch; see the top of this file."""

    launch: Launch
    code: Code
    traces: list[Trace]
    before: int
    divisions: int
    tiles: int
    per_tile: float
    rest: float
    warp: int
    most: int
    mean: float


def _products_per_tile(launch: Launch) -> int:
    """How many HMMA a tile of 512 bytes has, by the type of its weights."""
    for kind, count in (("int4", 4), ("int8", 2), ("fp8", 2)):
        if f"_{kind}_" in launch.kernel:
            return count
    return 1


@functools.lru_cache(maxsize=256)
def loop_of(code: Code) -> frozenset[int]:
    """Return the indices of the instructions of the smallest loop that has products of tensor cores.

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
        if any(code.instructions[index].name in ("HMMA", "QMMA") for index in members) and 0 not in members:
            loops.append(members)
    return frozenset(min(loops, key=len, default=set()))


def count(launch: Launch, code: Code, traces: list[Trace], weights: Sequence[tuple[int, int]]) -> Counts:
    """Divide the instructions of the warp that multiplies most tiles into parts."""
    names = [ins.name for ins in code.instructions]

    def products(trace: Trace) -> list[int]:
        return [issued for issued, index in trace.marks if names[index] in ("HMMA", "QMMA")]

    trace = max(traces, key=lambda one: (len(products(one)), -one.issued))
    is_weights = lambda at: any(start <= at < end for start, end in weights)  # noqa: E731
    before = next((load.issued for load in trace.loads if is_weights(load.first)), 0)
    divisions = sum(names[index] == "I2F" and issued < before for issued, index in trace.marks)
    tiles = len(products(trace)) // _products_per_tile(launch) if launch.kernel.startswith(_STREAMING) else 0
    inside = int(trace.counts[sorted(loop_of(code))].sum()) if tiles else 0
    per_tile = inside / tiles if tiles else 0.0
    rest = trace.issued - before - inside
    issued = [one.issued for one in traces]
    return Counts(
        launch, code, traces, before, divisions, tiles, per_tile, rest, trace.issued, max(issued),
        statistics.mean(issued),
    )  # fmt: skip


def _sampled(launch: Launch, most: int) -> list[tuple[int, int, int]]:
    """Some blocks of a launch, evenly spaced; all of a kernel that routes, since the last one to end chooses."""
    blocks = list(sass.iterate_blocks(launch.grid))
    if launch.kernel.startswith("moe_route"):
        return blocks
    step = max(1, len(blocks) // most)
    return blocks[::step][:most]


def counts_of(plan: Plan, sm: int, *, kernel: str = "", blocks: int = 3, lines: bool = False) -> Iterable[Counts]:
    """Execute some blocks of every different launch of a step, in order; yield those of kernels named like `kernel`."""
    memory, weights = plan.memory(), plan.weights()
    done = set()
    for launch in plan.launches:
        key = (launch.kernel, launch.grid, launch.block, launch.shared)
        wanted = kernel in launch.kernel
        if key in done or not (wanted or launch.kernel.startswith("moe_")):
            continue
        done.add(key)
        if not wanted and not launch.kernel.startswith("moe_route"):
            continue
        code = compiled(launch.kernel, sm, lines)
        traces: list[Trace] = []
        for block in _sampled(launch, blocks):
            traces += sass.execute(code, launched(launch), block, memory)
        if wanted:
            yield count(launch, code, traces, weights)


HEADER = (
    f"{'kernel':34}{'grid':>14}{'warps':>6}{'before':>8}{'divs':>5}{'tiles':>6}{'tile':>7}"
    f"{'rest':>7}{'warp':>7}{'first':>7}"
)


def _row(one: Counts) -> str:
    launch = one.launch
    return (
        f"{launch.kernel:34}{'x'.join(map(str, launch.grid[:2])):>14}{launch.block // 32:6}{one.before:8}"
        f"{one.divisions:5}{one.tiles:6}{one.per_tile:7.1f}{one.rest:7.0f}{one.warp:7}{one.most:7}"
    )


def _print_lines(one: Counts, most: int = 60) -> None:
    """Print where the instructions of the busiest warp are, by source line."""
    trace = max(one.traces, key=lambda trace: trace.issued)
    by_line: collections.Counter[str] = collections.Counter()
    kinds: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for times, ins in zip(trace.counts.tolist(), one.code.instructions, strict=True):
        by_line[ins.line] += times
        kinds[ins.line][ins.name] += times
    texts = {path.name: path.read_text().splitlines() for path in sources.SOURCES.rglob("*.cuh")}
    for line, times in by_line.most_common(most):
        file, _, number = line.rpartition(":")
        text = texts[file][int(number) - 1].strip() if file in texts else ""
        main = " ".join(f"{name} {n}" for name, n in kinds[line].most_common(4))
        print(f"{times:7} {100 * times / trace.issued:5.1f} %  {line:28} {text[:70]:70}  {main}")


def _print_sass(one: Counts) -> None:
    """Print the code that the busiest warp executed, with how often."""
    trace = max(one.traces, key=lambda trace: trace.issued)
    targets = {address: label for label, address in one.code.labels.items()}
    for times, ins in zip(trace.counts.tolist(), one.code.instructions, strict=True):
        if ins.address in targets:
            print(f"{targets[ins.address]}:")
        if times:
            print(f"{times:7}  {ins}   {ins.line}")


def main() -> int:
    """Print what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", default="", help="part of a kernel's name")
    parser.add_argument("--model", action="append", choices=list(PUBLISHED))
    parser.add_argument("--kind", action="append", choices=list(gpu_random.RECIPES))
    parser.add_argument("--sm", type=int, default=90)
    parser.add_argument("--multiprocessors", type=int, default=132)
    parser.add_argument("--blocks", type=int, default=3, help="blocks of each launch that are executed")
    parser.add_argument("--lines", action="store_true", help="print instructions by source line")
    parser.add_argument("--sass", action="store_true", help="print the executed code")
    given = parser.parse_args()
    for model in given.model or MODELS:
        for kind in given.kind or gpu_random.RECIPES:
            step = plan(model, kind, sm=given.sm, multiprocessors=given.multiprocessors)
            if not any(given.kernel in launch.kernel for launch in step.launches):
                continue
            print(f"{model} {kind}: {len(step.launches)} launches a token\n{HEADER}")
            found = counts_of(step, given.sm, kernel=given.kernel, blocks=given.blocks, lines=given.lines or given.sass)
            for one in found:
                print(_row(one), flush=True)
                if given.lines:
                    _print_lines(one)
                if given.sass:
                    _print_sass(one)
    return 0


if __name__ == "__main__":
    sys.exit(main())
