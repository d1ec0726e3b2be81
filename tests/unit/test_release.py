"""Can a release be made only when everything says the same version, and does its tag say what changed?"""

from __future__ import annotations

import os
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

import edgelm

ROOT = Path(__file__).parents[2]
SCRIPTS = (".github/release.sh", ".github/release_notes.sh")
FILES = ("CHANGELOG.md", "CITATION.cff", "pyproject.toml", "edgelm/version.py", *SCRIPTS)
VERSION = edgelm.__version__
SETTINGS = {
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
    **{f"GIT_{role}_{part}": "tests@localhost" for role in ("AUTHOR", "COMMITTER") for part in ("NAME", "EMAIL")},
}


def environment() -> dict[str, str]:
    """Without the variables that git sets for its hooks, which name the repository that is committed to."""
    return {name: value for name, value in os.environ.items() if not name.startswith("GIT_")} | SETTINGS


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment()).stdout


def release(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(folder / ".github" / "release.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment())


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A repository of the files that a release looks at."""
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    git(tmp_path, "init", "--quiet", "--initial-branch", "main")
    commit(tmp_path)
    return tmp_path


def commit(folder: Path) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "Change", "--allow-empty")


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_every_file_says_the_same_version() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == VERSION
    assert f"\nversion: {VERSION}\n" in (ROOT / "CITATION.cff").read_text()
    headings = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## [")]
    assert headings[0] == "## [Unreleased]"
    assert headings[1].startswith(f"## [{VERSION}] - ")


def test_a_release_is_an_annotated_tag_with_the_section_of_the_changelog(clone: Path) -> None:
    done = release(clone, VERSION)
    assert done.returncode == 0, done.stderr
    assert f"git push origin main v{VERSION}" in done.stdout
    assert git(clone, "cat-file", "-t", f"v{VERSION}") == "tag\n"
    message = git(clone, "tag", "--list", "--format=%(contents)", f"v{VERSION}")
    assert message.startswith(f"EdgeLM {VERSION}\n\n")
    section = (clone / "CHANGELOG.md").read_text().partition(f"## [{VERSION}]")[2].partition("\n## [")[0]
    assert message.partition("\n\n")[2].split() == section.partition("\n")[2].split()
    assert "\n### Added\n" in message


def test_the_notes_of_the_oldest_version_end_before_the_links(clone: Path) -> None:
    command = ["bash", str(clone / ".github" / "release_notes.sh"), "0.1.0"]
    notes = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "edgelm export" in notes
    assert "]: #" not in notes


def on_a_branch(clone: Path) -> None:
    git(clone, "switch", "--quiet", "--create", "feature")


def uncommitted(clone: Path) -> None:
    (clone / "new.py").touch()


def tagged(clone: Path) -> None:
    git(clone, "tag", f"v{VERSION}")


def other_wheel(clone: Path) -> None:
    replace(clone / "pyproject.toml", f'\nversion = "{VERSION}"', '\nversion = "9.9.9"')


def other_program(clone: Path) -> None:
    replace(clone / "edgelm" / "version.py", VERSION, "9.9.9")


def other_citation(clone: Path) -> None:
    replace(clone / "CITATION.cff", f"\nversion: {VERSION}", "\nversion: 9.9.9")


def no_section(clone: Path) -> None:
    replace(clone / "CHANGELOG.md", f"## [{VERSION}] - ", "## [9.9.9] - ")


@pytest.mark.parametrize(
    ("change", "committed", "reason"),
    [
        (on_a_branch, False, "releases are made on main, this is 'feature'"),
        (uncommitted, False, "there are uncommitted changes"),
        (tagged, False, f"the tag v{VERSION} exists"),
        (other_wheel, True, "pyproject.toml has another version"),
        (other_program, True, "edgelm/version.py has another version"),
        (other_citation, True, "CITATION.cff has another version"),
        (no_section, True, f"CHANGELOG.md says nothing about {VERSION}"),
    ],
)
def test_a_checkout_that_is_not_ready_is_refused_with_the_reason(
    clone: Path, change: Callable[[Path], None], committed: bool, reason: str
) -> None:
    change(clone)
    if committed:
        commit(clone)
    before = git(clone, "tag")
    done = release(clone, VERSION)
    assert done.returncode == 1
    assert f"No release: {reason}" in done.stderr
    assert git(clone, "tag") == before


@pytest.mark.parametrize("version", [(), ("",), ("v0.2.0",), ("0.2",), ("0.2.0 ",)])
def test_what_is_no_version_is_refused(clone: Path, version: tuple[str, ...]) -> None:
    done = release(clone, *version)
    assert done.returncode == 1
    assert "three numbers" in done.stderr
