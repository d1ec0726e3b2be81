"""Does a progress bar take one line at any width, and is the output without a terminal plain text?"""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from edgelm.progress import Bars
from edgelm.progress_bar import OneLineProgress

TOTALS = {"bytes": 13_800_000_000, "steps": 50304, "work": 1.0}
LABELS = ("verifying", "download allenai/OLMoE-1B-7B-0924-Instruct")


@pytest.mark.parametrize("unit", TOTALS)
@pytest.mark.parametrize("label", LABELS, ids=["short", "long"])
@pytest.mark.parametrize("width", [40, 50, 60, 72, 80, 120, 200])
def test_a_bar_has_one_line_with_the_amount_done_and_the_time_left(width: int, label: str, unit: str) -> None:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    bar = OneLineProgress(unit, console=console)
    task = bar.add_task(label, total=TOTALS[unit])
    bar.advance(task, TOTALS[unit] * 0.5)
    lines = console.render_lines(bar, pad=False)
    assert len(lines) == 1
    text = "".join(segment.text for segment in lines[0])
    assert len(text) <= width
    assert {"bytes": "6.9/13.8 GB", "steps": "25152/50304", "work": "50%"}[unit] in text
    assert "-:--:--" in text
    assert text.startswith(label[:9])
    assert ("\u2501" in text) == (width >= 50)


def test_a_terminal_that_becomes_narrow_gets_a_narrow_bar() -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None)
    bar = OneLineProgress("bytes", console=console)
    bar.add_task("verifying", total=10)
    wide = "".join(segment.text for segment in console.render_lines(bar, pad=False)[0])
    console.width = 40
    (line,) = console.render_lines(bar, pad=False)
    assert len("".join(segment.text for segment in line)) <= 40 < len(wide)


@pytest.mark.parametrize(
    ("unit", "total", "amounts", "said"),
    [
        ("bytes", 5_890_000, [1_000_000, 2_000_000], "verifying: 3 MB of 5.89 MB in 0 s\n"),
        ("steps", 50304, [50000, 304], "verifying: 50,304 of 50,304 in 0 s\n"),
        ("work", 2.0, [0.5], "verifying: 25% in 0 s\n"),
    ],
)
def test_without_a_terminal_there_is_one_plain_line(unit: str, total: float, amounts: list[float], said: str) -> None:
    console = Console(file=io.StringIO(), width=10)
    with Bars(console).task("verifying", total, unit=unit) as advance:
        for amount in amounts:
            advance(amount)
        assert console.file.getvalue() == ""  # type: ignore[attr-defined]
    assert console.file.getvalue() == said  # type: ignore[attr-defined]


def test_notes_are_printed_as_they_are() -> None:
    console = Console(file=io.StringIO(), width=20)
    note = "/data/[bold]models[/bold]/:smile:/" + "long " * 20
    Bars(console).note(note)
    assert console.file.getvalue() == note + "\n"  # type: ignore[attr-defined]


def test_on_a_terminal_the_bar_stays_complete_when_the_task_ends() -> None:
    console = Console(file=io.StringIO(), width=60, force_terminal=True, color_system=None, legacy_windows=False)
    with Bars(console).task("verifying", 10_000_000) as advance:
        advance(4_000_000)
        advance(6_000_000)
    assert "10.0/10.0 MB" in console.file.getvalue()  # type: ignore[attr-defined]
