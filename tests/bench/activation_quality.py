"""How much do quantised activations and KV caches lose on the tiny trained models? For docs/performance/quality.md.

    python tests/bench/activation_quality.py [MODEL ...] [--windows N] [--only TEXT]

Measures the mean KL(float || quantised) in nats per token of the PyTorch reference with quantised weights, activations
and caches, on text held out from training and calibration, in windows of 256 tokens. The error is the standard error of
the mean over windows. Weights are rounded to nearest. Deterministic for one interpreter.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from fnmatch import filter as matching
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgelm.checkpoint import Checkpoint
from edgelm.corpus import BUILTIN, read_corpus, windows
from edgelm.quant import PRESETS, Recipe, Rule, WeightSource, parse_scheme
from edgelm.quant.activations import STATIC, KvScales
from edgelm.quant.calibration.ranges import RangeRecorder, record_ranges
from edgelm.quant.reference import activation_kinds, quantized_activations, reference_module
from edgelm.quant.smoothing import smooth
from edgelm.tokenization.tokenizer import Tokenizer

CHECKPOINTS = Path(__file__).parents[2] / "examples" / "checkpoints"
MODELS = ("olmoe-tiny", "fox-tiny")
LENGTH = 256
TOGETHER = 8  # windows in one forward pass
CALIBRATION = 64


@dataclass(frozen=True)
class Line:
    """Result of a variant: KL and its standard error in nats per token, and top-1 agreement."""

    name: str
    kl: float
    error: float
    top1: float


class Model:
    """A tiny checkpoint with windows of text for evaluation and for calibration."""

    def __init__(self, name: str, count: int) -> None:
        self.checkpoint = Checkpoint.open(CHECKPOINTS / name)
        tokenizer = Tokenizer.from_folder(self.checkpoint.path)
        self.held_out = np.stack(windows(tokenizer, read_corpus(BUILTIN, held_out=True).documents, count, LENGTH))
        self.calibration = np.stack(windows(tokenizer, read_corpus(BUILTIN).documents[::4], CALIBRATION, LENGTH))
        self.reference = list(self._log_probabilities(reference_module(WeightSource(self.checkpoint))))

    @cached_property
    def ranges(self) -> RangeRecorder:
        """Return the ranges of the float model's activations."""
        return record_ranges(self.checkpoint.decoder, self.checkpoint, self.calibration)

    @torch.no_grad()
    def _log_probabilities(self, module: Any) -> Iterator[torch.Tensor]:
        for start in range(0, len(self.held_out), TOGETHER):
            ids = torch.from_numpy(self.held_out[start : start + TOGETHER])
            yield torch.log_softmax(module(ids), dim=-1)

    def source(self, recipe: Recipe, checkpoint: Checkpoint | None = None) -> WeightSource:
        """Return the weights under a recipe. Rules for matrices that this model lacks are omitted."""
        rules = tuple(
            rule for rule in recipe.rules if not rule.pattern or matching(self.checkpoint.tensors, rule.pattern)
        )
        return WeightSource(checkpoint or self.checkpoint, replace(recipe, rules=rules), threads=1)

    def measure(self, name: str, module: Any) -> Line:
        """Run every window and compare with the float model."""
        kl: list[float] = []
        kept: list[float] = []
        for expected, found in zip(self.reference, self._log_probabilities(module), strict=True):
            kl += (expected.exp() * (expected - found)).sum(-1, dtype=torch.float64).mean(-1).tolist()
            kept += (expected.argmax(-1) == found.argmax(-1)).double().mean(-1).tolist()
        return Line(name, float(np.mean(kl)), float(np.std(kl) / np.sqrt(len(kl))), float(np.mean(kept)))


def recipe(default: str, activations: str = "float", kv: str = "auto", tables: str = "int8-g128-sym") -> Recipe:
    """Return a recipe in the form of the presets: router float, embedding and head as given."""
    of_tables = tuple(
        Rule(name, None if tables == "float" else parse_scheme(tables))
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    )
    scheme = None if default == "float" else parse_scheme(default)
    return Recipe(default, scheme, (PRESETS["int4"].rules[0], *of_tables), activations=activations, kv=kv)


Variant = tuple[str, Callable[[Model], Any]]


def rounded(recipe: Recipe, method: str = "absmax", **options: Any) -> Callable[[Model], Any]:
    """Return a function from a model to its module with that recipe; static scales are found by `method`."""

    def module(model: Model) -> Any:
        source = model.source(recipe)
        kinds = activation_kinds(source, auto=options.get("auto", "float"))
        static = any(kind in STATIC for kind in kinds.values())
        scales = model.ranges.scales(kinds, method) if static else None
        return reference_module(source, scales=scales, **options)

    return module


def static_cache(recipe: Recipe, kind: str, channels: bool) -> Callable[[Model], Any]:
    """Like `rounded`, with calibrated scales of the KV cache."""

    def module(model: Model) -> Any:
        scales: dict[int, KvScales] = model.ranges.kv_scales(kind, channels=channels)
        return reference_module(model.source(replace(recipe, kv=kind)), kv_scales=scales)

    return module


def variants() -> Iterator[Variant]:
    """Yield the lines of the table."""
    for weights in ("int8-g32-sym", "int8-row-sym"):
        yield f"{weights}, activations float", rounded(recipe(weights))
        yield f"{weights}, int8 in blocks of 32", rounded(recipe(weights, "auto"), auto="int8-b32")
        yield f"{weights}, int8-token", rounded(recipe(weights, "int8-token"))
        for method in ("absmax", "mse"):
            yield f"{weights}, int8-static by {method}", rounded(recipe(weights, "int8-static"), method)
    for tables in ("float", "int8-g128-sym"):
        yield f"fp8-row, embedding + head {tables}, activations float", rounded(recipe("fp8-row", tables=tables))
    yield "fp8-row, fp8-token", rounded(recipe("fp8-row", "fp8-token", tables="float"))
    for method in ("absmax", "mse"):
        yield f"fp8-row, fp8-static by {method}", rounded(recipe("fp8-row", "fp8-static", tables="float"), method)
    yield "fp8-row, int8-token", rounded(recipe("fp8-row", "int8-token", tables="float"))
    yield "fp8e5m2-row, activations float", rounded(recipe("fp8e5m2-row", tables="float"))
    yield (
        "fp8-row, activations fp8e5m2 per token",
        rounded(recipe("fp8-row", "auto", tables="float"), auto="fp8e5m2-token"),
    )
    yield "float, int8-token everywhere", rounded_float("int8-token")
    yield "float, fp8-token everywhere", rounded_float("fp8-token")
    for kind, method in (("int8-token", "absmax"), ("int8-static", "mse")):
        for powers in (False, True):
            what = ", powers of two" if powers else ""
            yield f"int8-row-sym, {kind}, smoothed{what}", smoothed(recipe("int8-row-sym", kind), method, powers=powers)
    yield "fp8-row, fp8-static, smoothed", smoothed(recipe("fp8-row", "fp8-static", tables="float"), "absmax")
    yield "int4-g32-sym, scaled for weights", smoothed(recipe("int4-g32-sym"), target="weights")
    yield (
        "int4-g32-sym, scaled for weights, powers of two",
        smoothed(recipe("int4-g32-sym"), target="weights", powers=True),
    )
    for weights in ("float", "int4-g32-sym"):
        tables = "float" if weights == "float" else "int8-g128-sym"
        if weights != "float":
            yield f"{weights}, cache float", rounded(recipe(weights))
        for kind in ("float16", "int8", "fp8"):
            yield f"{weights}, cache {kind}, head and token", rounded(recipe(weights, kv=kind, tables=tables))
        for kind in ("int8", "fp8"):
            for channels in (False, True):
                what = "head (keys: and channel)" if channels else "head"
                yield (
                    f"{weights}, cache {kind}, static, {what}",
                    static_cache(recipe(weights, tables=tables), kind, channels),
                )


def smoothed(
    recipe: Recipe, method: str = "absmax", *, target: str = "activations", powers: bool = False
) -> Callable[[Model], Any]:
    """Return a function from a model to the module of its smoothed checkpoint."""

    def module(model: Model) -> Any:
        own = model.source(recipe).recipe
        view = smooth(model.checkpoint, model.calibration, own, target, powers_of_two=powers, threads=1)
        source = model.source(recipe, view)
        kinds = activation_kinds(source)
        if not any(kind in STATIC for kind in kinds.values()):
            return reference_module(source)
        ranges = record_ranges(view.decoder, view, model.calibration)
        return reference_module(source, scales=ranges.scales(kinds, method))

    return module


def rounded_float(kind: str) -> Callable[[Model], Any]:
    """Return a function from a model to its module with float weights and quantised inputs of the layers' matrices."""

    def module(model: Model) -> Any:
        hooks = quantized_activations(model.source(recipe("int8-row-sym", kind, tables="float")))
        return reference_module(WeightSource(model.checkpoint), hooks=hooks)

    return module


def main() -> None:
    """Measure and print a table for each model, and one JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, help=f"of {', '.join(MODELS)}")
    parser.add_argument("--windows", type=int, default=64, help=f"windows of {LENGTH} tokens (default 64)")
    parser.add_argument("--only", default="", help="lines whose name has this in it")
    options = parser.parse_args()
    records: dict[str, list[dict[str, object]]] = {}
    for name in options.models:
        start = time.monotonic()
        model = Model(name, options.windows)
        print(f"\n{name}, {model.held_out.size} tokens held out\n")
        print("| | KL, nats per token | first choice kept |\n|---|---|---|")
        records[name] = []
        for title, make in variants():
            if options.only not in title:
                continue
            line = model.measure(title, make(model))
            records[name].append(asdict(line))
            print(f"| {line.name} | {line.kl:.2e} +- {line.error:.0e} | {line.top1:.2%} |", flush=True)
        print(f"\nin {time.monotonic() - start:.0f} s")
    print(json.dumps(records))


if __name__ == "__main__":
    main()
