"""Read a Hugging Face checkpoint folder tensor by tensor, with bounded memory.

Needs numpy only. A hub id is downloaded first (`edgelm.checkpoint.hub`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgelm.checkpoint import hub, names
from edgelm.checkpoint.counts import check_counts
from edgelm.checkpoint.index import INDEX, open_weight_files
from edgelm.checkpoint.jsonfile import read_json_object
from edgelm.checkpoint.safetensors import SafetensorsFile, TensorInfo, bf16_to_float32
from edgelm.checkpoint.writer import SafetensorsWriter, ShardedWriter, TensorSpec, float32_to_bf16, write_sharded
from edgelm.errors import CheckpointError
from edgelm.files import restore
from edgelm.models import Family, family
from edgelm.models.spec import Decoder
from edgelm.progress import Progress, Silent

if TYPE_CHECKING:
    from typing import Self

__all__ = [
    "Checkpoint",
    "CheckpointFiles",
    "SafetensorsFile",
    "SafetensorsWriter",
    "ShardedWriter",
    "TensorInfo",
    "TensorSpec",
    "WeightReader",
    "bf16_to_float32",
    "family_of",
    "float32_to_bf16",
    "write_sharded",
]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
HASH_BLOCK = 4 << 20
MAX_CONFIG_BYTES = 8 << 20
NO_GGUF = "GGUF files are not read: give the original Hugging Face folder"


class WeightReader(Protocol):
    """A source of weights by name, such as a `Checkpoint` or a quantised view of one."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor. Raises `CheckpointError` where there is no such tensor."""

    def read_float32(self, name: str, rows: slice | None = None) -> NDArray[np.float32]:
        """Return a tensor, or the given rows of its first axis."""


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the model family that a config.json names in `architectures`.

    Raises:
        UnsupportedConfigError: the architecture is unknown.
        CheckpointError: `architectures` is not a list of names.
    """
    architectures = config.get("architectures")
    if architectures is not None and not (isinstance(architectures, list) and all(map(_is_text, architectures))):
        raise CheckpointError("config.json: architectures is not a list of names; fetch the file again")
    return family(config)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


class CheckpointFiles:
    """The files of a checkpoint folder of any architecture.

    Attributes:
        path: the folder.
        config: contents of config.json.
        stored: tensors by their names in the files, sorted by file and offset.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / "config.json").exists():
            what = NO_GGUF if any(path.glob("*.gguf")) else "is this a checkpoint folder?"
            raise CheckpointError(f"{path}: no config.json; {what}")
        self.config: dict[str, Any] = read_json_object(path / "config.json", MAX_CONFIG_BYTES)
        self._files = {file.path: file for file in open_weight_files(path)}
        found = (info for file in self._files.values() for info in file.tensors.values())
        self.stored: Mapping[str, TensorInfo] = {
            info.name: info for info in sorted(found, key=lambda info: (str(info.file), info.offset))
        }

    def close(self) -> None:
        """Close the weight files."""
        for file in self._files.values():
            file.close()

    def __enter__(self) -> Self:
        """Close the files at the end of the block."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Close the files."""
        self.close()


class Checkpoint(CheckpointFiles):
    """An open checkpoint folder. Several threads may read at once.

    Tensors have canonical names, whatever the files call them: see `edgelm.checkpoint.names`.

    Attributes:
        source_id: the hub id with its revision, or the folder's name.
        family: the model family that config.json names.
        tensors: the tensors by canonical name, sorted by file and offset; float64 is given as float32.
    """

    def __init__(self, path: Path, source_id: str | None = None) -> None:
        super().__init__(path)
        self.source_id = source_id or hub.snapshot_id(path) or path.resolve().name
        try:
            self.family = family_of(self.config)
            self._stored_tensors = self._canonical()
        except CheckpointError as error:
            self.close()
            message = str(error)
            raise type(error)(message if message.startswith(str(path)) else f"{path}: {message}") from None
        except BaseException:
            self.close()
            raise
        self.tensors: Mapping[str, TensorInfo] = {
            name: names.as_read(info) for name, info in self._stored_tensors.items()
        }

    def _canonical(self) -> dict[str, TensorInfo]:
        """Return the tensors by canonical name. Check that tensors that are left out equal what replaces them."""
        named = names.canonical(self.stored, tied=self.config.get("tie_word_embeddings") is True)
        check_counts(self.config, named.tensors, self.path)

        def read(info: TensorInfo, rows: slice | None) -> NDArray[Any]:
            return self._files[info.file].read_raw(info, rows)

        if named.head is not None:
            names.check_head(named.head, named.tensors[names.EMBEDDING], read)
        if named.frequencies:
            for info in named.frequencies:
                names.check_frequencies(info, self.decoder, read)
        return named.tensors

    @cached_property
    def decoder(self) -> Decoder:
        """The spec of the model that config.json describes.

        Raises:
            UnsupportedConfigError, CheckpointError: as `Family.spec`.
        """
        return self.family.spec(self.config)

    @classmethod
    def open(cls, path_or_hub_id: str | Path, progress: Progress | None = None) -> Checkpoint:
        """Open a folder, or download `owner/name[@revision]` from the hub and open it. A folder of that name wins.

        This does not check that the tensors are those of the model that config.json describes: see `check_tensors`.

        Raises:
            CheckpointError: there is no such folder or repository, or the checkpoint is incomplete or damaged.
            UnsupportedConfigError: the architecture is unknown.
        """
        path = Path(path_or_hub_id)
        if path.suffix.lower() == ".gguf" and not path.is_dir():
            raise CheckpointError(f"{path}: {NO_GGUF}")
        if not path.exists():
            restore(path)
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
        """Return type, shape and place of a tensor. Raises `CheckpointError` where there is no such tensor."""
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.path}: no tensor {name!r} among its {len(self.tensors)}") from None

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor. Raises `CheckpointError` where there is no such tensor."""
        return self.info(name).shape

    def read_raw(self, name: str, rows: slice | None = None) -> NDArray[Any]:
        """Return a tensor, or some rows of its first axis, as stored; but bfloat16 as uint16 and float64 as float32.

        Raises:
            CheckpointError: there is no such tensor, or a value is not finite; names the tensor and the element.
        """
        info = self._stored_tensor(name)
        if info.dtype == "F64":
            return self.read_float32(name, rows)
        return self._files[info.file].read_raw(info, rows, finite=True)

    def read_float32(self, name: str, rows: slice | None = None) -> NDArray[np.float32]:
        """Return a tensor, or some rows of its first axis, as float32. Only float64 is rounded, to nearest.

        Raises:
            CheckpointError: there is no such tensor, it is not of a float type, or a value is not finite; names the
                tensor and the element.
        """
        info = self._stored_tensor(name)
        return self._files[info.file].read_float32(info, rows, finite=True)

    def _stored_tensor(self, name: str) -> TensorInfo:
        """Return the tensor's entry in the file, with the stored type."""
        self.info(name)
        return self._stored_tensors[name]

    def check_tensors(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Check that the checkpoint has exactly the `expected` tensors, in these shapes.

        Raises:
            CheckpointError: names the first tensor that is missing, extra or of a wrong shape, its file, and their
                number.
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
        """config.json, the index where there is one, and the weight files."""
        index = self.path / INDEX
        weights = list(self._files)
        return [self.path / "config.json", *([index] if index.exists() and len(weights) > 1 else []), *weights]

    def hashes(self, progress: Progress | None = None) -> dict[str, dict[str, int | str]]:
        """Return size and SHA-256 of each of `files`, by file name."""
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
