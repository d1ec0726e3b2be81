"""Does libedgelm render random chat templates as jinja2 does?

tests/vectors/chat_templates.json has chosen templates; `fuzz_chat_templates.py` makes as many as there is time for.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from fuzz_chat_templates import PROGRAM, fuzz


def test_random_templates_give_the_texts_of_jinja2() -> None:
    result = fuzz(PROGRAM, seed=5, seconds=120, templates=400)
    assert result.differences == []
    assert result.counts["templates"] >= 100
    assert result.counts["equal texts"] >= result.counts["templates"] / 3
    assert result.counts["refused by name"] <= result.counts["templates"] / 20
