"""How fast are models of the published shapes on this GPU with our kernels, beside transformers on the same GPU?

    python tests/bench/gpu_models.py                                     # both models, every kind of weights
    python tests/bench/gpu_models.py --model fox-1-1.6b --kind bf16 --repeat 5
    python tests/bench/gpu_models.py --emulated                          # a tiny model on the emulator: does this run?

Weights are random (`gpu_random.py`). Before anything is timed, a token's logits after a prefill of all tokens before it
are compared with those after a prefill of fewer and decoding the rest one by one, alone and in a batch.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import gpu_figures
import gpu_random
import numpy as np
from gpu_figures import Figure, Limits, paired

from edgelm.kv_cache import row_bytes
from edgelm.runtimes.cuda.device import Device
from edgelm.runtimes.cuda.driver import CudaDevice
from edgelm.runtimes.cuda.emulated import EmulatedDevice
from edgelm.runtimes.cuda.executor import Executor, Sizes
from edgelm.runtimes.cuda.kernels_file import KernelCompiler
from edgelm.runtimes.cuda.program import Program, matrix_of
from edgelm.synth import PUBLISHED

_CONTEXT = 512
_LONG = 4096
_TINY = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 256,
}  # fmt: skip


def weight_bytes(program: Program, rows: int) -> int:
    """Bytes of weights that a step of `rows` tokens reads at least; of experts what even routing does."""
    total = 0
    for node in program.nodes:
        if node.op == "QuantLinear":
            total += matrix_of(node).nbytes
        elif node.op == "SparseMoE":
            blobs = [matrix_of(node, prefix) for prefix in ("gate_up_", "down_")]
            experts, chosen = blobs[0].count, node.whole("k")
            active = experts * (1 - (1 - chosen / experts) ** rows)
            total += int(sum(blob.nbytes for blob in blobs) * active / experts)
            total += program.weights[node.inputs[1]].size
    return total


def cache_bytes(config: dict[str, Any], kv: str, tokens: int) -> int:
    """Bytes of the keys and values of one sequence."""
    size = config["hidden_size"] // config["num_attention_heads"]
    return 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * tokens * row_bytes(kv, size)


def operations(config: dict[str, Any], tokens: int) -> int:
    """Floating-point operations of a prefill: products with weights, and half of the square of attention."""
    d, f = config["hidden_size"], config["intermediate_size"] * config.get("num_experts_per_tok", 1)
    size = d // config["num_attention_heads"]
    attention = d * (d * 2 + 2 * config["num_key_value_heads"] * size)
    per_token = attention + 3 * d * f + d * config.get("num_experts", 0)
    scores = tokens * tokens * d * 2  # two products, half of each
    return int(2 * config["num_hidden_layers"] * (per_token * tokens + scores / 2) + 2 * d * config["vocab_size"])


def check(model: Executor, vocabulary: int, batch: int) -> float:
    """The largest relative difference between ways to the same logits. Raises where it is not rounding."""
    ids = np.random.default_rng(1).integers(0, vocabulary, (1, 48))
    whole = np.empty((1, vocabulary), np.float32)
    model.run(ids, [0])
    model.logits(whole)
    if not np.isfinite(whole).all():
        raise SystemExit("logits are not finite")
    worst = 0.0
    for rows in (1, batch):
        found = np.empty((rows, vocabulary), np.float32)
        for row in range(rows):
            model.run(ids[:, :40], [0], first=row)
        for at in range(40, 48):
            model.run(np.repeat(ids[:, at : at + 1], rows, axis=0), [at] * rows, graph=True)
        model.logits(found)
        worst = max(worst, float(np.linalg.norm(found - whole, axis=1).max() / np.linalg.norm(whole)))
    if not worst < 0.05:
        raise SystemExit(f"prefill and decoding differ by {worst:.2%}: nothing was timed")
    return worst


def decode(model: Executor, context: int, batch: int, steps: int) -> list[float]:
    """Wall seconds of decoding `steps` tokens greedily, each read by the host before the next is started."""
    tokens = np.zeros((batch, 1), np.int32)
    chosen = np.empty(batch, np.int32)
    times = []
    for at in range(context, context + steps):
        start = time.perf_counter()
        model.run(tokens, [at] * batch, greedy=True, graph=True)
        model.chosen(chosen)
        times.append(time.perf_counter() - start)
        tokens[:, 0] = chosen
    return times


def measure(
    device: Device, name: str, kind: str, limit: Limits, repeat: int, batch: int, elapsed: Callable[..., list[float]],
    peer: Any = None, tiny: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """The rows of one model."""
    config: dict[str, Any] = dict(PUBLISHED[name]) | (_TINY if tiny else {})
    context, long, steps = (64, 96, 2) if tiny else (_CONTEXT, _LONG, 32)
    program = gpu_random.random_program(config, gpu_random.RECIPES[kind])
    sizes = Sizes(batch, long if tiny else long + 64, tokens=long, logits=batch, kv="float16")
    model = gpu_random.loaded(device, program, sizes)
    difference = check(model, config["vocab_size"], batch)
    nbytes, cache = weight_bytes(program, 1), cache_bytes(config, "float16", context)
    print(
        f"{name} {kind}: {program.weight_bytes / 2**20:.0f} MiB of weights, {model.layout.nbytes / 2**20:.0f} MiB for "
        f"{batch} sequences of {sizes.rounded}; ways to the same logits differ by {difference:.1e}",
        flush=True,
    )
    figures = []
    # Rows in the caches are whatever was there before: of no weight for the time.
    decode(model, context, 1, 3)
    other = None if peer is None else peer.decode(context)
    ours, theirs = paired(lambda: float(np.median(decode(model, context, 1, steps))), other, repeat)
    figures.append(Figure(f"{name} {kind} decode", ours, nbytes + cache, peer=theirs))
    graph = device.capture(lambda: model._start(model._launches(1, 1, 0, False, True)))
    figures.append(Figure(f"{name} {kind} decode, GPU time alone", elapsed(graph, repeat * 8), nbytes + cache))
    decode(model, context, batch, 2)
    ours = [float(np.median(decode(model, context, batch, steps))) for _ in range(repeat)]
    bytes_of_batch = weight_bytes(program, batch) + batch * cache
    figures.append(Figure(f"{name} {kind} decode, batch {batch}", ours, bytes_of_batch, per=batch))
    decode(model, long - steps, 1, 2)
    ours = [float(np.median(decode(model, long - steps, 1, steps))) for _ in range(repeat)]
    long_bytes = nbytes + cache_bytes(config, "float16", long)
    figures.append(Figure(f"{name} {kind} decode after {long}", ours, long_bytes))
    ids = np.random.default_rng(2).integers(0, config["vocab_size"], (1, long))

    def prefill() -> float:
        return float(elapsed(lambda: model.run(ids, [0]), 1)[0])

    ours, theirs = paired(prefill, None if peer is None else peer.prefill(ids), repeat)
    figures.append(Figure(f"{name} {kind} prefill {long}", ours, 0, operations(config, long), per=long, peer=theirs))
    rows = [gpu_figures.row(figure, limit) for figure in figures]
    if not tiny:
        gpu_figures.show(rows)
    return rows


class Transformers:
    """The same shape in transformers, bf16, random weights: decoding recorded as a CUDA graph where it can be."""

    def __init__(self, name: str) -> None:
        import torch
        import transformers  # type: ignore[import-untyped]  # it has no type information here

        self._torch, self._transformers = torch, transformers
        self._config = transformers.AutoConfig.for_model(**PUBLISHED[name])
        with torch.device("cuda"):
            model = transformers.AutoModelForCausalLM.from_config(self._config, dtype=torch.bfloat16)
        self._model = model.eval()
        self.graphed = False

    def decode(self, context: int) -> Callable[[], float]:
        """A step's median wall time, of 32 after `context` tokens."""
        torch = self._torch
        cache = self._transformers.StaticCache(config=self._config, max_cache_len=context + 64)
        ids = torch.randint(0, self._config.vocab_size, (1, context), device="cuda")
        token = torch.zeros((1, 1), dtype=torch.long, device="cuda")
        place = torch.tensor([context], device="cuda")

        def step() -> Any:
            logits = self._model(token, past_key_values=cache, cache_position=place, position_ids=place[None]).logits
            return logits[:, -1].argmax(-1, keepdim=True)

        with torch.no_grad():
            self._model(ids, past_key_values=cache, cache_position=torch.arange(context, device="cuda"))
            run: Callable[[], Any] = step
            try:
                stream = torch.cuda.Stream()
                with torch.cuda.stream(stream):
                    step()
                torch.cuda.current_stream().wait_stream(stream)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    chosen = step()

                def replay() -> Any:
                    graph.replay()
                    return chosen

                run, self.graphed = replay, True
            except RuntimeError as error:  # what is read back cannot be recorded: it is timed as it is
                torch.cuda.synchronize()
                print(f"transformers cannot be recorded ({str(error).splitlines()[0]}): timed eagerly")

        def timed() -> float:
            times = []
            with torch.no_grad():
                for _ in range(32):
                    start = time.perf_counter()
                    int(run().item())
                    times.append(time.perf_counter() - start)
            return float(np.median(times))

        return timed

    def prefill(self, ids: Any) -> Callable[[], float]:
        """Wall time of a prefill with the logits of the last token."""
        torch = self._torch
        given = torch.as_tensor(ids, device="cuda")

        def timed() -> float:
            torch.cuda.synchronize()
            start = time.perf_counter()
            with torch.no_grad():
                self._model(given, logits_to_keep=1, use_cache=True)
            torch.cuda.synchronize()
            return time.perf_counter() - start

        return timed


def main() -> int:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", choices=list(PUBLISHED))
    parser.add_argument("--kind", action="append", choices=list(gpu_random.RECIPES))
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--peer", action="store_true", help="time transformers beside bf16")
    parser.add_argument("--emulated", action="store_true", help="a tiny model on the emulator")
    given = parser.parse_args()
    models, kinds = given.model or list(PUBLISHED), given.kind or list(gpu_random.RECIPES)
    rows: list[dict[str, Any]] = []
    if given.emulated:
        emulated = EmulatedDevice()

        def timed(work: Callable[[], None], count: int = 1) -> list[float]:
            start = time.perf_counter()
            work()
            return [time.perf_counter() - start]

        for name in models:
            for kind in kinds:
                rows += measure(emulated, name, kind, Limits(1e9, 1e9), 1, 3, timed, tiny=True)
        return 0
    device = CudaDevice(KernelCompiler())
    limit = gpu_figures.limits(device)
    device.close()
    for name in models:
        for kind in kinds:
            device = CudaDevice(KernelCompiler())
            peer = None
            try:
                peer = Transformers(name) if given.peer and kind == "bf16" else None
            except Exception as error:  # whatever the peer's trouble is, ours is still to be measured
                print(f"transformers does not run {name}: {error!r}"[:300], flush=True)
            rows += measure(device, name, kind, limit, given.repeat, given.batch, device.elapsed, peer)
            device.close()
    device = CudaDevice(KernelCompiler())
    gpu_figures.report(device, limit, rows)
    device.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
