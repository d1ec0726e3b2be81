"""Is every line of a batch answered once, in order, whatever stops the run, and is every wrong file refused?"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edgelm.cli.main import cli
from edgelm.errors import EdgeLMError
from edgelm.serving.batch import Run, Write, answer_all, batch_settings, reader_for, run_batch, run_here
from edgelm.serving.batch.answers import Answer, line_start
from edgelm.serving.batch.in_process import InProcess
from edgelm.serving.batch.requests import MOST_BYTES, BatchRequest, RequestReader
from edgelm.serving.settings import Settings

Bundles = Callable[[str, str, str], Path]
READER = RequestReader({"tiny": "digest"}, ("/v1/completions", "/v1/chat/completions"))
COMPLETIONS = "/v1/completions"


def a_line(custom_id: str, body: dict[str, Any] | None = None, url: str = COMPLETIONS) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body or {"model": "tiny"}})


def written(folder: Path, *lines: str) -> Path:
    path = folder / "in.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def answers_in(path: Path) -> list[Any]:
    data = path.read_bytes()
    assert data.endswith(b"\n")
    return [json.loads(line) for line in data.splitlines()]


def names(path: Path) -> list[str]:
    return [answer["custom_id"] for answer in answers_in(path)]


class Echo:
    """An ASGI application that answers with what it was sent, after `body.wait` seconds, with `body.status`."""

    def __init__(self) -> None:
        self.running = self.most = self.calls = 0
        self.ended: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            for what in ("startup", "shutdown"):
                assert (await receive())["type"] == f"lifespan.{what}"
                await send({"type": f"lifespan.{what}.complete"})
            return
        body = json.loads((await receive())["body"])
        self.running, self.calls = self.running + 1, self.calls + 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(body.get("wait", 0))
        self.running -= 1
        self.ended.append(body.get("name", ""))
        await send({"type": "http.response.start", "status": body.get("status", 200), "headers": []})
        text = b"sorry" if body.get("nonsense") else json.dumps({"echo": body}).encode()
        await send({"type": "http.response.body", "body": text[:5], "more_body": True})
        await send({"type": "http.response.body", "body": text[5:], "more_body": False})


def run_echo(app: Echo, at_once: int = 4) -> Run:
    def run(source: Path, skip: int, reader: RequestReader, write: Write) -> None:
        async def work() -> None:
            client = InProcess(app)
            await client.start()
            async for answer in answer_all(list(reader.read(source))[skip:], client, at_once):
                write(answer)
            await client.stop()

        asyncio.run(work())

    return run


@pytest.fixture(scope="module")
def requests_and_answers(tiny_bundle: Bundles, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """The bundle, a file of 240 requests, and the answers of a run that nothing stopped."""
    bundle = tiny_bundle("olmoe", "int4", "native")
    folder = tmp_path_factory.mktemp("batch")
    lines = [
        a_line(f"id-{n}", {"model": "tiny", "prompt": f"{n} times", "max_tokens": 1 + n % 9, "temperature": 0})
        for n in range(240)
    ]
    source = written(folder, *lines)
    settings = batch_settings(Settings(models={"tiny": bundle}, loading={"threads": 2}))
    report = run_batch(source, folder / "out.jsonl", reader_for(settings), run_here(settings))
    assert (report.requests, report.kept, report.failed) == (240, 0, 0)
    assert report.completion_tokens > 240 and report.prompt_tokens > 240
    return bundle, source, folder / "out.jsonl"


def texts(path: Path) -> list[tuple[str, str]]:
    return [(a["custom_id"], a["response"]["body"]["choices"][0]["text"]) for a in answers_in(path)]


def command(bundle: Path, source: Path, target: Path) -> list[str]:
    return [
        *(sys.executable, "-P", "-m", "edgelm", "batch", str(source), str(target)),
        *("--bundle", f"tiny={bundle}", "--threads", "1"),
    ]


def test_answers_have_the_form_of_openais_batches(requests_and_answers: tuple[Path, Path, Path]) -> None:
    answer = answers_in(requests_and_answers[2])[3]
    assert set(answer) == {"id", "custom_id", "response", "error"}
    assert answer["id"].startswith("batch_req_") and answer["custom_id"] == "id-3" and answer["error"] is None
    assert set(answer["response"]) == {"status_code", "request_id", "body"}
    assert answer["response"]["status_code"] == 200
    assert answer["response"]["body"]["object"] == "text_completion"
    assert answer["response"]["body"]["usage"]["completion_tokens"] == 4


def test_answers_are_those_of_generate(requests_and_answers: tuple[Path, Path, Path]) -> None:
    import edgelm

    bundle, _, target = requests_and_answers
    assert names(target) == [f"id-{n}" for n in range(240)]
    with edgelm.load(bundle, threads=2) as model:
        for n in (0, 7, 100, 239):
            assert texts(target)[n][1] == model.generate(f"{n} times", max_tokens=1 + n % 9, temperature=0).text


def test_a_killed_run_goes_on_and_answers_every_line_once(
    requests_and_answers: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """Killed whenever new answers have come, in the middle of whatever it does, until it ends by itself."""
    bundle, source, expected = requests_and_answers
    target = tmp_path / "out.jsonl"
    chance, kills, before = random.Random(1), 0, b""
    while True:
        process = subprocess.Popen(command(bundle, source, target), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        goal = len(before) + chance.randrange(8_000, 30_000)
        while process.poll() is None and (not target.exists() or target.stat().st_size < goal):
            time.sleep(0.001)
        process.kill()
        error = process.communicate()[1].decode()
        assert process.returncode in (0, -signal.SIGKILL), error
        now = target.read_bytes()
        kept = before[: before.rfind(b"\n") + 1]
        assert now.startswith(kept), "a finished line was changed"
        if process.returncode == 0 and kills >= 3:
            break
        kills, before = kills + (process.returncode != 0), now
        if process.returncode == 0:  # it was faster than this process
            before = now[: len(now) // 3]
        elif kills % 2:  # as if it had been killed within a write
            before = now[: len(now) - chance.randrange(1, 200)]
        target.write_bytes(before)
    assert texts(target) == texts(expected)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_says_how_far_it_came_and_goes_on(
    requests_and_answers: tuple[Path, Path, Path], tmp_path: Path, number: signal.Signals
) -> None:
    bundle, source, expected = requests_and_answers
    target = tmp_path / "out.jsonl"
    for _ in range(10):
        process = subprocess.Popen(command(bundle, source, target), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        while process.poll() is None and (not target.exists() or target.stat().st_size < 5_000):
            time.sleep(0.001)
        process.send_signal(number)
        error = process.communicate()[1].decode()
        if process.returncode != 0:
            break
        target.unlink()  # it was faster than this process
    assert process.returncode == 130, error
    assert f"{target} has {len(answers_in(target))} answers; the same command goes on from there" in error
    assert "Traceback" not in error
    assert 0 < len(answers_in(target)) < 240
    subprocess.run(command(bundle, source, target), check=True, capture_output=True)
    assert texts(target) == texts(expected)


def test_answers_are_in_order_when_requests_end_in_another(tmp_path: Path) -> None:
    app, chance = Echo(), random.Random(1)
    lines = [a_line(f"{n}", {"model": "tiny", "name": f"{n}", "wait": chance.random() / 50}) for n in range(100)]
    run_batch(written(tmp_path, *lines), tmp_path / "out.jsonl", READER, run_echo(app, 8))
    assert names(tmp_path / "out.jsonl") == [f"{n}" for n in range(100)] != app.ended
    assert app.most == 8 and app.calls == 100


def test_a_slow_request_keeps_the_others_waiting_neither_for_ever_nor_in_memory() -> None:
    """While the first request takes long, the others go on, but only so far ahead."""
    app, read = Echo(), []

    def requests() -> Iterator[BatchRequest]:
        for n in range(1000):
            read.append(n)
            line = a_line(f"{n}", {"model": "tiny", "wait": 0 if n else 0.3})
            yield READER.parse(line.encode(), n + 1, Path("in"))

    async def work() -> None:
        client = InProcess(app)
        await client.start()
        answers = answer_all(requests(), client, 2)
        await anext(answers)
        assert len(read) == 32
        assert [answer.status async for answer in answers] == [200] * 999
        await client.stop()

    asyncio.run(work())


def test_a_failed_request_is_an_answer_and_the_exit_code_is_1(tiny_bundle: Bundles, tmp_path: Path) -> None:
    good = {"model": "tiny", "prompt": "a", "max_tokens": 2}
    source = written(tmp_path, a_line("a", good), a_line("b", {**good, "max_tokens": -1}), a_line("c", good))
    target = tmp_path / "out.jsonl"
    arguments = ["batch", str(source), str(target), "--bundle", f"tiny={tiny_bundle('olmoe', 'int4', 'native')}"]
    for _ in range(2):  # the second run finds all answers
        result = CliRunner().invoke(cli, [*arguments, "--threads", "1", "--json"])
        assert result.exit_code == 1
        assert f"error: 1 of 3 answers in {target} are errors" in result.stderr
        report = json.loads(result.stdout)
        assert (report["requests"], report["failed"]) == (3, 1)
        codes = [answer["response"]["status_code"] for answer in answers_in(target)]
        assert codes == [200, 400, 200]
    assert report["kept"] == 3
    assert answers_in(target)[1]["response"]["body"]["error"]["param"] == "max_tokens"


def test_a_failure_of_the_server_is_tried_again_and_many_in_a_row_stop_the_run(tmp_path: Path) -> None:
    app, target = Echo(), tmp_path / "out.jsonl"
    bodies = [{"status": 200}, {"status": 500}, {"status": 200, "nonsense": True}, *[{"status": 200}] * 10]
    source = written(tmp_path, *(a_line(f"{n}", {"model": "tiny", **body}) for n, body in enumerate(bodies)))
    report = run_batch(source, target, READER, run_echo(app))
    assert app.calls == len(bodies) + 2 and report.failed == 2
    assert answers_in(target)[2]["response"] is None
    assert answers_in(target)[2]["error"]["code"] == "server_error"

    target.unlink()
    bodies = [{"status": 200}, {"status": 200}, *[{"status": 503}] * 100]
    source = written(tmp_path, *(a_line(f"{n}", {"model": "tiny", **body}) for n, body in enumerate(bodies)))
    with pytest.raises(EdgeLMError, match=r"8 requests in a row failed, the last with .*503.*run the same command"):
        run_batch(source, target, READER, run_echo(app))
    assert names(target) == ["0", "1"]


def test_a_bundle_that_cannot_be_loaded_is_one_error_with_the_reason(tiny_bundle: Bundles, tmp_path: Path) -> None:
    source = written(tmp_path, a_line("a", {"model": "tiny", "prompt": "a"}))
    arguments = ["batch", str(source), str(tmp_path / "out.jsonl"), "--bundle"]
    bundle = tiny_bundle("olmoe", "int4", "native")
    result = CliRunner().invoke(cli, [*arguments, f"tiny={bundle}", "--context-length", "1000000"])
    assert result.exit_code == 1 and "1000000" in result.stderr and result.stderr.count("\n") <= 2
    result = CliRunner().invoke(cli, [*arguments, f"tiny={tmp_path}"])
    assert result.exit_code == 1 and "is not a bundle" in result.stderr
    assert not (tmp_path / "out.jsonl").exists() or not (tmp_path / "out.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not valid JSON"),
        ("[]", "is no object"),
        ('{"custom_id": "x"}', "has no method, url, body"),
        (a_line("x")[:-1] + ', "more": 1}', "has the unknown field 'more'"),
        (a_line("x")[:-1] + ', "url": "b"}', "is there twice"),
        (a_line("x").replace('"x"', "7"), "custom_id is 7: give a text"),
        (a_line(""), "custom_id is '': give a text"),
        (a_line("x").replace("POST", "GET"), "method is 'GET'"),
        (a_line("x", url="/v1/files"), "url is '/v1/files': give /v1/completions, /v1/chat/completions"),
        (a_line("x").replace('{"model": "tiny"}', "3"), "body is no object"),
        (a_line("x", {"model": "gpt-4o"}), "there is no model 'gpt-4o': there is tiny; --bundle NAME=BUNDLE"),
        (a_line("x", {"model": "tiny", "stream": True}), "body.stream is true"),
        (a_line("b"), "custom_id 'b' is that of line 2 too"),
        ('"' + "x" * MOST_BYTES, "is longer than 8 MiB"),
        ("\udcff", "not valid JSON"),
    ],
)
def test_a_wrong_line_is_refused_by_its_number_before_anything_is_computed(
    tmp_path: Path, line: str, problem: str
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    text = "\n".join([a_line("a"), a_line("b"), "", line, a_line("d")])
    source.write_bytes(text.encode("utf-8", "surrogateescape"))
    app = Echo()
    with pytest.raises(EdgeLMError, match="line 4: ") as caught:
        run_batch(source, target, READER, run_echo(app))
    assert problem in str(caught.value) and len(str(caught.value)) < 500
    assert not target.exists() and not app.calls


def test_a_model_may_be_missing_where_there_is_only_one(tmp_path: Path) -> None:
    line = a_line("x", {"prompt": "a"})
    assert READER.check(written(tmp_path, line)) == 1
    two = RequestReader({"a": "1", "b": "2"}, READER.urls)
    with pytest.raises(EdgeLMError, match=r"line 1: body.model is missing: there is a, b"):
        two.check(written(tmp_path, line))


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda folder: folder / "none.jsonl", "cannot be read"),
        (lambda folder: folder, "is no regular file"),
        (lambda folder: written(folder, "", " "), "has no requests"),
    ],
)
def test_a_wrong_file_of_requests_is_refused(tmp_path: Path, make: Callable[[Path], Path], problem: str) -> None:
    with pytest.raises(EdgeLMError, match=problem):
        run_batch(make(tmp_path), tmp_path / "out.jsonl", READER, run_echo(Echo()))


def an_answer(custom_id: str, body: dict[str, Any] | None = None) -> bytes:
    return Answer.of(READER.parse(a_line(custom_id, body).encode(), 1, Path("in")), 200, b"{}").line


def test_another_files_answers_are_refused_and_left_as_they_are(tmp_path: Path) -> None:
    source, target = written(tmp_path, a_line("a"), a_line("b")), tmp_path / "out.jsonl"
    start = line_start(READER.parse(a_line("a").encode(), 1, source))
    contents = {
        "notes": b"to do: tea\n",
        "without a line's end": b"to do: tea",
        "an array": b"[]\n",
        "the second first": an_answer("b"),
        "another question of this name": an_answer("a", {"model": "tiny", "prompt": "else"}),
        "a line too many": an_answer("a") + an_answer("b") + an_answer("c"),
        "the start of a line too many": an_answer("a") + an_answer("b") + b'{"id":',
        "not JSON, in the middle": start + b"\n" + an_answer("b"),
        "another unfinished one": an_answer("a")[:-9] .replace(b'"a"', b'"A"'),
    }  # fmt: skip
    for name, content in contents.items():
        target.write_bytes(content)
        with pytest.raises(EdgeLMError, match="choose another place, or move it away"):
            run_batch(source, target, READER, run_echo(Echo()))
        assert target.read_bytes() == content, name


def test_every_cut_of_the_answers_is_continued(tmp_path: Path) -> None:
    source, target = written(tmp_path, *map(a_line, ("a", "b", "ü\ud800"))), tmp_path / "out.jsonl"
    run_batch(source, target, READER, run_echo(Echo()))
    whole, app = target.read_bytes(), Echo()
    for length in range(len(whole) + 1):
        target.write_bytes(whole[:length])
        app.calls = 0
        report = run_batch(source, target, READER, run_echo(app))
        assert target.read_bytes() == whole
        assert report.kept == whole[:length].count(b"\n") == 3 - app.calls


def test_places_where_answers_cannot_be_are_refused(tmp_path: Path) -> None:
    source = written(tmp_path, a_line("a"))
    os.link(source, tmp_path / "same.jsonl")
    wrong = {
        source: "is the file of the requests", tmp_path / "same.jsonl": "is the file of the requests",
        tmp_path: "is no regular file", Path("/dev/null"): "is no regular file",
        tmp_path / "none" / "out.jsonl": "there is no folder",
    }  # fmt: skip
    for target, problem in wrong.items():
        with pytest.raises(EdgeLMError, match=problem):
            run_batch(source, target, READER, run_echo(Echo()))
    assert source.read_text() == a_line("a") + "\n"


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    source, target = written(tmp_path, a_line("a")), tmp_path / "out.jsonl"

    def run(*given: Any) -> None:
        with pytest.raises(EdgeLMError, match="another run is writing"):
            run_batch(source, target, READER, run_echo(Echo()))
        run_echo(Echo())(*given)

    run_batch(source, target, READER, run)
    assert names(target) == ["a"]


def test_a_file_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    source, target = written(tmp_path, a_line("a"), a_line("b")), tmp_path / "out.jsonl"

    def run(*given: Any) -> None:
        written(tmp_path, a_line("a"))
        run_echo(Echo())(*given)

    with pytest.raises(EdgeLMError, match="was changed while it was read"):
        run_batch(source, target, READER, run)


def test_checking_takes_little_memory_for_many_requests(tmp_path: Path) -> None:
    """In a process of its own, since this one's peak is not known."""
    source = tmp_path / "in.jsonl"
    with source.open("w") as stream:
        for n in range(60_000):
            stream.write(a_line(f"request-{n}", {"model": "tiny", "prompt": "x" * 500}) + "\n")
    program = (
        "import resource; from pathlib import Path; from edgelm.serving.batch.requests import RequestReader\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"reader, path = RequestReader({READER.models!r}, {READER.urls!r}), Path({str(source)!r})\n"
        "before = peak(); print(reader.check(path), peak() - before)\n"
    )
    result = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    count, kib = map(int, result.stdout.split())
    assert count == 60_000
    assert source.stat().st_size > 30 << 20
    assert kib < 4 << 10
