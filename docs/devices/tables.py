"""Write the tables of the pages about devices that are computed from the table of boards and the models' shapes.

    python docs/devices/tables.py --write     put the tables into the pages
    python docs/devices/tables.py --check     exit code 1 if a page has another table

A page holds `<!-- table: NAME -->`, the table, and `<!-- /table -->`; tables of other names are left alone. NAME is one
of `boards`, `board-sources`, and `memory-BOARD`, where BOARD is a name without a size, such as pi5.
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from edgelm.models import decoder
from edgelm.preflight.boards import Board, boards, predict_for
from edgelm.preflight.fit import COMFORT, disk_bytes, memory
from edgelm.preflight.planned import Planned, plan
from edgelm.quant.recipe import Recipe
from edgelm.sizes import format_size
from edgelm.synth import PUBLISHED

PAGES = sorted(Path(__file__).parent.glob("*.md"))
RECIPES = ("int4", "int8")
CONTEXT = 4096
_BLOCK = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)


@cache
def planned(name: str, recipe: str) -> Planned:
    """Return the planned bundle of a published shape."""
    return plan(decoder(PUBLISHED[name]), Recipe.load(recipe), name=name)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def board_table() -> str:
    """Return the figures of all boards."""
    rows = [
        (
            f"`{name}`", one.title, f"{one.memory / (1 << 30):g}", f"{one.bandwidth / 1e9:g}", f"{one.read:.0%}",
            "" if one.peak is None else f"{one.peak / 1e9:,.0f}", f"SM {one.sm}" if one.sm else one.isa,
        )
        for name, one in boards().items()
    ]  # fmt: skip
    return table(("`--for`", "", "GiB", "GB/s", "read", "int8 GOPS", "kernels"), rows)


def source_list() -> str:
    """Return where the figures of each board are from, as a list: sources are too long for the cells of a table."""
    said: dict[str, list[str]] = {}
    for name, one in boards().items():
        said.setdefault(one.source, []).append(f"`{name}`")
    wrapper = textwrap.TextWrapper(120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    items = (f"- {', '.join(names)}: {source}." for source, names in said.items())
    return "".join(f"{wrapper.fill(item)}\n" for item in items)


def memory_table(family: str) -> str:
    """Return what each model takes on the sizes of a board, and the speed to expect."""
    sizes = [one for name, one in boards().items() if name.startswith(f"{family}-")]
    header = ["model", "recipe", "bundle", "memory", *(f"{one.memory >> 30} GB" for one in sizes), "decode", "prefill"]
    rows = []
    for name in PUBLISHED:
        for recipe in RECIPES:
            made = planned(name, recipe)
            needed = memory(made, min(CONTEXT, made.info.context_length)).total
            speed = predict_for(made, sizes[-1], prompt_tokens=512, new_tokens=128)
            prefill = "" if speed.prefill is None else _range(speed.prefill.low, speed.prefill.high)
            rows.append(
                [
                    name, recipe, format_size(disk_bytes(made)), format_size(needed),
                    *(_fits(needed, one) for one in sizes), _range(speed.decode.low, speed.decode.high), prefill,
                ]
            )  # fmt: skip
    return table(header, rows)


def _fits(needed: int, board: Board) -> str:
    if needed > board.available:
        return "no"
    return "yes" if needed <= COMFORT * board.available else "tight"


def _range(low: float, high: float) -> str:
    digits = 0 if high >= 20 else 1
    return f"{low:.{digits}f} to {high:.{digits}f}"


def filled(text: str) -> str:
    """Return a page with its tables computed anew."""

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        if name == "boards":
            made = board_table()
        elif name == "board-sources":
            made = source_list()
        elif name.startswith("memory-"):
            made = memory_table(name.removeprefix("memory-"))
        else:
            return match[0]
        return match[1] + made + match[3]

    return _BLOCK.sub(block, text)


def main() -> int:
    """Write or check the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--write", action="store_true")
    group.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    wrong = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        made = filled(text)
        if made == text:
            continue
        if arguments.check:
            print(f"{page.name}: run python docs/devices/tables.py --write")
            wrong = 1
        else:
            page.write_text(made, encoding="utf-8")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
