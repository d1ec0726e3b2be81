from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import LIBRARY, Model

import edgelm

Both = tuple[Model, edgelm.LanguageModel]


@pytest.fixture(scope="session", autouse=True)
def _built() -> None:
    assert LIBRARY.exists(), f"{LIBRARY} is missing: run `make kernel`"


@pytest.fixture(scope="session")
def fox(tiny_bundle: Callable[[str, str, str], Path]) -> Path:
    """A bundle of the tiny Fox."""
    return tiny_bundle("fox", "int4", "native")


@pytest.fixture(scope="module")
def model(fox: Path) -> Iterator[Model]:
    """The tiny Fox, opened by the library."""
    with Model(fox, threads=2) as opened:
        yield opened


@pytest.fixture(scope="module")
def python(fox: Path) -> Iterator[edgelm.LanguageModel]:
    """The same, opened by Python."""
    with edgelm.load(fox, threads=2) as opened:
        yield opened
