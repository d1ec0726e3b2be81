"""Do cached prompts survive a restart, and is a file that is not what it should be never used?"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from serving_client import Asked

from edgelm.errors import EdgeLMError
from edgelm.serving.engine import Engine
from edgelm.serving.engine.cache_folder import CacheFolder

EngineOf = Callable[..., Engine]
PROMPT = np.random.default_rng(1).integers(3, 400, 200).tolist()
OPTIONS = {"max_tokens": 12, "temperature": 1.2, "seed": 3, "logprobs": 1}


def answer(engine: Engine) -> tuple[int, list[tuple[int, float | None]]]:
    """Return how many tokens were reused, and the tokens with their log-probabilities."""
    asked = Asked(engine, PROMPT, **OPTIONS)
    engine.submit(asked.job)
    reused = asked.result.timings.reused_tokens
    return reused, [(token.token, token.logprob) for token in asked.tokens]


def restarted(engine_of: EngineOf, folder: Path, **options: object) -> tuple[int, list[tuple[int, float | None]]]:
    """Answer in a new engine with the cache in `folder`, and close it."""
    store = CacheFolder(folder, 1 << 30)
    engine = engine_of(context_length=512, store=store, **options)
    try:
        return answer(engine)
    finally:
        engine.close()
        store.close()


def test_does_a_prompt_survive_a_restart(engine_of: EngineOf, tmp_path: Path) -> None:
    first = restarted(engine_of, tmp_path)
    assert first[0] == 0
    assert restarted(engine_of, tmp_path) == (160, first[1])
    # Another bundle, or another type of the cache, has blocks of its own.
    assert restarted(engine_of, tmp_path, recipe="int8")[0] == 0
    assert restarted(engine_of, tmp_path, kv="int8")[0] == 0
    assert restarted(engine_of, tmp_path)[0] == 160


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "longer", "head", "swap"])
def test_is_a_damaged_file_computed_again(engine_of: EngineOf, tmp_path: Path, damage: str) -> None:
    first = restarted(engine_of, tmp_path)
    files = sorted(tmp_path.glob("*.block"), key=lambda path: path.stat().st_mtime_ns)
    assert len(files) == 6
    for path in files:
        data = bytearray(path.read_bytes())
        if damage == "flip":
            data[len(data) // 2] ^= 1
        elif damage == "cut":
            del data[-1]
        elif damage == "empty":
            data.clear()
        elif damage == "longer":
            data.append(0)
        elif damage == "head":
            data[9] ^= 1
        else:
            data[:] = files[0].read_bytes() if path != files[0] else files[1].read_bytes()
        path.write_bytes(data)
    assert restarted(engine_of, tmp_path) == (0, first[1])
    assert restarted(engine_of, tmp_path) == (160, first[1])


def test_is_the_least_recently_used_block_deleted(tmp_path: Path) -> None:
    data = [np.full(1000, index, np.uint8) for index in range(5)]
    keys = [bytes([index]) * 32 for index in range(5)]
    (tmp_path / "of-others.txt").write_text("mine")
    (tmp_path / ("x" * 64 + ".block.part")).write_bytes(b"of a process that was killed")
    folder = CacheFolder(tmp_path, 3500)
    for index in range(3):
        folder.save(keys[index], data[index])
    folder.close()
    for index in range(3):
        os.utime(tmp_path / f"{keys[index].hex()}.block", (index, index))
    folder = CacheFolder(tmp_path, 3500)
    found = folder.load(keys[0], 1000)
    assert found is not None
    assert found.tobytes() == data[0].tobytes()
    folder.save(keys[3], data[3])
    folder.save(keys[4], np.zeros(4000, np.uint8))  # larger than all
    folder.close()
    folder = CacheFolder(tmp_path, 3500)
    assert [folder.load(key, 1000) is not None for key in keys] == [True, False, True, True, False]
    assert folder.load(keys[0], 999) is None  # not the size that is asked for: deleted
    assert folder.load(keys[0], 1000) is None
    assert folder.nbytes < 3500
    folder.close()
    assert (tmp_path / "of-others.txt").read_text() == "mine"
    assert not list(tmp_path.glob("*.part"))


def test_is_a_folder_used_by_one_process_only(tmp_path: Path) -> None:
    folder = CacheFolder(tmp_path / "cache", 1000)
    (tmp_path / "cache" / "00.block.part").write_text("being written")
    code = f"from edgelm.serving.engine.cache_folder import *; CacheFolder(Path({str(tmp_path / 'cache')!r}), 1)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert "is the --cache-dir of another process: choose another folder" in run.stderr
    assert (tmp_path / "cache" / "00.block.part").exists()
    folder.close()
    CacheFolder(tmp_path / "cache", 1000).close()
    (tmp_path / "file").write_text("")
    with pytest.raises(EdgeLMError, match="file cannot be used as --cache-dir: "):
        CacheFolder(tmp_path / "file", 1000)


def test_is_a_full_disk_no_failure(engine_of: EngineOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    first = restarted(engine_of, tmp_path)
    assert len(first[1]) >= 1
    assert not list(tmp_path.glob("*.block*"))


def test_servers_that_share_a_folder_have_numbered_ones_in_it(tmp_path: Path) -> None:
    first, second = (CacheFolder.numbered(tmp_path, 5000) for _ in range(2))
    first.save(b"1" * 32, np.ones(1000, np.uint8))
    first.close()
    assert sorted(one.name for one in tmp_path.iterdir()) == ["0", "1"]
    again = CacheFolder.numbered(tmp_path, 5000)  # as a replica that was started anew
    assert again.load(b"1" * 32, 1000) is not None
    assert second.load(b"1" * 32, 1000) is None
    for folder in (again, second):
        folder.close()
    (tmp_path / "file").write_text("")
    with pytest.raises(EdgeLMError, match="0 cannot be used as --cache-dir: "):
        CacheFolder.numbered(tmp_path / "file", 1000)
