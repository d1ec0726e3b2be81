"""Does `edgelm-parity`, the program for devices without Python, say what `edgelm parity` says, with its exit codes?"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import LIBRARY, ROOT, onnxruntime

from edgelm.cli.parity import summary
from edgelm.parity.check import check_parity

PROGRAM = LIBRARY.with_name("edgelm-parity")


def run(*arguments: object, status: int, **environment: str) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [PROGRAM, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "EDGELM_ONNXRUNTIME": onnxruntime().decode(), **environment},
    )
    assert result.returncode == status, result.stderr or result.stdout
    return result


def lines(text: str) -> list[str]:
    """The lines of a summary but for the speed, and without the hint to an option that the program does not have."""
    return [line.removesuffix("; --verbose lists them") for line in text.splitlines() if line[6:11] != "speed"]


@pytest.fixture(scope="module")
def olmoe(tiny_bundle: Callable[[str, str, str], Path]) -> Path:
    return tiny_bundle("olmoe", "int4", "native")


def test_it_prints_the_summary_of_python_and_writes_the_report(olmoe: Path, tmp_path: Path) -> None:
    printed = run(olmoe, "--threads", 2, "--json", tmp_path / "report.json", status=0)
    assert printed.stderr == ""
    assert lines(printed.stdout) == lines(summary(check_parity(olmoe, threads=2)))
    (speed,) = (line for line in printed.stdout.splitlines() if line[6:11] == "speed")
    assert "(onnxruntime-cpu, 2 threads)" in speed
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["passed"]
    assert report["format"] == "edgelm-parity"


def test_a_damaged_bundle_fails_and_its_layer_is_named(olmoe: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    runpy.run_path(str(ROOT / "examples" / "damage.py"))["damage"](olmoe, damaged, 2, 7)
    printed = run(damaged, "--json", tmp_path / "report.json", status=1)
    first = printed.stdout.splitlines()[0]
    assert first.endswith("NOT compute the same model as the reference: it first differs in layer 2, expert 7.")
    assert lines(printed.stdout) == lines(summary(check_parity(damaged)))
    assert not json.loads((tmp_path / "report.json").read_text())["passed"]


def test_what_comes_from_the_bundle_cannot_steer_the_terminal(olmoe: Path, tmp_path: Path) -> None:
    named = tmp_path / "bundle"
    named.mkdir()
    for path in olmoe.rglob("*"):
        if path.is_file():
            (named / path.relative_to(olmoe)).parent.mkdir(parents=True, exist_ok=True)
            os.link(path, named / path.relative_to(olmoe))
    manifest = json.loads((named / "manifest.json").read_text())
    manifest["files"]["a\x1b[31m\x9b\n.txt"] = {"size": 1, "sha256": "0" * 64}
    (named / "manifest.json").unlink()
    (named / "manifest.json").write_text(json.dumps(manifest))
    (named / "a\x1b[31m\x9b\n.txt").write_text("x")
    printed = run(named, "--threads", 2, status=1)
    assert "a?[31m??.txt" in printed.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "BUNDLE is missing"),
        (["a", "b"], "more than one bundle: b"),
        (["a", "--fast"], "no such option: --fast"),
        (["a", "--json"], "a value is missing after --json"),
        (["a", "--threads", "two"], "--threads takes a number of CPU threads, not two"),
        (["a", "--threads", "0"], "--threads takes a number of CPU threads, not 0"),
    ],
)
def test_wrong_usage_is_told(arguments: list[str], said: str) -> None:
    printed = run(*arguments, status=2)
    assert printed.stdout == ""
    assert printed.stderr.splitlines()[-1].startswith("edgelm-parity: error: ")
    assert said in printed.stderr.splitlines()[-1]


def test_errors_are_one_line_that_names_what_is_wrong(olmoe: Path, tmp_path: Path) -> None:
    told = run(tmp_path / "nowhere", status=1).stderr
    assert told.startswith(f"edgelm-parity: error: {tmp_path}/nowhere does not exist")
    assert len(told.splitlines()) == 1
    assert "int3" in run(olmoe, "--kv", "int3", status=2).stderr
    told = run(olmoe, "--onnxruntime", tmp_path / "none.so", status=1).stderr
    assert "none.so" in told
    told = run(olmoe, "--threads", 2, "--json", tmp_path / "none" / "report.json", status=1).stderr
    assert told == f"edgelm-parity: error: cannot write {tmp_path}/none/report.json\n"


def test_help_and_version_are_no_errors() -> None:
    assert run("--help", status=0).stdout.startswith("usage: edgelm-parity BUNDLE [--json FILE]")
    assert run("--version", status=0).stdout.startswith("edgelm-parity 0.")
