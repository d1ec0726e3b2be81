"""Read and check the list of mutations, one TOML file per area."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CTEST = "ctest:"
_KEYS = {"file", "old", "new", "tests", "why"}


@dataclass(frozen=True)
class Mutation:
    """A deliberate mistake in a source file, and the tests of which at least one must fail."""

    area: str
    """Name of the TOML file without its suffix."""
    file: str
    """The source file, relative to the repository."""
    old: str
    """Text that occurs exactly once in it."""
    new: str
    tests: tuple[str, ...]
    """Files or node ids of pytest, or `ctest:NAME` for a C++ test (`ctest:attention`)."""
    why: str

    @property
    def compiled(self) -> bool:
        """Whether the libraries must be recompiled. The emulator compiles the CUDA sources itself."""
        return self.file.startswith("runtimes/csrc/") and not self.file.endswith(
            (".cuh", "/emulator.h", "/emulator_blocks.h")
        )

    def line(self, root: Path = ROOT) -> int:
        """Return the line of the file that is changed."""
        before, _, _ = (root / self.file).read_text(encoding="utf-8").partition(self.old)
        return before.count("\n") + 1

    def text(self, root: Path = ROOT) -> str:
        """Return the mutated text of the file.

        Raises:
            ValueError: the old text does not occur exactly once.
        """
        text = (root / self.file).read_text(encoding="utf-8")
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.file}: the old text occurs {count} times: {self.old!r}")
        return text.replace(self.old, self.new)


def read_mutations(folder: Path = HERE) -> tuple[Mutation, ...]:
    """Return all mutations, sorted by area.

    Raises:
        ValueError: a file has anything but [[mutation]] tables with the five keys.
    """
    found = []
    for path in sorted(folder.glob("*.toml")):
        document = tomllib.loads(path.read_text(encoding="utf-8"))
        for table in document.pop("mutation", []):
            if set(table) != _KEYS:
                raise ValueError(f"{path.name}: a mutation has the keys {sorted(_KEYS)}, not {sorted(table)}")
            found.append(Mutation(path.stem, **{**table, "tests": tuple(table["tests"])}))
        if document:
            raise ValueError(f"{path.name}: {next(iter(document))!r} is no [[mutation]]")
    return tuple(found)


def problems(mutation: Mutation, root: Path = ROOT) -> list[str]:
    """Return the reasons why a mutation cannot be applied; empty if it can."""
    found = []
    if not (root / mutation.file).is_file():
        return [f"{mutation.file}: there is no such file"]
    try:
        mutation.text(root)
    except ValueError as error:
        found.append(str(error))
    if mutation.old == mutation.new:
        found.append(f"{mutation.file}: old and new are the same: {mutation.old!r}")
    if not mutation.tests:
        found.append(f"{mutation.file}: no tests are named for {mutation.old!r}")
    found += [f"{mutation.file}: there is no test {test}" for test in mutation.tests if not _exists(test, root)]
    return found


def _exists(test: str, root: Path) -> bool:
    if test.startswith(CTEST):
        return (root / "runtimes/csrc/tests" / f"{test.removeprefix(CTEST)}_test.cc").is_file()
    name, *parts = test.split("[")[0].split("::")
    return all(part in _names(root / name) for part in parts) if (root / name).is_file() else False


@cache
def _names(path: Path) -> frozenset[str]:
    # By a pattern instead of a parser, since this runs in every test run.
    text = path.read_text(encoding="utf-8")
    return frozenset(re.findall(r"^\s*(?:async def|def|class) (\w+)", text, re.MULTILINE))
