"""Does a saved session continue as if nothing had happened, and is any other file refused without a change?"""

from __future__ import annotations

import errno
import json
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scripted_model import scripted
from tiny_graph import write_tiny_model

from edgelm.bundle import Bundle
from edgelm.bundle.kv_cache import KV_TYPES, row_bytes
from edgelm.errors import BundleError, ContextLengthError, EdgeLMError, GenerationError, SessionError
from edgelm.generation import session_file
from edgelm.generation.language_model import LanguageModel, load
from edgelm.runtimes import open_runtime
from edgelm.runtimes.onnxruntime.cache_rows import CacheRows
from edgelm.tokenization.tokenizer import Tokenizer

PROMPT = [5, 17, 44, 80, 3, 9, 61, 22, 70, 12, 33]
LONGER = [*PROMPT, 8, 90, 41]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "bundle", eos_ids=(2,))


@pytest.fixture
def model(bundle: Bundle) -> Iterator[LanguageModel]:
    with load(bundle.path, threads=1) as opened:
        yield opened


@pytest.fixture
def saved(model: LanguageModel, tmp_path: Path) -> Path:
    """A session of `PROMPT` and five tokens of the answer."""
    model.generate(PROMPT, max_tokens=6)
    model.save_session(tmp_path / "session")
    return tmp_path / "session"


def with_chunk(bundle: Bundle, chunk: int) -> LanguageModel:
    return LanguageModel(bundle, open_runtime(bundle, threads=1, chunk=chunk), Tokenizer.from_folder(bundle.path))


def state(model: LanguageModel) -> tuple[list[int], NDArray[np.uint8]]:
    """The cached tokens and the bytes of their cache."""
    cached = model.cache.cached
    return cached, np.concatenate(list(model.runtime.save_cache(len(cached))))  # type: ignore[attr-defined]


def test_a_loaded_session_continues_as_without_a_restart(bundle: Bundle, model: LanguageModel, saved: Path) -> None:
    with load(bundle.path, threads=1, context_length=100) as restarted:
        restarted.generate([80, 81], max_tokens=3)
        assert restarted.load_session(saved) == len(PROMPT) + 5
        np.testing.assert_array_equal(state(restarted)[1], state(model)[1])
        followed = model.generate(LONGER, max_tokens=20)
        found = restarted.generate(LONGER, max_tokens=20)
        assert found.tokens == followed.tokens
        assert found.timings.reused_tokens == followed.timings.reused_tokens == len(PROMPT)
        np.testing.assert_array_equal(state(restarted)[1], state(model)[1])


def test_the_logits_of_the_last_prompt_are_saved(bundle: Bundle, model: LanguageModel, saved: Path) -> None:
    with load(bundle.path, threads=1) as restarted:
        restarted.load_session(saved)
        found = restarted.generate(PROMPT, max_tokens=9)
        assert found.timings.reused_tokens == len(PROMPT)
        assert found.tokens == model.generate(PROMPT, max_tokens=9).tokens


def test_saving_what_was_loaded_gives_the_same_file(bundle: Bundle, saved: Path, tmp_path: Path) -> None:
    with load(bundle.path, threads=1) as restarted:
        restarted.load_session(saved)
        restarted.save_session(str(tmp_path / "again"))
    assert (tmp_path / "again").read_bytes() == saved.read_bytes()


def test_the_first_tokens_can_be_saved_alone(bundle: Bundle, model: LanguageModel, saved: Path) -> None:
    for count, reused in ((len(PROMPT), len(PROMPT)), (4, 4), (0, 0)):
        model.generate(PROMPT, max_tokens=6)
        model.save_session(saved, tokens=count)
        with load(bundle.path, threads=1) as restarted:
            assert restarted.load_session(saved) == count
            assert restarted.generate(PROMPT, max_tokens=1).timings.reused_tokens == reused
    for count in (-1, len(PROMPT) + 6):
        with pytest.raises(SessionError, match=f"cannot save {count} cached tokens: give 0 to 16, as many are cached"):
            model.save_session(saved, tokens=count)
    with pytest.raises(EdgeLMError, match="tokens is '3': it has to be an integer, or None for all"):
        model.save_session(saved, tokens="3")  # type: ignore[arg-type]


# With a seed, logits equal those of a fresh model. Prompts are computed in steps of 4 tokens here.
@pytest.mark.parametrize(
    ("prompt", "chunk", "reused"),
    [(PROMPT, 4, 11), (LONGER, 4, 8), (PROMPT[:6], 4, 4), ([*PROMPT[:3], 7, 7], 4, 0), (PROMPT, 3, 0), (LONGER, 8, 0)],
)
def test_with_a_seed_whole_chunks_are_reused(
    bundle: Bundle, tmp_path: Path, prompt: list[int], chunk: int, reused: int
) -> None:
    with with_chunk(bundle, 4) as first, with_chunk(bundle, chunk) as second, with_chunk(bundle, chunk) as fresh:
        first.generate(PROMPT, max_tokens=3, seed=1)
        first.save_session(tmp_path / "session")
        second.load_session(tmp_path / "session")
        logits, count = second.cache.prefill(prompt, exact=True)
        assert count == reused
        np.testing.assert_array_equal(logits, fresh.cache.prefill(prompt, exact=True)[0])
        np.testing.assert_array_equal(state(second)[1], state(fresh)[1])


def test_a_prompt_of_one_step_is_fresh_for_every_larger_step(bundle: Bundle, tmp_path: Path) -> None:
    with with_chunk(bundle, 16) as first, with_chunk(bundle, 32) as second, with_chunk(bundle, 8) as third:
        first.generate(PROMPT, max_tokens=3, seed=1)
        first.save_session(tmp_path / "session")
        for restarted, reused in ((second, len(PROMPT)), (third, 0)):
            restarted.load_session(tmp_path / "session")
            assert restarted.cache.prefill(PROMPT, exact=True)[1] == reused


def test_with_a_seed_nothing_is_reused_that_was_computed_behind_an_earlier_cache(
    bundle: Bundle, model: LanguageModel, saved: Path
) -> None:
    model.generate(LONGER, max_tokens=1)
    model.save_session(saved)
    with load(bundle.path, threads=1) as restarted:
        restarted.load_session(saved)
        assert restarted.generate(LONGER, max_tokens=1, seed=3).timings.reused_tokens == 0
        restarted.load_session(saved)
        assert restarted.generate(LONGER, max_tokens=1, seed=3, reuse=True).timings.reused_tokens == len(LONGER)


def test_every_cut_and_changed_byte_is_refused_without_a_change(model: LanguageModel, saved: Path) -> None:
    data = saved.read_bytes()
    model.generate([80, 81], max_tokens=3)
    before = state(model)
    broken = [data[:size] for size in (*range(0, 500, 11), len(data) - 4, len(data) - 1)]
    places = (*range(0, 500, 13), *range(500, len(data), 501), len(data) - 1)
    broken += [data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] for at in places]
    for contents in [*broken, data + b"x", data + data]:
        saved.write_bytes(contents)
        with pytest.raises(
            SessionError, match=r"session: .*(save the session again|that EdgeLM saved|with that type)$"
        ):
            model.load_session(saved)
        found = state(model)
        assert found[0] == before[0]
        np.testing.assert_array_equal(found[1], before[1])
    saved.write_bytes(data)
    assert model.load_session(saved) == len(PROMPT) + 5


def rewritten(data: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """A session with another header, and the CRC of that."""
    version, size = struct.unpack_from("<II", data, 8)
    header = json.loads(data[16 : 16 + size])
    change(header)
    text = json.dumps(header).encode()
    body = data[:8] + struct.pack("<II", version, len(text)) + text + data[16 + size : -4]
    return body + struct.pack("<I", zlib.crc32(body))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"manifest": "0" * 64}, "belongs to another bundle: open that one, or save the session again"),
        (
            {"runtime": "cuda-kernels"},
            'saved with the runtime "cuda-kernels", not onnxruntime-cpu: load the bundle with',
        ),
        ({"kv": "int8"}, 'has a KV cache of type "int8", and the model has float32: open the bundle with that type'),
        ({"vocab_size": 98}, "the session's sizes are not those of the model: save the session again"),
        ({"cache_bytes": 1 << 40}, "the session's sizes are not those of the model: save the session again"),
        ({"prompt_tokens": 17}, "prompt_tokens is 17, and there are 16 tokens: save the session again"),
        ({"fresh_tokens": 17}, "fresh_tokens is 17, and there are 16 tokens: save the session again"),
        ({"chunk": 0}, "chunk is 0, expected a whole number from 1 to 2147483647: save the session again"),
        ({"fresh": 1}, "fresh is 1, expected true or false: save the session again"),
    ],
)
def test_a_file_of_something_else_says_of_what(
    model: LanguageModel, saved: Path, change: dict[str, Any], said: str
) -> None:
    saved.write_bytes(rewritten(saved.read_bytes(), lambda header: header.update(change)))
    with pytest.raises(SessionError) as refused:
        model.load_session(saved)
    assert str(refused.value).startswith(f"{saved}: ")
    assert said in str(refused.value)


def test_a_field_of_a_later_version_is_ignored(model: LanguageModel, saved: Path) -> None:
    saved.write_bytes(rewritten(saved.read_bytes(), lambda header: header.update(later="x")))
    assert model.load_session(saved) == len(PROMPT) + 5


def test_other_formats_are_refused(model: LanguageModel, saved: Path) -> None:
    data = saved.read_bytes()
    for contents, said in (
        (
            data[:8] + struct.pack("<I", 2) + data[12:],
            "session format 2, and this EdgeLM reads 1: save the session again",
        ),
        (data[:12] + struct.pack("<I", 4097) + data[16:], "the session's header is damaged: save the session again"),
        (b"GGUF" + data, "this is not a session that EdgeLM saved"),
    ):
        saved.write_bytes(contents)
        with pytest.raises(SessionError, match=said):
            model.load_session(saved)


def test_a_token_outside_the_vocabulary_is_refused(model: LanguageModel, saved: Path) -> None:
    data = saved.read_bytes()
    at = 16 + struct.unpack_from("<I", data, 12)[0]
    body = data[:at] + struct.pack("<i", -1) + data[at + 4 : -4]
    saved.write_bytes(body + struct.pack("<I", zlib.crc32(body)))
    with pytest.raises(SessionError, match=r"session: token id -1 .* outside the vocabulary"):
        model.load_session(saved)
    assert len(model.cache.cached) == len(PROMPT) + 5


def test_a_session_that_is_longer_than_the_context_is_refused(bundle: Bundle, saved: Path) -> None:
    said = "session: 16 tokens do not fit: the context holds 15"
    with load(bundle.path, threads=1, context_length=15) as short, pytest.raises(ContextLengthError, match=said):
        short.load_session(saved)
    with load(bundle.path, threads=1, context_length=16) as enough:
        assert enough.load_session(saved) == 16


def test_what_cannot_be_read_is_named(model: LanguageModel, tmp_path: Path) -> None:
    for path, said in (
        (tmp_path / "missing", "missing cannot be read: No such file or directory"),
        (tmp_path, "is a folder, not a session"),
        (Path("/dev/null"), "/dev/null is not a regular file"),
        ("a\0b", "is not a path"),
    ):
        with pytest.raises(SessionError, match=said):
            model.load_session(path)
    with pytest.raises(EdgeLMError, match="path is 3: give the path of a session file"):
        model.load_session(3)  # type: ignore[arg-type]


def test_what_cannot_be_written_is_named_and_unchanged(model: LanguageModel, saved: Path, tmp_path: Path) -> None:
    notes, link = tmp_path / "notes.txt", tmp_path / "link"
    notes.write_text("mine")
    link.symlink_to(saved)
    for path, said in (
        (tmp_path / "missing" / "session", "there is no folder .*missing to write session to: make it"),
        (tmp_path, "is a folder, but a session is a file"),
        (notes, "notes.txt exists already and is not a session that EdgeLM saved: choose another place"),
        (link, "is a link to .*session: give that path itself"),
        ("/proc/session", "/proc/session cannot be written .*: choose another place"),
        ("a\0b", "is not a path"),
    ):
        with pytest.raises(EdgeLMError, match=said):
            model.save_session(path)
    assert notes.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "notes.txt", "session"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyboardInterrupt("Ctrl-C"), "Ctrl-C"),
        (OSError(errno.ENOSPC, "No space left"), "the disk is full while writing"),
        (OSError(errno.EIO, "Input/output error"), "session cannot be written: Input/output error"),
    ],
)
def test_a_save_that_is_cut_short_leaves_the_old_file(
    bundle: Bundle, model: LanguageModel, saved: Path, error: BaseException, said: str
) -> None:
    before, calls = saved.read_bytes(), 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise error

    model.generate(LONGER, max_tokens=4)
    with pytest.raises((EdgeLMError, KeyboardInterrupt), match=said):
        session_file.save_session(bundle, model.cache, saved, tokens=None, check=check)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["session"]


def test_a_file_that_changes_while_it_is_read_leaves_nothing_cached(
    bundle: Bundle, model: LanguageModel, saved: Path
) -> None:
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1

    def damage() -> None:
        nonlocal calls
        calls -= 1
        if calls == 3:  # in the second reading, in the cache
            with saved.open("r+b") as stream:
                stream.seek(-10, 2)
                stream.write(b"\1\2\3")

    session_file.load_session(bundle, model.cache, saved, count)
    with pytest.raises(SessionError, match="changed while it was read: save the session again"):
        session_file.load_session(bundle, model.cache, saved, damage)
    assert model.cache.cached == []
    assert model.generate(PROMPT, max_tokens=1).timings.reused_tokens == 0


def test_a_bundle_that_was_replaced_meanwhile_is_named(bundle: Bundle, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle.path, tmp_path / "copy")
    with load(copy, threads=1) as model:
        model.generate(PROMPT, max_tokens=1)
        manifest = json.loads((copy / "manifest.json").read_text())
        manifest["created"] = "2026-11-30T00:00:00Z"
        (copy / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(BundleError, match="was replaced after the bundle was loaded: load the bundle again"):
            model.save_session(tmp_path / "session")


def test_a_runtime_without_a_cache_to_save_is_named(bundle: Bundle, saved: Path) -> None:
    with scripted(bundle, "answer") as model:
        for use in (model.save_session, model.load_session):
            with pytest.raises(SessionError, match="the runtime scripted cannot save or load its KV cache: use onnx"):
                use(saved)


def test_sessions_wait_for_their_turn(model: LanguageModel, saved: Path) -> None:
    stream = model.stream(PROMPT, max_tokens=9)
    next(stream)
    for use in (model.save_session, model.load_session):
        with pytest.raises(GenerationError, match="a stream of this model is open in this thread"):
            use(saved)
    stream.close()
    model.close()
    for use in (model.save_session, model.load_session):
        with pytest.raises(EdgeLMError, match="this model was closed"):
            use(saved)


def place(kv: str, head_dim: int, capacity: int, token: int, d: int, *, keys: bool) -> int:
    """The byte of element d of a token in the memory of a head; see csrc/kernels/attention/attention_cache_impl.h."""
    first = token // 16 * 16
    slot, n = token - first, min(capacity - first, 16)
    at = first * row_bytes(kv, head_dim)
    if kv == "int8":
        group, width = (
            (d // 4 * 4, min(head_dim - d // 4 * 4, 4)) if keys else (slot // 4 * 4, min(n - slot // 4 * 4, 4))
        )
        return at + (n * group + width * slot + d - group if keys else head_dim * group + width * d + slot - group)
    return at + {"float32": 4, "float16": 2, "fp8": 1}[kv] * (d * n + slot if keys else slot * head_dim + d)


@pytest.mark.parametrize("keys", [True, False])
@pytest.mark.parametrize("kv", KV_TYPES)
def test_rows_are_taken_from_where_the_kernels_store_them(kv: str, keys: bool) -> None:
    rng = np.random.default_rng(0)
    for head_dim in (4, 6, 16):
        size, unit = row_bytes(kv, head_dim), {"float32": 4, "float16": 2}.get(kv, 1)
        for capacity in (1, 5, 16, 17, 18, 33, 48):
            memory = rng.integers(0, 256, (2, capacity, size), np.uint8)
            rows = CacheRows(kv, head_dim, capacity).pack(memory, capacity, keys=keys)
            flat = memory.reshape(2, -1)
            for token in range(capacity):
                for d in range(head_dim):
                    at = place(kv, head_dim, capacity, token, d, keys=keys)
                    found = rows[:, token, unit * d : unit * (d + 1)]
                    np.testing.assert_array_equal(found, flat[:, at : at + unit])


@pytest.mark.parametrize("keys", [True, False])
@pytest.mark.parametrize("kv", KV_TYPES)
def test_rows_can_be_put_into_a_cache_of_another_capacity(kv: str, keys: bool) -> None:
    rng = np.random.default_rng(1)
    size = row_bytes(kv, 6)
    for length in range(36):
        for capacity in (length, length + 1, length + 17):
            rows = rng.integers(0, 256, (3, length, size), np.uint8)
            memory = rng.integers(0, 256, (3, capacity, size), np.uint8)
            cache, before = CacheRows(kv, 6, capacity), memory.copy()
            cache.unpack(memory, rows, keys=keys)
            np.testing.assert_array_equal(cache.pack(memory, length, keys=keys), rows)
            # The other tokens are as they were.
            others = cache.pack(memory, capacity, keys=keys)[:, length:]
            np.testing.assert_array_equal(others, cache.pack(before, capacity, keys=keys)[:, length:])
