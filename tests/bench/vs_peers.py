"""How fast are our bundles on this machine compared with llama.cpp, OpenVINO GenAI and our portable operators?

    python tests/bench/vs_peers.py --checkpoint olmoe=DIR --checkpoint fox=DIR --work DIR \\
        [--llama-python PYTHON] [--openvino-python PYTHON] [--recipe int4 --recipe int8] [--out results.json]
    python tests/bench/vs_peers.py --quick --work DIR        # the tiny checkpoints, a smoke test

For each checkpoint and recipe, missing files in --work are made first (--prepare stops there): our bundles, with a
parity check, llama.cpp's GGUF (Q4_0 for int4, Q8_0 for int8, by its own quantiser) and OpenVINO's IR. Then, for each
peer, our engine and the peer are loaded in two processes, their logits are compared, and every row is measured in turn:
ours, theirs, ours, theirs. A peer whose packages are missing is named and skipped.

Rows (as many threads as allowed cores, batch 1, the same token ids for every engine, but OpenVINO decodes its own):
    prefill  tokens per second of a prompt of 512
    decode   64 tokens after a prompt of 16; the time of a token is the median
    long     a prompt of 4,000 and 32 tokens after it (int4 only)
    batch    8 sequences decoded together, compared with one (ours only)
    first    a new process: seconds from loading, from the first import and from its start to the first token after
             a prompt of 16, with the file in the page cache; and the memory it uses compared with what it needs

Prints medians, spread, ratios (the median over repetitions) and the targets, and one JSON line last. The bandwidth of
the memory is measured between the repetitions. Nothing else may run: llama.cpp and OpenVINO lose half of
their speed when another process takes a core. README.md beside this file says how to install the peers.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import figures
import numpy as np
from figures import Measurements, agreement
from peers import FILE_TYPES, MATCHES, Engine, Worker, Workplace, cache_bytes

from edgelm import devices
from edgelm.benchmark import read_bandwidth
from edgelm.bundle import Bundle

SHARED_ROWS = ("prefill", "decode", "long")
ROWS = (*SHARED_ROWS, "batch", "first")
TINY = {name: Path(__file__).parents[2] / "examples" / "checkpoints" / name for name in ("olmoe-tiny", "fox-tiny")}
ALONE = "alone"
LENGTHS = (16, 32, 48, 64)
# Largest error of the logits, relative to their spread. Two roundings of the same random weights to 4 bits differ by
# about 0.5 (in an MoE the selected experts change too), two implementations of one rounding by far less, and a wrong
# model by 1.4.
BOUNDS = {"int4": 0.7, "int8": 0.2}
SAME_WEIGHTS = 0.3
# Threads of an idle engine spin for a while; wait, so that they do not slow down the next engine.
SETTLE = 0.1


@dataclass(frozen=True)
class Sizes:
    """Numbers of tokens and of repetitions."""

    prefill: int = 512
    prompt: int = 16
    new: int = 64
    long: int = 4000
    long_new: int = 32
    batch: int = 8
    repetitions: int = 5
    long_repetitions: int = 3

    def within(self, context: int) -> Sizes:
        """Return the sizes, reduced to the context length."""
        return replace(
            self,
            prefill=min(self.prefill, context),
            long=min(self.long, context - self.long_new),
            new=min(self.new, context - self.prompt),
        )


QUICK = Sizes(prefill=64, new=8, long=256, long_new=8, repetitions=2, long_repetitions=1)


def say(text: str) -> None:
    """Print progress to standard error."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


class Run:
    """The measurements of one checkpoint under one recipe."""

    def __init__(self, column: str, ours: list[Engine], sizes: Sizes, rows: Sequence[str], threads: int) -> None:
        self.column, self.recipe, self.ours, self.rows, self.threads = column, column.split()[-1], ours, rows, threads
        self.bundle = Bundle.open(ours[0].options["path"])
        model = self.bundle.manifest.model
        self.sizes = sizes.within(model.context_length)
        self.found = Measurements()
        self.agreements: list[figures.Agreement] = []
        self.versions: dict[str, str] = {}
        ids = np.random.default_rng(0).integers(10, min(50000, model.vocab_size), (2 + self.sizes.batch, 4096))
        self.prompt, self.new = ids[0].tolist(), ids[1].tolist()
        # Each sequence has different tokens, since equal ones would select equal experts.
        self.batch_prompts, self.batch_new = np.split(
            ids[2:, : self.sizes.prompt + self.sizes.new], [self.sizes.prompt], 1
        )

    @property
    def context(self) -> int:
        """Return the context length that the rows need."""
        sizes = self.sizes
        needed = [sizes.prompt + sizes.new, LENGTHS[-1]]
        needed += [sizes.prefill] if "prefill" in self.rows else []
        needed += [sizes.long + sizes.long_new] if "long" in self.rows else []
        return max(needed)

    def match(self, name: str, engines: list[Engine], rows: Sequence[str], log: Path) -> None:
        """Load the engines, compare their logits, and measure them in turn."""
        engines = [engine for engine in engines if "long" in rows or not engine.only_long]
        with ExitStack() as stack:
            workers = {}
            for engine in engines:
                say(f"{self.column}: loading {engine.name}")
                worker = stack.enter_context(Worker(engine.script, engine.python, log))
                self.versions[engine.name] = worker("imports")["version"]
                worker("load", threads=self.threads, context=self.context, **engine.options)
                workers[engine] = worker
                position = self.sizes.prompt + self.sizes.new / 2
                moved = engine.bytes_per_token + self._cache(position, engine.options.get("kv"))
                self.found.add(self.column, name, figures.BYTES, engine.name, [moved])
            self._compare(workers)
            for worker in workers.values():
                # Warm-up: kernels are compiled, weights repacked, pages loaded.
                worker("run", prompt=self.prompt[: min(self.sizes.prefill, self.context - 4)], new=self.new[:4])
            short = {engine: worker for engine, worker in workers.items() if not engine.only_long}
            if "decode" in rows:
                self._decode(name, short)
            if "prefill" in rows:
                rates = self._turns(short, self.sizes.repetitions, figures.PREFILL, self._prefill_once)
                self._add(name, figures.PREFILL, rates)
            if "long" in rows:
                self._long(name, workers)
            if "batch" in rows:
                self._batch(workers)

    def first(self, engine: Engine, log: Path, repetitions: int) -> None:
        """Measure in new processes the seconds to the first token, and the memory after some more."""
        with engine.weights.open("rb", buffering=0) as file:
            while file.read(16 << 20):
                pass
        context = min(4096, self.bundle.manifest.model.context_length)
        options = {"threads": self.threads, "context": context, **engine.options}
        answers = []
        for _ in range(repetitions):
            say(f"{self.column}: first token, {engine.name}")
            with Worker(engine.script, engine.python, log) as worker:
                answer = worker(
                    "first_token", prompt=self.prompt[: self.sizes.prompt], new=self.new[: self.sizes.new],
                    weights=str(engine.weights), options=options,
                )  # fmt: skip
                answers.append({**answer, "from_start": answer["now"] - worker.started})
        add = self.found.add
        add(self.column, ALONE, figures.FIRST, engine.name, [answer["seconds"] for answer in answers])
        add(self.column, ALONE, figures.FIRST_IMPORTED, engine.name, [answer["with_imports"] for answer in answers])
        add(self.column, ALONE, figures.FIRST_SPAWNED, engine.name, [answer["from_start"] for answer in answers])
        resident = [answer["memory"]["file"] + answer["memory"]["anonymous"] for answer in answers]
        add(self.column, ALONE, figures.RESIDENT, engine.name, resident)
        if engine in self.ours:
            # Other engines repack their weights or do not map them, so used and held memory cannot be separated.
            touched = [answer["memory"]["weights"] for answer in answers]
            cache = self._cache(self.sizes.prompt + self.sizes.new, engine.options["kv"])
            add(self.column, ALONE, figures.WEIGHTS, engine.name, touched)
            add(self.column, ALONE, figures.CACHE, engine.name, [cache])
            needed = [whole / (part + cache) for whole, part in zip(resident, touched, strict=True)]
            add(self.column, ALONE, figures.MEMORY, engine.name, needed)

    def _cache(self, tokens: float, kv: str | None) -> int:
        # llama.cpp's cache is float16 too; at this length the cache matters little.
        return cache_bytes(self.bundle.manifest, round(tokens), kv or "float16")

    def _compare(self, workers: dict[Engine, Worker]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            logits = {}
            for engine, worker in workers.items():
                out = f"{folder}/logits.npy"
                worker("logits", tokens=self.prompt[: LENGTHS[-1]], lengths=LENGTHS, out=out)
                logits[engine] = np.load(out)
        first, *others = workers
        for engine in others:
            # The portable bundle has the same quantised weights.
            own = engine.script == first.script
            bound = min(SAME_WEIGHTS, BOUNDS.get(self.recipe, SAME_WEIGHTS)) if own else BOUNDS[self.recipe]
            found = agreement(engine.name, logits[first], logits[engine])
            self.agreements.append(found)
            print(f"{self.column}: {found} (at most {bound})")
            if not found.error <= bound:
                raise SystemExit(f"{engine.name} does not compute the same model as {first.name}: nothing is timed")

    def _turns(
        self,
        workers: dict[Engine, Worker],
        repetitions: int,
        label: str,
        once: Callable[[Engine, Worker], float],
        between: Callable[[], None] = lambda: None,
    ) -> dict[Engine, list[float]]:
        """Measure every engine in turn, `repetitions` times; which one is first alternates."""
        values: dict[Engine, list[float]] = {engine: [] for engine in workers}
        order = list(workers)
        for number in range(repetitions):
            say(f"{self.column}: {label}, {number + 1} of {repetitions}")
            for engine in (*order[number % len(order) :], *order[: number % len(order)]):
                time.sleep(SETTLE)
                values[engine].append(once(engine, workers[engine]))
            between()
        return values

    def _add(self, match: str, row: str, values: dict[Engine, list[float]]) -> None:
        for engine, found in values.items():
            self.found.add(self.column, match, row, engine.name, found)

    def _prefill_once(self, engine: Engine, worker: Worker) -> float:
        del engine
        seconds: float = worker("run", prompt=self.prompt[: self.sizes.prefill], new=[])["prefill"]
        return self.sizes.prefill / seconds

    def _decode(self, match: str, workers: dict[Engine, Worker]) -> None:
        anonymous: list[float] = []
        mapped: list[float] = []

        def once(engine: Engine, worker: Worker) -> float:
            del engine
            answer = worker("run", prompt=self.prompt[: self.sizes.prompt], new=self.new[: self.sizes.new])
            return 1 / median(answer["decode"])

        def between() -> None:
            time.sleep(SETTLE)
            anonymous.append(read_bandwidth(self.threads))
            mapped.append(read_bandwidth(self.threads, self.ours[0].weights))

        self._add(match, figures.DECODE, self._turns(workers, self.sizes.repetitions, "decode", once, between))
        self.found.add(self.column, match, figures.ANONYMOUS, figures.MACHINE, anonymous)
        self.found.add(self.column, match, figures.MAPPED, figures.MACHINE, mapped)

    def _long(self, match: str, workers: dict[Engine, Worker]) -> None:
        sizes = self.sizes
        decode: dict[Engine, list[float]] = {engine: [] for engine in workers}

        def once(engine: Engine, worker: Worker) -> float:
            answer = worker("run", prompt=self.prompt[: sizes.long], new=self.new[: sizes.long_new])
            decode[engine].append(1 / median(answer["decode"]))
            return sizes.long / float(answer["prefill"])

        self._add(match, figures.LONG_PREFILL, self._turns(workers, sizes.long_repetitions, "long", once))
        self._add(match, figures.LONG_DECODE, decode)

    def _batch(self, workers: dict[Engine, Worker]) -> None:
        one: dict[Engine, list[float]] = {engine: [] for engine in workers}

        def once(engine: Engine, worker: Worker) -> float:
            rates = []
            for count in (1, self.sizes.batch):
                prompts, new = self.batch_prompts[:count].tolist(), self.batch_new[:count].T.tolist()
                rates.append(count / median(worker("batch", prompts=prompts, new=new)["decode"]))
            one[engine].append(rates[0])
            return rates[1]

        self._add(ALONE, figures.BATCH, self._turns(workers, self.sizes.repetitions, "batch", once))
        self._add(ALONE, figures.BATCH_ONE, one)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", action="append", metavar="NAME=DIR", help="olmoe=DIR, fox=DIR have targets")
    parser.add_argument("--work", type=Path, required=True, help="where bundles and peers' files are made and kept")
    parser.add_argument("--recipe", action="append", help=f"default: {' and '.join(FILE_TYPES)}")
    parser.add_argument("--peer", action="append", choices=[*MATCHES, "none"], help="default: all")
    parser.add_argument("--row", action="append", choices=ROWS, help="default: all")
    parser.add_argument("--llama-python", default=sys.executable, help="has llama-cpp-python and gguf")
    parser.add_argument("--openvino-python", default=sys.executable, help="has openvino-genai and optimum-intel")
    parser.add_argument("--repetitions", type=int)
    parser.add_argument("--long-repetitions", type=int)
    parser.add_argument("--threads", type=int, default=devices.allowed_cores())
    parser.add_argument("--quick", action="store_true", help="small sizes; without --checkpoint the tiny checkpoints")
    parser.add_argument("--prepare", action="store_true", help="make what is missing in --work, measure nothing")
    parser.add_argument("--out", type=Path, help="write the JSON line to this file too, after every recipe")
    parser.add_argument(
        "--add",
        type=Path,
        action="append",
        default=[],
        help="file that an earlier run wrote with --out, to print in the same table",
    )
    options = parser.parse_args(arguments)
    if not (options.checkpoint or options.quick or options.add):
        parser.error("give --checkpoint NAME=DIR, or --quick, or --add FILE to print earlier results")
    options.checkpoints = {}
    tiny = [f"{name}={folder}" for name, folder in TINY.items()] if options.quick else []
    for pair in options.checkpoint or tiny:
        name, _, folder = pair.partition("=")
        if not (name and Path(folder, "config.json").is_file()):
            parser.error(f"--checkpoint {pair}: give NAME=DIR with a config.json in DIR")
        options.checkpoints[name] = Path(folder)
    options.sizes = QUICK if options.quick else Sizes()
    for field in ("repetitions", "long_repetitions"):
        given = getattr(options, field)
        if given is not None:
            if given < 1:
                parser.error(f"--{field.replace('_', '-')} {given}: give 1 or more")
            options.sizes = replace(options.sizes, **{field: given})
    options.recipe = options.recipe or list(FILE_TYPES)
    options.row = options.row or list(ROWS)
    options.peer = [peer for peer in options.peer or MATCHES if peer != "none"]
    return options


def measure(options: argparse.Namespace, place: Workplace) -> Iterator[Run]:
    """Measure each checkpoint and recipe, and yield its run when it is complete."""
    for name, checkpoint in options.checkpoints.items():
        for recipe in options.recipe:
            say(f"{name} {recipe}: making what is missing")
            ours = place.native(name, checkpoint, recipe)
            peers = {match: place.peers(match, name, checkpoint, recipe) for match in options.peer}
            if options.prepare:
                continue
            rows = [row for row in options.row if row != "long" or recipe == "int4" or options.row == ["long"]]
            run = Run(f"{name} {recipe}", ours, options.sizes, rows, options.threads)
            if "first" in rows:
                for engine in (*ours, *(engine for engines in peers.values() for engine in engines)):
                    if not engine.only_long:
                        run.first(engine, place.log, options.sizes.repetitions if engine in ours else 1)
            shared = [row for row in rows if row in SHARED_ROWS]
            turns = {match: engines for match, engines in peers.items() if engines} or {ALONE: []}
            for match, engines in turns.items() if shared else ():
                # Our portable bundle is not measured in the long rows, where it is slow.
                mine = [row for row in shared if row != "long" or match != "portable"]
                if mine:
                    run.match(match, [*ours, *engines], mine, place.log)
            if "batch" in rows:
                run.match(ALONE, ours[:1], ["batch"], place.log)
            yield run


def together(runs: Sequence[Run], earlier: Sequence[Path]) -> Measurements:
    """Return the measurements of this run, completed by earlier ones (their JSON lines, oldest first)."""
    found = Measurements([item for run in runs for item in run.found.all])
    for path in reversed(earlier):
        records = json.loads(path.read_text(encoding="utf-8"))["measurements"]
        found.extend(figures.Measurement.from_dict(record) for record in records)
    return found


def report(runs: Sequence[Run], found: Measurements, notes: Sequence[str], options: argparse.Namespace) -> str:
    """Return the JSON line."""
    return json.dumps(
        {
            "date": time.strftime("%Y-%m-%d"),
            "cpu": devices.describe().cpu,
            "threads": options.threads,
            "sizes": vars(options.sizes),
            "versions": {engine: version for run in runs for engine, version in run.versions.items()},
            "left_out": list(notes),
            "agreement": [{"column": run.column, **vars(item)} for run in runs for item in run.agreements],
            "measurements": [item.as_dict() for item in found.all],
            "targets": figures.target_records(found),
        }
    )


def main() -> int:
    """Parse the command line, make missing files, measure, and print."""
    options = parse()
    options.work.mkdir(parents=True, exist_ok=True)
    place = Workplace(options.work, options.threads, options.llama_python, options.openvino_python)
    print(f"{devices.describe().cpu}, {options.threads} threads, load average {os.getloadavg()[0]:.2f}")
    runs: list[Run] = []
    found = together(runs, options.add)
    for run in measure(options, place):
        runs.append(run)
        found = together(runs, options.add)
        print(f"\n{run.column}: median (least .. greatest); ratios are of single repetitions")
        print(figures.row_table(run.found, run.column), flush=True)
        if options.out:
            options.out.write_text(report(runs, found, place.notes, options) + "\n", encoding="utf-8")
    if found.all:
        print(f"\n{figures.target_table(found)}\n\n{report(runs, found, place.notes, options)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
