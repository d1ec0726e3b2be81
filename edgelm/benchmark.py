"""Benchmark of a bundle on this machine: speed, memory, and the share of the memory bandwidth that decoding uses.

Decoding one token reads every active weight once, so its speed is limited by memory bandwidth. The machine's bandwidth
is measured in the same process, with the same number of threads, after the model was measured.
"""

from __future__ import annotations

import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm import devices
from edgelm.bundle import Bundle, Manifest, reads
from edgelm.errors import ContextLengthError, EdgeLMError
from edgelm.generation.sampling import Sampler, Sampling
from edgelm.measuring.energy import Meter
from edgelm.progress import Progress, Silent
from edgelm.runtimes import Runtime, SequenceBatch, engine_of, open_batch, open_runtime
from edgelm.runtimes.onnxruntime.native_library import kernels_of
from edgelm.version import __version__

FORMAT, FORMAT_VERSION = "edgelm-bench", 1
PROMPT_TOKENS, NEW_TOKENS = 512, 128
_READ_BYTES = 512 << 20
_READ_REPEATS = 5
# Repeated reads of less than 4 times the size of the CPU's caches may come from the caches, not from memory.
_CACHES = 4
_ASSUMED_CACHE = 32 << 20


@dataclass(frozen=True)
class Spread:
    """Median, minimum and maximum of the runs of a measurement, and the runs."""

    median: float
    low: float
    high: float
    runs: tuple[float, ...]

    @classmethod
    def of(cls, runs: Sequence[float]) -> Spread:
        """Summarise the runs, of which there must be at least one."""
        return cls(statistics.median(runs), min(runs), max(runs), tuple(runs))


@dataclass(frozen=True)
class Energy:
    """Energy of the machine's CPU in joules per token, of all sequences together; `source` says what was measured."""

    prefill_joules_per_token: Spread
    decode_joules_per_token: Spread
    source: str


@dataclass(frozen=True)
class BenchResult:
    """Result of `bench`. Units: seconds, tokens per second, bytes, bytes per second.

    Attributes:
        resident_before_load, resident_after_load, resident_after_run, resident_peak: resident memory of the process in
            bytes; None where the system does not report it.
        files: size in bytes of each file of the bundle.
        bytes_per_token: bytes read to decode one token, see `bytes_per_token`.
        decode_bandwidth: bytes per second read while decoding. None for a batch, whose sequences share the reads, and
            where a token reads so little that the CPU's caches may hold it.
        machine_bandwidth: bytes per second that the memory can deliver. None where too little memory is free to
            measure it.
        notes: differences from the usual measurement, one sentence each.
        sha256: hash of each file of the bundle, from its manifest.
        isa, engine, created, made_by: as those of `edgelm.parity.result.ParityReport`.
        energy: energy of a token; None where it cannot be measured, for which `energy_problem` has the reason.
    """

    bundle: str
    model: str
    recipe: str
    runtime: str
    threads: int
    ops: str
    kv: str
    batch: int
    prompt_tokens: int
    new_tokens: int
    load_seconds: float
    prefill_tokens_per_second: Spread
    time_to_first_token: Spread
    decode_tokens_per_second: Spread
    resident_before_load: int | None
    resident_after_load: int | None
    resident_after_run: int | None
    resident_peak: int | None
    files: dict[str, int]
    bytes_per_token: int
    decode_bandwidth: float | None
    machine_bandwidth: float | None
    load_average: float | None
    device: devices.Device
    notes: tuple[str, ...] = ()
    sha256: dict[str, str] = field(default_factory=dict)
    isa: str | None = None
    engine: str | None = None
    energy: Energy | None = None
    energy_problem: str | None = None
    created: str = ""
    made_by: str = ""

    @property
    def bandwidth_share(self) -> float | None:
        """Bandwidth used while decoding, as a fraction of the bandwidth of the memory that holds the weights."""
        if self.decode_bandwidth is None or self.machine_bandwidth is None:
            return None
        return self.decode_bandwidth / self.machine_bandwidth

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        document = {**asdict(self), "bandwidth_share": self.bandwidth_share, "device": self.device.as_dict()}
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **document}


def bytes_per_token(manifest: Manifest, position: float, kv: str | None = None) -> int:
    """Return the bytes that decoding one token at `position` reads; `edgelm.bundle.reads` says what counts.

    Args:
        manifest: the bundle's manifest.
        position: tokens in the cache; may be an average.
        kv: type of the KV cache, one of `edgelm.bundle.kv_cache.KV_TYPES`; None for the bundle's own.
    """
    kind = kv or manifest.graph.kv_dtype
    tensors = ((tensor.name, tensor.size) for tensor in manifest.tensors)
    return reads.bytes_per_token(tensors, manifest.model, kind, manifest.ops, position)


def exceeds_caches(nbytes: int) -> bool:
    """Return whether reading `nbytes` in order is bound by memory: they are at least 4 times the CPU's caches."""
    return nbytes >= _CACHES * (devices.cache_bytes() or _ASSUMED_CACHE)


def memory_bandwidth(threads: int) -> float | None:
    """Return `read_bandwidth` of the machine's memory; None where too little memory is free to exceed the caches."""
    return read_bandwidth(threads) if exceeds_caches(_read_size()) else None


def _read_size() -> int:
    available = devices.describe().memory_available
    return _READ_BYTES if available is None else min(_READ_BYTES, available // 4)


def choose_tokens(prompt: int | None, new: int | None, context: int) -> tuple[int, int]:
    """Return the numbers of prompt and new tokens to measure with.

    None stands for the default, `PROMPT_TOKENS` or `NEW_TOKENS`, or fewer where the context is short.

    Raises:
        ContextLengthError: the numbers given do not fit into the context.
    """
    if (prompt or 1) + (new or 1) > context:
        asked = f"{prompt:,} prompt tokens" if prompt else f"{new:,} new tokens"
        asked += f" and {new:,} new ones" if prompt and new else ""
        raise ContextLengthError(
            f"{asked} do not fit into the model's context of {context:,} tokens: give smaller numbers"
        )
    if new is None:
        new = min(NEW_TOKENS, max(1, context // 5) if prompt is None else context - prompt)
    return min(PROMPT_TOKENS, context - new) if prompt is None else prompt, new


def read_bandwidth(threads: int, file: Path | None = None) -> float:
    """Measure the read bandwidth of `threads` threads in bytes per second: the best of 5 passes over 512 MiB.

    The data lies in anonymous memory. With `file` it is a memory map of its first 512 MiB, as weights are read; the
    first pass brings it into the page cache.

    Raises:
        EdgeLMError: `file` has less than 8 bytes for every thread.
    """
    size = _read_size()
    if file is None:
        # Ones, not zeros: the system maps all untouched pages to one page of zeros, which would stay in the cache.
        words = np.ones(size // 8, np.uint64)
    else:
        count = min(size, file.stat().st_size) // 8
        if count < threads:
            raise EdgeLMError(f"{file} is too small to measure bandwidth with: give a file of 500 MB")
        words = np.memmap(file, np.uint64, "r", shape=(count,))
    parts = np.array_split(words, threads)
    read: Callable[[NDArray[np.uint64]], np.uint64] = np.bitwise_or.reduce
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_READ_REPEATS):
            started = time.perf_counter()
            list(pool.map(read, parts))
            best = min(best, time.perf_counter() - started)
    return words.nbytes / best


def bench(
    path: Path | str,
    *,
    prompt_tokens: int | None = None,
    new_tokens: int | None = None,
    repeat: int = 5,
    threads: int | None = None,
    runtime: str | None = None,
    kv: str | None = None,
    weight_memory: int | None = None,
    batch: int = 1,
    progress: Progress | None = None,
) -> BenchResult:
    """Load a bundle and measure it `repeat` times, after one warm-up run.

    Args:
        path: the bundle.
        prompt_tokens: tokens to prefill; by default 512, or fewer where the context is short.
        new_tokens: tokens to decode; by default 128, or fewer where the context is short.
        repeat: measured runs.
        threads, runtime, kv, weight_memory: as for `edgelm.load`.
        batch: sequences. They are prefilled one after the other and decode together; rates count the tokens of all.
            More than 1 needs native operators.
        progress: where to report progress.

    Raises:
        ContextLengthError: prompt and new tokens do not fit into the model's context.
        EdgeLMError: a count is below 1.
        BundleError, RuntimeUnavailableError: as `edgelm.load`.
    """
    for name, value in (
        ("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens), ("repeat", repeat), ("batch", batch),
    ):  # fmt: skip
        if value is not None and value < 1:
            raise EdgeLMError(f"{name} is {value}: give 1 or more")
    progress = progress or Silent()
    bundle = Bundle.open(path)
    lengths, notes = counted_tokens(bundle.manifest, prompt_tokens, new_tokens)
    settings = Settings(bundle, runtime, threads, kv, batch, weight_memory)
    before, _ = devices.resident_memory()
    with Session(settings, sum(lengths)) as session:
        loaded, _ = devices.resident_memory()
        with progress.task("measuring", repeat + 1, unit="steps") as advance:
            runs = []
            for _ in range(repeat + 1):
                runs.append(session.run(*lengths))
                advance(1)
        used, peak = devices.resident_memory()
        resident = Resident(before, loaded, used, peak)
        result = session.result(*lengths, runs[1:], [session.load_seconds], resident, notes)
    gc.collect()
    if bundle.manifest.target != "cpu":
        return result
    return replace(result, machine_bandwidth=memory_bandwidth(result.threads))


def counted_tokens(manifest: Manifest, prompt: int | None, new: int | None) -> tuple[tuple[int, int], tuple[str, ...]]:
    """Return the numbers of prompt and new tokens to measure with, and a note where they are not the usual ones.

    Raises:
        ContextLengthError: as `choose_tokens`.
    """
    context = manifest.model.context_length
    chosen = choose_tokens(prompt, new, context)
    if chosen == (prompt or PROMPT_TOKENS, new or NEW_TOKENS):
        return chosen, ()
    return chosen, (
        f"the model's context of {context:,} has no room for the usual {PROMPT_TOKENS} prompt and {NEW_TOKENS} new "
        f"tokens: measured with {chosen[0]} and {chosen[1]}",
    )


@dataclass(frozen=True)
class Settings:
    """What a bundle is loaded with; None for the runtime's default."""

    bundle: Bundle
    runtime: str | None = None
    threads: int | None = None
    kv: str | None = None
    batch: int = 1
    weight_memory: int | None = None


@dataclass(frozen=True)
class Resident:
    """Resident memory in bytes; None where it is not known."""

    before_load: int | None
    after_load: int | None
    after_run: int | None
    peak: int | None


@dataclass(frozen=True)
class Run:
    """One measured run: seconds, tokens per second, joules per token (NaN without a meter)."""

    prefill: float
    first: float
    decode_rate: float
    prefill_joules: float
    decode_joules: float


class Session:
    """A loaded bundle that runs are measured with. Use it as a context manager.

    Args:
        settings: what to load.
        context: positions of the KV cache.
        meter: measures energy; None for the machine's own.

    Raises:
        BundleError, RuntimeUnavailableError, EdgeLMError: as `edgelm.load`.
    """

    def __init__(self, settings: Settings, context: int, meter: Meter | None = None) -> None:
        self.settings = settings
        self.meter = meter or Meter()
        started = time.perf_counter()
        options = {
            "threads": settings.threads, "context_length": context, "kv": settings.kv,
            "weight_memory": settings.weight_memory,
        }  # fmt: skip
        bundle, runtime = settings.bundle, settings.runtime
        self._model: Runtime | SequenceBatch = (
            open_runtime(bundle, runtime, **options)
            if settings.batch == 1
            else open_batch(bundle, settings.batch, runtime, **options)
        )
        self.load_seconds = time.perf_counter() - started

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the memory."""
        self._model.close()

    @cached_property
    def _bandwidth(self) -> float | None:
        on_cpu = self.settings.bundle.manifest.target == "cpu"
        return None if on_cpu else self._model.device_bandwidth()

    def run(self, prompt_tokens: int, new_tokens: int) -> Run:
        """Prefill and decode once."""
        settings, model = self.settings, self._model
        # Random tokens: an MoE model routes them over all its experts, and no tokenizer has an advantage.
        size = (settings.batch, prompt_tokens)
        prompts = np.random.default_rng(0).integers(0, settings.bundle.manifest.model.vocab_size, size).tolist()
        if isinstance(model, Runtime):
            return _run(model, prompts[0], new_tokens, self.meter)
        return _run_batch(model, prompts, new_tokens, self.meter)

    def result(
        self,
        prompt_tokens: int,
        new_tokens: int,
        runs: Sequence[Run],
        loads: Sequence[float],
        resident: Resident,
        notes: Sequence[str] = (),
    ) -> BenchResult:
        """Summarise runs, of which there must be at least one; without the machine's bandwidth, on a CPU."""
        settings, model = self.settings, self._model
        manifest = settings.bundle.manifest
        decode = Spread.of([run.decode_rate for run in runs])
        bytes_read = bytes_per_token(manifest, prompt_tokens + new_tokens / 2, settings.kv)
        from_memory = settings.batch == 1 and (manifest.target != "cpu" or exceeds_caches(bytes_read))
        energy = None
        if self.meter.problem is None and all(math.isfinite(run.prefill_joules + run.decode_joules) for run in runs):
            energy = Energy(
                Spread.of([run.prefill_joules for run in runs]),
                Spread.of([run.decode_joules for run in runs]),
                self.meter.source,
            )
        return BenchResult(
            bundle=str(settings.bundle.path),
            model=manifest.model.name,
            recipe=manifest.recipe.name,
            runtime=model.name,
            threads=model.threads,
            ops=manifest.ops,
            kv=settings.kv or manifest.graph.kv_dtype,
            batch=settings.batch,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            load_seconds=statistics.median(loads),
            prefill_tokens_per_second=Spread.of([settings.batch * prompt_tokens / run.prefill for run in runs]),
            time_to_first_token=Spread.of([run.first for run in runs]),
            decode_tokens_per_second=decode,
            resident_before_load=resident.before_load,
            resident_after_load=resident.after_load,
            resident_after_run=resident.after_run,
            resident_peak=resident.peak,
            files={file: info.size for file, info in manifest.files.items()},
            bytes_per_token=bytes_read,
            decode_bandwidth=bytes_read * decode.median if from_memory else None,
            machine_bandwidth=self._bandwidth,
            load_average=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            device=devices.describe(),
            notes=tuple(notes),
            sha256={file: info.sha256 for file, info in manifest.files.items()},
            isa=kernels_of(manifest.ops),
            engine=engine_of(model.name),
            energy=energy,
            energy_problem=None if energy else self.meter.problem or "a counter could not be read",
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            made_by=f"edgelm {__version__}",
        )


def _run(runtime: Runtime, prompt: list[int], new_tokens: int, meter: Meter) -> Run:
    runtime.reset()
    meter.joules()
    started = time.perf_counter()
    logits = runtime.prefill(prompt)
    prefilled = time.perf_counter()
    token = int(logits.argmax())
    first = time.perf_counter()
    prefill_joules = meter.joules()
    decoding = time.perf_counter()
    for _ in range(new_tokens):
        token = runtime.decode_greedy(token)
    rate = new_tokens / (time.perf_counter() - decoding)
    joules = meter.joules()
    return Run(prefilled - started, first - started, rate, prefill_joules / len(prompt), joules / new_tokens)


def _run_batch(batch: SequenceBatch, prompts: list[list[int]], new_tokens: int, meter: Meter) -> Run:
    for row in range(len(prompts)):
        batch.truncate(row, 0)
    meter.joules()
    started = time.perf_counter()
    tokens = [int(batch.prefill(row, prompt).argmax()) for row, prompt in enumerate(prompts)]
    prefilled = time.perf_counter()
    prefill_joules = meter.joules()
    greedy: list[Sampler | None] = [Sampler(Sampling())] * len(prompts)
    decoding = time.perf_counter()
    for _ in range(new_tokens):
        tokens = batch.decode_sampled(tokens, greedy)
    rate = len(prompts) * new_tokens / (time.perf_counter() - decoding)
    joules = meter.joules()
    count = len(prompts)
    seconds = prefilled - started
    return Run(seconds, seconds, rate, prefill_joules / (count * len(prompts[0])), joules / (count * new_tokens))
