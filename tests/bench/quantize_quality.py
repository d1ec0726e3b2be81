"""How much does each scheme lose on the tiny trained models? Prints the table of docs/performance/schemes.md.

    python tests/bench/quantize_quality.py [MODEL ...] [--tokens N]

Measures the mean KL(float || quantised) in nats per token of the PyTorch reference in float32 with edgelm.evaluation.
Only weights are quantised, so this is the loss of the weights. The text is held out from training (Python's standard
library), in windows of 256 tokens; the error is the standard error of the mean over windows. Deterministic for one
interpreter. MB are the weights that a token reads in the full-size model of the family: experts are weighted by how
often the tiny model's router selects them, and the embedding is not counted.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgelm.checkpoint import Checkpoint
from edgelm.corpus import standard_library, windows
from edgelm.evaluation import distances
from edgelm.evaluation.experts import ExpertProbe
from edgelm.evaluation.reference import WeightModel
from edgelm.quant import PRESETS, AnyScheme, Recipe, Rule, Scheme, WeightSource, parse_scheme, primitives, quantize
from edgelm.tokenization.tokenizer import Tokenizer

CHECKPOINTS = Path(__file__).parents[2] / "examples" / "checkpoints"
MODELS = ("olmoe-tiny", "fox-tiny")
LENGTH = 256
_MLP = ("gate_proj", "up_proj", "down_proj")
COMMON = PRESETS["int4"].rules

# For the full-size model, by kind of matrix: millions of weights read per token, and columns.
_SQUARE = 2048 * 2048 / 1e6
FULL_SIZE: Mapping[str, Mapping[str, tuple[float, int]]] = {
    "olmoe-tiny": {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (16 * _SQUARE, 2048)),
        **{kind: (16 * 8 * _SQUARE / 2, columns) for kind, columns in zip(_MLP, (2048, 2048, 1024), strict=True)},
        "gate": (16 * 64 * 2048 / 1e6, 2048),
        "lm_head": (50304 * 2048 / 1e6, 2048),
    },
    "fox-tiny": {
        **dict.fromkeys(("q_proj", "o_proj"), (32 * _SQUARE, 2048)),
        **dict.fromkeys(("k_proj", "v_proj"), (32 * _SQUARE / 4, 2048)),
        **{kind: (32 * _SQUARE * 2, columns) for kind, columns in zip(_MLP, (2048, 2048, 4096), strict=True)},
        "embed_tokens": (256000 * 2048 / 1e6, 2048),
    },
}

Head = Callable[[Tensor], Tensor]
"""Function from final states [n, D] to logits [n, V]."""


@dataclass(frozen=True)
class Variant:
    """A line of the table: a recipe, and optionally another way to compute the head with its bits per weight."""

    name: str
    recipe: Recipe
    head: Head | None = None
    head_bits: float = 0.0


@dataclass(frozen=True)
class Line:
    """Result of a variant: MB per token, KL and standard error in nats per token, top-1 agreement, perplexity."""

    name: str
    megabytes: float
    kl: float
    error: float
    top1: float
    perplexity: float


class Model:
    """A tiny checkpoint with windows of held-out text."""

    def __init__(self, name: str, tokens: int) -> None:
        self.checkpoint = Checkpoint.open(CHECKPOINTS / name)
        self.config = self.checkpoint.decoder
        self.head_name = self.config.head.name
        self.full_size = FULL_SIZE[name]
        tokenizer = Tokenizer.from_folder(self.checkpoint.path)
        training, held_out = standard_library()
        count = tokens // LENGTH
        self.windows = windows(tokenizer, held_out, count, LENGTH + 1)
        self.experts: int = getattr(self.config, "num_experts", 0)
        # How often each expert is selected, measured on other text than the evaluation text.
        self.loads = self._loads(windows(tokenizer, training[::40], count, LENGTH + 1)) if self.experts else None
        self.reference = WeightModel(self.checkpoint.decoder, self.checkpoint, self.windows)

    def _loads(self, found: Sequence[NDArray[np.int64]]) -> NDArray[np.float64]:
        probe = ExpertProbe(self.config, self.checkpoint, ())
        WeightModel(self.checkpoint.decoder, self.checkpoint, found, probe=probe)
        return probe.tokens / probe.tokens.sum(axis=1, keepdims=True)

    def measure(self, variant: Variant) -> Line:
        """Quantise, run every window, and compare with the float model."""
        # Rules for matrices that this model lacks are omitted.
        rules = [
            rule
            for rule in variant.recipe.rules
            if not rule.pattern or fnmatch.filter(self.checkpoint.tensors, rule.pattern)
        ]
        source = WeightSource(self.checkpoint, replace(variant.recipe, rules=tuple(rules)), threads=1)
        target = WeightModel(self.checkpoint.decoder, source.dequantized(), self.windows)
        if variant.head is None:
            found = self.reference.compare(target)
        else:
            found = self.reference.compare_logits(_logits(variant.head, target.final))
        shape = (len(self.windows), LENGTH)
        kl = distances.divergence(found.kl.reshape(shape), found.reference.best == found.target.best)
        return Line(
            variant.name,
            self._megabytes(source, variant),
            kl.mean,
            kl.standard_error,
            kl.top1,
            float(np.exp(found.target.loss.mean() - found.reference.loss.mean())),
        )

    def _megabytes(self, source: WeightSource, variant: Variant) -> float:
        bits: dict[str, float] = {}
        weights: dict[str, float] = {}
        for name, shape in source.shapes.items():
            kind = name.split(".")[-2]
            if kind not in self.full_size or len(shape) < 2:
                continue
            # The group of the recipe, not the one that fits the tiny model's rows.
            scheme = source.recipe.match(name)
            each = (
                (32.0 if kind == "gate" else 16.0)
                if scheme is None
                else scheme.bits_per_weight(self.full_size[kind][1])
            )
            if name == self.head_name and variant.head is not None:
                each = variant.head_bits
            share = 1.0
            if self.loads is not None and ".experts." in name:
                _, _, layer, _, _, expert, *_ = name.split(".")
                share = self.loads[int(layer), int(expert)]
            bits[kind] = bits.get(kind, 0) + each * share
            weights[kind] = weights.get(kind, 0) + share
        assert bits.keys() == self.full_size.keys()
        return sum(millions * bits[kind] / weights[kind] / 8 for kind, (millions, _) in self.full_size.items())

    def least_routed(self, share: float) -> list[str]:
        """Return patterns of the least used experts, a fraction `share` of each layer's."""
        assert self.loads is not None
        count = int(self.experts * share)
        return [
            f"model.layers.{layer}.mlp.experts.{expert}.*"
            for layer, loads in enumerate(self.loads)
            for expert in np.argsort(loads)[:count]
        ]

    def split_head(self, group: int, exact: int) -> tuple[Head, float]:
        """Return a head in split nibbles that rescores the `exact` largest logits, and its bits per weight."""
        tensor = quantize(self.checkpoint.read_float32(self.head_name), Scheme(8, group))
        rows, columns = tensor.shape
        codes = primitives.unpack(tensor.codes, 8).reshape(rows, tensor.scales.shape[1], -1)
        scales = tensor.scales.astype(np.float32)[:, :, None]
        upper = ((codes >> 4).astype(np.float32) * 16 + 8 - 128) * scales
        coarse = torch.from_numpy(upper.reshape(rows, columns))
        fine = torch.from_numpy(primitives.dequantize(tensor))

        def head(final: Tensor) -> Tensor:
            logits = final @ coarse.T
            if exact:
                chosen = logits.topk(exact, dim=-1).indices
                logits.scatter_(-1, chosen, (final @ fine.T).gather(-1, chosen))
            return logits

        return head, 4 + 16 / group + 4 * exact / rows


def _logits(head: Head, final: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    for start in range(0, len(final), LENGTH):
        yield head(torch.from_numpy(final[start : start + LENGTH])).numpy()


def recipe(default: str, *rules: tuple[str, str]) -> Recipe:
    """Return the presets' recipe with another default, and other rules before theirs."""
    own = tuple(Rule(pattern, _scheme(scheme)) for pattern, scheme in rules)
    return Recipe(default, _scheme(default), (*own, *COMMON))


def _scheme(name: str) -> AnyScheme | None:
    return None if name == "float" else parse_scheme(name)


def tables(scheme: str) -> tuple[tuple[str, str], ...]:
    """Return rules for the embedding and the head."""
    return ("model.embed_tokens.weight", scheme), ("lm_head.weight", scheme)


def variants(model: Model) -> Iterator[Variant]:
    """Yield the lines of the table for a model."""
    yield Variant("int8: int8-g32, embedding + head int8-g128", PRESETS["int8"])
    yield Variant("int8-row, embedding + head int8-g128", recipe("int8-row-sym"))
    yield Variant("fp8: fp8-row, embedding + head float", PRESETS["fp8"])
    yield Variant("fp8-row, embedding + head int8-g128", recipe("fp8-row"))
    yield Variant("fp8-row, embedding + head fp8-row", recipe("fp8-row", *tables("fp8-row")))
    yield Variant("fp8-b128, embedding + head float", recipe("fp8-b128", *tables("float")))
    yield Variant("fp8-b32, embedding + head float", recipe("fp8-b32", *tables("float")))
    yield Variant("int4: int4-g32, embedding + head int8-g128", PRESETS["int4"])
    yield Variant("int4-g64, embedding + head int8-g128", recipe("int4-g64-sym"))
    yield Variant("int4-g128, embedding + head int8-g128", recipe("int4-g128-sym"))
    yield Variant("int4-g32, embedding + head int4-g32", recipe("int4-g32-sym", *tables("int4-g32-sym")))
    yield Variant("int4-g32, embedding + head float", recipe("int4-g32-sym", *tables("float")))
    for group, exact in ((128, 0), (128, 16), (128, 64), (128, 256), (32, 0), (32, 64)):
        head, bits = model.split_head(group, exact)
        name = f"int4-g32, head int8-g{group} by its high nibbles, {exact} largest exact"
        yield Variant(name, recipe("int4-g32-sym"), head, bits)
    head, bits = model.split_head(128, 64)
    for group in (64, 128):
        name = f"int4-g{group}, head int8-g128 by its high nibbles, 64 largest exact"
        yield Variant(name, recipe(f"int4-g{group}-sym"), head, bits)
    if not model.experts:
        yield Variant("int3-g32, embedding + head int8-g128", recipe("int3-g32-sym"))
        for part in ("gate_proj", "up_proj", "down_proj"):
            yield Variant(f"int4-g32, {part} int3-g32", recipe("int4-g32-sym", (f"*.{part}.weight", "int3-g32-sym")))
        return
    yield Variant("int4-g32, experts int3-g32", recipe("int4-g32-sym", ("*.experts.*", "int3-g32-sym")))
    yield Variant("int4-g32, experts int3-g64", recipe("int4-g32-sym", ("*.experts.*", "int3-g64-sym")))
    yield Variant("int4-g32, experts int3-g16", recipe("int4-g32-sym", ("*.experts.*", "int3-g16-sym")))
    yield Variant("int4-g32, experts int3-g32-asym", recipe("int4-g32-sym", ("*.experts.*", "int3-g32-asym")))
    for part in ("gate_proj", "up_proj", "down_proj"):
        rule = (f"*.experts.*.{part}.weight", "int3-g32-sym")
        yield Variant(f"int4-g32, experts' {part} int3-g32", recipe("int4-g32-sym", rule))
    yield Variant(
        "int4-g32, experts int3-g32, head int8-g128 by its high nibbles, 64 largest exact",
        recipe("int4-g32-sym", ("*.experts.*", "int3-g32-sym")),
        head,
        bits,
    )
    for what, share in (("quarter", 0.25), ("half", 0.5)):
        rules = [(pattern, "int3-g32-sym") for pattern in model.least_routed(share)]
        yield Variant(f"int4-g32, the least chosen {what} of the experts int3-g32", recipe("int4-g32-sym", *rules))
    rules = [(f"model.layers.{layer}.mlp.experts.*", "int3-g32-sym") for layer in (0, 3)]
    yield Variant("int4-g32, experts of the first layer int3-g32", recipe("int4-g32-sym", rules[0]))
    yield Variant("int4-g32, experts of the last layer int3-g32", recipe("int4-g32-sym", rules[1]))


def main() -> None:
    """Measure and print a table for each model, and one JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, help=f"of {', '.join(MODELS)}")
    parser.add_argument("--tokens", type=int, default=16384, help=f"in windows of {LENGTH} (default 16384)")
    options = parser.parse_args()
    records = {}
    for name in options.models:
        start = time.monotonic()
        model = Model(name, options.tokens)
        print(f"\n{name}, {len(model.windows) * LENGTH} tokens held out\n")
        print("| | MB per token | KL, nats per token | first choice kept | perplexity |")
        print("|---|---|---|---|---|")
        lines = []
        for variant in variants(model):
            line = model.measure(variant)
            lines.append(asdict(line))
            print(
                f"| {line.name} | {line.megabytes:.0f} | {line.kl:.2e} +- {line.error:.0e} | {line.top1:.2%} "
                f"| x {line.perplexity:.4f} |",
                flush=True,
            )
        print(f"\nin {time.monotonic() - start:.0f} s")
        records[name] = lines
    print(json.dumps(records))


if __name__ == "__main__":
    main()
