"""A client of an engine, for tests."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from typing import Any

import edgelm
from edgelm.generation.options import Options
from edgelm.serving.engine import Engine, Event, Failed, Finished, Job, Token


class Asked:
    """A job and what it was told."""

    def __init__(self, engine: Engine, prompt: Sequence[int], **given: Any) -> None:
        own = {name: given.pop(name) for name in ("rules", "logprobs", "client", "deadline") if name in given}
        self.events: queue.Queue[Event] = queue.Queue()
        self.tokens: list[Token] = []
        self.job = Job(engine.model.continuation(prompt, Options.of(given)), self.events.put, **own)

    def end(self) -> Finished | Failed:
        """Wait for the end; nothing may come after it."""
        while isinstance(event := self.events.get(timeout=60), Token):
            self.tokens.append(event)
        assert self.events.empty()
        return event

    @property
    def result(self) -> edgelm.Generation:
        """The generation; an error of the job is raised."""
        event = self.end()
        if isinstance(event, Failed):
            raise event.error
        return event.generation
