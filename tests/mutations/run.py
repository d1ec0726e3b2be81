"""Apply each mutation to a copy of the tree, and report which ones the tests detect.

`make mutations`, or `python tests/mutations/run.py --only files`. The exit code is 1 if one is not detected.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

from mutated_copy import MutatedCopy, Outcome, tracked_files
from mutation_list import CTEST, ROOT, Mutation, problems, read_mutations

from edgelm.errors import EdgeLMError
from edgelm.files import lock_folder

KINDS = ("killed", "survived", "error", "timeout")
Item = TypeVar("Item")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Result:
    """Result of a mutation: one of KINDS, and the test that detected it or the error."""

    mutation: Mutation
    kind: str
    detail: str
    seconds: float


class Runner:
    """Runs tests in copies of the tree.

    Args:
        work: the folder of the copies, which are kept between runs.
        jobs: number of test runs at a time, each in its own copy.
        seconds: time limit of the tests of one mutation.
    """

    def __init__(self, work: Path, jobs: int, seconds: float) -> None:
        self._work = work
        self._seconds = seconds
        self._copies = [MutatedCopy(work / f"copy-{index}", work / "emulated") for index in range(jobs)]

    def each(self, items: Iterable[Item], do: Callable[[MutatedCopy, Item], Value]) -> list[Value]:
        """Call `do` with each item and a copy that no other call uses at the same time."""
        free: SimpleQueue[MutatedCopy] = SimpleQueue()
        for copy in self._copies:
            free.put(copy)

        def one(item: Item) -> Value:
            copy = free.get()
            try:
                return do(copy, item)
            finally:
                free.put(copy)

        with ThreadPoolExecutor(len(self._copies)) as pool:
            try:
                return list(pool.map(one, items))
            except BaseException:  # mainly Ctrl-C
                pool.shutdown(wait=False, cancel_futures=True)
                for copy in self._copies:
                    copy.stop()
                raise

    def baseline(self, tests: Iterable[str]) -> dict[str, Outcome]:
        """Run tests without a mutation, file by file. Passed tests are cached until a file changes."""
        memory = self._work / "baseline.json"
        state = _digest()
        known = json.loads(memory.read_text(encoding="utf-8")) if memory.is_file() else {}
        passed = set(known["passed"]) if known.get("state") == state else set()
        files: dict[str, list[str]] = {}
        for test in sorted(set(tests) - passed):
            files.setdefault(test.split("::")[0], []).append(test)
        groups = [[name] if name in group else group for name, group in files.items()]
        print(f"{sum(map(len, files.values()))} tests or files of tests without a mistake", flush=True)

        def one(copy: MutatedCopy, group: list[str]) -> Outcome:
            # The sum of the time limits of its mutations.
            return copy.run(group, self._seconds * 4, compiled=False, stop=False)

        compiled = [group for group in groups if group[0].startswith(CTEST)]
        others = [group for group in groups if not group[0].startswith(CTEST)]
        outcomes = list(zip(others, self.each(others, one), strict=True))
        outcomes += zip(compiled, self._in_first(compiled, one), strict=True)
        told: dict[str, Outcome] = {test: Outcome("passed", "") for test in passed}
        for group, outcome in outcomes:
            if outcome.kind != "passed":
                print(f"without a mistake: {outcome.kind}: {' '.join(group)}: {outcome.detail}", flush=True)
            told |= dict.fromkeys(files[group[0].split("::")[0]], outcome)
        good = sorted(test for test, outcome in told.items() if outcome.kind == "passed")
        memory.write_text(json.dumps({"state": state, "passed": good}), encoding="utf-8")
        return told

    def mutations(self, mutations: Sequence[Mutation], baseline: dict[str, Outcome] | None) -> list[Result]:
        """Run all mutations; those that need a compiler run last, in one copy, file by file."""

        def one(copy: MutatedCopy, mutation: Mutation) -> Result:
            result = self._try(copy, mutation, baseline)
            where = f"{mutation.file}:{mutation.line()}"
            print(
                f"{result.kind:8}  {mutation.area:12} {where:44} {result.seconds:5.1f} s  {result.detail}", flush=True
            )
            return result

        interpreted = [mutation for mutation in mutations if not mutation.compiled]
        compiled = sorted((m for m in mutations if m.compiled), key=lambda mutation: mutation.file)
        return [*self.each(interpreted, one), *self._in_first(compiled, one)]

    def _in_first(self, items: Iterable[Item], do: Callable[[MutatedCopy, Item], Value]) -> list[Value]:
        return [do(self._copies[0], item) for item in items]

    def _try(self, copy: MutatedCopy, mutation: Mutation, baseline: dict[str, Outcome] | None) -> Result:
        if found := problems(mutation):
            return Result(mutation, "error", "; ".join(found), 0.0)
        if baseline is not None and (bad := [test for test in mutation.tests if baseline[test].kind != "passed"]):
            return Result(mutation, "error", f"without the mistake, too: {baseline[bad[0]].detail}", 0.0)
        start = time.monotonic()
        with copy.mistake(mutation):
            outcome = copy.run(mutation.tests, self._seconds, compiled=mutation.compiled)
        kind = {"failed": "killed", "passed": "survived"}.get(outcome.kind, outcome.kind)
        return Result(mutation, kind, outcome.detail, time.monotonic() - start)


def _digest() -> str:
    names = [name for name in tracked_files() if not name.endswith(".md") and not name.startswith("tests/mutations/")]
    found = hashlib.sha256()
    for name in names:
        found.update(name.encode() + b"\0" + hashlib.sha256((ROOT / name).read_bytes()).digest())
    return found.hexdigest()


def _summary(results: Sequence[Result]) -> str:
    areas = Counter((result.mutation.area, result.kind) for result in results)
    lines = [f"{'area':14}" + "".join(f"{kind:>10}" for kind in KINDS)]
    for area in [*sorted({area for area, _ in areas}), None]:
        counts = [sum(n for (a, k), n in areas.items() if k == kind and area in (a, None)) for kind in KINDS]
        lines.append(f"{area or 'all':14}" + "".join(f"{count:10}" for count in counts))
    return "\n".join(lines)


def _is(mutation: Mutation, text: str) -> bool:
    place = f"{mutation.file}:{mutation.line()}" if ":" in text else mutation.file
    return text == mutation.area or text in place


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="TEXT", help="an area, or a part of FILE:LINE; repeatable")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="tests at a time; each needs up to 3 GB")
    parser.add_argument("--list", action="store_true", help="print the mutations and try none")
    parser.add_argument("--skip-baseline", action="store_true", help="take it that every test passes without a mistake")
    parser.add_argument("--time-limit", type=float, default=300.0, metavar="SECONDS", help="for one mutation's tests")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "mutations", metavar="DIR", help="for the copies")
    options = parser.parse_args()
    if options.jobs < 1:
        parser.error("--jobs is at least 1")
    only = options.only or [""]
    mutations = [mutation for mutation in read_mutations() if any(_is(mutation, text) for text in only)]
    if not mutations:
        parser.error(f"no mutation has {' or '.join(only)} in its area or file")
    if wrong := [problem for mutation in mutations for problem in problems(mutation)]:
        print("\n".join(wrong))
        return 1
    if options.list:
        for mutation in mutations:
            print(f"{mutation.area:12} {mutation.file}:{mutation.line()}  {mutation.why}")
        return 0
    options.work.mkdir(parents=True, exist_ok=True)
    with lock_folder(options.work, f"another run works in {options.work}: wait for it, or choose another --work"):
        runner = Runner(options.work.resolve(), options.jobs, options.time_limit)
        tests = {test for mutation in mutations for test in mutation.tests}
        results = runner.mutations(mutations, None if options.skip_baseline else runner.baseline(tests))
    print(_summary(results))
    missed = [result for result in results if result.kind != "killed"]
    for result in missed:
        mutation = result.mutation
        print(f"{result.kind}: {mutation.file}:{mutation.line()}: {mutation.why}")
        print(f"    {mutation.old!r}\n    {mutation.new!r}")
        print(f"    {result.detail or 'every test passes: ' + ' '.join(mutation.tests)}")
    return 1 if missed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop the tests when the runner is stopped
    try:
        sys.exit(main())
    except EdgeLMError as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
