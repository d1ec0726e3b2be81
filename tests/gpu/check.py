"""Runs all checks and measurements that need a GPU, in one call of under eight minutes.

    python tests/gpu/check.py --prepare build/gpu-kernels    # beforehand, on any machine: compile the kernels for it
    python tests/gpu/check.py --dry-run                      # beforehand: run every command until it needs the driver
    python tests/gpu/check.py --out FOLDER                   # on the machine with the GPU
    python tests/gpu/check.py --out FOLDER --second          # a second call there: PDL, sanitizer, profiler

For a machine with an NVIDIA GPU, its driver, and the packages torch, numpy, onnx, pytest, tokenizers, sentencepiece,
jinja2, click, rich and nvidia-cuda-nvrtc; transformers is timed if it is installed. EdgeLM itself is imported from this
checkout; the compiled library that plans launches comes with the kernels. Each command is a process with a time limit;
a failure does not stop the others, and a stopped command is stopped with its children. FOLDER gets two files: check.log
with all output, and summary.json. The end of the output has all figures and a table of the steps; it belongs in
docs/gpu/index.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import check_steps
from check_run import Outcome, Runner, Step
from check_steps import PYTHON, ROOT, SM

TREE = ROOT / "build" / "pyview"
PREPARED = ROOT / "build" / "gpu-kernels"
VARIABLE = "EDGELM_GPU_KERNELS"
LIBRARY, LIBRARY_VARIABLE = "libedgelm_plugins.so", "EDGELM_PLUGINS_LIBRARY"
_TAIL, _TAIL_OF_FAILURE = 500, 1500
_DRY_MINUTES = 60.0  # no GPU time is at stake, and the machine may be busy


def link_tree() -> None:
    """Create the import tree of a checkout from links: `export`, `quant` and `runtimes` are packages in `edgelm`."""
    package = TREE / "edgelm"
    package.mkdir(parents=True, exist_ok=True)
    wanted = {path.name: path for path in (ROOT / "edgelm").iterdir()}
    wanted |= {name: ROOT / name for name in ("export", "quant", "runtimes")}
    for link in package.iterdir():
        if link.is_symlink() and link.name not in wanted:
            link.unlink()
    for name, path in wanted.items():
        link = package / name
        if not link.exists() or link.resolve() != path.resolve():
            link.unlink(missing_ok=True)
            link.symlink_to(path)


def environment(work: Path, *, dry: bool) -> dict[str, str]:
    """Return the environment of all commands: the import tree comes first, and nothing depends on the user."""
    made = dict(
        os.environ, PYTHONPATH=_path(), PYTHONUNBUFFERED="1", EDGELM_TEST_GPU="1", NO_COLOR="1", COLUMNS="110",
        TERM="dumb", HF_HUB_OFFLINE="1", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", TMPDIR=str(work),
    )  # fmt: skip
    if dry:
        made["EDGELM_CUDA_DRIVER"] = str(work / "no-driver")
    return made


def prepare(folder: Path) -> int:
    """Compile every kernel for SM 90 into a folder, and copy the library that plans launches. Needs NVRTC and an
    installed EdgeLM, but no GPU."""
    # Without the import tree, which has no compiled parts.
    code = "from edgelm.runtimes.cuda.planning import library_path; print(library_path())"
    found = subprocess.run([PYTHON, "-P", "-c", code], capture_output=True, text=True, check=False)
    if found.returncode:
        print(f"{LIBRARY} is missing: make install\n{found.stderr}", file=sys.stderr)
        return 1
    library = found.stdout.strip()
    code = (
        "import sys; from pathlib import Path; from edgelm.runtimes.cuda.kernels import images as k, sources as s; "
        f"k.compile_bundle_kernels(sorted(s.kernels()), ({SM},), Path(sys.argv[1]), ptx=False)"
    )
    done = _python(code, str(folder.absolute()), **{LIBRARY_VARIABLE: library})
    if done.returncode == 0:
        shutil.copyfile(library, folder / LIBRARY)
        size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
        print(f"{folder}: every kernel for SM {SM} and {LIBRARY}, {size:.1f} MB")
    else:
        print(done.stderr, file=sys.stderr)
    return int(done.returncode != 0)


def prepared(folder: Path) -> dict[str, str]:
    """Return the variables by which EdgeLM uses a folder that `prepare` wrote. Prints what is used."""
    library = folder / LIBRARY
    if not library.is_file():
        print(f"{library} is not there, and all launches are planned by it: check.py --prepare makes it")
        return {}
    made = {LIBRARY_VARIABLE: str(library)}
    with_kernels = {**made, VARIABLE: str(folder)}
    done = _python("from edgelm.runtimes.cuda.kernels import images; images.prepared_kernels()", **with_kernels)
    said = done.stderr.strip().splitlines()[-1:]
    print(f"{folder}: {'used' if done.returncode == 0 else f'kernels not used ({said})'}", flush=True)
    return with_kernels if done.returncode == 0 else made


def _path() -> str:
    return os.pathsep.join(filter(None, (str(TREE), os.environ.get("PYTHONPATH"))))


def _python(code: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    made = dict(os.environ, PYTHONPATH=_path())
    made.pop(VARIABLE, None)
    made.update(variables)
    return subprocess.run(
        [PYTHON, "-P", "-c", code, *arguments], env=made, capture_output=True, text=True, check=False
    )  # fmt: skip


def show(outcomes: Sequence[Outcome]) -> None:
    """Print all figures and a table of the steps, at the end, since only the end of the output may be kept."""
    for outcome in outcomes:
        for name, row in outcome.rows.items():
            limit = row.get("of_bandwidth", row.get("of_matrix"))
            peer = f"  {row['times_peer']:.2f} x PyTorch" if "times_peer" in row else ""
            share = "" if limit is None else f"{limit:7.1%}"
            print(f"{name:62} {row['median_s'] * 1e3:9.3f} ms {row['rate']:10.1f}/s {share}{peer}")
    for outcome in outcomes:
        print(f"{outcome.name:13} {outcome.seconds:6.1f} s  {outcome.result[:400]}")


def run(steps: Sequence[Step], runner: Runner, summary: Path) -> list[Outcome]:
    """Run the steps. The summary is written after each, so that it exists whenever this is stopped."""
    outcomes: list[Outcome] = []
    for step in steps:
        outcome = runner.run(step)
        outcomes.append(outcome)
        tail = outcome.tail[-(_TAIL if outcome.fine else _TAIL_OF_FAILURE) :].strip()
        print(f"=== {outcome.name}: {outcome.result[:600]}, {outcome.seconds:.0f} s\n{tail}", flush=True)
        data: list[Mapping[str, Any]] = [asdict(one) for one in outcomes]
        summary.write_text(json.dumps({"steps": data}, indent=1) + "\n", encoding="utf-8")
    return outcomes


def _interrupted(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def main() -> int:
    """Run the steps; return 1 if one did not pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check")
    parser.add_argument("--minutes", type=float, default=8.0, help="time limit of everything (default 8)")
    parser.add_argument("--second", action="store_true", help="the steps of a second call")
    parser.add_argument("--only", action="append", metavar="STEP", help="names of steps of either call")
    parser.add_argument("--dry-run", action="store_true", help="run every kind of command until it needs the driver")
    parser.add_argument("--prepare", type=Path, metavar="FOLDER", help="compile the kernels into a folder, run nothing")
    parser.add_argument(
        "--kernels", type=Path, default=PREPARED, help="folder written by --prepare (default build/gpu-kernels)"
    )
    given = parser.parse_args()
    link_tree()
    if given.prepare is not None:
        return prepare(given.prepare)
    given.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * (_DRY_MINUTES if given.dry_run else given.minutes)
    signal.signal(signal.SIGTERM, _interrupted)
    with tempfile.TemporaryDirectory() as folder, (given.out / "check.log").open("w", encoding="utf-8") as log:
        work = Path(folder)
        calls = [check_steps.first(work), check_steps.second(work)]
        every = {step.name: step for steps in calls for step in steps}
        unknown = set(given.only or ()) - every.keys()
        if unknown:
            parser.error(f"there is no step {', '.join(sorted(unknown))}; there are: {', '.join(every)}")
        chosen = [every[name] for name in given.only] if given.only else calls[given.second]
        if given.dry_run and not given.only:
            chosen = list(every.values())
        made = environment(work, dry=given.dry_run) | prepared(given.kernels.absolute())
        runner = Runner(log, work, made, end, dry=given.dry_run)
        outcomes = run(chosen, runner, given.out / "summary.json")
    show(outcomes)
    return int(not all(outcome.fine for outcome in outcomes))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
