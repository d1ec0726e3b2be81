"""Are session files of Python and of libedgelm the same, and does each continue what the other saved?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from harness import Error, Model

import edgelm
from edgelm.bundle.kv_cache import KV_TYPES
from edgelm.errors import EdgeLMError

CASES = [("native", kv) for kv in KV_TYPES] + [("portable", "float32")]
IDS = np.random.default_rng(4).integers(5, 600, 75).tolist()
LONGER = [*IDS, 300, 11, 200]
Bundles = Callable[[str, str, str], Path]


@pytest.mark.parametrize(("ops", "kv"), CASES)
@pytest.mark.parametrize("name", ["fox", "olmoe"])
def test_python_and_c_write_the_same_file_and_read_each_others(
    tiny_bundle: Bundles, tmp_path: Path, name: str, ops: str, kv: str
) -> None:
    path = tiny_bundle(name, "int4", ops)
    options = {"threads": 1, "kv": kv}
    of_c, of_python = tmp_path / "c", tmp_path / "python"
    with (
        Model(path, context_length=200, **options) as ours,
        edgelm.load(path, context_length=200, **options) as python,
        Model(path, context_length=121, **options) as our_restart,
        edgelm.load(path, context_length=121, **options) as restart,
    ):
        want = python.generate(IDS, max_tokens=10).tokens
        assert ours.generate(IDS, max_tokens=10).tokens == want
        ours.save_session(of_c)
        python.save_session(of_python)
        assert of_c.read_bytes() == of_python.read_bytes()
        our_restart.load_session(of_python)
        restart.load_session(of_c)
        assert our_restart.cached_tokens == len(restart.cache.cached) == len(IDS) + len(want) - 1
        for prompt, seed, reused in ((IDS, 1, len(IDS)), (LONGER, None, len(IDS)), (LONGER, 1, 0)):
            followed = python.generate(prompt, max_tokens=12, seed=seed)
            found, ours_found = (
                restart.generate(prompt, max_tokens=12, seed=seed),
                our_restart.generate(prompt, max_tokens=12, seed=seed),
            )
            assert found.tokens == ours_found.tokens == followed.tokens
            assert found.timings.reused_tokens == ours_found.reused == reused


@pytest.mark.parametrize(("prompt", "reused"), [(IDS, 75), (LONGER, 64), (IDS[:40], 32), ([*IDS[:10], 3], 0)])
def test_with_a_seed_both_reuse_the_same_whole_chunks(
    tiny_bundle: Bundles, tmp_path: Path, prompt: list[int], reused: int
) -> None:
    path, session = tiny_bundle("fox", "int4", "native"), tmp_path / "session"
    with Model(path, threads=1, chunk=32, context_length=100) as saved:
        saved.generate(IDS, max_tokens=1)
        saved.save_session(session)
    with Model(path, threads=1, chunk=32) as ours, Model(path, threads=1, chunk=32) as fresh:
        ours.load_session(session)
        found = ours.generate(prompt, max_tokens=12, temperature=1.0, seed=5)
        assert found.reused == reused
        assert found.tokens == fresh.generate(prompt, max_tokens=12, temperature=1.0, seed=5).tokens
        np.testing.assert_array_equal(ours.logits([*prompt, 7]), fresh.logits([*prompt, 7]))
    # Another step computes other bits: nothing of it is reused.
    with edgelm.load(path, threads=1) as python:
        python.load_session(session)
        assert python.generate(prompt, max_tokens=1, seed=5).timings.reused_tokens == 0


def test_both_refuse_the_same_files(tiny_bundle: Bundles, tmp_path: Path) -> None:
    path, session = tiny_bundle("fox", "int4", "native"), tmp_path / "session"
    with Model(path, threads=1) as ours, edgelm.load(path, threads=1) as python:
        ours.generate(IDS, max_tokens=2)
        ours.save_session(session)
        data = session.read_bytes()
        header = data.index(b"}")
        for contents in (
            b"", data[:7], data[:14], data[:100], data[: header + 9], data[:-1], data + b"x", b"x" + data,
            data[:8] + b"\2" + data[9:], data[:13] + b"\x11" + data[14:], data[:-9] + b"\0" + data[-8:],
            data.replace(b"float16", b"float32"), data.replace(b'"onnxruntime-cpu"', b'"onnxruntime-xpu"'),
            data.replace(b'"tokens": 76', b'"tokens": 77'),
        ):  # fmt: skip
            assert contents != data
            session.write_bytes(contents)
            with pytest.raises(Error) as by_c:
                ours.load_session(session)
            with pytest.raises(EdgeLMError) as by_python:
                python.load_session(session)
            # Python adds what to do in one case.
            assert str(by_python.value).startswith(str(by_c.value))
