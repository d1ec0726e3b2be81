"""Do the files of .github and the hooks name commands that exist?"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from packaging.requirements import Requirement

from edgelm.cli.main import cli

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")


def read(path: Path) -> dict[Any, Any]:
    content = yaml.safe_load(path.read_text())
    assert isinstance(content, dict)
    return content


def targets() -> set[str]:
    """Targets of the Makefile."""
    return set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))


def check_commands(script: str) -> None:
    """Every make target and every script of the repository in a piece of shell exists."""
    for target in re.findall(r"\bmake ((?:--\S+ )*)([\w-]+)", script):
        assert target[1] in targets(), script
    for name in re.findall(r"(?<![\w/])(\.(?:ci|github)/\S+)", script):
        assert os.access(ROOT / name, os.X_OK), name


def steps(workflow: dict[Any, Any]) -> Iterator[dict[str, Any]]:
    for job in workflow["jobs"].values():
        yield from job.get("steps", [])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_runs_what_exists_with_few_rights_and_an_end(path: Path) -> None:
    workflow = read(path)
    assert workflow[True]  # YAML 1.1 reads the key `on` so
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        if "uses" in job:
            assert (ROOT / job["uses"]).is_file()
        else:
            assert job["timeout-minutes"] <= 120
        assert set(job.get("needs", "").split()) <= set(workflow["jobs"])
    for step in steps(workflow):
        assert ("run" in step) != ("uses" in step)
        check_commands(step.get("run", ""))
        if "uses" in step:
            assert re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"])


def test_the_checks_of_ci_are_those_of_a_checkout() -> None:
    assert {step.get("run") for step in steps(read(ROOT / ".github" / "workflows" / "ci.yml"))} >= {".ci/run"}
    assert {step.get("run") for step in steps(read(ROOT / ".github" / "workflows" / "docs.yml"))} >= {"make docs"}
    check_commands((ROOT / ".ci" / "run").read_text().rpartition("\n\n")[2])


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_an_issue_form_asks_for_commands_that_exist(path: Path) -> None:
    form = read(path)
    assert {"name", "description", "body"} <= set(form)
    fields = [field["id"] for field in form["body"]]
    assert len(set(fields)) == len(fields)
    for command in re.findall(r"`edgelm ([^`]+)`", path.read_text()):
        options = re.findall(r"--[\w-]+", command)
        verb = next(word for word in command.split() if not word.startswith("-"))
        found = cli if verb.isupper() else cli.get_command(click.Context(cli), verb)
        assert found is not None, command
        assert set(options) <= {name for parameter in found.params for name in parameter.opts}, command


def test_a_bug_report_has_what_the_maintainers_need() -> None:
    text = (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text()
    assert "edgelm doctor" in text
    assert "edgelm parity BUNDLE --json" in text


def test_the_hooks_before_a_commit_run_pinned_tools_of_the_checkout() -> None:
    development = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["dev"]
    installed = {Requirement(text).name for text in development}
    (repository,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"  # nothing is downloaded
    for hook in repository["hooks"]:
        assert hook["language"] == "system"
        check_commands(hook["entry"])
        tool = re.match(r"\.venv/bin/([\w-]+)", hook["entry"])
        assert hook["entry"].startswith("make ") or (tool and tool[1] in installed), hook["entry"]
