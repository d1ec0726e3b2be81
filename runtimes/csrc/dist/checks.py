"""What every library and program that ships must satisfy; each function returns what is wrong, as sentences."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from edgelm.system.platforms import Platform
from edgelm.runtimes.csrc.dist import binaries
from edgelm.runtimes.csrc.dist.binaries import Binary

_MODULES = ("edgelm/quant/_edgelm_quant", "edgelm/runtimes/_edgelm_ops", "edgelm/runtimes/libedgelm_plugins")

OLDEST_GLIBC = (2, 17)
_FORMATS = {"linux": "ELF", "macos": "Mach-O", "windows": "PE"}
_NEEDS = {
    "linux": r"lib(c|m)\.so\.6|lib(pthread)\.so\.0|libdl\.so\.2|librt\.so\.1"
    r"|ld-linux-(x86-64\.so\.2|aarch64\.so\.1)|libedgelm\.so\.\d+",
    "macos": r"/usr/lib/libSystem\.B\.dylib|@rpath/libedgelm\.\d+\.dylib",
    "windows": r"(?i)(kernel32|shell32|ntdll|advapi32|ucrtbase|(lib)?edgelm|api-ms-win-crt-[\w-]+)\.dll",
}
"""Libraries that the files of a system may need: those of every installation of it, and our own."""


def wheel_libraries(platform: Platform) -> set[str]:
    """Return what a wheel has beside the files of the pure wheel."""
    suffix = ".dll" if platform.name.startswith("windows") else ".so"
    return {name + suffix for name in _MODULES}


def exported(root: Path) -> dict[str, frozenset[str]]:
    """Return what each library has to export, by the start of its file name, from the sources.

    Args:
        root: the checkout.
    """
    sources = root / "runtimes" / "csrc"

    def names(mark: str, *files: str) -> frozenset[str]:
        text = "\n".join((sources / file).read_text(encoding="utf-8") for file in files)
        return frozenset(re.findall(rf'^(?:extern "C" )?{mark} [^(;]*?\b(\w+)\(', text, re.MULTILINE))

    default = r'(?:EDGELM_EXPORT|__attribute__\(\(visibility\("default"\)\)\))'
    return {
        "_edgelm_quant": names("EDGELM_EXPORT", "quantize.h"),
        "_edgelm_ops": names("EDGELM_EXPORT", "kernels/cpu.h", "ort/operators/exports.cc", "ort/measure.h"),
        "libedgelm_plugins": names(default, "cuda/host/exports.cc", "cuda/tensorrt/exports.cc"),
        "libedgelm": names("EDGELM_API", "capi/edgelm.h"),
        "edgelm-parity": frozenset(),
    }


def check_binary(name: str, binary: Binary, platform: Platform, expected: frozenset[str]) -> list[str]:
    """Return what is wrong with a library or program.

    Args:
        name: file name, for the sentences.
        binary: what was read from the file.
        platform: what it is for.
        expected: the names that it has to export, and no others.
    """
    system, _, cpu = platform.name.partition("-")
    cpu = {"arm64": "aarch64"}.get(cpu, cpu)
    if (binary.format, binary.cpu) != (_FORMATS[system], cpu):
        return [f"{name}: is {binary.format} for {binary.cpu}, expected {_FORMATS[system]} for {cpu}"]
    problems = [
        f"{name}: needs {library}, which not every {system} system has"
        for library in binary.needs
        if not re.fullmatch(_NEEDS[system], library)
    ]
    if binary.glibc is not None and binary.glibc > OLDEST_GLIBC:
        problems.append(f"{name}: needs glibc {'.'.join(map(str, binary.glibc))}, expected 2.17 or older")
    if surplus := binary.exports - expected:
        problems.append(f"{name}: exports {_some(surplus)}, which no header declares")
    if missing := expected - binary.exports:
        problems.append(f"{name}: does not export {_some(missing)}")
    if binary.executable_stack:
        problems.append(f"{name}: does not refuse an executable stack")
    if system == "macos" and not binary.signed:
        problems.append(f"{name}: has no signature, and macOS on Arm runs nothing without one")
    problems += [
        f"{name}: the loader would look in {path}, which is no place beside the file"
        for path in binary.rpaths
        if not path.startswith(("$ORIGIN", "@loader_path"))
    ]
    return problems


def check_paths(name: str, content: bytes, folders: Iterable[Path]) -> list[str]:
    """Return the folders of the build machine that stand in a file, as sentences."""
    return [
        f"{name}: has the path {folder} of the build machine inside"
        for folder in folders
        if len(str(folder)) > len("/tmp") and str(folder).encode() in content
    ]


def check_wheel_files(names: Iterable[str], pure: Iterable[str], platform: Platform) -> list[str]:
    """Return how a wheel's list of files differs from the pure wheel's and the libraries."""
    found, expected = set(names), set(pure) | wheel_libraries(platform)
    return [f"the wheel lacks {name}" for name in sorted(expected - found)] + [
        f"the wheel has {name}, which the pure wheel has not" for name in sorted(found - expected)
    ]


def check_archive_files(names: Iterable[str], platform: Platform) -> list[str]:
    """Return what an archive lacks of what its README promises, as sentences."""
    library = {"linux": "lib/libedgelm.so", "macos": "lib/libedgelm.dylib", "windows": "bin/(lib)?edgelm.dll"}
    suffix = r"\.exe" if platform.name.startswith("windows") else ""
    patterns = [
        library[platform.name.partition("-")[0]].replace(".", r"\."), f"bin/edgelm-parity{suffix}",
        r"include/edgelm/edgelm\.h", r"include/edgelm/edgelm\.hpp", r"lib/cmake/edgelm/edgelmConfig\.cmake",
        r"lib/pkgconfig/edgelm\.pc", "LICENSE", r"README\.md",
    ]  # fmt: skip
    found = list(names)
    return [
        f"the archive lacks {pattern}"
        for pattern in patterns
        if not any(re.fullmatch(rf"[^/]+/{pattern}", name) for name in found)
    ]


def check_wheel(wheel: Path, pure: Path, platform: Platform, root: Path, folders: Iterable[Path]) -> list[str]:
    """Return what is wrong with a wheel: its files, its libraries, and for Linux auditwheel's policy.

    Args:
        wheel: the wheel.
        pure: the wheel without compiled libraries of the same version.
        platform: what it is for.
        root: the checkout.
        folders: folders of the build machine whose names may not be inside.
    """
    with zipfile.ZipFile(wheel) as ours, zipfile.ZipFile(pure) as other:
        problems = check_wheel_files(ours.namelist(), other.namelist(), platform)
        libraries = {name: ours.read(name) for name in sorted(wheel_libraries(platform) & set(ours.namelist()))}
    problems += _check_files(libraries, platform, root, folders)
    if platform.name.startswith("linux"):
        problems += check_policy(wheel, platform)
    return problems


def check_archive(archive: Path, platform: Platform, root: Path, folders: Iterable[Path]) -> list[str]:
    """Return what is wrong with a C archive: its files, its library and its program. Arguments as of `check_wheel`."""
    with tarfile.open(archive) as tar:
        members = tar.getmembers()
        problems = check_archive_files((member.name for member in members), platform)
        files = {}
        for member in members:
            content = tar.extractfile(member) if member.isfile() else None
            if content is not None:
                files[member.name] = content.read()
    folders = list(folders)
    libraries = {name: content for name, content in files.items() if _is_binary(content)}
    problems += _check_files(libraries, platform, root, folders)
    texts = sorted(set(files) - set(libraries))
    return problems + [problem for name in texts for problem in check_paths(name, files[name], folders)]


def check_policy(wheel: Path, platform: Platform) -> list[str]:
    """Return how a wheel breaks auditwheel's policy of its tag, as sentences."""
    command = [sys.executable, "-m", "auditwheel", "show", str(wheel)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    tag = platform.wheel_tag.partition(".")[0]
    text = " ".join(ran.stdout.split())
    found = re.search(r'consistent with the following platform tag: "(\w+)"', text)
    if found is None or found[1] != tag:
        return [f"{wheel.name}: auditwheel expects {found[1] if found else 'something else'}, not {tag}: "
                f"{text or ran.stderr.strip()}"]  # fmt: skip
    return []


def _is_binary(content: bytes) -> bool:
    return content[:4] in {b"\x7fELF", b"\xcf\xfa\xed\xfe"} or content[:2] == b"MZ"


def _check_files(libraries: dict[str, bytes], platform: Platform, root: Path, folders: Iterable[Path]) -> list[str]:
    names = exported(root)
    folders = list(folders)
    problems = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, content in libraries.items():
            base = PurePosixPath(name).name
            copy = Path(scratch) / base
            copy.write_bytes(content)
            stem = base.partition(".")[0]
            expected = names["libedgelm" if stem == "edgelm" else stem]  # Windows has no prefix
            problems += check_binary(base, binaries.read(copy), platform, expected)
            problems += check_paths(base, content, folders)
    return problems


def _some(names: Iterable[str], most: int = 5) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:most]) + (f" and {len(ordered) - most} more" if len(ordered) > most else "")
