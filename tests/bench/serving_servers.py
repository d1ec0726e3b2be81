"""The servers of the serving benchmark, `edgelm serve` and llama.cpp's llama-server, each in its own process."""

from __future__ import annotations

import json
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
    asked = [sys.executable, "-P", "-m", "edgelm", "serve", str(bundle), "--port", "{port}", "--slots", str(slots)]
    asked += ["--threads", str(threads), "--context", str(context)]
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

    def complete(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the JSON of a completion that is not streamed."""
        content = json.dumps(body).encode()
        asked = urllib.request.Request(
            self.base + "/v1/completions", content, {"Content-Type": "application/json"}
        )  # fmt: skip
        try:
            with urllib.request.urlopen(asked, timeout=START_SECONDS) as answer:
                found: dict[str, Any] = json.load(answer)
                return found
        except urllib.error.HTTPError as error:
            raise SystemExit(f"{self.command.name}: {error}: {error.read()[:500]!r}") from error

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
