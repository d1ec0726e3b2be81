"""Compare libedgelm's tokenizers with Python's on random texts: ids, texts of the ids, and texts of random ids.

    make build/csrc/capi_tokenizer_test
    python tests/capi/fuzz_tokenizers.py --minutes 30

Python's ids are those of `tokenizers` and `sentencepiece`. Prints each difference, and what was compared.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import tokenizer_kinds
from tokenizer_kinds import ADDITIONS, WAYS, oracle
from tokenizer_process import RefusedError, TokenizerProcess

from edgelm.errors import TokenizerError
from edgelm.synth.tokenizer import SAMPLE
from edgelm.tokenization.tokenizer import Tokenizer

MAX_SHOWN = 5  # kinds with more differences show no further ones
PROGRAM = Path(__file__).parents[2] / "build/csrc/capi_tokenizer_test"
# Ranges of the scripts that texts are drawn from.
SCRIPTS = (
    (0x20, 0x7E), (0x20, 0x7E), (0x20, 0x7E), (0x00, 0x20), (0x7F, 0x24F), (0x250, 0x2AF), (0x300, 0x36F),
    (0x370, 0x3FF), (0x400, 0x52F), (0x530, 0x5FF), (0x600, 0x6FF), (0x900, 0x97F), (0xE00, 0xE7F),
    (0x1100, 0x11FF), (0x1E00, 0x1FFF),
    (0x2000, 0x206F), (0x2070, 0x214F), (0x2190, 0x27BF), (0x2E80, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3),
    (0xE000, 0xE100), (0xF900, 0xFAFF), (0xFB00, 0xFDFF), (0xFE00, 0xFFFD), (0x10000, 0x10FFF), (0x1D100, 0x1D7FF),
    (0x1F000, 0x1FAFF), (0x2F800, 0x2FA1F), (0xE0000, 0xE01EF), (0x0, 0x10FFFF),
)  # fmt: skip
EMOJI_PARTS = ("👩", "👨", "🏽", "\u200d", "\ufe0f", "❤", "🇩", "🇪", "🏴", "\U000e0067", "1", "\u20e3")
WORDS = SAMPLE.split()
MARKS = [*oracle.MARKERS, *oracle.BYTES, *(content for content, _ in ADDITIONS), "<|im_sep|>", "<0xE2>"]
SPACES = (*oracle.SPACES, " ", " ", "\n", "\u2028", "\u1680", "\x1c", "\u180e")


def _words(chooser: random.Random) -> str:
    words = chooser.choices(WORDS, k=chooser.randint(1, 12))
    return chooser.choice(("", " ", "  ")) + chooser.choice((" ", " ", "", "\n", "  ")).join(words)


def _character(chooser: random.Random) -> str:
    code = chooser.randint(*chooser.choice(SCRIPTS))
    return chr(code) if not 0xD800 <= code < 0xE000 else "\ufffd"


def _script(chooser: random.Random) -> str:
    low, high = chooser.choice(SCRIPTS)
    codes = [chooser.randint(low, high) for _ in range(chooser.randint(1, 20))]
    return "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)


def _mutated_mark(chooser: random.Random) -> str:
    mark = list(chooser.choice(MARKS))
    for _ in range(chooser.randint(0, 2)):
        place = chooser.randint(0, len(mark))
        action = chooser.randint(0, 3)
        if action == 0:
            mark[place : place + 1] = []
        elif action == 1:
            mark.insert(place, chooser.choice([*mark, " ", "<", ">"]))
        elif action == 2:
            mark[place : place + 1] = [character.swapcase() for character in mark[place : place + 1]]
        else:
            mark = mark[:place] + mark[max(0, place - 2) :]
    return "".join(mark)


def _repeat(chooser: random.Random) -> str:
    part = chooser.choice([_character, _mutated_mark, lambda c: c.choice(SPACES), lambda c: c.choice(WORDS)])(chooser)
    return part * chooser.choice((2, 3, 4, 8, 31, 32, 33, 64, 200))


PARTS: tuple[tuple[int, Callable[[random.Random], str]], ...] = (
    (6, _words),
    (4, _script),
    (3, lambda chooser: "".join(_character(chooser) for _ in range(chooser.randint(1, 8)))),
    (4, lambda chooser: chooser.choice(MARKS)),
    (3, _mutated_mark),
    (4, lambda chooser: "".join(chooser.choices(SPACES, k=chooser.randint(1, 4)))),
    (2, lambda chooser: "".join(chooser.choices(EMOJI_PARTS, k=chooser.randint(1, 6)))),
    (2, lambda chooser: chooser.choice([*oracle.MARKS, *oracle.SCRIPTS])),
    (2, lambda chooser: str(chooser.randint(0, 10 ** chooser.randint(1, 12)))),
    (1, _repeat),
    (1, lambda chooser: chooser.choice(oracle.STRINGS)),
    (
        1,
        lambda chooser: chooser.choice(("'s", "'LL", "'\u017f", "n't", "_", "==", "\r\n", "//", "e\u0301", "가\u11a8")),
    ),
)


def random_text(chooser: random.Random) -> str:
    """Return a text of some parts of all kinds."""
    kinds = chooser.choices([kind for _, kind in PARTS], [weight for weight, _ in PARTS], k=chooser.randint(1, 9))
    return "".join(kind(chooser) for kind in kinds)


@dataclass
class Counts:
    """What was compared."""

    texts: int = 0
    tokens: int = 0
    random_ids: int = 0
    refused: int = 0  # texts, by both
    differences: list[str] = field(default_factory=list)

    def add(self, other: Counts) -> None:
        """Add those of `other`."""
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def figures(self) -> dict[str, int]:
        """Return the numbers."""
        return {**vars(self), "differences": len(self.differences)}


def _theirs(tokenizer: Tokenizer, text: str) -> list[int] | None:
    try:
        return tokenizer.encode(text, add_bos=False)
    except TokenizerError:
        return None


def _ours(process: TokenizerProcess, text: str) -> list[int] | None:
    try:
        return process.encode(text)
    except RefusedError:
        return None


def compare(process: TokenizerProcess, tokenizer: Tokenizer, texts: Iterable[str], counts: Counts, name: str) -> None:
    """Compare ids and texts, and note differences in `counts`."""
    for text in texts:
        expected, found = _theirs(tokenizer, text), _ours(process, text)
        counts.texts += 1
        counts.tokens += len(expected or ())
        counts.refused += expected is None
        if expected != found:
            counts.differences.append(f"{name}: ids of {text!a}: {found}, not {expected}")
        elif expected:
            compare_text(process, tokenizer, expected, counts, name)


def compare_text(process: TokenizerProcess, tokenizer: Tokenizer, ids: list[int], counts: Counts, name: str) -> None:
    """Compare the texts of ids."""
    for skip in (False, True):
        text, decoded = tokenizer.decode(ids, skip_special=skip), process.decode(ids, skip_special=skip)
        if decoded != text:
            counts.differences.append(f"{name}: text of {ids} with skip_special={skip}: {decoded!a}, not {text!a}")


def random_ids(chooser: random.Random, size: int) -> list[int]:
    """Return ids, with some that have no token."""
    return [chooser.randint(0, size + 5) for _ in range(chooser.randint(1, 30))]


def fuzz(process: TokenizerProcess, folder: Path, tokenizer: Tokenizer, chooser: random.Random, rounds: int) -> Counts:
    """Compare one tokenizer on `rounds` texts, and half as many sequences of ids."""
    counts = Counts()
    process.open(folder)
    compare(process, tokenizer, (random_text(chooser) for _ in range(rounds)), counts, folder.parent.name)
    for _ in range(rounds // 2):
        ids = random_ids(chooser, tokenizer.vocab_size)
        counts.random_ids += len(ids)
        compare_text(process, tokenizer, ids, counts, folder.parent.name)
    return counts


def tokenizers(kinds: Iterable[str], root: Path) -> Iterator[tuple[str, Path, Tokenizer]]:
    """Yield a folder of each kind and way of adding tokens."""
    for kind in kinds:
        for way in WAYS:
            folder, ours = tokenizer_kinds.make(kind, way, root)
            yield kind, folder, ours


def main() -> int:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--program", type=Path, default=PROGRAM)
    parser.add_argument("--kind", action="append", choices=[*tokenizer_kinds.PIECES, *tokenizer_kinds.JSON])
    options = parser.parse_args()
    kinds = options.kind or [*tokenizer_kinds.PIECES, *tokenizer_kinds.JSON]
    chooser = random.Random(options.seed)
    totals: dict[str, Counts] = {}
    end = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as root, TokenizerProcess(options.program) as process:
        opened = list(tokenizers(kinds, Path(root)))
        while time.monotonic() < end:
            for kind, folder, tokenizer in opened:
                counts = fuzz(process, folder, tokenizer, chooser, rounds=20)
                total = totals.setdefault(kind, Counts())
                if len(total.differences) < MAX_SHOWN:
                    print("".join(f"{difference[:2000]}\n" for difference in counts.differences), end="", flush=True)
                total.add(counts)
    for kind, total in totals.items():
        print(f"{kind}: {total.figures()}")
    result = Counts()
    for total in totals.values():
        result.add(total)
    print(json.dumps(result.figures()))
    return int(bool(result.differences))


if __name__ == "__main__":
    sys.exit(main())
