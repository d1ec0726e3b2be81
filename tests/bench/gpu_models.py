"""How fast are models of the published shapes on this GPU with our kernels?

    python tests/bench/gpu_models.py                                     # both models, every kind of weights
    python tests/bench/gpu_models.py --model fox-1-1.6b --kind bf16 --repeat 5
    python tests/bench/gpu_models.py --emulated                          # a tiny model on the emulator
    python tests/bench/gpu_models.py --dry-run                           # the real shapes, nothing computed

Weights are random (`gpu_random.py`). Before anything is timed, the logits of decoded tokens, alone and in a batch, are
compared with those of a prefill. In a dense model they may differ by rounding only; if they differ more, the model is
still timed, and the exit code is 1. In an MoE rounding can change the selected experts, which with random weights
changes the logits completely, so such tokens are only counted. `gpu_peer.py` times transformers on the same shapes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_figures
import gpu_random
import numpy as np
from gpu_dry import DryDevice
from gpu_figures import Figure, Limits

from edgelm.bundle.kv_cache import row_bytes
from edgelm.generation.sampling import Sampler, Sampling
from edgelm.runtimes.cuda.driver import CudaDevice
from edgelm.runtimes.cuda.emulated import EmulatedDevice
from edgelm.runtimes.cuda.executor import Executor, Sizes
from edgelm.runtimes.cuda.kernels.images import KernelCompiler
from edgelm.runtimes.cuda.program import Program, matrix_of
from edgelm.runtimes.cuda.sampling import SampledDecoding
from edgelm.synth import PUBLISHED

TINY = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 256,
}  # fmt: skip
# The check: tokens of the prompt, how many of them are decoded, and the largest error of logits from rounding.
_PROMPT, _DECODED = 48, 8
_ROUNDING = 0.05
SAMPLED = Sampling(0.8, top_k=50, top_p=0.95, repetition_penalty=1.1, seed=1)
"""How tokens are sampled where that is timed. With top-k the shortlist always suffices."""


@dataclass(frozen=True)
class Positions:
    """Context lengths at which a model is timed.

    Attributes:
        context: tokens in the cache when short decoding begins.
        long: tokens of the long prefill, and in the cache when long decoding ends; the capacity of the caches.
        steps: tokens decoded in a run.
    """

    context: int
    long: int
    steps: int


def positions(config: Mapping[str, Any]) -> Positions:
    """Return 512 and 4,096, or less if the model's context is shorter; raise ValueError if it is too short."""
    most = int(config["max_position_embeddings"])
    found = Positions(512, min(4096, most), 32) if most >= 1024 else Positions(64, min(96, most), 2)
    if found.long - found.steps < max(found.context, _PROMPT):
        raise ValueError(f"max_position_embeddings is {most}: too few tokens to time")
    return found


def weight_bytes(program: Program, rows: int) -> int:
    """Return the least bytes of weights that a step of `rows` tokens reads, with uniform routing to the experts."""
    total = 0
    for node in program.nodes:
        if node.op == "QuantLinear":
            total += matrix_of(node).nbytes
        elif node.op == "SparseMoE":
            blobs = [matrix_of(node, prefix) for prefix in ("gate_up_", "down_")]
            experts, chosen = blobs[0].count, node.integer("k")
            active = experts * (1 - (1 - chosen / experts) ** rows)
            total += int(sum(blob.nbytes for blob in blobs) * active / experts)
            total += program.weights[node.inputs[1]].size
    return total


def cache_bytes(config: dict[str, Any], kv: str, tokens: int) -> int:
    """Return the bytes of the keys and values of one sequence."""
    size = config["hidden_size"] // config["num_attention_heads"]
    return 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * tokens * row_bytes(kv, size)


def operations(config: dict[str, Any], tokens: int) -> int:
    """Return the floating-point operations of a prefill: matmuls with weights, and half of the attention matrix."""
    d, f = config["hidden_size"], config["intermediate_size"] * config.get("num_experts_per_tok", 1)
    size = d // config["num_attention_heads"]
    attention = d * (d * 2 + 2 * config["num_key_value_heads"] * size)
    per_token = attention + 3 * d * f + d * config.get("num_experts", 0)
    scores = tokens * tokens * d * 2  # two matmuls, half of each
    return int(2 * config["num_hidden_layers"] * (per_token * tokens + scores / 2) + 2 * d * config["vocab_size"])


@dataclass(frozen=True)
class Agreement:
    """Comparison of the logits of decoded tokens with those of a prefill.

    Attributes:
        tokens: number of tokens.
        differing: tokens whose logits differ by more than rounding.
        choosing: tokens with another most likely next token.
        worst: the largest relative difference.
    """

    tokens: int
    differing: int
    choosing: int
    worst: float

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens decoded: the logits of {self.differing} differ by more than {_ROUNDING:.0%} from a "
            f"prefill's (the most {self.worst:.1e}), {self.choosing} choose another token"
        )


def agreement(model: Executor, vocabulary: int, batch: int) -> Agreement:
    """Compare the logits of one prefill with those of a shorter one and decoding, alone and in a batch.

    Raises:
        SystemExit: logits are not finite.
    """
    ids = np.random.default_rng(1).integers(0, vocabulary, (1, _PROMPT))
    whole = np.empty((_PROMPT, vocabulary), np.float32)
    model.run(ids, [0], all_positions=True)
    model.logits(whole)
    if not np.isfinite(whole).all():
        raise SystemExit("a prefill's logits are not finite: nothing was timed")
    start = _PROMPT - _DECODED
    differences, choosing = [], 0
    for rows in (1, batch):
        found = np.empty((rows, vocabulary), np.float32)
        for row in range(rows):
            model.run(ids[:, :start], [0], first=row)
        for at in range(start, _PROMPT):
            model.run(np.repeat(ids[:, at : at + 1], rows, axis=0), [at] * rows, graph=True)
            model.logits(found)
            if not np.isfinite(found).all():
                raise SystemExit(f"a decoded token's logits are not finite ({rows} sequences): nothing was timed")
            differences.append(np.linalg.norm(found - whole[at], axis=1) / np.linalg.norm(whole[at]))
            choosing += int((found.argmax(axis=1) != whole[at].argmax()).sum())
    every = np.concatenate(differences)
    return Agreement(every.size, int((every > _ROUNDING).sum()), choosing, float(every.max()))


def decode(model: Executor, context: int, batch: int, steps: int, options: Sampling | None = None) -> list[float]:
    """Return the wall seconds of each of `steps` decoded tokens; the host reads each before the next one.

    `options`: how tokens are sampled; None: greedily, without a sampler.
    """
    assert context + steps <= model.layout.sizes.capacity, (context, steps, model.layout.sizes)
    if options is not None:
        return _decode_sampled(model, context, steps, [Sampler(options) for _ in range(batch)])
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


def _decode_sampled(model: Executor, context: int, steps: int, samplers: Sequence[Sampler]) -> list[float]:
    decoding = SampledDecoding(model)
    tokens = np.zeros(len(samplers), np.int64)
    times = []
    for at in range(context, context + steps):
        start = time.perf_counter()
        decoding.run(tokens, [at] * len(samplers), samplers)
        chosen = decoding.choose(samplers)
        times.append(time.perf_counter() - start)
        tokens[:] = chosen
    return times


def config_of(name: str, *, tiny: bool = False) -> dict[str, Any]:
    """Return the config.json of a published model, or of a small one of its family."""
    return dict(PUBLISHED[name]) | (TINY if tiny else {})


def load(device: Any, config: Mapping[str, Any], kind: str, batch: int) -> Executor:
    """Return a model with random weights of a kind, for up to `batch` sequences."""
    at = positions(config)
    program = gpu_random.random_program(config, gpu_random.RECIPES[kind])
    sizes = Sizes(batch, at.long, tokens=at.long, logits=max(batch, _PROMPT), kv="float16", samples=True)
    return gpu_random.loaded(device, program, sizes)


def measure(
    device: Any, name: str, kind: str, limit: Limits, repeat: int, batch: int, *, tiny: bool = False
) -> tuple[list[dict[str, Any]], bool]:
    """Return the rows of one model, and whether decoding and prefill agree."""
    config = config_of(name, tiny=tiny)
    at = positions(config)
    model = load(device, config, kind, batch)
    program = model.layout.program
    nbytes, cache = weight_bytes(program, 1), cache_bytes(config, "float16", at.context)
    found = agreement(model, config["vocab_size"], batch)
    agrees = not found.differing or bool(config.get("num_experts"))
    print(
        f"{name} {kind}: {program.weight_bytes / 2**20:.0f} MiB of weights, {model.layout.nbytes / 2**20:.0f} MiB for "
        f"{batch} sequences of {model.layout.sizes.rounded}; {found}{'' if agrees else ': WRONG in a dense model'}",
        flush=True,
    )
    # The contents of the caches do not matter for the time.
    median = lambda *args: float(np.median(decode(model, *args)))  # noqa: E731
    decode(model, at.context, 1, 3)
    ours = [median(at.context, 1, at.steps) for _ in range(repeat)]
    figures = [Figure(f"{name} {kind} decode", ours, nbytes + cache)]
    decode(model, at.context, 1, 3, SAMPLED)
    times = [float(np.median(decode(model, at.context, 1, at.steps, SAMPLED))) for _ in range(repeat)]
    figures.append(Figure(f"{name} {kind} decode, sampled", times, nbytes + cache))
    launches = model.decode_launches(1)

    def launch() -> None:
        for one in launches:
            device.launch(one)

    graph = device.capture(launch)
    times = device.elapsed(graph, repeat * 8)
    figures.append(Figure(f"{name} {kind} decode, GPU time alone", times, nbytes + cache))
    decode(model, at.context, batch, 2)
    ours = [median(at.context, batch, at.steps) for _ in range(repeat)]
    bytes_of_batch = weight_bytes(program, batch) + batch * cache
    figures.append(Figure(f"{name} {kind} decode, batch {batch}", ours, bytes_of_batch, per=batch))
    decode(model, at.long - at.steps, 1, 2)
    ours = [median(at.long - at.steps, 1, at.steps) for _ in range(repeat)]
    long_bytes = nbytes + cache_bytes(config, "float16", at.long)
    figures.append(Figure(f"{name} {kind} decode after {at.long - at.steps}", ours, long_bytes))
    ids = np.random.default_rng(2).integers(0, config["vocab_size"], (1, at.long))
    model.run(ids, [0])
    times = [device.elapsed(lambda: model.run(ids, [0]))[0] for _ in range(repeat)]
    figures.append(Figure(f"{name} {kind} prefill {at.long}", times, 0, operations(config, at.long), per=at.long))
    return [gpu_figures.row(figure, limit) for figure in figures], agrees


class TimedEmulator(EmulatedDevice):
    """The emulator with a clock; its times are meaningless."""

    def elapsed(self, work: Any, repeat: int = 1) -> list[float]:
        """Run the function once and time it."""
        start = time.perf_counter()
        work()
        return [time.perf_counter() - start] * repeat


def main() -> int:
    """Run the requested measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=list(PUBLISHED))
    parser.add_argument("--kind", action="append", choices=list(gpu_random.RECIPES))
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--limits", type=Path, help="file with the device's limits; measured and written if absent")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--emulated", action="store_true", help="a tiny model on the emulator")
    where.add_argument("--dry-run", action="store_true", help="the real shapes, nothing computed")
    given = parser.parse_args()
    models, kinds = given.model or list(PUBLISHED), given.kind or list(gpu_random.RECIPES)
    if given.emulated or given.dry_run:
        fine = True
        for name in models:
            for kind in kinds:
                device = TimedEmulator(lazy=True) if given.emulated else DryDevice()
                arguments = (1, 3) if given.emulated else (given.repeat, given.batch)
                _, agrees = measure(device, name, kind, Limits(1e9, 1e9), *arguments, tiny=given.emulated)
                fine = fine and agrees
                device.close()
        return int(not fine)
    device = CudaDevice(KernelCompiler())
    limit = gpu_figures.limits(device, given.limits)
    device.close()
    rows: list[dict[str, Any]] = []
    wrong = []
    for name in models:
        for kind in kinds:
            device = CudaDevice(KernelCompiler())
            found, agrees = measure(device, name, kind, limit, given.repeat, given.batch)
            gpu_figures.show(found)
            rows += found
            wrong += [] if agrees else [f"{name} {kind}"]
            device.close()
    device = CudaDevice(KernelCompiler())
    gpu_figures.report(device, limit, rows)
    device.close()
    if wrong:
        print(f"prefill and decoding differ by more than rounding: {', '.join(wrong)}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
