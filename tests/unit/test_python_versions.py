"""Does the code work on Python 3.10, which JetPack 6 has, and do requirements and hints say what needs a newer one?

`make python310` runs bundles and the tests of the GPU kernels on a real Python 3.10.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from edgelm import installing

ROOT = Path(__file__).parents[2]
PACKAGES = ("edgelm", "export", "quant", "runtimes")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FOR_TYPE_CHECKERS = ("Self", "Unpack")


def test_no_code_needs_a_newer_python() -> None:
    excluded = [part for name in FOR_TYPE_CHECKERS for part in ("--exclude", f"typing.{name}")]
    command = [sys.executable, "-c", "from vermin.main import main; main()"]
    options = ["--no-tips", "--eval-annotations", "--violations", "--processes=1", *excluded]
    done = subprocess.run(
        [*command, "--target=3.10-", *options, *PACKAGES], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Minimum required versions: 3.10" in done.stdout


@pytest.mark.parametrize("package", PACKAGES)
def test_types_of_newer_pythons_are_imported_for_type_checkers_only(package: str) -> None:
    for file in (ROOT / package).rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"), feature_version=(3, 10))
        guarded = {
            inner
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "typing":
                newer = {alias.name for alias in node.names} & set(FOR_TYPE_CHECKERS)
                assert not newer or node in guarded, f"{file}: {newer}"


def needs(requirement: str) -> bool:
    """Whether a requirement is only for Python 3.11 or newer."""
    marker = Requirement(requirement).marker
    return marker is not None and not marker.evaluate({"python_version": "3.10", "extra": ""})


def test_extras_whose_packages_lack_wheels_for_python_3_10_have_markers_and_hints() -> None:
    assert PROJECT["requires-python"] == ">=3.10"
    marked = {extra for extra, found in PROJECT["optional-dependencies"].items() if any(map(needs, found))}
    assert marked == {"cpu", "cuda"}
    assert set(installing._NEWER_PYTHON) == marked | {"dev"}
    assert not any(needs(requirement) for requirement in PROJECT["dependencies"])


def test_a_hint_asks_for_a_newer_python_where_an_extra_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = {extra: installing.install_hint(extra) for extra in ("cpu", "tensorrt")}
    monkeypatch.setattr(sys, "version_info", (3, 10, 13, "final", 0))
    assert installing.install_hint("cpu") == f"this is Python 3.10; with Python 3.11 or newer: {plain['cpu']}"
    assert installing.install_hint("tensorrt") == plain["tensorrt"]
