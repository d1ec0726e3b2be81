"""Answers of a batch: their lines, and the file that takes them in the order of the requests and can be continued."""

from __future__ import annotations

import errno
import json
import os
import stat
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from edgelm.errors import EdgeLMError
from edgelm.files import lock_file
from edgelm.serving.batch.requests import BatchRequest

_SYNC_SECONDS = 5.0
_ADVICE = "choose another place, or move it away"


@dataclass(frozen=True)
class Answer:
    """The answer to a request.

    Attributes:
        line: its line.
        status: its HTTP status.
        prompt_tokens: tokens of the prompt.
        completion_tokens: generated tokens.
    """

    line: bytes
    status: int
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @classmethod
    def of(cls, request: BatchRequest, status: int, body: bytes) -> Answer:
        """Return the answer of an application. A body that is no JSON object counts as none.

        Args:
            request: the request.
            status: the HTTP status.
            body: the body of the answer.
        """
        data, digest = _object(body), request.digest
        line: dict[str, Any] = {"id": _id(request), "custom_id": request.custom_id}
        if data is None:
            line |= {"response": None, "error": {"code": "server_error", "message": f"the server failed: {status}"}}
            return cls(_json(line) + b"\n", 500)
        line |= {"response": {"status_code": status, "request_id": f"req_{digest}", "body": data}, "error": None}
        usage = data.get("usage") or {}
        prompt = usage.get("prompt_tokens", usage.get("input_tokens", 0))
        return cls(
            _json(line) + b"\n", status, prompt, usage.get("completion_tokens", usage.get("output_tokens", 0))
        )  # fmt: skip


def line_start(request: BatchRequest) -> bytes:
    """Return how the line of a request's answer begins."""
    return _json({"id": _id(request), "custom_id": request.custom_id})[:-1] + b","


def _id(request: BatchRequest) -> str:
    return f"batch_req_{request.digest}"


def _json(value: Any) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return json.dumps(value, separators=(",", ":")).encode()


def _object(data: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _status(line: dict[str, Any]) -> int:
    response = line.get("response")
    return int(response["status_code"]) if response else 500


class AnswerFile:
    """The file of the answers. Only one run at a time can have it.

    What stands in it is checked before anything changes: it has to be the answers to the first requests, complete but
    for the last line.

    Args:
        path: the file, which need not exist.
        source: the file of the requests.

    Attributes:
        failed: answers in it that are errors.

    Raises:
        EdgeLMError: it cannot be written, or another run has it.
    """

    def __init__(self, path: Path, source: Path) -> None:
        self.path, self.failed = path, 0
        self._synced = time.monotonic()
        if path.exists() and source.exists() and path.samefile(source):
            raise EdgeLMError(f"{path} is the file of the requests: choose another place for the answers")
        if not path.absolute().parent.is_dir():
            raise EdgeLMError(f"there is no folder {path.parent} to write {path.name} to: make it first")
        if path.exists() and not path.is_file():
            raise EdgeLMError(f"{path} is no regular file, which a batch needs to be continued: choose another place")
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
        except OSError as error:
            raise EdgeLMError(f"{path} cannot be written ({error.strerror}): choose another place") from error
        try:
            lock_file(self._file, f"another run is writing {path}: wait for it, or choose another place")
            assert stat.S_ISREG(os.fstat(self._file).st_mode)
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write to disk and close."""
        try:
            os.fsync(self._file)
        finally:
            os.close(self._file)

    def resume(self, requests: Iterable[BatchRequest]) -> int:
        """Return how many requests have an answer; the rest of a line that was not finished is cut off.

        Raises:
            EdgeLMError: there is something else in the file, which is left as it is.
        """
        left = iter(requests)
        kept, end = 0, 0
        for line in self._lines():
            request = next(left, None)
            if request is None:
                raise EdgeLMError(f"{self.path}: has more lines than there are requests: {_ADVICE}")
            start = line_start(request)
            whole = line.endswith(b"\n")
            same = line.startswith(start) if whole else start.startswith(line[: len(start)])
            found = _object(line) if whole else None
            if not same or (whole and found is None):
                raise EdgeLMError(
                    f"{self.path}: line {kept + 1} is not the answer to line {request.number} of the requests by this "
                    f"bundle: {_ADVICE}"
                )
            if found is not None:
                kept, end = kept + 1, end + len(line)
                self.failed += _status(found) != 200
        os.ftruncate(self._file, end)
        return kept

    def _lines(self) -> Iterator[bytes]:
        with open(self._file, "rb", closefd=False) as stream:
            stream.seek(0)
            yield from stream

    def write(self, answer: Answer) -> None:
        """Append an answer.

        Raises:
            EdgeLMError: the disk is full.
        """
        line = answer.line
        try:
            done = os.write(self._file, line)
            while done < len(line):
                done += os.write(self._file, line[done:])
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise EdgeLMError(
                f"the disk is full while writing {self.path}: its answers are kept; free some space and run the same "
                "command again"
            ) from error
        self.failed += answer.status != 200
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            os.fsync(self._file)
            self._synced = time.monotonic()
