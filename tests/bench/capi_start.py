"""How long do libedgelm and Python take from the start of a process to the first token, and how much memory?

    python tests/bench/capi_start.py BUNDLE [--library build/csrc] [--onnxruntime PATH] [--repeat 9] [--tokens 64]
        [--realtime]

Each repetition starts a C program and a Python process, in turn; the first one alternates. Both tokenise the same
prompt and decode greedily. The weights are in the page cache: a run of each comes first, whose tokens must be equal.
Prints medians and the range of the repetitions, and one JSON line last. Nothing else may run: the load is printed.
With --realtime (as root) other programs have to wait for those that are measured.

Rows:
    main     from `main`, for Python from the first line of the script, to the first token
    process  from the start of the process to the first token
    opened   from `main` until the bundle is open
    prefill  the prompt's computation
    decode   tokens per second
    memory   resident after the last token: anonymous, and of files (mapped weights and libraries)
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[2]
PROMPT = "The capital of France is Paris, and the"
GOAL = 0.25
"""Seconds from `main` to the first token of OLMoE-1B-7B in int4, on 2 cores."""


def python_worker(bundle: str, tokens: int, prompt: str) -> None:
    """Do what capi_start.c does."""
    start = time.monotonic()
    import edgelm

    model = edgelm.load(bundle)
    opened = time.monotonic()
    found = model.generate(prompt, max_tokens=tokens)
    times = found.timings
    first = opened + times.time_to_first_token
    status = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE))
    result = {
        "opened": opened - start, "first": first - start, "clock": first,
        "prompt": times.prompt_tokens, "prefill": times.prefill_seconds,
        "decoded": times.decoded_tokens, "decode": times.decode_seconds,
        "anonymous": int(status["RssAnon"]) * 1024, "file": int(status["RssFile"]) * 1024,
        "tokens": list(found.tokens),
    }  # fmt: skip
    print(json.dumps(result))


def timed(command: list[str]) -> dict[str, Any]:
    """Run a worker; add the seconds from the start of its process to the first token."""
    start = time.monotonic()
    result: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return result | {"process": result["clock"] - start}


def compiled(library: Path, folder: Path) -> Path:
    """Compile capi_start.c against the library."""
    program = folder / "capi_start"
    include = ROOT / "runtimes" / "csrc" / "capi"
    links = [f"-L{library}", "-ledgelm", f"-Wl,-rpath,{library}"]
    source = str(Path(__file__).with_suffix(".c"))
    subprocess.run(
        ["cc", "-O2", "-std=gnu11", source, f"-I{include}", *links, "-o", str(program)],
        check=True,
    )
    return program


def default_onnxruntime() -> str:
    """The library in Python's package, whose pages Python itself does not share: it links its own."""
    import onnxruntime

    found = sorted(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.1*"))
    if not found:
        raise SystemExit("onnxruntime's package has no libonnxruntime.so: give --onnxruntime")
    return str(found[-1])


def values(results: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Return the rows of the table; memory in MB."""
    return {
        "main": [one["first"] for one in results],
        "process": [one["process"] for one in results],
        "opened": [one["opened"] for one in results],
        "prefill": [one["prefill"] for one in results],
        "decode": [one["decoded"] / one["decode"] if one["decode"] else 0.0 for one in results],
        "anonymous": [one["anonymous"] / 1e6 for one in results],
        "file": [one["file"] / 1e6 for one in results],
        "memory": [(one["anonymous"] + one["file"]) / 1e6 for one in results],
    }


def main() -> None:
    """Check, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--library", type=Path, default=ROOT / "build" / "csrc")
    parser.add_argument("--onnxruntime")
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--realtime", action="store_true", help="run under chrt -f")
    given = parser.parse_args()
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        program = compiled(given.library.resolve(), Path(folder))
        more = [given.bundle, given.onnxruntime or default_onnxruntime(), str(given.tokens), given.prompt]
        commands = {
            "c": [str(program), *more],
            "python": [sys.executable, __file__, "--worker", given.bundle, str(given.tokens), given.prompt],
        }
        if given.realtime:
            commands = {name: ["chrt", "-f", "20", *command] for name, command in commands.items()}
        first = {name: timed(command) for name, command in commands.items()}
        if first["c"]["tokens"] != first["python"]["tokens"]:
            raise SystemExit(f"the tokens differ: {first['c']['tokens']} and {first['python']['tokens']}")
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
        for number in range(given.repeat):
            for name in sorted(commands, reverse=number % 2 == 1):
                results[name].append(timed(commands[name]))
                time.sleep(0.1)
    rows = {name: values(found) for name, found in results.items()}
    print(
        f"{given.bundle}: {first['c']['prompt']} tokens of prompt, {len(first['c']['tokens'])} equal tokens generated"
    )
    way = ", real-time" if given.realtime else ""
    print(f"load average {before:.2f} before, {os.getloadavg()[0]:.2f} after; {given.repeat} repetitions{way}")
    table = {}
    for row in rows["c"]:
        cells = {
            name: {"median": median(of[row]), "least": min(of[row]), "most": max(of[row])} for name, of in rows.items()
        }
        table[row] = cells
        shown = [f"{one['median']:9.3f} ({one['least']:.3f} to {one['most']:.3f})" for one in cells.values()]
        print(f"{row:10}" + "".join(f"{cell:34}" for cell in shown))
    print(f"          C, then Python; goal: {GOAL} s from main to the first token")
    print(json.dumps({"bundle": given.bundle, "load": [before, os.getloadavg()[0]], "rows": table}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        python_worker(sys.argv[2], int(sys.argv[3]), sys.argv[4])
    else:
        main()
