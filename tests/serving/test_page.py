"""Does the page of `edgelm serve` do in a real browser what it promises, and nothing that a hostile text asks for?

A headless Chromium (Debian: chromium-headless-shell, which .ci/run installs), driven by Playwright, opens the page of a
real server with real bundles.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgelm.serving.page import load_page

playwright = pytest.importorskip("playwright.sync_api", reason="the extra `dev` is not installed")
uvicorn = pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")

CHECKPOINTS = Path(__file__).parents[2] / "examples" / "checkpoints"
KEY = "a-key-of-the-tests-2f7c"
PATIENCE = 30_000
"""Milliseconds that a step may take. Other processes use the same cores."""

SLOW = 5_000
"""Bytes per second of a slow network: some 15 tokens per second, so that a test can act while an answer comes."""

HOSTILE = (
    '<img src=x onerror="window.hacked=1"><script>window.hacked=2</script><svg onload="window.hacked=3"> '
    '[link](javascript:window.hacked=4) <a href="javascript:window.hacked=5" id="model">x</a> '
    "<style>*{display:none}</style>"
)


class Serving:
    """A server in a thread of this process."""

    def __init__(self, models: dict[str, Path], **settings: Any) -> None:
        self._models, self._settings, self._port = models, settings, 0
        self._server: Any = None
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/"

    def start(self) -> None:
        """Start; the port stays that of the first start."""
        from edgelm.serving.app import create_app
        from edgelm.serving.settings import Settings

        app = create_app(Settings(models=self._models, finish_seconds=0, **self._settings))
        config = uvicorn.Config(app, host="127.0.0.1", port=self._port, log_level="error", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        until = time.monotonic() + PATIENCE / 1000
        while not self._server.started:
            assert time.monotonic() < until, "the server did not start"
            assert self._thread.is_alive(), "the server ended"
            time.sleep(0.02)
        self._port = self._server.servers[0].sockets[0].getsockname()[1]

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(PATIENCE / 1000)
        assert not self._thread.is_alive()


class Chat:
    """The page in a browser, with what a person does there."""

    def __init__(self, page: Any, url: str) -> None:
        self.page, self.url = page, url
        self.problems: list[str] = []
        self.requests: list[tuple[str, Any]] = []
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: message.type in ("error", "warning") and self.problems.append(message.text))
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("request", self._requested)

    def _requested(self, request: Any) -> None:
        assert request.url.startswith((self.url, "data:", "blob:")), request.url
        body = request.post_data
        self.requests.append((request.url.removeprefix(self.url), json.loads(body) if body else None))

    def open(self) -> Chat:
        self.page.goto(self.url)
        self.until("document.querySelector('#model').options.length > 0 || document.querySelector('#key').open")
        return self

    def until(self, expression: str) -> None:
        """Wait until an expression is true. Playwright's own way evaluates texts, which the page's policy forbids."""
        end = time.monotonic() + PATIENCE / 1000
        while not self.page.evaluate(expression):
            assert time.monotonic() < end, f"still false: {expression}"
            self.page.wait_for_timeout(20)

    def sent(self, path: str) -> list[Any]:
        """Bodies of the requests to an address so far."""
        return [body for found, body in self.requests if found == path]

    def send(self, text: str, *, wait: bool = True) -> None:
        self.page.fill("#draft", text)
        self.page.press("#draft", "Enter")
        if wait:
            self.wait()

    def wait(self) -> None:
        """Wait until no answer comes any more."""
        self.until("document.querySelector('#stop').hidden && document.querySelector('.assistant .actions')")

    def texts(self) -> list[str]:
        """The messages that are shown."""
        return [body.inner_text() for body in self.page.locator(".message .body").all()]

    def do(self, name: str, message: int = -1) -> None:
        """Press a button of a message."""
        self.page.locator(".message").nth(message).locator(f"[data-do={name}]").click()

    def set(self, **values: Any) -> None:
        """Change settings through their dialog."""
        self.page.click("#open-settings")
        for name, value in values.items():
            self.page.fill("#system" if name == "system" else f"#set-{name}", str(value))
        self.page.keyboard.press("Escape")

    def network(self, bytes_per_second: int = -1, *, offline: bool = False) -> None:
        session = self.page.context.new_cdp_session(self.page)
        speed = {"latency": 0, "downloadThroughput": bytes_per_second, "uploadThroughput": -1}
        session.send("Network.emulateNetworkConditions", {"offline": offline, **speed})

    def stored(self) -> list[Any]:
        """The conversations in the browser's storage."""
        entries = self.page.evaluate("Object.entries(localStorage)")
        return [json.loads(value) for key, value in entries if key.startswith("edgelm-1:talk:")]

    def notice(self) -> str:
        found: str = self.page.locator("#notice").inner_text()
        return found


@pytest.fixture(scope="module")
def bundles(tiny_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A MoE, a dense model whose template refuses system messages, and a model without a chat template."""
    from edgelm.export import ExportOptions, export_bundle

    checkpoint = tmp_path_factory.mktemp("base") / "olmoe-base"
    shutil.copytree(CHECKPOINTS / "olmoe-tiny", checkpoint)
    config = checkpoint / "tokenizer_config.json"
    fields = json.loads(config.read_text())
    del fields["chat_template"]
    config.write_text(json.dumps(fields))
    export_bundle(checkpoint, checkpoint.parent / "bundle", recipe="int4", options=ExportOptions(ops="native"))
    moe, dense = (tiny_bundle(name, "int4", "native") for name in ("olmoe", "fox"))
    return {"olmoe-tiny": moe, "fox-tiny": dense, "olmoe-base": checkpoint.parent / "bundle"}


@pytest.fixture(scope="module")
def serving(bundles: dict[str, Path]) -> Iterator[Serving]:
    server = Serving(bundles)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    programs = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, programs)), None)
    if program is None:
        if os.environ.get("CI") == "true":
            pytest.fail("there is no Chromium")
        pytest.skip("there is no Chromium: apt-get install chromium-headless-shell")
    with playwright.sync_playwright() as running:
        yield running.chromium.launch(executable_path=program, args=["--no-sandbox"])


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Chat]]:
    """Function (url, width, ...) that opens the page in a profile of its own."""
    with contextlib.ExitStack() as closing:

        def open_page(url: str, width: int = 1280, **options: Any) -> Chat:
            options = {"viewport": {"width": width, "height": 800}, "accept_downloads": True, **options}
            context = browser.new_context(**options)
            closing.callback(context.close)
            return Chat(context.new_page(), url).open()

        yield open_page


@pytest.fixture
def chat(visit: Callable[..., Chat], serving: Serving) -> Iterator[Chat]:
    """The page with the MoE. At the end it must have reported no error and broken no rule of its policy."""
    found = visit(serving.url)
    yield found
    assert found.problems == []


# ------------------------------------------------------------------ The file


def test_the_policy_allows_nothing_but_the_two_hashes() -> None:
    page, headers = load_page()
    policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    for name in ("script-src", "style-src"):
        assert re.fullmatch(r"'sha256-[A-Za-z0-9+/]{43}='", policy[name])
    assert "unsafe" not in headers["Content-Security-Policy"]
    text = page.decode()
    assert not re.search(r"<[^>]*\s(?:style|on[a-z]+)=", text.partition("<script>")[0])
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "new Function",
        "http://www",
    ):
        assert word not in text.replace("http://www.w3.org/2000/svg", ""), word


# ------------------------------------------------------------------ Chat


def test_an_answer_streams_and_is_the_models(chat: Chat) -> None:
    chat.set(temperature=0, max_tokens=60)
    chat.network(SLOW)
    chat.send("Hello", wait=False)
    chat.page.wait_for_selector(".assistant .markdown > p")
    early = chat.texts()[-1]
    assert chat.page.get_attribute(".assistant", "aria-busy") == "true"
    assert chat.page.inner_text("#status") == "Generating."  # screen readers are not told each token
    assert "token" in chat.page.inner_text("#speed")
    chat.network()
    chat.wait()
    assert len(chat.texts()[-1]) > len(early) > 0
    facts = chat.page.inner_text(".facts")
    assert re.search(r"60 tokens · [\d.,]+ tokens/s · first after [\d.]+ s · prompt \d+ tokens", facts), facts
    assert "ended at the longest length" in facts
    chat.until("document.querySelector('#status').textContent.length > 20")

    request = chat.sent("v1/chat/completions")[0]
    answer = chat.page.request.post(
        f"{chat.url}v1/chat/completions", data={**request, "stream": False, "stream_options": None}
    )
    message = answer.json()["choices"][0]["message"]["content"]
    assert chat.stored()[0]["nodes"][1]["text"] == message
    assert message in chat.page.text_content("#status")


def test_settings_are_sent_and_kept(chat: Chat) -> None:
    given = {"temperature": 1.25, "top_p": 0.5, "top_k": 40, "min_p": 0.02, "repetition_penalty": 1.1, "max_tokens": 7}
    chat.set(**given, seed=123456, system="Be brief.")
    chat.send("Hello")
    first = chat.sent("v1/chat/completions")[-1]
    assert first.items() >= {**given, "seed": 123456, "model": "olmoe-tiny", "stream": True}.items()
    assert first["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    chat.open()
    chat.set(temperature=0, seed="")
    chat.send("More")
    second = chat.sent("v1/chat/completions")[-1]
    assert second["temperature"] == 0
    assert not {"top_p", "top_k", "min_p", "seed"} & second.keys()  # they would do nothing
    roles = [message["role"] for message in second["messages"]]
    assert roles == ["system", "user", "assistant", "user"]


def test_settings_out_of_range_are_said_and_not_taken(chat: Chat) -> None:
    chat.page.click("#open-settings")
    for name, value in (("temperature", "7"), ("top_k", "1.5"), ("max_tokens", "0"), ("seed", "-1")):
        chat.page.fill(f"#set-{name}", value)
        assert "has to be" in chat.page.inner_text(f"#wrong-{name}")
    chat.page.keyboard.press("Escape")
    chat.send("Hello")
    sent = chat.sent("v1/chat/completions")[-1]
    assert (sent["temperature"], sent["top_k"], sent["max_tokens"]) == (0.7, 0, 1024)
    assert "seed" not in sent


def test_escape_stops_and_keeps_what_came(chat: Chat) -> None:
    chat.network(SLOW)
    chat.send("Hello", wait=False)
    chat.page.wait_for_selector(".assistant .markdown > p")
    chat.page.keyboard.press("Escape")
    chat.wait()
    chat.network()
    assert "stopped" in chat.page.inner_text(".facts")
    assert chat.texts()[-1]
    assert chat.stored()[0]["nodes"][1]["stop"] == "stopped"
    chat.set(max_tokens=5)
    chat.send("And now?")  # the conversation goes on
    assert len(chat.texts()) == 4


def test_an_edited_message_is_a_new_branch(chat: Chat) -> None:
    chat.set(max_tokens=8)
    chat.send("First")
    chat.send("Second")
    chat.do("edit", 0)
    chat.page.fill("textarea[data-do=editor]", "Changed")
    chat.page.keyboard.press("Enter")
    chat.wait()
    assert chat.texts()[0] == "Changed"
    assert len(chat.texts()) == 2
    assert [one["content"] for one in chat.sent("v1/chat/completions")[-1]["messages"]] == ["Changed"]
    assert "2 of 2" in chat.page.inner_text(".user .turns")
    chat.do("before", 0)
    assert [chat.texts()[index] for index in (0, 2)] == ["First", "Second"]
    assert len(chat.texts()) == 4
    chat.open()  # the choice of the branch is kept
    assert chat.texts()[0] == "First"


def test_regenerating_keeps_the_earlier_answer(chat: Chat) -> None:
    chat.set(max_tokens=8, temperature=1.5)
    chat.send("Hello")
    first = chat.texts()[1]
    chat.do("again")
    chat.wait()
    assert chat.page.inner_text(".assistant .turns span") == "2 of 2"
    assert chat.sent("v1/chat/completions")[0]["messages"] == chat.sent("v1/chat/completions")[1]["messages"]
    chat.do("before")
    assert chat.texts()[1] == first
    assert chat.page.evaluate("document.activeElement.dataset.do") == "after"  # the focus stays at the versions


def test_answers_and_code_are_copied(visit: Callable[..., Chat], serving: Serving) -> None:
    chat = visit(serving.url, permissions=["clipboard-read", "clipboard-write"])
    answer = "Run:\n\n```sh\nls -l  # list\n```\n"
    put_conversation(chat, ["How?", answer])
    chat.do("copy")
    assert chat.page.evaluate("navigator.clipboard.readText()") == answer
    chat.page.click(".code button")
    assert chat.page.evaluate("navigator.clipboard.readText()") == "ls -l  # list"
    assert "copied" in chat.notice()
    assert chat.problems == []


# ------------------------------------------------------------------ Conversations


def put_conversation(chat: Chat, texts: list[str]) -> None:
    """Store a conversation as the page does, and open it."""
    nodes = [
        {"id": f"n{at}", "parent": f"n{at - 1}" if at else "", "role": "assistant" if at % 2 else "user", "text": text}
        for at, text in enumerate(texts)
    ]
    talk = {"id": "abc", "title": texts[0][:60], "changed": 1, "nodes": nodes, "chosen": {}}
    script = "([talk, id]) => { localStorage['edgelm-1:talk:abc'] = talk; localStorage['edgelm-1:current'] = id }"
    chat.page.evaluate(script, [json.dumps(talk), json.dumps(talk["id"])])
    chat.open()


def test_conversations_survive_a_reload_and_can_be_deleted_and_undone(chat: Chat) -> None:
    chat.set(max_tokens=8)
    chat.send("One")
    before = chat.texts()
    chat.page.click("#new")
    assert chat.texts() == []
    chat.send("Two")
    chat.open()
    titles = chat.page.locator("#list .open")
    assert titles.all_inner_texts() == ["Two", "One"]
    titles.nth(1).click()
    assert chat.texts() == before
    chat.page.click("[aria-label='Delete “One”']")
    assert titles.all_inner_texts() == ["Two"]
    assert len(chat.stored()) == 1
    chat.page.click("#notice >> text=Undo")
    assert chat.texts() == before
    assert len(chat.stored()) == 2
    chat.do("delete", 1)
    assert chat.texts() == before[:1]
    chat.page.click("#notice >> text=Undo")
    assert chat.texts() == before


def test_an_exported_conversation_is_imported_elsewhere(chat: Chat, visit: Callable[..., Chat], tmp_path: Path) -> None:
    chat.set(max_tokens=8)
    chat.send("Grüße, 世界 <b>")
    chat.do("again")
    chat.wait()
    with chat.page.expect_download() as waiting:
        chat.page.click("#export")
    file = tmp_path / "talk.json"
    waiting.value.save_as(file)
    other = visit(chat.url)
    other.page.set_input_files("#file", file)
    other.page.wait_for_selector(".message")
    assert other.texts() == chat.texts()
    assert other.stored() == chat.stored()
    other.page.set_input_files("#file", file)  # a second time: a copy
    other.until("document.querySelectorAll('#list li').length === 2")
    (tmp_path / "not.json").write_text("{")
    other.page.set_input_files("#file", tmp_path / "not.json")
    other.until("document.querySelector('#notice').textContent.includes('not.json is not JSON')")
    (tmp_path / "other.json").write_text('{"format": "x"}')
    other.page.set_input_files("#file", tmp_path / "other.json")
    other.until("document.querySelector('#notice').textContent.includes('has no conversations')")
    assert other.problems == []


def test_a_full_storage_is_said_and_the_chat_goes_on(chat: Chat) -> None:
    chat.page.evaluate(
        """() => { for (let size = 1 << 22; size >= 1; size >>= 1)
          try { for (let at = 0; at < 8; at++) localStorage.setItem(`x${size}-${at}`, "x".repeat(size)); } catch {} }"""
    )
    chat.send("Hello")
    assert "storage is full" in chat.notice()
    assert chat.texts()[-1]


def test_two_conversations_are_answered_at_a_time(chat: Chat) -> None:
    chat.network(SLOW)
    chat.send("One", wait=False)
    chat.page.wait_for_selector(".assistant .markdown > p")
    chat.page.click("#new")
    assert chat.page.is_visible("#send")
    chat.send("Two", wait=False)
    chat.page.wait_for_selector(".assistant .markdown > p")
    assert chat.page.locator("#list .open").all_inner_texts() == ["… Two", "… One"]
    chat.page.keyboard.press("Escape")  # stops the one that is shown
    chat.wait()
    chat.network()
    chat.page.locator("#list .open").last.click()
    chat.wait()
    answers = {talk["title"]: talk["nodes"][1] for talk in chat.stored()}
    assert answers["Two"]["stop"] == "stopped"
    assert answers["One"]["stop"] in ("stop", "length")  # went on in the background
    assert answers["One"]["answerTokens"] > 0


def test_a_second_tab_takes_over_what_the_first_wrote(chat: Chat) -> None:
    other = Chat(chat.page.context.new_page(), chat.url).open()
    chat.set(max_tokens=5)
    chat.send("Hello")
    other.until("document.querySelectorAll('#list li').length === 1")
    other.page.click("#list .open")
    assert other.texts() == chat.texts()
    chat.send("More")
    other.until("document.querySelectorAll('.message').length === 4")
    chat.page.click("#list .remove")
    other.until("document.querySelectorAll('#list li').length === 0")
    assert other.problems == []


def test_the_gauge_counts_what_is_written_and_what_comes(chat: Chat) -> None:
    gauge = "document.querySelector('#gauge .words').textContent"
    chat.until(f"{gauge} === '0 of 512 tokens'")
    chat.page.fill("#draft", "Hello")
    chat.until(f"{gauge} !== '0 of 512 tokens'")
    counted = int(chat.page.evaluate(gauge).partition(" ")[0])
    chat.set(max_tokens=30)
    chat.page.press("#draft", "Enter")
    chat.wait()
    node = chat.stored()[0]["nodes"][1]
    assert counted == node["promptTokens"]
    assert chat.page.evaluate(gauge) == f"{node['promptTokens'] + node['answerTokens']} of 512 tokens"
    assert chat.page.get_attribute("#gauge [role=meter]", "aria-valuenow") == str(counted + node["answerTokens"])


# ------------------------------------------------------------------ Base models, keys, errors


@pytest.mark.parametrize("width", [360, 1280])
def test_reasoning_stands_before_the_answer_and_can_be_opened(
    visit: Callable[..., Chat], bundles: dict[str, Path], tmp_path: Path, width: int
) -> None:
    thinker = tmp_path / "thinker"
    shutil.copytree(bundles["olmoe-tiny"], thinker)
    template = "{# <think> </think> #}{% for one in messages %}{{ one.role }}: {{ one.content }}\n{% endfor %}"
    (thinker / "chat_template.jinja").write_text(template)
    server = Serving({"thinker": thinker})
    chat = visit(server.url, width=width, color_scheme="dark")

    def constrained(route: Any) -> None:
        body = {**route.request.post_data_json, "regex": "<think>\n" + re.escape(HOSTILE) + "\n</think>\n\nFour[.]"}
        route.continue_(post_data=json.dumps(body))

    chat.page.route("**/v1/chat/completions", constrained)
    for opened in (False, True):  # streamed, then of the storage
        if opened:
            chat.open()
        else:
            chat.send("1 + 3?")
        assert chat.texts() == ["1 + 3?", "Four."]
        box = chat.page.locator(".message.assistant details")
        assert box.get_attribute("open") is None
        assert chat.page.locator(".thoughts p").is_hidden()
        chat.page.locator(".thoughts summary").focus()
        chat.page.keyboard.press("Enter")
        assert chat.page.locator(".thoughts p").inner_text() == HOSTILE
        assert chat.page.evaluate("window.hacked") is None
        assert chat.page.evaluate(CONTRAST)["low"] == []
        assert chat.page.evaluate("document.documentElement.scrollWidth") == width
    assert chat.stored()[0]["nodes"][1]["text"] == "Four."
    assert chat.sent("v1/chat/completions")[0]["messages"] == [{"role": "user", "content": "1 + 3?"}]
    assert chat.problems == []
    server.stop()


def test_a_base_model_continues_the_text(chat: Chat) -> None:
    chat.page.select_option("#model", "olmoe-base")
    assert "no chat template" in chat.page.inner_text(".empty")
    chat.set(max_tokens=6, temperature=0)
    chat.send("Once upon a time")
    chat.send("")  # goes on
    chat.send(" The end of\n")
    prompts = [body["prompt"] for body in chat.sent("v1/completions")]
    texts = [node["text"] for node in chat.stored()[0]["nodes"]]
    assert texts[0] == "Once upon a time"
    assert texts[3] == " The end of\n"
    assert prompts == ["".join(texts[:1]), "".join(texts[:2]), "".join(texts[:4])]
    assert chat.sent("v1/chat/completions") == []
    chat.open()
    assert chat.page.input_value("#model") == "olmoe-base"


@pytest.fixture(scope="module")
def locked(bundles: dict[str, Path]) -> Iterator[Serving]:
    """A server that asks for a key."""
    import hashlib

    from edgelm.serving.settings import Key

    server = Serving({"olmoe-tiny": bundles["olmoe-tiny"]}, keys=(Key("tests", hashlib.sha256(KEY.encode()).digest()),))
    yield server
    server.stop()


def test_the_key_is_asked_for_and_kept_in_the_tab_only(visit: Callable[..., Chat], locked: Serving) -> None:
    chat = visit(locked.url)
    chat.page.wait_for_selector("#key[open]")
    chat.page.fill("#key-value", "wrong")
    chat.page.keyboard.press("Enter")
    chat.until("document.querySelector('#key-why').textContent.includes('refused the key')")
    chat.page.fill("#key-value", KEY)
    chat.page.keyboard.press("Enter")
    chat.until("document.querySelector('#model').value === 'olmoe-tiny'")
    chat.set(max_tokens=5)
    chat.send("Hello")
    assert len(chat.texts()) == 2
    chat.open()  # a reload does not ask again
    chat.until("document.querySelector('#model').value === 'olmoe-tiny'")
    assert KEY not in chat.page.evaluate("JSON.stringify(localStorage)")
    assert KEY in chat.page.evaluate("JSON.stringify(sessionStorage)")
    assert {text.partition(" the server")[0] for text in chat.problems} <= {"Failed to load resource:"}  # the 401s


def test_without_the_key_a_message_is_kept_and_the_key_asked_for_again(
    visit: Callable[..., Chat], locked: Serving
) -> None:
    chat = visit(locked.url)
    chat.page.wait_for_selector("#key[open]")
    chat.page.keyboard.press("Escape")
    chat.page.fill("#draft", "Hello")
    chat.page.press("#draft", "Enter")
    chat.page.wait_for_selector("#key[open]")
    chat.page.keyboard.press("Escape")
    chat.page.wait_for_selector("#notice:not([hidden])")
    assert chat.page.input_value("#draft") == "Hello"


def test_an_error_is_said_in_the_servers_words_with_a_retry(visit: Callable[..., Chat], serving: Serving) -> None:
    chat = visit(serving.url)
    chat.page.select_option("#model", "fox-tiny")
    chat.set(system="Be brief.", max_tokens=5)
    chat.send("Hello")
    assert "System role not supported" in chat.page.inner_text(".failure")
    chat.set(system="")
    chat.do("retry")
    chat.wait()
    assert chat.page.locator(".failure").count() == 0
    assert len(chat.texts()) == 2
    assert len(chat.stored()[0]["nodes"]) == 2  # the failed answer is gone
    chat.send("word " * 600)
    assert "context" in chat.page.inner_text(".failure")
    chat.until("document.querySelector('#gauge').textContent.includes('too long')")


class Cable:
    """A connection to a server that can be cut: it breaks off when `left` bytes went to the client."""

    def __init__(self, url: str) -> None:
        self._to = ("127.0.0.1", int(url.rstrip("/").rpartition(":")[2]))
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}/"
        self.left = 1 << 60
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listening.accept()
                server = socket.create_connection(self._to)
                for pair in ((client, server, False), (server, client, True)):
                    threading.Thread(target=self._forward, args=pair, daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket, counted: bool) -> None:
        with source, target, contextlib.suppress(OSError):
            while self.left > 0 and (data := source.recv(1024)):
                target.sendall(data)
                self.left -= len(data) if counted else 0
            for end in (source, target):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listening.close()


def test_an_answer_that_breaks_off_is_kept(visit: Callable[..., Chat], serving: Serving) -> None:
    cable = Cable(serving.url)
    chat = visit(cable.url)
    chat.set(max_tokens=300)
    cable.left = 20_000
    chat.send("Hello")
    assert "incomplete" in chat.page.inner_text(".failure")
    assert len(chat.texts()[1]) > 20
    cable.left = 1 << 60
    chat.page.wait_for_selector("#banner", state="hidden")
    chat.set(max_tokens=5)
    chat.do("retry")
    chat.wait()
    assert chat.page.inner_text(".assistant .turns span") == "2 of 2"  # what came before is still there
    cable.close()


def test_a_restart_of_the_server_is_noticed_and_survived(visit: Callable[..., Chat], bundles: dict[str, Path]) -> None:
    server = Serving({"olmoe-tiny": bundles["olmoe-tiny"]})
    chat = visit(server.url)
    chat.set(max_tokens=5)
    server.stop()
    chat.send("Hello")
    assert "no connection" in chat.page.inner_text(".failure")
    assert chat.page.is_visible("#banner")
    server.start()
    chat.page.wait_for_selector("#banner", state="hidden")  # it asks by itself
    chat.do("retry")
    chat.wait()
    assert chat.page.locator(".failure").count() == 0
    server.stop()


# ------------------------------------------------------------------ Experts and parity


def test_the_experts_of_an_answer_are_those_of_the_server(chat: Chat) -> None:
    chat.set(max_tokens=40, temperature=0, system="Be brief.")
    chat.send("Hello")
    chat.set(system="")  # the answer's own prompt counts, not the settings of now
    chat.do("experts")
    chat.page.wait_for_selector(".tokens span")
    request = chat.sent("experts")[0]
    assert [message["role"] for message in request["messages"]] == ["system", "user"]
    found = chat.page.request.post(f"{chat.url}experts", data=request).json()
    tokens = found["tokens"][found["prompt_tokens"] :]
    shown = chat.page.locator(".tokens span")
    assert shown.count() == len(tokens) > 30

    counts = [
        [sum(expert in token["experts"][layer] for token in tokens) for expert in range(32)] for layer in range(4)
    ]
    used = sum(count > 0 for row in counts for count in row)
    assert f"{used} of 128 experts were used" in chat.page.inner_text(".experts > p")

    # A chosen expert marks the tokens that it took.
    layer, expert = max(((x, y) for x in range(4) for y in range(32)), key=lambda at: counts[at[0]][at[1]])
    chat.page.select_option(".pick label:nth-child(1) select", str(layer))
    chat.page.select_option(".pick label:nth-child(2) select", str(expert))
    marked = chat.page.evaluate(
        "[...document.querySelectorAll('.tokens span')].map(span => span.classList.contains('took'))"
    )
    assert marked == [expert in token["experts"][layer] for token in tokens]
    assert f"took {counts[layer][expert]} tokens of {len(tokens)}" in chat.page.inner_text(".experts")

    # The map has a colour wherever an expert was chosen, and only there; a click chooses the cell.
    painted = chat.page.evaluate(
        """() => { const {width, height} = document.querySelector("canvas[data-name=map]");
          const pen = document.querySelector("canvas[data-name=map]").getContext("2d");
          const alpha = pen.getImageData(0, 0, width, height).data;
          const at = (row, column) => alpha[3 + 4 * (Math.floor((column + 0.5) * width / 32)
            + width * Math.floor((row + 0.5) * height / 4))];
          return [0, 1, 2, 3].map(row => [...Array(32).keys()].map(column => at(row, column))); }"""
    )
    assert [[value > 0 for value in row] for row in painted] == [[count > 0 for count in row] for row in counts]
    assert painted[layer][expert] == 255
    box = chat.page.locator("canvas[data-name=map]").bounding_box()
    chat.page.locator("canvas[data-name=map]").click(
        position={"x": box["width"] * 5.5 / 32, "y": box["height"] * 2.5 / 4}
    )
    assert chat.page.locator(".pick select").first.input_value() == "2"
    assert chat.page.locator(".pick select").last.input_value() == "5"

    # The same by keyboard and in tables
    shown.first.focus()
    chat.page.keyboard.press("ArrowRight")
    assert chat.page.evaluate("document.activeElement.getAttribute('aria-selected')") == "true"
    detail = chat.page.inner_text(".routes")
    assert all(str(one) in detail for row in tokens[1]["experts"] for one in row)
    chat.page.click(".experts summary")
    chat.page.wait_for_selector(".experts details table")
    rows = chat.page.locator(".experts details table").last.locator("tbody tr")
    assert rows.count() == len(tokens)
    cells = rows.nth(1).locator("td").all_inner_texts()
    assert cells[1:] == [" ".join(map(str, row)) for row in tokens[1]["experts"]]


def test_a_dense_model_has_no_experts(chat: Chat) -> None:
    chat.page.select_option("#model", "fox-tiny")
    chat.set(max_tokens=5)
    chat.send("Hello")
    assert chat.page.locator("[data-do=again]").count() == 1
    assert chat.page.locator("[data-do=experts]").count() == 0


def test_the_badge_tells_what_this_device_proved(visit: Callable[..., Chat], bundles: dict[str, Path]) -> None:
    server = Serving({"olmoe-tiny": bundles["olmoe-tiny"]})
    try:
        chat = visit(server.url)
        chat.page.wait_for_selector("#badge >> text=Not checked")
        chat.page.click("#badge")
        chat.page.click("#check")
        chat.page.wait_for_selector("#badge.pass")
        report = chat.page.request.get(f"{chat.url}parity?model=olmoe-tiny").json()["report"]
        shown = chat.page.inner_text("#report")
        passed = sum(check["passed"] is True for check in report["checks"])
        assert f"{passed} checks passed" in shown
        assert "computes the same model" in shown
        assert chat.page.text_content("#badge").startswith("Proved on this device, ")
        chat.page.click("#report summary")
        assert chat.page.locator("#report tbody tr").count() == len(report["checks"])
        chat.open()
        chat.page.wait_for_selector("#badge.pass")  # the server keeps the report
        assert chat.problems == []
    finally:
        server.stop()


def test_a_damaged_bundle_makes_the_badge_red(
    visit: Callable[..., Chat], bundles: dict[str, Path], tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(bundles["olmoe-tiny"], damaged)
    weights = bytearray((damaged / "model.onnx.data").read_bytes())
    weights[len(weights) // 2] ^= 0x55
    (damaged / "model.onnx.data").write_bytes(weights)
    server = Serving({"damaged": damaged})
    try:
        chat = visit(server.url)
        chat.page.click("#badge")
        chat.page.click("#check")
        chat.page.wait_for_selector("#badge.fail")
        assert "Parity failed" in chat.page.inner_text("#badge")
        assert "hash" in chat.page.inner_text("#report").lower()
    finally:
        server.stop()


# ------------------------------------------------------------------ Hostile texts


def test_hostile_text_of_a_model_is_text(chat: Chat) -> None:
    put_conversation(
        chat, [HOSTILE, f"{HOSTILE}\n\n# {HOSTILE}\n\n- {HOSTILE}\n\n```{HOSTILE}\n{HOSTILE}\n```\n\n**{HOSTILE}**"]
    )
    assert chat.texts()[1].count("<script>window.hacked=2</script>") >= 4
    assert chat.page.evaluate("window.hacked") is None
    assert chat.page.locator(".message :is(img, script, svg[onload], a, style)").count() == 0
    assert chat.page.evaluate("document.querySelector('#model').tagName") == "SELECT"
    chat.page.click("#badge")
    with pytest.raises(playwright.Error, match="TrustedHTML"):  # the policy would stop what got through
        chat.page.evaluate("document.body.innerHTML = '<p>'")
    chat.problems.pop()  # the browser reported it


@pytest.mark.parametrize("model", ["olmoe-tiny", "olmoe-base"])
def test_a_hostile_stream_is_text(chat: Chat, model: str) -> None:
    """The server is made to write HTML: the answer has to match a regular expression that only this text does."""

    def constrained(route: Any) -> None:
        route.continue_(post_data=json.dumps({**route.request.post_data_json, "regex": re.escape(HOSTILE)}))

    chat.page.route("**/v1/*completions", constrained)
    chat.page.route("**/v1/chat/completions", constrained)
    chat.page.select_option("#model", model)
    chat.send("Write a page.")
    assert chat.stored()[0]["nodes"][1]["text"] == HOSTILE
    assert "window.hacked=2</script>" in chat.texts()[1]
    assert chat.page.evaluate("window.hacked") is None
    assert chat.page.locator(".message :is(img, script, a, style)").count() == 0


@pytest.mark.parametrize(
    "value",
    [
        "{", "null", "[]", '"x"', "{}", '{"id": "abc", "nodes": 3}', '{"id": "abc", "nodes": [null, 1, {}, []]}',
        '{"id": "abc", "title": {"a": 1}, "nodes": [{"id": "n1", "parent": "", "role": "user", "text": 5}]}',
        '{"id": "abc", "nodes": [{"id": "n1", "parent": "n1", "role": "user", "text": "loop"}]}',
        '{"id": "abc", "nodes": [{"id": "n1", "parent": "n2", "role": "user", "text": "a"},'
        ' {"id": "n2", "parent": "n1", "role": "user", "text": "b"}]}',
        '{"id": "abc", "__proto__": {"hacked": 1}, "nodes": [{"id": "__proto__", "parent": "", "role": "user",'
        ' "text": ""}], "chosen": {"__proto__": {"hacked": 1}}}',
        '{"id": "<img src=x onerror=hacked=1>", "nodes": []}',
        '{"id": "abc", "title": "<img src=x onerror=hacked=1>", "changed": "x", "nodes": [{"id": "n1", "parent": "",'
        ' "role": "assistant", "text": "t", "rate": "<b>", "stop": "<b>", "failure": "<img src=x onerror=hacked=1>"}]}',
        json.dumps(
            {"id": "abc", "nodes": [{"id": "n1", "parent": "", "role": "assistant", "text": "> " * 5000 + "- " * 5000}]}
        ),
    ],
)  # fmt: skip
def test_hostile_storage_does_nothing(chat: Chat, value: str) -> None:
    chat.page.evaluate(
        """value => { for (const key of ["settings", "current", "talk:abc", "talk:<img src=x onerror=hacked=1>"])
          localStorage["edgelm-1:" + key] = value; localStorage["edgelm-1:current"] = '"abc"'; }""",
        value,
    )
    chat.open()
    chat.set(max_tokens=5)
    chat.page.click("#new")
    chat.send("Hello")
    assert len(chat.texts()) == 2
    assert chat.page.evaluate("window.hacked ?? {}.hacked ?? null") is None
    assert chat.page.locator("img, #list b, .message img").count() == 0


def test_markdown_becomes_elements(chat: Chat) -> None:
    source = (
        "# One\n\nA **bold** and *slanted* `code` with \\*star\\*, snake_case_name, 2*3*4 and ~~gone~~.\nNext line\n\n"
        "1. first\n2. second\n   - inner\n   - `more`\n3. third\n\n> quoted\n\n---\n\n"
        "| a | b |\n|---|:-:|\n| 1 | **2** |\n\n"
        "```python\nif a < b:\n    print('**')\n```\n\nunclosed **bold and `code\n\n```\nopen end"
    )
    put_conversation(chat, ["?", source])
    body = chat.page.locator(".markdown")
    for selector, texts in {
        "h3": ["One"], "strong": ["bold", "2"], "em": ["slanted"], "p > code": ["code"], "del": ["gone"],
        "ol > li > ul > li": ["inner", "more"], "blockquote": ["quoted"], "th": ["a", "b"], "td": ["1", "2"],
        "pre code": ["if a < b:\n    print('**')", "open end"],
    }.items():  # fmt: skip
        assert body.locator(selector).all_inner_texts() == texts, selector
    assert "*star*, snake_case_name, 2*3*4" in body.inner_text()
    assert "unclosed **bold and `code" in body.inner_text()
    assert body.locator("ol > li").count() == 3


# ------------------------------------------------------------------ Keyboard, screen readers, layout

CONTRAST = """(() => {
  const parse = text => { const c = text.match(/[\\d.]+/g).map(Number); return text.startsWith("color(srgb")
    ? [c[0] * 255, c[1] * 255, c[2] * 255, c[3] ?? 1] : [c[0], c[1], c[2], c[3] ?? 1]; };
  const over = (top, base) => top.slice(0, 3).map((v, i) => v * top[3] + base[i] * (1 - top[3])).concat(1);
  const back = e => { const stack = [];
    for (; e && stack.at(-1)?.[3] !== 1; e = e.parentElement) stack.push(parse(getComputedStyle(e).backgroundColor));
    return stack.reverse().reduce((base, top) => over(top, base), [255, 255, 255, 1]); };
  const linear = v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = c => { const [r, g, b] = c.map(v => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const ratio = (a, b) => { const [x, y] = [light(a) + 0.05, light(b) + 0.05]; return Math.max(x / y, y / x); };
  const low = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let texts = 0;
  for (let node; (node = walker.nextNode());) {
    const e = node.parentElement;
    if (!node.data.trim() || !e.checkVisibility() || e.closest(".unseen, option, :disabled, script")) continue;
    texts++;
    const base = back(e), found = ratio(over(parse(getComputedStyle(e).color), base), base);
    if (found < 4.5) low.push([node.data.trim().slice(0, 40), found]);
  }
  for (const e of document.querySelectorAll("button, input, select, textarea, .box")) {
    if (!e.checkVisibility() || e.disabled || ["range", "radio"].includes(e.type)) continue;
    const style = getComputedStyle(e), line = parse(style.borderTopColor);
    if (style.borderTopWidth === "0px" || line[3] < 1) continue;
    const found = Math.max(ratio(line, back(e.parentElement)), ratio(back(e), back(e.parentElement)));
    if (found < 3) low.push([e.outerHTML.slice(0, 60), found]);
  }
  return {texts, low};
})()"""


def fill_page(chat: Chat) -> None:
    """Bring as much of the page to view as there is."""
    chat.set(max_tokens=30)
    put_conversation(
        chat,
        ["Hello", "# Title\n\nText `code` and **bold**\n\n> quote\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n```py\nx\n```"],
    )
    chat.send("More")
    chat.do("again")
    chat.wait()
    chat.do("experts")
    chat.page.wait_for_selector(".tokens span")
    chat.page.locator(".pick select").first.select_option("1")
    chat.page.click(".experts summary")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_and_borders_have_contrast(visit: Callable[..., Chat], serving: Serving, scheme: str) -> None:
    chat = visit(serving.url, color_scheme=scheme)
    fill_page(chat)
    found = chat.page.evaluate(CONTRAST)
    assert found["low"] == []
    assert found["texts"] > 100
    for control in ("#badge", "#open-settings"):
        chat.page.click(control)
        if control == "#badge":
            chat.page.click("#check")
            chat.page.wait_for_selector("#badge.pass")
        assert chat.page.evaluate(CONTRAST)["low"] == []
        chat.page.keyboard.press("Escape")
    chat.page.select_option("#model", "fox-tiny")
    chat.set(system="x")
    chat.send("Fails")
    assert chat.page.locator(".failure").count() == 1
    assert chat.page.evaluate(CONTRAST)["low"] == []
    assert chat.problems == [text for text in chat.problems if "400" in text]


def test_the_colours_can_be_chosen(chat: Chat) -> None:
    colour = "getComputedStyle(document.body).backgroundColor"
    light = chat.page.evaluate(colour)
    chat.page.click("#theme")
    dark = chat.page.evaluate(colour)
    assert light != dark
    chat.open()
    assert chat.page.evaluate(colour) == dark
    chat.page.click("#open-settings")
    chat.page.check("input[value=system]")
    assert chat.page.evaluate(colour) == light
    chat.page.emulate_media(color_scheme="dark")
    assert chat.page.evaluate(colour) == dark


def test_every_control_has_a_name(chat: Chat) -> None:
    fill_page(chat)
    controls = {"button", "textbox", "combobox", "spinbutton", "slider", "radio", "listbox", "meter", "image"}
    roles = {*controls, "link", "dialog", "navigation", "region", "DisclosureTriangle"}
    session = chat.page.context.new_cdp_session(chat.page)
    seen: dict[str, int] = {}
    for control in (None, "#open-settings", "#badge"):
        if control:
            chat.page.click(control)
        for node in session.send("Accessibility.getFullAXTree")["nodes"]:
            role = node.get("role", {}).get("value")
            if role in roles and not node.get("ignored"):
                seen[role] = seen.get(role, 0) + 1
                assert node.get("name", {}).get("value", "").strip(), node
        if control:
            chat.page.keyboard.press("Escape")
    assert controls <= seen.keys()
    ids = chat.page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))


def test_all_of_it_works_by_keyboard(chat: Chat) -> None:
    press = chat.page.keyboard.press
    focused = "(e => e.className === 'skip' ? 'skip' : e.id || e.dataset.do)(document.activeElement)"

    def go(name: str, key: str = "Tab") -> None:
        for _ in range(80):
            if chat.page.evaluate(focused) == name:
                break
            press(key)
        assert chat.page.evaluate(focused) == name
        box = "document.activeElement.closest('.box') ?? document.activeElement"
        shown = f"(style => style.outlineStyle + style.boxShadow)(getComputedStyle({box}))"
        assert chat.page.evaluate(shown) != "nonenone", f"the focus on {name} cannot be seen"

    chat.set(max_tokens=20)
    go("skip", "Shift+Tab")
    press("Enter")
    assert chat.page.evaluate(focused) == "draft"
    chat.page.keyboard.type("Line one")
    press("Shift+Enter")
    chat.page.keyboard.type("line two")
    press("Control+Enter")
    chat.wait()
    assert chat.texts()[0] == "Line one\nline two"
    assert chat.page.evaluate(focused) == "draft"
    go("edit", "Shift+Tab")
    press("Enter")
    assert chat.page.evaluate(focused) == "editor"
    press("Escape")
    assert chat.page.evaluate(focused) == "edit"
    go("experts")
    press("Enter")
    chat.page.wait_for_selector(".tokens span")
    assert chat.page.evaluate(focused) == "experts"
    for _ in range(8):
        press("Tab")
        if chat.page.evaluate("document.activeElement.role") == "option":
            break
    press("End")
    assert chat.page.locator(".tokens span").last.get_attribute("aria-selected") == "true"
    go("open-settings", "Shift+Tab")
    press("Enter")
    assert chat.page.evaluate("document.querySelector('#settings').open")
    for _ in range(60):  # the focus stays in the dialog
        press("Tab")
        inside = "document.activeElement === document.body || document.activeElement.closest('#settings') !== null"
        assert chat.page.evaluate(inside)
    press("Escape")
    assert chat.page.evaluate(focused) == "open-settings"  # and returns


@pytest.mark.parametrize("width", [320, 360, 768, 1280])
def test_nothing_scrolls_sideways_and_buttons_are_large_enough(
    visit: Callable[..., Chat], serving: Serving, width: int
) -> None:
    chat = visit(serving.url, width, has_touch=width < 600)
    fill_page(chat)
    measure = """() => { const wide = e => e.scrollWidth > e.clientWidth + 1;
      const controls = [...document.querySelectorAll("button, select, input, textarea, summary")];
      const shown = controls.filter(e => e.checkVisibility());
      const box = e => e.getBoundingClientRect();
      return {page: document.documentElement.scrollWidth, scroll: wide(document.querySelector("#scroll")),
        outside: shown.filter(e => box(e).right > innerWidth + 1 && !e.closest(".wide")).map(e => e.outerHTML),
        small: shown.filter(e => box(e).height < 24 || box(e).width < 24).map(e => e.outerHTML),
        dialogs: [...document.querySelectorAll("dialog[open]")].some(wide)}; }"""
    clean = {"page": width, "scroll": False, "outside": [], "small": [], "dialogs": False}
    assert chat.page.evaluate(measure) == clean
    for control in ("#badge", "#open-settings"):
        chat.page.click(control)
        assert chat.page.evaluate(measure) == clean
        chat.page.keyboard.press("Escape")
    if width < 860:
        assert not chat.page.is_visible("#side")
        chat.page.click("#open-list")
        assert chat.page.is_visible("#side")
        assert chat.page.evaluate(measure) == clean
        chat.page.keyboard.press("Escape")
        assert not chat.page.is_visible("#side")
    assert chat.problems == []
