"""Continuous batching: sequences of a `SequenceBatch` that join and leave between steps.

A scheduler prefills one sequence at a time and decodes the others together, in one pass over the weights. A sequence's
tokens do not depend on the others, on when it joins, on the steps that its prompt is prefilled in, or on what of it was
cached: rows of a decode step do not depend on each other, prompts are cut only where that leaves the bits as they are
(`SequenceBatch.least_step`), and only caches of prefill steps are shared, not those of generated tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import GenerationError
from edgelm.generation.prefix_tree import BLOCK, PrefixTree
from edgelm.generation.sampling import top_k
from edgelm.generation.stream import Continuation, Generation, Timings
from edgelm.runtimes import SequenceBatch

Top = tuple[tuple[int, float], ...]
"""Tokens and their log-probabilities, the most likely first."""


class LogitsRule(Protocol):
    """Changes the logits of one sequence before its next token is chosen."""

    def apply(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the logits [V] to choose by. The argument is not changed.

        Raises:
            GenerationError: the sequence cannot go on.
        """

    def accept(self, token: int) -> None:
        """Take note of the token that was chosen."""


class ScheduledSequence:
    """A sequence of a scheduler.

    Args:
        answer: the continuation, which has not begun.
        rules: applied one after the other to the logits before a token is chosen.
        logprobs: how many of the most likely tokens to return with each token; None: no log-probabilities.
        on_token: called with each token, the text that may be shown now, the token's log-probability (None unless
            asked for), and those of the most likely tokens. They are the model's own: before rules, temperature and
            penalties.
        started: when the sequence was asked for, as `time.perf_counter`; default: now.

    Attributes:
        on_token: as above; may be changed.
        error: why it failed; None if it did not.
    """

    def __init__(
        self,
        answer: Continuation,
        *,
        rules: Sequence[LogitsRule] = (),
        logprobs: int | None = None,
        on_token: Callable[[int, str, float | None, Top], None] | None = None,
        started: float | None = None,
    ) -> None:
        self.answer, self.rules, self.logprobs = answer, tuple(rules), logprobs
        self.error: GenerationError | None = None
        self.started = time.perf_counter() if started is None else started
        self.on_token = on_token
        self._token = 0
        self._row = -1
        self._prefilled = self._reused = self._decoded = 0
        self._prefill_seconds = self._first = 0.0

    @property
    def generation(self) -> Generation:
        """Text, tokens and timings so far. The decoding time includes the steps of others."""
        return self.answer.generation(
            Timings(
                prompt_tokens=len(self.answer.prompt),
                reused_tokens=self._reused,
                decoded_tokens=self._decoded,
                prefill_seconds=self._prefill_seconds,
                time_to_first_token=self._first - self.started if self._first else 0.0,
                decode_seconds=time.perf_counter() - self._first if self._decoded else 0.0,
            )
        )

    @property
    def _needs_logits(self) -> bool:
        return bool(self.rules) or self.logprobs is not None

    def _choose(self, logits: NDArray[np.float32], *, full: bool) -> None:
        """Choose a token by the logits [V] of the model, and take it; on an error the sequence ends."""
        try:
            changed = logits
            for rule in self.rules:
                changed = rule.apply(changed)
            token = self.answer.sampler.sample(changed)
            for rule in self.rules:
                rule.accept(token)
        except GenerationError as error:
            self.error = error
            return
        found = (None, ()) if self.logprobs is None else log_probabilities(logits, token, self.logprobs)
        self._take(token, *found, full=full)

    def _take(self, token: int, logprob: float | None = None, top: Top = (), *, full: bool) -> None:
        self._token = token
        text = self.answer.take(token, full=full)
        if self.on_token is not None:
            self.on_token(token, text, logprob, top)

    @property
    def _ended(self) -> bool:
        return self.error is not None or self.answer.reason is not None


class Scheduler:
    """Generates sequences on a batch. Only one thread may use it.

    Args:
        batch: the model, with the KV caches of as many sequences as may run at a time.
        take: returns the next sequence that waits, None if there is none; called when there is room for it.
        done: called with each sequence when it has ended.
        chunk: most tokens of a prefill step, at most the batch's own.
        beside: most tokens of a prefill step while others decode, so that they do not wait for long: after each such
            step they decode one token. None: they wait until nothing is left to prefill, which takes less time in all.
        context_length: positions after which a sequence ends; at most the batch's, its default.
        prefixes: caches of prompts to reuse, and to add to.
    """

    def __init__(
        self,
        batch: SequenceBatch,
        take: Callable[[], ScheduledSequence | None],
        done: Callable[[ScheduledSequence], None],
        *,
        chunk: int,
        beside: int | None = None,
        context_length: int | None = None,
        prefixes: PrefixTree | None = None,
    ) -> None:
        self._batch, self._take, self._done = batch, take, done
        self._chunk = min(chunk, batch.chunk)
        self._beside = None if beside is None or batch.least_step is None else max(beside, 2 * batch.least_step)
        self._interleaved = beside is not None
        self._context_length = context_length or batch.context_length
        self._prefixes = prefixes
        self._rows: list[ScheduledSequence | None] = [None] * batch.batch
        self._prefilling: ScheduledSequence | None = None
        self._samples_on_device = type(batch).decode_sampled is not SequenceBatch.decode_sampled

    @property
    def running(self) -> list[ScheduledSequence]:
        """The sequences that decode, and the one that is prefilled."""
        rows = [row for row in self._rows if row is not None]
        return rows if self._prefilling is None else [*rows, self._prefilling]

    def step(self) -> bool:
        """Run a prefill step, a decode step or both; return False if there was nothing to do.

        Raises:
            EdgeLMError: the model failed. The sequences are as before the step: `drop` them.
        """
        if self._prefilling is None:
            self._start()
        if self._prefilling is not None:
            self._prefill(self._prefilling)
            if not self._interleaved:
                return True
        if any(self._rows):
            self._decode()
            return True
        return self._prefilling is not None

    def drop(self, sequence: ScheduledSequence) -> None:
        """Remove a sequence that is running; `done` is not called."""
        if self._prefilling is sequence:
            self._prefilling = None
        elif sequence in self._rows:
            self._rows[sequence._row] = None

    def _start(self) -> None:
        """Begin the next sequence that waits, if there is one and room for it."""
        if all(self._rows):
            return
        self._close_gaps()
        while True:
            sequence = self._take()
            if sequence is None:
                return
            if not sequence._ended:
                break
            self._done(sequence)  # it was ended while it waited
        sequence._row = row = self._rows.index(None)
        self._batch.truncate(row, 0)
        self._prefilling = sequence
        if self._prefixes is not None:
            began = time.perf_counter()
            prompt, least = sequence.answer.prompt, self._batch.least_step
            # So that the rest gives the bits of a whole prompt.
            most = max(0, len(prompt) - (least or 1))
            unit = math.lcm(self._chunk, BLOCK) if least is None else BLOCK
            reused = self._prefixes.restore(self._batch, row, prompt, most, unit)
            sequence._prefilled = sequence._reused = reused
            sequence._prefill_seconds += time.perf_counter() - began

    def _end_of_step(self, sequence: ScheduledSequence) -> int:
        """Return the prompt's token at which the next prefill step ends."""
        begin, total, least = sequence._prefilled, len(sequence.answer.prompt), self._batch.least_step
        wanted = self._beside if self._beside is not None and any(self._rows) else self._chunk
        end = min(begin + wanted, total)
        if self._beside is not None and least is not None and 0 < total - end < least:
            # The last step would be too short for the same bits: it gets tokens of this one.
            end = total if total - begin <= self._chunk else total - least
        return end

    def _prefill(self, sequence: ScheduledSequence) -> None:
        """Run a prefill step of the sequence; after the last one choose its first token."""
        began = time.perf_counter()
        prompt, end = sequence.answer.prompt, self._end_of_step(sequence)
        logits = self._batch.prefill(sequence._row, prompt[sequence._prefilled : end])
        sequence._prefilled = end
        if end == len(prompt):
            if self._prefixes is not None:
                self._prefixes.keep(self._batch, sequence._row, prompt)
            sequence._choose(logits, full=end >= self._context_length)
            sequence._first = time.perf_counter()
            self._prefilling = None
            self._rows[sequence._row] = sequence
            self._leave(sequence)
        sequence._prefill_seconds += time.perf_counter() - began

    def _decode(self) -> None:
        """Run a decode step of all sequences that are prefilled."""
        batch, count = self._batch, self._close_gaps()
        rows = self._rows[:count]
        fed = [0 if row is None else row._token for row in rows]
        if self._samples_on_device and not any(row is not None and row._needs_logits for row in rows):
            tokens = batch.decode_sampled(fed, [None if row is None else row.answer.sampler for row in rows])
            logits = None
        else:
            logits = batch.decode_batch(fed)
        lengths = batch.lengths
        for place, row in enumerate(rows):
            if row is None:
                continue
            row._decoded += 1
            full = bool(lengths[place] >= self._context_length)
            if logits is None:
                row._take(tokens[place], full=full)
            else:
                row._choose(logits[place], full=full)
            self._leave(row)
        if self._prefilling is not None and self._prefilling._row < count:
            batch.truncate(self._prefilling._row, self._prefilling._prefilled)  # drop the token that it was fed

    def _leave(self, sequence: ScheduledSequence) -> None:
        """If the sequence has ended, free its row and report it."""
        if sequence._ended:
            self._rows[sequence._row] = None
            self._done(sequence)

    def _close_gaps(self) -> int:
        """Make the running sequences the first ones, where the runtime can move them; return how many rows to decode.

        A row without a sequence is not free: in a MoE its token reads experts that nobody needs. The sequence that is
        prefilled stays where it is, behind them.
        """
        rows, batch = self._rows, self._batch
        if not batch.moves:
            prefilling = self._prefilling
            for place, row in enumerate(rows):
                if row is None and (prefilling is None or prefilling._row != place):
                    batch.truncate(place, 0)  # it gets a token as well: keep its cache from growing
            return len(rows)
        running = [place for place, row in enumerate(rows) if row is not None]
        count = len(running)
        for place in range(count):
            if rows[place] is None:
                last = running.pop()
                moved = rows[last]
                assert moved is not None
                batch.move(last, place)
                rows[place], rows[last], moved._row = moved, None, place
        if count:
            batch.use(count)
        return count


def positions(answers: Iterable[Continuation], context_length: int) -> int:
    """Return the KV cache positions that the longest of `answers` can need, at most `context_length`."""
    limits = [(len(answer.prompt), answer.options.max_tokens) for answer in answers]
    return max(context_length if most is None else min(prompt + most, context_length) for prompt, most in limits)


def log_probabilities(logits: NDArray[np.float32], token: int, count: int) -> tuple[float, Top]:
    """Return the log-probability, by the softmax of logits [V], of a token, and those of the `count` most likely."""
    highest = float(logits.max())
    total = highest + float(np.log(np.exp(logits - np.float32(highest), dtype=np.float64).sum()))
    best: NDArray[np.int64] = np.empty(0, np.int64)
    if count:
        ids = top_k(logits, min(count, logits.size))
        best = ids[np.argsort(-logits[ids], kind="stable")][:count]
    return float(logits[token]) - total, tuple((int(index), float(logits[index]) - total) for index in best)
