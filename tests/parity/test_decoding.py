"""Is a fault that only occurs in decoding with the KV cache detected, and named as such?

The tests use real bundles and runtimes with a faulty `decode`; prefill and all positions at once stay right.
"""

from __future__ import annotations

import pytest

import edgelm.runtimes
from edgelm.parity.check import check_parity

from .conftest import OPERATOR_SETS


def one_position_early(model, decode):
    """The token gets the position of the one before it, in the cache and in RoPE."""

    def step(token):
        model.truncate(model.position - 1)
        return decode(token)

    return step


def row_not_written(model, decode):
    """The token's keys and values are not written, so later steps read old contents of the cache."""

    def step(token):
        row = model.position
        before = [cache[:, :, row].copy() for cache in model._caches]
        logits = decode(token)
        for cache, old in zip(model._caches, before, strict=True):
            cache[:, :, row] = old
        return logits

    return step


def stale_row(model, decode):
    """The row of the prompt's last token has the contents of the row before it."""
    before = -1

    def step(token):
        nonlocal before
        row = model.position
        if row != before + 1:  # the first step after a prefill
            for cache in model._caches:
                cache[:, :, row - 1] = cache[:, :, row - 2]
        before = row
        return decode(token)

    return step


@pytest.fixture
def judge(monkeypatch):
    """Function (folder, fault) that returns the report of a device whose decoding has the fault."""

    def check(folder, fault):
        opened, open_healthy = [], edgelm.runtimes.open_runtime

        def open_disturbed(*arguments, **options):
            model = open_healthy(*arguments, **options)
            model.decode = fault(model, model.decode)
            opened.append(model)
            return model

        monkeypatch.setattr(edgelm.runtimes, "open_runtime", open_disturbed)
        report = check_parity(folder, threads=1, integrity=False)
        assert len(opened) == 1
        return report

    return check


@pytest.mark.parametrize(
    ("model", "ops", "fault"),
    [
        *(
            (model, OPERATOR_SETS[0], fault)
            for model in ("olmoe", "fox")
            for fault in (one_position_early, row_not_written)
        ),
        ("olmoe", OPERATOR_SETS[-1], one_position_early),
        ("fox", OPERATOR_SETS[0], stale_row),
    ],
)
def test_a_fault_in_decoding_only_is_detected_and_named(export, judge, model, ops, fault):
    report = judge(export(model, "int4", ops), fault)
    assert {check.name for check in report.failures} == {"greedy.tokens", "greedy.error", "greedy.kl"}
    assert report.first_diverged_layer is None
    assert report.cause.startswith("decoding with the KV cache: ")
