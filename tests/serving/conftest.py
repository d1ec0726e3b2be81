"""Fixtures of the server's tests: loaded bundles of the tiny trained checkpoints, and engines."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from http_server import HttpServer

import edgelm
from edgelm.serving.engine import Engine
from edgelm.serving.settings import Settings

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


@pytest.fixture(scope="session")
def server(tiny_bundle: Bundles) -> Iterator[HttpServer]:
    """A server with two models, `olmoe` and `fox`, and the default limits."""
    models = {name: tiny_bundle(name, "int4", "native") for name in ("olmoe", "fox")}
    with HttpServer(Settings(models=models, loading={"threads": 2})) as running:
        yield running


@pytest.fixture(scope="session")
def with_template(
    tiny_bundle: Bundles, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], contextlib.AbstractContextManager[HttpServer]]:
    """Function that starts a server for a block: its one model has the given name and chat template."""

    @contextlib.contextmanager
    def start(name: str, template: str) -> Iterator[HttpServer]:
        copy = tmp_path_factory.mktemp("template") / name
        shutil.copytree(tiny_bundle("olmoe", "int4", "native"), copy)
        (copy / "chat_template.jinja").write_text(template)
        with HttpServer(Settings(models={name: copy}, loading={"threads": 2})) as running:
            yield running

    return start


@pytest.fixture
def serving(tiny_bundle: Bundles) -> Iterator[Callable[..., HttpServer]]:
    """Function that starts a server with one model, `olmoe`, and the given settings."""
    with contextlib.ExitStack() as stack:

        def start(**given: Any) -> HttpServer:
            models = given.pop("models", None) or {"olmoe": tiny_bundle("olmoe", "int4", "native")}
            loading = given.pop("loading", {"threads": 2})
            return stack.enter_context(HttpServer(Settings(models=models, loading=loading, **given)))

        yield start
