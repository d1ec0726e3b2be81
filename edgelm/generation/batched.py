"""Batched decoding: one pass over the weights computes a token for each of several prompts."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgelm.generation.stream import Continuation, Generation, Timings
from edgelm.generation.turns import Turn
from edgelm.runtimes import SequenceBatch


@dataclass
class _Row:
    """A running sequence. Times are values of `time.perf_counter`."""

    index: int
    answer: Continuation
    token: int
    prefill_seconds: float
    first: float
    decoded: int = 0


def positions(answers: Iterable[Continuation], context_length: int) -> int:
    """Return the KV cache positions that the longest of `answers` can need, at most `context_length`."""
    limits = [(len(answer.prompt), answer.options.max_tokens) for answer in answers]
    return max(context_length if most is None else min(prompt + most, context_length) for prompt, most in limits)


def decode_together(
    batch: SequenceBatch,
    answers: Sequence[Continuation],
    turn: Turn,
    *,
    context_length: int,
    chunk: int,
    started: float,
) -> list[Generation]:
    """Generate every continuation. When a sequence ends, the next prompt takes its row.

    Args:
        batch: sequences of the runtime, one per row.
        answers: continuations that have not begun.
        turn: checked before every step; raises if the call is to end.
        context_length: positions after which a sequence ends.
        chunk: tokens of a prefill step; the same as for single sequences, so that the results are equal.
        started: start time of the call.

    Returns:
        The results in the order of `answers`. `Timings` are those of each sequence: its decoding time, from its first
        token to its last, includes the steps of the others.
    """
    results: list[Generation | None] = [None] * len(answers)
    waiting = deque(enumerate(answers))
    rows: list[_Row | None] = [None] * batch.batch

    def unfinished(row: _Row) -> _Row | None:
        """Return the row; if its sequence has ended, store the result and return None."""
        if row.answer.reason is None:
            return row
        timings = Timings(
            prompt_tokens=len(row.answer.prompt),
            reused_tokens=0,
            decoded_tokens=row.decoded,
            prefill_seconds=row.prefill_seconds,
            time_to_first_token=row.first - started,
            decode_seconds=time.perf_counter() - row.first if row.decoded else 0.0,
        )
        results[row.index] = row.answer.generation(timings)
        return None

    while True:
        for place in range(len(rows)):
            while rows[place] is None and waiting:
                rows[place] = unfinished(_begin(batch, place, *waiting.popleft(), turn, context_length, chunk))
        if not any(rows):
            return [result for result in results if result is not None]
        turn.check()
        decoded = rows[: _close_gaps(batch, rows)]
        fed = [0 if row is None else row.token for row in decoded]
        tokens = batch.decode_sampled(fed, [None if row is None else row.answer.sampler for row in decoded])
        lengths = batch.lengths
        for place, row in enumerate(decoded):
            if row is not None:
                row.token = tokens[place]
                row.decoded += 1
                row.answer.take(row.token, full=bool(lengths[place] >= context_length))
                rows[place] = unfinished(row)


def _close_gaps(batch: SequenceBatch, rows: list[_Row | None]) -> int:
    """Make the running sequences the first ones, where the runtime can move them; return how many rows to decode.

    A row without a sequence is not free: in a MoE its token reads experts that nobody needs.
    """
    count = len(rows)
    if batch.moves:
        running = [place for place, row in enumerate(rows) if row is not None]
        # Two at least: a step of one row rounds the logits of a split head otherwise, and a sequence's tokens would
        # depend on when the others end.
        count = max(2, len(running))
        for place in range(len(running)):
            if rows[place] is None:
                last = running.pop()
                batch.move(last, place)
                rows[place], rows[last] = rows[last], None
        batch.use(count)
    for place in range(count):
        if rows[place] is None:
            batch.truncate(place, 0)  # it gets a token as well: keep its cache from growing
    return count


def _begin(
    batch: SequenceBatch, place: int, index: int, answer: Continuation, turn: Turn, context_length: int, chunk: int
) -> _Row:
    """Prefill a prompt in row `place`, which replaces the sequence there, and choose its first token."""
    began = time.perf_counter()
    batch.truncate(place, 0)
    logits: NDArray[np.float32] | None = None
    for begin in range(0, len(answer.prompt), chunk):
        turn.check()
        logits = batch.prefill(place, answer.prompt[begin : begin + chunk])
    assert logits is not None
    token = answer.sampler.sample(logits)
    row = _Row(index, answer, token, time.perf_counter() - began, time.perf_counter())
    answer.take(token, full=len(answer.prompt) >= context_length)
    return row
