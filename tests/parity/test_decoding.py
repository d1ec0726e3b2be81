"""Is a fault that only decoding through the cache shows caught, and named as one of decoding?

Real bundles with real runtimes, whose `decode` alone is disturbed: prefill and all positions at once stay right.
"""

from __future__ import annotations

import pytest

import edgelm.runtimes
from edgelm.parity.check import check_parity

from .conftest import OPERATOR_SETS


def one_position_early(model, decode):
    """The token takes the place of the one before it, in the cache and in its rotary angle."""

    def step(token):
        model.truncate(model.position - 1)
        return decode(token)

    return step


def row_not_written(model, decode):
    """What later steps see of the token is what lay in the cache before."""

    def step(token):
        row = model.position
        before = [cache[:, :, row].copy() for cache in model._caches]
        logits = decode(token)
        for cache, old in zip(model._caches, before, strict=True):
            cache[:, :, row] = old
        return logits

    return step


def stale_row(model, decode):
    """The row of the prompt's last token holds what the row before it holds."""
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
    """Function (folder, fault) to the report of a device whose decoding has the fault."""

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
def test_a_fault_of_decoding_alone_is_caught_and_named(export, judge, model, ops, fault):
    report = judge(export(model, "int4", ops), fault)
    assert {check.name for check in report.failures} == {"greedy.tokens", "greedy.error", "greedy.kl"}
    assert report.first_diverged_layer is None
    assert report.cause.startswith("decoding with the KV cache: ")
