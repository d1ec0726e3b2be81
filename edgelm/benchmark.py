"""How fast a bundle runs here, what it takes, and how near that is to what the memory allows.

Decoding one token reads every weight that takes part once, so it is bound by memory bandwidth. The bandwidth that the
machine has is measured in the same process, with as many threads, after the model.
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
from edgelm.bundle.cpu_layout import RESCORE, TILE
from edgelm.bundle.kv_cache import row_bytes
from edgelm.errors import ContextLengthError, EdgeLMError
from edgelm.progress import Progress, Silent
from edgelm.runtimes import Runtime, SequenceBatch, open_batch, open_runtime

PROMPT_TOKENS, NEW_TOKENS = 512, 128
_READ_BYTES = 512 << 20
_READ_REPEATS = 5
# What is read again and again comes from the CPU's caches unless it is several times as large.
_CACHES = 4
_ASSUMED_CACHE = 32 << 20


@dataclass(frozen=True)
class Spread:
    """A measurement's runs: median, least and greatest."""

    median: float
    low: float
    high: float
    runs: tuple[float, ...]

    @classmethod
    def of(cls, runs: Sequence[float]) -> Spread:
        """Of at least one run."""
        return cls(statistics.median(runs), min(runs), max(runs), tuple(runs))


@dataclass(frozen=True)
class BenchResult:
    """Seconds, tokens a second, bytes, bytes a second.

    Memory is None where the system does not tell. The bandwidth of decoding is None where sequences share what is read,
    and where a token reads so little that the CPU's caches may hold it; the machine's, where too little memory is free
    to measure more than the caches. `notes` say what was measured otherwise than a reader expects.
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
        """The part of the bandwidth of the memory that the weights are in that decoding uses."""
        if self.decode_bandwidth is None or self.machine_bandwidth is None:
            return None
        return self.decode_bandwidth / self.machine_bandwidth

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "bandwidth_share": self.bandwidth_share, "device": self.device.as_dict()}


def bytes_per_token(manifest: Manifest, position: float, kv: str | None = None) -> int:
    """Bytes that decoding one token at `position` has to read: weights that take part, and the cache so far.

    Of an MoE layer's experts the chosen ones count; an embedding table counts as far as it also is the head. Of a head
    in split nibbles the low ones are read only for the logits that are computed again, in whole tiles. `kv` is the
    cache's type, one of `edgelm.bundle.kv_cache.KV_TYPES`, None the bundle's own.
    """
    model = manifest.model
    total = 0.0
    for tensor in manifest.tensors:
        if ".moe." in tensor.name:
            total += tensor.size * model.experts_per_token / max(1, model.num_experts)
        elif tensor.name.startswith("rope.") or ("embed_tokens" in tensor.name and not model.tied):
            continue
        elif tensor.name.endswith(".lower"):
            total += tensor.size * min(1.0, RESCORE * TILE / model.vocab_size)
        else:
            total += tensor.size
    kind = kv or manifest.graph.kv_dtype
    row = 2 * model.num_layers * model.num_kv_heads * row_bytes(kind, model.head_dim, manifest.ops)
    return round(total + row * position)


def beyond_caches(nbytes: int) -> bool:
    """Whether so many bytes, read in turn, come from memory: they are several times what the CPU's caches hold."""
    return nbytes >= _CACHES * (devices.cache_bytes() or _ASSUMED_CACHE)


def memory_bandwidth(threads: int) -> float | None:
    """`read_bandwidth` of the machine's memory; None where too little is free for more than the caches' to be seen."""
    return read_bandwidth(threads) if beyond_caches(_read_size()) else None


def _read_size() -> int:
    available = devices.describe().memory_available
    return _READ_BYTES if available is None else min(_READ_BYTES, available // 4)


def choose_tokens(prompt: int | None, new: int | None, context: int) -> tuple[int, int]:
    """How many prompt and new tokens to measure with; None is the default, or less where the context is short.

    Raises:
        ContextLengthError: what was asked for does not fit.
    """
    if (prompt or 1) + (new or 1) > context:
        asked = f"{prompt:,} prompt tokens" if prompt else f"{new:,} new tokens"
        asked += f" and {new:,} new ones" if prompt and new else ""
        raise ContextLengthError(
            f"{asked} are more than the model's context of {context:,} has room for: give smaller numbers"
        )
    if new is None:
        new = min(NEW_TOKENS, max(1, context // 5) if prompt is None else context - prompt)
    return min(PROMPT_TOKENS, context - new) if prompt is None else prompt, new


def read_bandwidth(threads: int, file: Path | None = None) -> float:
    """Bytes a second that `threads` threads read: the best of a few passes over half a gigabyte.

    From anonymous memory, or from a mapping of `file`, as weights are read: its first half gigabyte, or all it has. The
    first pass brings it into the page cache.

    Raises:
        EdgeLMError: `file` is too small to have 8 bytes for every thread.
    """
    size = _read_size()
    if file is None:
        # Written, so that every page is its own: untouched zeros all lie in one page that stays in the cache.
        words = np.ones(size // 8, np.uint64)
    else:
        count = min(size, file.stat().st_size) // 8
        if count < threads:
            raise EdgeLMError(f"{file} is too small to measure bandwidth with: give a file of half a gigabyte")
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
    """Load the bundle and measure it `repeat` times, after one run that is not counted.

    `prompt_tokens` and `new_tokens` are 512 and 128 where they are not given, or less where the context is short. `kv`
    is the cache's type, `weight_memory` as for `edgelm.load`. With a `batch` above 1, that many sequences are prefilled
    one after the other and decode together: rates count the tokens of all of them. It needs native operators.

    Raises:
        ContextLengthError: prompt and new tokens do not fit into the model's context.
        EdgeLMError: a count below 1.
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
        # Random tokens: an MoE model routes them over all its experts, and no text favours one model's tokenizer.
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
    from_memory = batch == 1 and (not on_cpu or beyond_caches(bytes_read))
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
    for _ in range(new_tokens):
        tokens = batch.decode_batch(tokens).argmax(axis=1).tolist()
    decoded = time.perf_counter() - prefilled
    return _Run(prefilled - started, prefilled - started, len(prompts) * new_tokens / decoded)
