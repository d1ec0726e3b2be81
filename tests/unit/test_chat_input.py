"""How does `edgelm chat` split its input into messages, which bytes are refused, and what is in the history?"""

from __future__ import annotations

import json
import stat
from io import BytesIO
from pathlib import Path

import pytest

from edgelm.cli.chat import input as chat_input
from edgelm.cli.chat.input import Entry, History, piped_entries, unusable


def entries(data: str | bytes) -> list[Entry]:
    read = piped_entries(BytesIO(data if isinstance(data, bytes) else data.encode()))
    found = []
    while True:
        try:
            found.append(read())
        except EOFError:
            return found


@pytest.mark.parametrize(
    ("data", "texts"),
    [
        ("a\nb\r\n\nc", ["a", "b", "", "c"]),
        ("\ufeffa\n", ["a"]),
        ('"""\na\n  b\n"""\nc\n', ["a\n  b", "c"]),
        ('"""a"""\n', ["a"]),
        ('""""""\nb', ["", "b"]),
        ('"""a\nb"""  \nc', ["a\nb", "c"]),
        ('say """a\n', ['say """a']),
        ('/system """\na\nb\n"""\n', ["/system a\nb"]),
    ],
)
def test_a_message_is_a_line_or_a_block_in_triple_quotes(data: str, texts: list[str]) -> None:
    found = entries(data)
    assert [entry.text for entry in found] == texts
    assert not any(entry.problem for entry in found)
    assert [entry.literal for entry in found] == [
        line.startswith('"""') for line in data.splitlines()[:1] for _ in texts[:1]
    ] + [False] * (len(texts) - 1)


def test_a_paste_that_only_begins_with_triple_quotes_is_complete() -> None:
    def line(prompt: str) -> str:
        assert prompt == "> "
        return '"""What it does."""\nimport os\n'

    assert chat_input.read_entry(line) == Entry('"""What it does."""\nimport os\n')


def test_an_unfinished_block_is_an_error() -> None:
    (entry,) = entries('"""a\nb\n')
    assert "the input ended before" in entry.problem


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"ab\xff", "character 3 is the byte 0xff, which is not valid UTF-8"),
        (b"\xed\xa0\x80", "character 1 is the byte 0xed"),  # a surrogate, as some programs write it
        (b"a\x00b", "character 2 is U+0000, a control character"),
        (b"\x1b[31m", "character 1 is U+001B, a control character"),
        (b"a\xc2\x9b", "character 2 is U+009B, a control character"),
        (b'"""\na\xff\nb\n"""', "character 2 is the byte 0xff"),
    ],
)
def test_an_invalid_byte_affects_one_message_only(data: bytes, problem: str) -> None:
    bad, good = entries(data + b"\ngood\n")
    assert problem in bad.problem
    assert good == Entry("good")


def test_texts_in_many_scripts_are_accepted() -> None:
    assert unusable("tabs\tand\nline ends\f, emoji 👩‍👩‍👧, Größe, \u00a0\u200d") == ""
    assert unusable("\ud83d") == "character 1 is U+D83D, half a surrogate pair"


def test_history_keeps_multi_line_messages_in_a_private_file(tmp_path: Path) -> None:
    history = History(tmp_path / "state" / "edgelm" / "chat_history")
    assert history.read() == []
    for text in ("a", "b\nc", "x" * 20_000, "ü"):
        history.add(text)
    assert stat.S_IMODE(history.path.stat().st_mode) == 0o600
    with history.path.open("ab") as stream:
        stream.write(b'"cut of\n\xff\n5\n"\\ud800"\n')
    assert history.read() == ["a", "b\nc", "ü"]


def test_history_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_input, "HISTORY_BYTES", 1000)
    history = History(tmp_path / "h")
    for i in range(300):
        history.add(f"message {i}")
    found = history.read()
    assert found[-1] == "message 299"
    assert len(found) > 20
    assert history.path.stat().st_size <= 500
    assert stat.S_IMODE(history.path.stat().st_mode) == 0o600
    assert [json.loads(line) for line in history.path.read_text().splitlines()] == found == history.read()


def test_a_history_that_cannot_be_written_is_not_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "h"):
        history = History(path)
        history.add("a")
        assert history.read() == []


def test_history_is_in_the_users_state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_STATE_HOME", value)
        history = History.default()
        assert history is not None
        assert history.path == tmp_path / ".local" / "state" / "edgelm" / "chat_history"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "s"))
    history = History.default()
    assert history is not None
    assert history.path == tmp_path / "s" / "edgelm" / "chat_history"
