"""The steps of `check.py` for a first and a second call, the most informative ones per second first."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from check_run import Command, Step

ROOT = Path(__file__).resolve().parents[2]
PYTHON = sys.executable
EDGELM = (PYTHON, "-m", "edgelm")
PYTEST = (PYTHON, "-m", "pytest", "-q", "-W", "default", "--tb=short", "-p", "no:cacheprovider")
BENCH = ROOT / "tests" / "bench"
TINY = ROOT / "examples" / "checkpoints"
MODELS = ("fox-1-1.6b", "olmoe-1b-7b")
KINDS = ("bf16", "int4", "fp8", "int8")
KERNEL_TESTS = ("linear", "attention", "sparse_moe_launches", "moe", "moe_down", "device_sampling")
SM = "90"
# Recipes for parity of the tiny models: float, and every kind of weights, activations and cache.
RECIPES = {
    "none": "none",
    "int8": "int8",
    "int4": "int4",
    "fp8": "fp8",
    "w8a8": 'name = "w8a8"\ndefault = "fp8-row"\nactivations = "fp8-token"\nkv = "int8"\n\n[[rule]]\n'
    'match = "*.mlp.gate.weight"\nscheme = "float"\n\n[[rule]]\nmatch = "model.embed_tokens.weight"\n'
    'scheme = "float"\n',
}
_AT_ONCE = 5


def bench(script: str, *words: str) -> tuple[str, ...]:
    """Return the command of a program in tests/bench."""
    return (PYTHON, str(BENCH / script), *words)


def first(work: Path) -> list[Step]:
    """Return the steps of a first call: correctness, speed, parity with PyTorch; transformers last, alone."""
    limits = ("--limits", str(work / "limits.json"))
    speed = [
        [Command(bench("gpu_models.py", "--model", model, "--kind", kind, "--repeat", "3", *limits),
                 dry=("--dry-run",), once=kind != "bf16")]
        for kind in KINDS for model in MODELS
    ]  # fmt: skip
    tests = [[Command((*PYTEST, _cuda_test(name)), dry=("--maxfail=1",))] for name in KERNEL_TESTS]
    return [
        Step("device", 30, [[Command(("nvidia-smi",))], [Command((*EDGELM, "doctor"))]]),
        Step("driver", 60, [[Command((*PYTEST, "-rs", *_driver_tests()), dry=("--maxfail=1",))]]),
        Step("kernels", 120, tests, at_once=_AT_ONCE),
        Step("speed", 180, speed, each=60),
        Step("kernel speed", 60, [[Command(bench("gpu_kernels.py", "--quick", "--repeat", "10"))]]),
        Step("parity", 150, [_full_parity(work), *_tiny_parity(work)], at_once=_AT_ONCE + 1),
        Step("transformers", 100, [
            [Command(bench("gpu_peer.py", "--model", model, "--repeat", "3"), dry=("--tiny",), once=model == MODELS[1])]
            for model in MODELS
        ], each=60),
    ]  # fmt: skip


def second(work: Path) -> list[Step]:
    """Return the steps of a second call on the same machine: PDL, memory accesses and races, decode kernels'
    counters."""
    del work
    small = [
        bench("gpu_steps.py", "tiny", "--model", model, "--kind", kind)
        for model, kind in (("olmoe-1b-7b", "bf16"), ("fox-1-1.6b", "int4"), ("olmoe-1b-7b", "fp8"))
    ]
    wide = [
        bench("gpu_steps.py", "profile", "--model", model, "--kind", kind)
        for model, kind in (("fox-1-1.6b", "bf16"), ("olmoe-1b-7b", "bf16"), ("olmoe-1b-7b", "int4"))
    ]
    early = [
        bench("gpu_steps.py", "pdl", "--model", model, "--kind", kind)
        for model, kind in (("fox-1-1.6b", "bf16"), ("olmoe-1b-7b", "bf16"), ("olmoe-1b-7b", "int4"))
    ]
    profiler = (
        "ncu", "--clock-control", "none", "--profile-from-start", "off", "--section", "SpeedOfLight", "--section",
        "Occupancy", "--section", "LaunchStats", "--section", "WarpStateStats",
    )  # fmt: skip
    dry = ("--dry-run",)
    sanitizer = ("compute-sanitizer", "--error-exitcode", "9", "--tool")
    checks = [
        [Command(words, (*sanitizer, check), dry=dry, once=words is not small[0] or check != "memcheck")]
        for check in ("memcheck", "racecheck")
        for words in small
    ]
    return [
        Step("pdl", 70, [[Command(words, dry=dry, once=words is not early[1])] for words in early], each=30),
        Step("sanitizer", 90, checks, at_once=3),
        Step("ncu", 80, [[Command(words, profiler, dry=dry, once=words is not wide[0])] for words in wide], each=40),
    ]


def _cuda_test(name: str) -> str:
    return str(ROOT / "tests" / "cuda" / f"test_{name}.py")


def _driver_tests() -> list[str]:
    return [str(ROOT / "tests" / "gpu" / f"test_{name}.py") for name in ("driver", "onnxruntime_cuda")]


def _threads() -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // _AT_ONCE))}


def _export(checkpoint: str, out: str, recipe: str) -> tuple[str, ...]:
    target = ("--target", "tensorrt", "--sm", SM, "--recipe", recipe, "--no-engines")
    return (*EDGELM, "export", checkpoint, "-o", out, *target)


def _tiny_parity(work: Path) -> list[list[Command]]:
    chains = []
    for recipe, text in RECIPES.items():
        given = recipe
        if "\n" in text:
            given = str(work / f"{recipe}.toml")
            Path(given).write_text(text, encoding="utf-8")
        for model in ("olmoe-tiny", "fox-tiny"):
            out = str(work / f"{model}-{recipe}")
            again = (recipe, model) != ("none", "fox-tiny")
            chains.append([
                Command(_export(str(TINY / model), out, given), environment=_threads(), once=again),
                Command((*EDGELM, "parity", out, "--runtime", "cuda-kernels"), environment=_threads(), once=again),
            ])  # fmt: skip
    return chains


def _full_parity(work: Path) -> list[Command]:
    """Return the parity check of full-size Fox-1. It takes longest, so it starts first; a dry run only checks
    arguments."""
    full, bundle = str(work / "fox"), str(work / "fox-bf16")
    on = ("--runtime", "cuda-kernels")
    return [
        Command((*EDGELM, "synth", "fox-1-1.6b", "-o", full), dry=("--help",)),
        Command(_export(full, bundle, "none"), dry=("--help",)),
        Command((*EDGELM, "parity", bundle, *on), dry=("--help",), once=True),
        Command((*EDGELM, "bench", bundle, *on), dry=("--help",)),
    ]
