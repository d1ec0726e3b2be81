"""How many instructions do the kernels of a decode step execute, and how fast could a GPU be? Nothing runs on a GPU.

    python tests/cuda/cost_model.py --kernel linear_skinny_bf16_int4_n8           # the launches of a kernel
    python tests/cuda/cost_model.py --kernel moe_down --kind int4 --lines         # and counts by source line
    python tests/cuda/cost_model.py --kernel moe_down --kind int4 --sass          # and the code that was executed
    python tests/cuda/cost_model.py --model fox-1-1.6b --kind int4 --sm 87 --multiprocessors 8
    python tests/cuda/cost_model.py --write        # count all again; write docs/gpu/decode_cost.json and the page
    python tests/cuda/cost_model.py --check        # is the page what the JSON says? (test_cost_model.py counts again)

`--kernel` takes a part of a name. Columns: see `Counts` in cost_counts.py, which counts; cost_time.py predicts times.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import cost_counts
import cost_time
from cost_counts import KINDS, MODELS, ROOT, Counts, Executed, counts_of, plan
from cost_time import GPUS, step_time

from edgelm.runtimes.cuda.kernels import nvrtc, sources
from edgelm.synth import PUBLISHED

JSON = ROOT / "docs" / "gpu" / "decode_cost.json"
PAGE = ROOT / "docs" / "gpu" / "decode-cost.md"
TITLES = {"fox-1-1.6b": "Fox-1-1.6B", "olmoe-1b-7b": "OLMoE-1B-7B"}
BLOCKS = 2
"""Blocks of a launch that are executed for the JSON."""
_BLOCK = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)

# -- printing ----------------------------------------------------------------------------------------------------------

HEADER = (
    f"{'kernel':40}{'part':8}{'launches':>9}{'blocks':>7}{'warps':>6}{'before':>7}{'divs':>5}{'tiles':>6}{'tile':>7}{'rest':>6}"
    f"{'warp':>7}{'first':>7}{'block':>8}"
)


def row(one: Counts) -> str:
    """Return a line of the printed table."""
    return (
        f"{one.kernel:40}{one.part:8}{one.times:9}{one.blocks:7}{one.warps:6}{one.before:7}{one.divisions:5}{one.tiles:6}"
        f"{one.per_tile:7.1f}{one.rest:6}{one.warp:7}{one.first:7}{one.block:8}"
    )


def print_lines(one: Executed, most: int = 60) -> None:
    """Print where the instructions of the busiest warp are, by source line."""
    trace = max(one.traces, key=lambda trace: trace.issued)
    by_line: collections.Counter[str] = collections.Counter()
    kinds: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for times, ins in zip(trace.counts.tolist(), one.code.instructions, strict=True):
        by_line[ins.line] += times
        kinds[ins.line][ins.name] += times
    texts = {path.name: path.read_text().splitlines() for path in sources.SOURCES.rglob("*.cuh")}
    for line, times in by_line.most_common(most):
        file, _, number = line.rpartition(":")
        text = texts[file][int(number) - 1].strip() if file in texts else ""
        main = " ".join(f"{name} {n}" for name, n in kinds[line].most_common(4))
        print(f"{times:7} {100 * times / trace.issued:5.1f} %  {line:28} {text[:70]:70}  {main}")


def print_sass(one: Executed) -> None:
    """Print the code that the busiest warp executed, with how often."""
    trace = max(one.traces, key=lambda trace: trace.issued)
    labels = {address: label for label, address in one.code.labels.items()}
    for times, ins in zip(trace.counts.tolist(), one.code.instructions, strict=True):
        if ins.address in labels:
            print(f"{labels[ins.address]}:")
        if times:
            print(f"{times:7}  {ins}   {ins.line}")


# -- the committed counts and the page ---------------------------------------------------------------------------------


def counted(model: str, kind: str, sm: int, multiprocessors: int) -> list[dict[str, Any]]:
    """Return the counts of a step as they stand in the JSON."""
    step = plan(model, kind, sm=sm, multiprocessors=multiprocessors)
    return [asdict(one.counts) for one in counts_of(step, sm, blocks=BLOCKS)]


def device_key(sm: int, multiprocessors: int) -> str:
    """Return the name of devices whose plans and code are the same."""
    return f"SM {sm}, {multiprocessors} multiprocessors"


def _steps(document: Any, part: str, gpu: cost_time.GpuModel, model: str, kind: str) -> list[Counts] | None:
    devices = document[part].get(device_key(gpu.sm, gpu.multiprocessors))
    return None if devices is None else [Counts(**one) for one in devices[model][kind]]


def _speed(seconds: float) -> str:
    """Tokens per second, rounded to tens from 100 on."""
    rate = 1 / seconds
    return f"{round(rate, -1):,.0f}" if rate >= 100 else f"{rate:.0f}"


def _predictions(document: Any) -> list[str]:
    """Before and after on the devices whose counts before are known."""
    lines = [
        "| predicted tokens/s, batch 1 | GPU | before | now | with early launch | limit |",
        "|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        for kind in KINDS:
            for gpu in GPUS:
                old, new = (_steps(document, part, gpu, model, kind) for part in ("before", "now"))
                if old is None or new is None:
                    continue
                first, after = step_time(old, gpu), step_time(new, gpu)
                lines.append(
                    f"| {TITLES[model]} {kind} | {gpu.name} | {_speed(first.total)} | {_speed(after.total)} | "
                    f"{_speed(after.early)} | {_speed(after.limit)} |"
                )
    return lines


def _devices(document: Any) -> list[str]:
    """All devices."""
    columns = [(model, kind) for model in MODELS for kind in KINDS]
    lines = [
        "| predicted / limit | " + " | ".join(f"{TITLES[m].split('-')[0]} {k}" for m, k in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for gpu in GPUS:
        cells = []
        for model, kind in columns:
            new = _steps(document, "now", gpu, model, kind)
            if new is None:
                break
            if sum(document["memory"][model][kind].values()) > 0.9e9 * gpu.memory:
                cells.append("too large")
                continue
            time = step_time(new, gpu)
            cells.append(f"{_speed(time.total)} / {_speed(time.limit)}")
        else:
            known = document["sources"]
            same = known.get(device_key(gpu.sm, gpu.multiprocessors)) == known.get(device_key(90, 132))
            lines.append(f"| {gpu.name}{'' if same else ' (older kernels)'} | " + " | ".join(cells) + " |")
    return lines


def _kernels(document: Any) -> list[str]:
    """The counts of the kernels that read weights, on SM 90."""
    lines = [
        "| launches a token | MiB | before the first load | divisions | a tile | all others | longest warp |",
        "|---|---|---|---|---|---|---|",
    ]
    key = device_key(90, 132)
    for model in MODELS:
        for kind in ("bf16", "int4"):
            old = document["before"][key][model][kind]
            new = document["now"][key][model][kind]
            was = {one["part"]: one for one in old}
            for b in new:
                a = was.get(b["part"])
                if not b["nbytes"] or a is None:
                    continue
                cells = [f"{a[name]:g} → {b[name]:g}" for name in ("before", "divisions", "per_tile", "rest", "first")]
                if not b["tiles"]:
                    cells[2] = ""
                title = f"{TITLES[model].split('-')[0]} {kind} {b['part']}, {b['times']}"
                lines.append(f"| {title} | {b['nbytes'] / 2**20:.1f} | " + " | ".join(cells) + " |")
    return lines


def _memory(document: Any) -> list[str]:
    """MiB on the device at a context of 4,096."""
    names = ("weights", "caches", "values", "workspace")
    lines = [f"| MiB | {' | '.join(names)} | sum |", "|---" * 6 + "|"]
    for model in MODELS:
        for kind in KINDS:
            sizes = [document["memory"][model][kind][name] for name in names]
            cells = [f"{size / 2**20:,.0f}" for size in (*sizes, sum(sizes))]
            lines.append(f"| {TITLES[model]} {kind} | " + " | ".join(cells) + " |")
    return lines


def _figures(document: Any) -> list[str]:
    """The devices' published figures."""
    del document
    lines = ["| GPU | SM | multiprocessors | GHz | GB/s | source |", "|---|---|---|---|---|---|"]
    return lines + [
        f"| {gpu.name} | {gpu.sm} | {gpu.multiprocessors} | {gpu.clock} | {gpu.bandwidth:g} | {gpu.source} |"
        for gpu in GPUS
    ]


TABLES = {"predictions": _predictions, "devices": _devices, "kernels": _kernels, "memory": _memory, "figures": _figures}


def rewritten(text: str, document: Any) -> str:
    """Return the page with its tables made from the JSON."""
    return _BLOCK.sub(
        lambda found: f"{found[1]}{chr(10).join(TABLES[found['name']](document))}\n{found[3]}",
        text,
    )


def nvrtc_version() -> str:
    """Return the version of the compiler for SM 90, which decides the counts."""
    return nvrtc.load("sm_90").version_text


def fingerprint() -> str:
    """Return the SHA-256 of the sources of kernels for decoding."""
    source, headers = sources.translation_unit([])
    others = ("gemm", "exact", "sampling")
    return sources.fingerprint(source, {n: t for n, t in headers.items() if not any(part in n for part in others)})


def write(gpus: Sequence[cost_time.GpuModel], part: str = "now") -> None:
    """Count for devices; write the JSON and the page after each."""
    keys = dict.fromkeys(device_key(gpu.sm, gpu.multiprocessors) for gpu in gpus)
    for key in keys:
        gpu = next(gpu for gpu in gpus if device_key(gpu.sm, gpu.multiprocessors) == key)
        found = {m: {k: counted(m, k, gpu.sm, gpu.multiprocessors) for k in KINDS} for m in MODELS}
        document = json.loads(JSON.read_text(encoding="utf-8"))
        document["nvrtc"] = nvrtc_version()
        document["context"] = cost_counts.CONTEXT
        document["memory"] = {m: {k: cost_counts.memory(m, k) for k in KINDS} for m in MODELS}
        document[part][key] = found
        if part == "now":
            document["sources"][key] = fingerprint()
        save(document)
        print(f"counted: {key}", flush=True)


def save(document: Any) -> None:
    """Write the JSON, with a line for each launch, and the page."""
    text = json.dumps(document, indent=1, sort_keys=True)
    text = re.sub(r"\{\n\s+(\"before\": \d[^{}]*?)\n\s+\}", lambda m: "{" + re.sub(r"\n\s+", " ", m[1]) + "}", text)
    JSON.write_text(text + "\n", encoding="utf-8")
    if PAGE.exists():
        PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8"), document), encoding="utf-8")


def main() -> int:
    """Print, write or check what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", default="", help="part of a kernel's name")
    parser.add_argument("--model", action="append", choices=list(PUBLISHED))
    parser.add_argument("--kind", action="append", choices=KINDS)
    parser.add_argument("--sm", type=int, default=90)
    parser.add_argument("--multiprocessors", type=int, default=132)
    parser.add_argument("--blocks", type=int, default=3, help="blocks of each launch that are executed")
    parser.add_argument("--lines", action="store_true", help="print instructions by source line")
    parser.add_argument("--sass", action="store_true", help="print the executed code")
    parser.add_argument("--write", action="store_true", help="count for --device; write the JSON and the page")
    parser.add_argument("--before", action="store_true", help="with --write: as the counts before the last changes")
    parser.add_argument("--device", action="append", help="with --write: of `GPUS` those with this in their name")
    parser.add_argument("--check", action="store_true", help="exit code 1 if the page is not what the JSON says")
    given = parser.parse_args()
    if given.check:
        text = PAGE.read_text(encoding="utf-8")
        same = rewritten(text, json.loads(JSON.read_text(encoding="utf-8"))) == text
        print("the page is what the JSON says" if same else "the page differs: run with --write")
        return int(not same)
    if given.write:
        gpus = [gpu for gpu in GPUS if not given.device or any(part in gpu.name for part in given.device)]
        write(gpus, "before" if given.before else "now")
        return 0
    for model in given.model or MODELS:
        for kind in given.kind or KINDS:
            step = plan(model, kind, sm=given.sm, multiprocessors=given.multiprocessors)
            if not any(given.kernel in launch.kernel for launch in step.launches):
                continue
            print(f"{model} {kind}: {len(step.launches)} launches a token\n{HEADER}")
            lines = given.lines or given.sass
            for one in counts_of(step, given.sm, kernel=given.kernel, blocks=given.blocks, lines=lines):
                print(row(one.counts), flush=True)
                if given.lines:
                    print_lines(one)
                if given.sass:
                    print_sass(one)
    return 0


if __name__ == "__main__":
    sys.exit(main())
