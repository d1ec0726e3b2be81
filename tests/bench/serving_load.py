"""Load generator of the serving benchmark: concurrent OpenAI completions over HTTP, and the figures of a round.

While a round runs, arrived bytes are only kept with their time; they are parsed afterwards, so that the client takes
little of the cores that it shares with the server. It speaks HTTP/1.1 itself, with one connection per request.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

# No request of the benchmark takes longer, unless a server hangs.
REQUEST_SECONDS = 900.0


@dataclass(frozen=True)
class Answer:
    """A streamed completion.

    Attributes:
        sent: clock when the request was sent, before the connection was made.
        times: clock at which each event with a token arrived. A server may send the text of two tokens in one event.
        ended: clock at the end of the stream.
        tokens: generated tokens by the server's own count; `prompt_tokens` and `cached_tokens` likewise.
        cached_tokens: prompt tokens that the server did not compute again; None if it does not tell.
        finish: the reason of the end, "length" or "stop".
    """

    sent: float
    times: tuple[float, ...]
    ended: float
    text: str
    tokens: int
    prompt_tokens: int
    cached_tokens: int | None
    finish: str

    @property
    def first(self) -> float:
        """Seconds from the request to its first token."""
        return self.times[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens."""
        return [after - before for before, after in pairwise(self.times)]


def request(base: str, body: Mapping[str, Any], path: str = "/v1/completions") -> bytes:
    """Return the bytes of a POST of `body` to the server at the URL `base`."""
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {urlsplit(base).netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + content


def _unchunked(parts: Sequence[tuple[float, bytes]]) -> tuple[str, list[tuple[float, bytes]]]:
    """Return the head of a response, and its body's pieces with the time at which each was complete."""
    raw = b"".join(data for _, data in parts)
    head, mark, _ = raw.partition(b"\r\n\r\n")
    if not mark:
        raise RuntimeError(f"the server closed the connection after {raw[:200]!r}")
    ends, end = [], 0
    for clock, data in parts:
        end += len(data)
        ends.append((end, clock))
    pieces: list[tuple[float, bytes]] = []
    at, part = len(head) + len(mark), 0
    chunked = b"transfer-encoding: chunked" in head.lower()
    while at < len(raw):
        while ends[part][0] <= at:
            part += 1
        begin, stop = at, ends[part][0]
        at = stop
        if chunked:
            line_end = raw.find(b"\r\n", begin)
            length = int(raw[begin:line_end].split(b";")[0], 16) if line_end >= 0 else 0
            begin, stop = line_end + 2, line_end + 2 + length
            at = stop + 2
            # The last chunk is empty; an incomplete one means that the connection broke.
            if length == 0 or stop > len(raw):
                break
            while ends[part][0] < stop:
                part += 1
        pieces.append((ends[part][1], raw[begin:stop]))
    return head.decode("latin-1"), pieces


def parse(sent: float, ended: float, parts: Sequence[tuple[float, bytes]]) -> Answer:
    """Read a response from its received parts, each with the clock of its arrival.

    Raises:
        RuntimeError: the server answered with an error, or the stream is not complete.
    """
    head, pieces = _unchunked(parts)
    status = head.split("\r\n", 1)[0]
    if " 200" not in status:
        raise RuntimeError(f"{status}: {b''.join(data for _, data in pieces)[:500]!r}")
    times: list[float] = []
    texts: list[str] = []
    usage: dict[str, Any] = {}
    finish, done, rest = "", False, b""
    for clock, data in pieces:
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            content = line[5:].strip()
            if content == b"[DONE]":
                done = True
                continue
            event = json.loads(content)
            if "error" in event:
                raise RuntimeError(f"the stream has an error: {content.decode()[:500]}")
            usage = event.get("usage") or usage
            for choice in event.get("choices", ()):
                texts.append(choice.get("text") or "")
                finish = choice.get("finish_reason") or finish
                # The event of the end has no token, except where it brings text that was held back.
                if texts[-1] or not choice.get("finish_reason"):
                    times.append(clock)
    if not (done and usage and finish and times):
        raise RuntimeError(f"the stream ended early, after {len(times)} tokens; usage {usage}, finish {finish!r}")
    details = usage.get("prompt_tokens_details") or {}
    return Answer(
        sent, tuple(times), ended, "".join(texts), usage["completion_tokens"], usage["prompt_tokens"],
        details.get("cached_tokens"), finish,
    )  # fmt: skip


class _Receiver(asyncio.Protocol):
    """Sends a request when connected, and keeps what arrives until the stream's end mark or the connection's end."""

    def __init__(self, content: bytes, ended: asyncio.Future[float]) -> None:
        self.content, self.ended = content, ended
        self.parts: list[tuple[float, bytes]] = []
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(self.content)

    def data_received(self, data: bytes) -> None:
        self.parts.append((time.perf_counter(), data))
        if data.endswith((b"[DONE]\n\n\r\n0\r\n\r\n", b"[DONE]\n\n\r\n", b"[DONE]\n\n")):
            self._end()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()

    def _end(self) -> None:
        if not self.ended.done():
            self.ended.set_result(time.perf_counter())
        if self.transport is not None:
            self.transport.close()


async def _client(
    address: tuple[str, int], contents: Sequence[bytes]
) -> list[tuple[float, float, list[tuple[float, bytes]]]]:
    """Send the requests one after another, each when the last is answered."""
    loop = asyncio.get_running_loop()
    found = []
    for content in contents:
        ended: asyncio.Future[float] = loop.create_future()
        sent = time.perf_counter()
        _, receiver = await loop.create_connection(lambda c=content, e=ended: _Receiver(c, e), *address)  # type: ignore[misc]
        clock = await asyncio.wait_for(ended, REQUEST_SECONDS)
        found.append((sent, clock, receiver.parts))
    return found


@dataclass(frozen=True)
class Load:
    """What the clients saw: the answers of each client in order, and the CPU seconds that the clients took."""

    answers: list[list[Answer]]
    cpu_seconds: float

    @property
    def all(self) -> list[Answer]:
        """The answers of all clients."""
        return [answer for answers in self.answers for answer in answers]

    @property
    def seconds(self) -> float:
        """Seconds from the first request to the end of the last answer."""
        return max(answer.ended for answer in self.all) - min(answer.sent for answer in self.all)


def run(base: str, clients: Sequence[Sequence[Mapping[str, Any]]]) -> Load:
    """Run clients at the same time; each sends its requests' bodies back to back.

    Args:
        base: URL of the server, `http://HOST:PORT`.

    Raises:
        RuntimeError: a request failed.
    """
    parts = urlsplit(base)
    assert parts.hostname and parts.port
    address = (parts.hostname, parts.port)
    contents = [[request(base, body) for body in bodies] for bodies in clients]

    async def together() -> list[list[tuple[float, float, list[tuple[float, bytes]]]]]:
        return await asyncio.gather(*(_client(address, mine) for mine in contents))

    before = sum(os.times()[:2])
    received = asyncio.run(together())
    cpu = sum(os.times()[:2]) - before
    return Load([[parse(*answer) for answer in answers] for answers in received], cpu)


def percentile(values: Iterable[float], percent: float) -> float:
    """Return the smallest of the values that at least `percent` % of them do not exceed (nearest rank).

    Raises:
        ValueError: there is no value.
    """
    ordered = sorted(values)
    if not ordered:
        raise ValueError("a percentile needs at least one value")
    return ordered[max(math.ceil(percent / 100 * len(ordered)), 1) - 1]


@dataclass(frozen=True)
class Round:
    """The figures of one engine in one round. Rounds with equal `key` were measured one right after the other.

    Attributes:
        rate: generated tokens of all clients per second, from the first request to the last answer.
        first50, first99: seconds from a request to its first token, median and 99th percentile.
        gap50, gap99: seconds between two tokens of an answer, likewise, over all answers.
        computed: prompt tokens that the server computed; None if it does not tell.
        client_share, server_share: CPU time of the load generator and of the server, as a share of one core.
        other_share: CPU time of everything else on the machine, which should be none.
        bandwidth: bytes per second that the memory gives right after the round; None if it was not measured.
        alone: tokens per second of `generate_many` for the same requests without a server; None if not measured.
    """

    column: str
    workload: str
    clients: int
    started: str
    number: int
    engine: str
    requests: int
    tokens: int
    prompt_tokens: int
    computed: int | None
    seconds: float
    rate: float
    first50: float
    first99: float
    gap50: float
    gap99: float
    client_share: float
    server_share: float
    other_share: float
    bandwidth: float | None = None
    alone: float | None = None

    @property
    def key(self) -> tuple[str, str, int, str, int]:
        """What the rounds of two engines that belong together have in common."""
        return (self.column, self.workload, self.clients, self.started, self.number)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return asdict(self)


def figures_of(load: Load, server_cpu_seconds: float, busy_seconds: float) -> dict[str, Any]:
    """Return the fields of `Round` that come from the answers, and the shares of the CPU.

    Args:
        busy_seconds: CPU time of all processes of the machine.
    """
    answers = load.all
    gaps = [gap for answer in answers for gap in answer.gaps]
    first = [answer.first for answer in answers]
    tokens, prompt = sum(answer.tokens for answer in answers), sum(answer.prompt_tokens for answer in answers)
    cached = [answer.cached_tokens for answer in answers]
    known = [number for number in cached if number is not None]
    return {
        "requests": len(answers),
        "tokens": tokens,
        "prompt_tokens": prompt,
        "computed": prompt - sum(known) if len(known) == len(cached) else None,
        "seconds": load.seconds,
        "rate": tokens / load.seconds,
        "first50": percentile(first, 50),
        "first99": percentile(first, 99),
        "gap50": percentile(gaps, 50),
        "gap99": percentile(gaps, 99),
        "client_share": load.cpu_seconds / load.seconds,
        "server_share": server_cpu_seconds / load.seconds,
        "other_share": max(0.0, busy_seconds - server_cpu_seconds - load.cpu_seconds) / load.seconds,
    }


def usable(rounds: Sequence[Round], other_share: float) -> list[Round]:
    """Return the rounds of those turns in which no other process took more than `other_share` of a core.

    Where one engine's round is spoiled, the others of that turn go too. Where a run was interrupted between two
    engines, the first one has nothing to be compared with, and goes as well.
    """
    turns: dict[tuple[str, str, int, str, int], list[Round]] = {}
    for item in rounds:
        turns.setdefault(item.key, []).append(item)
    engines = {item.started: {other.engine for other in rounds if other.started == item.started} for item in rounds}
    return [
        item
        for turn in turns.values()
        for item in turn
        if len(turn) == len(engines[item.started]) and all(other.other_share <= other_share for other in turn)
    ]


def ratios(rounds: Iterable[Round], field: str, ours: str, theirs: str) -> list[float]:
    """Return ours / theirs of a field of `Round`, for every pair of rounds that belong together.

    A pair whose second figure is 0 has no ratio: tiny models answer with several tokens in one packet.
    """
    found: dict[tuple[str, str, int, str, int], dict[str, float]] = {}
    for item in rounds:
        found.setdefault(item.key, {})[item.engine] = getattr(item, field)
    return [pair[ours] / pair[theirs] for pair in found.values() if ours in pair and pair.get(theirs)]


def share(rounds: Iterable[Round], bytes_per_token: float) -> float | None:
    """Return the median share of the memory's bandwidth that decoding for one client uses; None without such rounds."""
    parts = [
        bytes_per_token / item.gap50 / item.bandwidth for item in rounds if item.clients == 1 and item.bandwidth
    ]  # fmt: skip
    return statistics.median(parts) if parts else None
