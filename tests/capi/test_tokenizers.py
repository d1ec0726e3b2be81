"""Do libedgelm's tokenizers give the ids and texts of Python's, and so of `tokenizers` and `sentencepiece`?

`fuzz_tokenizers.py` compares the same on as many texts as there is time for.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fuzz_tokenizers import PROGRAM, Counts, compare, fuzz
from tokenizer_kinds import JSON, PIECES, make, oracle
from tokenizer_process import RefusedError, TokenizerProcess

# Every kind with one way of adding tokens, such that both kinds of files have each way.
CASES = [(kind, way) for kinds in (PIECES, JSON) for kind, way in zip(kinds, list(oracle.WAYS) * 9, strict=False)]


@pytest.fixture(scope="module")
def process() -> Iterator[TokenizerProcess]:
    with TokenizerProcess(PROGRAM) as running:
        yield running


@pytest.mark.parametrize(("kind", "way"), CASES, ids=["-".join(case) for case in CASES])
def test_ids_and_texts_equal_those_of_python(kind: str, way: str, process: TokenizerProcess, tmp_path: Path) -> None:
    folder, ours = make(kind, way, tmp_path)
    process.open(folder)
    counts = Counts()
    compare(process, ours, oracle.STRINGS, counts, kind)
    counts.add(fuzz(process, folder, ours, random.Random(kind), rounds=40))
    assert not counts.differences, (len(counts.differences), counts.differences[:3])
    assert not counts.refused
    assert process.fingerprint() == ours.fingerprint()


def test_a_folder_without_a_description_is_refused(process: TokenizerProcess, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"tokenizer\.edgelm\.json is missing: export the bundle again"):
        process.open(tmp_path)
