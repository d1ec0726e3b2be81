"""`edgelm compare`: reports of several devices side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgelm.cli.common.help import option, verb
from edgelm.cli.common.options import REPORT_FILE, as_usage, json_option
from edgelm.cli.common.output import CONTROL, echo

if TYPE_CHECKING:
    from edgelm.comparison.compare import Comparison


@verb(example="edgelm compare laptop.json pi5.json -o compare.html")
@click.argument("reports", nargs=-1, required=True, metavar="REPORT...", type=click.Path(path_type=Path))
@option("-o", "--output", "out", metavar="FILE", type=REPORT_FILE, help="Also write the comparison as an HTML page.")
@option(
    "--name",
    "names",
    multiple=True,
    metavar="NAME",
    default_text="the files' names",
    help="Name of a report; may be repeated, in the order of the reports.",
)
@option("--base", metavar="REPORT", help="Show numbers as multiples of this report's too: its file or its name.")
@json_option
def compare(
    reports: tuple[Path, ...], out: Path | None, names: tuple[str, ...], base: str | None, as_json: bool
) -> None:
    """Compare reports of several devices, builds or recipes.

    A REPORT is what `edgelm parity --json` (or libedgelm) or `edgelm bench --json` wrote. A benchmark joins the parity
    report of the same device, bundle and settings. Exit code 1 if a parity report failed.
    """
    import json

    from edgelm.comparison.compare import compare as compared
    from edgelm.comparison.entries import check_twice, unique_names
    from edgelm.output_paths import check_output
    from edgelm.pages.page import REPORT

    with as_usage():
        check_twice(reports)
        unique_names(reports, names)
    if out is not None:
        check_output(out, REPORT, sources=list(reports), overwrite=True)
    found = compared(reports, names, base)
    if out is not None:
        from edgelm.comparison.report import write_report

        write_report(found, out)
        click.echo(f"report: {out}", err=True)
    if as_json:
        click.echo(json.dumps(found.to_dict(), allow_nan=False))
    else:
        echo(summary(found))
    if found.passed is False:
        raise click.exceptions.Exit(1)


def summary(comparison: Comparison) -> str:
    """Format a comparison for a terminal: the answer, a table, and what is the same and what differs."""
    from edgelm.cli.common.output import grid

    measures, names = comparison.measures, [_plain(name) for name in comparison.names]
    header = [
        "report",
        *(["result", "limit of KL"] if comparison.passed is not None else []),
        *(m.short for m in measures),
    ]
    rows = []
    for name, entry in zip(names, comparison.entries, strict=True):
        checked = []
        if comparison.passed is not None:
            parity = entry.parity
            limit = "-" if parity is None or parity.kl_limit is None else f"{parity.kl_limit:.3g}"
            found = "-" if parity is None else "passed" if parity.passed else f"FAILED: {parity.finding}"
            checked = [_cut(_plain(found), 40), limit]
        rows.append([_cut(name, 40), *checked, *(comparison.cell(measure, entry) for measure in measures)])
    lines = [_plain(line) for line in comparison.sentences]
    lines += ["", grid(header, rows), "", *_settings(comparison)]
    return "\n".join([*lines, *(f"note: {_plain(note)}" for note in _notes(comparison))])


def _settings(comparison: Comparison) -> list[str]:
    """Return lines about the settings: those that differ with their values, then those that are the same."""
    from edgelm.cli.common.output import pairs

    rows = []
    for row in comparison.settings:
        if row.same is False:
            groups = row.groups(comparison.names)
            rows.append((row.setting.title, "; ".join(f"{', '.join(who)}: {value}" for value, who in groups.items())))
    same = [f"{row.setting.title} {next(v for v in row.values if v)}" for row in comparison.settings if row.same]
    lines = (
        ["differs", *(f"  {line}" for line in pairs([(a, _plain(b)) for a, b in rows]).splitlines())] if rows else []
    )
    return lines + ([f"same: {_plain('; '.join(same))}"] if same else [])


def _notes(comparison: Comparison) -> list[str]:
    return [*comparison.notes, *(f"{entry.name}: {note}" for entry in comparison.entries for note in entry.notes)]


def _plain(text: str) -> str:
    """Return a text of a file in one line, with symbols for control characters."""
    shown = " ".join(text.split()).translate(CONTROL)
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in shown)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"
