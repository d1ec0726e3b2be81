"""The deployable folder: what its manifest says, and whether the files still are what was exported.

A bundle is complete or absent: `edgelm.files.atomic_directory` writes it beside its place. `Bundle.open` verifies the
format version and every file's size (cheap, always); `Bundle.verify` also verifies hashes, and names the tensor and
the layer in which a damaged byte of the weights lies.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from edgelm.bundle.contents import Contents
from edgelm.errors import BundleError
from edgelm.files import atomic_directory, need_disk, restore
from edgelm.json_dataclass import Blame, Count, Range, from_data, parse, quoted, read_bytes, read_json, require_format
from edgelm.models import FORMER_NAMES
from edgelm.places import Kind, unlisted
from edgelm.progress import Progress, Silent

MANIFEST = "manifest.json"
FORMAT = "edgelm-bundle"
FORMAT_VERSION = 1
ENGINES = "engines"
"""The folder of TensorRT engines."""
ENGINE_WORK = ".engine.partial-"
"""What the folders begin with in which an engine is built."""
_HASH_CHUNK = 8 << 20
# Of a build that was killed: its workplace, an engine not yet in the manifest or no longer, the new manifest.
_LEFT_BY_BUILDS = re.compile(
    rf"{re.escape(ENGINE_WORK)}[^/]+(/[^/]+)?|{ENGINES}/(rtx|trt)-[\d.]+(-sm\d+)*(-\d+)?\.(engine|json)"
    rf"|\.{re.escape(MANIFEST)}\.partial-[0-9a-f]+"
)
_BLAME = Blame(BundleError, "export the bundle again")

# Far above any model, and small enough that lists of so many and buffers of so many bytes do no harm.
_Layers = Annotated[int, Range(1, 4096)]
_Width = Annotated[int, Range(1, 1 << 20)]
_Heads = Annotated[int, Range(1, 1 << 16)]
_Experts = Annotated[int, Range(0, 1 << 16)]
_Vocabulary = Annotated[int, Range(1, 1 << 24)]
_Positions = Annotated[int, Range(1, (1 << 31) - 1)]
_TokenId = Annotated[int, Range(0, (1 << 31) - 1)]


@dataclass(frozen=True)
class ModelInfo:
    """The shapes a runtime and the parity check need, whatever the family."""

    family: str
    name: str
    hidden_size: _Width
    num_layers: _Layers
    num_heads: _Heads
    num_kv_heads: _Heads
    head_dim: _Heads
    vocab_size: _Vocabulary
    context_length: _Positions
    tied: bool
    num_experts: _Experts = 0
    experts_per_token: _Experts = 0
    norm_topk_prob: bool = False

    def __post_init__(self) -> None:
        # Bundles that were exported before have Llama's family by the name of its first model.
        object.__setattr__(self, "family", FORMER_NAMES.get(self.family, self.family))


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

    layer: Count
    expert: Count
    tokens: Count


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
    samples: Count
    length: Count
    methods: dict[str, Count] = field(default_factory=dict)
    fallbacks: tuple[ExpertFallback, ...] = ()
    smoothing: str | None = None


@dataclass(frozen=True)
class TokenIds:
    """Special token ids as resolved at export."""

    bos_id: _TokenId | None
    eos_ids: tuple[_TokenId, ...]
    pad_id: _TokenId | None


@dataclass(frozen=True)
class FileInfo:
    """Size in bytes and SHA-256 of one file."""

    size: Count
    sha256: str


@dataclass(frozen=True)
class TensorEntry:
    """A span of the weights file: byte offset and size, CRC-32, and the layer it belongs to (None: outside layers).

    `contents` says what the bytes stand for; None in bundles of before it was there.
    """

    name: str
    offset: Count
    size: Count
    crc32: Annotated[int, Range(0, (1 << 32) - 1)]
    layer: Count | None = None
    contents: Contents | None = None

    def to_data(self) -> dict[str, Any]:
        """The fields for JSON, without contents that are not known."""
        data = dataclasses.asdict(self) | {"contents": self.contents and self.contents.to_data()}
        return {name: value for name, value in data.items() if name != "contents" or value is not None}


@dataclass(frozen=True)
class SourceInfo:
    """The checkpoint a bundle was made from: its id or folder name, and each file's size and hash."""

    id: str
    files: dict[str, FileInfo] = field(default_factory=dict)


@dataclass(frozen=True)
class Requirement:
    """A graph needs `package` of at least `version` because it has `feature`."""

    package: str
    version: str
    feature: str

    @property
    def numbers(self) -> tuple[int, ...]:
        """The version to compare with: 1.23.2 is (1, 23, 2)."""
        return version_numbers(self.version)


@dataclass(frozen=True)
class Manifest:
    """Everything a bundle says about itself (`manifest.json`).

    `created` is a time in UTC, None where the export was given none (SOURCE_DATE_EPOCH): bundles are reproducible.
    """

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
    created: str | None = None
    calibration: CalibrationInfo | None = None
    requires: tuple[Requirement, ...] = ()
    format: str = FORMAT
    format_version: int = FORMAT_VERSION

    def __repr__(self) -> str:
        return f"Manifest({self._summary()}, {len(self.tensors)} tensors)"

    def _summary(self) -> str:
        return f"{self.model.name}, {self.recipe.name}, {self.ops} operators for {self.target}"

    def to_json(self) -> str:
        """The manifest as indented JSON."""
        data = dataclasses.asdict(self)
        if self.calibration is None:
            # Versions that know no calibration refuse the field, and there is nothing in it.
            del data["calibration"]
        elif self.calibration.smoothing is None:
            del data["calibration"]["smoothing"]
        if not self.requires:
            del data["requires"]
        if self.created is None:
            del data["created"]
        data["tensors"] = [tensor.to_data() for tensor in self.tensors]
        return json.dumps(data, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: Path) -> Manifest:
        """Parse and check a manifest.

        Raises:
            BundleError: not JSON, not a bundle's manifest, of a newer format, with a field that is missing, unknown or
                of another type or range, or numbers that contradict each other.
        """
        data = parse(text, where, _BLAME)
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise BundleError(f'{where} is not the manifest of an EdgeLM bundle (no "format": "{FORMAT}")')
        manifest = from_data(cls, require_format(data, "format_version", FORMAT_VERSION, where, _BLAME), where, _BLAME)
        problem = next(manifest._problems(), None)
        if problem is not None:
            raise _BLAME.at(where, problem)
        return manifest

    def _problems(self) -> Iterator[str]:
        """What contradicts itself: a line for each."""
        model = self.model
        if model.num_heads % model.num_kv_heads:
            yield f"model.num_heads is {model.num_heads}, no multiple of num_kv_heads, {model.num_kv_heads}"
        if model.experts_per_token > model.num_experts:
            yield f"model.experts_per_token is {model.experts_per_token}, and num_experts {model.num_experts}"
        for need in self.requires:
            if not need.numbers:
                yield f"requires {need.package} of a version that is none: {quoted(need.version)}"
        for name in self.files:
            if not _is_inside(name):
                yield f"names a file outside the bundle: {quoted(name)}"
        graph = self.graph
        for name in (graph.file, graph.debug_file, graph.weights_file):
            if name not in self.files:
                yield f"does not list {quoted(name)}"
                return
        end, weights = 0, self.files[graph.weights_file].size
        for tensor in sorted(self.tensors, key=lambda tensor: tensor.offset):
            if tensor.offset < end:
                yield f"the tensor {quoted(tensor.name)} overlaps the one before it"
            end = tensor.offset + tensor.size
            if end > weights:
                yield f"the tensor {quoted(tensor.name)} ends at {end}, and {graph.weights_file} at {weights}"
            held = tensor.contents
            if held is not None and len(held.matrices) != len(held.rows):
                counts = f"{len(held.matrices)} matrices and the rows of {len(held.rows)}"
                yield f"the tensor {quoted(tensor.name)} holds {counts}"
        layers = {tensor.layer for tensor in self.tensors} - {None}
        if layers and layers != set(range(model.num_layers)):
            yield f"model.num_layers is {model.num_layers}, and tensors belong to {len(layers)} layers"


def _is_inside(name: str) -> bool:
    """Whether a name in the manifest is a path within the bundle's folder."""
    path = PurePosixPath(name)
    return bool(name) and "\0" not in name and not path.is_absolute() and ".." not in path.parts


def left_by_builds(folder: Path) -> list[Path]:
    """What in a bundle's folder is not in its manifest and of a build that was killed; files and workplaces.

    Only where no build is under way (`edgelm.files.lock_folder`).
    """
    listed = _listed(folder)
    if listed is None:
        return []
    found = [*folder.glob(".*"), *folder.glob(f"{ENGINES}/*")]
    names = {path.relative_to(folder).as_posix(): path for path in found}
    return [path for name, path in names.items() if name not in listed and _LEFT_BY_BUILDS.fullmatch(name)]


def _listed(folder: Path) -> set[str] | None:
    """The files that the manifest names, whatever its version; None where it is not one of EdgeLM."""
    try:
        data = read_json(folder / MANIFEST, _BLAME)
    except BundleError:
        return None
    if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("files"), dict):
        return None
    return {MANIFEST, *data["files"]}


def _unknown_content(folder: Path) -> str | None:
    listed = _listed(folder)
    if listed is None:
        return f"is no bundle (it has no {MANIFEST} that EdgeLM wrote)"
    name = unlisted(folder, lambda path: path in listed or _LEFT_BY_BUILDS.fullmatch(path) is not None)
    return None if name is None else f"holds {name}, which is not in its {MANIFEST}"


BUNDLE = Kind("a bundle", _unknown_content)
"""What `edgelm export` writes: replaced where every file of it is in its manifest."""


def _is_path(text: str | bytes) -> bool:
    """Whether the system can take a text as a path."""
    try:
        return isinstance(text, str) and b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


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
        if not isinstance(path, (str, os.PathLike)) or not _is_path(os.fspath(path)):
            raise BundleError(f"{path!r:.100} is no path: give the folder that `edgelm export -o` wrote")
        path = Path(path)
        if not path.exists():
            restore(path)
        if not path.is_dir():
            raise BundleError(f"{path} is not a folder: give the folder that `edgelm export -o` wrote")
        manifest_path = path / MANIFEST
        if not manifest_path.is_file():
            hint = " (this looks like a checkpoint: export it first)" if (path / "config.json").is_file() else ""
            raise BundleError(f"{path} is not a bundle: it has no {MANIFEST}{hint}")
        manifest = Manifest.from_json(read_bytes(manifest_path, _BLAME), manifest_path)
        for name, info in manifest.files.items():
            file = path / name
            if not file.is_file():
                raise BundleError(f"{path} lacks {name}: copy or export the bundle again")
            size = file.stat().st_size
            if size != info.size:
                raise BundleError(
                    f"{file} has {size} bytes, the manifest says {info.size}: copy or export the bundle again"
                )
        return cls(path, manifest)

    def __repr__(self) -> str:
        return f"Bundle({str(self.path)!r}: {self.manifest._summary()})"

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
            atomic_directory(target, BUNDLE, sources=[self.path], overwrite=overwrite) as folder,
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


def version_numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: of 1.32.0.dev7 it is (1, 32, 0); empty where it has none."""
    found = re.match(r"\d{1,6}(\.\d{1,6}){0,2}", version)
    return () if found is None else tuple(int(part) for part in found[0].split("."))


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
