"""Run the golden prompts on the device and keep what is compared with the pack.

Three passes: the shipped graph over all positions at once; the shipped graph as it is used (prefill, then one token at
a time through the KV cache); the debug graph with its hidden states. Logits are reduced block by block, so that an
array [N, 256000] is never in memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from edgelm import devices
from edgelm.parity.diagnose import DeviceTrace, choose
from edgelm.parity.logits import LogitRecord
from edgelm.parity.pack import GoldenPrompt, ParityPack
from edgelm.parity.sketch import sign_matrix, sketch
from edgelm.progress import Progress

if TYPE_CHECKING:
    from edgelm.bundle import Bundle
    from edgelm.runtimes import Runtime
    from edgelm.runtimes.tracing import TracingModel

# The debug graph returns all logits of a pass at once; a prompt whose logits are larger than this is traced without.
_DEBUG_LOGITS_BYTES = 512 << 20


@dataclass
class DeviceRun:
    """All results of the device. `decoded` covers the positions that choose greedy tokens."""

    at_once: LogitRecord
    decoded: LogitRecord
    debug: LogitRecord
    trace: DeviceTrace | None = None
    runtime: str = ""
    engine: str | None = None
    isa: str | None = None
    resident_peak: int | None = None
    threads: int = 0
    load_s: float = float("nan")
    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_tokens: int = 0
    decode_s: float = 0.0
    notes: list[str] = field(default_factory=list)


def run_device(
    bundle: Bundle,
    pack: ParityPack,
    runtime: str | None,
    threads: int | None,
    progress: Progress,
    kv: str | None = None,
) -> DeviceRun:
    """Run both graphs over the pack's prompts, one graph after the other so that only one is in memory.

    `kv` is the data type of the shipped graph's KV cache; None is the runtime's default.
    """
    from edgelm.runtimes import engine_of, open_runtime, open_tracing
    from edgelm.runtimes.onnxruntime.native_library import kernels_of

    run = DeviceRun(LogitRecord(pack), LogitRecord(pack), LogitRecord(pack))
    longest = max(prompt.fed for prompt in pack.prompts)
    start = time.perf_counter()
    with open_runtime(bundle, runtime, threads=threads, context_length=longest, kv=kv) as model:
        run.load_s = time.perf_counter() - start
        run.runtime, run.threads = model.name, model.threads
        with progress.task("running the graph", sum(prompt.fed for prompt in pack.prompts), unit="steps") as advance:
            for prompt in pack.prompts:
                ids = pack.ids[prompt.positions].tolist()
                _decode(model, run, ids, prompt.start, prompt.length)
                model.reset()
                at = prompt.start
                for block in model.logits_all(ids):
                    at = run.at_once.put(at, block)
                advance(prompt.fed)
        run.engine, run.isa = engine_of(model.name), kernels_of(bundle.manifest.ops)
        _, run.resident_peak = devices.resident_memory()
    debug = open_tracing(bundle, model.name, threads=threads)
    if debug is None:
        run.notes.append(f"{model.name} has no debug graph: layers were not compared, only logits")
        return run
    with debug:
        run.trace = _trace(debug, bundle, pack, run, progress)
    return run


def _decode(model: Runtime, run: DeviceRun, ids: list[int], first: int, length: int) -> None:
    """Prefill the prompt, then feed the reference's continuation token by token, whatever the device chooses."""
    model.reset()
    start = time.perf_counter()
    logits = model.prefill(ids[:length])
    run.prefill_s += time.perf_counter() - start
    run.prefill_tokens += length
    at = run.decoded.put(first + length - 1, logits[None, :])
    start = time.perf_counter()
    spent = 0.0
    for token in ids[length:]:
        start = time.perf_counter()
        logits = model.decode(token)
        spent += time.perf_counter() - start
        at = run.decoded.put(at, logits[None, :])
    run.decode_s += spent
    run.decode_tokens += len(ids) - length


def _batches(pack: ParityPack, vocab_size: int) -> Iterator[tuple[list[GoldenPrompt], bool]]:
    """Yield the prompts of each pass, of similar length, and whether their logits fit into memory.

    There are few passes, because every pass in float32 dequantises all weights again.
    """
    batch: list[GoldenPrompt] = []
    # The longest first: it sets the size that the others are padded to.
    for prompt in sorted(pack.prompts, key=lambda item: -item.fed):
        longest = batch[0].fed if batch else prompt.fed
        padded = (len(batch) + 1) * longest
        if batch and (padded * vocab_size * 4 > _DEBUG_LOGITS_BYTES or 4 * prompt.fed < longest):
            yield batch, True
            batch = []
        batch.append(prompt)
        if batch[0].fed * vocab_size * 4 > _DEBUG_LOGITS_BYTES:
            yield batch, False
            batch = []
    if batch:
        yield batch, True


def _trace(debug: TracingModel, bundle: Bundle, pack: ParityPack, run: DeviceRun, progress: Progress) -> DeviceTrace:
    layers, count, experts = pack.num_layers, len(pack.ids), pack.num_experts
    signs = sign_matrix(bundle.manifest.model.hidden_size, pack.sketch_seed)
    norms = np.zeros((layers + 1, count), np.float32)
    sketches = np.zeros((layers + 1, count, signs.shape[1]), np.float32)
    router = np.zeros((layers, count, experts), np.float32) if experts else None
    with progress.task("tracing the layers", count, unit="steps") as advance:
        for prompts, with_logits in _batches(pack, bundle.manifest.model.vocab_size):
            results = debug.trace_all([pack.ids[prompt.positions].tolist() for prompt in prompts], logits=with_logits)
            for prompt, result in zip(prompts, results, strict=True):
                rows = prompt.positions
                for index, hidden in enumerate(result.hidden):
                    norms[index, rows] = np.linalg.norm(hidden, axis=-1)
                    sketches[index, rows] = sketch(hidden, signs)
                if router is not None:
                    for index, logits in enumerate(result.router_logits):
                        router[index, rows] = logits
                if result.logits is not None:
                    run.debug.put(prompt.start, result.logits)
                advance(prompt.fed)
    chosen = None
    if router is not None:
        assert pack.target.experts is not None
        chosen = choose(router, pack.target.experts.shape[-1])
    return DeviceTrace(norms, sketches, router, chosen)
