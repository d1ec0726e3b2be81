"""Everything that only a GPU can show, in one call: build, check, time; under eight minutes.

    python tests/gpu/check.py [--out FOLDER] [--minutes 8] [--only STEP ...]

For a machine with an NVIDIA GPU, its driver, a C++ compiler, CMake, and the packages torch, numpy, onnx, pytest,
tokenizers, sentencepiece, jinja2, click, rich and nvidia-cuda-nvrtc; transformers is timed beside where it is there.
Nothing has to be installed: EdgeLM is taken from this checkout. Steps run one after the other, each in a process of its
own with a limit, and one that fails does not end the others. The last lines are a table of steps; `--out` gets a log
of each. What it printed belongs into docs/gpu.md, with the date.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TREE = ROOT / "build" / "pyview"
PYTHON = sys.executable
EDGELM = (PYTHON, "-m", "edgelm")
BENCH = ROOT / "tests" / "bench"
TINY = ROOT / "examples" / "checkpoints"
BUILD = ROOT / "build" / "gpu-csrc"
QUANTISER = BUILD / "_edgelm_quant.so"
# The recipes of the tiny models' parity: float, and every kind of weights, activations and cache.
RECIPES = {
    "none": "none",
    "int8": "int8",
    "int4": "int4",
    "fp8": "fp8",
    "w8a8": 'name = "w8a8"\ndefault = "fp8-row"\nactivations = "fp8-token"\n\n[[rule]]\nmatch = "*.mlp.gate.weight"\n'
    'scheme = "float"\n\n[[rule]]\nmatch = "model.embed_tokens.weight"\nscheme = "float"\n',
}


@dataclass(frozen=True)
class Step:
    """Commands that belong together; `seconds` is their limit."""

    name: str
    seconds: int
    commands: Sequence[Sequence[str]]


def steps(work: Path) -> list[Step]:
    """In the order in which they are run: what tells most for its time comes first."""
    exports, parities = [], []
    for recipe, text in RECIPES.items():
        given = recipe
        if "\n" in text:
            (work / f"{recipe}.toml").write_text(text, encoding="utf-8")
            given = str(work / f"{recipe}.toml")
        for model in ("olmoe-tiny", "fox-tiny"):
            out = str(work / f"{model}-{recipe}")
            export = ("export", str(TINY / model), "-o", out, "--target", "tensorrt", "--recipe", given)
            exports.append((*EDGELM, *export, "--no-engines"))
            parities.append((*EDGELM, "parity", out, "--runtime", "cuda-kernels"))
    kernels = [
        str(ROOT / "tests" / "cuda" / f"test_{name}.py")
        for name in ("linear", "moe", "moe_down", "mixture", "attention")
    ]
    models = (PYTHON, str(BENCH / "gpu_models.py"))
    full = str(work / "fox")
    return [
        Step("device", 30, [("nvidia-smi",), (*EDGELM, "doctor")]),
        Step("quantiser", 90, [
            ("cmake", "-S", str(ROOT / "runtimes" / "csrc"), "-B", str(BUILD)),
            ("cmake", "--build", str(BUILD), "--parallel", "--target", "_edgelm_quant"),
        ]),
        Step("driver", 60, [(PYTHON, "-m", "pytest", "-q", "-rs", str(ROOT / "tests" / "gpu"))]),
        Step("kernels", 200, [(PYTHON, "-m", "pytest", "-q", "-x", *kernels)]),
        Step("tiny parity", 150, [*exports, *parities]),
        Step("fox speed", 100, [(*models, "--model", "fox-1-1.6b", "--repeat", "3", "--peer")]),
        Step("olmoe speed", 140, [(*models, "--model", "olmoe-1b-7b", "--repeat", "3", "--peer")]),
        Step("kernel speed", 90, [(PYTHON, str(BENCH / "gpu_kernels.py"), "--quick", "--repeat", "10")]),
        Step("full parity", 240, [
            (*EDGELM, "synth", "fox-1-1.6b", "-o", full),
            (*EDGELM, "export", full, "-o", f"{full}-bf16", "--target", "tensorrt", "--recipe", "none", "--no-engines"),
            (*EDGELM, "parity", f"{full}-bf16", "--runtime", "cuda-kernels"),
            (*EDGELM, "bench", f"{full}-bf16", "--runtime", "cuda-kernels"),
        ]),
    ]  # fmt: skip


def link_tree() -> None:
    """The import tree of a checkout, of links: `export`, `quant` and `runtimes` are packages inside `edgelm`."""
    package = TREE / "edgelm"
    package.mkdir(parents=True, exist_ok=True)
    for path in [*(ROOT / "edgelm").iterdir(), *(ROOT / name for name in ("export", "quant", "runtimes"))]:
        link = package / path.name
        if not link.exists():
            link.unlink(missing_ok=True)
            link.symlink_to(path)


def run(step: Step, out: Path, left: float) -> tuple[str, float]:
    """Run a step's commands until one fails or time is up; what became of it, and its seconds."""
    environment = dict(os.environ, PYTHONPATH=str(TREE), PYTHONUNBUFFERED="1", EDGELM_TEST_GPU="1")
    if QUANTISER.exists():
        environment["EDGELM_QUANT_LIBRARY"] = str(QUANTISER)
    start = time.monotonic()
    limit = min(step.seconds, left)
    log = out / f"{step.name.replace(' ', '-')}.log"
    result = "passed"
    with log.open("w", encoding="utf-8") as stream:
        for command in step.commands:
            print(f"$ {' '.join(command)}", file=stream, flush=True)
            remaining = limit - (time.monotonic() - start)
            try:
                if remaining <= 0:
                    raise subprocess.TimeoutExpired(command, limit)
                code = subprocess.run(
                    command, stdout=stream, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, timeout=remaining,
                    check=False,
                ).returncode  # fmt: skip
            except subprocess.TimeoutExpired:
                result = f"stopped after {limit:.0f} s at {' '.join(command)[:80]}"
                break
            except OSError as error:
                code = 127
                print(error, file=stream)
            if code and result == "passed":
                result = f"FAILED ({code}): {' '.join(command)[-90:]}"
    return result, time.monotonic() - start


def main() -> int:
    """Run the steps; exit code 1 where one did not pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--only", action="append", help="names of steps; default: all")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    link_tree()
    end = time.monotonic() + 60 * given.minutes
    results = []
    with tempfile.TemporaryDirectory() as folder:
        found = steps(Path(folder))
        unknown = set(given.only or ()) - {step.name for step in found}
        if unknown:
            parser.error(f"there is no step {', '.join(unknown)}; there are: {', '.join(step.name for step in found)}")
        for step in found:
            if given.only and step.name not in given.only:
                continue
            result, seconds = run(step, given.out, end - time.monotonic())
            log = (given.out / f"{step.name.replace(' ', '-')}.log").read_text(encoding="utf-8", errors="replace")
            print(f"=== {step.name}: {result}, {seconds:.0f} s\n{log[-2500:]}", flush=True)
            results.append((step.name, result, seconds))
    print("\n".join(f"{name:14} {seconds:6.1f} s  {result}" for name, result, seconds in results))
    return int(any(result != "passed" for _, result, _ in results))


if __name__ == "__main__":
    sys.exit(main())
