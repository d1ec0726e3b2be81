"""Does text end exactly before the first stop string, however it is split?"""

from __future__ import annotations

import random

import pytest

from edgelm.errors import GenerationError
from edgelm.generation.stop_strings import StopStrings


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """Apply the definition one character at a time: stop as soon as the text ends with a stop string."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


def streamed(pieces: list[str], stops: list[str]) -> tuple[list[str], bool]:
    matcher = StopStrings(stops)
    shown = []
    for piece in pieces:
        text, stopped = matcher.push(piece)
        shown.append(text)
        if stopped:
            return shown, True
    return [*shown, matcher.flush()], False


def test_random_texts_end_at_the_first_stop_string_however_split() -> None:
    rng = random.Random(0)
    stopped_count = 0
    for _ in range(3000):
        text = "".join(rng.choices("abc", k=rng.randrange(0, 14)))
        stops = ["".join(rng.choices("abc", k=rng.randrange(1, 5))) for _ in range(rng.randrange(1, 4))]
        cuts = sorted(rng.sample(range(len(text) + 1), k=rng.randrange(0, len(text) + 1)))
        pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        shown, stopped = streamed(pieces, stops)
        assert ("".join(shown), stopped) == cut(text, stops), (pieces, stops)
        stopped_count += stopped
    assert 500 < stopped_count < 2900


def test_only_a_possible_stop_string_is_held_back() -> None:
    matcher = StopStrings(["\n\nUser:", "END"])
    assert matcher.push("one\n") == ("one", False)
    assert matcher.push("two\n\nUs") == ("\ntwo", False)
    assert matcher.push("age E") == ("\n\nUsage ", False)
    assert matcher.push("N") == ("", False)
    assert matcher.push("Dangered") == ("", True)


def test_held_back_text_is_shown_at_the_end() -> None:
    matcher = StopStrings(["END"])
    assert matcher.push("the EN") == ("the ", False)
    assert matcher.flush() == "EN"
    assert matcher.flush() == ""


def test_without_stop_strings_nothing_is_held_back() -> None:
    assert streamed(["a", "", "b\n"], []) == (["a", "", "b\n", ""], False)


@pytest.mark.parametrize("bad", ["", 3, None])
def test_invalid_stop_strings_are_refused(bad: object) -> None:
    with pytest.raises(GenerationError, match="stop string"):
        StopStrings(["fine", bad])  # type: ignore[list-item]
