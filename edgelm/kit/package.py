"""Make a kit: check that the bundle suits the platform, collect what it needs there, and write it all to one file."""

from __future__ import annotations

import calendar
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgelm.bundle import Bundle
from edgelm.errors import BundleError, EdgeLMError
from edgelm.files import prepare_output
from edgelm.kit import archives, c_parts, python_parts
from edgelm.kit.entries import Entry, check_name, of_bytes, of_file, with_sums
from edgelm.kit.readme import readme
from edgelm.progress import Progress, Silent
from edgelm.system.platforms import Platform, named
from edgelm.version import __version__

_EARLIEST = 315532800  # 1 January 1980, the first day of zip files


@dataclass(frozen=True)
class KitResult:
    """A kit that was written.

    Attributes:
        path: the file or folder.
        bytes: its size.
        unpacked_bytes: its size once unpacked.
        platform: what it is for.
        pythons: versions of Python that it has packages for; empty with the C library.
        packages: names of the wheels, or of the C library and ONNX Runtime.
        files: number of files and links.
    """

    path: Path
    bytes: int
    unpacked_bytes: int
    platform: str
    pythons: tuple[str, ...]
    packages: tuple[str, ...]
    files: int


def package(
    bundle: Bundle | Path | str,
    target: Path | str,
    *,
    platform: str,
    c: bool = False,
    pythons: Sequence[str] = (),
    dist: Path | None = None,
    wheels: Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> KitResult:
    """Write a kit: a bundle and all that a machine without a network needs to check and run it.

    Args:
        bundle: the bundle.
        target: the file to write, ending with .tar.zst, .tar.gz, .tar or .zip; or a folder.
        platform: name of the platform, such as "linux-aarch64".
        c: take the C library and the program edgelm-parity, in place of Python packages.
        pythons: versions of Python to take packages for, such as "3.11"; those of the platform's systems by default.
        dist: folder with what `make wheels` made; `dist` here or in the checkout by default.
        wheels: folder with the wheels of all other packages; by default pip downloads them.
        overwrite: replace an existing kit.
        progress: where to report progress.

    Raises:
        EdgeLMError: the bundle is damaged or cannot run there, something that it needs is missing, or the target cannot
            be written. Nothing is left behind.
    """
    place, target, progress = named(platform), Path(target), progress or Silent()
    if not isinstance(bundle, Bundle):
        bundle = Bundle.open(bundle)
    check_target(bundle, place)
    kind = archives.kit_kind(archives.suffix_of(target))
    sources = [bundle.path]
    prepare_output(target, kind, sources=sources, overwrite=overwrite)
    if archives.suffix_of(target) == ".tar.zst":
        archives.zstd_name()
    folders, created = dist_folders(dist), _time(bundle)
    if c:
        parts = c_parts.collect(bundle, place, folders, wheels, progress)
    else:
        parts = python_parts.collect(
            bundle, place, folders, wheels, python_parts.minors(bundle, place, pythons), progress
        )
    problems = bundle.verify(progress)
    if problems:
        raise BundleError(f"{bundle.path} is damaged, so nothing was packed: {'; '.join(problems[:3])}")
    entries = with_sums(
        [
            *bundle_entries(bundle),
            *parts.entries,
            of_bytes("README.md", readme(bundle, place, parts)),
            of_bytes("kit.json", parts.kit_json(bundle, place)),
        ]
    )
    archives.write_kit(
        target, check_name(f"{_safe(bundle.path.resolve().name)}-{place.name}"), entries, time=created,
        sources=sources, overwrite=overwrite, progress=progress,
    )  # fmt: skip
    unpacked = sum(entry.size for entry in entries)
    size = target.stat().st_size if target.is_file() else unpacked
    return KitResult(target, size, unpacked, place.name, tuple(parts.pythons), tuple(parts.packages), len(entries))


def check_target(bundle: Bundle, platform: Platform) -> None:
    """Check that a bundle's target exists on a platform.

    Raises:
        EdgeLMError: it does not.
    """
    target = bundle.manifest.target
    possible = {
        "cpu": True,
        "cuda": platform.name in ("linux-x86_64", "windows-x86_64"),
        "tensorrt": platform.name.startswith("linux-"),
    }
    if not possible.get(target, False):
        instead = "tensorrt or cpu" if platform.name.startswith("linux-") else "cpu"
        raise EdgeLMError(
            f"{bundle.path} is for the target {target}, which EdgeLM does not have on {platform.name}: "
            f"export it again with --target {instead}"
        )


def dist_folders(given: Path | None) -> list[Path]:
    """Return the folders in which to look for what `make wheels` made.

    Raises:
        EdgeLMError: the one given does not exist.
    """
    if given is not None:
        if not given.is_dir():
            raise EdgeLMError(f"there is no folder {given}: `make wheels` in a checkout makes it")
        return [given]
    checkout = Path(__file__).resolve().parents[2]
    found = [Path("dist")]
    if (checkout / "pyproject.toml").is_file():
        found.append(checkout / "dist")
    return found


def bundle_entries(bundle: Bundle) -> list[Entry]:
    """Return the bundle's files, as its manifest lists them."""
    entries = [
        of_file(f"bundle/{name}", bundle.file(name), info.sha256) for name, info in bundle.manifest.files.items()
    ]
    return [*entries, of_bytes("bundle/manifest.json", bundle.file("manifest.json").read_bytes())]


def _safe(name: str) -> str:
    text = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "_.+@=-") else "-" for letter in name)
    return text.lstrip("-.+@=")[:100] or "bundle"


def _time(bundle: Bundle) -> int:
    """Return the time of all files in the kit: SOURCE_DATE_EPOCH, else the bundle's creation, else a fixed one.

    Raises:
        EdgeLMError: SOURCE_DATE_EPOCH is no number of seconds.
    """
    given = os.environ.get("SOURCE_DATE_EPOCH")
    if given is not None:
        if not given.isdecimal() or len(given) > 11:
            raise EdgeLMError(f"SOURCE_DATE_EPOCH is {given!r:.40}, not a number of seconds since 1970")
        return max(int(given), _EARLIEST)
    try:
        created = calendar.timegm(time.strptime((bundle.manifest.created or "")[:19], "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return _EARLIEST
    return max(created, _EARLIEST)


def document(result: KitResult) -> dict[str, Any]:
    """Return the result for JSON."""
    return {
        "kit": str(result.path),
        "bytes": result.bytes,
        "unpacked_bytes": result.unpacked_bytes,
        "platform": result.platform,
        "pythons": list(result.pythons),
        "packages": list(result.packages),
        "files": result.files,
        "edgelm": __version__,
    }
