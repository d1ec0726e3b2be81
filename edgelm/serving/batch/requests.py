"""Requests of a batch: the lines of a file, read one at a time and checked by line number."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from edgelm.errors import EdgeLMError
from edgelm.json_dataclass import ErrorFactory, parse

MOST_BYTES = 8 << 20
"""Bytes of a line at most."""
_FIELDS = ("custom_id", "method", "url", "body")
_MOST_ID = 512


@dataclass(frozen=True)
class BatchRequest:
    """One line of a batch.

    Attributes:
        number: the line's number, from 1.
        custom_id: its name, by the author of the file.
        url: the path of the operation.
        body: the body as JSON.
        digest: changes with everything in the line, and with the bundle that answers it.
    """

    number: int
    custom_id: str
    url: str
    body: bytes
    digest: str


@dataclass(frozen=True)
class RequestReader:
    """Reader of batches for certain models.

    Attributes:
        models: a digest of each bundle, by the name of its model.
        urls: the paths of the operations that there are.
    """

    models: Mapping[str, str]
    urls: tuple[str, ...]

    def check(self, path: Path) -> int:
        """Check every line; return the number of requests. Takes 8 bytes of memory a request.

        Raises:
            EdgeLMError: the file cannot be read, has no request, or a line is not a request, which the error numbers.
        """
        found = array("Q")
        for request in self.read(path):
            found.append(_hash(request.custom_id))
        if not found:
            raise EdgeLMError(f"{path}: has no requests: write one a line, as for OpenAI's batches")
        hashes = np.sort(np.frombuffer(found, np.uint64))
        twice = {int(one) for one in hashes[1:][hashes[1:] == hashes[:-1]]}
        if twice:
            self._check_names(path, twice)
        return len(found)

    def _check_names(self, path: Path, hashes: set[int]) -> None:
        """Check that names with these hashes differ."""
        lines: dict[str, int] = {}
        for request in self.read(path):
            if _hash(request.custom_id) in hashes:
                first = lines.setdefault(request.custom_id, request.number)
                if first != request.number:
                    raise EdgeLMError(
                        f"{path}: line {request.number}: custom_id {request.custom_id!r:.100} is that of line {first} "
                        "too: give each request its own"
                    )

    def read(self, path: Path) -> Iterator[BatchRequest]:
        """Yield the requests of a file in order; empty lines are skipped. Raises as `check`, at the line."""
        for number, line in request_lines(path):
            yield self.parse(line, number, path)

    def parse(self, line: bytes, number: int, path: Path) -> BatchRequest:
        """Return the request of a line.

        Raises:
            EdgeLMError: it is none, or asks for something that is not here.
        """

        def wrong(problem: str) -> EdgeLMError:
            return EdgeLMError(f"{path}: line {number}: {problem}")

        advice = 'write {"custom_id": ..., "method": "POST", "url": ..., "body": {...}}'
        data: Any = parse(line, f"{path}: line {number}", ErrorFactory(EdgeLMError, advice))
        if not isinstance(data, dict) or set(data) != set(_FIELDS):
            names = sorted(data) if isinstance(data, dict) else []
            lacks = [name for name in _FIELDS if name not in names]
            more = [name for name in names if name not in _FIELDS]
            what = f"has no {', '.join(lacks)}" if lacks else f"has the unknown field {more[0]!r:.60}"
            raise wrong(f"{what if isinstance(data, dict) else 'is no object'}: {advice}")
        custom_id, url, body = data["custom_id"], data["url"], data["body"]
        if not isinstance(custom_id, str) or not 0 < len(custom_id) <= _MOST_ID:
            raise wrong(f"custom_id is {custom_id!r:.60}: give a text of 1 to {_MOST_ID} characters")
        if data["method"] != "POST":
            raise wrong(f'method is {data["method"]!r:.60}: only "POST" is supported')
        if url not in self.urls:
            raise wrong(f"url is {url!r:.100}: give {', '.join(self.urls)}")
        if not isinstance(body, dict):
            raise wrong("body is no object")
        if body.get("stream"):
            raise wrong("body.stream is true: a batch has whole answers, leave it out")
        return BatchRequest(
            number, custom_id, url, json.dumps(body).encode(), self._digest(custom_id, url, body, wrong)
        )  # fmt: skip

    def _digest(self, custom_id: str, url: str, body: dict[str, Any], wrong: Any) -> str:
        name = body.get("model")
        if name is None and len(self.models) == 1:
            name = next(iter(self.models))
        if not isinstance(name, str) or name not in self.models:
            what = "body.model is missing" if name is None else f"there is no model {name!r:.100}"
            raise wrong(f"{what}: there is {', '.join(self.models)}; --bundle NAME=BUNDLE gives a bundle another name")
        parts = [custom_id, url, body, self.models[name]]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def request_lines(path: Path, offset: int = 0, before: int = 0) -> Iterator[tuple[int, bytes]]:
    """Yield the number and the bytes of each line that is not empty.

    Args:
        path: the file.
        offset: where to begin, in bytes.
        before: how many lines there are before that.

    Raises:
        EdgeLMError: the file cannot be read, or a line is too long.
    """
    with open_requests(path) as stream:
        stream.seek(offset)
        number = before
        while line := stream.readline(MOST_BYTES + 1):
            number += 1
            if len(line) > MOST_BYTES:
                raise EdgeLMError(f"{path}: line {number}: is longer than {MOST_BYTES >> 20} MiB")
            if line.strip():
                yield number, line


def open_requests(path: Path) -> BinaryIO:
    """Open a file of requests.

    Raises:
        EdgeLMError: it is no regular file, which can be read twice, or cannot be read.
    """
    if path.exists() and not path.is_file():
        raise EdgeLMError(f"{path}: is no regular file, and a batch is read twice: give a file with a request a line")
    try:
        return path.open("rb")
    except OSError as error:
        raise EdgeLMError(f"{path}: cannot be read ({error.strerror}): give a file with a request a line") from error


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
