"""Fixtures of the server's tests: loaded bundles of the tiny trained checkpoints, and engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import edgelm
from edgelm.serving.engine import Engine

Bundles = Callable[[str, str, str], Path]


@pytest.fixture
def engine_of(tiny_bundle: Bundles) -> Iterator[Callable[..., Engine]]:
    """Function that returns an engine of a tiny bundle: (model, recipe, operators, options of load and of Engine)."""
    opened: list[Engine] = []

    def get(model: str = "olmoe", recipe: str = "int4", ops: str = "native", **given: Any) -> Engine:
        loading = {name: given.pop(name) for name in ("kv", "context_length", "runtime") if name in given}
        loaded = edgelm.load(tiny_bundle(model, recipe, ops), threads=2, **loading)
        opened.append(Engine(loaded, **given))
        return opened[-1]

    yield get
    for engine in opened:
        engine.close()
