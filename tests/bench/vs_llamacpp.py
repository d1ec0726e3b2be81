"""Our bundles beside llama.cpp on this machine, in one run: export, load, memory, prefill and decode.

    python tests/bench/vs_llamacpp.py --checkpoint olmoe=DIR --checkpoint fox=DIR --work DIR \\
        [--recipe int4 --recipe int8] [--peer-python PYTHON] [--rounds 5] [--out results.json]

For each checkpoint and recipe: exports in a process of its own (its time and peak memory are the table's), checks
parity and that the peer computes the same model, then times both in turns: ours, theirs, ours, theirs. The peer is
timed with flash attention on and off. Bandwidth is measured in the same run. A table for people, one JSON line last.

`--peer-python` is an interpreter that has llama-cpp-python and gguf; without it (and without them here) only our
figures are taken. Run it on a quiet machine: llama.cpp halves its speed when another process takes a core.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import edgelm
from edgelm import devices
from edgelm.benchmark import bytes_per_token, read_bandwidth
from edgelm.bundle import Bundle

HERE = Path(__file__).parent
FILE_TYPES = {"int4": "Q4_0", "int8": "Q8_0"}
PROMPT, NEW = 512, 64


class Peer:
    """The worker process."""

    def __init__(self, python: str) -> None:
        package = Path(edgelm.__file__).parents[1]
        environment = {**os.environ, "PYTHONPATH": f"{package}{os.pathsep}{HERE}"}
        self.process = subprocess.Popen(
            [python, str(HERE / "llamacpp_worker.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, env=environment,
        )  # fmt: skip

    def __call__(self, do: str, **arguments: Any) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the peer ended with code {self.process.wait()} in {do}")
        result: dict[str, Any] = json.loads(line)
        return result

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def export(checkpoint: Path, bundle: Path, recipe: str) -> dict[str, float]:
    """Seconds and peak resident bytes of `edgelm export` in its own process."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "edgelm", "export", str(checkpoint), "-o", str(bundle), "--recipe", recipe,
         "--overwrite"],
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    peak = 0
    # Not wait4's figure: that counts what this process held when it forked.
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak = max(peak, *(int(kib) for kib in re.findall(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)), 0)
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"export of {checkpoint} failed: run `edgelm export {checkpoint} -o {bundle}` to see why")
    return {"seconds": time.perf_counter() - start, "peak": peak * 1024}


def measure(
    name: str, checkpoint: Path, recipe: str, work: Path, peer_python: str | None, rounds: int, threads: int
) -> dict[str, Any]:
    """All figures of one checkpoint under one recipe."""
    path = work / f"{name}-{recipe}"
    result: dict[str, Any] = {
        "model": name,
        "recipe": recipe,
        "threads": threads,
        "export": export(checkpoint, path, recipe),
    }
    report = edgelm.check_parity(path, threads=threads)
    if not report.passed:
        raise SystemExit(f"{path} fails parity: nothing is timed; run `edgelm parity {path}`")
    rng = np.random.default_rng(0)
    manifest = Bundle.open(path).manifest
    tokens = rng.integers(10, min(50000, manifest.model.vocab_size), PROMPT).tolist()
    new = rng.integers(10, min(50000, manifest.model.vocab_size), NEW).tolist()
    peers = {}
    peer = Peer(peer_python) if peer_python else None
    if peer:
        gguf = work / f"{name}-{FILE_TYPES[recipe]}.gguf"
        made = peer("prepare", checkpoint=str(checkpoint), gguf=str(gguf), file_type=FILE_TYPES[recipe])
        result["peer_bytes"] = made["bytes"]
        peer.close()
        for flash in (True, False):
            worker = Peer(peer_python or "")
            loaded = worker("load", gguf=str(gguf), threads=threads, context=1024, flash=flash)
            peers[f"llama.cpp fa={int(flash)}"] = worker
            result["peer_version"] = loaded["version"]
    before = devices.resident_memory()[0] or 0
    start = time.perf_counter()
    model = edgelm.load(path, threads=threads, context_length=1024)
    result["load_seconds"] = time.perf_counter() - start
    runtime = model.runtime
    result["bytes"] = Bundle.open(path).size
    for label, worker in peers.items():
        theirs = np.asarray(worker("logits", tokens=tokens[:64])["logits"])
        ours = runtime.prefill(tokens[:64]).astype(np.float64)
        runtime.reset()
        result[f"logits correlation, {label}"] = float(np.corrcoef(ours, theirs)[0, 1])
        if result[f"logits correlation, {label}"] < 0.8:
            raise SystemExit(
                f"{label} does not compute the same model: correlation {np.corrcoef(ours, theirs)[0, 1]:.3f}"
            )
    times: dict[str, dict[str, list[float]]] = {n: {"prefill": [], "decode": []} for n in ("ours", *peers)}
    for _ in range(rounds):
        for label in times:
            if label == "ours":
                runtime.reset()
                start = time.perf_counter()
                runtime.prefill(tokens)
                prefill = time.perf_counter() - start
                start = time.perf_counter()
                for token in new:
                    runtime.decode(token)
                decode = time.perf_counter() - start
                result["resident"] = (devices.resident_memory()[0] or 0) - before
            else:
                prefill = peers[label]("prefill", tokens=tokens)["seconds"]
                answer = peers[label]("decode", tokens=new)
                decode, result[f"resident, {label}"] = answer["seconds"], answer["resident"]
            times[label]["prefill"].append(PROMPT / prefill)
            times[label]["decode"].append(NEW / decode)
    model.close()
    for worker in peers.values():
        worker.close()
    bandwidth = read_bandwidth(threads)
    result["bandwidth"] = bandwidth
    result["share"] = (
        statistics.median(times["ours"]["decode"]) * bytes_per_token(manifest, PROMPT + NEW / 2) / bandwidth
    )
    result["tokens_per_second"] = times
    result["parity"] = {"kl_mean": report.kl_mean, "passed": report.passed}
    return result


def show(result: dict[str, Any]) -> None:
    """The figures of one checkpoint and recipe, for people."""
    print(f"\n{result['model']} {result['recipe']}, {result['threads']} threads")
    seconds, peak = result["export"]["seconds"], result["export"]["peak"]
    resident = result["resident"] / 1e9
    print(f"  export {seconds:.0f} s, peak {peak / 2**30:.2f} GiB; bundle {result['bytes'] / 1e9:.2f} GB")
    print(f"  load {result['load_seconds']:.1f} s, resident {resident:.2f} GB with the cache of 1024 tokens")
    for label, figures in result["tokens_per_second"].items():
        for kind, runs in figures.items():
            middle = statistics.median(runs)
            print(f"  {label:>16} {kind:<8} {middle:8.1f} tokens/s  ({min(runs):.1f} to {max(runs):.1f})")
    print(f"  decode reads {result['share']:.0%} of {result['bandwidth'] / 1e9:.1f} GB/s measured")


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", action="append", required=True, metavar="NAME=DIR")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--recipe", action="append", choices=list(FILE_TYPES))
    parser.add_argument("--peer-python")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=devices.allowed_cores())
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    peer_python = options.peer_python
    if peer_python is None and importlib.util.find_spec("llama_cpp") and importlib.util.find_spec("gguf"):
        peer_python = sys.executable
    options.work.mkdir(parents=True, exist_ok=True)
    print(f"{devices.describe().cpu}, {options.threads} threads, load average {os.getloadavg()[0]:.2f}")
    results = []
    for pair in options.checkpoint:
        name, _, folder = pair.partition("=")
        for recipe in options.recipe or list(FILE_TYPES):
            results.append(
                measure(name, Path(folder), recipe, options.work, peer_python, options.rounds, options.threads)
            )
            show(results[-1])
    line = json.dumps(results)
    if options.out:
        options.out.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
