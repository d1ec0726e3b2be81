"""Is the right text read for calibration and evaluation, and is anything else refused?"""

import sysconfig
from pathlib import Path

import numpy as np
import pytest

from edgelm.corpus import read_corpus, windows
from edgelm.errors import EdgeLMError


class Letters:
    """A tokenizer with one token per character."""

    def __init__(self, bos_id=None):
        self.bos_id = bos_id

    def encode(self, text, add_bos=False):
        assert not add_bos
        return [ord(c) for c in text]


def test_a_file_a_folder_and_their_hashes(tmp_path):
    (tmp_path / "a.txt").write_text("ab")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.md").write_text("c")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x").write_text("hidden")
    folder, file = read_corpus(tmp_path), read_corpus(tmp_path / "a.txt")
    assert folder.documents == ("ab", "c")
    assert file.documents == ("ab",)
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b" / "c.md").write_text("bc")
    assert read_corpus(tmp_path).sha256 != folder.sha256
    assert len(folder.sha256) == 64


def test_builtin_has_held_out_files():
    calibration, held_out = read_corpus("builtin"), read_corpus("builtin", held_out=True)
    assert not set(calibration.documents) & set(held_out.documents)
    both = set(calibration.documents) | set(held_out.documents)
    assert (Path(sysconfig.get_paths()["stdlib"]) / "functools.py").read_text() in both
    assert 10 < len(calibration.documents) / len(held_out.documents) < 40


def test_windows_are_evenly_spaced_and_begin_with_bos():
    found = windows(Letters(), ["abcd", "efgh"], 3, 4)
    assert ["".join(map(chr, w)) for w in found] == ["abcd", "cdef", "efgh"]
    assert all(w.dtype == np.int64 for w in found)
    begun = windows(Letters(bos_id=7), ["abcdefgh"], 2, 4)
    assert [w[0] for w in begun] == [7, 7]
    assert "".join(map(chr, begun[1][1:])) == "fgh"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: None, "no text at .*builtin"),
        (lambda p: p.write_bytes(b"\xff\xfe\x00"), "not UTF-8 text"),
        (lambda p: p.write_text(" \n"), "holds no text"),
        (lambda p: p.mkdir(), "holds no text"),
    ],
)
def test_invalid_text_sources_are_refused(tmp_path, make, said):
    make(tmp_path / "x")
    with pytest.raises(EdgeLMError, match=said):
        read_corpus(tmp_path / "x")


def test_too_little_text_is_refused():
    with pytest.raises(EdgeLMError, match="3 tokens, one window alone needs 4"):
        windows(Letters(), ["abc"], 1, 4)
