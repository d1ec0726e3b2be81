"""Parts of a kit for C: the archive of `make wheels`, ONNX Runtime's library from its wheel, and the check."""

from __future__ import annotations

import posixpath
import re
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from edgelm.bundle import Bundle
from edgelm.errors import EdgeLMError
from edgelm.kit.entries import Entry, check_name, of_bytes
from edgelm.kit.parts import Parts, template
from edgelm.kit.wheels import Target, Wheel, WheelSource, need_packaging
from edgelm.progress import Progress
from edgelm.system.platforms import Platform
from edgelm.version import __version__

FOLDER = "libedgelm"
"""Folder of the C library in a kit."""
_MOST = 256 << 20  # bytes of the C archive, unpacked


def collect(bundle: Bundle, platform: Platform, dist: Sequence[Path], wheels: Path | None, progress: Progress) -> Parts:
    """Return the parts of a kit for C.

    Args:
        bundle: the bundle that the kit is for.
        platform: the platform.
        dist: folders in which the C archive may be.
        wheels: the only folder with ONNX Runtime's wheel; None for the cache and pip.
        progress: where to report progress.

    Raises:
        EdgeLMError: the archive or the wheel is missing, damaged, or not what it should be.
    """
    name = f"edgelm-{__version__}-{platform.name}.tar.gz"
    archive = next((folder / name for folder in dist if (folder / name).is_file()), None)
    if archive is None:
        raise EdgeLMError(
            f"there is no {name} in {' or '.join(map(str, dist))}: make wheels PLATFORMS={platform.name} in a checkout "
            "makes it; --dist names another folder"
        )
    if bundle.manifest.target == "cuda":
        raise EdgeLMError(f"libedgelm does not run bundles for the target cuda, as {bundle.path} is: leave out --c")
    entries = list(_unpacked(archive))
    program = f"{FOLDER}/bin/edgelm-parity{'.exe' if platform.name.startswith('windows-') else ''}"
    if program not in {entry.name for entry in entries}:
        raise EdgeLMError(f"{archive} has no {program.removeprefix(f'{FOLDER}/')}: make it again")
    packages, glibc = [name], (2, 17)
    if bundle.manifest.target == "cpu":
        wheel = _onnxruntime(platform, wheels, progress)
        entries += _library(wheel, platform)
        packages.append(wheel.path.name)
        glibc = max(glibc, wheel.glibc or glibc)
    entries.append(_script(platform, "{}.{}".format(*glibc)))
    check = "powershell -NoProfile -ExecutionPolicy Bypass -File check.ps1"
    return Parts(entries, packages, check if platform.name.startswith("windows-") else "sh check.sh", {}, c=True)


def _script(platform: Platform, glibc: str) -> Entry:
    if platform.name.startswith("windows-"):
        return of_bytes("check.ps1", template("check.ps1").replace("\n", "\r\n"))
    system, _, cpu = platform.name.partition("-")
    machine = f"{ {'linux': 'Linux', 'macos': 'Darwin'}[system] } {cpu}"
    text = template("check-c.sh", PLATFORM=platform.name, MACHINE=machine, GLIBC=glibc)
    return of_bytes("check.sh", text, executable=True)


def _unpacked(archive: Path) -> Iterator[Entry]:
    """Yield the files of the C archive under `FOLDER`; its own folder is left out.

    Raises:
        EdgeLMError: it is damaged, or holds what leads out of its folder.
    """
    found: dict[str, Entry] = {}
    links: dict[str, str] = {}
    total = 0
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for info in tar:
                _, _, inner = info.name.partition("/")
                total += info.size
                if info.isdir() or not inner:
                    continue
                name = check_name(f"{FOLDER}/{inner}")
                stream = tar.extractfile(info) if info.isreg() and total < _MOST else None
                if info.issym():
                    links[name] = info.linkname
                elif stream is None:
                    raise EdgeLMError(f"{archive}: {info.name!r:.120} is neither a file nor a link: make it again")
                else:
                    found[name] = of_bytes(name, stream.read(), executable=bool(info.mode & 0o100))
    except (tarfile.TarError, OSError, EOFError) as error:
        raise EdgeLMError(f"{archive} is damaged ({error}): make it again") from error
    yield from found.values()
    for name, target in links.items():
        yield Entry(name, target, 0, _end_of(name, links, found, archive).sha256)


def _end_of(name: str, links: dict[str, str], found: dict[str, Entry], archive: Path) -> Entry:
    """Return the file that a link leads to."""
    at = name
    for _ in range(8):
        if at in found:
            return found[at]
        if at not in links:
            break
        at = posixpath.normpath(posixpath.join(posixpath.dirname(at), links[at]))
    raise EdgeLMError(f"{archive}: the link {name} leads to no file in it: make it again")


def _onnxruntime(platform: Platform, wheels: Path | None, progress: Progress) -> Wheel:
    need_packaging()
    from packaging.requirements import Requirement

    (wheel,) = WheelSource(wheels, progress).get(
        [Requirement("onnxruntime>=1.31.1")], Target(platform, platform.python)
    )
    wheel.metadata()  # is the file whole?
    return wheel


def _library(wheel: Wheel, platform: Platform) -> list[Entry]:
    """Return ONNX Runtime's library from its wheel, where libedgelm looks for it: beside itself; and its licences."""
    pattern, name = {
        "linux": (r"libonnxruntime\.so\.[\d.]+", "lib/libonnxruntime.so.1"),
        "macos": (r"libonnxruntime\.[\d.]+\.dylib", "lib/libonnxruntime.1.dylib"),
        "windows": (r"onnxruntime\.dll", "bin/onnxruntime.dll"),
    }[platform.name.partition("-")[0]]
    with zipfile.ZipFile(wheel.path) as archive:
        names = archive.namelist()
        found = [one for one in names if re.fullmatch(rf"(.*/)?onnxruntime/capi/{pattern}", one)]
        if len(found) != 1:
            raise EdgeLMError(f"{wheel.path} has no single library of ONNX Runtime: {', '.join(found) or 'none'}")
        licences = [one for one in names if re.fullmatch(r"(.*/)?onnxruntime/(LICENSE|ThirdPartyNotices\.txt)", one)]
        places = {found[0]: name, **{one: f"licenses/onnxruntime/{posixpath.basename(one)}" for one in licences}}
        return [of_bytes(f"{FOLDER}/{place}", archive.read(one)) for one, place in places.items()]
