"""Does a session continue bit for bit on both tiny checkpoints, with every type of KV cache and every operator set?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_models import OPERATOR_SETS

import edgelm
from edgelm.bundle.kv_cache import KV_TYPES
from edgelm.errors import SessionError

NATIVE = [("native", kv) for kv in KV_TYPES] if "native" in OPERATOR_SETS else []
CASES = [*NATIVE, ("portable", None)]
IDS = np.random.default_rng(3).integers(5, 600, 83).tolist()
LONGER = [*IDS, 300, 11, 200]


def opened(path: Path, kv: str | None, context_length: int = 200) -> edgelm.LanguageModel:
    return edgelm.load(path, threads=1, kv=kv, context_length=context_length)


@pytest.mark.parametrize(("ops", "kv"), CASES)
@pytest.mark.parametrize("name", ["fox", "olmoe"])
def test_a_session_continues_bit_for_bit(
    tiny_bundle: Callable[[str, str, str], Path], tmp_path: Path, name: str, ops: str, kv: str | None
) -> None:
    path, session = tiny_bundle(name, "int4", ops), tmp_path / "session"
    # The caches have another capacity, so that their last tiles differ.
    with opened(path, kv) as model, opened(path, kv, 131) as restarted:
        model.generate(IDS, max_tokens=10)
        model.save_session(session)
        restarted.generate(IDS[40:], max_tokens=20)
        assert restarted.load_session(session) == len(model.cache.cached)
        for prompt, reused in ((IDS, len(IDS)), (LONGER, len(IDS))):
            want = model.generate(prompt, max_tokens=20)
            found = restarted.generate(prompt, max_tokens=20)
            assert found.tokens == want.tokens
            assert len(found.tokens) > 5
            assert found.timings.reused_tokens == want.timings.reused_tokens == reused
        np.testing.assert_array_equal(restarted.runtime.decode(7), model.runtime.decode(7))
        # What comes after the session is saved from the other capacity as well.
        for one, file in ((model, session), (restarted, tmp_path / "other")):
            one.generate(LONGER, max_tokens=1)
            one.save_session(file)
        ours, theirs = session.read_bytes(), (tmp_path / "other").read_bytes()
        size = restarted.runtime.saved_bytes(len(LONGER))  # type: ignore[attr-defined]
        assert ours[-4 - size : -4] == theirs[-4 - size : -4]


@pytest.mark.skipif(not NATIVE, reason="needs the compiled operators")
def test_a_session_of_another_bundle_or_cache_is_refused(
    tiny_bundle: Callable[[str, str, str], Path], tmp_path: Path
) -> None:
    fox, session = tiny_bundle("fox", "int4", "native"), tmp_path / "session"
    with opened(fox, None) as model:
        model.generate(IDS, max_tokens=4)
        model.save_session(session)
    for path, kv, said in (
        (tiny_bundle("olmoe", "int4", "native"), None, "belongs to another bundle: open that one"),
        (tiny_bundle("fox", "int4", "portable"), None, "belongs to another bundle: open that one"),
        (fox, "int8", 'has a KV cache of type "float16", and the model has int8: open the bundle with that type'),
    ):
        with opened(path, kv) as other:
            other.generate(IDS[:9], max_tokens=4)
            cached = other.cache.cached
            with pytest.raises(SessionError, match=said):
                other.load_session(session)
            assert other.cache.cached == cached
            assert other.generate(IDS[:9], max_tokens=4).timings.reused_tokens == 9
