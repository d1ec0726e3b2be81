"""Is a token chosen by a device's shortlist and sums the one that all logits give, and are the logits rarely copied?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from kernel_device import kernel_device, order_threads, release
from numpy.typing import NDArray

from edgelm.errors import GenerationError
from edgelm.generation.sampling import Sampler, Sampling, choose, penalise
from edgelm.generation.shortlist import Shortlist
from edgelm.runtimes.cuda.kernels import sampling
from edgelm.runtimes.cuda.sampling import SampledDecoding

Logits = NDArray[np.float32]
SIZES = (5, 97, 2048, 4099, 50304)
LARGE = 256_000


class LogitsExecutor:
    """Runs the sampling launches alone, as an executor does, on logits [rows, V] that a test sets."""

    def __init__(self, logits: Logits, seed: int = 0) -> None:
        rows, columns = logits.shape
        sizes = sampling.sizes(columns)
        assert sizes is not None
        self.layout = SimpleNamespace(
            sampling=sizes, sizes=SimpleNamespace(batch=rows),
            program=SimpleNamespace(values={"logits": SimpleNamespace(width=columns)}),
        )  # fmt: skip
        self.device = kernel_device(sampling.kernels())
        order_threads(self.device, seed)
        self._at = {
            name: self.device.allocate(rows * size)
            for name, size in (
                ("logits", 4 * columns), ("how", sampling.ROW.itemsize), ("seen", sizes.seen),
                ("results", sizes.result), ("workspace", sizes.workspace),
            )
        }  # fmt: skip
        self._shape = rows, columns
        self.copied = 0
        self.put(logits)

    def put(self, logits: Logits) -> None:
        self.device.upload(self._at["logits"], logits)

    def run(self, ids: Any, lengths: Any, *, sampled: NDArray[Any], graph: bool) -> None:
        self.device.upload(self._at["how"], sampled)
        for launch in sampling.sampling_launches(
            *(self._at[name] for name in ("logits", "how", "seen", "results")), *self._shape, self._at["workspace"]
        ):
            self.device.launch(launch)
        self.device.synchronize()

    def results(self, rows: int) -> NDArray[np.uint8]:
        out = np.empty((rows, self.layout.sampling.result), np.uint8)
        self.device.download(self._at["results"], out)
        return out

    def logits(self, out: Logits, first: int = 0) -> None:
        self.copied += out.size
        self.device.download(self._at["logits"] + 4 * first, out)

    def set_seen(self, row: int, words: NDArray[np.uint32]) -> None:
        self.device.upload(self._at["seen"] + row * words.nbytes, words)

    def close(self) -> None:
        for address in self._at.values():
            self.device.free(address)
        release(self.device)


class Listed(Sampler):
    """Keeps the shortlist that it is given, and chooses 0."""

    def sample(self, logits: Any) -> int:
        self.shortlist: Shortlist = logits
        return 0


def listed(logits: Logits, options: Sampling, seen: Iterable[int] = (), order: int = 0) -> Shortlist:
    """Return what the device finds out of logits [V]. `order`: of the warps."""
    executor, sampler = LogitsExecutor(logits[None], order), Listed(options, seen)
    decoding = SampledDecoding(executor)  # type: ignore[arg-type]  # it has what is used
    decoding.run(np.zeros(1, np.int64), [0], [sampler])
    decoding.choose([sampler])
    executor.close()
    fetch = lambda begin, end: logits[begin:end].copy()  # noqa: E731  # the device's memory is freed
    return Shortlist(**{**vars(sampler.shortlist), "fetch": fetch})


def normal(size: int, scale: float = 3.0, seed: int = 1) -> Logits:
    return (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)


def peaked(size: int) -> Logits:
    """Logits as of a language model: some tokens have most of the probability, the others a long tail."""
    return (normal(size, 2.5, seed=size) - 4 * np.log1p(np.random.default_rng(2).permutation(size))).astype(np.float32)


def tied(size: int) -> Logits:
    """Logits with many equal ones, and zeros of both signs."""
    values = np.round(normal(size, 1.0) * 2) / 2
    return np.where(values == 0, np.where(np.arange(size) % 2, -0.0, 0.0), values).astype(np.float32)


def masked(size: int) -> Logits:
    """Logits most of which are minus infinity."""
    return np.where(np.arange(size) % 3, -np.inf, normal(size)).astype(np.float32)


def clustered(size: int) -> Logits:
    """Logits of which the highest are neighbours."""
    logits = normal(size, 1.0)
    logits[size // 2 : size // 2 + 700] += 20
    return logits


def huge(size: int) -> Logits:
    """Logits beyond the range of any exponential."""
    return normal(size, 1e30)


KINDS = (normal, peaked, tied, masked, clustered, huge)
OPTIONS = [
    Sampling(0.7),
    Sampling(1.0, top_k=1),
    Sampling(1.0, top_k=40),
    Sampling(1.0, top_k=10**6),
    Sampling(0.8, top_p=0.9),
    Sampling(2.5, top_p=0.999),
    Sampling(1.0, top_p=1e-9),
    Sampling(1.0, min_p=0.05),
    Sampling(1.0, min_p=1.0),
    Sampling(0.6, top_k=50, top_p=0.8, min_p=0.02),
    Sampling(1.2, top_p=0.95, min_p=0.01),
    Sampling(1.5, top_k=500, top_p=0.95),
    Sampling(1e-20, top_p=0.5),
    Sampling(1e20, top_k=3),
]
SEEN = (0, 1, 3, 2, 4)


def uniforms(count: int) -> list[float]:
    """Return numbers to draw by, the lowest and the highest first."""
    return [0.0, 1 - 2.0**-53, *np.random.default_rng(5).random(count).tolist()]


# One order of warps is enough for many blocks.
@pytest.mark.parametrize(
    ("size", "order"), [(size, order) for size in SIZES for order in (0, 1, 7) if not order or size <= 5000]
)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_shortlist_is_complete_above_its_bound_and_the_sums_are_right(size: int, kind: Any, order: int) -> None:
    logits = kind(size)
    options = Sampling(1.3, top_p=0.9, repetition_penalty=1.7)
    found = listed(logits, options, SEEN, order)
    after = penalise(logits, np.array(SEEN), 1.7)
    assert (found.highest, found.top, found.best) == (logits.max(), after.max(), after.argmax())
    expected = np.flatnonzero(after > found.bound) if found.ids.size < size else np.arange(size)
    np.testing.assert_array_equal(found.ids, expected)
    np.testing.assert_array_equal(found.logits, after[expected])
    assert found.ids.size <= 1024
    # Ties with the 1024th do not fit, nor more than 256 tokens of a part; otherwise the list is as long as it can be.
    longest = 700 if kind is clustered else 1024
    assert found.ids.size + np.count_nonzero(after == found.bound) >= min(size, longest)
    with np.errstate(over="ignore"):
        weights = np.exp((after - after.max()) / np.float32(1.3)).astype(np.float64)
    sums = [weights[begin : begin + found.segment].sum() for begin in range(0, size, found.segment)]
    np.testing.assert_allclose(found.sums, sums, rtol=1e-6, atol=1e-9)


def test_zeros_of_both_signs_are_equal() -> None:
    logits = np.arange(600, -1400, -1, np.float32)
    logits[600:1200] = np.where(np.arange(600) % 2, -0.0, 0.0)
    found = listed(logits, Sampling(1.0, top_k=5))
    assert (found.ids.size, found.bound) == (600, 0)  # all 600 zeros do not fit
    assert listed(-np.abs(logits), Sampling()).best == 600


def compare(logits: Logits, options: Sampling, draws: int) -> int:
    """Compare the tokens of a number of draws with those of all logits; return how many the shortlist cannot tell."""
    seen = SEEN if options.repetition_penalty != 1 else ()
    found = listed(logits, options, SEEN)
    numbers = uniforms(draws)
    tokens = [found.token(options, seen, number) for number in numbers]
    wanted = [choose(logits, options, seen, number) for number in numbers]
    wrong = [pair for pair in zip(tokens, wanted, strict=True) if pair[0] not in (None, pair[1])]
    assert not wrong, (options, wrong[:5])
    return tokens.count(None)


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("size", SIZES)
def test_tokens_are_those_that_all_logits_give(size: int, kind: Any, penalty: float) -> None:
    for options in OPTIONS:
        compare(kind(size), replace(options, repetition_penalty=penalty), 30)


# A draw as close to 0 or 1 as these two of `uniforms`, or to the border of two tokens, is not told from all logits.
@pytest.mark.parametrize(("options", "untold"), [
    (Sampling(0.7), 6), (Sampling(1.0, top_k=40), 0), (Sampling(0.8, top_p=0.9), 0), (Sampling(1.0, min_p=0.05), 0),
    (Sampling(1.5, top_p=0.98, min_p=0.05), 0), (Sampling(0.7, top_k=50, top_p=0.8, repetition_penalty=1.1), 0),
])  # fmt: skip
@pytest.mark.parametrize("size", [50304, LARGE])
def test_a_language_models_logits_are_almost_never_copied(size: int, options: Sampling, untold: int) -> None:
    assert compare(peaked(size), options, 1000) <= untold


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_draws_of_equal_logits_are_told_only_without_a_filter(options: Sampling) -> None:
    logits = np.full(5000, 2.5, np.float32)
    unfiltered = options in (OPTIONS[0], OPTIONS[3])
    assert (compare(logits, options, 100) < 20) == unfiltered


@pytest.mark.parametrize("penalty", [1e-20, 1e20])
def test_a_penalty_that_moves_tokens_across_the_vocabulary_is_applied(penalty: float) -> None:
    for options in (OPTIONS[2], OPTIONS[4], OPTIONS[7], OPTIONS[0], Sampling()):
        compare(normal(4099), replace(options, repetition_penalty=penalty), 50)


def test_a_shortlist_that_is_too_short_says_so() -> None:
    logits = normal(50304)
    numbers = uniforms(10)
    for options in (Sampling(1.0, top_k=1025), Sampling(1.0, top_p=0.99), Sampling(3.0, min_p=0.01)):
        found = listed(logits, options)
        assert [found.token(options, (), number) for number in numbers] == [None] * len(numbers)
    assert compare(logits, Sampling(1.0, top_k=1023), 10) == 0


@pytest.mark.parametrize(("values", "highest"), [
    ({3: np.nan}, "nan"), ({0: np.nan, 1: np.inf}, "nan"), ({4098: np.inf}, "inf"), ({}, "-inf"),
])  # fmt: skip
@pytest.mark.parametrize("options", [Sampling(), Sampling(1.0), Sampling(1.0, top_k=5)], ids=str)
def test_logits_that_are_not_numbers_are_the_same_error(
    values: dict[int, float], highest: str, options: Sampling
) -> None:
    logits = normal(4099) if values else np.full(4099, -np.inf, np.float32)
    for id_, value in values.items():
        logits[id_] = value
    for given in (logits, listed(logits, options)):
        with pytest.raises(GenerationError, match=f"highest logit is {highest}:"):
            Sampler(options).sample(given)


SEQUENCES = [
    Sampling(1.0, top_k=20, repetition_penalty=1.4, seed=1),
    Sampling(0.9, top_p=0.9, repetition_penalty=1.1, seed=2),
    Sampling(repetition_penalty=1.3),
    Sampling(),
    Sampling(1.1, seed=3),
    Sampling(1.0, min_p=0.1, repetition_penalty=0.8, seed=4),
]


def test_the_sequences_of_a_batch_are_those_of_the_host_when_they_come_and_go() -> None:
    size, rows = 2500, 4
    executor = LogitsExecutor(np.zeros((rows, size), np.float32))
    decoding = SampledDecoding(executor)  # type: ignore[arg-type]  # it has what is used
    random = np.random.default_rng(9)
    here: list[Sampler | None] = [None] * rows
    host: list[Sampler | None] = [None] * rows
    for step in range(60):
        if step % 5 == 0:  # a row is left empty, or gets another sequence
            row, options = int(random.integers(rows)), SEQUENCES[step // 5 % len(SEQUENCES)]
            prompt = random.integers(0, size, 30).tolist()
            empty = bool(random.integers(4) == 0)
            here[row], host[row] = (None if empty else Sampler(options, prompt) for _ in range(2))
        # Tokens that were seen are likely again.
        logits = (random.standard_normal((rows, size)) * 2).astype(np.float32)
        logits[:, :20] += 4
        executor.put(logits)
        decoding.run(np.zeros(rows, np.int64), [0] * rows, here)
        tokens = decoding.choose(here)
        assert tokens == [0 if one is None else one.sample(row) for one, row in zip(host, logits, strict=True)], step
    # Few of the draws without a filter needed all logits.
    assert executor.copied < 60 * size
    executor.close()


def test_the_tokens_of_one_sequence_are_those_of_the_host() -> None:
    size = 2048
    executor = LogitsExecutor(np.zeros((1, size), np.float32))
    decoding = SampledDecoding(executor)  # type: ignore[arg-type]  # it has what is used
    random = np.random.default_rng(11)
    for options in OPTIONS[:6]:
        sampler, host = (Sampler(replace(options, seed=5, repetition_penalty=1.2), [7]) for _ in range(2))
        for _ in range(60):
            logits = (random.standard_normal((1, size)) * 3).astype(np.float32)
            executor.put(logits)
            decoding.run(np.zeros(1, np.int64), [0], [sampler])
            assert decoding.choose([sampler]) == [host.sample(logits[0])]
    executor.close()


def test_a_vocabulary_that_is_too_large_for_the_kernels_has_no_sizes() -> None:
    assert sampling.sizes(1 << 20) is not None
    assert sampling.sizes((1 << 20) + 1) is None
