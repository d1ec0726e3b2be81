"""How much faster is `generate_many` when the rows of ended sequences are not computed?

    python tests/bench/many.py BUNDLE... [--batch 8] [--rounds 4]

Answers of 1 to `batch` times 16 tokens to prompts of 64. Both ways run in turn, after one round that warms up; their
tokens have to be equal. Prints the median of each and its range. It compares two ways of ours, so it prints no share
of the machine's limit: `edgelm bench --batch` does.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import edgelm
from edgelm.generation.options import GenerateOptions
from edgelm.runtimes.onnxruntime.native import NativeBatch

WAYS = {False: "all rows are computed", True: "the running ones move together"}


def seconds(model: edgelm.LanguageModel, batch: int, rounds: int) -> dict[bool, list[float]]:
    """Return the seconds of each round, with and without moving.

    Raises:
        AssertionError: the tokens differ.
    """
    prompts = [[100 + row] * 3 + list(range(200 + 40 * row, 261 + 40 * row)) for row in range(batch)]
    each: list[GenerateOptions] = [{"max_tokens": 16 * (row + 1)} for row in range(batch)]
    found: dict[bool, list[float]] = {way: [] for way in WAYS}
    for number in range(rounds + 1):
        tokens = []
        for way in WAYS:
            NativeBatch.moves = way
            started = time.perf_counter()
            answers = model.generate_many(prompts, batch=batch, each=each, seed=1)
            if number:
                found[way].append(time.perf_counter() - started)
            tokens.append([answer.tokens for answer in answers])
        assert tokens[0] == tokens[1], "moving a sequence changed its tokens"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    for path in args.bundles:
        with edgelm.load(path, chat=False) as model:
            model.end_ids = frozenset()
            for way, taken in seconds(model, args.batch, args.rounds).items():
                print(f"{path.name}, {WAYS[way]}: {statistics.median(taken):.2f} s "
                      f"({min(taken):.2f} to {max(taken):.2f})")  # fmt: skip


if __name__ == "__main__":
    main()
