"""Downloading a checkpoint from the Hugging Face hub, with progress; an interrupted download resumes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgelm.errors import CheckpointError
from edgelm.progress import Advance, Progress, Silent

# Only what is read: pickled copies of the weights, ONNX exports and pictures stay on the hub.
FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer.model", "*.jinja"]
IGNORED = ["*/*"]


def _bar_class(advance: Advance) -> type[Any]:
    """A stand-in for tqdm that hands the bytes it is told of to `advance`."""
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        """Counts bytes only: the library also makes a bar that counts files."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._bytes = kwargs.get("unit") == "B"
            kwargs["disable"] = True
            super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]  # the library has no types here

        def update(self, n: float | None = 1) -> bool | None:
            if self._bytes and n:
                advance(n)
            return None

    return Bar


@contextmanager
def _explained(repo_id: str, revision: str | None) -> Iterator[None]:
    from huggingface_hub import errors

    name = repo_id + (f"@{revision}" if revision else "")
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
            f"{name}: no such folder here, and the hub cannot be reached; "
            "check the connection and HF_HUB_OFFLINE, or give a folder"
        ) from error


def download(repo_id: str, revision: str | None = None, progress: Progress | None = None) -> tuple[Path, str]:
    """Download what EdgeLM reads of `owner/name` into the hub's cache, or find it there.

    Returns:
        The folder and the commit it is at.

    Raises:
        CheckpointError: huggingface_hub is not installed, or the repository cannot be had; says why.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise CheckpointError(
            f"{repo_id}: no such folder here; downloading it from the hub needs huggingface_hub: "
            "pip install 'edgelm[export]'"
        ) from error
    with _explained(repo_id, revision), (progress or Silent()).task(f"download {repo_id}", 0) as advance:
        folder = Path(
            huggingface_hub.snapshot_download(
                repo_id,
                revision=revision,
                allow_patterns=FILES,
                ignore_patterns=IGNORED,
                tqdm_class=_bar_class(advance),
            )
        )
    return folder, folder.name
