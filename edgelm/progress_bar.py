"""A progress bar that has one line at any width of the terminal. Imports rich, so `edgelm.progress` imports it late."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Column, Table

_LABEL = 22


def columns_for(unit: str, width: int) -> tuple[ProgressColumn, ...]:
    """What a bar of `width` characters shows; `unit` as of `edgelm.progress.Progress.task`.

    How far and how long yet stay; speed and the time so far go first, then the bar, then the end of the label.
    """

    def fixed() -> Column:
        return Column(no_wrap=True)

    label = Column(no_wrap=True, overflow="ellipsis", max_width=_LABEL if width >= 60 else max(4, width - 26))
    done = {
        "bytes": DownloadColumn(table_column=fixed()),
        "steps": MofNCompleteColumn(table_column=fixed()),
        "work": TaskProgressColumn(table_column=fixed()),
    }[unit]
    found: list[ProgressColumn] = [TextColumn("{task.description}", markup=False, table_column=label)]
    if width >= 50:
        # Takes what the others leave.
        found.append(BarColumn(bar_width=None, table_column=Column(max_width=40)))
    found.append(done)
    if width >= 80:
        speed: list[ProgressColumn] = [TransferSpeedColumn(table_column=fixed())] if unit == "bytes" else []
        found += [*speed, TimeElapsedColumn(table_column=fixed())]
    return (*found, TimeRemainingColumn(table_column=fixed()))


class OneLine(Progress):
    """As rich's, with the columns that fit the terminal as wide as it is now."""

    def __init__(self, unit: str, console: Console, **options: Any) -> None:
        # rich's own __init__ draws already.
        self._unit, self._terminal = unit, console
        # A column keeps its text for a moment, so it has to be the same one in the next frame.
        self._made: dict[int, tuple[ProgressColumn, ...]] = {}
        super().__init__(console=console, **options)

    def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
        """The bar."""
        width = self._terminal.width
        if width not in self._made:
            self._made[width] = columns_for(self._unit, width)
        self.columns = self._made[width]
        return super().make_tasks_table(tasks)
