"""Helpers of the GPU benchmarks: medians, limits of the device, a table for people and a JSON line for programs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgelm.runtimes.cuda.driver import CudaDevice

_COPY_BYTES = 2 << 30


@dataclass(frozen=True)
class Figure:
    """One measurement: seconds of each run, and the numbers to compare them with.

    Attributes:
        name: what was measured.
        seconds: seconds of each run.
        nbytes: least number of bytes to read or write; 0 if memory is not the limit.
        operations: floating-point operations; 0 if arithmetic is not the limit.
        per: items (tokens) per run, for the rate.
        peer: seconds of another program's runs of the same task, taken in turn with ours.
    """

    name: str
    seconds: Sequence[float]
    nbytes: int = 0
    operations: int = 0
    per: int = 1
    peer: Sequence[float] = field(default_factory=tuple)

    @property
    def median(self) -> float:
        """Seconds of a run."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Limits:
    """Measured limits of the device: bytes per second of a copy, bf16 operations per second."""

    bandwidth: float
    matrix: float


def limits(device: CudaDevice, file: Path | None = None) -> Limits:
    """Measure the limits: a large copy, counting reads and writes, and PyTorch's matmul of random matrices.

    With `file`, they are read from it, or written to it if it does not exist.
    """
    if file is not None and file.exists():
        return Limits(**json.loads(file.read_text(encoding="utf-8")))
    found = _measured(device)
    if file is not None:
        file.write_text(json.dumps(asdict(found)), encoding="utf-8")
    return found


def _measured(device: CudaDevice) -> Limits:
    source, target = device.allocate(_COPY_BYTES), device.allocate(_COPY_BYTES)
    device.upload(source, np.random.default_rng(0).integers(0, 256, 64 << 20, np.uint8))
    times = device.elapsed(lambda: device.copy(target, source, _COPY_BYTES), 12)[2:]
    device.free(source)
    device.free(target)
    return Limits(2 * _COPY_BYTES / statistics.median(times), _matrix_peak())


def _matrix_peak() -> float:
    try:
        import torch
    except ImportError:
        return 0.0
    if not torch.cuda.is_available():
        return 0.0
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(14):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        a @ b
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return float(2 * 8192**3 / statistics.median(times[4:]))


def paired(ours: Callable[[], float], peer: Callable[[], float] | None, repeat: int) -> tuple[list[float], list[float]]:
    """Run both in turn, after a warm-up run of each; which one is first alternates."""
    mine: list[float] = []
    other: list[float] = []
    runs = [(mine, ours)] + ([(other, peer)] if peer is not None else [])
    for _, run in runs:
        run()
    for i in range(repeat):
        for times, run in runs if i % 2 == 0 else reversed(runs):
            times.append(run())
    return mine, other


def row(figure: Figure, limit: Limits) -> dict[str, Any]:
    """Return a row of the table: a figure and the numbers derived from it."""
    seconds = figure.median
    made: dict[str, Any] = {
        "name": figure.name,
        "median_s": seconds,
        "low_s": min(figure.seconds),
        "high_s": max(figure.seconds),
        "rate": figure.per / seconds,
    }
    if figure.nbytes:
        made |= {"gb_s": figure.nbytes / seconds / 1e9, "of_bandwidth": figure.nbytes / seconds / limit.bandwidth}
    if figure.operations:
        made["tflops"] = figure.operations / seconds / 1e12
        if limit.matrix:
            made["of_matrix"] = figure.operations / seconds / limit.matrix
    if figure.peer:
        made |= {"peer_s": statistics.median(figure.peer), "times_peer": statistics.median(figure.peer) / seconds}
    return made


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table."""
    print(f"{'':46} {'median':>10} {'low':>9} {'high':>9} {'per s':>9} {'GB/s':>6} {'of limit':>8} {'x peer':>7}")
    for one in rows:
        limit = one.get("of_bandwidth", one.get("of_matrix"))
        print(
            f"{one['name']:46} {_time(one['median_s']):>10} {_time(one['low_s']):>9} {_time(one['high_s']):>9} "
            f"{one['rate']:9.1f} {one.get('gb_s', 0):6.0f} {'' if limit is None else f'{limit:8.1%}':>8} "
            f"{f'{times:.2f}' if (times := one.get('times_peer')) else '':>7}",
            flush=True,
        )


def report(device: CudaDevice, limit: Limits, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the measurements and the device, and the JSON line."""
    print(
        f"{device.info.name}, {device.info.multiprocessors} multiprocessors, CUDA {device.info.driver}; copies "
        f"{limit.bandwidth / 1e9:.0f} GB/s (read and written), bf16 matmul {limit.matrix / 1e12:.0f} TFLOP/s"
    )
    show(rows)
    print(json.dumps({"device": asdict(device.info), "limits": asdict(limit), "rows": list(rows)}))


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"
