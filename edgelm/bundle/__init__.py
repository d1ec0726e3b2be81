"""Bundles: the manifest of a deployable folder, and the check that its files are those that were exported.

A bundle is complete or absent, since `edgelm.files.atomic_directory` writes it. `Bundle.open` always checks the format
version and the size of every file, which is cheap. `Bundle.verify` also checks hashes; of damaged weights it names the
tensor and the layer.
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
from typing import TYPE_CHECKING, Annotated, Any

from edgelm.bundle.contents import Contents
from edgelm.errors import BundleError
from edgelm.files import atomic_directory, require_disk_space, restore
from edgelm.json_dataclass import (
    Count,
    ErrorFactory,
    Range,
    from_data,
    parse,
    quoted,
    read_bytes,
    read_json,
    require_format,
)
from edgelm.models import FORMER_NAMES
from edgelm.output_paths import OutputKind, first_unlisted
from edgelm.progress import Progress, Silent

if TYPE_CHECKING:
    from edgelm.models.spec import Decoder

MANIFEST = "manifest.json"
FORMAT = "edgelm-bundle"
FORMAT_VERSION = 1
ENGINES = "engines"
"""Folder of TensorRT engines in a bundle."""
ENGINE_TEMP_PREFIX = ".engine.partial-"
"""Prefix of the temporary folders in which engines are built."""
_HASH_CHUNK = 8 << 20
# What a killed engine build may leave: its temporary folder, an engine or a library of plugins that is not in the
# manifest, a new manifest.
_BUILD_LEFTOVERS = re.compile(
    rf"{re.escape(ENGINE_TEMP_PREFIX)}[^/]+(/[^/]+)?|{ENGINES}/(rtx|trt)-[\d.]+(-sm\d+)*(-\d+)?\.(engine|json)"
    rf"|{ENGINES}/libedgelm_plugins-[0-9a-f]+\.so"
    rf"|\.{re.escape(MANIFEST)}\.partial-[0-9a-f]+"
)
_ERRORS = ErrorFactory(BundleError, "export the bundle again")

# Limits far above any model, yet small enough that a hostile manifest cannot exhaust the memory.
_Layers = Annotated[int, Range(1, 4096)]
_Width = Annotated[int, Range(1, 1 << 20)]
_Heads = Annotated[int, Range(1, 1 << 16)]
_Experts = Annotated[int, Range(0, 1 << 16)]
_Vocabulary = Annotated[int, Range(1, 1 << 24)]
_Positions = Annotated[int, Range(1, (1 << 31) - 1)]
_TokenId = Annotated[int, Range(0, (1 << 31) - 1)]


@dataclass(frozen=True)
class ModelInfo:
    """The model's shapes, for runtimes and the parity check."""

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
        # Older bundles name the Llama family after its first model here.
        object.__setattr__(self, "family", FORMER_NAMES.get(self.family, self.family))

    @classmethod
    def of(cls, decoder: Decoder, name: str) -> ModelInfo:
        """Return the shapes of a model; `name` is its hub id or folder."""
        attention, moe = decoder.attention[0], decoder.first_moe
        return cls(
            family=decoder.family,
            name=name,
            hidden_size=decoder.hidden_size,
            num_layers=decoder.num_layers,
            num_heads=attention.heads,
            num_kv_heads=attention.kv_heads,
            head_dim=attention.head_dim,
            vocab_size=decoder.vocab_size,
            context_length=decoder.context_length,
            tied=decoder.tied,
            num_experts=decoder.num_experts,
            experts_per_token=decoder.active_experts,
            norm_topk_prob=moe is not None and moe.normalize,
        )


@dataclass(frozen=True)
class GraphInfo:
    """Files of the graph, the debug graph and the weights, and the element type of the KV cache."""

    file: str
    debug_file: str
    weights_file: str
    kv_dtype: str = "float32"


@dataclass(frozen=True)
class RecipeInfo:
    """The recipe's name and its full text."""

    name: str
    toml: str


@dataclass(frozen=True)
class ExpertFallback:
    """An expert that was rounded to nearest because it saw too few calibration tokens, `tokens`."""

    layer: Count
    expert: Count
    tokens: Count


@dataclass(frozen=True)
class CalibrationInfo:
    """How the weights were calibrated.

    Attributes:
        text: name of the calibration text.
        sha256: SHA-256 of it.
        samples: number of windows.
        length: tokens of a window.
        methods: number of matrices by the method that quantised them.
        fallbacks: experts that saw too few tokens.
        smoothing: kind of smoothing that was applied before, "activations" or "weights"; None for none.
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
    """A tensor in the weights file: byte offset, size and CRC-32.

    Attributes:
        layer: the layer that it belongs to; None for tensors outside the layers.
        contents: how to read the bytes; None in older bundles.
    """

    name: str
    offset: Count
    size: Count
    crc32: Annotated[int, Range(0, (1 << 32) - 1)]
    layer: Count | None = None
    contents: Contents | None = None

    def to_data(self) -> dict[str, Any]:
        """Return the fields for JSON, without `contents` where it is None."""
        data = dataclasses.asdict(self) | {"contents": self.contents and self.contents.to_data()}
        return {name: value for name, value in data.items() if name != "contents" or value is not None}


@dataclass(frozen=True)
class SourceInfo:
    """The checkpoint that the bundle was exported from: hub id or folder name, and size and hash of each file."""

    id: str
    files: dict[str, FileInfo] = field(default_factory=dict)


@dataclass(frozen=True)
class Requirement:
    """A Python package that the graph needs, its lowest version, and the feature that needs it."""

    package: str
    version: str
    feature: str

    @property
    def numbers(self) -> tuple[int, ...]:
        """The version as a tuple that can be compared: 1.23.2 is (1, 23, 2)."""
        return version_numbers(self.version)


@dataclass(frozen=True)
class Manifest:
    """Contents of a bundle's `manifest.json`.

    `created` is a time in UTC, given by SOURCE_DATE_EPOCH at export; None without it, so that bundles are reproducible.
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
        """Return the manifest as indented JSON."""
        data = dataclasses.asdict(self)
        if self.calibration is None:
            # Older versions of EdgeLM refuse a field that they do not know.
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
        """Parse and check a manifest; `where` is its path for errors.

        Raises:
            BundleError: it is not JSON, not the manifest of a bundle, or of a newer format; a field is missing,
                unknown, or of a wrong type or range; or fields contradict each other.
        """
        data = parse(text, where, _ERRORS)
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise BundleError(
                f'{where} is not the manifest of an EdgeLM bundle (no "format": "{FORMAT}"): give the folder that '
                "`edgelm export -o` wrote"
            )
        manifest = from_data(
            cls, require_format(data, "format_version", FORMAT_VERSION, where, _ERRORS), where, _ERRORS
        )
        problem = next(manifest._problems(), None)
        if problem is not None:
            raise _ERRORS.at(where, problem)
        return manifest

    def _problems(self) -> Iterator[str]:
        """Yield a line for each contradiction between fields."""
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
    """Return whether a name in the manifest is a path inside the bundle's folder."""
    path = PurePosixPath(name)
    return bool(name) and "\0" not in name and not path.is_absolute() and ".." not in path.parts


def build_leftovers(folder: Path) -> list[Path]:
    """Return the files and folders in a bundle that killed engine builds left: they are not in its manifest.

    Lock the bundle first (`edgelm.files.lock_folder`): a build that still runs has such files too.
    """
    listed = _listed(folder)
    if listed is None:
        return []
    found = [*folder.glob(".*"), *folder.glob(f"{ENGINES}/*")]
    names = {path.relative_to(folder).as_posix(): path for path in found}
    return [path for name, path in names.items() if name not in listed and _BUILD_LEFTOVERS.fullmatch(name)]


def _listed(folder: Path) -> set[str] | None:
    """Return the files that the manifest lists, of any format version; None where it is not a manifest of EdgeLM."""
    try:
        data = read_json(folder / MANIFEST, _ERRORS)
    except BundleError:
        return None
    if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("files"), dict):
        return None
    return {MANIFEST, *data["files"]}


def _unknown_content(folder: Path) -> str | None:
    listed = _listed(folder)
    if listed is None:
        return f"is no bundle (it has no {MANIFEST} that EdgeLM wrote)"
    name = first_unlisted(folder, lambda path: path in listed or _BUILD_LEFTOVERS.fullmatch(path) is not None)
    return None if name is None else f"holds {name}, which is not in its {MANIFEST}"


BUNDLE = OutputKind("a bundle", _unknown_content)
"""The output of `edgelm export`. It may be replaced if every file in it is listed in its manifest."""


def _is_path(text: str | bytes) -> bool:
    """Return whether the system accepts a string as a path."""
    try:
        return isinstance(text, str) and b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


class Bundle:
    """An opened bundle.

    Attributes:
        path: its folder.
        manifest: the contents of its `manifest.json`.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: Path | str) -> Bundle:
        """Open a bundle and check that every file exists and has its size.

        Args:
            path: the folder that `edgelm export -o` wrote.

        Raises:
            BundleError: it is not a bundle, it has another format version, or a file is missing or of a wrong size.
        """
        if not isinstance(path, (str, os.PathLike)) or not _is_path(os.fspath(path)):
            raise BundleError(f"{path!r:.100} is not a path: give the folder that `edgelm export -o` wrote")
        path = Path(path)
        if not path.exists():
            restore(path)
        if not path.is_dir():
            what = "is not a folder" if path.exists() else "does not exist"
            raise BundleError(f"{path} {what}: give the folder that `edgelm export -o` wrote")
        manifest_path = path / MANIFEST
        if not manifest_path.is_file():
            hint = "give the folder that `edgelm export -o` wrote"
            hint = "this looks like a checkpoint: export it first" if (path / "config.json").is_file() else hint
            raise BundleError(f"{path} is not a bundle: it has no {MANIFEST} ({hint})")
        manifest = Manifest.from_json(read_bytes(manifest_path, _ERRORS), manifest_path)
        for name, info in manifest.files.items():
            file = path / name
            if not file.is_file():
                raise BundleError(f"{path}: {name} is missing; copy or export the bundle again")
            size = file.stat().st_size
            if size != info.size:
                raise BundleError(
                    f"{file} has {size} bytes, the manifest says {info.size}: copy or export the bundle again"
                )
        return cls(path, manifest)

    def __repr__(self) -> str:
        return f"Bundle({str(self.path)!r}: {self.manifest._summary()})"

    def file(self, name: str) -> Path:
        """Return the path of a file in the bundle, which need not be in the manifest."""
        return self.path / name

    @property
    def size(self) -> int:
        """Bytes of all files that the manifest lists."""
        return sum(info.size for info in self.manifest.files.values())

    def verify(self, progress: Progress | None = None) -> list[str]:
        """Check the SHA-256 of every file.

        Returns:
            One line for each problem, naming the file, and for weights the tensor and its layer; empty where the bundle
            is intact.
        """
        problems = []
        with (progress or Silent()).task("verifying", self.size) as advance:
            for name, info in self.manifest.files.items():
                if sha256_of(self.file(name), advance) == info.sha256:
                    continue
                named = self._damaged_tensors() if name == self.manifest.graph.weights_file else []
                problems += named or [f"{name}: contents differ from what was exported"]
        return problems

    def install(self, target: Path | str, *, overwrite: bool = False, progress: Progress | None = None) -> Bundle:
        """Copy the bundle to `target` and check every file on the way.

        At any time `target` is the complete old bundle or the complete new one. Programs that run the old bundle are
        not disturbed: its files are replaced, never written into.

        Args:
            target: the folder to write, on the device.
            overwrite: replace an existing bundle.
            progress: where to report progress.

        Returns:
            The new bundle.

        Raises:
            BundleError: a file differs from the exported one.
            EdgeLMError: `target` exists and may not be replaced, or the disk is full.
        """
        target = Path(target)
        with (
            atomic_directory(target, BUNDLE, sources=[self.path], overwrite=overwrite) as folder,
            (progress or Silent()).task("copying", self.size) as advance,
        ):
            require_disk_space(target, self.size)
            for name, info in self.manifest.files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                if _copy(self.file(name), folder / name, advance) != info.sha256:
                    raise BundleError(
                        f"{self.file(name)} is damaged (its hash is not the manifest's), so nothing was installed: "
                        f"copy or export the bundle again; `edgelm inspect --verify {self.path}` lists what is damaged"
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
    """Return the leading numbers of a version: (1, 32, 0) for 1.32.0.dev7; empty where there are none."""
    found = re.match(r"\d{1,6}(\.\d{1,6}){0,2}", version)
    return () if found is None else tuple(int(part) for part in found[0].split("."))


def sha256_of(path: Path, advance: Callable[[float], None] | None = None) -> str:
    """Return the SHA-256 of a file in hexadecimal; `advance` is called with the bytes of each chunk read."""
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
    """Yield a file's contents in chunks; each is valid until the next one is requested."""
    with path.open("rb", buffering=0) as stream:
        buffer = bytearray(_HASH_CHUNK)
        view = memoryview(buffer)
        while count := stream.readinto(buffer):
            yield view[:count]
            if advance is not None:
                advance(count)
