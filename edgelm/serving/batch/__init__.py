"""Offline batches: a file of requests, as for OpenAI's batches, to a file of answers in the same order.

Every request goes through the server's application, so a batch has what the server has: structured output, tools,
limits. Answers are written as soon as all before them are: memory does not grow with the file, and a run that was
stopped at any moment goes on where it was.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelm.errors import EdgeLMError
from edgelm.progress import Progress, Silent
from edgelm.serving.batch.answers import Answer, AnswerFile
from edgelm.serving.batch.in_process import InProcess
from edgelm.serving.batch.requests import BatchRequest, RequestReader

if TYPE_CHECKING:
    from edgelm.serving.settings import Settings

Write = Callable[[Answer], None]
Run = Callable[[Path, int, RequestReader, Write], None]
"""Answers the requests of a file in order, without so many of the first, and passes on each answer."""

_SECONDS = 7 * 24 * 3600.0
_AHEAD = 16
_TRIES = 3
_MOST_FAILURES = 8


@dataclass(frozen=True)
class BatchReport:
    """What a run did.

    Attributes:
        requests: requests of the file.
        kept: answers of earlier runs.
        failed: answers that are errors, of earlier runs too.
        prompt_tokens: tokens of the prompts, of this run.
        completion_tokens: generated tokens, of this run.
        seconds: time of this run, with loading.
    """

    requests: int
    kept: int
    failed: int
    prompt_tokens: int
    completion_tokens: int
    seconds: float


def batch_settings(settings: Settings) -> Settings:
    """Return the settings of a server for a batch, which no client waits for: nothing is refused for its time or rank.

    Args:
        settings: settings of the server.
    """
    limits = replace(settings.limits, seconds=_SECONDS, per_key=1 << 20, queue=1 << 20)
    return replace(settings, limits=limits, keys=(), hosts=None, finish_seconds=0)


def reader_for(settings: Settings) -> RequestReader:
    """Return the reader of requests to these models.

    Raises:
        BundleError: a folder is not a bundle.
    """
    from edgelm.serving.endpoints.operations import OPERATIONS

    urls = [one.path for one in OPERATIONS if one.method == "POST" and one.path.startswith("/v1/")]
    return RequestReader(digests_of(settings), tuple(urls))


def digests_of(settings: Settings) -> dict[str, str]:
    """Return the digest of each bundle's manifest, which has those of its files, by the name of its model.

    Raises:
        BundleError: a folder is not a bundle.
    """
    from edgelm.bundle import Bundle
    from edgelm.generation.session_file import manifest_sha256

    return {name: manifest_sha256(Bundle.open(path)) for name, path in settings.models.items()}


def run_batch(
    source: Path, target: Path, reader: RequestReader, run: Run, *, progress: Progress | None = None
) -> BatchReport:
    """Write the answers to the requests of `source` to `target`.

    All requests are checked before the first is answered. Answers that an earlier run wrote to `target` are kept.

    Args:
        source: requests, one a line.
        target: answers, one a line; made if it does not exist.
        reader: reads the requests.
        run: answers them.
        progress: receives progress reports.

    Raises:
        EdgeLMError: a line is no request; `target` has something else in it or cannot be written; or the models fail
            again and again. What was written stays.
    """
    progress = progress or Silent()
    began = time.monotonic()
    count = reader.check(source)
    with AnswerFile(target, source) as answers:
        kept = answers.resume(reader.read(source))
        if kept:
            progress.note(f"{target} has {kept:,} of {count:,} answers already")
        writer = _Writer(answers)
        if kept < count:
            with progress.task("answer", count - kept, unit="steps") as advance:

                def write(answer: Answer) -> None:
                    writer.add(answer)
                    advance(1)

                try:
                    run(source, kept, reader, write)
                except KeyboardInterrupt:
                    progress.note(
                        f"{target} has {kept + writer.written:,} answers; the same command goes on from there"
                    )
                    raise
            writer.end()
        if kept + writer.written != count:
            raise EdgeLMError(f"{source} was changed while it was read: run the same command again")
        seconds = time.monotonic() - began
        return BatchReport(count, kept, answers.failed, writer.prompt_tokens, writer.completion_tokens, seconds)


class _Writer:
    """Writes answers, but holds back failures of the server, not of a request, until it answers again.

    Attributes:
        written: answers that were written.
        prompt_tokens: tokens of their prompts.
        completion_tokens: their generated tokens.
    """

    def __init__(self, answers: AnswerFile) -> None:
        self.written = self.prompt_tokens = self.completion_tokens = 0
        self._answers = answers
        self._held: list[Answer] = []

    def add(self, answer: Answer) -> None:
        """Take the next answer.

        Raises:
            EdgeLMError: too many failures in a row. None of them is written: all other requests would follow.
        """
        self._held.append(answer)
        if answer.status < 500:
            self.end()
        elif len(self._held) == _MOST_FAILURES:
            raise EdgeLMError(
                f"{len(self._held)} requests in a row failed, the last with {answer.line.decode()[:300].strip()!r}: "
                "see the messages above; to go on, run the same command again"
            )

    def end(self) -> None:
        """Write what was held back."""
        for answer in self._held:
            self._answers.write(answer)
            self.written += 1
            self.prompt_tokens += answer.prompt_tokens
            self.completion_tokens += answer.completion_tokens
        self._held = []


def run_here(settings: Settings) -> Run:
    """Return a function that answers requests in this process.

    Args:
        settings: settings of the server, which `batch_settings` made.
    """

    def run(source: Path, skip: int, reader: RequestReader, write: Write) -> None:
        requests = itertools.islice(reader.read(source), skip, None)
        asyncio.run(_stopped_by_signals(_answer_here(requests, settings, write)))

    return run


async def _stopped_by_signals(work: Coroutine[Any, Any, None]) -> None:
    """Await `work`, and cancel it on SIGTERM, and on SIGINT where asyncio does not do so: before Python 3.11.

    The handlers of this process, which raise errors, would raise them in the middle of any statement. They are called
    when the work has ended.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    handlers: dict[signal.Signals, Any] = {}
    if os.name == "posix" and threading.current_thread() is threading.main_thread():
        handlers[signal.SIGTERM] = signal.getsignal(signal.SIGTERM)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            handlers[signal.SIGINT] = signal.default_int_handler
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    received: list[signal.Signals] = []

    def stop(number: signal.Signals) -> None:
        received.append(number)
        task.cancel()

    for number in handlers:
        loop.add_signal_handler(number, stop, number)
    try:
        await work
    except asyncio.CancelledError:
        if received:
            handlers[received[0]](received[0], None)
        raise
    finally:
        for number, handler in handlers.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)


async def _answer_here(requests: Iterable[BatchRequest], settings: Settings, write: Write) -> None:
    async with open_models(settings) as client, aclosing(answer_all(requests, client, 2 * settings.slots)) as answers:
        async for answer in answers:
            write(answer)


@asynccontextmanager
async def open_models(settings: Settings) -> AsyncIterator[InProcess]:
    """Load the models for a block; yield what asks them.

    Raises:
        EdgeLMError: a model cannot be loaded.
    """
    from edgelm.serving.app import create_app

    app = create_app(settings)
    client = InProcess(app)
    try:
        await client.start()
    except EdgeLMError as error:
        problems = [model.problem for model in app.state.service.models.all.values() if model.problem is not None]
        raise (problems[0] if problems else error) from error
    try:
        yield client
    finally:
        await client.stop()


async def answer_all(
    requests: Iterable[BatchRequest], client: InProcess, at_once: int, tries: int = _TRIES
) -> AsyncGenerator[Answer, None]:
    """Yield the answers in the order of the requests.

    Args:
        requests: the requests, of which no more are read than are needed.
        client: what answers them.
        at_once: requests that are answered together. Up to 16 times as many answers wait for an earlier one.
        tries: how often a request is asked again whose answer is a failure of the server.
    """
    left, more = iter(requests), True
    window: deque[asyncio.Task[Answer]] = deque()
    running: set[asyncio.Task[Answer]] = set()
    try:
        while more or window:
            while more and len(running) < at_once and len(window) < _AHEAD * at_once:
                request = next(left, None)
                if request is None:
                    more = False
                    break
                task = asyncio.ensure_future(answer_one(request, client, tries))
                window.append(task)
                running.add(task)
            if running:
                _, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            while window and window[0].done():
                yield window.popleft().result()
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*window, return_exceptions=True)


async def answer_one(request: BatchRequest, client: InProcess, tries: int) -> Answer:
    """Return the answer to a request; ask again where the server failed."""
    for left in reversed(range(tries)):
        status, body = await client.post(request.url, request.body)
        if status < 500 or not left:
            break
    return Answer.of(request, status, body)
