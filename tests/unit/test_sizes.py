"""Are sizes parsed in decimal and binary units, and sizes and numbers formatted correctly?"""

from __future__ import annotations

import pytest

from edgelm.sizes import format_number, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GiB", 4 << 30), ("4GB", 4 * 10**9), ("4 g", 4 * 10**9), ("1.5kb", 1500), ("2 KiB", 2048), ("1TiB", 1 << 40)],
)
def test_decimal_and_binary_units_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "1e3", "nan", "4 GiBs", "1" * 16])
def test_invalid_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a size: write for example 4GB, 1\.5GiB or 800MB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1024, "1.02 kB"), (99_940, "99.9 kB"), (99_960, "100 kB"),
        (999_499, "999 kB"), (999_500, "1 MB"), (13_838_000_000, "13.8 GB"), (1 << 40, "1.1 TB"),
        (5 * 10**15, "5,000 TB"), (None, "unknown"),
    ],
)  # fmt: skip
def test_sizes_are_shown_in_decimal_units_with_three_digits(count: int | None, text: str) -> None:
    assert format_size(count) == text


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (61160.4, 1, "61,160"),
        (1234567, 3, "1,234,567"),
        (271.44, 1, "271.4"),
        (0.5, 3, "0.500"),
        (-2500.0, 1, "-2,500"),
    ],
)
def test_numbers_have_separators_of_thousands(value: float, digits: int, text: str) -> None:
    assert format_number(value, digits) == text
