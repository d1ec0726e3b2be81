"""Sampling of an executor's sequences: the device finds what the host needs to choose the tokens, some kilobytes.

The step's launches are fixed, so that they can be captured: what to find out is read from the device's memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.generation.sampling import Sampler, clamped
from edgelm.generation.shortlist import Shortlist, wants_shortlist, wants_sums
from edgelm.runtimes.cuda.executor import Executor
from edgelm.runtimes.cuda.kernels.sampling import RESULT, ROW, SUM_SCALE, WANTS_SHORTLIST, WANTS_SUMS, SamplingSizes


class SampledDecoding:
    """Chooses tokens of an executor's sequences.

    Args:
        executor: whose layout has memory for sampling.
    """

    def __init__(self, executor: Executor) -> None:
        assert executor.layout.sampling is not None
        self._executor = executor
        self._sizes: SamplingSizes = executor.layout.sampling
        self._vocab_size = executor.layout.program.values["logits"].width
        # The sampler whose penalised tokens the device has for each sequence, and how many of them.
        self._known: list[tuple[Sampler, int] | None] = [None] * executor.layout.sizes.batch

    def run(
        self, ids: NDArray[np.int64], lengths: Sequence[int] | NDArray[np.int64], samplers: Sequence[Sampler | None]
    ) -> None:
        """Append ids [B], one per sequence, which have `lengths` [B] cached tokens; `choose` returns the next ones.

        `samplers` [B]; None: the sequence needs no next token.
        """
        how = np.zeros(ids.size, ROW)
        known = list(self._known)
        self._known = [None] * len(known)  # in case the step fails
        for row, sampler in enumerate(samplers):
            how[row] = (1, 1, -1, 0)
            if sampler is not None:
                known[row] = self._prepare(row, sampler, known[row], how[row : row + 1])
        self._executor.run(ids[:, None], lengths, sampled=how, graph=True)
        self._known = known

    def choose(self, samplers: Sequence[Sampler | None]) -> list[int]:
        """Return the next token of each sequence, 0 for those without a sampler; `samplers` as in the last `run`.

        Raises:
            GenerationError: a highest logit is not finite.
        """
        results = self._executor.results(len(samplers))
        pairs = enumerate(samplers)
        return [0 if one is None else one.sample(self._shortlist(row, results[row], one)) for row, one in pairs]

    def _prepare(
        self, row: int, sampler: Sampler, known: tuple[Sampler, int] | None, how: NDArray[Any]
    ) -> tuple[Sampler, int] | None:
        """Fill in `how` [1], and upload penalised tokens if there is more than one new. Return what is then known."""
        options, size = sampler.options, self._vocab_size
        how["temperature"], how["penalty"] = clamped(options.temperature), clamped(options.repetition_penalty)
        shortlist, sums = wants_shortlist(options, size), wants_sums(options, size)
        how["wants"] = WANTS_SHORTLIST * shortlist + WANTS_SUMS * sums
        if options.repetition_penalty == 1:
            return known
        count = known[1] if known is not None and known[0] is sampler else -1
        new = len(sampler.seen) - count
        if count < 0 or new > 1:
            words = np.zeros(self._sizes.seen // 4, np.uint32)
            tokens = np.fromiter(sampler.seen, np.uint32)
            np.bitwise_or.at(words, tokens // 32, np.uint32(1) << tokens % 32)
            self._executor.set_seen(row, words)
        elif new:
            how["seen"] = next(reversed(sampler.seen))
        return sampler, len(sampler.seen)

    def _shortlist(self, row: int, result: NDArray[np.uint8], sampler: Sampler) -> Shortlist:
        """Read a result, see `SamplingSizes`."""
        head = result[: RESULT.itemsize].view(RESULT)[0]
        listed, segments = self._sizes.listed, self._sizes.segments
        lists = result[RESULT.itemsize :]
        logits, ids = (lists[4 * listed * half :][: 4 * int(head["count"])] for half in (0, 1))
        wanted = segments if wants_sums(sampler.options, self._vocab_size) else 0
        sums = lists[8 * listed :][: 8 * wanted].view(np.uint64)
        tokens = ids.view(np.int32).astype(np.int64)
        order = tokens.argsort()

        def fetch(begin: int, end: int) -> NDArray[np.float32]:
            out = np.empty(end - begin, np.float32)
            self._executor.logits(out, row * self._vocab_size + begin)
            return out

        return Shortlist(
            self._vocab_size, float(head["highest"]), float(head["top"]), int(head["best"]), float(head["bound"]),
            tokens[order], logits.view(np.float32)[order], sums / SUM_SCALE, self._sizes.segment, fetch,
        )  # fmt: skip
