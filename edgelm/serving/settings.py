"""Settings of a server, and the file with its keys."""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgelm.errors import ArgumentValueError, EdgeLMError
from edgelm.serving.engine import DEFAULT_PREFIX_BYTES, DEFAULT_QUEUE, DEFAULT_SLOTS

SHORTEST_KEY = 16
_MOST_KEYS = 10_000
_KEY_FILE_BYTES = 1 << 20


@dataclass(frozen=True)
class Key:
    """A key of a client.

    Attributes:
        name: its label, which is no secret.
        digest: SHA-256 of the key.
    """

    name: str
    digest: bytes


@dataclass(frozen=True)
class Limits:
    """What a request may ask for. Everything beyond is refused by name.

    Attributes:
        body_bytes: bytes of a body.
        body_seconds: seconds to receive a body.
        prompt_tokens: tokens of a prompt; None: as many as the context has.
        max_tokens: tokens of an answer; None: as many as the context has.
        seconds: seconds of a request, with the time in the queue.
        per_key: requests of a key (without keys: of an address) at a time.
        queue: sequences that wait for a slot.
        send_seconds: seconds that a client may take to read what was sent.
    """

    body_bytes: int = 4 << 20
    body_seconds: float = 60
    prompt_tokens: int | None = None
    max_tokens: int | None = None
    seconds: float = 600
    per_key: int = 64
    queue: int = DEFAULT_QUEUE
    send_seconds: float = 60


@dataclass(frozen=True)
class Settings:
    """Settings of a server.

    Attributes:
        models: the folder of each bundle, by the name of its model.
        slots: sequences of a model that decode together.
        loading: options of `edgelm.load`: runtime, threads, context_length, kv, weight_memory.
        preload: whether all models are loaded at start; else each with its first request.
        memory: bytes that loaded models may take, estimated; None: no limit.
        prefix_bytes: bytes of computed prompts that each model keeps.
        cache_dir: folder in which computed prompts survive a restart; None: they do not.
        cache_dir_bytes: bytes of the files in it.
        cache_dir_shared: whether several servers have it; each then keeps its files in a numbered folder inside.
        keys: keys of the clients; none: everybody may use the server.
        origins: web pages that may use the server, as "https://example.org".
        hosts: names that the header `Host` may have; None: any.
        limits: limits of a request.
        finish_seconds: seconds that running requests have to finish when the server is stopped.
    """

    models: Mapping[str, Path]
    slots: int = DEFAULT_SLOTS
    loading: Mapping[str, Any] = field(default_factory=dict)
    preload: bool = True
    memory: int | None = None
    prefix_bytes: int = DEFAULT_PREFIX_BYTES
    cache_dir: Path | None = None
    cache_dir_bytes: int = 8 << 30
    cache_dir_shared: bool = False
    keys: tuple[Key, ...] = ()
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] | None = None
    limits: Limits = field(default_factory=Limits)
    finish_seconds: float = 30


def named_bundles(arguments: Sequence[str]) -> dict[str, Path]:
    """Return the folders of `BUNDLE` and `NAME=BUNDLE` by the name of the model, which is the folder's without one.

    Raises:
        ArgumentValueError: two models have the same name, or a name cannot be used.
    """
    found: dict[str, Path] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        folder = Path(path if equals else argument)
        # Of a link its own name: that is what was typed.
        name = name if equals else folder.name if folder.name not in ("", "..") else folder.resolve().name
        if not name or not name.isprintable() or len(name) > 256:
            raise ArgumentValueError(f"{argument!r} gives its model no name: write NAME=FOLDER")
        if name in found:
            raise ArgumentValueError(f"two models are called {name!r}: give one another name, as NAME={folder}")
        found[name] = folder
    return found


def read_keys(path: Path) -> tuple[Key, ...]:
    """Read a file with one key a line, each perhaps after a name and a colon. Lines that begin with # are skipped.

    Raises:
        EdgeLMError: the file cannot be read, others may read it, it has no key, or a key is short or there twice.
    """
    try:
        with path.open("rb") as stream:
            if os.name == "posix" and stat.S_IMODE(os.fstat(stream.fileno()).st_mode) & 0o077:
                raise EdgeLMError(f"{path}: other users can read these keys: chmod 600 {path}")
            data = stream.read(_KEY_FILE_BYTES + 1)
        text = data.decode()
    except OSError as error:
        raise EdgeLMError(f"{path}: cannot be read ({error.strerror}): give a file with one key a line") from error
    except UnicodeDecodeError as error:
        raise EdgeLMError(f"{path}: is not a text: give a file with one key a line") from error
    keys: dict[bytes, Key] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        before, colon, after = line.partition(":")
        name, secret = (before.strip(), after.strip()) if colon else (f"key {number}", line.strip())
        if len(secret) < SHORTEST_KEY or not secret.isascii() or not secret.isprintable() or " " in secret:
            raise EdgeLMError(
                f"{path}: line {number}: a key has {SHORTEST_KEY} or more characters of ASCII and no space: "
                'make one with `python -c "import secrets; print(secrets.token_urlsafe(32))"`'
            )
        digest = hashlib.sha256(secret.encode()).digest()
        if digest in keys:
            raise EdgeLMError(f"{path}: line {number}: this key is there twice")
        keys[digest] = Key(name, digest)
    if not keys or len(data) > _KEY_FILE_BYTES or len(keys) > _MOST_KEYS:
        raise EdgeLMError(f"{path}: has {len(keys)} keys: give a file with 1 to {_MOST_KEYS}, one a line")
    return tuple(keys.values())


def owner(keys: Sequence[Key], secret: str) -> str | None:
    """Return the name of a key; None if there is no such key. It takes the same time whichever key it is."""
    digest = hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()
    found: str | None = None
    for key in keys:
        if hmac.compare_digest(key.digest, digest):
            found = key.name
    return found
