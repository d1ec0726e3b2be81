"""Benchmark of a bundle on this machine: speed, memory, and the share of the memory bandwidth that decoding uses.

Decoding one token reads every active weight once, so its speed is limited by memory bandwidth. The machine's bandwidth
is measured in the same process, with the same number of threads, after the model was measured.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm import devices
from edgelm.bundle import Bundle, Manifest
from edgelm.bundle.reads import cache_bytes, weight_bytes_per_token
from edgelm.errors import ContextLengthError, EdgeLMError
from edgelm.generation.sampling import Sampler, Sampling
from edgelm.progress import Progress, Silent
from edgelm.runtimes import Runtime, SequenceBatch, open_batch, open_runtime

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

    @property
    def bandwidth_share(self) -> float | None:
        """Bandwidth used while decoding, as a fraction of the bandwidth of the memory that holds the weights."""
        if self.decode_bandwidth is None or self.machine_bandwidth is None:
            return None
        return self.decode_bandwidth / self.machine_bandwidth

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return {**asdict(self), "bandwidth_share": self.bandwidth_share, "device": self.device.as_dict()}


def bytes_per_token(manifest: Manifest, position: float, kv: str | None = None) -> int:
    """Return the bytes that must be read to decode one token at `position`: active weights and the KV cache so far.

    `edgelm.bundle.reads` says what counts.

    Args:
        manifest: the bundle's manifest.
        position: tokens in the cache; may be an average.
        kv: type of the KV cache, one of `edgelm.bundle.kv_cache.KV_TYPES`; None for the bundle's own.
    """
    kind = kv or manifest.graph.kv_dtype
    weights = weight_bytes_per_token(((tensor.name, tensor.size) for tensor in manifest.tensors), manifest.model)
    return round(weights + cache_bytes(manifest.model, kind, manifest.ops, position))


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
    model, notes = bundle.manifest.model, []
    asked = (prompt_tokens, new_tokens)
    prompt_tokens, new_tokens = choose_tokens(prompt_tokens, new_tokens, model.context_length)
    if (prompt_tokens, new_tokens) != (asked[0] or PROMPT_TOKENS, asked[1] or NEW_TOKENS):
        notes.append(
            f"the model's context of {model.context_length:,} has no room for the usual {PROMPT_TOKENS} prompt and "
            f"{NEW_TOKENS} new tokens: measured with {prompt_tokens} and {new_tokens}"
        )
    context = prompt_tokens + new_tokens
    before, _ = devices.resident_memory()
    started = time.perf_counter()
    opened: Runtime | SequenceBatch
    options = {"threads": threads, "context_length": context, "kv": kv, "weight_memory": weight_memory}
    opened = open_runtime(bundle, runtime, **options) if batch == 1 else open_batch(bundle, batch, runtime, **options)
    load_seconds = time.perf_counter() - started
    loaded, _ = devices.resident_memory()
    with opened:
        # Random tokens: an MoE model routes them over all its experts, and no tokenizer has an advantage.
        prompts = np.random.default_rng(0).integers(0, model.vocab_size, (batch, prompt_tokens)).tolist()
        runs = []
        with progress.task("measuring", repeat + 1, unit="steps") as advance:
            for _ in range(repeat + 1):
                if isinstance(opened, Runtime):
                    runs.append(_run(opened, prompts[0], new_tokens))
                else:
                    runs.append(_run_batch(opened, prompts, new_tokens))
                advance(1)
        used, peak = devices.resident_memory()
        device_bandwidth = opened.device_bandwidth()
        counted = runs[1:]
        threads_used, name = opened.threads, opened.name
    del opened
    gc.collect()
    decode = Spread.of([run.decode_rate for run in counted])
    bytes_read = bytes_per_token(bundle.manifest, prompt_tokens + new_tokens / 2, kv)
    on_cpu = bundle.manifest.target == "cpu"
    from_memory = batch == 1 and (not on_cpu or exceeds_caches(bytes_read))
    return BenchResult(
        bundle=str(bundle.path),
        model=model.name,
        recipe=bundle.manifest.recipe.name,
        runtime=name,
        threads=threads_used,
        ops=bundle.manifest.ops,
        kv=kv or bundle.manifest.graph.kv_dtype,
        batch=batch,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        load_seconds=load_seconds,
        prefill_tokens_per_second=Spread.of([batch * prompt_tokens / run.prefill for run in counted]),
        time_to_first_token=Spread.of([run.first for run in counted]),
        decode_tokens_per_second=decode,
        resident_before_load=before,
        resident_after_load=loaded,
        resident_after_run=used,
        resident_peak=peak,
        files={file: info.size for file, info in bundle.manifest.files.items()},
        bytes_per_token=bytes_read,
        decode_bandwidth=bytes_read * decode.median if from_memory else None,
        machine_bandwidth=memory_bandwidth(threads_used) if on_cpu else device_bandwidth,
        load_average=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        device=devices.describe(),
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class _Run:
    prefill: float
    first: float
    decode_rate: float


def _run(runtime: Runtime, prompt: list[int], new_tokens: int) -> _Run:
    runtime.reset()
    started = time.perf_counter()
    logits = runtime.prefill(prompt)
    prefilled = time.perf_counter()
    token = int(logits.argmax())
    first = time.perf_counter()
    for _ in range(new_tokens):
        token = runtime.decode_greedy(token)
    return _Run(prefilled - started, first - started, new_tokens / (time.perf_counter() - first))


def _run_batch(batch: SequenceBatch, prompts: list[list[int]], new_tokens: int) -> _Run:
    for row in range(len(prompts)):
        batch.truncate(row, 0)
    started = time.perf_counter()
    tokens = [int(batch.prefill(row, prompt).argmax()) for row, prompt in enumerate(prompts)]
    prefilled = time.perf_counter()
    greedy: list[Sampler | None] = [Sampler(Sampling())] * len(prompts)
    for _ in range(new_tokens):
        tokens = batch.decode_sampled(tokens, greedy)
    decoded = time.perf_counter() - prefilled
    return _Run(prefilled - started, prefilled - started, len(prompts) * new_tokens / decoded)
