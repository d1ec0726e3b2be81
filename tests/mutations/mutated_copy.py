"""Copy of the tree to which mutations are applied, with a virtual environment that imports the copy.

The working tree is never changed. The copy is kept between runs, so that nothing is compiled twice.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import venv
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mutation_list import CTEST, ROOT, Mutation
from warm_python import WarmPython

_BUILD = "build/csrc-scalar"
_LIBRARIES = {"_edgelm_ops": "runtimes", "_edgelm_quant": "quant", "libedgelm_plugins": "runtimes"}
_TARGETS = [name.removeprefix("lib") for name in _LIBRARIES]
_WHERE = """
import json, edgelm, edgelm.quant, edgelm.runtimes, edgelm.export
found = {"package": [edgelm.__file__, edgelm.export.__file__]}
for name, module in (
    ("_edgelm_ops", edgelm.runtimes), ("_edgelm_quant", edgelm.quant), ("libedgelm_plugins", edgelm.runtimes)
):
    found[name] = [f"{place}/{name}.so" for place in module.__path__]
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Outcome:
    """Result of some tests."""

    kind: Literal["passed", "failed", "error", "timeout"]
    """`error`: no test failed, but collection, a fixture or the compiler did."""
    detail: str
    """The test that failed, or the error."""


class MutatedCopy:
    """A copy of the tree at `folder`/tree and its Python at `folder`/venv.

    Args:
        folder: created if it does not exist.
        emulated: folder of the emulator's compiled kernels, whose names are hashes of their sources.
    """

    def __init__(self, folder: Path, emulated: Path) -> None:
        self.tree = folder / "tree"
        self._folder = folder
        self._stamp = int(time.time())
        self._configured = False
        self._running: subprocess.Popen[bytes] | None = None
        self._copy_files()
        self._python = self._make_environment()
        self._environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "EDGELM_"))
        }
        self._environment |= {"EDGELM_EMULATOR_CACHE": str(emulated), "VIRTUAL_ENV": str(folder / "venv")}
        self._warm = WarmPython(self._python, self.tree, self._environment)
        self._copy_libraries()
        self._require_own_package()

    @contextlib.contextmanager
    def mistake(self, mutation: Mutation) -> Iterator[None]:
        """Apply a mutation to the copy, and undo it at the end of the block."""
        path = self.tree / mutation.file
        before = path.read_bytes()
        try:
            self._write(path, mutation.text(self.tree).encode())
            yield
        finally:
            self._write(path, before)

    def run(self, tests: Sequence[str], seconds: float, *, compiled: bool, stop: bool = True) -> Outcome:
        """Run tests; with `compiled`, build what they need first. With `stop`, end at the first failure."""
        programs = [test.removeprefix(CTEST) for test in tests if test.startswith(CTEST)]
        nodes = [test for test in tests if not test.startswith(CTEST)]
        if compiled or programs:
            built = self._build([f"{name}_test" for name in programs] + (_TARGETS if nodes else []))
            if built.kind != "passed":
                return built
        for outcome in (self._ctest(name, seconds) for name in programs):
            if outcome.kind != "passed":
                return outcome
        return self._pytest(nodes, seconds, stop=stop) if nodes else Outcome("passed", "")

    def stop(self) -> None:
        """Stop the tests that run in the copy, if any."""
        self._warm.stop()
        if self._running is not None and self._running.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._running.pid, signal.SIGKILL)

    def _pytest(self, nodes: Sequence[str], seconds: float, *, stop: bool) -> Outcome:
        report = self._folder / "report.xml"
        report.unlink(missing_ok=True)
        arguments = [
            "-q", "--tb=line", "-p", "no:cacheprovider", f"--basetemp={self._folder / 'tmp'}", f"--junitxml={report}",
            *(["-x"] if stop else []), *nodes,
        ]  # fmt: skip
        output = self._folder / "output.txt"
        code = self._warm.pytest(arguments, output, seconds)
        if code is None:
            return Outcome("timeout", f"no end after {seconds:.0f} s")
        if code < 0:
            return Outcome("failed", f"the tests' process was ended by {signal.Signals(-code).name}")
        cases = list(ET.parse(report).iter("testcase")) if report.is_file() else []
        failed = [case for case in cases if case.find("failure") is not None]
        errors = [case for case in cases if case.find("error") is not None]
        if failed:
            return Outcome("failed", ", ".join(case.get("name", "") for case in failed))
        if code == 0:
            ran = [case for case in cases if case.find("skipped") is None]
            return Outcome("passed", "") if ran else Outcome("error", "every test was skipped")
        if errors and stop:  # a failed fixture is not a failed test: look for one without stopping
            return self._pytest(nodes, seconds, stop=False)
        return Outcome("error", _last_line(output.read_text(encoding="utf-8", errors="replace")))

    def _ctest(self, name: str, seconds: float) -> Outcome:
        code, output = self._call(
            ["ctest", "--test-dir", _BUILD, "-R", f"^{name}$", "--no-tests=error", "--output-on-failure"], seconds
        )
        if code is None:
            return Outcome("timeout", f"no end after {seconds:.0f} s")
        if code == 0:
            return Outcome("passed", "")
        return Outcome("failed", f"{CTEST}{name}") if code == 8 else Outcome("error", _last_line(output))

    def _build(self, targets: Sequence[str]) -> Outcome:
        if not self._configured:
            # For an unknown CPU, so that only the scalar kernels are compiled. Those of the instruction sets have the
            # same sources and take four times as long.
            generic = [f"-DCMAKE_SYSTEM_NAME={platform.system()}", "-DCMAKE_SYSTEM_PROCESSOR=generic"]
            configure = ["cmake", "-S", "runtimes/csrc", "-B", _BUILD, "-DEDGELM_BUILD_TESTS=ON", *generic]
            code, output = self._call(configure, 600)
            if code != 0:
                return Outcome("error", _last_line(output))
            self._configured = True
        command = ["cmake", "--build", _BUILD, "--parallel", "2", "--target", *targets]
        code, output = self._call(command, 1800)
        if code != 0:
            lines = [line for line in output.splitlines() if "error" in line]
            return Outcome("error", f"does not compile: {(lines or [_last_line(output)])[0]}")
        for name, part in _LIBRARIES.items():
            if name.removeprefix("lib") in targets:
                _replace(self.tree / _BUILD / f"{name}.so", self.tree / part / f"{name}.so")
        return Outcome("passed", "")

    def _call(self, command: Sequence[str | Path], seconds: float) -> tuple[int | None, str]:
        # Returns the exit status (None: timeout) and all output. In a new process group, since tests start processes.
        output = self._folder / "output.txt"
        with output.open("wb") as file:
            process = self._running = subprocess.Popen(
                command, cwd=self.tree, env=self._environment, stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            code = None
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                pass
            finally:
                if code is None:
                    self.stop()
                    process.wait()
        return code, output.read_text(encoding="utf-8", errors="replace")

    def _write(self, path: Path, data: bytes) -> None:
        # Python and make detect changes by the file time in whole seconds, so every write gets another one.
        path.write_bytes(data)
        self._stamp = max(self._stamp + 1, int(time.time()))
        os.utime(path, (self._stamp, self._stamp))

    def _copy_files(self) -> None:
        names = tracked_files()
        for name in names:
            source, target = ROOT / name, self.tree / name
            if not target.is_file() or target.read_bytes() != source.read_bytes():
                target.parent.mkdir(parents=True, exist_ok=True)
                self._write(target, source.read_bytes())
        wanted = {self.tree / name for name in names}
        for top in {name.split("/")[0] for name in names}:
            for path in (self.tree / top).rglob("*"):
                if path.is_file() and not path.is_symlink() and path not in wanted and "__pycache__" not in path.parts:
                    path.unlink()
        # The whole package lies below edgelm/, so that it does not matter whether the current folder is on the path.
        for part in ("export", "quant", "runtimes"):
            if not (link := self.tree / "edgelm" / part).is_symlink():
                link.symlink_to(f"../{part}")
        node = self.tree / "build" / "node"
        if (ROOT / "build" / "node").is_dir() and not node.is_symlink():
            node.parent.mkdir(exist_ok=True)
            node.symlink_to(ROOT / "build" / "node")

    def _make_environment(self) -> Path:
        # A path file replaces the installation's import hook, which would import the working tree.
        folder = self._folder / "venv"
        if not (folder / "bin" / "python").exists():
            venv.create(folder, with_pip=False, symlinks=True)
        site = next(folder.glob("lib/python*/site-packages"))
        packages = [place for place in sys.path if place.endswith(("site-packages", "dist-packages"))]
        (site / "copy.pth").write_text("\n".join([str(self.tree), *packages, ""]), encoding="utf-8")
        script = folder / "bin" / "edgelm"
        script.write_text(
            f"#!{folder / 'bin' / 'python'}\nimport sys\nfrom edgelm.cli.main import main\nsys.exit(main())\n"
        )
        script.chmod(0o755)
        return folder / "bin" / "python"

    def _copy_libraries(self) -> None:
        found = json.loads(subprocess.run([sys.executable, "-P", "-c", _WHERE], check=True, capture_output=True).stdout)
        for name, part in _LIBRARIES.items():
            compiled = [Path(place) for place in found[name] if Path(place).is_file()]
            if not compiled:
                sys.exit(f"this installation has no {name}.so, which many of the tests need: make install")
            _replace(compiled[0], self.tree / part / f"{name}.so")

    def _require_own_package(self) -> None:
        done = subprocess.run([self._python, "-P", "-c", _WHERE], check=True, capture_output=True, cwd=self.tree)
        for file in json.loads(done.stdout)["package"]:
            if not Path(file).is_relative_to(self.tree):
                sys.exit(f"the copy's Python imports {file}, not what is below {self.tree}")


def tracked_files() -> list[str]:
    """Return the relative paths of the working tree's files, without those that git ignores, sorted."""
    command = ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
    return sorted({name for name in names if name and (ROOT / name).is_file()})


def _replace(source: Path, target: Path) -> None:
    # Rename atomically, since a process may have loaded the old file.
    fresh = target.with_suffix(".fresh")
    shutil.copyfile(source, fresh)
    fresh.replace(target)


def _last_line(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"
