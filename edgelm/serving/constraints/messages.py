"""Error messages of llguidance in one line."""

from __future__ import annotations

import re

_PLACE = re.compile(r"^(?:at )?(\d+)\((\d+)\): ")
_STATE = re.compile(r"\n?<(?:state|grammar|non-verbose/)>")
_SHOWN = 300


def one_line(message: str) -> str:
    """Return what a message of llguidance says, in one line, without the state of its parser."""
    text = _STATE.split(message)[0].strip()
    place = _PLACE.match(text)
    if "\nerror: " in text:  # a regular expression, drawn over several lines
        text = text.split("\nerror: ", 1)[1]
    text = text.split("\n")[0]
    text = " ".join(_PLACE.sub("", text).split())
    if place is not None:
        text = f"line {place[1]}, column {place[2]}: {text}"
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
