"""Do the files, make targets and commits that CONTRIBUTING.md names exist?"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FIRST_VERSION = "e40b653"
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
SPANS = re.findall(r"`([^`\n]+)`", PAGE)
MAPPED = ("edgelm", "quant", "export", "runtimes/csrc", "runtimes")
"""Folders whose sub-folders the map lists by their names alone."""


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def test_the_files_that_it_names_exist() -> None:
    paths = [span for span in SPANS if re.fullmatch(r"\.?[\w*]+(/[\w.*-]+)*/?", span) and "/" in span]
    paths = [path for path in paths if "NAME" not in path and "VERB" not in path]
    assert len(paths) > 40
    missing = [path for path in paths if not any(list(ROOT.glob(f"{top}/{path}")) for top in (".", *MAPPED))]
    assert missing == []


def test_the_make_targets_that_it_names_exist() -> None:
    targets = re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"\bmake ([a-z-]+)\b", PAGE)
    assert {"demo", "test", "docs", "release"} <= set(named)
    assert set(named) <= set(targets)


def test_the_commits_that_it_names_exist() -> None:
    if not (ROOT / ".git").exists() or git("cat-file", "-t", FIRST_VERSION) != "commit":
        pytest.skip("this copy does not have the whole history")
    commits = re.findall(r"\b[0-9a-f]{7}\b", PAGE)
    assert len(commits) >= 10
    for commit in commits:
        assert git("cat-file", "-t", commit) == "commit"
