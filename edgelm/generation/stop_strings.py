"""Find stop strings in streamed text."""

from __future__ import annotations

from collections.abc import Iterable

from edgelm.errors import GenerationTypeError, GenerationValueError


class StopStrings:
    """Ends a stream of text at the first stop string, which may be split over several calls of `push`.

    No part of a stop string is returned, and only text that could begin one is held back. The first stop string is the
    one that is complete first; of several that end at the same place, the longest. So the result depends on the text
    alone, not on how it is split.

    Raises:
        GenerationTypeError: a stop string is not a string.
        GenerationValueError: a stop string is empty.
    """

    def __init__(self, stops: Iterable[str] = ()) -> None:
        self._stops = tuple(stops)
        for stop in self._stops:
            if not isinstance(stop, str) or not stop:
                kind = GenerationValueError if isinstance(stop, str) else GenerationTypeError
                raise kind(f"stop string {stop!r:.100} cannot be found in a text: give non-empty strings")
        self._held = ""
        self._longest = max(map(len, self._stops), default=0)

    def push(self, piece: str) -> tuple[str, bool]:
        """Add text; return the text that may be shown now, and whether a stop string was found."""
        text = self._held + piece
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            _, start = min(found)
            self._held = ""
            return text[:start], True
        held = next(
            (
                length
                for length in range(min(self._longest - 1, len(text)), 0, -1)
                if any(stop.startswith(text[-length:]) for stop in self._stops)
            ),
            0,
        )
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def flush(self) -> str:
        """Return the text held back; to be called when the text ends without a stop string."""
        held, self._held = self._held, ""
        return held
