"""Is the choice within the limit, and as good as its bound says?"""

from __future__ import annotations

import itertools
import random

import pytest

from edgelm.quant.mixed_precision.solve import Option, solve


def random_units(seed: int, units: int = 6, options: int = 4) -> list[list[Option]]:
    source = random.Random(seed)
    return [[Option(source.randint(1, 40), source.random()) for _ in range(options)] for _ in range(units)]


def best(units: list[list[Option]], limit: int) -> float:
    choices = itertools.product(*units)
    return min(sum(o.loss for o in choice) for choice in choices if sum(o.nbytes for o in choice) <= limit)


@pytest.mark.parametrize("seed", range(30))
def test_no_choice_beats_the_bound_and_the_result_is_near_the_optimum(seed):
    units = random_units(seed)
    smallest = sum(min(o.nbytes for o in options) for options in units)
    for limit in (smallest, smallest + 7, smallest + 30, smallest + 80):
        found, optimum = solve(units, limit), best(units, limit)
        chosen = [options[pick] for options, pick in zip(units, found.picks, strict=True)]
        assert sum(o.nbytes for o in chosen) == found.nbytes <= limit
        assert found.loss == pytest.approx(sum(o.loss for o in chosen))
        assert found.bound <= optimum + 1e-12
        assert optimum <= found.loss + 1e-12
        # The greedy choice is within one step of the relaxation, and a step is at most the range of one unit.
        assert found.loss - found.bound <= max(max(o.loss for o in c) - min(o.loss for o in c) for c in units)


def test_most_results_are_optimal():
    exact = 0
    for seed in range(40):
        units = random_units(100 + seed)
        limit = sum(min(o.nbytes for o in options) for options in units) + 40
        exact += solve(units, limit).loss == pytest.approx(best(units, limit))
    assert exact >= 30


def test_a_limit_for_everything_takes_the_least_loss_everywhere():
    units = random_units(7)
    found = solve(units, 10_000)
    assert found.loss == found.bound == pytest.approx(sum(min(o.loss for o in options) for options in units))


def test_a_limit_for_nothing_is_refused_with_what_is_missing():
    with pytest.raises(ValueError, match="3 bytes below"):
        solve([[Option(5, 1.0)], [Option(8, 1.0), Option(9, 0.0)]], 10)


def test_with_thousands_of_units_the_gap_is_small():
    units = [
        [Option(b * 100, seed.random() * 4.0**-b) for b in (3, 4, 5, 6, 8)] for seed in map(random.Random, range(2000))
    ]
    found = solve(units, 4_500 * 200)
    assert found.nbytes <= 900_000
    assert found.loss - found.bound < 1e-4 * found.loss
