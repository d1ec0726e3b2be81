"""The model that a preflight is about: a checkpoint folder, one on the hub, or a bundle. Weights are not read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgelm.bundle import MANIFEST, Bundle, Manifest
from edgelm.checkpoint import HUB_ID, MAX_CONFIG_BYTES, NO_GGUF, family_of, hub
from edgelm.checkpoint.jsonfile import read_json_object
from edgelm.errors import BundleError, CheckpointError
from edgelm.json_dataclass import ErrorFactory, read_json
from edgelm.models.spec import Decoder
from edgelm.models.unsupported_fields import not_implemented

_DTYPES = ("float32", "float16", "bfloat16")
_WEIGHTS = "*.safetensors"
_GIVE = "give the folder of a checkpoint or of a bundle, or a hub id"
_DAMAGED = ErrorFactory(BundleError, "copy or export the bundle again")


@dataclass(frozen=True)
class Subject:
    """A model and where it is.

    Attributes:
        kind: "checkpoint", "hub" or "bundle".
        name: what the user gave.
        folder: the folder with its config.json.
        decoder: the model; None where config.json asks for something that is not implemented.
        family: the model family; None where it is unknown.
        refused: why it cannot be exported, one reason each.
        dtype: type of the checkpoint's float values.
        quantized: whether the checkpoint is quantised already.
        checkpoint_bytes: size of the checkpoint's files, here or on the hub; None where it is not known.
        download_bytes: bytes that are still to be downloaded.
        cache: the folder that a download goes to.
        manifest: of a bundle.
        notes: what a user should know.
    """

    kind: str
    name: str
    folder: Path
    decoder: Decoder | None
    family: str | None
    refused: tuple[str, ...]
    dtype: str
    quantized: bool
    checkpoint_bytes: int | None
    download_bytes: int = 0
    cache: Path | None = None
    manifest: Manifest | None = None
    notes: tuple[str, ...] = ()

    @property
    def has_weights(self) -> bool:
        """Whether the weights of a checkpoint are here."""
        return self.kind == "checkpoint" and any(self.folder.glob(_WEIGHTS))


def spec_of(config: Mapping[str, Any]) -> tuple[str | None, Decoder | None, list[str]]:
    """Return the family and the decoder of a config.json, without the fields that are not implemented, and these.

    Returns:
        Family and decoder, None where they are not known; and a reason for everything that an export refuses.
    """
    try:
        family = family_of(config)
    except CheckpointError as error:
        return None, None, [str(error)]
    offending = not_implemented(config, family.keys)
    refused = [f"config.json: {problem}: not implemented" for problem in offending.values()]
    try:
        return family.name, family.spec({key: config[key] for key in config if key not in offending}), refused
    except CheckpointError as error:
        return family.name, None, [*refused, str(error)]


def read_subject(given: str) -> Subject:
    """Read what describes a checkpoint folder, a hub id or a bundle.

    Raises:
        CheckpointError, BundleError: there is no such folder or repository, or its config.json or manifest is damaged.
    """
    if not given.strip():
        raise CheckpointError(f"the model is {given!r}: {_GIVE}")
    path = Path(given)
    if path.suffix.lower() == ".gguf" and not path.is_dir():
        raise CheckpointError(f"{path}: {NO_GGUF}")
    if path.is_dir():
        return _bundle(given, path) if (path / MANIFEST).is_file() else _checkpoint(given, path)
    if path.exists():
        raise CheckpointError(f"{given}: is a file: {_GIVE}")
    if not HUB_ID.fullmatch(given):
        raise CheckpointError(f"{given}: no such folder (a hub id looks like owner/name)")
    repo_id, _, revision = given.partition("@")
    listing = hub.describe(repo_id, revision or None)
    return _described(
        "hub",
        given,
        listing.folder,
        size=sum(listing.sizes.values()),
        download=listing.missing,
        cache=listing.cache,
    )


def _checkpoint(given: str, path: Path) -> Subject:
    weights = sum(file.stat().st_size for file in path.glob(_WEIGHTS))
    if weights:
        return _described("checkpoint", given, path, size=sum(f.stat().st_size for f in path.iterdir() if f.is_file()))
    note = "no weights are here: sizes and speed are those of the model that config.json describes"
    return _described("checkpoint", given, path, size=None, notes=(note,))


def _described(
    kind: str,
    given: str,
    folder: Path,
    *,
    size: int | None,
    download: int = 0,
    cache: Path | None = None,
    notes: tuple[str, ...] = (),
) -> Subject:
    if not (folder / "config.json").exists():
        what = NO_GGUF if any(folder.glob("*.gguf")) else _GIVE
        raise CheckpointError(f"{given}: has no config.json: {what}")
    config = read_json_object(folder / "config.json", MAX_CONFIG_BYTES)
    family, decoder, refused = spec_of(config)
    return Subject(
        kind=kind,
        name=given,
        folder=folder,
        decoder=decoder,
        family=family,
        refused=tuple(refused),
        dtype=_dtype(config),
        quantized=config.get("quantization_config") is not None,
        checkpoint_bytes=size,
        download_bytes=download,
        cache=cache,
        notes=notes,
    )


def _dtype(config: Mapping[str, Any]) -> str:
    asked = config.get("dtype") or config.get("torch_dtype")
    return asked if asked in _DTYPES else "bfloat16"


def _bundle(given: str, path: Path) -> Subject:
    manifest = Bundle.open(path).manifest
    config = read_json(path / "config.json", _DAMAGED)
    family, decoder, refused = spec_of(config) if isinstance(config, dict) else (None, None, [])
    if decoder is None:
        raise _DAMAGED.at(path / "config.json", "; ".join(["describes no model that EdgeLM knows", *refused]))
    return Subject(
        kind="bundle",
        name=given,
        folder=path,
        decoder=decoder,
        family=family,
        refused=tuple(refused),
        dtype=manifest.dtype,
        quantized=False,
        checkpoint_bytes=None,
        manifest=manifest,
    )
