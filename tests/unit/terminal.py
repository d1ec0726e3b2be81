"""Run a command in a pseudo-terminal, for tests of its screen and keys."""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Mapping

ESCAPE = re.compile("\x1b\\[[?0-9;]*[A-Za-z]")
UP, CTRL_C, CTRL_D = "\x1b[A", "\x03", "\x04"


class Terminal:
    """`edgelm` with some arguments in a new terminal.

    Attributes:
        raw: everything that was printed, with escape sequences.
        process: the command.
    """

    def __init__(self, *arguments: object, env: Mapping[str, str]) -> None:
        import pty

        self._fd, side = pty.openpty()
        command = [sys.executable, "-P", "-m", "edgelm", *map(str, arguments)]
        environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
        environment |= {"TERM": "xterm", "COLUMNS": "200", **env}
        # Make it the controlling terminal of the process, so that Ctrl-C sends a signal.
        steal = (
            "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", steal, *command],
            stdin=side, stdout=side, stderr=side, env=environment, start_new_session=True,
        )  # fmt: skip
        os.close(side)
        self.raw = ""
        self._seen = 0

    def send(self, text: str | bytes) -> None:
        """Press keys."""
        os.write(self._fd, text if isinstance(text, bytes) else text.encode())

    def interrupt(self) -> None:
        """Press Ctrl-C while the command waits for keys.

        Python's readline looks for signals, then waits for keys. A signal in between is noticed only at the next key.
        """
        self.wait_until_idle()
        self.send(CTRL_C)

    def paste(self, text: str) -> None:
        """Paste text. A terminal marks it as a paste if the program has enabled that, and else types it."""
        asked = self.raw.rfind("\x1b[?2004h") > self.raw.rfind("\x1b[?2004l")
        self.send(f"\x1b[200~{text}\x1b[201~" if asked else text.replace("\n", "\r"))

    def wait(self, text: str, seconds: float = 60) -> str:
        """Wait until `text` is printed after the last awaited text; return the text between, without escapes."""
        end = time.monotonic() + seconds
        while (found := self.shown.find(text, self._seen)) < 0:
            assert time.monotonic() < end, f"no {text!r} in {self.shown[self._seen :]!r}"
            assert self._read(), f"the command ended without {text!r}: {self.shown[self._seen :]!r}"
        between = self.shown[self._seen : found]
        self._seen = found + len(text)
        return between

    def wait_for_more(self, count: int) -> None:
        """Wait until `count` more characters are printed."""
        end = time.monotonic() + 60
        while len(self.shown) < self._seen + count:
            assert time.monotonic() < end, f"no more than {self.shown[self._seen :]!r}"
            assert self._read(), "the command ended"

    @property
    def shown(self) -> str:
        """Everything that was printed, without escape sequences."""
        return ESCAPE.sub("", self.raw)

    def wait_until_idle(self) -> None:
        """Wait until the command has used no CPU time for a while, because it waits."""
        import psutil

        process, before = psutil.Process(self.process.pid), -1.0
        while (used := process.cpu_times().user) != before:
            before = used
            time.sleep(0.2)

    def _read(self) -> bool:
        if not select.select([self._fd], [], [], 0.2)[0]:
            return True
        try:
            data = os.read(self._fd, 1 << 16)
        except OSError:  # the command closed the terminal
            return False
        self.raw += data.decode("utf-8", "replace")
        return bool(data)

    def end(self) -> int:
        """Read to the end, and return the exit code."""
        end = time.monotonic() + 60
        while self._read():
            assert time.monotonic() < end, f"the command does not end: {self.shown[self._seen :]!r}"
        return self.process.wait(timeout=60)

    def close(self) -> None:
        """Kill the command if it still runs."""
        self.process.kill()
        self.process.wait()
        os.close(self._fd)
