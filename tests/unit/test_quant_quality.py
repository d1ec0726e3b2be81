"""Is the table of quantisation quality correct, and does the documentation contain it?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgelm.quant import parse_scheme
from edgelm.quant.quality import QUALITY, markdown, measure, sqnr

PAGE = Path(__file__).parents[2] / "docs" / "performance" / "schemes.md"


@pytest.mark.parametrize("row", QUALITY, ids=lambda row: row.scheme)
def test_the_table_of_quality_is_correct(row):
    found = measure(parse_scheme(row.scheme))
    # The numbers are for one seed; 0.02 dB allows for changes of numpy's random numbers and rounding.
    assert found.normal == pytest.approx(row.normal, abs=0.02)
    assert found.plain == (None if row.plain is None else pytest.approx(row.plain, abs=0.02))
    assert found.heavy == pytest.approx(row.heavy, abs=0.02)
    other = measure(parse_scheme(row.scheme), seed=1)
    assert other.normal == pytest.approx(row.normal, abs=0.2)  # another seed gives nearly the same


def test_every_scheme_of_the_table_beats_plain_rounding():
    assert {row.scheme for row in QUALITY} >= {
        "int4-g32-sym",
        "int4-g64-asym",
        "int8-g128-sym",
        "int8-row-sym",
        "int3-g32-sym",
        "int5-g32-sym",
        "int6-g32-sym",
    }
    for row in QUALITY:
        if row.scheme.startswith("int"):
            assert row.plain is not None
            assert row.normal > row.plain, row.scheme


def test_the_page_prints_the_table():
    printed = PAGE.read_text(encoding="utf-8").split("<!-- quality -->\n")[1].split("<!-- /quality -->")[0]
    assert printed.splitlines() == list(markdown())


def test_sqnr_counts_decibels():
    signal = np.ones((4, 4), np.float32)
    assert sqnr(signal, signal * np.float32(0.9)) == pytest.approx(20, abs=1e-4)
    assert sqnr(signal, signal) == float("inf")
