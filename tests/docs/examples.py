"""The examples in README and docs: finds them, runs them, compares what they print.

    python tests/docs/examples.py                 how many examples each page has
    python tests/docs/examples.py PAGE.md ...     run these pages, and say what differs

Examples are fenced blocks:

- ```console   `$ ` starts a command for bash; lines that end with a backslash go on. The lines after it are what it
               prints, on standard output or error; no lines: anything. A line `...` stands for any lines, and a
               line that ends with ` ...` is the start of one. Any number stands for any other, and spaces for spaces.
               The command must end with exit code 0.
- ```python    a program of its own, run by this Python. Printed text is not compared.

HTML comments before a block, which readers do not see, say what is special about it:

    <!-- not run: REASON -->       why this block cannot be run here
    <!-- exit: 1 -->               the exit code of its last command
    <!-- file: NAME -->            a file's contents: written, not run (any language)
    <!-- continue -->              Python that goes on from the page's block before
    <!-- setup: COMMAND -->        a command to run first; may be repeated
    <!-- with: NAME=VALUE ... -->  from here on run with VALUE in place of the word NAME, say a large model

A page runs in an empty folder, in its order, where `examples` is the one of this repository.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUN = ("console", "python")
LIMIT = 300
"""Seconds that one command may take."""

_FENCE = re.compile(r"^(?P<indent> *)(?P<fence>```+|~~~+) *(?P<language>[\w-]*)[^`]*$")
_COMMENT = re.compile(r"^\s*<!--\s*(not run|exit|file|setup|with|continue)(?::\s*(.*?))?\s*-->\s*$")
_EXPORT = re.compile(r"edgelm export examples/\S+ -o ([\w-]+)")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*(?:e[+-]?\d+)?")


class ExampleError(Exception):
    """An example is written wrongly, fails, or prints something else."""


@dataclass
class Block:
    """One fenced block: its language, first line's number, text, and the comments before it."""

    language: str
    line: int
    text: str
    not_run: str | None = None
    exit: int = 0
    file: str | None = None
    follows: bool = False
    setup: list[str] = field(default_factory=list)
    words: dict[str, str] = field(default_factory=dict)

    def commands(self) -> list[tuple[str, list[str]]]:
        """Of a console block: each command, and the lines that it is to print."""
        found: list[tuple[str, list[str]]] = []
        going_on = False
        for line in self.text.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            elif not found:
                raise ExampleError(f"line {self.line}: a console block starts with `$ `")
            elif going_on:
                found[-1] = (f"{found[-1][0]}\n{line}", [])
            else:
                found[-1][1].append(line)
                continue
            going_on = line.endswith("\\")
        return found

    def count(self) -> int:
        """Commands or programs in it that are run."""
        if self.not_run is not None or self.file is not None or self.language not in RUN:
            return 0
        return len(self.commands()) if self.language == "console" else 1


def pages() -> list[Path]:
    """README, the pages that stand beside it, the docs and the examples' pages."""
    found = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.md")]
    return sorted(found)


def blocks(page: Path) -> list[Block]:
    """The page's fenced blocks in order.

    Raises:
        ExampleError: a fence is not closed, or a comment precedes no block.
    """
    found: list[Block] = []
    words: dict[str, str] = {}
    notes: list[tuple[int, str, str]] = []
    lines = iter(enumerate(page.read_text(encoding="utf-8").splitlines(), 1))
    for number, line in lines:
        if comment := _COMMENT.match(line):
            notes.append((number, comment[1], comment[2] or ""))
            continue
        opened = _FENCE.match(line)
        if opened is None:
            if line.strip() and any(name != "with" for _, name, _ in notes):
                raise ExampleError(f"line {notes[0][0]}: this comment belongs before a fenced block")
            continue
        block = Block(opened["language"], number, "")
        inside = []
        for _, text in lines:
            if text.strip() == opened["fence"]:
                break
            inside.append(text.removeprefix(opened["indent"]))
        else:
            raise ExampleError(f"line {number}: this block is not closed")
        for at, name, value in notes:
            if name != "continue" and not value:
                raise ExampleError(f"line {at}: `{name}` needs a value")
            match name:
                case "not run":
                    block.not_run = value
                case "exit":
                    block.exit = int(value)
                case "file":
                    block.file = value
                case "continue":
                    block.follows = True
                case "setup":
                    block.setup.append(value)
                case "with":
                    words |= dict(pair.split("=", 1) for pair in value.split())
        notes = []
        block.text, block.words = "\n".join(inside), dict(words)
        found.append(block)
    return found


def prints(expected: list[str], printed: str) -> str | None:
    """The first expected line that does not stand in what was printed, in order; None if all do."""
    lines = [_plain(line) for line in printed.splitlines()]
    at, anywhere = 0, False
    for line in expected:
        if line.strip() == "...":
            anywhere = True
            continue
        wanted = _plain(line)
        if not wanted:
            continue
        while at < len(lines) and not lines[at]:
            at += 1
        if anywhere:
            while at < len(lines) and not _same(lines[at], wanted):
                at += 1
        if at >= len(lines) or not _same(lines[at], wanted):
            return line
        at, anywhere = at + 1, False
    return None


def _same(line: str, wanted: str) -> bool:
    start = wanted.removesuffix("...")
    return line == wanted if start == wanted else line.startswith(start.rstrip())


def _plain(line: str) -> str:
    return " ".join(_NUMBER.sub("#", line).split())


def _replace(text: str, words: dict[str, str]) -> str:
    for name, value in words.items():
        text = re.sub(rf"(?<![\w/.-]){re.escape(name)}(?![\w/-])", lambda _, value=value: value, text)
    return text


def run_page(page: Path, folder: Path, exports: Path | None = None) -> int:
    """Run the page's examples in the folder; returns how many.

    Args:
        page: its file.
        folder: an empty folder.
        exports: folder that keeps what `setup: edgelm export` writes, for the pages that start with the same export.

    Raises:
        ExampleError: an example fails or prints something else; says where, what it printed and what was expected.
    """
    examples = folder / "examples"
    if not examples.exists():
        examples.symlink_to(ROOT / "examples")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("EDGELM", "PYTEST"))}
    environment = kept | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "NO_COLOR": "1", "COLUMNS": "120",
        "OMP_WAIT_POLICY": "passive",  # threads that spin take the CPU from the tests beside
    }  # fmt: skip
    ran, program = 0, ""
    for block in blocks(page):
        for command in block.setup:
            call = _replace(command, block.words)
            with _kept_export(call, folder, exports) as done:
                if not done:
                    _run(["bash", "-c", call], folder, environment, page, block, command, 0)
        if block.file is not None:
            (folder / block.file).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.file).write_text(block.text + "\n", encoding="utf-8")
        if not block.count():
            continue
        if block.language == "python":
            program = f"{program}\n{block.text}" if block.follows else block.text
            source = _replace(program, block.words)
            _run([sys.executable, "-c", source], folder, environment, page, block, "python", block.exit)
            ran += 1
            continue
        commands = block.commands()
        for number, (command, expected) in enumerate(commands):
            code = block.exit if number == len(commands) - 1 else 0
            full = ["bash", "-o", "pipefail", "-c", _replace(command, block.words)]
            printed = _run(full, folder, environment, page, block, command, code)
            missing = prints([_replace(line, block.words) for line in expected], printed)
            if missing is not None:
                raise ExampleError(
                    f"{page.relative_to(ROOT)}:{block.line}: `{command}` does not print this line where the page has "
                    f"it:\n  {missing}\nIt prints:\n{printed}"
                )
            ran += 1
    return ran


@contextlib.contextmanager
def _kept_export(call: str, folder: Path, exports: Path | None) -> Iterator[bool]:
    """Yield whether the bundle that the command makes was copied from `exports`; otherwise copy it there afterwards."""
    export = _EXPORT.fullmatch(call)
    if export is None or exports is None:
        yield False
        return
    bundle, kept = folder / export[1], exports / urllib.parse.quote(call, safe="")
    if kept.exists():
        shutil.copytree(kept, bundle)
        yield True
        return
    yield False
    shutil.copytree(bundle, kept)


def _run(
    call: list[str], folder: Path, environment: dict[str, str], page: Path, block: Block, shown: str, code: int
) -> str:
    done = subprocess.run(
        call, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, timeout=LIMIT, check=False,
    )  # fmt: skip
    if done.returncode != code:
        raise ExampleError(
            f"{page.relative_to(ROOT)}:{block.line}: `{shown}` ended with exit code {done.returncode}, not {code}:\n"
            f"{done.stdout}"
        )
    return done.stdout


def main() -> None:
    """Count the examples, or run those of some pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", nargs="*", type=Path)
    arguments = parser.parse_args()
    total = skipped = 0
    for page in [path.resolve() for path in arguments.page] or pages():
        found = blocks(page)
        run = sum(block.count() for block in found)
        left = [block for block in found if block.not_run is not None]
        total, skipped = total + run, skipped + len(left)
        print(f"{run:4} run, {len(left):3} blocks not run  {page.relative_to(ROOT)}")
        if arguments.page:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    run_page(page, Path(folder))
                except ExampleError as error:
                    sys.exit(str(error))
    print(f"{total:4} run, {skipped:3} blocks not run")


if __name__ == "__main__":
    main()
