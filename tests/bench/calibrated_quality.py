"""How much do calibrated and mixed-precision recipes lose on the tiny trained models? For docs/performance/quality.md.

    python tests/bench/calibrated_quality.py [MODEL ...] [--samples N] [--peer-bits B ...] [--keep DIR]

Measures the mean KL(float || quantised) in nats per token of the PyTorch reference with quantised weights (and
activations or KV cache where a row says so), on 64 held-out windows of 256 tokens. Calibration uses the rest of the
text. "mixed precision" rows have at most the bits per weight of the rounded row that they are named after.
`--peer-bits` adds rows of so many bits per weight, which llamacpp_quality.py prints for the formats of llama.cpp.
`--keep` keeps the checkpoints.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from edgelm.checkpoint import Checkpoint
from edgelm.evaluation import EvalOptions, evaluate
from edgelm.quant import PRESETS, Recipe, Rule
from edgelm.quant.calibration import calibrate_checkpoint
from edgelm.quant.checkpoint import quantize_checkpoint
from edgelm.quant.mixed_precision import mixed_precision_recipe, parse_candidates
from edgelm.quant.mixed_precision.units import find_units

CHECKPOINTS = Path(__file__).parents[2] / "examples" / "checkpoints"
MODELS = ("olmoe-tiny", "fox-tiny")
LENGTH = 256
NEAR_FLOAT = "int5-g32,int6-g32,int8-g32,float"
"""Candidates at 8 bits. Float is one of them, for matrices whose errors change the routing of an MoE."""


@dataclass(frozen=True)
class Row:
    """A row of the table: a checkpoint in a folder, or the folder of an earlier row run with another recipe."""

    name: str
    folder: Path
    bits: float


@dataclass(frozen=True)
class Line:
    """Result of a row: bits stored per weight, KL with its standard error over windows, and top-1 agreement."""

    name: str
    bits: float
    kl: float
    error: float
    top1: float
    perplexity: float


class Maker:
    """Makes each checkpoint of a model once."""

    def __init__(self, model: str, folder: Path, samples: int) -> None:
        self.source = CHECKPOINTS / model
        self.folder = folder
        self.samples = samples
        with Checkpoint.open(self.source) as checkpoint:
            self.shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
            self.units = find_units(checkpoint.decoder)
        self.rows: list[Row] = []

    def make(self, name: str, recipe: Recipe, *, calibrated: bool) -> Row:
        """Return the row of a recipe."""
        out, recipe = self.folder / _file_name(name), self._fitted(recipe)
        if calibrated:
            bits = calibrate_checkpoint(
                self.source, out, recipe, samples=self.samples, length=LENGTH, overwrite=True
            ).bits_per_weight
        else:
            bits = quantize_checkpoint(self.source, out, recipe, overwrite=True).bits_per_weight
        return self._keep(Row(name, out, bits))

    def mixed_precision(self, name: str, stored: float, schemes: str | None, *, calibrated: bool) -> Row:
        """Return the row of a mixed-precision recipe with at most `stored` bits per weight of the whole checkpoint."""
        bits = self._unit_bits(stored, calibrated)
        candidates = None if schemes is None else parse_candidates(schemes)
        return self.make(
            name,
            mixed_precision_recipe(self.source, bits=bits, schemes=candidates, tokens=16384).recipe,
            calibrated=calibrated,
        )

    def run_as(self, name: str, row: Row, recipe: Recipe) -> Row:
        """Return a row with the weights of `row` and a recipe with other activations or another cache."""
        out, recipe = self.folder / _file_name(name), self._fitted(recipe)
        shutil.copytree(row.folder, out, dirs_exist_ok=True)
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))
        config["quantization_config"]["recipe"] = recipe.to_toml()
        (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return self._keep(Row(name, out, row.bits))

    def _unit_bits(self, stored: float, calibrated: bool) -> float:
        """Return the bits per weight of the units so that all weights have `stored`: norms 16, a fitted router 32."""
        sizes = {name: math.prod(shape) for name, shape in self.shapes.items()}
        units = sum(unit.weights for unit in self.units)
        routers = sum(size for name, size in sizes.items() if name.endswith(".mlp.gate.weight"))
        others = sum(sizes.values()) - units
        return (stored * sum(sizes.values()) - 16 * others - (16 * routers if calibrated else 0)) / units

    def _fitted(self, recipe: Recipe) -> Recipe:
        """Return the recipe without rules for matrices that this model lacks; only presets may have such rules."""
        rules = tuple(rule for rule in recipe.rules if not rule.pattern or fnmatch.filter(self.shapes, rule.pattern))
        return recipe if recipe.is_preset else replace(recipe, rules=rules)

    def _keep(self, row: Row) -> Row:
        self.rows.append(row)
        return row


def _file_name(name: str) -> str:
    return name.replace(" ", "-").replace(",", "").replace("'", "")


def rows(maker: Maker, peer_bits: Sequence[float]) -> None:
    """Make the rows of the table."""
    int4, int8, fp8 = (PRESETS[name] for name in ("int4", "int8", "fp8"))
    plain = maker.make("int4, rounded", int4, calibrated=False)
    made = maker.make("int4, calibrated", int4, calibrated=True)
    maker.run_as("int4, calibrated, int8 cache", made, replace(int4, kv="int8"))
    maker.run_as("int4, calibrated, fp8 cache", made, replace(int4, kv="fp8"))
    maker.mixed_precision("mixed precision at int4, rounded", plain.bits, None, calibrated=False)
    maker.mixed_precision("mixed precision at int4, calibrated", plain.bits, None, calibrated=True)
    for bits in peer_bits:
        maker.mixed_precision(f"mixed precision at {bits:.2f} bits, calibrated", bits, None, calibrated=True)
    plain = maker.make("int8, rounded", int8, calibrated=False)
    made = maker.make("int8, calibrated", int8, calibrated=True)
    maker.run_as("int8, calibrated, activations int8-token", made, replace(int8, activations="int8-token"))
    maker.mixed_precision("mixed precision at int8, calibrated", plain.bits, NEAR_FLOAT, calibrated=True)
    maker.make("fp8, rounded", fp8, calibrated=False)
    made = maker.make("fp8, calibrated", fp8, calibrated=True)
    maker.run_as("fp8, calibrated, activations fp8-token", made, replace(fp8, activations="fp8-token"))
    attention = Rule("*.self_attn.*", fp8.default, "float")
    spared = replace(fp8, activations="fp8-token", rules=(attention, *fp8.rules))
    maker.run_as("fp8, calibrated, activations fp8-token but attention's float", made, spared)


def measure(maker: Maker) -> list[Line]:
    """Evaluate every row against the float model."""
    report = evaluate([row.folder for row in maker.rows], maker.source, EvalOptions(length=LENGTH, speed=False))
    lines = []
    for row, found in zip(maker.rows, report.targets, strict=True):
        assert found.kl is not None
        kl = found.kl
        lines.append(Line(row.name, row.bits, kl.mean, kl.standard_error, kl.top1, found.perplexity))
    return lines


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="edgelm-") as folder:
        yield Path(folder)


def main() -> None:
    """Make, measure and print a table for each model, and one JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, help=f"of {', '.join(MODELS)}")
    parser.add_argument("--samples", type=int, default=256, help=f"of {LENGTH} tokens to calibrate with (default 256)")
    parser.add_argument("--peer-bits", type=float, nargs="*", default=(), help="one for each model, in their order")
    parser.add_argument("--keep", type=Path, help="folder to leave the checkpoints in")
    options = parser.parse_args()
    records = {}
    for i, model in enumerate(options.models):
        start = time.monotonic()
        with _folder(options.keep and options.keep / model) as folder:
            maker = Maker(model, folder, options.samples)
            rows(maker, options.peer_bits[i : i + 1])
            lines = measure(maker)
        print(f"\n{model}\n\n| | bits | KL, nats per token | first choice kept |\n|---|---|---|---|")
        for line in lines:
            print(f"| {line.name} | {line.bits:.2f} | {line.kl:.2e} +- {line.error:.0e} | {line.top1:.2%} |")
        print(f"\nin {time.monotonic() - start:.0f} s", flush=True)
        records[model] = [asdict(line) for line in lines]
    print(json.dumps(records))


if __name__ == "__main__":
    main()
