"""Progress of long work, in bytes or steps, with rate and time left.

Library functions take a `Progress`; `Silent` is the default, the command line passes `Bars`.
"""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from edgelm.sizes import format_size

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from rich.console import Console

Advance = Callable[[float], None]


class Progress(ABC):
    """Where long work reports to."""

    @abstractmethod
    def task(self, label: str, total: float, *, unit: str = "bytes") -> AbstractContextManager[Advance]:
        """Open a task of `total` units; call the yielded function with each amount done.

        Units are "bytes", "steps", or "work": shares of uneven steps, shown as a percentage, with the time left taken
        from the last ten minutes.
        """

    def note(self, message: str) -> None:  # noqa: B027 - a sink may ignore notes
        """Say one line between the bars."""


class Silent(Progress):
    """Reports nothing."""

    @contextlib.contextmanager
    def task(self, label: str, total: float, *, unit: str = "bytes") -> Iterator[Advance]:
        """Count nothing."""
        del label, total, unit
        yield lambda amount: None


class Bars(Progress):
    """Bars on standard error, so that standard output stays the command's result; without a terminal plain lines.

    A bar has one line at any width: where that is small, it leaves out what can be done without.
    """

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console

        self.console = console or Console(stderr=True)

    @contextlib.contextmanager
    def task(self, label: str, total: float, *, unit: str = "bytes") -> Iterator[Advance]:
        """Show a bar while the block runs, or without a terminal a line when it ends."""
        if not self.console.is_terminal or self.console.is_dumb_terminal:
            with self._line(label, total, unit) as advance:
                yield advance
            return
        from edgelm.progress_bar import OneLine

        with OneLine(unit, console=self.console, speed_estimate_period=600 if unit == "work" else 30) as display:
            task_id = display.add_task(label, total=total)
            yield lambda amount: display.advance(task_id, amount)

    @contextlib.contextmanager
    def _line(self, label: str, total: float, unit: str) -> Iterator[Advance]:
        done, started = 0.0, time.monotonic()

        def advance(amount: float) -> None:
            nonlocal done
            done += amount

        try:
            yield advance
        finally:
            texts = {
                "bytes": f"{format_size(done)} of {format_size(total)}",
                "steps": f"{done:,.0f} of {total:,.0f}",
                "work": f"{done / (total or 1):.0%}",
            }
            self.note(f"{label}: {texts[unit]} in {time.monotonic() - started:.0f} s")

    def note(self, message: str) -> None:
        """Print one line above the bars, as it is: the terminal wraps it."""
        self.console.print(message, highlight=False, markup=False, emoji=False, soft_wrap=True)
