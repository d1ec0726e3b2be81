"""Does `edgelm chat` in a terminal support editing, pastes, history and colours, and what does Ctrl-C do?"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from terminal import CTRL_C, CTRL_D, UP, Terminal
from tiny_graph import Shape, write_tiny_model

pytestmark = pytest.mark.skipif(os.name == "nt", reason="no pseudo-terminals")

Start = Callable[..., Terminal]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "bundle", eos_ids=(2,)).path


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that generates without end, and is slow with a long prompt."""
    shape = Shape(vocab=512, hidden=64, layers=8, context=1 << 16)
    return write_tiny_model(tmp_path_factory.mktemp("endless") / "bundle", shape).path


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Function that starts a chat with a bundle. The sessions of a test share a state folder."""
    open_ones: list[Terminal] = []

    def begin(bundle: Path, *options: object, **env: str) -> Terminal:
        terminal = Terminal(
            "chat", bundle, "--threads", 1, *options, env={"XDG_STATE_HOME": str(tmp_path / "state"), **env}
        )
        open_ones.append(terminal)
        return terminal

    yield begin
    for terminal in open_ones:
        terminal.close()


def test_lines_pastes_and_blocks_are_messages_in_the_history(bundle: Path, start: Start, tmp_path: Path) -> None:
    talk, history = tmp_path / "talk.json", tmp_path / "state" / "edgelm" / "chat_history"
    history.parent.mkdir(parents=True)
    history.write_text('"of an earlier session"\nno JSON\n')
    history.chmod(0o600)
    chat = start(bundle, "-n", 3, "-t", 0)
    chat.wait("/help")
    pasted = "def f():\n    return 1"
    chat.wait("> ")
    chat.send(UP + "\r")
    chat.wait("> ")
    chat.paste(pasted + "\n")
    chat.send("\r")
    for keys in ('"""\r', "one\r", 'two"""\r', " /etc is\r"):
        chat.wait("... " if keys in ("one\r", 'two"""\r') else "> ")
        chat.send(keys)
    chat.wait("> ")
    chat.send(b"a stray \xff byte\r")
    chat.wait("not sent: character 9 is the byte 0xff, which is not valid UTF-8")
    chat.wait("> ")
    chat.send(UP + UP + UP + "\r")  # past the message with a slash and the block: the paste
    chat.wait("ended by")
    chat.wait("> ")
    chat.send(f"/save {talk}\r")
    chat.wait("saved in")
    chat.wait("> ")
    chat.send(CTRL_D)
    assert chat.end() == 0
    asked = [message["content"] for message in json.loads(talk.read_text()) if message["role"] == "user"]
    assert asked == ["of an earlier session", pasted, "one\ntwo", "/etc is", pasted]
    kept = [json.loads(line) for line in history.read_text().splitlines()[2:]]
    assert kept == [pasted, "one\ntwo", " /etc is", pasted, f"/save {talk}"]
    assert "\x1b[31mnot sent" in chat.raw
    assert "\x1b[36m" in chat.raw  # the prompt


def test_ctrl_c_clears_the_line_and_twice_ends_the_chat(bundle: Path, start: Start, tmp_path: Path) -> None:
    history = tmp_path / "state" / "edgelm" / "chat_history"
    history.parent.mkdir(parents=True)
    history.write_text('"of an earlier session"\n')
    chat = start(bundle, "-n", 2, "-q", "--no-history", NO_COLOR="1")
    chat.wait("> ")
    chat.send(UP)
    for _ in range(3):  # clearing a line does not count as Ctrl-C at an empty prompt
        chat.send("half a line")
        assert "earlier" not in chat.wait("half a line")
        chat.interrupt()
        assert "leaves" not in chat.wait("> ")
    chat.send('"""\r')
    chat.wait("... ")
    chat.interrupt()
    assert "leaves" not in chat.wait("> ")
    chat.interrupt()
    chat.wait("Ctrl-C again or Ctrl-D leaves")
    chat.wait("> ")
    chat.send("/system\r")
    chat.wait("[no system message]")
    chat.wait("> ")
    chat.interrupt()
    chat.wait("Ctrl-C again or Ctrl-D leaves")
    chat.wait("> ")
    chat.interrupt()
    assert chat.end() == 0
    assert history.read_text() == '"of an earlier session"\n'
    assert not re.search("\x1b\\[[0-9;]*m", chat.raw)


def test_ctrl_c_cancels_rendering_prefill_and_decoding(endless: Path, start: Start, tmp_path: Path) -> None:
    chat = start(endless, "-n", 60000, "--context-length", 65000)
    chat.wait("> ")
    # While the template is rendered, in a process that is stopped here:
    worker = psutil.Process(chat.process.pid).children(recursive=True)[0]
    assert os.getpgid(worker.pid) != os.getpgid(chat.process.pid)
    worker.suspend()
    chat.send("Hi\r")
    chat.wait("\n")
    chat.wait_until_idle()
    chat.send(CTRL_C)
    chat.wait("[cancelled")
    chat.wait("> ")
    # While a long message is prefilled:
    long = tmp_path / "long.json"
    long.write_text(json.dumps([{"role": "user", "content": "word " * 6000}]))
    chat.send(f"/load {long}\r")
    chat.wait("[1 message loaded")
    chat.send(CTRL_C)
    chat.wait("[cancelled")
    chat.wait("> ")
    # While an answer is generated:
    chat.send("Hi\r")
    chat.wait("\n")
    chat.wait_for_more(40)
    chat.send(CTRL_C)
    chat.wait("ended by interrupted")
    chat.wait("> ")
    saved = tmp_path / "saved.json"
    chat.send(f"/save {saved}\r")
    chat.wait("[2 messages saved")
    said = json.loads(saved.read_text())
    assert said[0] == {"role": "user", "content": "Hi"}
    assert (said[1]["role"], len(said[1]["content"]) > 10) == ("assistant", True)
    chat.wait("> ")
    os.kill(chat.process.pid, signal.SIGTERM)
    chat.wait("terminated")
    assert chat.end() == 130
