"""Runs steps of commands for `check.py`: with time limits, several at a time, and one log."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

PASSED, NO_DRIVER, NOT_HERE = "passed", "as far as the driver", "not on this machine"
FINE = (PASSED, NO_DRIVER, NOT_HERE)
"""Results that are not failures; the second occurs only in dry runs, which hide the driver."""
_DRY_AT_ONCE = 2
_TAIL = 4000
_DRIVER_MISSING = "no NVIDIA driver"
_TOOLS = ("/usr/local/cuda*/bin", "/usr/local/cuda*/compute-sanitizer", "/opt/nvidia/nsight-compute/*")


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        words: its program and arguments.
        tool: an NVIDIA tool with its options that runs the command; if it is missing, the command is skipped.
        environment: variables for this command only.
        dry: arguments that a dry run adds.
        once: a dry run skips it, since an earlier command differs only in numbers.
    """

    words: Sequence[str]
    tool: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    dry: Sequence[str] = ()
    once: bool = False


@dataclass(frozen=True)
class Step:
    """A group of commands.

    Attributes:
        name: name for output and for --only.
        seconds: time limit of the whole step.
        chains: independent sequences of commands; each ends with the first command that fails.
        at_once: number of chains that run at the same time.
        each: time limit of one command; 0: that of the step.
    """

    name: str
    seconds: int
    chains: Sequence[Sequence[Command]]
    at_once: int = 1
    each: int = 0


@dataclass
class Outcome:
    """The outcome of a step: results of its commands, seconds, end of the output of the failed ones or of all."""

    name: str
    seconds: float = 0.0
    results: dict[str, str] = field(default_factory=dict)
    tail: str = ""
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def fine(self) -> bool:
        """Whether no command failed or was stopped."""
        return all(result in FINE for result in self.results.values())

    @property
    def result(self) -> str:
        """A summary in one line."""
        bad = [f"{name}: {result}" for name, result in self.results.items() if result not in FINE]
        if bad:
            return f"FAILED {len(bad)} of {len(self.results)}: {'; '.join(bad)}"
        return ", ".join(dict.fromkeys(self.results.values())) or "nothing to do"


def find_tool(name: str) -> str | None:
    """Find a program on PATH or in the folders of CUDA's toolkit and profilers."""
    found = shutil.which(name)
    for pattern in _TOOLS if found is None else ():
        for folder in sorted(Path("/").glob(pattern[1:]), reverse=True):
            if os.access(folder / name, os.X_OK) and (folder / name).is_file():
                return str(folder / name)
    return found


class Runner:
    """Runs steps in order.

    Args:
        log: receives every command with its output, after it has ended.
        work: the working folder of commands; its subfolders must not look like packages.
        environment: variables of all commands.
        end: time at which everything must have ended, by `time.monotonic`.
        dry: dry run: add the commands' `dry` arguments, count a missing driver as success, use no limit but `end`.
    """

    def __init__(self, log: TextIO, work: Path, environment: Mapping[str, str], end: float, *, dry: bool) -> None:
        self._log, self._work, self._environment, self._end, self._dry = log, work, environment, end, dry
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopping = False
        self._count = 0

    def run(self, step: Step) -> Outcome:
        """Run a step until its end or limit. All its processes have ended when this returns."""
        outcome = Outcome(step.name)
        start = time.monotonic()
        end = self._end if self._dry else min(self._end, start + step.seconds)
        with ThreadPoolExecutor(_DRY_AT_ONCE if self._dry else step.at_once) as pool:
            futures = [pool.submit(self._chain, step, chain, end, outcome) for chain in step.chains]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                self.stop()
                raise
        outcome.seconds = time.monotonic() - start
        return outcome

    def stop(self) -> None:
        """Kill all running commands with their children, and start no more."""
        with self._lock:
            self._stopping = True
            running = list(self._running)
        for process in running:
            _kill(process)

    def _chain(self, step: Step, chain: Sequence[Command], end: float, outcome: Outcome) -> None:
        for command in chain:
            if self._dry and command.once:
                continue
            result, said = self._one(command, end, step.each)
            with self._lock:
                outcome.results[label(command)] = result
                if not self._dry:  # a dry run computes nothing, so its figures are meaningless
                    outcome.rows.update(rows_in(said))
                if result not in FINE or outcome.fine:
                    outcome.tail = said[-_TAIL:]
            if result != PASSED:
                return

    def _one(self, command: Command, end: float, each: int) -> tuple[str, str]:
        """Run a command; return its result and its output."""
        words = [*command.words, *(command.dry if self._dry else ())]
        tool = find_tool(command.tool[0]) if command.tool else None
        if command.tool and tool is None and not self._dry:
            return NOT_HERE, f"{command.tool[0]} is not on this machine\n"
        if tool is not None and not self._dry:
            words = [tool, *command.tool[1:], *words]
        program = find_tool(words[0])
        if program is None:
            return NOT_HERE, f"{words[0]} is not on this machine\n"
        start = time.monotonic()
        limit = end - start if self._dry else min(end - start, each or end - start)
        if limit <= 0:
            return "no time left", ""
        with self._lock:
            self._count += 1
            file = self._work / f"output-{self._count}"
        result = self._process([program, *words[1:]], command.environment, file, limit)
        said = file.read_text(encoding="utf-8", errors="replace")
        file.unlink()
        if self._dry and result.startswith("exit code") and _DRIVER_MISSING in said:
            result = NO_DRIVER
        with self._lock:
            said_of = {**command.environment, "": shlex.join(words)}
            shown = " ".join(f"{name}={value}" if name else value for name, value in said_of.items())
            self._log.write(f"$ {shown}\n{said.rstrip()}\n[{result}, {time.monotonic() - start:.1f} s]\n\n")
            self._log.flush()
        return result, said

    def _process(self, words: Sequence[str], own: Mapping[str, str], file: Path, limit: float) -> str:
        with file.open("wb") as stream, self._lock:
            if self._stopping:
                return "stopped"
            # In a new process group, so that its children can be ended with it.
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, cwd=self._work,
                env={**self._environment, **own}, process_group=0,
            )  # fmt: skip
            self._running.add(process)
        try:
            code = process.wait(limit)
            return PASSED if code == 0 else "stopped" if self._stopping else f"exit code {code}"
        except subprocess.TimeoutExpired:
            return f"stopped after {limit:.0f} s"
        finally:
            _kill(process)
            with self._lock:
                self._running.discard(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process group, also the children of a process that has ended."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def label(command: Command) -> str:
    """Return a short label of a command: tool and words, without interpreter, paths and uninteresting options."""
    words = [Path(word).name if os.sep in word else word for word in command.words]
    skipped = {"-q", "-m", "--tb=short", "-W", "default", "-p", "no:cacheprovider", "--runtime", "cuda-kernels"}
    kept = [word for word in words[1:] if word not in skipped] or words
    tool = [*command.tool[:1], *(word for word in command.tool if word.endswith("check"))]
    return " ".join([*tool, *kept])[:90]


def rows_in(said: str) -> dict[str, dict[str, Any]]:
    """Return the figures in a command's output: lines of JSON with "rows", by the rows' names."""
    found = {}
    for line in said.splitlines():
        if line.startswith("{") and '"rows"' in line:
            try:
                found.update({str(row["name"]): row for row in json.loads(line)["rows"]})
            except (ValueError, KeyError, TypeError):
                continue
    return found
