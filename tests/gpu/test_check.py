"""Does the script for GPU machines run from an archive without EdgeLM installed, and stop all its processes?

`check.py --dry-run` runs every kind of command until it needs the driver. Measurements run to the end with the real
models' shapes on a device that computes nothing (tests/bench/gpu_dry.py).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import check_run
import check_steps
import pytest
from check_run import Command, Outcome, Runner, Step

from edgelm.runtimes.cuda import planning
from edgelm.runtimes.cuda.kernels import nvrtc, sources

ROOT = Path(__file__).parents[2]


def bare_python(folder: Path) -> Path:
    """Create a Python with this one's packages, but without EdgeLM and its import hook."""
    site = folder / "site"
    site.mkdir(parents=True)
    for base in (path for path in map(Path, sys.path) if path.name == "site-packages"):
        for path in base.iterdir():
            if "edgelm" not in path.name and path.suffix != ".pth" and not (site / path.name).is_symlink():
                (site / path.name).symlink_to(path)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    (own,) = (folder / "venv").glob("lib/python3*/site-packages")
    (own / "packages.pth").write_text(f"{site}\n")
    return folder / "venv" / "bin" / "python"


def archive(folder: Path) -> Path:
    """Copy the files that git tracks or would add."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


def kernels_of_nothing(folder: Path) -> None:
    """Write a folder as `--prepare` does, without code in the kernels: compiling has its own tests."""
    folder.mkdir(parents=True)
    shutil.copyfile(planning.library_path(), folder / planning.LIBRARY)
    names = sorted(sources.kernels())
    resources = {"registers": 8, "local_bytes": 0, "shared_bytes": 0, "argument_bytes": 8}
    images = {
        "sm_90": {
            "file": "sm_90.cubin",
            "nvrtc": [12, 6],
            "waits": names,
            "resources": dict.fromkeys(names, resources),
        },
        nvrtc.PTX_TARGET: {"file": "compute_80.ptx", "nvrtc": [12, 6], "waits": [], "resources": {}},
    }
    for image in images.values():
        (folder / str(image["file"])).write_bytes(b"\x7fELF")
    index = {
        "format": 2, "argument_bytes": dict.fromkeys(names, 8), "images": images,
        "source": sources.fingerprint(*sources.translation_unit(names)),
    }  # fmt: skip
    (folder / "kernels.json").write_text(json.dumps(index))


def test_every_command_runs_from_an_archive_up_to_the_driver(tmp_path: Path) -> None:
    python, root = bare_python(tmp_path / "python"), archive(tmp_path / "archive")
    alone = subprocess.run([python, "-P", "-c", "import edgelm"], capture_output=True, text=True, check=False)
    assert "No module named 'edgelm'" in alone.stderr, "the Python of this test has EdgeLM"
    kernels_of_nothing(root / "build" / "gpu-kernels")
    out = tmp_path / "out"
    # As on a machine with a GPU: in the root folder, whose edgelm/ must not hide the import tree.
    call = [python, "tests/gpu/check.py", "--dry-run", "--out", out]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "EDGELM"))}
    done = subprocess.run(call, cwd=root, env=kept, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "build/gpu-kernels: used" in done.stdout
    assert {path.name for path in out.iterdir()} == {"check.log", "summary.json"}
    steps = {step["name"]: step for step in json.loads((out / "summary.json").read_text())["steps"]}
    assert list(steps) == [
        "device", "driver", "kernels", "speed", "kernel speed", "parity", "transformers", "pdl", "sanitizer", "ncu",
    ]  # fmt: skip
    results = {label: result for step in steps.values() for label, result in step["results"].items()}
    reached = {label for label, result in results.items() if result == check_run.NO_DRIVER}
    for name in check_steps.KERNEL_TESTS:
        assert f"pytest test_{name}.py" in reached
    assert {"gpu_kernels.py --quick --repeat 10", "edgelm parity fox-tiny-none"} <= reached
    passed = [label for label, result in results.items() if result == "passed"]
    for start in (
        "gpu_models.py --model olmoe-1b-7b", "gpu_models.py --model fox-1-1.6b", "edgelm export fox-tiny",
        "gpu_peer.py --model fox-1-1.6b", "gpu_steps.py pdl", "compute-sanitizer memcheck gpu_steps.py tiny",
        "ncu gpu_steps.py profile",
    ):  # fmt: skip
        assert any(label.startswith(start) for label in passed), (start, passed)
    assert not any(path.name == "edgelm" for path in root.glob("build/*")), "build/ has a folder named edgelm"


def test_a_stopped_command_is_stopped_with_its_children(tmp_path: Path) -> None:
    (tmp_path / "child.py").write_text("import time; time.sleep(1); open('late', 'w'); time.sleep(60)")
    (tmp_path / "parent.py").write_text("import subprocess, sys; subprocess.run([sys.executable, 'child.py'])")
    start = time.monotonic()
    with (tmp_path / "log").open("w") as log:
        runner = Runner(log, tmp_path, dict(os.environ), start + 60, dry=False)
        hanging, fine = Command((sys.executable, "parent.py")), Command((sys.executable, "-c", "print('well')"))
        outcome = runner.run(Step("s", 60, [[hanging, fine], [fine]], each=0.5))
    assert outcome.result.startswith("FAILED 1 of 2: parent.py: stopped after ")
    time.sleep(max(0.0, start + 2 - time.monotonic()))
    assert not (tmp_path / "late").exists()
    assert (tmp_path / "log").read_text().count("well\n[passed, ") == 1, "a chain ends at a failure"


def test_figures_are_collected_and_a_missing_tool_is_not_a_failure(tmp_path: Path) -> None:
    rows = json.dumps({"rows": [{"name": "decode", "median_s": 0.5, "rate": 2.0}]})
    with (tmp_path / "log").open("w") as log:
        runner = Runner(log, tmp_path, dict(os.environ), time.monotonic() + 60, dry=False)
        made = [Command((sys.executable, "-c", f"print({rows!r}); print('{{')"))]
        missing = [Command((sys.executable, "-c", "1 / 0"), ("no-such-profiler", "--all"))]
        failing = [Command((sys.executable, "-c", "1 / 0"))]
        outcome = runner.run(Step("s", 60, [made, missing]))
        failed = runner.run(Step("t", 60, [failing, made]))
    assert outcome.rows == {"decode": {"name": "decode", "median_s": 0.5, "rate": 2.0}}
    assert outcome.fine
    assert outcome.result == "passed, not on this machine"
    assert not failed.fine
    assert failed.result.startswith("FAILED 1 of 2")
    assert "ZeroDivisionError" in failed.tail


@pytest.mark.parametrize("name", ["olmoe-1b-7b", "fox-1-1.6b"])
def test_measurements_stay_within_the_models_positions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "bench"))
    import gpu_models

    config = gpu_models.config_of(name)
    at = gpu_models.positions(config)
    assert at.context + at.steps <= at.long <= config["max_position_embeddings"]
    with pytest.raises(ValueError, match="max_position_embeddings is 60: too few tokens to time"):
        gpu_models.positions(config | {"max_position_embeddings": 60})


def test_a_steps_result_in_one_line() -> None:
    assert Outcome("s").result == "nothing to do"
    assert Outcome("s", results={"a": "passed", "b": "exit code 3"}).result == "FAILED 1 of 2: b: exit code 3"
