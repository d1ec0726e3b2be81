"""Write the cases of sampling and stop strings that Python and libedgelm both have to give.

    python tests/vectors/write.py           compare the files with what Python gives now
    python tests/vectors/write.py --write   write them

tests/unit/test_vectors.py does the first, runtimes/csrc/tests/capi/vectors_test.cc runs the same files in C++.

Logits come from integers, so that the files are small: logit i is ((a * i + b) mod m - c) / d, where d is a power of
two and every step exact; then `set` replaces some. Sequences add 7919 to b after each token.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import GenerationValueError
from edgelm.generation.sampling import Sampler, Sampling, candidates, choose, penalise
from edgelm.generation.stop_strings import StopStrings

FOLDER = Path(__file__).parent
LAST = 1 - 2.0**-53
"""The highest number that is drawn."""

SHAPES: dict[str, dict[str, Any]] = {
    "one token": {"size": 1, "a": 0, "b": 3, "m": 7, "c": 0, "d": 1},
    "two equal tokens": {"size": 2, "a": 0, "b": 3, "m": 7, "c": 0, "d": 1},
    "all equal": {"size": 60, "a": 0, "b": 0, "m": 1, "c": 2, "d": 1},
    "many ties": {"size": 1000, "a": 37, "b": 11, "m": 13, "c": 9, "d": 2},
    "no ties": {"size": 300, "a": 71, "b": 5, "m": 307, "c": 150, "d": 32},
    "negative": {"size": 100, "a": 29, "b": 0, "m": 101, "c": 300, "d": 16},
    "minus infinity": {
        "size": 64, "a": 5, "b": 1, "m": 67, "c": 30, "d": 8, "set": [[0, None], [7, None], [8, 40], [63, None]],
    },
    "one peak": {"size": 5000, "a": 977, "b": 3, "m": 5003, "c": 5003, "d": 512, "set": [[4321, 20000]]},
    "flat": {"size": 50304, "a": 26189, "b": 17, "m": 50311, "c": 25000, "d": 16384},
    "usual": {"size": 50304, "a": 26189, "b": 17, "m": 50311, "c": 50311, "d": 4096, "set": [[9, 9000], [40000, 9000]]},
    "large": {"size": 262144, "a": 104729, "b": 1, "m": 262147, "c": 262147, "d": 16384},
}  # fmt: skip
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.25},
    {"temperature": 40.0},
    {"temperature": 1e-40},
    {"temperature": 1e40},
    {"temperature": 0.8, "top_k": 1},
    {"temperature": 0.8, "top_k": 5},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.9},
    {"temperature": 1.0, "top_k": 2000},
    {"temperature": 1.0, "top_k": 2**31 - 1},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.5, "top_p": 0.5},
    {"temperature": 1.0, "top_p": 1e-9},
    {"temperature": 1.0, "top_p": 0.999999},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 3.0, "min_p": 1.0},
    {"temperature": 2.0, "min_p": 1e-6},
    {"temperature": 0.9, "top_p": 0.95, "min_p": 0.02},
    {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "min_p": 0.02},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.5},
    {"temperature": 0.8, "repetition_penalty": 1.1, "top_p": 0.9},
    {"temperature": 0.8, "repetition_penalty": 1e12, "top_k": 20},
]
WRONG: list[dict[str, Any]] = [
    {"temperature": -0.5},
    {"temperature": 1.0, "top_k": -1},
    {"temperature": 1.0, "top_p": -0.25},
    {"temperature": 1.0, "top_p": 1.5},
    {"temperature": 1.0, "min_p": -1e-05},
    {"temperature": 1.0, "min_p": 2.0},
    {"repetition_penalty": -1.0},
    {"top_k": 5},
    {"top_k": 5, "top_p": 0.5, "min_p": 0.5},
]


def logits_of(shape: dict[str, Any], step: int = 0) -> NDArray[np.float32]:
    """The logits of a shape; of a sequence those of its token number `step`."""
    i = np.arange(shape["size"], dtype=np.int64)
    values = (shape["a"] * i + shape["b"] + 7919 * step) % shape["m"] - shape["c"]
    logits = values.astype(np.float32) / np.float32(shape["d"])
    for index, value in shape.get("set", []):
        logits[index] = -np.inf if value is None else np.float32(value) / np.float32(shape["d"])
    return logits


def _certain(logits: NDArray[np.float32], options: Sampling, seen: list[int], uniform: float) -> bool:
    """Whether a last bit of an exponential cannot change the token."""
    if options.greedy:
        return True
    if seen:
        logits = penalise(logits, np.array(seen), options.repetition_penalty)
    ids, probabilities = candidates(logits, options)
    if options.top_p < 1 and np.unique(logits[ids]).size > 1:
        others = [
            candidates(logits, Sampling(options.temperature, options.top_k, options.top_p * factor, options.min_p))[0]
            for factor in (1 - 1e-12, 1 + 1e-12)
        ]
        if any(not np.array_equal(ids, other) for other in others):
            return False
    borders = np.cumsum(probabilities)[:-1]
    return bool(uniform == 0 or borders.size == 0 or np.abs(borders - uniform).min() > 1e-12)


def choices() -> Iterator[dict[str, Any]]:
    """Cases of one token, by logits and a random number."""
    numbers = random.Random(16)
    for (name, shape), given in itertools.product(SHAPES.items(), OPTIONS):
        options, logits = Sampling(**given), logits_of(shape)
        seen = numbers.sample(range(shape["size"]), min(shape["size"], 20)) if "repetition_penalty" in given else []
        uniforms = [0.0] if options.greedy else [0.0, LAST, *(numbers.getrandbits(53) * 2.0**-53 for _ in range(3))]
        uniforms = [uniform for uniform in uniforms if _certain(logits, options, seen, uniform)]
        with np.errstate(over="ignore"):
            tokens = [choose(logits, options, seen, uniform) for uniform in uniforms]
        yield {"logits": name, "options": given, "seen": seen, "uniforms": uniforms, "tokens": tokens}


def sequences() -> Iterator[dict[str, Any]]:
    """Cases of twelve tokens of one seed."""
    seeds = [0, 1, 7, 2**32 - 1, 2**32, 2**64 - 1]
    for (name, given), seed in zip(
        itertools.product(("many ties", "no ties", "usual"), (OPTIONS[1], OPTIONS[8], OPTIONS[18], OPTIONS[22])),
        itertools.cycle(seeds),
    ):
        prompt = [3, 5, 3, 8]
        sampler = Sampler(Sampling(**given, seed=seed), prompt)
        tokens = [sampler.sample(logits_of(SHAPES[name], step)) for step in range(12)]
        yield {"logits": name, "options": given, "seed": str(seed), "prompt": prompt, "tokens": tokens}


def streams() -> Iterator[dict[str, Any]]:
    """Raw numbers of PCG64. They are texts: JSON's numbers have 53 bits in many languages."""
    for seed in (0, 1, 42, 2**31, 2**32 - 1, 2**32, 2**53 + 1, 2**63, 2**64 - 1):
        yield {"seed": str(seed), "raw": [str(word) for word in np.random.PCG64(seed).random_raw(6)]}


def errors() -> Iterator[dict[str, Any]]:
    """Options out of range, and the messages."""
    for given in WRONG:
        try:
            Sampling(**given)
        except GenerationValueError as error:
            yield {"options": given, "message": str(error)}


def stop_strings() -> Iterator[dict[str, Any]]:
    """Texts in pieces: what each shows, whether a stop string was found, what is held back at the end."""
    numbers = random.Random(17)
    fixed: list[tuple[list[str], list[str]]] = [
        ([], ["a", "", "b"]),
        (["stop"], ["on", "e st", "o", "p two"]),
        (["stop"], ["stostostop"]),
        (["ab", "abcd", "bcd"], ["xabcd"]),
        (["abcd", "bcd"], ["xab", "cd"]),
        (["aa"], ["a", "a"]),
        (["\n\n", "</s>"], ["a\n", "b\n", "</", "s", ">"]),
        (["größe", "ö"], ["gr", "ö", "ße"]),
        (["日本語", "本"], ["日", "本", "語"]),
        (["🙂🙃"], ["a🙂", "🙂", "🙃b"]),
        (["é"], ["e\u0301", "é"]),
    ]
    made = [
        (
            ["".join(numbers.choices("abé", k=numbers.randint(1, 6))) for _ in range(numbers.randint(1, 3))],
            ["".join(numbers.choices("abéc", k=numbers.randint(0, 4))) for _ in range(numbers.randint(1, 8))],
        )
        for _ in range(150)
    ]
    for stops, pieces in fixed + made:
        stream, shown, found = StopStrings(stops), [], False
        for piece in pieces:
            text, found = stream.push(piece)
            shown.append(text)
            if found:
                break
        yield {"stops": stops, "pieces": pieces, "shown": shown, "found": found, "rest": stream.flush()}


def files() -> dict[str, str]:
    """The files' names and texts."""
    sampling = {
        "logits": SHAPES,
        "choices": list(choices()),
        "sequences": list(sequences()),
        "streams": list(streams()),
        "errors": list(errors()),
    }
    lines = []
    for key, value in sampling.items():
        rows = value.items() if isinstance(value, dict) else [(None, row) for row in value]
        texts = [json.dumps(row) if name is None else f"{json.dumps(name)}: {json.dumps(row)}" for name, row in rows]
        begin, end = "{}" if isinstance(value, dict) else "[]"
        lines.append(f"{json.dumps(key)}: {begin}\n" + ",\n".join(texts) + f"\n{end}")
    stops = ",\n".join(json.dumps(case, ensure_ascii=False) for case in stop_strings())
    return {"sampling.json": "{\n" + ",\n".join(lines) + "\n}\n", "stop_strings.json": f"[\n{stops}\n]\n"}


def main() -> None:
    write = "--write" in sys.argv[1:]
    differ = []
    for name, text in files().items():
        path = FOLDER / name
        if write:
            path.write_text(text, encoding="utf-8", newline="\n")
        elif path.read_text(encoding="utf-8") != text:
            differ.append(name)
    if differ:
        sys.exit(f"{', '.join(differ)}: Python gives something else now")


if __name__ == "__main__":
    main()
