"""A process of capi_tokenizer_test, which encodes and decodes with libedgelm's tokenizer."""

from __future__ import annotations

import struct
import subprocess
from array import array
from collections.abc import Sequence
from pathlib import Path


class RefusedError(Exception):
    """The library refused the request; the message is its own."""


class TokenizerProcess:
    """Sends requests to a program and reads its answers: each a size in four bytes, and the bytes."""

    def __init__(self, program: Path) -> None:
        self._process = subprocess.Popen([program, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self) -> TokenizerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=60)

    def _ask(self, kind: bytes, data: bytes) -> bytes:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(kind + struct.pack("<I", len(data)) + data)
        stdin.flush()
        header = stdout.read(5)
        assert len(header) == 5, f"the program ended with status {self._process.wait(60)}"
        answer = stdout.read(int.from_bytes(header[1:], "little"))
        if header[:1] == b"!":
            raise RefusedError(answer.decode())
        return answer

    def open(self, folder: Path) -> None:
        """Open the tokenizer of a folder in place of the last one."""
        self._ask(b"o", str(folder).encode())

    def fingerprint(self) -> str:
        """Return the tokenizer's fingerprint."""
        return self._ask(b"f", b"").decode()

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without bos."""
        return array("i", self._ask(b"e", text.encode())).tolist()

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """Return the text of ids."""
        return self._ask(b"s" if skip_special else b"d", array("i", ids).tobytes()).decode()
