"""Synthetic reports, small and extreme, to test pages without running a model."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

from edgelm.benchmark import BenchResult, Energy, Spread
from edgelm.comparison.compare import Comparison
from edgelm.comparison.documents import to_documents
from edgelm.comparison.entries import entries_of
from edgelm.devices import describe
from edgelm.evaluation.result import (
    Divergence,
    Estimate,
    EvaluationReport,
    ExpertError,
    ExpertErrors,
    LayerError,
    ReferenceResult,
    Speed,
    TargetResult,
    TextResult,
)
from edgelm.measuring.matrix import Matrix, Skipped
from edgelm.parity.result import Check, Diagnosis, FloatLoss, LayerResult, ParityReport, PromptResult
from edgelm.parity.result import Speed as CheckSpeed

EVIL = "<script>alert('x')</script>\"&\u202e\x07\ud800"
"""A hostile name: HTML, right-to-left marks, a bell character, and invalid UTF-8."""
LONG = "a-bundle-with-a-name-that-has-no-space-in-it-and-goes-on-for-a-hundred-characters-and-a-few-more-of-them"
DEVICE = {"cpu": "AMD EPYC", "logical_cores": 2, "memory_total": 25_276_510_208, "instruction_sets": ["avx2", "fma"]}
FILES = {"model.onnx.data": {"size": 2_723_840, "sha256": "0123456789abcdef" * 4}}


def checks(layers: int, failed: set[str] = frozenset()) -> list[Check]:
    """Return one check of every form: without numbers, with numbers, not checked, and one for each layer."""
    found = [
        Check("integrity", "Files: hashes", True, "every file has the hash it was exported with"),
        Check("logits.kl_mean", "KL(quantised reference || device), mean, nats", True, "", 0.004, 0.006),
        Check("logits.top1", "Most likely token", True, "detail", 0.97, 0.95, "higher"),
        Check("greedy", "Greedy continuation", None, "the pack has no greedy continuations"),
        *(Check(f"layer[{i}]", f"Layer {i}: positions", True, "", 0.0, 0.0, layer=i) for i in range(layers)),
    ]
    names = {check.name for check in found}
    assert failed <= names, failed - names
    return [
        dataclasses.replace(check, passed=False, value=check.value and 0.5) if check.name in failed else check
        for check in found
    ]


def prompt(name: str, tokens: int, seed: int = 0) -> PromptResult:
    kl = [abs(math.sin(seed + i)) * 1e-3 for i in range(tokens)]
    return PromptResult(
        name, f"text of {name}", tokens, kl, [0.02 + x for x in kl], [True] * tokens, [1], [1], 1, "end"
    )


def layer(index: int, layers: int) -> LayerResult:
    return LayerResult(
        index, 1e-7 * 1.3**index, 0.05 + index / layers / 10, 1e-7, 0.5, 0, False, 1, 0.9, 80, 20, 0.8, 0
    )


def parity(
    *, layers: int = 4, prompts: int = 7, name: str = "olmoe-int4", failed: set[str] = frozenset(), first=None
) -> ParityReport:
    """Return a parity report; `failed` names the checks that fail."""
    every = checks(layers, failed)
    lengths = [52, 57, 47, 40, 91, 41, 205]
    diagnosis = Diagnosis(tuple(layer(i, layers) for i in range(layers)), 0.0, first, None, 120, 128)
    return ParityReport(
        bundle=f"/bundles/{name}",
        passed=not failed,
        kind="int4",
        checks=every,
        kl_mean=0.0657812,
        kl_p99=3.21e-5,
        kl_max=0.45,
        float_kl_mean=0.0839,
        quantization_kl_mean=0.018,
        float_loss=FloatLoss(True, 0.084, 0.0182, 0.0698, -0.0079, None),
        logit_error=0.01,
        top1=0.7226,
        top1_clear=0.99996,
        top1_float=0.7,
        perplexity_float=260.0,
        perplexity_quantized=266.4,
        perplexity=287.3,
        greedy_prefix=6,
        greedy_total=112,
        positions=sum(lengths),
        first_diverged_layer=first,
        cause=None if first is None else f"layer {first}: expert 5",
        diagnosis=diagnosis,
        prompts=[prompt(f"prompt {i}" if prompts > 7 else f"p{i}", lengths[i % 7], i) for i in range(prompts)],
        speed=CheckSpeed(0.084, 32_679.2, 3850.0),
        threads=2,
        runtime="onnxruntime-cpu",
        device=DEVICE,
        model={"name": "olmoe-tiny", "num_layers": layers, "vocab_size": 50_304, "tied": False},
        recipe="int4",
        source="olmoe-tiny",
        files=FILES,
        reference="from the parity pack",
        tools={"edgelm": "0.1.0"},
        ops="native",
        kv="float16",
        isa="avx2",
        engine="onnxruntime 1.31.1",
        resident_peak=94_240_768,
        created="2026-11-30T10:18:43+00:00",
        made_by="edgelm 0.2.0",
    )


def target(name: str, kl: float, bits: float, *, layers: int = 0, experts: int = 0, scale: float = 1e-2, kv=None):
    """Return a candidate; with `experts`, the first one of every layer has no token."""
    errors = None
    if experts:
        rows = [
            tuple(None if e == 0 else scale * (1 + (e * 7 + row) % 11) / 12 for e in range(experts))
            for row in range(layers)
        ]
        errors = ExpertErrors(tuple(rows), (ExpertError(0, 1, scale, 1234),) if scale else ())
    found = tuple(LayerError(i, scale * (i + 2), 0.9 if i >= 0 else None) for i in range(-1, layers)) or None
    return TargetResult(
        name=name,
        target=name,
        kind="recipe",
        recipe="int4",
        arithmetic="PyTorch reference, float32",
        kv=kv,
        stored_bytes=int(bits * 1e6),
        bits_per_weight=bits,
        loss=Estimate(3.2, 0.01),
        perplexity=25.7543,
        kl=Divergence(kl, kl / 30, kl / 2, kl * 6, 1 - 5 * kl),
        speed=Speed(61_160.4, 3654.0, 78_200_000, 64, 64, 2, 0.5),
        layers=found,
        experts=errors,
        files=FILES,
    )


def evaluation(targets, *, layers: int = 4, experts: int = 32) -> EvaluationReport:
    """Return an evaluation of these candidates."""
    tokens = tuple(tuple(0 if e == 0 else 100 + e for e in range(experts)) for _ in range(layers)) if experts else None
    return EvaluationReport(
        model="olmoe-tiny",
        text=TextResult("builtin, held out", "ab" * 32, 64, 256, 16_384),
        reference=ReferenceResult("olmoe-tiny", 7_900_000, 3_950_000, Estimate(3.2, 0.01), 25.58, tokens, FILES),
        targets=tuple(targets),
        device=DEVICE,
        versions={"edgelm": "0.1.0"},
        created="2026-11-29T01:04:40+00:00",
        seconds=12.3456,
        notes=(),
    )


def six(layers: int = 4, experts: int = 32, prefix: str = "") -> list[TargetResult]:
    """Return six candidates in three sizes, two of them at nearly the same point."""
    made = [("int4", 0.016, 5.04, 1e-2), ("bundle", 0.0161, 5.05, 1e-2), ("bundle with int8 cache", 0.0162, 5.05, 1e-2)]
    made += [("int8", 7e-4, 8.49, 3.7e-5), ("fp8", 2.7e-3, 9.4, 1e-3), ("none", 0.0, 16.0, 0.0)]
    return [
        target(prefix + name, kl, bits, layers=layers, experts=experts, scale=scale) for name, kl, bits, scale in made
    ]


def bench_document(**changes: object) -> dict[str, object]:
    """Return a document of `edgelm bench --json`, of the device and bundle of `parity()`."""
    spread = {"median": 5000.0, "low": 4000.0, "high": 6000.0, "runs": [5000.0]}
    return {
        "bundle": "olmoe-int4", "model": "olmoe-tiny", "recipe": "int4", "runtime": "onnxruntime-cpu", "threads": 2,
        "ops": "native", "kv": "float16", "batch": 1, "prompt_tokens": 64, "new_tokens": 16, "load_seconds": 0.05,
        "prefill_tokens_per_second": spread, "decode_tokens_per_second": spread, "resident_peak": 78_000_000,
        "files": {name: info["size"] for name, info in FILES.items()}, "device": DEVICE, "notes": [], **changes,
    }  # fmt: skip


def comparison(reports: dict[str, ParityReport], **changes: dict[str, object]) -> Comparison:
    """Return a comparison of reports by name, with changed fields of their documents."""
    found = []
    for name, report in reports.items():
        path = Path(f"{len(found)}.json")
        documents, _ = to_documents({**report.to_dict(), **changes.get(name, {})}, path)
        found += entries_of(documents, name, path)
    return Comparison(tuple(found), base=0)


def boards(count: int, name: str, layers: int = 4) -> Comparison:
    """Return a comparison of many devices, every third of which fails."""
    failed = [{"logits.kl_mean", "layer[1]"} if i % 3 == 2 else set() for i in range(count)]
    reports = {
        f"{name} {i}": parity(layers=layers, failed=bad, first=1 if bad else None) for i, bad in enumerate(failed)
    }
    return comparison(reports, **{f"{name} {i}": {"threads": i + 1, "isa": "neon-i8mm"} for i in range(count)})


def benches(bundles: Sequence[str], prompts: Sequence[int], energy: bool = False) -> Matrix:
    """Return benchmarks of bundles with these lengths of the prompt; the last combination was left out."""
    results = []
    for index, (name, length) in enumerate(itertools.product(bundles, prompts)):
        speed = Spread.of([4000.0 / (index + 1), 5000.0 / (index + 1)])
        results.append(
            BenchResult(
                bundle=f"/bundles/{name}", model="olmoe-tiny", recipe="int4", runtime="onnxruntime-cpu",
                threads=2 + index % 2, ops="native", kv="float16", batch=1, prompt_tokens=length, new_tokens=128,
                load_seconds=0.5, prefill_tokens_per_second=speed, time_to_first_token=speed,
                decode_tokens_per_second=speed, resident_before_load=None, resident_after_load=None,
                resident_after_run=1_300_000_000, resident_peak=None, files={"model.onnx.data": 1_179_463_680},
                bytes_per_token=954_548_288, decode_bandwidth=None, machine_bandwidth=None, load_average=0.5,
                device=describe(), energy=Energy(speed, speed, "RAPL package-0") if energy else None,
                energy_problem=None if energy else "this machine has no energy counters",
            )
        )  # fmt: skip
    left_out = Skipped(results[-1].bundle, None, 2, None, 1, 4096, "4096 prompt tokens do not fit")
    return Matrix(tuple(results), (left_out,), True, False, ("all models stay loaded, and their runs take turns",))


PAGES = {
    "benches": lambda: benches(["olmoe-int4", "olmoe-int8"], [128, 512, 2048], energy=True),
    "benches-many": lambda: benches([f"{LONG}-{i}" for i in range(8)], [1, 2, 500, 512, 513, 16384]),
    "benches-one": lambda: benches(["a"], [512]),
    "compared": lambda: boards(3, "pi"),
    "compared-many": lambda: boards(14, LONG, 32),
    "compared-evil": lambda: comparison(
        {name: dataclasses.replace(parity(name="x"), source=EVIL[:-1]) for name in (EVIL, LONG)}
    ),
    "passed": lambda: parity(),
    "failed": lambda: parity(failed={"logits.kl_mean", "layer[1]"}, first=1),
    "failed-last": lambda: parity(layers=32, prompts=40, name=LONG, failed={"layer[31]"}, first=31),
    "evil": lambda: dataclasses.replace(
        parity(name=EVIL), notes=[EVIL], source=EVIL, prompts=[prompt(EVIL, 5), prompt(LONG, 5)], files={EVIL: {}}
    ),
    "evaluated": lambda: evaluation(six()),
    "evaluated-large": lambda: evaluation(six(16, 64, LONG), layers=16, experts=64),
    "evaluated-many": lambda: evaluation(
        [t for i in range(4) for t in six(32, 0, f"candidate {i} ")], layers=32, experts=0
    ),
}
"""The sample reports, by name."""


def render(report: ParityReport | EvaluationReport | Comparison | Matrix) -> str:
    """Return the page of a report of any kind."""
    if isinstance(report, Matrix):
        from edgelm.measuring.report import render as measured

        return measured(report)
    if isinstance(report, Comparison):
        from edgelm.comparison.report import render as compared

        return compared(report)
    from edgelm.evaluation import report as evaluated
    from edgelm.parity import report as checked

    return checked.render(report) if isinstance(report, ParityReport) else evaluated.render(report)
