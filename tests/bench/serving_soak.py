"""Load a server to its limit for half an hour, with clients that leave, read slowly and send nonsense.

    python tests/bench/serving_soak.py BUNDLE --minutes 30

It fails if a request gets no answer, if an answer is not the one that the same request got at the beginning, if the
server does not become idle afterwards, if its memory grew by more than 2 % after the first fifth of the time, or if the
parity check does not pass then. The last line of the output is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import date
from pathlib import Path
from typing import Any

CLIENTS = 16
SLOTS = 4
KEY = "a-key-of-this-measurement"
WORDS = [
    *("the", "model", "reads", "a", "text", "and", "computes", "what", "may", "come", "next", "one", "token", "after"),
    *("other", "until", "it", "ends", "in", "which", "every", "row", "of", "weights", "is", "read", "once", "more"),
]
PATIENCE = 120
"""Seconds after which a request without an answer counts as stuck."""
Reply = tuple[int, bytes]


class Server:
    """`edgelm serve` in a process of its own."""

    def __init__(self, bundle: Path, folder: Path, context_length: int, prefix_cache: str) -> None:
        keys = folder / "keys"
        keys.write_text(f"soak: {KEY}\n")
        keys.chmod(0o600)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = folder / "server.log"
        command = [
            *(sys.executable, "-m", "edgelm", "serve", f"model={bundle}", "--port", str(self.port)),
            *("--slots", str(SLOTS), "--api-key-file", str(keys), "--max-waiting", "24", "--max-requests", "40"),
            *("--context-length", str(context_length), "--max-seconds", "60", "--prefix-cache", prefix_cache),
            *("--cache-dir", str(folder / "cache"), "--cache-dir-size", "256MiB"),
        ]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)

    def resident(self) -> int:
        """Return the server's resident memory without pages of mapped files, in bytes."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    def descriptors(self) -> int:
        """Return the number of the server's open files and sockets."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))


def body_of(chance: random.Random, *, tokens: int, words: int) -> dict[str, Any]:
    """Return a valid request for a completion."""
    shared = " ".join(WORDS[: 4 * chance.randrange(5)])
    own = " ".join(chance.choices(WORDS, k=chance.randrange(1, words)))
    options: dict[str, Any] = {"model": "model", "prompt": f"{shared} {own}", "max_tokens": chance.randrange(1, tokens)}
    if chance.random() < 0.7:
        options |= {"temperature": 1.1, "top_p": 0.9, "seed": chance.randrange(1000)}
    else:
        options["temperature"] = 0
    extra: list[dict[str, Any]] = [
        {}, {}, {"n": 3}, {"logprobs": 3}, {"stop": ["e", "the"]}, {"frequency_penalty": 0.5, "presence_penalty": 0.5},
        {"logit_bias": {"7": 5}}, {"regex": "[a-z ]{3,20}"}, {"echo": True},
    ]  # fmt: skip
    return options | chance.choice(extra)


class Soak:
    """The clients and what they saw."""

    def __init__(self, server: Server, minutes: float, words: int, tokens: int) -> None:
        self.server, self.until = server, time.monotonic() + 60 * minutes
        self.words, self.tokens = words, tokens
        self.seen: Counter[str] = Counter()
        self.problems: list[str] = []
        self.expected: list[tuple[dict[str, Any], bytes]] = []

    async def connect(self, **options: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.server.port, **options)

    async def send(
        self, writer: asyncio.StreamWriter, method: str, path: str, body: bytes = b"", key: str = KEY
    ) -> None:
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{self.server.port}\r\nConnection: close\r\n"
            f"Authorization: Bearer {key}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        await writer.drain()

    async def ask(self, method: str, path: str, body: object = None, key: str = KEY) -> Reply:
        """Send a request and return status and body of the answer."""
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        reader, writer = await self.connect()
        try:
            await self.send(writer, method, path, data, key)
            answer = await asyncio.wait_for(reader.read(), PATIENCE)
        finally:
            writer.close()
        head, _, rest = answer.partition(b"\r\n\r\n")
        return int(head.split()[1]) if head else 0, rest

    async def whole(self, chance: random.Random) -> None:
        status, _ = await self.ask("POST", "/v1/completions", body_of(chance, tokens=self.tokens, words=self.words))
        self.seen[f"whole {status}"] += 1
        if status not in (200, 429, 504):
            self.problems.append(f"a valid request got status {status}")

    async def same(self, chance: random.Random) -> None:
        """Repeat a request of the beginning: its answer has to be the same text, whatever runs beside it."""
        body, expected = chance.choice(self.expected)
        status, answer = await self.ask("POST", "/v1/completions", body)
        self.seen[f"same {status}"] += 1
        if status == 200 and texts(answer) != expected:
            self.problems.append(f"{body} was answered {texts(answer)!r:.80}, and before {expected!r:.80}")

    async def leaves(self, chance: random.Random) -> None:
        """Read a few bytes of a stream and close the connection."""
        reader, writer = await self.connect()
        body = body_of(chance, tokens=self.tokens * 4, words=self.words) | {"stream": True}
        body.pop("echo", None)
        with contextlib.suppress(ConnectionError):
            await self.send(writer, "POST", "/v1/completions", json.dumps(body).encode())
            if chance.random() < 0.7:
                await asyncio.wait_for(reader.read(chance.randrange(1, 600)), PATIENCE)
            else:
                await asyncio.sleep(chance.random() / 5)
        if chance.random() < 0.5:
            writer.transport.abort()
        writer.close()
        self.seen["left"] += 1

    async def slow(self, chance: random.Random) -> None:
        """Read a stream in small pieces with pauses."""
        reader, writer = await self.connect(limit=256)
        body = body_of(chance, tokens=self.tokens, words=self.words) | {"stream": True, "n": 2}
        body.pop("echo", None)
        got = b""
        try:
            await self.send(writer, "POST", "/v1/completions", json.dumps(body).encode())
            while piece := await asyncio.wait_for(reader.read(200), PATIENCE):
                got += piece
                await asyncio.sleep(0.02)
        finally:
            writer.close()
        self.seen["slow 200" if b"[DONE]" in got else "slow, not to the end"] += 1
        if got.startswith(b"HTTP/1.1 200") and b"[DONE]" not in got and b'"error"' not in got:
            self.problems.append(f"a stream that was read slowly ended without [DONE]: ...{got[-100:]!r}")

    async def nonsense(self, chance: random.Random) -> None:
        """Send what is no request: the answer is an error of the 400s, or the connection is closed."""
        valid = json.dumps(body_of(chance, tokens=4, words=9))
        bodies: list[Any] = [
            b"", b"{", b"[]", b"null", chance.randbytes(300), valid[:-3].encode(), b"[" * 5000, b" " * (5 << 20),
            {"model": "other", "prompt": "x"}, {"model": "model"}, {"model": "model", "prompt": []},
            {"model": "model", "prompt": "x", "unknown": 1}, {"model": "model", "prompt": "x", "temperature": -1},
            {"model": "model", "prompt": ["x"] * 5000}, {"model": "model", "prompt": "x " * 20000},
            {"model": "model", "prompt": [10**9]}, {"model": "model", "prompt": "x", "max_tokens": "7"},
            {"model": "model", "prompt": "x", "regex": "(" * 50}, {"model": "model", "prompt": "x", "n": 10**6},
        ]  # fmt: skip
        body = chance.choice(bodies)
        path = chance.choice(["/v1/completions"] * 4 + ["/v1/chat/completions", "/tokenize", "/v1/embeddings", "/%00"])
        try:
            status, answer = await self.ask("POST", path, body, KEY if chance.random() < 0.9 else "wrong")
        except ConnectionError:
            status, answer = 400, b""
        self.seen[f"nonsense {status}"] += 1
        if not (400 <= status < 500 or (status == 200 and path != "/v1/completions")):
            self.problems.append(f"{path} with {body!r:.60} got status {status}: {answer!r:.100}")
        if b"Traceback" in answer or b"site-packages" in answer or b"/home" in answer:
            self.problems.append(f"an answer tells internals: {answer!r:.200}")

    async def raw(self, chance: random.Random) -> None:
        """Send bytes that are no HTTP, and half a request."""
        reader, writer = await self.connect()
        with contextlib.suppress(ConnectionError):
            writer.write(
                chance.choice([chance.randbytes(200), b"GET / HT", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"])
            )
            await writer.drain()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(reader.read(), chance.random())
        writer.close()
        self.seen["raw"] += 1

    async def client(self, number: int) -> None:
        chance = random.Random(number)
        kinds: list[Callable[[random.Random], Awaitable[None]]] = [
            self.whole, self.same, self.leaves, self.slow, self.nonsense, self.raw,
        ]  # fmt: skip
        while time.monotonic() < self.until and len(self.problems) < 20:
            kind = chance.choices(kinds, [8, 4, 5, 3, 3, 1])[0]
            try:
                await kind(chance)
            except asyncio.TimeoutError:
                self.problems.append(f"no answer in {PATIENCE} s: {kind.__name__}")
            except ConnectionError as error:
                self.problems.append(f"{kind.__name__}: {error!r}")

    async def watch(self, every: float) -> list[tuple[float, int, int]]:
        """Return memory and open files over time, as (seconds, bytes, number)."""
        begun, found = time.monotonic(), []
        while time.monotonic() < self.until and len(self.problems) < 20:
            found.append((time.monotonic() - begun, self.server.resident(), self.server.descriptors()))
            await asyncio.sleep(every)
        return found

    async def metric(self, name: str) -> float:
        _, text = await self.ask("GET", "/metrics")
        return sum(float(line.split()[-1]) for line in text.decode().splitlines() if line.startswith(name))

    async def run(self, every: float) -> dict[str, Any]:
        await self.ready()
        chance = random.Random(99)
        for _ in range(12):
            body = body_of(chance, tokens=self.tokens, words=self.words)
            if body["temperature"] and "seed" not in body:
                continue
            status, answer = await self.ask("POST", "/v1/completions", body)
            assert status == 200, answer
            self.expected.append((body, texts(answer)))
        begun = time.monotonic()
        watching = asyncio.create_task(self.watch(every))
        await asyncio.gather(*(self.client(number) for number in range(CLIENTS)))
        seconds = time.monotonic() - begun
        memory = await watching
        idle_from = time.monotonic()
        while await self.metric("edgelm_sequences_running") + await self.metric("edgelm_sequences_waiting"):
            if time.monotonic() - idle_from > 60:
                self.problems.append("sequences still run a minute after the last request")
                break
            await asyncio.sleep(0.2)
        await asyncio.sleep(1)
        for body, expected in self.expected:
            status, answer = await self.ask("POST", "/v1/completions", body)
            if status != 200 or texts(answer) != expected:
                self.problems.append(f"after it, {body} got another answer")
        first = [one for one in memory if one[0] >= 0.2 * seconds]
        early = first[: max(1, len(first) // 8)]
        late = first[-len(early) :]
        typical = [sorted(one[1] for one in part)[len(part) // 2] for part in (early, late)]
        growth = typical[1] / typical[0] - 1
        if growth > 0.02:
            self.problems.append(f"memory grew by {growth:.1%}: {typical[0]:,} to {typical[1]:,} bytes")
        files = [max(one[2] for one in part) for part in (early, late)]
        return {
            "minutes": round(seconds / 60, 1),
            "requests": sum(self.seen.values()),
            "seen": dict(sorted(self.seen.items())),
            "generated_tokens": await self.metric("edgelm_generated_tokens_total"),
            "prompt_tokens": await self.metric("edgelm_prompt_tokens_total"),
            "reused_tokens": await self.metric("edgelm_reused_tokens_total"),
            "memory": {"early": typical[0], "late": typical[1], "growth": round(growth, 4)},
            "memory_by_minute": by_minute(memory),
            "open_files": {"early": files[0], "late": files[1], "after": self.server.descriptors()},
        }

    async def ready(self) -> None:
        for _ in range(600):
            with contextlib.suppress(OSError):
                status, _ = await self.ask("GET", "/health")
                if status == 200:
                    return
            if self.server.process.poll() is not None:
                break
            await asyncio.sleep(0.2)
        raise SystemExit(f"the server did not start: {self.server.log.read_text()[-2000:]}")


def by_minute(memory: list[tuple[float, int, int]]) -> list[float]:
    """Return the memory at each minute, in MB."""
    found: dict[int, int] = {}
    for seconds, size, _ in memory:
        found.setdefault(int(seconds // 60), size)
    return [round(size / 1e6, 1) for size in found.values()]


def texts(answer: bytes) -> bytes:
    """Return the texts of an answer's choices, and why they ended."""
    choices = json.loads(answer)["choices"]
    return json.dumps([(one["text"], one["finish_reason"], one["logprobs"]) for one in choices]).encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--words", type=int, default=60, help="words of a prompt at most")
    parser.add_argument("--tokens", type=int, default=40, help="tokens of an answer at most")
    parser.add_argument("--context-length", type=int, default=512)
    parser.add_argument("--prefix-cache", default="64MiB")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = Server(given.bundle.resolve(), Path(folder), given.context_length, given.prefix_cache)
        try:
            soak = Soak(server, given.minutes, given.words, given.tokens)
            result = asyncio.run(soak.run(every=max(0.5, given.minutes / 10)))
        finally:
            server.process.terminate()
            code = server.process.wait(90)
        parity = subprocess.run(
            [sys.executable, "-m", "edgelm", "parity", str(given.bundle)], capture_output=True, text=True, check=False
        )
    if parity.returncode:
        soak.problems.append(f"the parity check fails afterwards: {parity.stdout[-300:]}")
    if code not in (0, 130):
        soak.problems.append(f"the server ended with status {code}")
    result |= {"parity": parity.returncode == 0, "problems": soak.problems, "date": date.today().isoformat()}
    result |= {"cpus": len(os.sched_getaffinity(0)), "python": platform.python_version()}
    for name, value in result.items():
        print(f"{name}: {value}")
    print(json.dumps(result))
    sys.exit(bool(soak.problems))


if __name__ == "__main__":
    main()
