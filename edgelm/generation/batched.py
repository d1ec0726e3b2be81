"""Several prompts that decode together: one pass over the weights gives each of them a token."""

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
    """One sequence under way. Times are of `time.perf_counter`."""

    index: int
    answer: Continuation
    token: int
    prefill_seconds: float
    first: float
    decoded: int = 0


def positions(answers: Iterable[Continuation], context_length: int) -> int:
    """Of each sequence's cache: what the longest of `answers` can come to, at most the model's `context_length`."""
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
    """Complete every continuation; a sequence that has ended makes room for the next prompt.

    Args:
        batch: any number of rows.
        answers: not begun.
        turn: asked before every step whether to go on.
        context_length: positions after which a sequence ends.
        chunk: tokens of a prefill step, by which prompts of one sequence are computed as well.
        started: when the call began.

    Returns:
        In the order of `answers`. `Timings` are each sequence's own: seconds from its first token to its last, in which
        the others have their tokens, too.
    """
    results: list[Generation | None] = [None] * len(answers)
    waiting = deque(enumerate(answers))
    rows: list[_Row | None] = [None] * batch.batch

    def settle(row: _Row) -> _Row | None:
        """The row, or None when it has ended and its result is kept."""
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
                rows[place] = settle(_begin(batch, place, *waiting.popleft(), turn, context_length, chunk))
        if not any(rows):
            return [result for result in results if result is not None]
        turn.check()
        for place, row in enumerate(rows):
            if row is None:
                batch.truncate(place, 0)  # it is fed a token all the same, and must not fill up
        logits = batch.decode_batch([0 if row is None else row.token for row in rows])
        lengths = batch.lengths
        for place, row in enumerate(rows):
            if row is not None:
                row.token = row.answer.choose(logits[place])
                row.decoded += 1
                row.answer.take(row.token, full=bool(lengths[place] >= context_length))
                rows[place] = settle(row)


def _begin(
    batch: SequenceBatch, place: int, index: int, answer: Continuation, turn: Turn, context_length: int, chunk: int
) -> _Row:
    """Prefill a prompt in place of the sequence that was there, and choose its first token."""
    began = time.perf_counter()
    batch.truncate(place, 0)
    logits: NDArray[np.float32] | None = None
    for begin in range(0, len(answer.prompt), chunk):
        turn.check()
        logits = batch.prefill(place, answer.prompt[begin : begin + chunk])
    assert logits is not None
    token = answer.choose(logits)
    row = _Row(index, answer, token, time.perf_counter() - began, time.perf_counter())
    answer.take(token, full=len(answer.prompt) >= context_length)
    return row
