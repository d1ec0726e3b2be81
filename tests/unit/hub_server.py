"""Fake Hugging Face hub on 127.0.0.1: the endpoints that a download uses, with faults on demand."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves `files` as the repository `owner/model`.

    Attributes:
        gets: (file, first byte) of every download.
        break_after: file -> bytes after which the connection is cut, once.
        broken: files whose download is answered with 500.
        down: answer everything with 503.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.gets: list[tuple[str, int]] = []
        self.break_after: dict[str, int] = {}
        self.broken: set[str] = set()
        self.down = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Print nothing."""

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _api(self, parts: list[str]) -> None:
        repo, rest = "/".join(parts[:2]), parts[2:]
        if repo == "owner/gated":
            return self._answer(403, X_Error_Code="GatedRepo")
        if repo != "owner/model":
            return self._answer(404, X_Error_Code="RepoNotFound")
        if rest and rest[-1] not in ("main", COMMIT):
            return self._answer(404, X_Error_Code="RevisionNotFound")
        entries = [
            {
                "type": "file",
                "path": name,
                "rfilename": name,
                "size": len(content),
                "oid": hashlib.sha1(content).hexdigest(),
            }
            for name, content in self.server.files.items()
        ]
        body = entries if rest[:1] == ["tree"] else {"id": repo, "sha": COMMIT, "siblings": entries}
        return self._answer(200, json.dumps(body).encode(), Content_Type="application/json")

    def _file(self, name: str) -> None:
        content = self.server.files[name]
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        headers = {"ETag": etag, "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if self.command == "HEAD":
            self.send_response(200)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            return self.end_headers()
        if name in self.server.broken:
            return self._answer(500)
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.server.gets.append((name, start))
        self.send_response(206 if start else 200)
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        for key, value in {**headers, "Content-Length": str(len(content) - start)}.items():
            self.send_header(key, value)
        self.end_headers()
        stop = self.server.break_after.pop(name, None)
        self.wfile.write(content[start:stop])
        if stop is not None:
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
        return None

    def do_GET(self) -> None:
        if self.server.down:
            return self._answer(503)
        parts = urlparse(self.path).path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return self._api(parts[2:])
        if parts[:3] == ["owner", "model", "resolve"] and parts[-1] in self.server.files:
            return self._file("/".join(parts[4:]))
        return self._answer(404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET  # noqa: N815 - the base class's name


@contextlib.contextmanager
def running(files: dict[str, bytes]) -> Iterator[Hub]:
    """Run a hub that serves `files` until the block ends."""
    hub = Hub(files)
    thread = threading.Thread(target=hub.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
