"""How much better is mixed precision than one scheme? Uniform recipes against `edgelm recipe` of the same size.

    python tests/bench/mixed_precision_quality.py [MODEL ...] [--windows N] [--tokens N]

Measures the mean KL(float || quantised) in nats per token of the PyTorch reference with weights rounded to nearest, on
held-out text in windows of 256 tokens. The recipes are chosen on the rest of the text. Bytes are those of a native
bundle. "by layer" gives all experts of a layer one scheme, and "by kind" all layers as well. The difference to "each"
is the gain of choosing for single experts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from edgelm.checkpoint import Checkpoint
from edgelm.corpus import BUILTIN, read_corpus, windows
from edgelm.quant import AnyScheme, dequantize, parse_scheme, quantize
from edgelm.quant.mixed_precision import SCHEMES
from edgelm.quant.mixed_precision.losses import Sensitivity
from edgelm.quant.mixed_precision.sensitivity import Measured, measure
from edgelm.quant.mixed_precision.solve import Option, solve
from edgelm.quant.mixed_precision.units import Unit
from edgelm.reference.module import ReferenceModel
from edgelm.tokenization.tokenizer import Tokenizer

CHECKPOINTS = Path(__file__).parents[2] / "examples" / "checkpoints"
MODELS = ("olmoe-tiny", "fox-tiny")
LENGTH = 256
BATCH = 8
UNIFORM = (
    ("int3-g32-sym", None), ("int4-g128-sym", None), ("int4-g32-sym", None), ("int4-g32-sym", "int8-g128-sym"),
    ("int5-g32-sym", None),
)  # fmt: skip
GROUPS: Mapping[str, Callable[[Unit], Hashable]] = {
    "each": lambda unit: (unit.kind, unit.layer, unit.expert),
    "by layer": lambda unit: (unit.kind, unit.layer),
    "by kind": lambda unit: unit.kind,
}

Schemes = Sequence[AnyScheme]  # one per unit


class Model:
    """A tiny checkpoint in memory, with windows of held-out text."""

    def __init__(self, name: str, count: int, tokens: int) -> None:
        self.checkpoint = Checkpoint.open(CHECKPOINTS / name)
        tokenizer = Tokenizer.from_folder(self.checkpoint.path)
        held_out = windows(tokenizer, read_corpus(BUILTIN, held_out=True).documents, count, LENGTH)
        self.batches = torch.from_numpy(np.stack(held_out)).split(BATCH)
        self.sample = windows(tokenizer, read_corpus(BUILTIN).documents, tokens // LENGTH, LENGTH)
        config = self.checkpoint.decoder
        self.module = ReferenceModel(config)
        self.module.load_weights(self.checkpoint.read_float32)
        self.tensors = dict(self.module.tensors())
        self.expected = [self._run(batch) for batch in self.batches]

    @torch.no_grad()
    def _run(self, batch: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(self.module(batch).double(), -1)

    def kl(self, units: Sequence[Sensitivity], schemes: Schemes) -> float:
        """Return the mean KL over tokens with every unit in its scheme."""
        for one, scheme in zip(units, schemes, strict=True):
            for name in one.unit.tensors:
                weight = quantize(self.checkpoint.read_float32(name), scheme)
                self.tensors[name].copy_(torch.from_numpy(dequantize(weight)))
        total = 0.0
        for batch, expected in zip(self.batches, self.expected, strict=True):
            total += float((expected.exp() * (expected - self._run(batch))).sum())
        return total / sum(batch.numel() for batch in self.batches)


def choose(units: Sequence[Sensitivity], limit: int, key: Callable[[Unit], Hashable]) -> Schemes:
    """Return the best schemes within a limit of bytes; units with the same key share one."""
    members: dict[Hashable, list[int]] = {}
    for i, one in enumerate(units):
        members.setdefault(key(one.unit), []).append(i)
    candidates = [[units[i].unit.effective(parse_scheme(name)) for name in SCHEMES] for i in range(len(units))]
    options = [
        [
            Option(
                sum(units[i].unit.nbytes(candidates[i][c]) for i in inside),
                sum(units[i].losses[candidates[i][c].name] for i in inside),
            )
            for c in range(len(SCHEMES))
        ]
        for inside in members.values()
    ]
    picked: dict[int, AnyScheme] = {}
    for inside, pick in zip(members.values(), solve(options, limit).picks, strict=True):
        picked |= {i: candidates[i][pick] for i in inside}
    return [picked[i] for i in range(len(units))]


def report(model: Model) -> list[dict[str, float | str]]:
    """Measure, print the rows of a table, and return them."""
    lines: list[dict[str, float | str]] = []
    for layers, tables in UNIFORM:
        uniform = parse_scheme(layers)
        measured: Measured = measure(model.checkpoint, model.sample, list(map(parse_scheme, SCHEMES)), nominal=uniform)
        units = measured.units
        weights = sum(one.unit.weights for one in units)
        same: Schemes = [
            one.unit.effective(parse_scheme(tables) if tables and one.unit.layer is None else uniform) for one in units
        ]
        limit = sum(one.unit.nbytes(scheme) for one, scheme in zip(units, same, strict=True))
        base = model.kl(units, same)
        name = layers + (f", embedding + head {tables}" if tables else "")
        line: dict[str, float | str] = {"uniform": name, "bits": 8 * limit / weights, "kl": base}
        groups = {label: key for label, key in GROUPS.items() if label == "each" or measured.swaps}
        for label, key in groups.items():
            schemes = choose(units, limit, key)
            line[label] = model.kl(units, schemes)
            if label == "each":
                losses = (one.losses[scheme.name] for one, scheme in zip(units, schemes, strict=True))
                line["predicted"] = sum(losses) + measured.swaps
        cells = [f"{line[label]:.2e} ({float(line[label]) / base:.2f})" if label in line else "" for label in GROUPS]
        print(
            f"| {name} | {line['bits']:.2f} | {base:.2e} | {' | '.join(cells)} | {line['predicted']:.2e} |", flush=True
        )
        lines.append(line)
    return lines


def main() -> None:
    """Print a table for each model, and one JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, help=f"of {', '.join(MODELS)}")
    parser.add_argument("--windows", type=int, default=64, help=f"held-out windows of {LENGTH} tokens (default 64)")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens to choose by (default 8192)")
    options = parser.parse_args()
    records = {}
    for name in options.models:
        model = Model(name, options.windows, options.tokens)
        print(f"\n{name}, {options.windows * LENGTH} tokens held out\n")
        print(f"| uniform | bits | KL | {' | '.join(GROUPS)} | predicted, each |")
        print("|---|---|---|---|---|---|---|")
        records[name] = report(model)
    print(json.dumps(records))


if __name__ == "__main__":
    main()
