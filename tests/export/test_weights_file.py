"""Does the weights file hold every tensor at its planned place, and does an error leave no file?"""

from __future__ import annotations

import os
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgelm.export.packing.weights_file import PAGE, WeightsPlan

NOTHING: Any = None
"""The source of weights, which these jobs do without."""


def planned(count: int) -> tuple[WeightsPlan, list[np.ndarray]]:
    plan, values = WeightsPlan(), []
    for i in range(count):
        value = np.random.default_rng(i).integers(0, 255, (3 + i, 701), dtype=np.uint8)
        values.append(value)
        slot = plan.slot(f"t{i}", value.shape, value.dtype, i)

        def fill(source, writers, advance, value=value):  # type: ignore[no-untyped-def]
            for row in value:
                writers[0].append(row)
                advance(1)

        plan.job([slot], fill)
    return plan, values


@pytest.mark.parametrize("threads", [1, 4])
def test_every_tensor_lies_at_its_page_with_its_checksum(tmp_path: Path, threads: int) -> None:
    plan, values = planned(9)
    done: list[float] = []
    entries = plan.write(tmp_path / "w", NOTHING, threads, done.append)
    data = (tmp_path / "w").read_bytes()
    assert len(data) == plan.size
    assert sum(done) == sum(len(value) for value in values)
    for i, (entry, value) in enumerate(zip(entries, values, strict=True)):
        assert (entry.name, entry.layer, entry.offset % PAGE, entry.size) == (f"t{i}", i, 0, value.nbytes)
        stored = data[entry.offset : entry.offset + entry.size]
        assert stored == value.tobytes()
        assert entry.crc32 == zlib.crc32(stored)


def test_are_tensors_complete_after_short_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: pwrite(file, data[:300], at))
    plan, values = planned(2)
    entries = plan.write(tmp_path / "w", NOTHING, 1, lambda amount: None)
    data = (tmp_path / "w").read_bytes()
    for entry, value in zip(entries, values, strict=True):
        assert data[entry.offset : entry.offset + entry.size] == value.tobytes()


def test_a_failing_job_stops_the_others_and_its_error_is_raised(tmp_path: Path) -> None:
    plan, _ = planned(2)
    started = threading.Event()

    def endless(source, writers, advance):  # type: ignore[no-untyped-def]
        started.set()
        while True:
            advance(0)

    def failing(source, writers, advance):  # type: ignore[no-untyped-def]
        assert started.wait(10)
        raise ValueError("this tensor is damaged")

    plan.job([plan.slot("endless", (1,), np.uint8, None)], endless)
    plan.job([plan.slot("failing", (1,), np.uint8, None)], failing)
    with pytest.raises(ValueError, match="this tensor is damaged"):
        plan.write(tmp_path / "w", NOTHING, 4, lambda amount: None)


@pytest.mark.parametrize(("rows", "message"), [(2, "of 12 bytes written"), (4, "larger than planned")])
def test_a_tensor_of_another_size_than_planned_fails_an_assertion(tmp_path: Path, rows: int, message: str) -> None:
    plan = WeightsPlan()
    slot = plan.slot("x", (3, 4), np.uint8, None)
    plan.job([slot], lambda source, writers, advance: writers[0].append(np.zeros((rows, 4), np.uint8)))
    with pytest.raises(AssertionError, match=message):
        plan.write(tmp_path / "w", NOTHING, 1, lambda amount: None)
