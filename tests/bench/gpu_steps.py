"""Single prefills and decode steps on a GPU for sanitizers and profilers, and decoding with and without PDL.

    python tests/bench/gpu_steps.py tiny         # a small model: for compute-sanitizer, which makes it slow
    python tests/bench/gpu_steps.py profile      # two layers of the real widths, one decode step: for ncu
    python tests/bench/gpu_steps.py pdl          # decoding with programmatic dependent launch (PDL) and without

Each command takes --model and --kind, and --dry-run for a device that computes nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
from typing import Any

import gpu_random
import numpy as np
from gpu_dry import DryDevice
from gpu_figures import paired
from gpu_models import agreement, config_of, decode, load, positions
from numpy.typing import NDArray

from edgelm.generation.sampling import Sampling
from edgelm.runtimes.cuda.driver import CudaDevice
from edgelm.runtimes.cuda.driver_library import LIBRARY, LIBRARY_VARIABLE
from edgelm.runtimes.cuda.executor import Executor
from edgelm.runtimes.cuda.kernels.images import KernelCompiler
from edgelm.synth import PUBLISHED

# Heads of 128, as in the published models, so that the same attention kernels run.
_SMALL = {
    "vocab_size": 512, "hidden_size": 512, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
_BATCHES = (1, 32)


def tiny(device: Any, name: str, kind: str) -> int:
    """Prefill, decode and sample with a small model, alone and in a batch."""
    config = dict(PUBLISHED[name]) | _SMALL
    model = load(device, config, kind, 3)
    print(f"{name} {kind}, small: {agreement(model, config['vocab_size'], 3)}")
    decode(model, 3, 3, 3, Sampling(0.8, top_p=0.9, repetition_penalty=1.1, seed=1))
    device.synchronize()
    return 0


def profile(device: Any, name: str, kind: str) -> int:
    """Run a decode step with a short cache and one with a long cache, between the profiler's start and stop."""
    config = config_of(name) | {"num_hidden_layers": 2}
    at = positions(config)
    model = load(device, config, kind, 1)
    token, places = np.zeros((1, 1), np.int32), (at.context, at.long - 1)
    for place in places:
        model.run(token, [place], greedy=True)
    device.synchronize()
    profiler = None
    if isinstance(device, CudaDevice):
        profiler = ctypes.CDLL(os.environ.get(LIBRARY_VARIABLE) or LIBRARY)
        profiler.cuProfilerStart()
    for place in places:
        model.run(token, [place], greedy=True)
    device.synchronize()
    if profiler is not None:
        profiler.cuProfilerStop()
    print(f"{name} {kind}, 2 layers: a decode step after {places[0]} tokens, then one after {places[1]}")
    return 0


def _trace(model: Executor, vocabulary: int, batch: int, steps: int) -> NDArray[np.float32]:
    """Prefill random tokens for every sequence, decode greedily, and return the logits [steps, batch, V]."""
    ids = np.random.default_rng(4).integers(0, vocabulary, (batch, 40))
    for row in range(batch):
        model.run(ids[row : row + 1], [0], first=row)
    tokens = ids[:, -1:].astype(np.int32)
    chosen = np.empty(batch, np.int32)
    logits = np.empty((steps, batch, vocabulary), np.float32)
    for step in range(steps):
        model.run(tokens, [40 + step] * batch, greedy=True, graph=True)
        model.logits(logits[step])
        model.chosen(chosen)
        tokens[:, 0] = chosen
    return logits


def pdl(device: Any, name: str, kind: str) -> int:
    """Decode with PDL (a kernel may start before the one before it ends) and without; compare bits and times."""
    config = config_of(name)
    at = positions(config)
    plain = load(device, config, kind, max(_BATCHES))
    models = {False: plain, True: gpu_random.again(plain)}
    equal = True
    rows = []
    for batch in _BATCHES:
        traces = {}
        for with_pdl, model in models.items():
            device.pdl = with_pdl
            traces[with_pdl] = _trace(model, config["vocab_size"], batch, 16 if batch == 1 else 4)
        device.pdl = True
        again = _trace(models[True], config["vocab_size"], batch, len(traces[True]))
        differing = [int((traces[False] != other).any(axis=2).sum()) for other in (traces[True], again)]
        equal = equal and not any(differing)
        runs = []
        for with_pdl, model in models.items():

            def timed(with_pdl: bool = with_pdl, model: Executor = model, batch: int = batch) -> float:
                device.pdl = with_pdl
                return float(np.median(decode(model, at.context, batch, at.steps)))

            runs.append(timed)
        without, pdl_times = paired(runs[0], runs[1], 3)
        medians = [float(np.median(times)) for times in (without, pdl_times)]
        tokens = traces[True].shape[0] * batch
        print(
            f"{name} {kind} batch {batch}: the logits of {differing[0]} and, a second time, {differing[1]} of {tokens} "
            f"tokens differ; a step takes {medians[0] * 1e6:.1f} us without PDL, {medians[1] * 1e6:.1f} us "
            f"with",
            flush=True,
        )
        for what, median in zip(("without", "with"), medians, strict=True):
            what = f"{name} {kind} decode, batch {batch}, {what} PDL"
            rows.append({"name": what, "median_s": median, "rate": batch / median})
    print(json.dumps({"rows": rows}))
    print("PDL gives the same bits" if equal else "PDL CHANGES RESULTS")
    return int(not equal)


def main() -> int:
    """Run the command that is asked for, for every model and kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = {"tiny": tiny, "profile": profile, "pdl": pdl}
    parser.add_argument("command", choices=list(commands))
    parser.add_argument("--model", action="append", choices=list(PUBLISHED))
    parser.add_argument("--kind", action="append", choices=list(gpu_random.RECIPES))
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args()
    worst = 0
    for name in given.model or PUBLISHED:
        for kind in given.kind or gpu_random.RECIPES:
            device: Any = DryDevice() if given.dry_run else CudaDevice(KernelCompiler())
            worst = max(worst, commands[given.command](device, name, kind))
            device.close()
    return worst


if __name__ == "__main__":
    sys.exit(main())
