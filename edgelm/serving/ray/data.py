"""Batches on a Ray cluster, with Ray Data.

    places of chunks -> [this machine] lines of the file -> [replicas] answers -> [this machine] the file

A chunk is a few requests. Ray Data starts a replica anew that died, computes its chunks again, and yields all chunks in
order; this process writes them.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import socket
import threading
from array import array
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelm.errors import EdgeLMError
from edgelm.progress import Progress, Silent
from edgelm.serving.batch import Run, Write, answer_all, open_models
from edgelm.serving.batch.answers import Answer
from edgelm.serving.batch.in_process import InProcess
from edgelm.serving.batch.requests import BatchRequest, RequestReader, open_requests, request_lines
from edgelm.serving.ray.cluster import (
    Share,
    bundle_problem,
    connected,
    cpus_here,
    error_in,
    log_folder,
    on_every_machine,
    require_bundles,
    share_of,
)

if TYPE_CHECKING:
    from edgelm.serving.settings import Settings

Columns = dict[str, Any]

_CHUNKS_AT_ONCE = 2
_QUEUED_CHUNKS = 4
_MOST_CHUNKS = 10_000
"""More make Ray Data slow: it holds something of each from the start."""
_TRIES = 4
"""How often a chunk is tried: a request that kills its replica must not do so for ever."""
_RESERVE = 0.1
"""CPUs, by Ray's count, that a replica leaves for reading the file."""


def run_on_ray(
    settings: Settings, address: str, *, replicas: int | None = None, progress: Progress | None = None
) -> Run:
    """Return a function that answers requests on a Ray cluster.

    Args:
        settings: settings of each replica, which `batch_settings` made.
        address: the cluster, see `check_address`.
        replicas: how many processes load the models; None: one for each device.
        progress: receives notes.
    """
    notes = progress or Silent()
    settings = on_every_machine(settings)

    def run(source: Path, skip: int, reader: RequestReader, write: Write) -> None:
        with connected(address, cpus_here(settings, replicas)) as found:
            require_bundles(settings, reader.models, found)
            count, share = share_of(settings, found, replicas)
            notes.note(f"replicas: {count}, of {_counted(share)} each; machines: {len(found)}; logs: {log_folder()}")
            _answer(source, skip, reader, share.apply(settings), count, share, write, notes)

    return run


def _counted(share: Share) -> str:
    """Return a share in words."""
    count, what = (share.gpus, "GPU") if share.gpus else (share.cpus, "CPU")
    return f"{count} {what}{'' if count == 1 else 's'}"


def _answer(
    source: Path,
    skip: int,
    reader: RequestReader,
    settings: Settings,
    replicas: int,
    share: Share,
    write: Write,
    notes: Progress,
) -> None:
    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    chunks = _chunks(source, skip, 2 * settings.slots)
    here = f"node:{ray.util.get_node_ip_address()}"
    tries = ray.remote(num_cpus=0)(Tries).remote()
    with ray.data.DataContext.current(context):
        lines = ray.data.from_items(chunks, override_num_blocks=len(chunks)).map_batches(
            _read, fn_args=(source.resolve(),), batch_size=None, num_cpus=_RESERVE, resources={here: 0.001}
        )
        answers = lines.map_batches(
            Replica,
            fn_constructor_args=(settings, reader, tries),
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(
                size=replicas,
                max_tasks_in_flight_per_actor=_QUEUED_CHUNKS,
                max_concurrent_calls_per_actor=_CHUNKS_AT_ONCE,
                enable_true_multi_threading=True,
            ),
            num_cpus=share.cpus - _RESERVE if share.cpus else 0.5,
            num_gpus=share.gpus or None,
        )
        _write_in_order(answers, write, notes)


def _write_in_order(answers: Any, write: Write, notes: Progress) -> None:
    """Write what Ray Data yields; `answers` is a `ray.data.Dataset`.

    Raises:
        EdgeLMError: a replica failed, or some requests killed theirs again and again.
    """
    import ray

    seen: set[str] = set()
    number = 0
    try:
        for columns in answers.iter_batches(batch_size=None, batch_format="numpy"):
            replica = str(columns["replica"][0])
            if replica not in seen:
                seen.add(replica)
                notes.note(f"answers of the replica {replica}")
            rows = zip(*(columns[name].tolist() for name in ("number", *_ANSWER)), strict=True)
            for at, line, status, prompt, completion in rows:
                assert at > number, f"line {at} after line {number}"
                number = at
                write(Answer(line, status, prompt, completion))
    except ray.exceptions.RayError as error:
        raise _explained(error) from error


_ANSWER = ("line", "status", "prompt_tokens", "completion_tokens")


def _explained(error: BaseException) -> EdgeLMError:
    """Return the error of ours that caused one of Ray's."""
    import ray

    found: BaseException | None = error
    while found is not None:
        message = str(found) if isinstance(found, EdgeLMError) else error_in(str(found))
        if message is not None:
            return EdgeLMError(f"a replica failed: {message}")
        found = getattr(found, "cause", None) or found.__cause__
    what = "could not start" if isinstance(error, ray.exceptions.RayActorError) else "failed"
    return EdgeLMError(
        f"a replica {what}: {log_folder()} has the reason; to go on, run the same command again"
    )  # fmt: skip


def _chunks(source: Path, skip: int, size: int) -> list[dict[str, int]]:
    """Return where each chunk begins: the offset in bytes, the number of lines before, and how many requests it has."""
    places = array("q")
    with open_requests(source) as stream:
        end = 0
        for number, line in enumerate(stream):
            if line.strip():
                places.extend((end, number))
            end += len(line)
    del places[: 2 * skip]
    count = len(places) // 2
    size = max(size, -(-count // _MOST_CHUNKS))
    return [
        {"offset": places[2 * at], "before": places[2 * at + 1], "count": min(size, count - at)}
        for at in range(0, count, size)
    ]


def _read(chunks: Columns, source: Path) -> Columns:
    """Return the lines of chunks; runs on the machine that has the file."""
    found: list[tuple[int, bytes]] = []
    for offset, before, count in zip(*(chunks[name].tolist() for name in ("offset", "before", "count")), strict=True):
        found += itertools.islice(request_lines(source, offset, before), count)
    numbers, lines = zip(*found, strict=True)
    return {"number": np.array(numbers, np.int64), "line": _column(lines)}


def _column(values: Sequence[bytes]) -> Any:
    """Return a column of bytes; numpy itself would cut zeros off."""
    column = np.empty(len(values), object)
    column[:] = values
    return column


class Tries:
    """How often each chunk was begun, counted outside the replicas, which may die."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def begin(self, number: int) -> int:
        """Count the chunk whose first line has this number; return how often it was begun before."""
        self._counts[number] += 1
        return self._counts[number] - 1


class Replica:
    """The models in a process of Ray, which answers chunks. Ray calls it in several threads.

    Args:
        settings: settings of the server.
        reader: reads the requests.
        tries: the actor of the class `Tries`.

    Raises:
        EdgeLMError: a bundle is not here or another one, or a model cannot be loaded.
    """

    def __init__(self, settings: Settings, reader: RequestReader, tries: Any) -> None:
        problem = bundle_problem({name: str(path) for name, path in settings.models.items()}, reader.models)
        if problem is not None:
            raise EdgeLMError(problem)
        self._settings, self._reader, self._tries = settings, reader, tries
        self._name = f"{os.getpid()} on {socket.gethostname()}"
        self._client: Future[InProcess] = Future()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._live, name="edgelm-batch", daemon=True).start()
        self._client.result()

    def _live(self) -> None:
        self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        try:
            async with open_models(self._settings) as client:
                self._client.set_result(client)
                await asyncio.Event().wait()  # until Ray ends the process
        except EdgeLMError as error:
            self._client.set_exception(error)

    def __call__(self, columns: Columns) -> Columns:
        """Return the answers to a chunk.

        Raises:
            EdgeLMError: replicas died with it again and again.
        """
        import ray

        first, last = columns["number"][[0, -1]].tolist()
        if ray.get(self._tries.begin.remote(first)) == _TRIES:
            raise EdgeLMError(
                f"a replica died {_TRIES} times with lines {first} to {last} of the requests: see Ray's logs; to "
                "go on, take out what kills it, and write the answers to another file"
            )
        requests = [
            self._reader.parse(line, number, Path("the batch"))
            for number, line in zip(columns["number"].tolist(), columns["line"].tolist(), strict=True)
        ]
        answers = asyncio.run_coroutine_threadsafe(self._answer(requests), self._loop).result()
        return {
            "number": columns["number"],
            "line": _column([answer.line for answer in answers]),
            **{name: np.array([getattr(answer, name) for answer in answers], np.int64) for name in _ANSWER[1:]},
            "replica": np.array([self._name] * len(answers)),
        }

    async def _answer(self, requests: Sequence[BatchRequest]) -> list[Answer]:
        return [answer async for answer in answer_all(requests, self._client.result(), len(requests))]
