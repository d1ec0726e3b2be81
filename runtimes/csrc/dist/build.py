"""`make wheels`: a wheel and a C archive for each platform, cross-compiled by zig's clang, then checked.

    python runtimes/csrc/dist/build.py [PLATFORM ...] [--out FOLDER] [--reproducible] [--no-smoke]

Beside them the pure wheel, the sources, a bill of materials and SHA256SUMS, in dist/. What a wheel holds is described
in pyproject.toml, what an archive holds by CMake's component `edgelm`; build folders are build/dist/PLATFORM.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import scikit_build_core.build as backend

from edgelm.errors import EdgeLMError
from edgelm.system.platforms import PLATFORMS, Platform, named, this_platform
from edgelm.runtimes.csrc.dist import archive, checks, sbom
from edgelm.runtimes.csrc.dist.smoke import smoke

ROOT = Path(__file__).resolve().parents[3]
ZIG = Path(str(metadata.distribution("ziglang").locate_file("ziglang/zig")))


def version_of(root: Path) -> str:
    """Return the version of a checkout."""
    line = next(line for line in (root / "pyproject.toml").read_text().splitlines() if line.startswith("version = "))
    return line.split('"')[1]


def epoch_of(root: Path) -> int:
    """Return the time that files get: SOURCE_DATE_EPOCH, otherwise that of the last commit, in seconds since 1970.

    Raises:
        EdgeLMError: there is neither.
    """
    if given := os.environ.get("SOURCE_DATE_EPOCH"):
        return int(given)
    command = ["git", "-C", str(root), "log", "-1", "--format=%ct"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise EdgeLMError(f"{root} is no git checkout: set SOURCE_DATE_EPOCH to the time that the files shall have")
    return int(ran.stdout)


@contextmanager
def _environment(root: Path, **values: str) -> Iterator[None]:
    """Set variables and the working directory meanwhile: scikit-build-core's hooks read both."""
    saved, folder = dict(os.environ), Path.cwd()
    os.environ.update(values)
    os.chdir(root)
    try:
        yield
    finally:
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(saved)


def build_wheel(root: Path, platform: Platform, out: Path) -> Path:
    """Cross-compile what a wheel holds, and return the wheel."""
    settings = {
        "build-dir": str(root / "build" / "dist" / platform.name),
        "wheel.tags": f"py3-none-{platform.wheel_tag}",
        "install.strip": "false",  # the linker leaves symbols out; this machine's strip knows its own format only
        "cmake.define.CMAKE_TOOLCHAIN_FILE": str(root / "runtimes" / "csrc" / "cmake" / "zig.cmake"),
        "cmake.define.EDGELM_ZIG": str(ZIG),
        "cmake.define.EDGELM_TARGET": platform.zig,
    }
    with _environment(root):
        return out / backend.build_wheel(str(out), dict(settings))


def build_archive(root: Path, platform: Platform, out: Path, version: str, epoch: int) -> Path:
    """Build the C library in the wheel's build folder, and return the archive of what it installs."""
    build = root / "build" / "dist" / platform.name
    stage = root / "build" / "dist" / "stage" / f"edgelm-{version}-{platform.name}"
    shutil.rmtree(stage, ignore_errors=True)
    jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", "2")
    for command in (
        ["cmake", "--build", str(build), "--parallel", jobs, "--target", "edgelm", "edgelm_parity"],
        ["cmake", "--install", str(build), "--component", "edgelm", "--prefix", str(stage)],
    ):
        subprocess.run(command, check=True, stdout=sys.stderr)
    shutil.copyfile(root / "LICENSE", stage / "LICENSE")
    (stage / "README.md").write_text(archive.readme(platform, version), encoding="utf-8")
    target = out / f"{stage.name}.tar.gz"
    archive.write_archive(stage, target, epoch)
    return target


def build_all(root: Path, platforms: list[Platform], out: Path) -> list[Path]:
    """Build and check everything into a folder, and return the files.

    Raises:
        EdgeLMError: a check failed; the message lists what is wrong with each file.
    """
    version, epoch = version_of(root), epoch_of(root)
    out.mkdir(parents=True, exist_ok=True)
    # What CMake finds in the environment would stand in the libraries.
    with _environment(root, SOURCE_DATE_EPOCH=str(epoch), CXXFLAGS="", CFLAGS="", LDFLAGS=""):
        with _environment(root, EDGELM_PURE="1"):
            pure = out / backend.build_wheel(str(out))
            files = [pure, out / backend.build_sdist(str(out))]
        problems = []
        folders = [root, Path.home(), ZIG.parent, Path(sys.prefix)]
        for platform in platforms:
            start = time.monotonic()
            wheel = build_wheel(root, platform, out)
            packed = build_archive(root, platform, out, version, epoch)
            print(f"{platform.name}: built in {time.monotonic() - start:.0f} s", file=sys.stderr)
            problems += checks.check_wheel(wheel, pure, platform, root, folders)
            problems += checks.check_archive(packed, platform, root, folders)
            files += [wheel, packed]
    if problems:
        raise EdgeLMError("these files cannot ship:\n  " + "\n  ".join(problems))
    bill = out / f"edgelm-{version}.cdx.json"
    bill.write_text(json.dumps(sbom.bill(version, files, epoch), indent=1) + "\n", encoding="utf-8")
    return [*files, bill]


def write_sums(files: list[Path], out: Path) -> Path:
    """Write SHA256SUMS, for `sha256sum --check`, and return it."""
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in sorted(files)]
    sums = out / "SHA256SUMS"
    sums.write_text("".join(lines), encoding="utf-8")
    return sums


def committed(root: Path) -> str:
    """Return the last commit of a checkout.

    Raises:
        EdgeLMError: it is no git checkout, or has changes that are not committed.
    """

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True).stdout

    try:
        changes = git("status", "--porcelain")
        if not changes:
            return git("rev-parse", "HEAD").strip()
    except subprocess.CalledProcessError as error:
        raise EdgeLMError(f"{root}: --reproducible builds a commit twice: {error.stderr.strip()}") from error
    raise EdgeLMError(f"{root} has changes that are not committed, and --reproducible builds a commit twice: "
                      f"commit them, or put them aside\n{changes.rstrip()}")  # fmt: skip


def differences(root: Path, commit: str, platforms: list[Platform], files: list[Path], work: Path) -> list[str]:
    """Build a commit again, in another folder, and return the names of the files that differ.

    Args:
        root: the checkout.
        commit: what `files` were built from.
        platforms: those that were built.
        files: what was built.
        work: the other folder; made again.
    """
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    subprocess.run(["git", "clone", "--quiet", "--shared", str(root), str(work / "edgelm")], check=True)
    subprocess.run(["git", "-C", str(work / "edgelm"), "checkout", "--quiet", commit], check=True)
    build_all(work / "edgelm", platforms, work / "dist")
    return [path.name for path in files if path.read_bytes() != (work / "dist" / path.name).read_bytes()]


def main() -> None:
    """Parse the command line, build, check, and print the sizes."""
    parser = argparse.ArgumentParser(prog="make wheels", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("platforms", nargs="*", metavar="PLATFORM", help=f"default: all, {', '.join(PLATFORMS)}")
    parser.add_argument("--reproducible", action="store_true", help="build twice, and compare the bytes")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", metavar="FOLDER", help="default: dist")
    parser.add_argument("--no-smoke", action="store_true", help="do not run what is for this machine")
    options = parser.parse_args()
    out = options.out.resolve()
    try:
        platforms = [named(name) for name in options.platforms] or list(PLATFORMS.values())
        commit = committed(ROOT) if options.reproducible else ""
        files = build_all(ROOT, platforms, out)
        here = this_platform()
        if here in platforms and here is not None and not options.no_smoke:
            place = 2 + 2 * platforms.index(here)
            for line in smoke(ROOT, files[0], files[place], files[place + 1], ROOT / "build" / "dist" / "smoke"):
                print(f"{here.name}: {line}")
        if options.reproducible:
            if changed := differences(ROOT, commit, platforms, files, ROOT / "build" / "dist" / "again"):
                raise EdgeLMError(f"a second build gave other bytes: {', '.join(changed)}")
            print(f"a second build in another folder gave the same bytes: {len(files)} files")
    except (EdgeLMError, RuntimeError, subprocess.CalledProcessError) as error:
        sys.exit(f"make wheels: {error}")
    write_sums(files, out)
    for path in files:
        print(f"{path.stat().st_size / 1e6:8.2f} MB  {options.out.name}/{path.name}")


if __name__ == "__main__":
    main()
