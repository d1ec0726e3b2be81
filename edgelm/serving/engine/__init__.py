"""Engine: a thread that generates the answers of many requests together on one loaded bundle."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from edgelm.errors import EdgeLMError, QueueFullError, TimeLimitError
from edgelm.generation.language_model import LanguageModel
from edgelm.generation.prefix_tree import BLOCK, BlockStore, PrefixTree
from edgelm.generation.scheduler import LogitsRule, ScheduledSequence, Scheduler, Top
from edgelm.generation.session_file import manifest_sha256
from edgelm.generation.stream import Continuation, Generation
from edgelm.runtimes import SequenceBatch
from edgelm.serving.engine.single import SingleSequence

DEFAULT_SLOTS = 4
DEFAULT_QUEUE = 64
DEFAULT_PREFIX_BYTES = 1 << 30
BESIDE = 64
"""Most tokens of a prefill step while others decode: it bounds how long they wait for their next token."""
FIXED_CHUNK = 256
"""Tokens of a prefill step where bits depend on the cuts: prompts are cut at multiples of it, and as much is reused."""
_BLOCK_FORMAT = 1
"""Increment this when the bytes of a cache or the arithmetic that makes them change."""


@dataclass(frozen=True)
class Token:
    """A generated token.

    Attributes:
        token: its id. The end token comes too.
        text: what may be shown now; empty while a character is incomplete or a stop string may have begun.
        logprob: its log-probability by the model, None unless asked for.
        top: the most likely tokens and their log-probabilities, as many as were asked for.
    """

    token: int
    text: str
    logprob: float | None
    top: Top


@dataclass(frozen=True)
class Finished:
    """The end of a job. `generation`: the whole result; its stop reason is "interrupted" if the job was cancelled."""

    generation: Generation


@dataclass(frozen=True)
class Failed:
    """The end of a job that failed."""

    error: EdgeLMError


Event = Token | Finished | Failed


class Job:
    """One sequence to generate.

    Args:
        answer: from `engine.model.continuation`; each job needs its own.
        notify: called in the engine's thread with each event. The last one, exactly once, is Finished or Failed. It
            must not block or raise.
        rules: see `ScheduledSequence`.
        logprobs: see `ScheduledSequence`.
        client: jobs of different clients take turns.
        deadline: `time.monotonic()` after which it fails with TimeLimitError; None: never.
    """

    def __init__(
        self,
        answer: Continuation,
        notify: Callable[[Event], None],
        *,
        rules: Sequence[LogitsRule] = (),
        logprobs: int | None = None,
        client: str = "",
        deadline: float | None = None,
    ) -> None:
        self.client, self.deadline = client, deadline
        self._notify = notify
        self._cancelled = False
        self._sequence = ScheduledSequence(answer, rules=rules, logprobs=logprobs, on_token=self._on_token)

    def _on_token(self, token: int, text: str, logprob: float | None, top: Top) -> None:
        self._notify(Token(token, text, logprob, top))

    def _end(self, event: Finished | Failed) -> None:
        """Tell the last event. Without callbacks nothing refers to what it belongs to: it is freed now, not later."""
        notify, self._notify = self._notify, _nobody
        self._sequence.on_token = None
        notify(event)


def _nobody(_: Event) -> None:
    """Take events that nobody waits for."""


@dataclass(frozen=True)
class Statistics:
    """Counters of an engine since it was made, and what it does now.

    Attributes:
        waiting: jobs that wait for a place.
        running: jobs that are prefilled or decoded.
        finished: jobs that ended, in whatever way.
        prompt_tokens: tokens of the prompts that were begun.
        reused_tokens: how many of them were in the prefix cache.
        loaded_tokens: how many of these came from the prompt cache on disk.
        generated_tokens: generated tokens.
        steps: steps of the engine.
        busy_seconds: time in these steps.
        prefix_bytes: bytes of the prefix cache in memory.
    """

    waiting: int
    running: int
    finished: int
    prompt_tokens: int
    reused_tokens: int
    loaded_tokens: int
    generated_tokens: int
    steps: int
    busy_seconds: float
    prefix_bytes: int


class _FairQueue:
    """Jobs that wait, of which each client has its turn. Not safe for threads."""

    def __init__(self) -> None:
        self._clients: OrderedDict[str, deque[Job]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._clients.values()))

    def __iter__(self) -> Iterator[Job]:
        return iter([job for jobs in self._clients.values() for job in jobs])

    def put(self, job: Job) -> None:
        self._clients.setdefault(job.client, deque()).append(job)

    def take(self) -> Job | None:
        """Return the next job; its client then waits until the others had their turn."""
        if not self._clients:
            return None
        client, jobs = self._clients.popitem(last=False)
        job = jobs.popleft()
        if jobs:
            self._clients[client] = jobs
        return job

    def remove(self, job: Job) -> bool:
        """Remove a job; return whether it was there."""
        jobs = self._clients.get(job.client)
        if jobs is None or job not in jobs:
            return False
        jobs.remove(job)
        if not jobs:
            del self._clients[job.client]
        return True


class Engine:
    """A loaded bundle that answers many requests at a time.

    Each job is one sequence. Up to `slots` run together; the others wait, and clients take turns. Tokens do not depend
    on what runs beside a job or on what is cached. Only runtimes with batches run more than one job at a time: others
    have one slot.

    Args:
        model: the loaded bundle, which the engine closes.
        slots: most sequences that run together. Each can have the whole context length: their caches take memory as
            they grow.
        queue: most jobs that wait.
        prefix_bytes: memory of the prefix cache; 0: none.
        store: where the prefix cache is kept beyond the process.

    Attributes:
        model: the loaded bundle. Use its tokenizer and chat template; its own `generate` is not for a served model.
        slots: most sequences that run together.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        slots: int = DEFAULT_SLOTS,
        queue: int = DEFAULT_QUEUE,
        prefix_bytes: int = DEFAULT_PREFIX_BYTES,
        store: BlockStore | None = None,
    ) -> None:
        runtime = model.runtime
        self.model = model
        self._batch: SequenceBatch = runtime.open_batch(slots, runtime.context_length) or SingleSequence(runtime)
        self.slots = self._batch.batch
        self._most_waiting = queue
        self._prefixes = None
        chunk = runtime.chunk if self._batch.least_step is not None else min(runtime.chunk, FIXED_CHUNK)
        unit = self._batch.block_tokens
        if unit is not None and BLOCK % unit == 0 and prefix_bytes > 0:
            kv = getattr(runtime, "kv", model.bundle.manifest.graph.kv_dtype)
            root = f"{manifest_sha256(model.bundle)} {runtime.name} {kv} {_BLOCK_FORMAT} {BLOCK}"
            if self._batch.least_step is None:
                root += f" {chunk}"
            self._prefixes = PrefixTree(root.encode(), prefix_bytes, store)
        self._waiting = _FairQueue()
        self._running: dict[ScheduledSequence, Job] = {}
        self._scheduler = Scheduler(
            self._batch, self._next, self._ended, chunk=chunk, beside=BESIDE, prefixes=self._prefixes
        )
        self._mutex = threading.Lock()
        self._changed = threading.Condition(self._mutex)
        self._closing = self._stopped = False
        self._finished = self._prompt_tokens = self._reused_tokens = self._generated_tokens = self._steps = 0
        self._busy_seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="edgelm-engine", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Generate a job's sequence as soon as there is a place. May be called in any thread.

        Raises:
            QueueFullError: too many jobs wait.
            EdgeLMError: the engine is closed.
        """
        with self._mutex:
            if self._closing:
                raise EdgeLMError("the model is being unloaded: ask again later")
            if len(self._waiting) >= self._most_waiting:
                raise QueueFullError(f"{len(self._waiting)} requests wait already: ask again later")
            self._waiting.put(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """End a job soon; it is finished with the stop reason "interrupted". May be called in any thread."""
        with self._mutex:
            job._cancelled = True
            self._changed.notify()

    @property
    def idle(self) -> bool:
        """Whether no job waits or runs."""
        with self._mutex:
            return not len(self._waiting) and not self._running

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()

    def statistics(self) -> Statistics:
        """Return the counters."""
        with self._mutex:
            return Statistics(
                waiting=len(self._waiting),
                running=len(self._running),
                finished=self._finished,
                prompt_tokens=self._prompt_tokens,
                reused_tokens=self._reused_tokens,
                loaded_tokens=0 if self._prefixes is None else self._prefixes.loaded_tokens,
                generated_tokens=self._generated_tokens,
                steps=self._steps,
                busy_seconds=self._busy_seconds,
                prefix_bytes=0 if self._prefixes is None else self._prefixes.nbytes,
            )

    def close(self, finish_seconds: float = 0.0) -> None:
        """Accept no more jobs, let those that were accepted finish, then free the model.

        Args:
            finish_seconds: after this time the jobs that are left fail.
        """
        with self._mutex:
            self._closing = True
            self._changed.notify()
        self._thread.join(finish_seconds)
        with self._mutex:
            self._stopped = True
            self._changed.notify()
        self._thread.join()
        self._batch.close()
        self.model.close()

    def _run(self) -> None:
        while self._wait():
            began = time.perf_counter()
            try:
                worked = self._scheduler.step()
            except EdgeLMError as error:
                self._fail_running(error)
            except Exception as error:
                # A fault of ours must not stop the server: the jobs at hand fail, later ones get their chance.
                self._fail_running(EdgeLMError(f"unexpected {type(error).__name__} while generating"))
            else:
                with self._mutex:
                    self._steps += worked
                    self._busy_seconds += time.perf_counter() - began

    def _wait(self) -> bool:
        """Wait until there is something to do, end jobs that were cancelled or are late; return False at the end."""
        with self._mutex:
            while not self._stopped and not len(self._waiting) and not self._running:
                if self._closing:
                    return False
                self._changed.wait()
            stopped, now = self._stopped, time.monotonic()
            ended: list[tuple[Job, Finished | Failed]] = []
            for job in [*self._running.values(), *self._waiting]:
                event = _end(job, now, stopped=stopped)
                if event is None:
                    continue
                ended.append((job, event))
                if self._running.pop(job._sequence, None) is not None:
                    self._scheduler.drop(job._sequence)
                    self._count(job._sequence)
                else:
                    self._waiting.remove(job)
                    self._finished += 1
        for job, event in ended:
            job._end(event)
        return not stopped

    def _next(self) -> ScheduledSequence | None:
        with self._mutex:
            job = self._waiting.take()
            if job is None:
                return None
            self._running[job._sequence] = job
            return job._sequence

    def _ended(self, sequence: ScheduledSequence) -> None:
        with self._mutex:
            job = self._running.pop(sequence)
            self._count(sequence)
        job._end(Finished(sequence.generation) if sequence.error is None else Failed(sequence.error))

    def _fail_running(self, error: EdgeLMError) -> None:
        with self._mutex:
            jobs = list(self._running.values())
            self._running.clear()
            for job in jobs:
                self._scheduler.drop(job._sequence)
                self._count(job._sequence)
        for job in jobs:
            job._end(Failed(error))

    def _count(self, sequence: ScheduledSequence) -> None:
        timings = sequence.generation.timings
        self._finished += 1
        self._prompt_tokens += timings.prompt_tokens
        self._reused_tokens += timings.reused_tokens
        self._generated_tokens += timings.decoded_tokens + (timings.time_to_first_token > 0)


def _end(job: Job, now: float, *, stopped: bool) -> Finished | Failed | None:
    """Return the event that ends a job now; None if it goes on."""
    if job._cancelled:
        return Finished(job._sequence.generation)
    if stopped:
        return Failed(EdgeLMError("the server is stopping: ask again later"))
    if job.deadline is not None and now > job.deadline:
        return Failed(TimeLimitError("the request took longer than this server allows: ask for fewer tokens"))
    return None
