"""Worker process of a benchmark engine: reads one JSON command per line, and answers each with one JSON line.

It imports only the standard library until a command needs more. So the time to the first token of a new process can be
split into the start of the interpreter, the imports of the engine, and loading.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any


class Engine(ABC):
    """Interface of a benchmark engine. Every public method is a command."""

    @abstractmethod
    def imports(self) -> dict[str, Any]:
        """Import the engine; return its version."""

    @abstractmethod
    def load(self, **options: Any) -> dict[str, Any]:
        """Load a model."""

    @abstractmethod
    def run(self, prompt: list[int], new: list[int]) -> dict[str, Any]:
        """Reset, prefill the prompt, then decode the tokens `new` one by one; find the most likely token each time.

        Returns:
            "prefill": the seconds of the prompt; "decode": the seconds of each token.
        """

    @abstractmethod
    def logits(self, tokens: list[int], lengths: list[int], out: str) -> dict[str, Any]:
        """Write the logits [len(lengths), vocabulary] after the first `lengths` tokens to the .npy file `out`."""

    def first_token(self, prompt: list[int], new: list[int], weights: str, options: dict[str, Any]) -> dict[str, Any]:
        """In a new process: import, load and prefill the prompt; then decode `new` and measure the memory.

        Returns:
            Seconds, and "now": the monotonic clock at the first token, so that the caller can add the start time of the
            process.
        """
        began = time.perf_counter()
        self.imports()
        imported = time.perf_counter()
        self.load(**options)
        self.run(prompt, [])
        now = time.perf_counter()
        self.run(prompt, new)
        memory = self.memory(weights)
        return {"now": now, "seconds": now - imported, "with_imports": now - began, "memory": memory}

    def memory(self, weights: str) -> dict[str, int]:
        """Return the resident bytes: of files, anonymous, and of the mapped weights file alone."""
        status = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE))
        mapped, inside = 0, False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            head = re.match(r"[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \d+\s*(.*)", line)
            if head:
                inside = head[1] == os.path.realpath(weights)
            elif inside and line.startswith("Rss:"):
                mapped += int(line.split()[1]) * 1024
        return {
            "file": int(status["RssFile"]) * 1024,
            "anonymous": int(status["RssAnon"]) * 1024,
            "shared": int(status["RssShmem"]) * 1024,
            "weights": mapped,
        }


def serve(engine: Engine) -> None:
    """Answer commands until the input ends."""
    # Engines print to standard output, so answers use a copy of it.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        command = json.loads(line)
        result = getattr(engine, command.pop("do"))(**command)
        answers.write(json.dumps(result) + "\n")
        answers.flush()
