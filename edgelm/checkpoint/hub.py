"""Download a checkpoint from the Hugging Face hub into the hub's cache, with progress.

`huggingface_hub` resumes a broken connection at the byte where it broke. After a killed process, complete files are
kept, and incomplete ones are downloaded again. Two files are downloaded at a time, so that little is lost.
"""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgelm.errors import CheckpointError
from edgelm.installing import install_hint
from edgelm.progress import Advance, Progress, Silent

# Only the files that EdgeLM reads; not pickled copies of the weights, ONNX exports or pictures.
FILES = ("*.safetensors", "*.json", "tokenizer.model", "*.jinja")
SUBFOLDERS = "*/*"
SMALL_FILES = ("config.json", "*.safetensors.index.json")
"""Files that describe a checkpoint without its weights."""
WORKERS = 2


def _bar_class(advance: Advance) -> type[Any]:
    """Return a replacement of the library's progress bar that reports downloaded bytes to `advance`."""
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # The library makes one bar for files and one for bytes; newer versions also one for bytes transferred.
            self._counts = kwargs.get("unit") == "B" and not str(kwargs.get("name")).endswith(".transfer")
            kwargs["disable"] = True
            super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]  # the library has no types here

        def update(self, n: float | None = 1) -> bool | None:
            if self._counts and n:
                advance(n)
            return None

    return Bar


def _transport_errors() -> tuple[type[BaseException], ...]:
    """Return the exceptions of a broken connection in the HTTP libraries that huggingface_hub has used so far."""
    modules = [sys.modules[name] for name in ("httpx2", "httpx", "requests.exceptions") if name in sys.modules]
    return tuple(
        getattr(module, name)
        for module in modules
        for name in ("HTTPError", "ConnectionError")
        if hasattr(module, name)
    )


_UNREACHABLE = "no such folder here, and the hub cannot be reached ({reason}): check the connection, or give a folder"
_INTERRUPTED = "the download failed ({reason}); run the same command again: files that are complete are kept"


@contextmanager
def _explained(name: str, broken: str) -> Iterator[None]:
    """Explain the errors of the hub; `broken` is the message of a broken connection, with a place for the reason."""
    from huggingface_hub import errors

    failures: tuple[type[BaseException], ...] = (OSError, *_transport_errors())
    try:
        yield
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{name}: access is restricted: accept its terms on its hub page, then log in with `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{name}: the repository has no such revision") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{name}: no such folder here and no such repository on the hub (a private one needs `hf auth login`)"
        ) from error
    except errors.HFValidationError as error:
        raise CheckpointError(f"{name}: not a valid hub id, which looks like owner/name") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise CheckpointError(
            f"{name}: no such folder here, not complete in the hub's cache, and the hub cannot be reached: "
            "check the connection and HF_HUB_OFFLINE, or give a folder"
        ) from error
    except failures as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(f"{name}: {broken.format(reason=reason)}") from error


def snapshot_id(folder: Path) -> str | None:
    """Return "OWNER/NAME@COMMIT" for the hub cache folder models--OWNER--NAME/snapshots/COMMIT; None for others."""
    folder = folder.resolve()
    repository = folder.parent.parent.name
    if folder.parent.name != "snapshots" or not repository.startswith("models--"):
        return None
    return f"{repository.removeprefix('models--').replace('--', '/', 1)}@{folder.name}"


def _wanted(file: str) -> bool:
    return not fnmatch.fnmatch(file, SUBFOLDERS) and any(fnmatch.fnmatch(file, pattern) for pattern in FILES)


def _missing_bytes(repo_id: str, revision: str | None) -> int:
    """Return the bytes that are not in the cache yet; 0 where the hub does not answer (the download will report it)."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    failures: tuple[type[BaseException], ...] = (OSError, ValueError, *_transport_errors())
    try:
        info = HfApi().model_info(repo_id, revision=revision, files_metadata=True)
    except failures:
        return 0
    files = [file for file in info.siblings or [] if _wanted(file.rfilename)]
    cached = {
        file.rfilename
        for file in files
        if isinstance(try_to_load_from_cache(repo_id, file.rfilename, revision=info.sha), str)
    }
    return sum(file.size or 0 for file in files if file.rfilename not in cached)


@dataclass(frozen=True)
class Listing:
    """A checkpoint on the hub whose weights are not here.

    Attributes:
        folder: a folder with its `SMALL_FILES`.
        commit: the commit of its files.
        sizes: bytes of each file that a download would fetch.
        missing: bytes of those that are not in the hub's cache yet.
        cache: the folder of the hub's cache.
    """

    folder: Path
    commit: str
    sizes: dict[str, int]
    missing: int
    cache: Path


def describe(repo_id: str, revision: str | None = None) -> Listing:
    """Fetch what describes the checkpoint `owner/name`, some kilobytes, and the sizes of its files.

    Raises:
        CheckpointError: huggingface_hub is not installed, or the hub cannot be asked.
    """
    name = repo_id + (f"@{revision}" if revision else "")
    try:
        import huggingface_hub
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError as error:
        raise CheckpointError(
            f"{name}: no such folder here; asking the hub about it needs huggingface_hub: {install_hint('export')}"
        ) from error
    with _explained(name, _UNREACHABLE):
        info = huggingface_hub.HfApi().model_info(repo_id, revision=revision, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or [] if _wanted(file.rfilename)}
        folder = huggingface_hub.snapshot_download(
            repo_id, revision=info.sha, allow_patterns=list(SMALL_FILES), ignore_patterns=[SUBFOLDERS]
        )
    return Listing(Path(folder), str(info.sha), sizes, _missing_bytes(repo_id, revision), Path(HF_HUB_CACHE))


def download(repo_id: str, revision: str | None = None, progress: Progress | None = None) -> tuple[Path, str]:
    """Download the files of `owner/name` that EdgeLM reads into the hub's cache, or find them there.

    Args:
        repo_id: owner/name.
        revision: branch, tag or commit; None for the default branch.
        progress: where to report the bytes downloaded.

    Returns:
        The folder, and the commit of its files.

    Raises:
        CheckpointError: huggingface_hub is not installed, or the download failed.
    """
    name = repo_id + (f"@{revision}" if revision else "")
    try:
        import huggingface_hub
    except ImportError as error:
        raise CheckpointError(
            f"{name}: no such folder here; downloading it from the hub needs huggingface_hub: {install_hint('export')}"
        ) from error
    with _explained(name, _INTERRUPTED):
        total = _missing_bytes(repo_id, revision)
        with (progress or Silent()).task(f"download {repo_id}", total) as advance:
            folder = huggingface_hub.snapshot_download(
                repo_id,
                revision=revision,
                allow_patterns=list(FILES),
                ignore_patterns=[SUBFOLDERS],
                max_workers=WORKERS,
                tqdm_class=_bar_class(advance),
            )
    return Path(folder), Path(folder).name
