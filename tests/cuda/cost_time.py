"""Predicts the time of a decode step on a device from counts: a model with stated assumptions, never measured.

A launch takes

    launch + before / issue + memory latency + max(bytes / bandwidth, other instructions / issue) + tail

`issue`: a multiprocessor (SM) issues four instructions of its warps a cycle, and one of each warp every four cycles,
since instructions mostly wait for the one before. The SM that has most to do decides: the largest block, or the mean of
all SMs. With early launch (programmatic dependent launch) the start of a launch, its instructions before the first load
and the latency of that load hide behind the launch before it.

The constants were set once, for the kernels of commit df10993, before any of them was changed: an earlier model, which
counts 3.4 us for each launch, predicted 565 (H100) and 700 (H200) tokens/s for Fox bf16, 930 and 930 for int4, 785 and
960 for OLMoE bf16, 1,200 and 1,200 for int4; this one predicts 548, 669, 751, 751, 808, 1,009, 1,268 and 1,268. They
must not be set to reach a goal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cost_counts import Counts


@dataclass(frozen=True)
class GpuModel:
    """A device, by its published figures.

    Attributes:
        name: its name.
        sm: compute capability.
        multiprocessors: number of SMs.
        clock: GHz. Of server GPUs the one that the published peak of the tensor cores implies, else the boost clock.
        bandwidth: GB/s of memory.
        memory: GB of memory.
        source: where the figures are published.
    """

    name: str
    sm: int
    multiprocessors: int
    clock: float
    bandwidth: float
    memory: float
    source: str


GPUS = (
    GpuModel("H200", 90, 132, 1.83, 4800, 141, "NVIDIA H200 data sheet"),
    GpuModel("H100 SXM", 90, 132, 1.83, 3350, 80, "NVIDIA H100 data sheet"),
    GpuModel("L4", 89, 58, 2.04, 300, 24, "NVIDIA L4 data sheet, Ada architecture white paper"),
    GpuModel("RTX 4090", 89, 128, 2.52, 1008, 24, "NVIDIA Ada architecture white paper"),
    GpuModel("RTX 3090", 86, 82, 1.70, 936, 24, "NVIDIA GA102 architecture white paper"),
    GpuModel("RTX 3060", 86, 28, 1.78, 360, 12, "NVIDIA GeForce RTX 3060 specifications"),
    GpuModel("AGX Orin 64GB", 87, 16, 1.30, 205, 64, "NVIDIA Jetson AGX Orin data sheet"),
    GpuModel("Orin Nano Super 8GB", 87, 8, 1.02, 102, 8, "NVIDIA Jetson Orin Nano data sheet"),
    GpuModel("AGX Thor", 110, 20, 1.57, 273, 128, "NVIDIA Jetson Thor data sheet"),
)

LAUNCH = 1.3e-6
LATENCY = 0.8e-6
TAIL = 0.6e-6
BANDWIDTH_SHARE = 0.86
LIMIT_SHARE = 0.9
"""Of the published bandwidth: what copies reach."""
ISSUE = 4.0
"""Instructions per cycle of an SM."""
WARP_CYCLES = 4.0
"""Cycles between two instructions of one warp, which mostly wait for each other."""
EARLY = 0.5e-6
"""Seconds of an early launch that nothing hides: the wait for the launch before it."""


@dataclass(frozen=True)
class LaunchTime:
    """Seconds of a launch: fixed costs, the two limits of its body, and its time with early launch."""

    fixed: float
    memory: float
    issue: float
    early_fixed: float

    @property
    def total(self) -> float:
        """Without early launch."""
        return self.fixed + max(self.memory, self.issue)

    @property
    def early(self) -> float:
        """With early launch."""
        return self.early_fixed + max(self.memory, self.issue)


def launch_time(counts: Counts, gpu: GpuModel) -> LaunchTime:
    """Predict the time of one launch."""
    issue, warp = ISSUE * gpu.clock * 1e9, gpu.clock * 1e9 / WARP_CYCLES
    resident = max(1.0, counts.blocks / gpu.multiprocessors)
    busiest = max(float(counts.largest), counts.block * resident)
    before = min(counts.before * counts.warps * resident, busiest)
    before_seconds = max(before / issue, counts.before / warp)
    body = max((busiest - before) / issue, (counts.first - counts.before) / warp)
    memory = counts.nbytes / (gpu.bandwidth * 1e9 * BANDWIDTH_SHARE)
    return LaunchTime(LAUNCH + LATENCY + TAIL + before_seconds, memory, body, EARLY + TAIL)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a decode step: predicted, the same with early launch, and memory's limit."""

    total: float
    early: float
    limit: float


def step_time(counts: Sequence[Counts], gpu: GpuModel) -> StepTime:
    """Predict the time of a step from the counts of its kinds of launches."""
    times = [(one.times, launch_time(one, gpu)) for one in counts]
    nbytes = sum(one.times * one.nbytes for one in counts)
    return StepTime(
        sum(n * time.total for n, time in times), sum(n * time.early for n, time in times),
        nbytes / (gpu.bandwidth * 1e9 * LIMIT_SHARE),
    )  # fmt: skip
