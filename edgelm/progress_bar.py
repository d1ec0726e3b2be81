"""Progress bar that takes one line at any width of the terminal. It imports rich, so it is itself imported lazily."""

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
    """Return the columns of a bar of `width` characters; `unit` as for `edgelm.progress.Progress.task`.

    The amount done and the time left are always shown. With less width, first the speed and the elapsed time are
    omitted, then the bar, then the end of the label.
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
        # The bar takes the width that the other columns leave.
        found.append(BarColumn(bar_width=None, table_column=Column(max_width=40)))
    found.append(done)
    if width >= 80:
        speed: list[ProgressColumn] = [TransferSpeedColumn(table_column=fixed())] if unit == "bytes" else []
        found += [*speed, TimeElapsedColumn(table_column=fixed())]
    return (*found, TimeRemainingColumn(table_column=fixed()))


class OneLineProgress(Progress):
    """rich's progress display with the columns that fit the current width of the terminal."""

    def __init__(self, unit: str, console: Console, **options: Any) -> None:
        # Set before rich's __init__, which draws.
        self._unit, self._terminal = unit, console
        # A column caches its text, so the same column object must be used in the next frame.
        self._made: dict[int, tuple[ProgressColumn, ...]] = {}
        super().__init__(console=console, **options)

    def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
        """Return the table of bars for the current width."""
        width = self._terminal.width
        if width not in self._made:
            self._made[width] = columns_for(self._unit, width)
        self.columns = self._made[width]
        return super().make_tasks_table(tasks)
