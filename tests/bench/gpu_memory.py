"""How much memory do models of the published shapes need on a GPU, by recipe? Counted from their programs.

    python tests/bench/gpu_memory.py                       # the table of docs/gpu/jetson.md, in MiB
    python tests/bench/gpu_memory.py --context 2048

Weights are those of an exported bundle. Cache, values and scratch memory are what the runtime `cuda-kernels` reserves
for one sequence on an Orin. The driver's context and its copy of the kernels come on top; they were not measured.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import gpu_random

from edgelm.quant.recipe import Recipe
from edgelm.runtimes.base import DEFAULT_CHUNK
from edgelm.runtimes.cuda.device import DeviceInfo
from edgelm.runtimes.cuda.executor import Layout, Sizes
from edgelm.synth import PUBLISHED

RECIPES = ("none", "fp8", "int8", "int4")
ORIN = DeviceInfo("Orin", (8, 7), 16, 64 << 30, (12, 6))
CACHES = ("float16", "int8")
# The positions whose logits `cuda-kernels` computes at a time take 64 MB at most, see `edgelm.runtimes.base`.
_LOGITS_BYTES = 64 << 20


@dataclass(frozen=True)
class Memory:
    """Bytes on the GPU: weights, the cache by its type, values and scratch memory."""

    weights: int
    caches: dict[str, int]
    rest: int


def memory(name: str, recipe: str, context: int) -> Memory:
    """Return the memory of a published model exported with a recipe."""
    config = PUBLISHED[name]
    program = gpu_random.random_program(config, Recipe.load(recipe))
    capacity = min(context, int(config["max_position_embeddings"]))
    logits = max(1, min(DEFAULT_CHUNK, _LOGITS_BYTES // (4 * int(config["vocab_size"]))))
    plans = {
        kv: Layout(program, Sizes(1, capacity, tokens=DEFAULT_CHUNK, logits=logits, kv=kv), ORIN).plan for kv in CACHES
    }
    rest = max(plan.values + plan.workspace for plan in plans.values())
    return Memory(program.weight_bytes, {kv: plan.caches for kv, plan in plans.items()}, rest)


def rows(context: int) -> dict[str, list[int]]:
    """Return the numbers of the table, MiB, by model: the total for each recipe, the cache in it, the same as int8."""
    table = {}
    for name in PUBLISHED:
        found = [memory(name, recipe, context) for recipe in RECIPES]
        totals = [one.weights + one.caches["float16"] + one.rest for one in found]
        table[name] = [round(number / 2**20) for number in (*totals, *(found[0].caches[kv] for kv in CACHES))]
    return table


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=4096)
    context = parser.parse_args().context
    recipes = " | ".join(f"`{recipe}`" for recipe in RECIPES)
    print(f"| MiB, context of {context:,} | {recipes} | float16 cache in it | the same as int8 |")
    print("|---|" + "---|" * (len(RECIPES) + len(CACHES)))
    for name, numbers in rows(context).items():
        print(f"| {name} | " + " | ".join(f"{number:,}" for number in numbers) + " |")


if __name__ == "__main__":
    main()
