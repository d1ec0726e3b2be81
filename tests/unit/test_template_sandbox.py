"""Can a chat template hang, fill memory, outlive EdgeLM, or disturb later renderings?"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from hostile_templates import DEEP, FULL, HANGS, RAISES

from edgelm.errors import EdgeLMError, GenerationError, TokenizerError
from edgelm.tokenization.chat_template import ChatTemplate
from edgelm.tokenization.template_sandbox import Sandbox
from edgelm.tokenization.template_worker import Answer, Renderer

TALK = [{"role": "user", "content": "Hi"}]
GOOD = "{% for m in messages %}{{ m.role }}: {{ m.content | upper }}{% endfor %}"
MEMORY = 128 << 20
HANG = HANGS[0]


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    sandbox = Sandbox(memory=MEMORY, cpu_seconds=0.15, wall_seconds=20)
    yield sandbox
    sandbox.close()


def said(sandbox: Sandbox, source: str) -> str:
    """Return the error of a template, and check that the next request is rendered."""
    start = time.monotonic()
    with pytest.raises((GenerationError, TokenizerError)) as caught:
        ChatTemplate(source, {}, sandbox=sandbox).render(TALK)
    assert time.monotonic() - start < 30  # 0.15 s of CPU time, on a busy machine
    assert ChatTemplate(GOOD, {}, sandbox=sandbox).render(TALK) == "user: HI"
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 400
    return message


@pytest.mark.parametrize("source", HANGS)
def test_a_template_that_hangs_is_ended(sandbox: Sandbox, source: str) -> None:
    assert "does more than a chat template may: more" in said(sandbox, source)


@pytest.mark.parametrize("source", FULL)
def test_a_template_that_fills_memory_is_ended(sandbox: Sandbox, source: str) -> None:
    said(sandbox, source)


def test_a_process_is_replaced_after_a_template_filled_its_memory(sandbox: Sandbox) -> None:
    assert sandbox.ask("a", {"messages": []}) == (Answer.DONE, "a")
    before = sandbox.pid
    assert sandbox.ask("{{ 'ab' * 200000000 }}", {"messages": []})[0] == Answer.LIMIT
    assert sandbox.ask("b", {"messages": []}) == (Answer.DONE, "b")
    assert sandbox.pid not in (None, before)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the environment is read from /proc")
def test_the_process_gets_no_environment_variables(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("TZ", "UTC")
    assert sandbox.ask("a", {"messages": []}) == (Answer.DONE, "a")
    environment = Path(f"/proc/{sandbox.pid}/environ").read_bytes()
    assert b"hf_secret" not in environment
    names = {entry.split(b"=")[0].decode() for entry in environment.split(b"\0") if entry}
    assert names <= {"LD_LIBRARY_PATH", "TZ", "LC_CTYPE"}, names


@pytest.mark.parametrize("source", DEEP)
def test_a_template_that_is_too_deep_is_an_error(sandbox: Sandbox, source: str) -> None:
    said(sandbox, source)


@pytest.mark.parametrize("source", RAISES)
def test_any_error_of_a_template_is_reported(sandbox: Sandbox, source: str) -> None:
    message = said(sandbox, source)
    assert "chat template" in message
    assert "does more" not in message


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits are read from /proc")
def test_the_process_has_its_limits(sandbox: Sandbox) -> None:
    ChatTemplate(GOOD, {}, sandbox=sandbox)
    assert sandbox.pid is not None
    process = psutil.Process(sandbox.pid)
    limits = {
        psutil.RLIMIT_AS: MEMORY,
        psutil.RLIMIT_NOFILE: 3,
        psutil.RLIMIT_FSIZE: 0,
        psutil.RLIMIT_NPROC: 0,
        psutil.RLIMIT_CORE: 0,
    }
    for name, limit in limits.items():
        assert process.rlimit(name) == (limit, limit)
    assert process.num_fds() == 3
    assert set(process.environ()) <= {"LD_LIBRARY_PATH", "TZ"}


@pytest.mark.skipif(os.name == "nt", reason="no CPU time limit: it is ended by the other clock")
def test_a_template_that_waits_is_ended_by_wall_time() -> None:
    sandbox = Sandbox(cpu_seconds=60, wall_seconds=0.5)
    template = ChatTemplate(GOOD, {}, sandbox=sandbox)
    assert sandbox.pid is not None
    os.kill(sandbox.pid, signal.SIGSTOP)
    with pytest.raises(GenerationError, match="more time than it may have"):
        template.render(TALK)
    assert template.render(TALK) == "user: HI"
    sandbox.close()


@pytest.mark.skipif(os.name == "nt", reason="no CPU time limit")
def test_the_cpu_limit_works_if_the_program_ignores_its_signal() -> None:
    before = signal.signal(signal.SIGPROF, signal.SIG_IGN)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGPROF])
    try:
        sandbox = Sandbox(memory=MEMORY, cpu_seconds=0.15, wall_seconds=20)
        assert "more CPU time" in said(sandbox, HANG)
        sandbox.close()
    finally:
        signal.signal(signal.SIGPROF, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def test_one_process_serves_all_templates(sandbox: Sandbox) -> None:
    ChatTemplate(GOOD, {}, sandbox=sandbox)
    pid = sandbox.pid
    for i in range(20):
        assert ChatTemplate(f"{i}", {}, sandbox=sandbox).render(TALK) == f"{i}"
    assert sandbox.pid == pid


def test_a_process_that_was_killed_is_replaced(sandbox: Sandbox) -> None:
    template = ChatTemplate(GOOD, {}, sandbox=sandbox)
    assert sandbox.pid is not None
    killed = sandbox.pid
    psutil.Process(killed).kill()
    assert template.render(TALK) == "user: HI"
    assert sandbox.pid != killed
    assert not psutil.pid_exists(killed)


def test_threads_take_turns(sandbox: Sandbox) -> None:
    wrong: list[object] = []

    def work(number: int) -> None:
        for i in range(20):
            try:
                if number == 0 and i % 10 == 5:
                    said(sandbox, HANG)
                text = ChatTemplate(f"{number} {GOOD}", {}, sandbox=sandbox).render(TALK)
            except (EdgeLMError, AssertionError) as error:
                wrong.append(error)
            else:
                if text != f"{number} user: HI":
                    wrong.append(text)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_process_has_its_own_worker() -> None:
    template = ChatTemplate(GOOD, {})
    pid = os.fork()
    if pid == 0:
        os._exit(0 if template.render(TALK) == "user: HI" else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert template.render(TALK) == "user: HI"


def program(code: str) -> subprocess.Popen[str]:
    """Start a program that prints `ready` and the id of its worker process, and then runs `code`."""
    start = f"""
import signal, sys
from edgelm.tokenization.chat_template import ChatTemplate
from edgelm.tokenization.template_sandbox import Sandbox
sandbox = Sandbox(cpu_seconds=0.8)
good = ChatTemplate({GOOD!r}, {{}}, sandbox=sandbox)
hang = ChatTemplate({HANG!r}, {{}}, sandbox=sandbox)
print(sandbox.pid, flush=True)
"""
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", start + code],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_until_busy(process: psutil.Process) -> None:
    start = process.cpu_times().user
    while process.cpu_times().user < start + 0.1:
        time.sleep(0.01)


@pytest.mark.skipif(os.name == "nt", reason="no signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_rendering_is_interrupted(number: int) -> None:
    code = f"""
def stop(*_): raise KeyboardInterrupt
signal.signal({int(number)}, stop)
try:
    hang.render([{{"role": "user", "content": "x"}}])
except KeyboardInterrupt:
    assert sandbox.pid is None  # it is ended at once, not when the next rendering comes
    assert good.render([{{"role": "user", "content": "x"}}]) == "user: X"
    print("stopped", sandbox.pid)
    sandbox.close()
"""
    with program(code) as running:
        assert running.stdout is not None
        process = psutil.Process(int(running.stdout.readline()))
        wait_until_busy(process)
        running.send_signal(number)
        stopped = time.monotonic()
        out, err = running.communicate(timeout=20)
        assert (out.split()[:1], err, running.returncode) == (["stopped"], "", 0)
        assert time.monotonic() - stopped < 5
    assert not process.is_running()


@pytest.mark.parametrize("ended", [False, True])
def test_after_a_second_ctrl_c_no_old_answer_is_read(ended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox = Sandbox(cpu_seconds=60)
    template = ChatTemplate(GOOD, {}, sandbox=sandbox)
    end = sandbox._end

    def interrupted(*_: object) -> None:
        if ended:
            end()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("edgelm.tokenization.template_sandbox._Process._read", interrupted)
        patch.setattr(sandbox, "_end", interrupted)
        template.render([{"role": "user", "content": "first"}])
    assert template.render([{"role": "user", "content": "second"}]) == "user: SECOND"
    sandbox.close()


@pytest.mark.skipif(os.name == "nt", reason="no CPU time limit")
@pytest.mark.parametrize("busy", [False, True])
def test_no_process_is_left_when_edgelm_is_killed(busy: bool) -> None:
    code = 'hang.render([{"role": "user", "content": "x"}])' if busy else "input()"
    with program(code) as running:
        assert running.stdout is not None
        process = psutil.Process(int(running.stdout.readline()))
        if busy:
            wait_until_busy(process)
        assert process.is_running()
        running.kill()
        running.communicate()
    # It may still be a zombie: its new parent process has to reap it.
    end = time.monotonic() + 20
    while psutil.pid_exists(process.pid) and process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_process_ends_silently_with_the_program() -> None:
    code = """
from edgelm.tokenization.chat_template import ChatTemplate
from edgelm.tokenization.template_sandbox import SANDBOX
SANDBOX.start()
print(ChatTemplate("{{ messages[0].content }}", {}).render([{"role": "user", "content": "x"}]), SANDBOX.pid)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    text, pid = done.stdout.split()
    assert (text, done.stderr, done.returncode) == ("x", "", 0)
    assert not psutil.pid_exists(int(pid))


@pytest.mark.parametrize("executable", ["", "/nowhere/python", sys.executable])
def test_without_a_python_interpreter_the_error_says_so(executable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    monkeypatch.setattr(sys, "frozen", executable == sys.executable and executable != "", raising=False)
    with pytest.raises(GenerationError, match=r"interpreter to start: set sys\.executable|cannot be started to render"):
        ChatTemplate(GOOD, {}, sandbox=Sandbox())


def test_an_executable_that_is_not_python_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(EdgeLMError, match="ended with code 1"):
        ChatTemplate(GOOD, {}, sandbox=Sandbox())


@pytest.mark.parametrize(("parts", "fits"), [(50, True), (51, False), (1000, False)])
def test_many_short_parts_count_towards_the_length_limit(parts: int, fits: bool) -> None:
    source = "{% for _ in range(" + str(parts) + ") %}ab{% endfor %}"
    answer = Renderer(100).answer(json.dumps({"source": source, "given": {"messages": []}}).encode())
    assert answer == (Answer.DONE + b"ab" * 50 if fits else Answer.LIMIT + b"more than 100 characters")
