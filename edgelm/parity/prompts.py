"""The golden prompts, which both the reference and the device run.

Chosen to reach different parts of a tokenizer and of a router: prose, code, a table of numbers, a list, other scripts,
a conversation, and one longer text so that attention has something to look back on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgelm.errors import ParityError
from edgelm.json_dataclass import ErrorFactory, from_data, parse, read_bytes

_ERRORS = ErrorFactory(ParityError, "write one prompt per line, or a JSON list of strings")
_MAX_BYTES = 2 << 20


@dataclass(frozen=True)
class Prompt:
    """A golden prompt with its name in reports."""

    name: str
    text: str


BUILT_IN: tuple[Prompt, ...] = (
    Prompt(
        "prose",
        "The lighthouse keeper wrote one line in the log every night. On the last night of October the line was longer "
        "than usual, because the sea had",
    ),
    Prompt(
        "code",
        "def merge(left, right):\n    result = []\n    while left and right:\n        if left[0] <= right[0]:\n"
        "            result.append(left.pop(0))\n        else:\n            result.append(",
    ),
    Prompt("numbers", "1 1 2 3 5 8 13 21 34 55 89\nyear,price\n1998,12.50\n1999,13.75\n2000,"),
    Prompt("list", "Things to pack:\n- two warm shirts\n- a map of the coast\n- matches, salt and coffee\n-"),
    Prompt("languages", "Guten Morgen! Où est la gare? ¿Cuánto cuesta? Привет, 東京は今日も雨です。 naïve café 🙂"),
    Prompt("chat", "User: What is the capital of France, and which river runs through it?\nAssistant: The capital is"),
    Prompt(
        "long",
        "A sparse mixture of experts replaces the feed-forward block of a transformer by many small ones and a router. "
        "For each token the router scores every expert, keeps the best few, and adds their outputs, weighted by the "
        "scores. Most weights are therefore idle for any one token: the model is large on disk but cheap to run. What "
        "makes it hard to run well on a small device is memory, because the experts that the next token needs are not "
        "known until its router has been evaluated, and they are rarely the ones that the last token used. In short, a "
        "mixture of experts trades",
    ),
)


def load_prompts(path: Path) -> tuple[Prompt, ...]:
    """Read prompts from a file: a JSON list of strings, or one prompt per line (blank lines are skipped).

    Raises:
        ParityError: the file cannot be read, holds no prompt, or is a JSON document of another kind.
    """
    data = read_bytes(path, _ERRORS, _MAX_BYTES)
    if data.lstrip()[:1] == b"[":
        texts = from_data(list[str], parse(data, path, _ERRORS), path, _ERRORS)
    else:
        try:
            texts = data.decode("utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise _ERRORS.at(path, f"cannot be read ({error})") from error
    texts = [item for item in texts if item.strip()]
    if not texts:
        raise _ERRORS.at(path, "holds no prompt")
    return tuple(Prompt(f"prompt {number}", item) for number, item in enumerate(texts, 1))
