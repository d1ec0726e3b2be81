"""Measure a bundle with its own runtime: logits, layers and speed on this device. Needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.bundle import Bundle
from edgelm.errors import EdgeLMError
from edgelm.evaluation.layers import LayerSketches
from edgelm.evaluation.result import Speed
from edgelm.parity.diagnose import choose
from edgelm.progress import Progress
from edgelm.runtimes import Runtime, open_runtime, open_tracing

PROMPT_TOKENS, NEW_TOKENS, REPEAT = 128, 32, 3
_TRACE_BYTES = 256 << 20

Ints = NDArray[np.int64]


def open_for(bundle: Bundle, length: int, runtime: str | None, threads: int | None, kv: str | None) -> Runtime:
    """Load a bundle for windows of `length` tokens. Raises as `open_runtime`."""
    return open_runtime(bundle, runtime, threads=threads, context_length=length, kv=kv)


def logits_of(runtime: Runtime, ids: Ints, progress: Progress, label: str) -> Iterator[NDArray[np.float32]]:
    """Yield blocks of logits [n, V] of windows int64 [W, T], each window from an empty cache.

    A block is valid until the next one is requested.
    """
    with progress.task(label, ids.size, unit="steps") as advance:
        for window in ids:
            runtime.reset()
            for block in runtime.logits_all(window.tolist()):
                yield block
                advance(len(block))


def trace_layers(
    bundle: Bundle, ids: Ints, runtime: str, threads: int | None, progress: Progress
) -> LayerSketches | None:
    """Trace the residual streams of the debug graph over windows int64 [W, T]; None where the runtime cannot trace.

    The debug graph computes in float32 from the bundle's weights. So this measures the error of quantised weights, not
    that of quantised activations.
    """
    model = bundle.manifest.model
    debug = open_tracing(bundle, runtime, threads=threads)
    if debug is None:
        return None
    length = ids.shape[1]
    sketches = LayerSketches(model.num_layers, ids.size, model.hidden_size, model.experts_per_token)
    together = max(1, _TRACE_BYTES // (4 * length * model.hidden_size * (model.num_layers + 1)))
    with debug, progress.task(f"{bundle.path.name}: layers", len(ids), unit="steps") as advance:
        for start in range(0, len(ids), together):
            part = ids[start : start + together]
            for number, trace in enumerate(debug.trace_all(part.tolist(), logits=False), start):
                for layer, hidden in enumerate(trace.hidden, -1):
                    sketches.put(layer, number * length, hidden)
                for layer, router in enumerate(trace.router_logits):
                    sketches.put_experts(layer, number * length, choose(router, model.experts_per_token))
            advance(len(part))
    return sketches


def measure_speed(bundle: Bundle, runtime: str | None, threads: int | None, kv: str | None) -> Speed:
    """Run a short `edgelm bench` in another process, since this one also holds a float model in memory.

    Raises:
        EdgeLMError: the benchmark failed.
    """
    context = bundle.manifest.model.context_length
    new = min(NEW_TOKENS, max(1, context // 4))
    prompt = min(PROMPT_TOKENS, context - new)
    counts = ("--prompt-tokens", prompt, "--new-tokens", new, "--repeat", REPEAT)
    chosen = {"--runtime": runtime, "--threads": threads, "--kv": kv}
    options = [str(part) for pair in chosen.items() if pair[1] is not None for part in pair]
    # -P: do not search the current folder for packages.
    command = [sys.executable, "-P", "-m", "edgelm", "bench", str(bundle.path), "--json", *map(str, counts), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EdgeLMError(
            f"measuring the speed of {bundle.path} failed: {_last_line(done.stderr)}; pass --no-speed to leave it out"
        )
    found: dict[str, Any] = json.loads(done.stdout)
    return Speed(
        prefill_tokens_per_second=found["prefill_tokens_per_second"]["median"],
        decode_tokens_per_second=found["decode_tokens_per_second"]["median"],
        peak_memory=found["resident_peak"],
        prompt_tokens=found["prompt_tokens"],
        new_tokens=found["new_tokens"],
        threads=found["threads"],
        load_average=found["load_average"],
    )


def _last_line(text: str) -> str:
    lines: Sequence[str] = text.strip().splitlines()
    return lines[-1] if lines else "no message"
