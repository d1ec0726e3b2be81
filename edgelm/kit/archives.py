"""Writing of kits as .tar, .tar.gz, .tar.zst, .zip or a folder: as a stream, and with the same bytes each time."""

from __future__ import annotations

import contextlib
import gzip
import importlib
import importlib.util
import os
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import gmtime
from typing import Any, BinaryIO, cast

from edgelm.errors import EdgeLMError
from edgelm.files import atomic_directory, atomic_file, require_disk_space
from edgelm.kit.entries import SUMS, Entry
from edgelm.output_paths import OutputKind, first_unlisted
from edgelm.progress import Progress, Silent

SUFFIXES = (".tar.zst", ".tar.gz", ".tar", ".zip")
"""Suffixes of kits in one file, the longest first. A kit without a suffix is a folder."""
_OTHER_SUFFIXES = (".tgz", ".tzst", ".txz", ".tbz2", ".zst", ".gz", ".xz", ".bz2", ".7z", ".rar")
MADE_THERE = ("env/", "report.json", "report.html", "edgelm", "edgelm.cmd")
"""What check.sh makes in a kit's folder. A name with a slash stands for all in that folder."""
_MEMORY = 1 << 20
# Weights hardly become smaller: a higher level costs minutes and gains little (docs/devices/kit.md).
_GZIP_LEVEL, _ZSTD_LEVEL, _ZSTD_THREADS = 1, 3, 2


def suffix_of(target: Path) -> str:
    """Return the suffix that decides how a kit is written; "" for a folder.

    Raises:
        EdgeLMError: there is a suffix of another kind.
    """
    name = target.name.lower()
    known = next((suffix for suffix in SUFFIXES if name.endswith(suffix) and name != suffix), None)
    if known is not None:
        return known
    other = next((end for end in _OTHER_SUFFIXES if name.endswith(end)), None)
    if other is not None:
        raise EdgeLMError(f"{target}: a kit is no {other} file; it ends with {', '.join(SUFFIXES)}, or is a folder")
    return ""


def kit_kind(suffix: str) -> OutputKind:
    """Return the kind of output of a kit with this suffix, which tells whether a file or folder is a kit."""
    if not suffix:
        return OutputKind("a kit", _unknown_in_folder)
    return OutputKind("a kit", lambda place: None if _begins_as_kit(place, suffix) else "is no kit", is_folder=False)


def write_kit(
    target: Path,
    folder: str,
    entries: Sequence[Entry],
    *,
    time: int,
    sources: Sequence[Path],
    overwrite: bool,
    progress: Progress | None = None,
) -> None:
    """Write a kit, complete or not at all.

    Args:
        target: what to write; its suffix decides how.
        folder: name of the folder in the archive.
        entries: what the kit holds, SHA256SUMS first.
        time: time of all files, seconds since 1970.
        sources: inputs, which must not be overwritten.
        overwrite: replace an existing kit.
        progress: where to report progress, in bytes of contents.

    Raises:
        EdgeLMError: the target cannot be used, the disk is too small, or what compresses it is not installed.
    """
    suffix = suffix_of(target)
    kind, total = kit_kind(suffix), sum(entry.size for entry in entries)
    require_disk_space(target, total + _MEMORY)
    if suffix == ".tar.zst":
        zstd_name()
    with (progress or Silent()).task("packing", total) as advance:
        if not suffix:
            with atomic_directory(target, kind, sources=sources, overwrite=overwrite) as partial:
                _write_folder(partial, entries, time, advance)
            return
        with atomic_file(target, kind, sources=sources, overwrite=overwrite) as partial, partial.open("wb") as file:
            if suffix == ".zip":
                _write_zip(file, folder, entries, time, advance)
            else:
                with _compressed(file, suffix) as stream:
                    _write_tar(stream, folder, entries, time, advance)


def zstd_name() -> str:
    """Return what compresses with Zstandard here: the module of Python 3.14, the package or the program.

    Raises:
        EdgeLMError: there is none of them.
    """
    with contextlib.suppress(ModuleNotFoundError):
        if importlib.util.find_spec("compression.zstd") is not None:
            return "compression.zstd"
    if importlib.util.find_spec("zstandard") is not None:
        return "zstandard"
    if shutil.which("zstd"):
        return "zstd"
    raise EdgeLMError(
        "nothing here compresses to .tar.zst: write to .tar.gz or .tar, or install zstd "
        "(apt install zstd, or pip install zstandard)"
    )


@contextlib.contextmanager
def _compressed(file: BinaryIO, suffix: str) -> Iterator[BinaryIO]:
    """Yield a stream that compresses to `file`."""
    if suffix == ".tar":
        yield file
    elif suffix == ".tar.gz":
        with gzip.GzipFile("", "wb", _GZIP_LEVEL, file, mtime=0) as stream:
            yield cast(BinaryIO, stream)
    else:
        with _zstd(file) as stream:
            yield stream


@contextlib.contextmanager
def _zstd(file: BinaryIO) -> Iterator[BinaryIO]:
    name = zstd_name()
    if name == "zstd":
        command = ["zstd", "--quiet", "--stdout", f"-{_ZSTD_LEVEL}", f"-T{_ZSTD_THREADS}", "-"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=file) as process:
            assert process.stdin is not None
            try:
                yield cast(BinaryIO, process.stdin)
                process.stdin.close()
            except BrokenPipeError:
                pass  # its exit code tells
            except BaseException:
                process.kill()
                raise
            if process.wait():
                raise EdgeLMError(f"zstd failed (exit code {process.returncode}): write to .tar.gz or .tar")
        return
    module: Any = importlib.import_module(name)
    if name == "zstandard":
        with module.ZstdCompressor(level=_ZSTD_LEVEL, threads=_ZSTD_THREADS).stream_writer(file, closefd=False) as out:
            yield out
    else:
        parameter = module.CompressionParameter
        options = {parameter.compression_level: _ZSTD_LEVEL, parameter.nb_workers: _ZSTD_THREADS}
        with module.ZstdFile(file, "wb", options=options) as out:
            yield out


def _write_tar(
    stream: BinaryIO, folder: str, entries: Sequence[Entry], time: int, advance: Callable[[float], None]
) -> None:
    # The format that GNU tar, bsdtar and busybox read, with files of any size. Without TarFile: it copies the contents
    # from files by itself, and here they are hashed on the way.
    for entry in entries:
        info = tarfile.TarInfo(f"{folder}/{entry.name}")
        info.mtime, info.mode, info.size = time, 0o755 if entry.executable else 0o644, entry.size
        info.uname = info.gname = "root"
        if isinstance(entry.source, str):
            info.type, info.linkname, info.mode = tarfile.SYMTYPE, entry.source, 0o777
        stream.write(info.tobuf(tarfile.GNU_FORMAT, "ascii", "strict"))
        if not entry.is_link:
            entry.write_to(stream, advance)
            stream.write(bytes(-entry.size % tarfile.BLOCKSIZE))
    stream.write(bytes(2 * tarfile.BLOCKSIZE))  # the end of the archive


def _write_zip(
    file: BinaryIO, folder: str, entries: Sequence[Entry], time: int, advance: Callable[[float], None]
) -> None:
    date = max(gmtime(time)[:6], (1980, 1, 1, 0, 0, 0))
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=_GZIP_LEVEL) as archive:
        for entry in entries:
            info = zipfile.ZipInfo(f"{folder}/{entry.name}", date)
            info.create_system = 3  # Unix: permissions are in external_attr
            mode = 0o120777 if entry.is_link else 0o100755 if entry.executable else 0o100644
            info.external_attr, info.compress_type = mode << 16, zipfile.ZIP_DEFLATED
            if isinstance(entry.source, str):
                archive.writestr(info, entry.source)
                continue
            info.file_size = entry.size
            with archive.open(info, "w", force_zip64=entry.size > (1 << 31)) as stream:
                entry.write_to(cast(BinaryIO, stream), advance)


def _write_folder(target: Path, entries: Sequence[Entry], time: int, advance: Callable[[float], None]) -> None:
    for entry in entries:
        path = target / entry.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(entry.source, str):
            path.symlink_to(entry.source)
            continue
        with path.open("wb") as stream:
            entry.write_to(stream, advance)
        path.chmod(0o755 if entry.executable else 0o644)
        os.utime(path, (time, time))


def _unknown_in_folder(folder: Path) -> str | None:
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return f"is no kit (it has no {SUMS})"
    listed = {line[66:] for line in lines}
    if "kit.json" not in listed:
        return f"is no kit (its {SUMS} does not list kit.json)"
    known = (SUMS, *MADE_THERE)

    def is_known(name: str) -> bool:
        return name in listed or any(name.startswith(one) if one.endswith("/") else name == one for one in known)

    name = first_unlisted(folder, is_known)
    return None if name is None else f"holds {name}, which is not of the kit"


def _begins_as_kit(place: Path, suffix: str) -> bool:
    """Return whether the first file in an archive is SHA256SUMS and lists kit.json."""
    try:
        with place.open("rb") as file:
            if suffix == ".zip":
                with zipfile.ZipFile(file) as archive:
                    first = archive.infolist()[0]
                    return _lists_kit(first.filename, archive.read(first)) if first.file_size < _MEMORY else False
            with _decompressed(file, suffix) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
                info = tar.next()
                member = None if info is None or info.size >= _MEMORY else tar.extractfile(info)
                return info is not None and member is not None and _lists_kit(info.name, member.read())
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, ValueError, IndexError, gzip.BadGzipFile):
        return False


def _lists_kit(name: str, sums: bytes) -> bool:
    return name.endswith(f"/{SUMS}") and b"  kit.json\n" in sums


@contextlib.contextmanager
def _decompressed(file: BinaryIO, suffix: str) -> Iterator[BinaryIO]:
    if suffix == ".tar":
        yield file
        return
    if suffix == ".tar.gz":
        with gzip.GzipFile(fileobj=file) as stream:
            yield cast(BinaryIO, stream)
        return
    name = zstd_name()
    if name == "zstd":
        with subprocess.Popen(
            ["zstd", "-dcq", "-"], stdin=file, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            assert process.stdout is not None
            try:
                yield cast(BinaryIO, process.stdout)
            finally:
                process.kill()
        return
    module: Any = importlib.import_module(name)
    try:
        with module.ZstdDecompressor().stream_reader(file) if name == "zstandard" else module.ZstdFile(file) as out:
            yield out
    except module.ZstdError as error:
        raise tarfile.ReadError(str(error)) from error
