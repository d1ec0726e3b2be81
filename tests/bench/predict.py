"""Does a bundle run as fast as `edgelm doctor` predicts? Both run in turn: the machine's speed changes by the minute.

    python tests/bench/predict.py BUNDLE... [--prompt-tokens 512 2048] [--new-tokens 128] [--rounds 3]

A round is a prediction, from config.json and recipe alone, and then a run of the bundle as `edgelm bench` runs it; one
more run before warms up. Prints a table of the medians, with the median of the rounds' errors in per cent, and one JSON
line last.

The routers of random weights prefer some experts, and those of trained ones nearly none: how many of a MoE's experts
the prompt has reached is read from the resident pages of the weights file, and the prediction is told (Linux only).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from edgelm import devices
from edgelm.bundle import Bundle
from edgelm.preflight.assess import Question, planned_bundle
from edgelm.preflight.planned import Planned
from edgelm.preflight.predict import predict
from edgelm.preflight.subject import read_subject
from edgelm.quant.recipe import Recipe
from edgelm.runtimes import Runtime, open_runtime

PHASES = ("prefill", "decode")
WEIGHTS = "model.onnx.data"


def run(runtime: Runtime, prompt: list[int], new: int) -> tuple[float, float]:
    """Return the tokens per second of prefill and decode, as `edgelm.benchmark.bench` measures them."""
    runtime.reset()
    started = time.perf_counter()
    token = int(runtime.prefill(prompt).argmax())
    prefilled = time.perf_counter()
    for _ in range(new):
        token = runtime.decode_greedy(token)
    return len(prompt) / (prefilled - started), new / (time.perf_counter() - prefilled)


def experts_used(path: Path, planned: Planned) -> float:
    """Return the share of the experts whose weights the process has read."""
    experts = sum(size for name, size in planned.tensors.items() if ".moe." in name)
    smaps = Path("/proc/self/smaps")
    if not experts or not smaps.exists():
        return 1.0
    file = str((path / WEIGHTS).resolve())
    resident, mapped = 0, False
    for line in smaps.read_text().splitlines():
        if not line[0].isupper():
            mapped = line.endswith(file)
        elif mapped and line.startswith("Rss:"):
            resident += int(line.split()[1]) << 10
    dense = sum(size for name, size in planned.tensors.items() if ".moe." not in name and "embed" not in name)
    return min(1.0, max(0.0, (resident - dense) / experts)) or 1.0


def compared(path: Path, length: int, new: int, rounds: int, kv: str | None) -> dict[str, Any]:
    """Return predicted and measured tokens per second of a bundle."""
    subject = read_subject(str(path))
    assert subject.manifest is not None, f"{path} is not a bundle"
    planned = planned_bundle(subject, Recipe.from_toml(subject.manifest.recipe.toml), Question(kv=kv))
    prompt = np.random.default_rng(0).integers(0, planned.info.vocab_size, length).tolist()
    pairs = []
    with open_runtime(Bundle.open(path), context_length=length + new, kv=kv) as runtime:
        run(runtime, prompt, new)
        used = experts_used(path, planned)
        for _ in range(rounds):
            predicted = predict(planned, prompt_tokens=length, new_tokens=new, kv=kv, experts_used=used)
            assert predicted.prefill is not None
            pairs.append(((predicted.prefill.value, predicted.decode.value), run(runtime, prompt, new)))
    found: dict[str, Any] = {"bundle": path.name, "prompt_tokens": length, "new_tokens": new, "experts_used": used}
    for index, phase in enumerate(PHASES):
        said, shown = ([pair[which][index] for pair in pairs] for which in (0, 1))
        medians = statistics.median(said), statistics.median(shown)
        found[phase] = {
            "predicted": medians[0],
            "measured": medians[1],
            "error": 100 * (statistics.median(one / other for one, other in zip(said, shown, strict=True)) - 1),
            "predictions": said,
            "runs": shown,
        }
    return found


def row(found: dict[str, Any]) -> str:
    """Return a line of the table."""
    cells = [found["bundle"], f"{found['prompt_tokens']:,}"]
    for phase in PHASES:
        one = found[phase]
        cells += [f"{one['predicted']:.1f}", f"{one['measured']:.1f}", f"{one['error']:+.0f} %"]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE")
    parser.add_argument("--prompt-tokens", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kv")
    args = parser.parse_args()
    print("| bundle | prompt | prefill predicted | measured | error | decode predicted | measured | error |")
    print("|---|---|---|---|---|---|---|---|")
    results = []
    for bundle in args.bundles:
        for prompt in args.prompt_tokens:
            results.append(compared(bundle, prompt, args.new_tokens, args.rounds, args.kv))
            print(row(results[-1]), flush=True)
    errors = [abs(found[phase]["error"]) for found in results for phase in PHASES]
    print(f"\nlargest error {max(errors):.0f} %, median {statistics.median(errors):.0f} %")
    print(json.dumps({"device": devices.describe().as_dict(), "results": results}))


if __name__ == "__main__":
    main()
