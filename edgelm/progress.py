"""Progress of long work, in bytes or steps, with rate and time left.

Library functions take a `Progress`; `Silent` is the default, the command line passes `Bars`.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

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
    """Bars on standard error, so that standard output stays the command's result."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True)

    @contextlib.contextmanager
    def task(self, label: str, total: float, *, unit: str = "bytes") -> Iterator[Advance]:
        """Show a bar while the block runs."""
        from rich import progress as bars

        counters: tuple[bars.ProgressColumn, ...] = {
            "bytes": (bars.DownloadColumn(), bars.TransferSpeedColumn()),
            "steps": (bars.MofNCompleteColumn(),),
            "work": (bars.TaskProgressColumn(),),
        }[unit]
        with bars.Progress(
            bars.TextColumn("{task.description:<22}"),
            bars.BarColumn(),
            *counters,
            bars.TimeElapsedColumn(),
            bars.TimeRemainingColumn(),
            console=self.console,
            speed_estimate_period=600 if unit == "work" else 30,
        ) as display:
            task_id = display.add_task(label, total=total)
            yield lambda amount: display.advance(task_id, amount)

    def note(self, message: str) -> None:
        """Print one line above the bars."""
        self.console.print(message, highlight=False)
