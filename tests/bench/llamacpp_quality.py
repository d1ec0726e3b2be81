"""How much do llama.cpp's formats lose on the tiny trained models, compared with ours measured in the same way?

    python tests/bench/llamacpp_quality.py --llama-python PYTHON [MODEL ...] [--ours RECIPE | FOLDER ...] [--out FILE]

Each checkpoint is converted to a GGUF in float32, in bfloat16, and with llama.cpp's quantiser and its own choice of
types in the formats of `FORMATS`. Formats with "+ imatrix" use an importance matrix from 128 x 512 tokens of training
text: mean squares of the inputs of every matrix, for an expert over its own tokens, from the PyTorch reference. These
are the numbers of llama.cpp's tool, without its text. The evaluation uses 64 windows of 256 tokens of held-out text:

    weights      mean KL(float || quantised) in nats per token of the PyTorch reference (float32 arithmetic) with the
                 GGUF's weights: the loss of the format
    computed     the same for llama.cpp's own logits, which also quantises activations to 8 bits in blocks of 32 or 256
    top-1        fraction of tokens with the same most likely next token as the float model (with the GGUF's weights)
    bits         bytes of all tensors x 8 / weights, float tensors included

F32 and BF16 show that the conversion is right: their KL is the rounding of another engine. A K-quant needs rows of a
multiple of 256; for others llama.cpp uses a larger format with blocks of 32 (Q5_0 for Q4_K, Q5_1 for Q5_K, Q8_0 for
Q6_K), so the types of the tensors are printed. `--ours` takes recipes (presets or files) and folders of quantised
checkpoints; a checkpoint is measured with the model of its config.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peers import Worker
from torch import Tensor

from edgelm.checkpoint import Checkpoint
from edgelm.corpus import read_corpus, windows
from edgelm.models.spec import Matrix
from edgelm.quant import Recipe, WeightSource
from edgelm.reference.hooks import Hooks
from edgelm.reference.module import ReferenceModel
from edgelm.tokenization.tokenizer import Tokenizer

CHECKPOINTS = Path(__file__).parents[2] / "examples" / "checkpoints"
MODELS = ("olmoe-tiny", "fox-tiny")
FORMATS = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0")
IMPORTANT = ("Q5_K_M", "Q4_K_M", "Q4_0")
"""Formats that are also made with an importance matrix."""
WINDOWS, LENGTH = 64, 256
CALIBRATION = (128, 512)

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Line:
    """A row of the table; KL in nats per token with the standard error of the mean over windows."""

    name: str
    bits: float
    types: str
    kl: float | None
    kl_error: float | None
    top1: float | None
    computed_kl: float | None = None
    computed_kl_error: float | None = None
    computed_top1: float | None = None


class Squares(Hooks):
    """Measures the mean square of every input of every matrix."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}

    def inputs(self, matrix: Matrix, x: Tensor) -> Tensor:
        """Add the squares of the inputs of a matrix, and return the inputs unchanged."""
        flat = x.reshape(-1, x.shape[-1]).double()
        name = matrix.name
        self.sums[name] = self.sums.get(name, 0) + flat.square().sum(0)
        self.rows[name] = self.rows.get(name, 0) + len(flat)
        return x

    def means(self) -> dict[str, Floats]:
        """Return the mean squares by the matrix's name, float32 [columns]."""
        return {name: (total / self.rows[name]).float().numpy() for name, total in self.sums.items()}


class Model:
    """A tiny checkpoint, the evaluation windows, and its log-probabilities there."""

    def __init__(self, name: str) -> None:
        self.checkpoint = Checkpoint.open(CHECKPOINTS / name)
        self.config = self.checkpoint.decoder
        self.tokenizer = Tokenizer.from_folder(self.checkpoint.path)
        held_out = read_corpus("builtin", held_out=True).documents
        self.windows = np.stack(windows(self.tokenizer, held_out, WINDOWS, LENGTH))
        self.reference = [_log_probabilities(logits) for logits in self.logits(self.checkpoint.read_float32)]

    def _module(self, read: Callable[[str], Floats]) -> Any:
        module = ReferenceModel(self.config)
        module.load_weights(read)
        return module.eval()

    def logits(self, read: Callable[[str], Floats]) -> Iterator[Tensor]:
        """Yield the logits [LENGTH, vocabulary] of each window by the reference with the weights from `read`."""
        module = self._module(read)
        for window in self.windows:
            with torch.no_grad():
                yield module(torch.from_numpy(window)[None])[0]

    def squares(self) -> dict[str, Floats]:
        """Return the mean squares of the inputs of every matrix over the calibration text."""
        module, collected = self._module(self.checkpoint.read_float32), Squares()
        module.hooks = collected
        for window in windows(self.tokenizer, read_corpus("builtin").documents, *CALIBRATION):
            with torch.no_grad():
                module(torch.from_numpy(window)[None])
        return collected.means()

    def judge(self, logits: Iterator[Tensor]) -> tuple[float, float, float]:
        """Return the mean KL, its standard error, and the top-1 agreement."""
        kl, kept = [], []
        for expected, found in zip(self.reference, map(_log_probabilities, logits), strict=True):
            kl.append(float((expected.exp() * (expected - found)).sum(-1).mean()))
            kept.append(float((expected.argmax(-1) == found.argmax(-1)).double().mean()))
        return float(np.mean(kl)), float(np.std(kl) / np.sqrt(len(kl))), float(np.mean(kept))

    def ours(self, candidate: str) -> Line | None:
        """Return the row of a recipe or a quantised checkpoint; None for a checkpoint of another model."""
        folder = Path(candidate)
        if folder.is_dir():
            checkpoint = Checkpoint.open(folder)
            if self.checkpoint.decoder != self.config:
                return None
            source = WeightSource(checkpoint, threads=1)
        else:
            source = WeightSource(self.checkpoint, Recipe.load(candidate), threads=1)
        types: dict[str, int] = {}
        stored, weights = 0.0, 0
        for name, shape in source.shapes.items():
            scheme, count = source.scheme(name), int(np.prod(shape))
            if scheme is None:
                bits = 8 * source.checkpoint.tensors[name].nbytes / count
            else:
                bits = scheme.bits_per_weight(shape[1])
            stored, weights = stored + bits * count, weights + count
            label = "float" if scheme is None else scheme.name
            types[label] = types.get(label, 0) + count
        judged = self.judge(self.logits(source.dequantized().read_float32))
        return Line(folder.name if folder.is_dir() else candidate, stored / weights, _shares(types), *judged)

    def theirs(self, worker: Worker, work: Path, name: str, file_type: str | None, important: bool) -> Line:
        """Return the row of a format of llama.cpp."""
        kind = "F32" if name == "F32" else "BF16"
        out = work / name.replace(" ", "")
        made = worker(
            "quantize", checkpoint=str(self.checkpoint.path), whole=str(work / f"{kind}.gguf"), kind=kind, out=str(out),
            file_type=file_type, squares=str(work / "squares.npz") if important else None,
        )  # fmt: skip
        worker("all_logits", path=made["path"], windows=str(work / "windows.npy"), out=str(work / "logits.npy"))
        with np.load(f"{out}.npz") as weights:
            of_weights = self.judge(self.logits(lambda tensor: weights[tensor]))
        computed = np.load(work / "logits.npy", mmap_mode="r")
        of_engine = self.judge(torch.from_numpy(logits.copy()) for logits in computed)
        types: Mapping[str, Mapping[str, int]] = made["types"]
        count = sum(entry["weights"] for entry in types.values())
        bits = 8 * sum(entry["bytes"] for entry in types.values()) / count
        return Line(name, bits, _shares({t: entry["weights"] for t, entry in types.items()}), *of_weights, *of_engine)

    def lines(self, python: str, candidates: Sequence[str]) -> Iterator[Line]:
        """Yield the rows of the table, ours last."""
        with tempfile.TemporaryDirectory() as folder, Worker("llamacpp_worker.py", python, Path(folder) / "log") as ask:
            work = Path(folder)
            np.save(work / "windows.npy", self.windows)
            np.savez(work / "squares.npz", **self.squares())  # type: ignore[arg-type]  # numpy's stub
            for name in ("F32", "BF16"):
                yield self.theirs(ask, work, name, None, False)
            for name in FORMATS:
                yield self.theirs(ask, work, name, name, False)
                if name in IMPORTANT:
                    yield self.theirs(ask, work, f"{name} + imatrix", name, True)
        for candidate in candidates:
            line = self.ours(candidate)
            if line is not None:
                yield line


def _log_probabilities(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits.double(), dim=-1)


def _shares(weights: Mapping[str, int]) -> str:
    total = sum(weights.values())
    parts = sorted(weights.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {100 * count / total:.1f} %" for name, count in parts)


def _row(line: Line) -> str:
    def kl(value: float | None, error: float | None) -> str:
        return "" if value is None else f"{value:.2e} +- {error:.0e}"

    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.2%}"

    return (
        f"| {line.name} | {line.bits:.2f} | {kl(line.kl, line.kl_error)} | {share(line.top1)} "
        f"| {kl(line.computed_kl, line.computed_kl_error)} | {share(line.computed_top1)} | {line.types} |"
    )


def main() -> None:
    """Measure and print a table for each model, and one JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, help=f"of {', '.join(MODELS)}")
    parser.add_argument("--llama-python", default=sys.executable, help="an interpreter with llama_cpp and gguf")
    parser.add_argument("--ours", nargs="+", action="extend", default=[], help="recipes and quantised checkpoints")
    parser.add_argument("--out", type=Path, help="write the JSON line to this file too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    records = {}
    for name in options.models:
        print(f"\n{name}, {WINDOWS} windows of {LENGTH} tokens held out\n")
        print("| | bits | weights: KL, nats per token | top-1 | computed: KL | top-1 | share of the weights by type |")
        print("|---|---|---|---|---|---|---|")
        records[name] = []
        for line in Model(name).lines(options.llama_python, options.ours):
            records[name].append(asdict(line))
            print(_row(line), flush=True)
    text = json.dumps(records)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
