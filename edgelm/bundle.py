"""The deployable folder: what its manifest says, and whether the files still are what was exported.

A bundle is complete or absent: `edgelm.files.atomic_directory` writes it beside its place. `Bundle.open` verifies the
format version and every file's size (cheap, always); `Bundle.verify` also verifies hashes, and names the tensor and
the layer in which a damaged byte of the weights lies.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from edgelm.errors import BundleError
from edgelm.files import atomic_directory, need_disk
from edgelm.progress import Progress, Silent

MANIFEST = "manifest.json"
FORMAT = "edgelm-bundle"
FORMAT_VERSION = 1
_HASH_CHUNK = 8 << 20


@dataclass(frozen=True)
class ModelInfo:
    """The shapes a runtime and the parity check need, whatever the family."""

    family: str
    name: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    tied: bool
    num_experts: int = 0
    experts_per_token: int = 0
    norm_topk_prob: bool = False


@dataclass(frozen=True)
class GraphInfo:
    """Which files hold the graph, and the element type of its KV cache."""

    file: str
    debug_file: str
    weights_file: str
    kv_dtype: str = "float32"


@dataclass(frozen=True)
class RecipeInfo:
    """The recipe's name and its full text, so that a bundle says how it was made."""

    name: str
    toml: str


@dataclass(frozen=True)
class ExpertFallback:
    """An expert that saw only `tokens` calibration tokens, too few, and was rounded to nearest."""

    layer: int
    expert: int
    tokens: int


@dataclass(frozen=True)
class CalibrationInfo:
    """What the codes were chosen by: the text and its SHA-256, windows of it and their tokens, and what came of it.

    Attributes:
        methods: matrices by the method that found their codes.
        fallbacks: experts that saw too few tokens.
        smoothing: what the float weights were scaled for first, "activations" or "weights"; None: they were not.
    """

    text: str
    sha256: str
    samples: int
    length: int
    methods: dict[str, int] = field(default_factory=dict)
    fallbacks: tuple[ExpertFallback, ...] = ()
    smoothing: str | None = None


@dataclass(frozen=True)
class TokenIds:
    """Special token ids as resolved at export."""

    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int | None


@dataclass(frozen=True)
class FileInfo:
    """Size in bytes and SHA-256 of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class TensorEntry:
    """A span of the weights file: byte offset and size, CRC-32, and the layer it belongs to (None: outside layers)."""

    name: str
    offset: int
    size: int
    crc32: int
    layer: int | None = None


@dataclass(frozen=True)
class SourceInfo:
    """The checkpoint a bundle was made from: its id or folder name, and each file's size and hash."""

    id: str
    files: dict[str, FileInfo] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """Everything a bundle says about itself (`manifest.json`)."""

    model: ModelInfo
    target: str
    ops: str
    dtype: str
    recipe: RecipeInfo
    graph: GraphInfo
    tokens: TokenIds
    source: SourceInfo
    files: dict[str, FileInfo]
    tensors: tuple[TensorEntry, ...]
    tools: dict[str, str]
    created: str
    calibration: CalibrationInfo | None = None
    format: str = FORMAT
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """The manifest as indented JSON."""
        data = dataclasses.asdict(self)
        if self.calibration is None:
            # Versions that know no calibration refuse the field, and there is nothing in it.
            del data["calibration"]
        elif self.calibration.smoothing is None:
            del data["calibration"]["smoothing"]
        return json.dumps(data, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: Path) -> Manifest:
        """Parse and check a manifest.

        Raises:
            BundleError: not JSON, not a bundle's manifest, of a newer format, or with missing or unknown fields.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise BundleError(f"{where} is not valid JSON ({error}): export the bundle again") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise BundleError(f'{where} is not the manifest of an EdgeLM bundle (no "format": "{FORMAT}")')
        version = data.get("format_version")
        if version != FORMAT_VERSION:
            raise BundleError(
                f"{where} has bundle format {version}, this EdgeLM reads {FORMAT_VERSION}: "
                + ("upgrade edgelm" if isinstance(version, int) and version > FORMAT_VERSION else "export again")
            )
        try:
            return cls(
                model=ModelInfo(**data.pop("model")),
                graph=GraphInfo(**data.pop("graph")),
                recipe=RecipeInfo(**data.pop("recipe")),
                tokens=_tokens(data.pop("tokens")),
                source=_source(data.pop("source")),
                calibration=_calibration(data.pop("calibration", None)),
                files={name: FileInfo(**info) for name, info in data.pop("files").items()},
                tensors=tuple(TensorEntry(**entry) for entry in data.pop("tensors")),
                **data,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise BundleError(f"{where} has a missing or unknown field ({error}): export the bundle again") from error


def _tokens(data: dict[str, Any]) -> TokenIds:
    return TokenIds(bos_id=data["bos_id"], eos_ids=tuple(data["eos_ids"]), pad_id=data["pad_id"])


def _calibration(data: dict[str, Any] | None) -> CalibrationInfo | None:
    if data is None:
        return None
    return CalibrationInfo(**{**data, "fallbacks": tuple(ExpertFallback(**entry) for entry in data["fallbacks"])})


def _source(data: dict[str, Any]) -> SourceInfo:
    return SourceInfo(id=data["id"], files={name: FileInfo(**info) for name, info in data["files"].items()})


class Bundle:
    """An opened bundle: its folder and its manifest."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: Path | str) -> Bundle:
        """Open a bundle folder and verify that every file is there with its size.

        Raises:
            BundleError: not a bundle, another format version, or a file missing or of the wrong size.
        """
        path = Path(path)
        if not path.is_dir():
            raise BundleError(f"{path} is not a folder: give the folder that `edgelm export -o` wrote")
        manifest_path = path / MANIFEST
        if not manifest_path.is_file():
            hint = " (this looks like a checkpoint: export it first)" if (path / "config.json").is_file() else ""
            raise BundleError(f"{path} is not a bundle: it has no {MANIFEST}{hint}")
        manifest = Manifest.from_json(manifest_path.read_text(encoding="utf-8"), manifest_path)
        for name, info in manifest.files.items():
            relative = PurePosixPath(name)
            if relative.is_absolute() or ".." in relative.parts:
                raise BundleError(f"{manifest_path} names a file outside the bundle: {name}")
            file = path / name
            if not file.is_file():
                raise BundleError(f"{path} lacks {name}: copy or export the bundle again")
            size = file.stat().st_size
            if size != info.size:
                raise BundleError(
                    f"{file} has {size} bytes, the manifest says {info.size}: copy or export the bundle again"
                )
        for needed in (manifest.graph.file, manifest.graph.debug_file, manifest.graph.weights_file):
            if needed not in manifest.files:
                raise BundleError(f"{manifest_path} does not list {needed}: export the bundle again")
        return cls(path, manifest)

    def file(self, name: str) -> Path:
        """The path of a file of the bundle, which need not be in the manifest."""
        return self.path / name

    @property
    def size(self) -> int:
        """Bytes of all files in the manifest."""
        return sum(info.size for info in self.manifest.files.values())

    def verify(self, progress: Progress | None = None) -> list[str]:
        """Hash every file; return one line for each problem, naming file, tensor and layer. Empty means intact."""
        problems = []
        with (progress or Silent()).task("verifying", self.size) as advance:
            for name, info in self.manifest.files.items():
                if sha256_of(self.file(name), advance) == info.sha256:
                    continue
                named = self._damaged_tensors() if name == self.manifest.graph.weights_file else []
                problems += named or [f"{name}: contents differ from what was exported"]
        return problems

    def install(self, target: Path | str, *, overwrite: bool = False, progress: Progress | None = None) -> Bundle:
        """Copy the bundle to `target`, hashing what is read; `target` is the old or the new bundle, whole, at any time.

        Programs that run the old one go on with its files: they are replaced, never written into.

        Args:
            target: folder to write, on the device.
            overwrite: replace a bundle that is there.
            progress: where to report to.

        Raises:
            BundleError: a file differs from what was exported.
            EdgeLMError: `target` exists, or the disk is full.
        """
        target = Path(target)
        with (
            atomic_directory(target, overwrite=overwrite) as folder,
            (progress or Silent()).task("copying", self.size) as advance,
        ):
            need_disk(target, self.size)
            for name, info in self.manifest.files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                if _copy(self.file(name), folder / name, advance) != info.sha256:
                    raise BundleError(
                        f"{self.file(name)} differs from what was exported, and nothing was installed: copy or export "
                        f"the bundle again; `edgelm inspect --verify {self.path}` says more"
                    )
            shutil.copyfile(self.file(MANIFEST), folder / MANIFEST)
        return Bundle.open(target)

    def _damaged_tensors(self) -> list[str]:
        problems = []
        weights = self.manifest.graph.weights_file
        with self.file(weights).open("rb") as stream:
            for entry in self.manifest.tensors:
                stream.seek(entry.offset)
                crc, left = 0, entry.size
                while left and (chunk := stream.read(min(left, _HASH_CHUNK))):
                    crc, left = zlib.crc32(chunk, crc), left - len(chunk)
                if crc != entry.crc32:
                    where = "" if entry.layer is None else f" (layer {entry.layer})"
                    problems.append(f"{weights}: tensor {entry.name}{where} differs from what was exported")
        return problems


def sha256_of(path: Path, advance: Callable[[float], None] | None = None) -> str:
    """SHA-256 of a file as hexadecimal digits, read in chunks; `advance` is called with the bytes of each."""
    digest = hashlib.sha256()
    for chunk in _chunks(path, advance):
        digest.update(chunk)
    return digest.hexdigest()


def _copy(source: Path, target: Path, advance: Callable[[float], None]) -> str:
    """Copy a file's contents and return their SHA-256."""
    digest = hashlib.sha256()
    with target.open("wb", buffering=0) as stream:
        for chunk in _chunks(source, advance):
            digest.update(chunk)
            while chunk:
                chunk = chunk[stream.write(chunk) :]
    return digest.hexdigest()


def _chunks(path: Path, advance: Callable[[float], None] | None) -> Iterator[memoryview]:
    """A file's contents; each chunk is valid until the next is asked for."""
    with path.open("rb", buffering=0) as stream:
        buffer = bytearray(_HASH_CHUNK)
        view = memoryview(buffer)
        while count := stream.readinto(buffer):
            yield view[:count]
            if advance is not None:
                advance(count)
