"""Can every mutation in tests/mutations still be applied, and do its tests exist?"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "mutations"))
from mutation_list import Mutation, problems, read_mutations

SOURCE = "def double(x):\n    return 2 * x\n"
TESTS = "class TestIt:\n    def test_double(self):\n        pass\n"


def test_can_every_mutation_be_applied():
    mutations = read_mutations()
    assert mutations
    assert [problem for mutation in mutations for problem in problems(mutation)] == []


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({}, None),
        ({"tests": ("test_it.py", "test_it.py::TestIt::test_double[1-2]")}, None),
        ({"file": "other.py"}, "other.py: there is no such file"),
        ({"old": "4 * x"}, "occurs 0 times"),
        ({"old": "x"}, "occurs 2 times"),
        ({"new": "2 * x"}, "are the same"),
        ({"tests": ()}, "no tests are named"),
        ({"tests": ("test_that.py",)}, "there is no test test_that.py"),
        ({"tests": ("test_it.py::test_triple",)}, "there is no test test_it.py::test_triple"),
        ({"tests": ("ctest:attention",)}, "there is no test ctest:attention"),
    ],
)
def test_is_an_outdated_mutation_named(tmp_path, changes, complaint):
    (tmp_path / "it.py").write_text(SOURCE)
    (tmp_path / "test_it.py").write_text(TESTS)
    fields = {"file": "it.py", "old": "2 * x", "new": "3 * x", "tests": ("test_it.py",), **changes}
    found = problems(Mutation("area", **fields, why="for this test"), tmp_path)
    assert (found == []) if complaint is None else (len(found) == 1 and complaint in found[0]), found
