"""Do models load and unload on demand, do clients that leave free their slots, and does the server end in order?"""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from http_server import HttpServer

from edgelm.serving.events import EventStream, Inbox

TEXT = "/v1/completions"
START = {"prompt": "def add(a, b):", "temperature": 0, "max_tokens": 4}
LONG = {"prompt": "def add(a, b):", "max_tokens": 450, "ignore_eos": True, "temperature": 0}
Bundles = Callable[[str, str, str], Path]


def states(running: HttpServer) -> dict[str, str]:
    found: dict[str, str] = running.client.get("/health").json()["models"]
    return found


def figures(running: HttpServer) -> dict[str, float]:
    text = running.client.get("/metrics").text
    rows = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in rows}


def test_a_model_loads_with_its_first_request(serving: Callable[..., HttpServer]) -> None:
    running = serving(preload=False)
    assert states(running) == {"olmoe": "unloaded"}
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: running.answer(TEXT, START), range(6)))
    assert len({answer["choices"][0]["text"] for answer in answers}) == 1
    assert states(running) == {"olmoe": "loaded"}
    assert running.answer("/models/unload", {"model": "olmoe"})["state"] == "unloaded"
    assert running.answer("/models/unload", {})["state"] == "unloaded"
    assert running.answer("/models/load", {})["state"] == "loaded"
    assert running.error("/models/load", {"model": "other"}, 404)["code"] == "model_not_found"


def test_the_memory_limit_unloads_the_model_that_was_not_used_for_the_longest_time(
    serving: Callable[..., HttpServer], tiny_bundle: Bundles
) -> None:
    models = {name: tiny_bundle("olmoe", "int4", "native") for name in ("a", "b", "c")}
    probe = serving(models=models, preload=False, prefix_bytes=1 << 20)
    needed = probe.service.models.all["a"].needed_bytes
    running = serving(models=models, prefix_bytes=1 << 20, memory=int(2.5 * needed))
    assert states(running) == {"a": "loaded", "b": "loaded", "c": "unloaded"}
    running.answer(TEXT, {**START, "model": "a"})
    running.answer(TEXT, {**START, "model": "c"})
    assert states(running) == {"a": "loaded", "b": "unloaded", "c": "loaded"}
    with ThreadPoolExecutor(9) as pool:  # they take turns where not all fit
        list(pool.map(lambda name: running.answer(TEXT, {**START, "model": name}), "abcabcabc"))
    assert list(states(running).values()).count("loaded") <= 2
    small = serving(models=models, preload=False, memory=needed // 2)
    assert "of memory" in small.error(TEXT, {**START, "model": "a"}, 503)["message"]


def test_a_model_in_use_is_not_unloaded(serving: Callable[..., HttpServer]) -> None:
    running = serving(slots=1)
    with running.client.stream("POST", TEXT, json={**LONG, "n": 16, "stream": True}) as stream:
        lines = stream.iter_lines()  # kept: without it the connection is closed
        next(lines)
        assert "in use" in running.error("/models/unload", {}, 409)["message"]
    running.wait(lambda: running.service.models.all["olmoe"].users == 0)
    assert running.answer("/models/unload", {})["state"] == "unloaded"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(serving: Callable[..., HttpServer], stream: bool) -> None:
    running = serving(slots=1)
    body = json.dumps({**LONG, "n": 16, "stream": stream}).encode()
    leaving = socket.create_connection(("127.0.0.1", running.port))
    head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    leaving.sendall(head.encode() + body)
    running.wait(lambda: figures(running)['edgelm_sequences_running{model="olmoe"}'] == 1)
    leaving.close()
    running.wait(lambda: running.service.active == 0)
    running.wait(lambda: figures(running)['edgelm_sequences_waiting{model="olmoe"}'] == 0)
    found = figures(running)
    assert found['edgelm_sequences_running{model="olmoe"}'] == 0
    assert found['edgelm_generated_tokens_total{model="olmoe"}'] < 16 * 450
    assert running.answer(TEXT, START)["usage"]["completion_tokens"] == 4


def test_a_slow_reader_does_not_keep_others_waiting(serving: Callable[..., HttpServer]) -> None:
    from edgelm.serving.settings import Limits

    running = serving(limits=Limits(send_seconds=2))
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    slow.connect(("127.0.0.1", running.port))
    body = json.dumps({**LONG, "n": 16, "stream": True, "logprobs": 20}).encode()
    head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    slow.sendall(head.encode() + body)
    slow.recv(10)
    began = time.monotonic()
    for _ in range(3):
        running.answer(TEXT, START)
    assert time.monotonic() - began < 20
    running.wait(lambda: running.service.active == 0, 60)  # it reads nothing, and is dropped in the end
    slow.close()


def test_metrics_count_what_happened(serving: Callable[..., HttpServer]) -> None:
    running = serving()
    running.answer(TEXT, {**START, "ignore_eos": True})
    running.answer(TEXT, {**START, "ignore_eos": True, "n": 2})
    running.error(TEXT, {**START, "n": 0})
    text = running.client.get("/metrics").text
    for line in text.splitlines():
        assert re.fullmatch(r'# (HELP|TYPE) edgelm_\w+ .+|edgelm_\w+(\{(\w+="[^"]*",?)+\})? [-+.\dein]+', line), line
    found = figures(running)
    assert found['edgelm_http_requests_total{path="/v1/completions",status="200"}'] == 2
    assert found['edgelm_http_requests_total{path="/v1/completions",status="400"}'] == 1
    assert found['edgelm_generated_tokens_total{model="olmoe"}'] == 12
    assert found['edgelm_sequences_finished_total{model="olmoe",reason="length"}'] == 3
    assert found['edgelm_time_to_first_token_seconds_count{model="olmoe"}'] == 3
    assert found['edgelm_time_between_tokens_seconds_count{model="olmoe"}'] == 9
    assert found['edgelm_time_between_tokens_seconds_bucket{model="olmoe",le="+Inf"}'] == 9
    assert found["edgelm_models_loaded"] == 1
    assert found["edgelm_requests_active"] == 0


def test_tokens_go_both_ways(server: HttpServer) -> None:
    found = server.answer("/tokenize", {"model": "olmoe", "prompt": "def add(a, b):\n    return 'Größe'"})
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["max_model_len"] == 512
    text = server.answer("/detokenize", {"model": "olmoe", "tokens": found["tokens"]})["prompt"]
    assert text == "def add(a, b):\n    return 'Größe'"
    talk = {"model": "olmoe", "messages": [{"role": "user", "content": "hi"}]}
    usage = server.answer("/v1/chat/completions", {**talk, "max_tokens": 1})["usage"]
    assert server.answer("/tokenize", talk)["count"] == usage["prompt_tokens"]
    assert server.error("/tokenize", {"model": "olmoe"})["param"] == "prompt"
    assert server.error("/detokenize", {"model": "olmoe", "tokens": [9999]})["param"] == "tokens"


class Program:
    """`edgelm serve` as a process."""

    def __init__(self, *arguments: str, folder: Path) -> None:
        command = [sys.executable, "-m", "edgelm", "serve", *arguments, "--port", "0", "--threads", "1"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder)
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        self.url = self.line.partition(" ")[0]

    def end(self, number: int) -> tuple[int, str]:
        """Send a signal; return the exit code and standard error."""
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors


def test_the_program_says_when_it_is_ready_and_ends_by_a_signal(tiny_bundle: Bundles, tmp_path: Path) -> None:
    bundle = str(tiny_bundle("olmoe", "int4", "native"))
    program = Program(f"tiny={bundle}", f"other={bundle}", "-v", folder=tmp_path)
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+  \(tiny, other; (page at /, )?API at /v1\)\n", program.line)
    assert httpx.post(program.url + TEXT, json={**START, "model": "tiny"}, timeout=60).status_code == 200
    assert httpx.get(program.url + "/health", headers={"Host": "evil.example"}).status_code == 403
    code, errors = program.end(signal.SIGTERM)
    assert code == 130
    assert "POST /v1/completions 200, 127.0.0.1" in errors
    assert errors.endswith("terminated\n")
    assert "Traceback" not in errors


@pytest.mark.parametrize(("seconds", "complete"), [("30", True), ("0", False)])
def test_running_requests_finish_or_end_with_an_error(
    tiny_bundle: Bundles, tmp_path: Path, seconds: str, complete: bool
) -> None:
    bundle = str(tiny_bundle("olmoe", "int4", "native"))
    program = Program(bundle, "--finish-seconds", seconds, "--slots", "1", folder=tmp_path)
    with httpx.stream("POST", program.url + TEXT, json={**LONG, "n": 12, "stream": True}, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        program.process.send_signal(signal.SIGINT)
        rest = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert program.end(0)[0] == 130
    ended = [choice for one in rest if "choices" in one for choice in one["choices"] if choice["finish_reason"]]
    assert (len(ended) == 12) is complete
    assert ("error" in rest[-1]) is not complete
    if not complete:
        assert rest[-1]["error"]["code"] == "closing"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--host", "0.0.0.0"], 2, "lets other machines use the server"),
        (["--host", "::"], 2, "lets other machines use the server"),
        (["--api-key-file", "/nothing/there"], 1, "cannot be read"),
        (["--context-length", "9999"], 1, "context_length is 9999"),
        (["--host", "no.such.host.invalid", "--allow-anyone"], 1, "cannot listen on"),
        (["--slots", "0"], 2, "--slots"),
    ],
)
def test_what_cannot_be_served_is_refused(
    tiny_bundle: Bundles, tmp_path: Path, arguments: list[str], code: int, said: str
) -> None:
    command = [sys.executable, "-m", "edgelm", "serve", str(tiny_bundle("olmoe", "int4", "native")), *arguments]
    ended = subprocess.run(
        [*command, "--port", "0"], capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path
    )
    assert ended.returncode == code
    assert said in ended.stderr
    assert ended.stderr.count("\n") <= 4
    assert ended.stdout == ""


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    from edgelm.cli.serve import need_serve_extra
    from edgelm.errors import EdgeLMError

    find: Any = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "starlette" else find(name))
    with pytest.raises(EdgeLMError, match=r"needs starlette, not installed here: pip install .*serve"):
        need_serve_extra()


def test_only_a_server_on_this_machine_checks_its_names() -> None:
    from edgelm.cli.serve import allowed_hosts

    assert allowed_hosts("0.0.0.0", ()) is None
    assert allowed_hosts("127.0.0.1", ()) == ("localhost", "127.0.0.1", "::1")
    assert allowed_hosts("127.0.0.2", ("Proxy",)) == ("localhost", "127.0.0.1", "::1", "127.0.0.2", "proxy")


def test_a_client_that_leaves_before_the_first_event_holds_nothing() -> None:
    freed: list[str] = []

    async def never(*_: object) -> None:
        await asyncio.Event().wait()

    async def gone() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def answer() -> None:
        async def events() -> AsyncGenerator[bytes, None]:
            yield b"first"

        stack = AsyncExitStack()
        stack.callback(freed.append, "slot")
        await EventStream(events(), stack, 60)({"type": "http"}, gone, never)

    asyncio.run(answer())
    assert freed == ["slot"]


def test_a_stream_ends_whenever_its_client_leaves() -> None:
    """Also in the very step in which an event arrives or is sent."""

    async def answer(steps: int) -> list[bytes]:
        inbox: Inbox[bytes] = Inbox()
        sent: list[bytes] = []

        async def receive() -> dict[str, str]:
            for _ in range(steps):
                await asyncio.sleep(0)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            await asyncio.sleep(0)
            sent.append(message)

        async def engine() -> None:
            for _ in range(300):
                inbox.put(b"token")
                await asyncio.sleep(0)

        async def events() -> AsyncGenerator[bytes, None]:
            while found := await inbox.take(0.1):
                for item in found:
                    yield item

        running = asyncio.ensure_future(engine())
        await EventStream(events(), AsyncExitStack(), 60)({"type": "http"}, receive, send)
        running.cancel()
        return sent

    late = {steps: len(sent) for steps in range(40) if len(sent := asyncio.run(answer(steps))) > steps + 2}
    assert not late
