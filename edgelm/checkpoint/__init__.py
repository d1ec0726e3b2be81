"""A Hugging Face checkpoint folder, read tensor by tensor with bounded memory.

Needs numpy only. A hub id is downloaded first (`edgelm.checkpoint.hub`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgelm.checkpoint import hub
from edgelm.checkpoint.index import INDEX, open_weight_files
from edgelm.checkpoint.jsonfile import read_json_object
from edgelm.checkpoint.safetensors import SafetensorsFile, TensorInfo, bf16_to_float32
from edgelm.checkpoint.writer import SafetensorsWriter, ShardedWriter, TensorSpec, float32_to_bf16, write_sharded
from edgelm.errors import CheckpointError, UnsupportedConfigError
from edgelm.models import Family, family
from edgelm.progress import Progress, Silent

__all__ = [
    "Checkpoint",
    "SafetensorsFile",
    "SafetensorsWriter",
    "ShardedWriter",
    "TensorInfo",
    "TensorSpec",
    "WeightReader",
    "bf16_to_float32",
    "float32_to_bf16",
    "write_sharded",
]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
HASH_BLOCK = 4 << 20


class WeightReader(Protocol):
    """Anything that gives weights by name, such as a `Checkpoint` or a quantised view of one."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor. Raises `CheckpointError` when there is none of that name."""

    def read_float32(self, name: str, rows: slice | None = None) -> NDArray[np.float32]:
        """The tensor, or the given rows of its first axis."""


def _family(folder: Path, config: Mapping[str, Any]) -> Family:
    architectures = config.get("architectures")
    if architectures is not None and not (isinstance(architectures, list) and all(map(_is_text, architectures))):
        raise CheckpointError(f"{folder / 'config.json'}: architectures is not a list of names; fetch the file again")
    try:
        return family(config)
    except UnsupportedConfigError as error:
        raise UnsupportedConfigError(f"{folder}: {error}") from None


def _is_text(value: object) -> bool:
    return isinstance(value, str)


class Checkpoint:
    """An open checkpoint folder. Reads may come from several threads at once.

    Attributes:
        path: the folder.
        source_id: the hub id with its revision, or the folder's name.
        config: config.json.
        family: the supported model family that config.json names.
        tensors: what there is, by name, sorted by file and place in it.
    """

    def __init__(self, path: Path, source_id: str | None = None) -> None:
        self.path = path
        self.source_id = source_id or hub.snapshot_id(path) or path.resolve().name
        if not (path / "config.json").exists():
            raise CheckpointError(f"{path}: no config.json; is this a checkpoint folder?")
        self.config: dict[str, Any] = read_json_object(path / "config.json")
        self.family = _family(path, self.config)
        self._files = {file.path: file for file in open_weight_files(path)}
        found = (info for file in self._files.values() for info in file.tensors.values())
        self.tensors: Mapping[str, TensorInfo] = {
            info.name: info for info in sorted(found, key=lambda info: (str(info.file), info.offset))
        }

    @classmethod
    def open(cls, path_or_hub_id: str | Path, progress: Progress | None = None) -> Checkpoint:
        """Open a folder, or download `owner/name[@revision]` from the hub and open that. A folder of that name wins.

        That the tensors are those of the model that config.json describes is `check_tensors`' business.

        Raises:
            CheckpointError: no such folder or repository, or the checkpoint is incomplete or damaged.
            UnsupportedConfigError: it is of an unknown architecture.
        """
        path = Path(path_or_hub_id)
        if path.is_dir():
            return cls(path)
        if path.exists():
            raise CheckpointError(f"{path}: is a file; give the folder that holds config.json")
        if isinstance(path_or_hub_id, str) and HUB_ID.fullmatch(path_or_hub_id):
            repo_id, _, revision = path_or_hub_id.partition("@")
            folder, commit = hub.download(repo_id, revision or None, progress or Silent())
            return cls(folder, f"{repo_id}@{commit}")
        raise CheckpointError(f"{path}: no such folder (a hub id looks like owner/name)")

    def info(self, name: str) -> TensorInfo:
        """Where a tensor lies. Raises `CheckpointError` when there is none of that name."""
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.path}: no tensor {name!r} among its {len(self.tensors)}") from None

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor. Raises `CheckpointError` when there is none of that name."""
        return self.info(name).shape

    def read_raw(self, name: str, rows: slice | None = None) -> NDArray[Any]:
        """A tensor, or some rows of its first axis, as stored: bfloat16 as uint16, all else as its numpy dtype."""
        return self._files[self.info(name).file].read_raw(name, rows)

    def read_float32(self, name: str, rows: slice | None = None) -> NDArray[np.float32]:
        """A tensor, or some rows of its first axis, as float32; exact for bfloat16, float16 and float32.

        Raises:
            CheckpointError: no such tensor, or it is not of a float type.
        """
        return self._files[self.info(name).file].read_float32(name, rows)

    def check_tensors(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Check that exactly the `expected` tensors are there, in these shapes.

        Raises:
            CheckpointError: naming the first missing, extra or wrongly shaped tensor, its file, and how many there are.
        """
        missing = [name for name in expected if name not in self.tensors]
        if missing:
            raise CheckpointError(
                f"{self.path}: tensor {missing[0]!r} is missing ({len(missing)} of {len(expected)} are); "
                "download the checkpoint again, or config.json describes another model"
            )
        for name, shape in expected.items():
            info = self.tensors[name]
            if info.shape != tuple(shape):
                raise CheckpointError(
                    f"{info.file}: tensor {name!r} has shape {info.shape}, config.json asks for {tuple(shape)}"
                )
        extra = [info for name, info in self.tensors.items() if name not in expected]
        if extra:
            raise CheckpointError(
                f"{extra[0].file}: extra tensor {extra[0].name!r} ({len(extra)} in all), which a model of this "
                "config.json does not have"
            )

    @property
    def files(self) -> list[Path]:
        """config.json, the index if there is one, and the weight files."""
        index = self.path / INDEX
        weights = list(self._files)
        return [self.path / "config.json", *([index] if index.exists() and len(weights) > 1 else []), *weights]

    def hashes(self, progress: Progress | None = None) -> dict[str, dict[str, int | str]]:
        """Size and SHA-256 of every file of `files`, by file name."""
        total = sum(path.stat().st_size for path in self.files)
        with (progress or Silent()).task("hash checkpoint", total) as advance:

            def digest(path: Path) -> dict[str, int | str]:
                state, size = hashlib.sha256(), 0
                buffer = memoryview(bytearray(HASH_BLOCK))
                with path.open("rb", buffering=0) as stream:
                    while count := stream.readinto(buffer):
                        state.update(buffer[:count])
                        size += count
                        advance(count)
                return {"size": size, "sha256": state.hexdigest()}

            with ThreadPoolExecutor(2) as pool:
                return dict(zip([path.name for path in self.files], pool.map(digest, self.files), strict=True))

    def close(self) -> None:
        """Close the weight files."""
        for file in self._files.values():
            file.close()

    def __enter__(self) -> Checkpoint:
        """Close the files at the end of the block."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Close the files."""
        self.close()
