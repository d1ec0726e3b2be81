"""Prompt cache on disk: blocks of KV caches that survive a restart of the server.

A block is a file whose name is its key: the hash of the bundle, runtime, type of the cache, arithmetic and all tokens
up to its end. A damaged file is deleted and its tokens are computed again. The files that were not used for the longest
time are deleted if there are too many bytes.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import struct
import threading
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import EdgeLMError

MAGIC = b"EDGELMKB"
VERSION = 1
_HEAD = struct.Struct("<8sI32sQI")  # magic, format version, key, bytes of the cache, their CRC
_SUFFIX = ".block"
_LOCK = "edgelm-prompt-cache.lock"
_MOST_QUEUED = 512 << 20


class FolderInUseError(EdgeLMError):
    """Another process uses the folder."""


class CacheFolder:
    """Blocks of KV caches in the files of a folder: a `BlockStore` of `edgelm.generation.prefix_tree`.

    Files are written in another thread. One process at a time may use a folder, with any number of bundles.

    Args:
        path: the folder, which is created if it is missing. Files of others in it are left alone.
        most_bytes: bytes of all files.

    Raises:
        FolderInUseError: another process uses the folder.
        EdgeLMError: the folder cannot be used.
    """

    def __init__(self, path: Path, most_bytes: int) -> None:
        self._path, self._most_bytes = path, most_bytes
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = (path / _LOCK).open("ab")
            if not _locked(self._lock.fileno()):
                self._lock.close()
                raise FolderInUseError(f"{path} is the --cache-dir of another process: choose another folder")
            files = [(entry.stat(), entry) for entry in os.scandir(path) if _is_block(entry.name)]
            for entry in os.scandir(path):
                if entry.name.endswith(_SUFFIX + ".part"):
                    Path(entry.path).unlink()  # of a process that was killed
        except OSError as error:
            raise EdgeLMError(f"{path} cannot be used as --cache-dir: {error.strerror or error}") from error
        files.sort(key=lambda one: one[0].st_mtime_ns)
        # Least recently used first.
        self._sizes = OrderedDict((entry.name, found.st_size) for found, entry in files)
        self._mutex = threading.Lock()
        self._full = False
        self._queued = 0
        self._waiting: queue.Queue[tuple[bytes, NDArray[np.uint8]] | None] = queue.Queue()
        self._writer = threading.Thread(target=self._write_all, name="edgelm-cache-folder", daemon=True)
        self._writer.start()

    @classmethod
    def numbered(cls, path: Path, most_bytes: int) -> CacheFolder:
        """Return the first of the folders `path`/0, `path`/1, ... that no other process uses.

        Raises:
            EdgeLMError: it cannot be used.
        """
        for number in itertools.count():
            with contextlib.suppress(FolderInUseError):
                return cls(path / str(number), most_bytes)
        raise AssertionError("there is always another number")

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        with self._mutex:
            return sum(self._sizes.values())

    def load(self, key: bytes, nbytes: int) -> NDArray[np.uint8] | None:
        """Return the cache of the block `key`, of `nbytes` bytes; None if there is none, or its file is damaged."""
        name = key.hex() + _SUFFIX
        with self._mutex:
            if name not in self._sizes:
                return None
            self._sizes.move_to_end(name)
        path = self._path / name
        try:
            data = np.fromfile(path, np.uint8)
        except OSError:
            data = np.empty(0, np.uint8)
        head = data[: _HEAD.size].tobytes()
        body = data[_HEAD.size :]
        if head == _HEAD.pack(MAGIC, VERSION, key, nbytes, zlib.crc32(body.data)) and body.nbytes == nbytes:
            with contextlib.suppress(OSError):
                os.utime(path)
            return body
        self._delete(name)
        return None

    def save(self, key: bytes, data: NDArray[np.uint8]) -> None:
        """Write a block soon; one that was there is replaced, it may be damaged.

        It is left out if too many wait to be written already, or the disk is full.
        """
        with self._mutex:
            if self._full or self._queued + data.nbytes > _MOST_QUEUED:
                return
            self._queued += data.nbytes
        self._waiting.put((key, data))

    def close(self) -> None:
        """Write what waits, and let other processes use the folder."""
        self._waiting.put(None)
        self._writer.join()
        self._lock.close()

    def _write_all(self) -> None:
        while (one := self._waiting.get()) is not None:
            key, data = one
            self._write(key.hex() + _SUFFIX, key, data)
            with self._mutex:
                self._queued -= data.nbytes

    def _write(self, name: str, key: bytes, data: NDArray[np.uint8]) -> None:
        path, size = self._path / name, _HEAD.size + data.nbytes
        partial = path.with_name(name + ".part")
        with self._mutex:
            if size > self._most_bytes:
                return
            self._sizes.pop(name, None)
            while sum(self._sizes.values()) + size > self._most_bytes:
                oldest, _ = self._sizes.popitem(last=False)
                with contextlib.suppress(OSError):
                    (self._path / oldest).unlink()
        try:
            with partial.open("wb") as file:
                file.write(_HEAD.pack(MAGIC, VERSION, key, data.nbytes, zlib.crc32(data.data)))
                file.write(data.data)
            partial.replace(path)
        except OSError:
            # The server goes on without: a prompt cache only saves time.
            self._full = True
            with contextlib.suppress(OSError):
                partial.unlink()
            return
        with self._mutex:
            self._sizes[name] = size

    def _delete(self, name: str) -> None:
        with self._mutex:
            self._sizes.pop(name, None)
        with contextlib.suppress(OSError):
            (self._path / name).unlink()


def _is_block(name: str) -> bool:
    stem, dot, suffix = name.partition(".")
    return dot + suffix == _SUFFIX and len(stem) == 64 and all(letter in "0123456789abcdef" for letter in stem)


def _locked(descriptor: int) -> bool:
    """Lock a file for this process; return whether that was possible."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]  # on Windows only
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
