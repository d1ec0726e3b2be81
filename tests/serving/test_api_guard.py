"""Are requests without a key, from other hosts or web pages, too large or too many refused, and no path told?"""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from http_server import HttpServer

from edgelm.errors import ArgumentValueError, EdgeLMError
from edgelm.serving.settings import Key, Limits, named_bundles, owner, read_keys

TEXT = "/v1/completions"
START = {"prompt": "def add(a, b):", "temperature": 0, "max_tokens": 4}
LONG = {"prompt": "def add(a, b):", "max_tokens": 450, "ignore_eos": True}
SECRET = "a-key-that-nobody-knows"


@pytest.fixture
def keyed(serving: Callable[..., HttpServer]) -> HttpServer:
    return serving(keys=(Key("app", hashlib.sha256(SECRET.encode()).digest()),))


def test_without_a_key_only_health_and_the_page_answer(keyed: HttpServer) -> None:
    for path in ("/v1/models", "/metrics", "/parity"):
        assert keyed.client.get(path).status_code == 401
    for path in (TEXT, "/v1/chat/completions", "/tokenize", "/models/unload", "/experts"):
        assert keyed.post(path, START).status_code == 401
    assert keyed.client.get("/health").status_code == 200
    assert keyed.client.get("/openapi.json").json()["components"]["securitySchemes"]
    assert keyed.client.get("/").status_code in (200, 404)


@pytest.mark.parametrize(
    "headers", [{"Authorization": f"Bearer {SECRET}"}, {"Authorization": f"bearer  {SECRET}"}, {"X-Api-Key": SECRET}]
)
def test_a_key_opens_the_server(keyed: HttpServer, headers: dict[str, str]) -> None:
    assert keyed.post(TEXT, START, **headers).status_code == 200


@pytest.mark.parametrize("given", [SECRET[:-1], SECRET + "x", "", "Basic", SECRET.upper(), "ü" * 20])
def test_a_wrong_key_is_refused(keyed: HttpServer, given: str) -> None:
    response = keyed.client.post(TEXT, json=START, headers={"Authorization": f"Bearer {given}".strip().encode()})
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["code"] == "invalid_api_key"


def test_other_hosts_and_web_pages_are_refused(serving: Callable[..., HttpServer]) -> None:
    guarded = serving(hosts=("localhost", "127.0.0.1", "::1"), origins=("https://friend.example",))
    for host, status in (
        (f"127.0.0.1:{guarded.port}", 200), ("localhost", 200), ("LOCALHOST:80", 200), ("[::1]:9", 200),
        ("evil.example", 403), ("127.0.0.1.evil.example", 403), ("", 403),
    ):  # fmt: skip
        assert guarded.client.get("/health", headers={"Host": host}).status_code == status, host
    own = guarded.url
    for origin, status in (
        (own, 200), ("https://friend.example", 200), ("https://evil.example", 403), ("null", 403),
        (own.replace("127.0.0.1", "evil.example"), 403),
    ):  # fmt: skip
        response = guarded.client.post(TEXT, json=START, headers={"Origin": origin})
        assert response.status_code == status, origin
        allowed = response.headers.get("access-control-allow-origin")
        assert allowed == ("https://friend.example" if origin == "https://friend.example" else None)
    preflight = {"Origin": "https://friend.example", "Access-Control-Request-Method": "POST"}
    assert guarded.client.options(TEXT, headers=preflight).status_code == 200
    assert guarded.client.options(TEXT, headers={**preflight, "Origin": "https://evil.example"}).status_code == 400


def test_bodies_that_are_too_large_or_no_json_are_refused(serving: Callable[..., HttpServer]) -> None:
    small = serving(limits=Limits(body_bytes=1000, body_seconds=0.5))
    assert small.error(TEXT, {**START, "user": "x" * 1000}, 413)["code"] == "request_too_large"

    def parts() -> Any:
        yield b'{"user": "'
        for _ in range(100):
            yield b"x" * 100

    headers = {"Content-Type": "application/json"}
    assert small.client.post(TEXT, content=parts(), headers=headers).status_code == 413
    assert small.client.post(TEXT, content=b"{}").status_code == 415
    assert small.client.post(TEXT, data={"prompt": "a"}).status_code == 415
    slow = socket.create_connection(("127.0.0.1", small.port))
    slow.sendall(f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode())
    slow.sendall(b"Content-Length: 50\r\n\r\n{")
    assert b" 408 " in slow.recv(100)
    slow.close()


def test_limits_of_tokens_are_named(serving: Callable[..., HttpServer]) -> None:
    small = serving(limits=Limits(prompt_tokens=8, max_tokens=5))
    error = small.error(TEXT, {**START, "prompt": [1] * 9})
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
    assert (
        small.error(TEXT, {**START, "max_tokens": 6})["message"] == "max_tokens is 6, and this server allows 5 at most"
    )
    answer = small.answer(TEXT, {"prompt": "a", "ignore_eos": True})
    assert answer["usage"]["completion_tokens"] == 5  # also where nothing was asked for
    talk = {"messages": [{"role": "user", "content": "a"}], "max_completion_tokens": 6}
    assert small.error("/v1/chat/completions", talk)["param"] in ("max_completion_tokens", "messages")


def test_a_request_that_takes_too_long_ends(serving: Callable[..., HttpServer]) -> None:
    hurried = serving(limits=Limits(seconds=0.05))
    assert hurried.error(TEXT, LONG, 504)["code"] == "timeout"
    *_, last = hurried.events(TEXT, LONG)
    assert last["error"]["code"] == "timeout"


def test_a_client_has_only_so_many_requests(serving: Callable[..., HttpServer]) -> None:
    running = serving(slots=1, limits=Limits(per_key=1))
    with running.client.stream("POST", TEXT, json={**LONG, "n": 16, "stream": True}) as first:
        lines = first.iter_lines()  # kept: without it the connection is closed
        next(lines)
        response = running.post(TEXT, START)
        assert response.status_code == 429
        assert response.headers["retry-after"] == "1"
        assert running.client.get("/health").status_code == 200
    running.wait(lambda: running.service.active == 0)
    assert running.post(TEXT, START).status_code == 200


def test_a_full_queue_is_told(serving: Callable[..., HttpServer]) -> None:
    running = serving(slots=1, limits=Limits(queue=16))
    with running.client.stream("POST", TEXT, json={**LONG, "n": 16, "stream": True}) as first:
        lines = first.iter_lines()  # kept: without it the connection is closed
        next(lines)
        response = running.post(TEXT, {**LONG, "n": 16})
        assert response.status_code == 429
        assert response.json()["error"]["code"] == "queue_full"
    assert running.post(TEXT, START).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/nothing", 404), ("PUT", TEXT, 405), ("GET", "/..%2f", 404)]
)
def test_what_is_not_there_is_told_as_an_error(server: HttpServer, method: str, path: str, status: int) -> None:
    response = server.client.request(method, path)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    if status == 405:
        assert response.headers["allow"] == "POST"


def test_no_answer_shows_a_path(tiny_bundle: Any, serving: Callable[..., HttpServer], tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "secret-folder"
    shutil.copytree(tiny_bundle("olmoe", "int4", "native"), copy)
    running = serving(models={"m": copy}, preload=False)
    (copy / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    refused = running.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]})
    assert refused.status_code == 400
    running.post("/models/unload", {})
    weights = copy / "model.onnx.data"
    weights.write_bytes(weights.read_bytes()[:-1])
    broken = running.post(TEXT, START)
    assert broken.status_code == 503
    for response in (refused, broken):
        assert "secret-folder" not in response.text
        assert "Traceback" not in response.text


def test_a_file_of_keys_is_read(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# clients\n\napp: {SECRET}\n{SECRET}-2\n")
    path.chmod(0o600)
    keys = read_keys(path)
    assert [key.name for key in keys] == ["app", "key 4"]
    assert [owner(keys, one) for one in (SECRET, f"{SECRET}-2", "", "app")] == ["app", "key 4", None, None]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has 0 keys"),
        ("short\n", "line 1: a key has 16 or more"),
        (f"{SECRET} x\n", "line 1: a key has 16 or more"),
        (f"a: {SECRET}\nb: {SECRET}\n", "line 2: this key is there twice"),
        ("\udcff" * 20, "is not a text"),
    ],
)
def test_a_wrong_file_of_keys_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "keys"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    path.chmod(0o600)
    with pytest.raises(EdgeLMError, match=said):
        read_keys(path)


@pytest.mark.skipif(os.name != "posix", reason="modes of files")
def test_keys_that_others_can_read_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(SECRET)
    path.chmod(0o640)
    with pytest.raises(EdgeLMError, match="other users can read these keys: chmod 600"):
        read_keys(path)
    with pytest.raises(EdgeLMError, match="cannot be read"):
        read_keys(tmp_path / "nothing")


def test_models_have_names(tmp_path: Path) -> None:
    assert named_bundles([str(tmp_path / "a"), f"b={tmp_path / 'a'}"]) == {"a": tmp_path / "a", "b": tmp_path / "a"}
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert list(named_bundles([str(tmp_path / "link"), f"{tmp_path / 'a'}/..", f"{tmp_path / 'b'}/"])) == [
        "link", tmp_path.name, "b",
    ]  # fmt: skip
    with pytest.raises(ArgumentValueError, match="two models are called 'a'"):
        named_bundles(["x/a", "y/a"])
    with pytest.raises(ArgumentValueError, match="no name"):
        named_bundles(["/"])


def test_a_comparison_of_keys_takes_the_same_time_for_all() -> None:
    keys = tuple(Key(str(number), hashlib.sha256(str(number).encode()).digest()) for number in range(2000))

    def seconds(secret: str) -> float:
        times = []
        for _ in range(15):
            began = time.perf_counter()
            owner(keys, secret)
            times.append(time.perf_counter() - began)
        return min(times)

    # A search that stopped at the key would take a thousandth of the time for the first one.
    assert seconds("0") > 0.5 * seconds("1999")
