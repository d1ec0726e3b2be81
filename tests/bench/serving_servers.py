"""The servers of the serving benchmark, `edgelm serve` and llama.cpp's llama-server, each in its own process."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import edgelm

OURS, LLAMA = "edgelm", "llama.cpp"
MODEL = "default"
START_SECONDS = 300.0


@dataclass(frozen=True)
class Command:
    """How a server is started, and what its requests need besides the fields that both have.

    Attributes:
        arguments: the command line; {port} stands for the port.
        health: path that answers 200 when the server is ready.
        bytes_per_token: weights that one sequence reads per token.
    """

    name: str
    arguments: Sequence[str]
    health: str
    bytes_per_token: float
    fields: Mapping[str, Any] = field(default_factory=dict)


def ours(bundle: Path, *, slots: int, threads: int, context: int, bytes_per_token: float) -> Command:
    """Return the command of `edgelm serve`."""
    asked = [sys.executable, "-P", "-m", "edgelm", "serve", f"{MODEL}={bundle}", "--port", "{port}"]
    asked += ["--slots", str(slots), "--threads", str(threads), "--context-length", str(context)]
    return Command(OURS, asked, "/health", bytes_per_token, {"ignore_eos": True})


def llama(
    server: Path, gguf: Path, more: Sequence[str], *, slots: int, threads: int, context: int, bytes_per_token: float
) -> Command:
    """Return the command of llama-server, whose other settings (flash attention, prompt cache) stay as they are.

    Args:
        more: further arguments.
    """
    asked = [str(server), "-m", str(gguf), "--port", "{port}", "--host", "127.0.0.1", "-np", str(slots)]
    asked += ["-c", str(slots * context), "-t", str(threads), *more]
    return Command(LLAMA, asked, "/health", bytes_per_token, {"ignore_eos": True})


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def busy_seconds() -> float:
    """Return the time that the cores have worked for any process since the machine started."""
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    # user, nice, system, idle, iowait, irq, softirq
    return (sum(fields[:3]) + sum(fields[5:7])) / os.sysconf("SC_CLK_TCK")


class Server:
    """A server that runs; its output goes to `log`. `base` is its URL."""

    def __init__(self, command: Command, log: Path) -> None:
        self.command, self.log = command, log
        port = free_port()
        self.base = f"http://127.0.0.1:{port}"
        environment = {**os.environ, "PYTHONPATH": str(Path(edgelm.__file__).parents[1])}
        environment.pop("OMP_NUM_THREADS", None)
        asked = [argument.replace("{port}", str(port)) for argument in command.arguments]
        with log.open("ab") as out:
            self.process = subprocess.Popen(asked, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment)
        end = time.monotonic() + START_SECONDS
        while not self._ready():
            if self.process.poll() is not None or time.monotonic() > end:
                self.stop()
                raise SystemExit(f"{command.name} did not start: {' '.join(asked)}\nsee the end of {log}")
            time.sleep(0.2)

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(self.base + self.command.health, timeout=5) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    def cpu_seconds(self) -> float:
        """Return the CPU time that the process has taken."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def peak_bytes(self) -> int:
        """Return the largest resident memory that the process had."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
        assert found
        return int(found[1]) * 1024

    def stop(self) -> None:
        """End the process."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
