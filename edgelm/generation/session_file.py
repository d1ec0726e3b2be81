"""Sessions: the cached tokens of a model and their KV cache in a file, which libedgelm reads and writes too.

docs/reference/session.md describes the format; csrc/capi/generation/session.cc is the same in C++.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO

import numpy as np
from numpy.typing import NDArray

from edgelm.bundle import MANIFEST, Bundle, Manifest
from edgelm.errors import ArgumentTypeError, BundleError, GenerationError, SessionError
from edgelm.files import atomic_file
from edgelm.generation.prefix_cache import Prefilled, PrefixCache
from edgelm.generation.sampling import is_integer
from edgelm.json_dataclass import (
    Count,
    ErrorFactory,
    Range,
    from_data,
    parse,
    quoted,
    read_bytes,
    without_unknown,
)
from edgelm.output_paths import OutputKind
from edgelm.runtimes import Runtime
from edgelm.runtimes.base import checked_tokens, context_full
from edgelm.runtimes.savable import SavableRuntime

MAGIC = b"EDGELMKV"
VERSION = 1

_ADVICE = "save the session again"
_ERRORS = ErrorFactory(SessionError, _ADVICE)
_NUMBERS = struct.Struct("<II")  # format version, size of the header
_CRC = struct.Struct("<I")
_MOST_HEADER = 4096
_BLOCK = 1 << 20
_MOST = 2**31 - 1


def _unknown_content(path: Path) -> str | None:
    with path.open("rb") as stream:
        return None if stream.read(len(MAGIC)) == MAGIC else "is not a session that EdgeLM saved"


SESSION = OutputKind("a session", _unknown_content, is_folder=False)
"""The kind of output that `save_session` writes."""


@dataclass(frozen=True)
class Header:
    """What the cache of a file belongs to, and its sizes. docs/reference/session.md has the meaning of each."""

    manifest: str
    runtime: str
    kv: str
    vocab_size: Annotated[int, Range(1, _MOST)]
    tokens: Annotated[int, Range(0, _MOST)]
    prompt_tokens: Annotated[int, Range(0, _MOST)]
    fresh: bool
    fresh_tokens: Annotated[int, Range(0, _MOST)]
    chunk: Annotated[int, Range(1, _MOST)]
    cache_bytes: Count


def save_session(
    bundle: Bundle, cache: PrefixCache, path: Path | str, *, tokens: int | None, check: Callable[[], None]
) -> None:
    """Write the first `tokens` cached tokens and their KV cache to a file, atomically; None: all of them.

    `check` is called now and then; may raise to stop. Raises as `LanguageModel.save_session`, and what `check` raises.
    """
    runtime, place = require_savable(cache.runtime), _path(path)
    ids = cache.cached
    if tokens is not None:
        if not is_integer(tokens):
            raise ArgumentTypeError(f"tokens is {tokens!r:.100}: it has to be an integer, or None for all")
        if not 0 <= tokens <= len(ids):
            raise SessionError(f"cannot save {tokens} cached tokens: give 0 to {len(ids)}, as many are cached")
        del ids[tokens:]
    prompt = cache.last_prompt
    if prompt is not None and len(prompt.tokens) > len(ids):
        prompt = None
    header = Header(
        manifest_sha256(bundle),
        runtime.name,
        runtime.kv,
        runtime.vocab_size,
        len(ids),
        0 if prompt is None else len(prompt.tokens),
        prompt is not None and prompt.fresh,
        min(cache.fresh_tokens, len(ids)),
        runtime.chunk,
        runtime.saved_bytes(len(ids)),
    )
    text = json.dumps(dataclasses.asdict(header)).encode()
    with (
        atomic_file(place, SESSION, overwrite=True) as partial,
        _explained(place, "written"),
        partial.open("wb") as file,
    ):
        crc = 0

        def add(data: bytes | memoryview) -> None:
            nonlocal crc
            view = memoryview(data)
            for begin in range(0, len(view), _BLOCK):
                check()
                crc = zlib.crc32(view[begin : begin + _BLOCK], crc)
                file.write(view[begin : begin + _BLOCK])

        add(MAGIC + _NUMBERS.pack(VERSION, len(text)) + text)
        add(np.array(ids, "<i4").tobytes())
        if prompt is not None:
            add(prompt.logits.astype("<f4", copy=False).tobytes())
        for part in runtime.save_cache(len(ids)):
            add(part.data)
        file.write(_CRC.pack(crc))


def load_session(bundle: Bundle, cache: PrefixCache, path: Path | str, check: Callable[[], None]) -> int:
    """Read a file of `save_session` into the cache; return the number of its tokens.

    All is checked before the model changes: the file is read twice. Raises as `LanguageModel.load_session`, and what
    `check` raises.
    """
    runtime, place = require_savable(cache.runtime), _path(path)
    if place.is_dir():
        raise SessionError(f"{path} is a folder, not a session: give the file that a session was saved in")
    if place.exists() and not place.is_file():
        raise SessionError(f"{path} is not a regular file: give the file that a session was saved in")
    with _explained(place, "read"), place.open("rb") as stream:
        file = _Reader(stream, place, check)
        front = file.front(bundle, runtime)
        left = front.header.cache_bytes
        while left:
            left -= file.read(min(left, _BLOCK)).size
        if not file.ends():
            file.refuse(f"this session file is damaged: {_ADVICE}")
        if front.ids:
            try:
                checked_tokens(front.ids, runtime.vocab_size)
            except GenerationError as error:
                raise SessionError(f"{path}: {error}") from error
        file.rewind()
        front = file.front(bundle, runtime)
        # From here on the model changes. A file that another program changes meanwhile is noticed at its end.
        cache.replace([], None, 0)
        runtime.load_cache(len(front.ids), file.read)
        if not file.ends():
            runtime.reset()
            file.refuse(f"this session file changed while it was read: {_ADVICE}")
    # A prompt that took one step does so here too; a longer one only with the same chunk.
    header, prompt = front.header, None
    same = header.chunk == runtime.chunk
    if front.logits is not None:
        one_step = header.prompt_tokens <= min(header.chunk, runtime.chunk)
        fresh = header.fresh and (same or one_step)
        prompt = Prefilled(front.ids[: header.prompt_tokens], front.logits, fresh)
    cache.replace(front.ids, prompt, header.fresh_tokens if same else 0)
    return len(front.ids)


def manifest_sha256(bundle: Bundle) -> str:
    """Return the SHA-256 of a bundle's manifest as `json.dumps(..., ensure_ascii=False)` writes it, in hexadecimal.

    Raises:
        BundleError: the manifest is no longer the one that was opened.
    """
    path = bundle.file(MANIFEST)
    errors = ErrorFactory(BundleError, "load the bundle again")
    data = read_bytes(path, errors)
    if Manifest.from_json(data, path) != bundle.manifest:
        raise errors.at(path, "was replaced after the bundle was loaded")
    return hashlib.sha256(json.dumps(parse(data, path, errors), ensure_ascii=False).encode()).hexdigest()


def require_savable(runtime: Runtime) -> SavableRuntime:
    """Check that a runtime can save its KV cache, and return it.

    Raises:
        SessionError: it cannot.
    """
    if not isinstance(runtime, SavableRuntime):
        raise SessionError(
            f"the runtime {runtime.name} cannot save or load its KV cache: use onnxruntime-cpu or cuda-kernels"
        )
    return runtime


def _path(path: Path | str) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise ArgumentTypeError(f"path is {path!r:.100}: give the path of a session file")
    if "\0" in os.fspath(path):
        raise SessionError(f"{os.fspath(path)!r:.100} is not a path: give the path of a session file")
    return Path(path)


@contextlib.contextmanager
def _explained(path: Path, what: str) -> Iterator[None]:
    """Turn an error of the system into one that says which file cannot be read or written, and why."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # `atomic_file` explains a full disk
            raise
        raise SessionError(f"{path} cannot be {what}: {error.strerror or error}") from error


@dataclass(frozen=True)
class _Front:
    """The parts of a file before the cache."""

    header: Header
    ids: list[int]
    logits: NDArray[np.float32] | None


class _Reader:
    """A session file that is read twice: first to check it, then into the model."""

    def __init__(self, stream: BinaryIO, path: Path, check: Callable[[], None]) -> None:
        self._stream, self._path, self._check, self._crc = stream, path, check, 0

    def refuse(self, why: str) -> None:
        """Raise the error of an unusable file."""
        raise SessionError(f"{self._path}: {why}")

    def read(self, size: int) -> NDArray[np.uint8]:
        """Return exactly `size` bytes. Raises SessionError where the file ends before."""
        data = np.empty(size, np.uint8)
        view = data.data
        for begin in range(0, size, _BLOCK):
            self._check()
            part = view[begin : begin + _BLOCK]
            if self._stream.readinto(part) != len(part):  # type: ignore[attr-defined]  # a BufferedReader has it
                self.refuse(f"this session file is cut off: {_ADVICE}")
            self._crc = zlib.crc32(part, self._crc)
        return data

    def ends(self) -> bool:
        """Return whether the file ends with the CRC of what was read."""
        crc = self._crc
        (stored,) = _CRC.unpack(self.read(_CRC.size).tobytes())
        return bool(stored == crc) and not self._stream.read(1)

    def rewind(self) -> None:
        """Go back to the beginning."""
        self._stream.seek(0)
        self._crc = 0

    def front(self, bundle: Bundle, runtime: SavableRuntime) -> _Front:
        """Read and check the parts before the cache."""
        header = self._header(bundle, runtime)
        ids: list[int] = self.read(4 * header.tokens).view("<i4").tolist()
        logits = self.read(4 * header.vocab_size).view("<f4").astype(np.float32) if header.prompt_tokens else None
        return _Front(header, ids, logits)

    def _header(self, bundle: Bundle, runtime: SavableRuntime) -> Header:
        if self.read(len(MAGIC)).tobytes() != MAGIC:
            self.refuse("this is not a session that EdgeLM saved")
        version, size = _NUMBERS.unpack(self.read(_NUMBERS.size).tobytes())
        if version != VERSION:
            self.refuse(f"session format {version}, and this EdgeLM reads {VERSION}: {_ADVICE}")
        if size > _MOST_HEADER:
            self.refuse(f"the session's header is damaged: {_ADVICE}")
        data = without_unknown(Header, parse(self.read(size).tobytes(), self._path, _ERRORS))
        header = from_data(Header, data, self._path, _ERRORS)
        for name in ("prompt_tokens", "fresh_tokens"):
            if getattr(header, name) > header.tokens:
                raise _ERRORS.at(self._path, f"{name} is {getattr(header, name)}, and there are {header.tokens} tokens")
        if header.manifest != manifest_sha256(bundle):
            self.refuse("this session belongs to another bundle: open that one, or save the session again")
        if header.runtime != runtime.name:
            self.refuse(
                f"this session was saved with the runtime {quoted(header.runtime)}, not {runtime.name}: load the "
                f"bundle with that runtime, or {_ADVICE}"
            )
        if header.kv != runtime.kv:
            self.refuse(
                f"this session has a KV cache of type {quoted(header.kv)}, and the model has {runtime.kv}: open the "
                "bundle with that type"
            )
        if header.tokens > runtime.context_length:
            error = context_full(header.tokens, 0, runtime.context_length, runtime.model_context_length)
            raise type(error)(f"{self._path}: {error}")
        if header.vocab_size != runtime.vocab_size or header.cache_bytes != runtime.saved_bytes(header.tokens):
            self.refuse(f"the session's sizes are not those of the model: {_ADVICE}")
        return header
