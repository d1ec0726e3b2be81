"""Is a hub id downloaded, is an interrupted download resumed, and are errors one clear line?

The tests use the real huggingface_hub and a fake hub on this machine.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hub_server import COMMIT, Hub, running

from edgelm.checkpoint import Checkpoint
from edgelm.errors import CheckpointError
from edgelm.installing import install_hint
from edgelm.progress import Advance, Progress
from edgelm.synth import write_random_checkpoint

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "intermediate_size": 512,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "tie_word_embeddings": True,
    "vocab_size": 3000,
}
SHARD = "model-00002-of-00003.safetensors"
UNWANTED = ("pytorch_model.bin", "README.md", "onnx/model.onnx", "original/model.safetensors")


class Counter(Progress):
    """Adds up the progress."""

    def __init__(self) -> None:
        self.total = 0.0
        self.done = 0.0

    @contextlib.contextmanager
    def task(self, label: str, total: float, *, unit: str = "bytes") -> Iterator[Advance]:
        self.total = total

        def advance(amount: float) -> None:
            self.done += amount

        yield advance


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(CONFIG, tmp_path_factory.mktemp("hub") / "model", shard_bytes=2_000_000)


@pytest.fixture
def hub(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    files = {path.name: path.read_bytes() for path in source.iterdir()} | dict.fromkeys(UNWANTED, b"unwanted")
    assert SHARD in files
    with running(files) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server


def test_a_hub_id_is_downloaded_and_opened(hub: Hub, source: Path) -> None:
    counter = Counter()
    with Checkpoint.open("owner/model", counter) as checkpoint, Checkpoint.open(source) as original:
        assert checkpoint.source_id == f"owner/model@{COMMIT}"
        for name in original.tensors:
            np.testing.assert_array_equal(checkpoint.read_raw(name), original.read_raw(name))
        assert {path.name for path in checkpoint.path.iterdir()} == {path.name for path in source.iterdir()}
    expected = sum(path.stat().st_size for path in source.iterdir())
    assert counter.total == expected
    assert counter.done == expected


def test_nothing_is_downloaded_twice_and_the_cache_works_offline(hub: Hub) -> None:
    Checkpoint.open("owner/model@main").close()
    fetched = list(hub.gets)
    counter = Counter()
    Checkpoint.open("owner/model@main", counter).close()
    assert (counter.total, counter.done) == (0, 0)
    hub.down = True
    Checkpoint.open("owner/model@main").close()
    assert hub.gets == fetched


def test_a_broken_connection_is_resumed(hub: Hub, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)  # of a broken read it keeps whole chunks
    hub.break_after[SHARD] = 300_000
    counter = Counter()
    with Checkpoint.open("owner/model", counter) as checkpoint, Checkpoint.open(source) as original:
        for name, info in original.tensors.items():
            if info.file.name == SHARD:
                np.testing.assert_array_equal(checkpoint.read_raw(name), original.read_raw(name))
    starts = [start for name, start in hub.gets if name == SHARD]
    assert starts[0] == 0
    assert len(starts) == 2
    assert 0 < starts[1] <= 300_000
    assert counter.done == counter.total


def test_after_a_failed_download_complete_files_are_kept(hub: Hub) -> None:
    hub.broken.add(SHARD)
    with pytest.raises(
        CheckpointError, match=r"owner/model: the download failed .*; run the same command again"
    ) as caught:
        Checkpoint.open("owner/model")
    assert "\n" not in str(caught.value)
    before = len(hub.gets)
    assert before
    hub.broken.clear()
    Checkpoint.open("owner/model").close()
    assert SHARD in [name for name, _ in hub.gets[before:]]
    assert not {name for name, _ in hub.gets[:before]} & {name for name, _ in hub.gets[before:]}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("owner/absent", "owner/absent: no such folder here and no such repository on the hub"),
        ("owner/gated", "owner/gated: access is restricted: accept its terms"),
        ("owner/model@v9", "owner/model@v9: the repository has no such revision"),
        ("owner/mo--del", "owner/mo--del: not a valid hub id"),
    ],
)
def test_a_repository_that_cannot_be_downloaded_gives_one_line(hub: Hub, name: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(name)
    assert "\n" not in str(caught.value)


def test_without_a_connection_the_error_names_it(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    hub.down = True
    with pytest.raises(CheckpointError, match="the hub cannot be reached"):
        Checkpoint.open("owner/model")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match="the hub cannot be reached"):
        Checkpoint.open("owner/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="the hub cannot be reached"):
        Checkpoint.open("owner/model")


def test_a_folder_of_that_name_has_priority(
    hub: Hub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "model").symlink_to(source)
    monkeypatch.chdir(tmp_path)
    with Checkpoint.open("owner/model") as checkpoint:
        assert checkpoint.source_id == source.name
    assert hub.gets == []


def test_a_path_is_never_requested_from_the_hub(hub: Hub) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        Checkpoint.open(Path("owner/model"))
    assert hub.gets == []


def test_without_the_library_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=re.escape(install_hint("export"))):
        Checkpoint.open("owner/model")
