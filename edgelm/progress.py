"""Progress reports of long work, in bytes or steps, with rate and time left.

Library functions take a `Progress`. The default is `Silent`; the command line passes `Bars`.
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
    """Receiver of progress reports."""

    @abstractmethod
    def task(self, label: str, total: float, *, unit: str = "bytes") -> AbstractContextManager[Advance]:
        """Open a task; call the yielded function with each amount done.

        Args:
            label: what is done, for the reader.
            total: the amount of the whole task, in units.
            unit: "bytes", "steps", or "work" for steps of uneven length: shown as a percentage, with the time left
                estimated from the last ten minutes.
        """

    def note(self, message: str) -> None:  # noqa: B027 - optional: the default ignores notes
        """Print a message of one line between the bars."""


class Silent(Progress):
    """Progress that reports nothing."""

    @contextlib.contextmanager
    def task(self, label: str, total: float, *, unit: str = "bytes") -> Iterator[Advance]:
        """Yield a function that does nothing."""
        del label, total, unit
        yield lambda amount: None


class Bars(Progress):
    """Progress bars on standard error, since standard output is for the result; plain lines where it is no terminal.

    A bar takes one line at any width. In a narrow terminal it omits the less important columns.
    """

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console

        self.console = console or Console(stderr=True)

    @contextlib.contextmanager
    def task(self, label: str, total: float, *, unit: str = "bytes") -> Iterator[Advance]:
        """Show a bar while the block runs; without a terminal, print one line when it ends."""
        if not self.console.is_terminal or self.console.is_dumb_terminal:
            with self._line(label, total, unit) as advance:
                yield advance
            return
        from edgelm.progress_bar import OneLineProgress

        with OneLineProgress(
            unit, console=self.console, speed_estimate_period=600 if unit == "work" else 30
        ) as display:
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
            amounts = {
                "bytes": f"{format_size(done)} of {format_size(total)}",
                "steps": f"{done:,.0f} of {total:,.0f}",
                "work": f"{done / (total or 1):.0%}",
            }
            self.note(f"{label}: {amounts[unit]} in {time.monotonic() - started:.0f} s")

    def note(self, message: str) -> None:
        """Print a message above the bars. It is not wrapped here; the terminal does that."""
        self.console.print(message, highlight=False, markup=False, emoji=False, soft_wrap=True)
