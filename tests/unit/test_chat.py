"""Does `edgelm chat` keep a conversation within the context, run its commands, and never lose messages?"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tiny_graph import Shape, write_tiny_model

from edgelm.cli.chat.input import Cleared, Entry
from edgelm.cli.chat.session import Screen, Session
from edgelm.cli.main import cli
from edgelm.errors import ContextLengthError, EdgeLMError, GenerationError
from edgelm.generation.language_model import LanguageModel, load
from edgelm.generation.trimming import Trimmed, trim_messages
from edgelm.tokenization.chat_template import read_messages, write_messages

Message = dict[str, Any]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "bundle", eos_ids=(2,)).path


@pytest.fixture(scope="module")
def model(bundle: Path) -> Iterator[LanguageModel]:
    with load(bundle, threads=1) as model:
        yield model


def chat(bundle: Path, stdin: str | bytes, *options: object) -> Result:
    arguments = ["chat", bundle, "--threads", 1, *options]
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], input=stdin)


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def system(text: str) -> Message:
    return {"role": "system", "content": text}


TURNS = [message for i in range(6) for message in (user(f"question {i}"), assistant(f"answer {i}"))]
"""About 25 tokens per turn."""


def test_a_conversation_that_fits_is_not_changed(model: LanguageModel) -> None:
    messages = [*TURNS, user("last")]
    tokens = model.chat_tokens(messages)
    room = model.runtime.context_length - len(tokens)
    assert trim_messages(model, messages, room) == Trimmed(messages, tokens, 0)
    assert trim_messages(model, messages, room + 1).dropped > 0


@pytest.mark.parametrize("first", [[], [system("Be brief.")], [system("a"), {"role": "developer", "content": "b"}]])
@pytest.mark.parametrize("answer", [100, 150, 200])
def test_the_oldest_turns_are_dropped_and_system_messages_kept(
    model: LanguageModel, first: list[Message], answer: int
) -> None:
    kept = trim_messages(model, [*first, *TURNS, user("last")], answer)
    assert kept.dropped > 0
    assert kept.messages == [*first, *TURNS[2 * kept.dropped :], user("last")]
    assert kept.tokens == model.chat_tokens(kept.messages)
    # As few as possible to free a quarter of the room.
    goal = (model.runtime.context_length - answer) * 3 // 4
    one_more = [*first, *TURNS[2 * (kept.dropped - 1) :], user("last")]
    assert len(kept.tokens) <= goal < len(model.chat_tokens(one_more))
    assert trim_messages(model, kept.messages, answer).dropped == 0


def test_tool_calls_are_dropped_with_their_turn(model: LanguageModel) -> None:
    tools = [user("a " * 30), user("b"), {"role": "tool", "content": "1"}, assistant("c " * 40)]
    last = [user("d"), {"role": "tool", "content": "2"}, user("e"), user("f")]
    kept = trim_messages(model, [*tools, *last], 150)
    assert (kept.messages, kept.dropped) == (last, 1)


def test_the_last_message_is_kept_even_if_it_leaves_less_room(model: LanguageModel) -> None:
    long = user("word " * 90)
    kept = trim_messages(model, [system("s"), *TURNS, long], 128)
    assert (kept.messages, kept.dropped) == ([system("s"), long], 6)
    assert 128 < len(kept.tokens) <= 256
    assert trim_messages(model, [long], 300).dropped == 0


def test_room_for_the_answer_has_priority_over_the_extra_quarter(model: LanguageModel) -> None:
    long = user("word " * 50)
    need = len(model.chat_tokens([*TURNS[-2:], long]))
    kept = trim_messages(model, [*TURNS, long], 256 - need)
    assert (kept.messages, kept.dropped) == ([*TURNS[-2:], long], 5)


def test_a_single_message_that_is_too_long_is_refused(model: LanguageModel) -> None:
    with pytest.raises(ContextLengthError, match="tokens do not fit: the context holds 256"):
        trim_messages(model, [*TURNS, user("word " * 200)], 16)


def test_messages_are_read_back_from_their_file(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    messages = [system("ü"), user('"\n\t'), assistant("")]
    write_messages(path, messages)
    write_messages(str(path), messages[:2])
    assert read_messages(str(path)) == messages[:2]
    for text in ("[]", '[{"role": "user"}]', '{"role": "user", "content": "x"}', "notes"):
        path.write_text(text)
        with pytest.raises(GenerationError, match=r"talk\.json: "):
            read_messages(path)
        with pytest.raises(EdgeLMError, match=r"exists already and holds something else than a conversation"):
            write_messages(path, messages)
        assert path.read_text() == text
    assert [file.name for file in tmp_path.iterdir()] == ["talk.json"]


def test_with_a_seed_the_cache_is_reused_and_the_text_is_reproducible(bundle: Path, tmp_path: Path) -> None:
    words = "Hi\nMore\n/regen\nAnd more\n"
    options = ["-n", 12, "-t", 1.5]
    one = chat(bundle, words + f"/save {tmp_path / 'a'}\n", *options, "--seed", 3)
    other = chat(bundle, words + f"/save {tmp_path / 'b'}\n", *options, "--seed", 3)
    assert one.stdout == other.stdout
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text()
    assert one.stdout != chat(bundle, words, *options, "--seed", 4).stdout
    lines = [line for line in one.stderr.splitlines() if "ended by" in line]
    assert ["cached" in line for line in lines] == [False, True, True, True]
    saved = json.loads((tmp_path / "a").read_text())
    # Another attempt uses another seed, since the same one would give the same answer.
    with_regen, without = saved[3]["content"], chat(bundle, "Hi\nMore\n", *options, "--seed", 3).stdout
    assert with_regen.strip() not in without


def test_a_conversation_is_kept_until_reset(bundle: Path, model: LanguageModel) -> None:
    result = chat(bundle, "Hi\nMore\n/RESET\nHi\n/exit\nnever\n", "-t", 0, "-n", 4)
    first = model.chat([user("Hi")], max_tokens=4).text
    second = model.chat([user("Hi"), assistant(first), user("More")], max_tokens=4).text
    assert first != second
    assert result.stdout == f"{first}\n{second}\n{first}\n"
    assert result.exit_code == 0
    assert result.stderr.count("ended by") == 3
    assert result.stderr.count("\n") == 4  # nothing but the message of /reset


def test_a_chat_beyond_the_context_says_what_it_drops(bundle: Path) -> None:
    words = "".join(f"question {i}\n" for i in range(20))
    result = chat(bundle, words, "-n", 6, "--system", "Be brief.")
    assert (result.exit_code, result.stderr.count("ended by")) == (0, 20)
    dropped = [i for i, line in enumerate(result.stderr.splitlines()) if "the context of 256 tokens is full" in line]
    assert len(dropped) >= 3
    assert all(later - earlier > 2 for earlier, later in pairwise(dropped))  # not with every message
    refused = chat(bundle, words + "/reset\nagain\n", "-n", 6, "--context-length", 96, "--no-trim")
    assert refused.exit_code == 1
    assert (
        "not answered: the conversation and an answer of 6 tokens do not fit into the context of 96" in refused.stderr
    )
    assert "or leave --no-trim out" in refused.stderr
    assert "is full" not in refused.stderr
    assert refused.stderr.rindex("ended by") > refused.stderr.rindex("forgotten")


def test_a_message_that_is_too_long_leaves_the_conversation_as_it_was(bundle: Path, tmp_path: Path) -> None:
    talk = tmp_path / "talk.json"
    result = chat(bundle, f"Hi\n{'word ' * 60}\nMore\n/save {talk}\n", "-n", 4, "--context-length", 96)
    assert (result.exit_code, result.stderr.count("ended by")) == (1, 2)
    assert re.search(r"not answered: 1\d\d tokens do not fit: the context holds 96", result.stderr)
    assert [message["content"] for message in read_messages(talk) if message["role"] == "user"] == ["Hi", "More"]


def test_only_the_line_with_invalid_bytes_is_skipped(bundle: Path) -> None:
    result = chat(bundle, b"a\xff\nHi\nb\x00\nMore", "-n", 2)
    assert result.exit_code == 1
    assert result.stderr.count("not sent: character 2 is ") == 2
    assert result.stderr.count("ended by") == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/exti", "not sent: there is no command /exti, perhaps /exit; /help says how to send such a message"),
        ("/Exitnow", "not sent: there is no command /exitnow"),
        ("/", "not sent: there is no command /; /help"),
        ("/exit now", "/exit takes nothing after it"),
        ("/save", "/save needs the name of a file"),
        ("/regen", "/regen: there is no answer yet"),
        ("/save x.json", "/save: nothing has been said yet"),
        ("/load /nowhere/at/all", "/load: /nowhere/at/all: is missing"),
        ("/load ~nobody-of-this-name/x", "x: is missing"),
        ("/load bad\x9b", "not sent: character 10 is U+009B"),
    ],
)
def test_a_failed_command_gives_one_line_and_is_not_sent(bundle: Path, line: str, message: str) -> None:
    result = chat(bundle, f"{line}\n", "-n", 2)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert message in result.stderr


@pytest.mark.parametrize("leave", ["/exit", "/EXIT ", "/Quit", "/bye"])
def test_commands_that_end_the_chat(bundle: Path, leave: str) -> None:
    assert (chat(bundle, f"{leave}\nHi\n").stdout, chat(bundle, f"{leave}\nHi\n").stderr) == ("", "")


def test_help_names_every_command(bundle: Path) -> None:
    from edgelm.cli.chat.session import ALIASES, COMMANDS

    result = chat(bundle, "/help\n/?\n")
    assert (result.exit_code, result.stdout) == (0, "")
    assert all(result.stderr.count(f"/{name}") >= 2 for name in [*COMMANDS, *ALIASES])


def asked(model: LanguageModel, *entries: Entry, **options: Any) -> Session:
    """Return a session after some entries."""
    session = Session(model, Screen(), {"max_tokens": 2}, quiet=True, **options)
    for entry in entries:
        assert session.handle(entry)
    return session


def test_messages_are_sent_unchanged(model: LanguageModel) -> None:
    literal, indented = Entry("/reset\n  x ", literal=True), Entry("  x", literal=True)
    code = Entry("\n  def f():\n    pass\n\n")
    session = asked(model, Entry("  /reset "), code, Entry(" \n "), literal, Entry("/a\nb"), indented)
    sent = [message["content"] for message in session.messages if message["role"] == "user"]
    assert sent == ["/reset", "  def f():\n    pass", "/reset\n  x ", "/a\nb", "  x"]


def test_system_sets_shows_and_removes_the_system_message(
    model: LanguageModel, capsys: pytest.CaptureFixture[str]
) -> None:
    session = asked(model, Entry("Hi"), Entry("/system Be brief."), system="Be kind.")
    assert session.messages[0] == system("Be brief.")
    assert [message["role"] for message in session.messages] == ["system", "user", "assistant"]
    session.handle(Entry("/system"))
    assert "[system message: Be brief.]" in capsys.readouterr().err
    session.handle(Entry("/reset"))
    assert session.messages == [system("Be brief.")]
    session.handle(Entry("/system  " + "word " * 200))
    assert "/system: 433" in (said := capsys.readouterr().err)
    assert "tokens do not fit" in said
    session.handle(Entry('/system ""'))
    assert session.messages == []
    session.messages = [system("of a file\x1b[31m")]
    session.handle(Entry("/system"))
    assert "[system message: of a file\u241b[31m]" in capsys.readouterr().err


def test_save_and_load_continue_a_conversation(
    model: LanguageModel, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = tmp_path / "my talk.json"
    session = asked(model, Entry("Hi"), Entry(f'/save "{talk}"'), system="Be brief.")
    other = asked(model, Entry("something else"), Entry(f"/LOAD {talk}"))
    assert other.messages == session.messages == read_messages(talk)
    answered = CliRunner().invoke(cli, ["run", str(bundle), "--messages", str(talk), "-n", "2"])
    assert answered.exit_code == 0
    notes = tmp_path / "notes.txt"
    notes.write_text("my notes")
    capsys.readouterr()
    for command in (f"/save {notes}", f"/save {tmp_path}", f"/save {tmp_path / 'no' / 'x'}", f"/load {notes}"):
        session.handle(Entry(command))
        assert capsys.readouterr().err.count("\n") == 1
        assert notes.read_text() == "my notes"
    for text in (
        '[{"role": "user", "content": "\\ud800"}]',
        '[{"role": "user"}]',
    ):
        notes.write_text(text)
        session.handle(Entry(f"/load {notes}"))
    assert session.failed
    assert session.messages == read_messages(talk)


def test_a_question_in_a_loaded_file_is_answered(model: LanguageModel, tmp_path: Path) -> None:
    write_messages(tmp_path / "q.json", [system("s"), user("Hi")])
    session = asked(model, Entry(f"/load {tmp_path / 'q.json'}"))
    assert [message["role"] for message in session.messages] == ["system", "user", "assistant"]


def test_regen_answers_the_last_message_again(model: LanguageModel) -> None:
    session = Session(model, Screen(), {"max_tokens": 12, "temperature": 3.0}, quiet=True)
    session.handle(Entry("Hi"))
    answers = set()
    for _ in range(4):
        session.handle(Entry("/regen"))
        assert [message["role"] for message in session.messages] == ["user", "assistant"]
        answers.add(session.messages[1]["content"])
    assert len(answers) > 1


def test_an_error_in_one_message_does_not_end_the_chat(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    session = asked(model, Entry("Hi"))
    before = session.messages
    with monkeypatch.context() as patch:
        patch.setattr(model.runtime, "prefill", failing(EdgeLMError("the\x1b[31m device\nis gone")))
        assert session.handle(Entry("More"))
    assert capsys.readouterr().err == "not answered: the\\x1b[31m device is gone\n"
    assert session.failed
    assert session.messages == before
    session.handle(Entry("More"))
    assert len(session.messages) == len(before) + 2


def failing(error: BaseException) -> Any:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize("where", ["prefill", "decode_greedy"])
def test_ctrl_c_cancels_a_message_or_keeps_the_partial_answer(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    session = Session(model, Screen(), {"max_tokens": 9}, quiet=True)
    steps = iter(["Hi", "More", "Again"])

    def read() -> Entry:
        text = next(steps, None)
        monkeypatch.setattr(model.runtime, where, failing(KeyboardInterrupt()) if text == "More" else original)
        if text is None:
            raise EOFError
        return Entry(text)

    original = getattr(model.runtime, where)
    try:
        session.run(read, terminal=True)
    except KeyboardInterrupt:  # would end pytest
        pytest.fail("Ctrl-C left the chat")
    said = [message["content"] for message in session.messages]
    assert said[::2] == (["Hi", "Again"] if where == "prefill" else ["Hi", "More", "Again"])
    if where == "decode_greedy":
        assert 0 < len(said[3]) < len(said[1])


def test_ctrl_c_before_the_answer_of_a_piped_message_ends(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(model, Screen(), {"max_tokens": 2}, quiet=True)
    monkeypatch.setattr(model.runtime, "prefill", failing(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        session.run(lambda: Entry("Hi"), terminal=False)


def test_only_two_consecutive_ctrl_c_end_the_chat(model: LanguageModel) -> None:
    session = Session(model, Screen(), {"max_tokens": 2}, quiet=True)
    pressed: list[object] = []
    script: list[Any] = [
        Cleared(empty=True),
        Cleared(empty=False),
        Cleared(empty=True),
        Entry(""),
        *[Cleared(empty=True)] * 3,
    ]

    def read() -> Entry:
        step = script[len(pressed)]
        pressed.append(step)
        if isinstance(step, Cleared):
            raise step
        assert isinstance(step, Entry)
        return step

    session.run(read, terminal=True)
    assert len(pressed) == 6


@pytest.mark.parametrize(("terminal", "shown"), [(True, "a\u241b[31m\n\tb\ufffd"), (False, "a\x1b[31m\n\tb\x9b")])
def test_control_characters_of_a_model_are_not_printed(
    terminal: bool, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    Screen().answer("a\x1b[31m\n\tb\x9b")
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize(
    ("name", "value", "colour"), [("NO_COLOR", "1", False), ("TERM", "dumb", False), ("X", "", True)]
)
def test_colours_can_be_turned_off(name: str, value: str, colour: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv(name, value)
    assert (Screen().style("x", fg="red") != "x") == colour


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--system", "word " * 200], "tokens do not fit"),
        (["--system", "\udcff"], "not valid Unicode"),
    ],
)
def test_invalid_settings_are_reported_at_once(bundle: Path, options: list[object], message: str) -> None:
    result = chat(bundle, "Hi\nMore\n", *options)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert message in result.stderr


@pytest.mark.skipif(os.name == "nt", reason="no POSIX signals")
def test_with_pipes_ctrl_c_stops_an_answer_and_sigterm_ends_the_chat(tmp_path: Path) -> None:
    # Generates without end; the context lasts for a minute.
    shape = Shape(vocab=512, hidden=64, layers=8, context=1 << 16)
    endless = write_tiny_model(tmp_path / "bundle", shape).path
    options = ["-n", "60000", "--context-length", "65000", "--threads", "1"]
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "edgelm", "chat", str(endless), *options],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                process.stdin.write("Hi\n")
                process.stdin.flush()
                assert process.stdout.read(200)
                process.send_signal(number)
                assert "ended by interrupted" in process.stderr.readline() or number == signal.SIGTERM
            process.wait(timeout=60)
            assert process.returncode == 130
        finally:
            process.kill()
