"""Does Ctrl-C end the command with 130 and no traceback, whatever it is doing: importing, working, exiting?"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edgelm.cli.main import _interruption
from edgelm.errors import EdgeLMError

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(os.name == "nt", reason="no POSIX signals")

WAIT = "import sys; print('waiting', flush=True); sys.stdin.read(1)\n"
# Packages that stand in for real ones, to stop the command where it imports them.
STOPS = {
    "importing the command line": ("click", WAIT, ["--version"]),
    "importing for a verb": ("numpy", WAIT, ["run", "nowhere", "x"]),
    "importing where errors are caught": (
        "numpy",
        f"try:\n    {WAIT}except BaseException as error:\n    raise ImportError('broken') from error\n",
        ["run", "nowhere", "x"],
    ),
    "exiting": ("sitecustomize", f"import atexit\natexit.register(lambda: exec({WAIT!r}))\n", ["--version"]),
}
STARTS = {"module": ["-P", "-m", "edgelm"], "script": ["-P", "-c", "from edgelm.__main__ import main; main()"]}


def start(folder: Path, how: str, arguments: list[str], *, ignored: bool = False) -> subprocess.Popen[str]:
    """The command, with the modules in `folder` before all others."""
    return subprocess.Popen(
        [sys.executable, *STARTS[how], *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(folder)},
        preexec_fn=(lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) if ignored else None,
    )


def stand_in(folder: Path, name: str, source: str) -> None:
    (folder / f"{name}.py").write_text(source)


def read_until_it_waits(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line == "waiting\n":
            return
    pytest.fail(f"it ended: {process.communicate()[1]}")


@pytest.mark.parametrize("how", STARTS)
@pytest.mark.parametrize("where", STOPS)
def test_ctrl_c_ends_with_130_in_one_line(tmp_path: Path, how: str, where: str) -> None:
    name, source, arguments = STOPS[where]
    stand_in(tmp_path, name, source)
    process = start(tmp_path, how, arguments)
    read_until_it_waits(process)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=60)[1]
    assert (process.returncode, stderr) == (130, "interrupted\n")


def test_ctrl_c_stays_ignored_if_the_parent_ignores_it(tmp_path: Path) -> None:
    stand_in(tmp_path, "click", WAIT + "raise SystemExit(7)\n")
    process = start(tmp_path, "module", ["--version"], ignored=True)
    read_until_it_waits(process)
    process.send_signal(signal.SIGINT)
    process.communicate("\n", timeout=60)
    assert process.returncode == 7


def test_few_modules_are_imported_before_ctrl_c_is_handled() -> None:
    # -S: what Python itself and the import hook of an editable installation import is not ours.
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import edgelm.cli.common.interrupts; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-S", "-c", code], capture_output=True, text=True, check=True)
    imported = done.stdout.split()
    assert "edgelm.cli.common.interrupts" in imported
    assert not {"typing", "re", "contextlib", "click", "dataclasses"} & set(imported)


def test_an_error_that_is_its_own_cause_ends_the_command() -> None:
    first, second = EdgeLMError("what was wrong"), EdgeLMError("what came before")
    first.__cause__, second.__cause__ = second, first
    assert _interruption(first) is None
    second.__cause__ = KeyboardInterrupt()
    assert _interruption(first) is second.__cause__
