"""Checks a machine with the kit in this folder. check.sh starts it; it needs Python's standard library alone.

It checks the hashes of all files, unpacks the wheels into env/ (a wheel is a zip file, so neither pip nor venv is
needed), shows what EdgeLM finds here, runs the parity check and generates a few words. It writes into this folder only.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import platform
import re
import runpy
import shutil
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SUMS, ENV = "SHA256SUMS", "env"
CHUNK = 8 << 20
MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}
SYSTEMS = {"linux": "linux", "darwin": "macos", "win32": "windows"}
LINE = re.compile(r"([0-9a-f]{64})  (.+)")


class KitError(Exception):
    """What is wrong, and what to do about it."""


def main() -> int:
    """Check this machine; return the exit code, 0 only if the parity check passed."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="replace", line_buffering=True)  # type: ignore[union-attr]
    try:
        kit = read_kit()
        step("files", check_files())
        python = f"{sys.version_info[0]}.{sys.version_info[1]}"
        step("machine", check_machine(kit, python))
        folder = HERE / ENV / python
        step("packages", unpack(kit["pythons"][python], folder))
        use(folder)
        write_launcher(folder)
        step("doctor", "what EdgeLM finds here\n")
        if command("doctor"):
            raise KitError("EdgeLM cannot run this bundle here: the lines above say what is missing")
        step("parity", "does this machine compute what PyTorch computed?\n")
        passed = parity()
        if passed:
            step("text", "the first words that it writes\n")
            command("run", str(HERE / "bundle"), "Once upon a time", "-n", "16", "-t", "0")
    except KitError as problem:
        print(f"\ncheck: {problem}", file=sys.stderr)
        return 1
    print()
    if not passed:
        print("The parity check FAILED: do not use the model on this machine. report.html shows where it differs.")
        return 1
    print("The parity check passed. report.html and report.json tell more.")
    print(f'Use it: {"edgelm.cmd" if os.name == "nt" else "./edgelm"} run bundle "Once upon a time"')
    return 0


def step(name: str, said: str) -> None:
    """Print what a step found."""
    print(f"{name:<10}{said}")


def read_kit() -> dict[str, Any]:
    """Return kit.json."""
    try:
        kit = json.loads((HERE / "kit.json").read_text(encoding="utf-8"))
        if kit["format"] != "edgelm-kit" or kit["format_version"] != 1:
            raise KitError("kit.json is of another version: make the kit again")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise KitError(f"kit.json cannot be read ({error}): unpack the kit again") from error
    return dict(kit)


def inside(name: str) -> Path:
    """Return the path of a file of the kit.

    Raises:
        KitError: the name leads out of the kit.
    """
    if name.startswith(("/", "\\")) or ":" in name or "\\" in name or ".." in name.split("/"):
        raise KitError(f"the kit names a file outside of it, {name!r}: get the kit again")
    return HERE / name


def check_files() -> str:
    """Check the hash of every file; return what was found.

    Raises:
        KitError: names what is missing or differs.
    """
    try:
        lines = (HERE / SUMS).read_text(encoding="ascii").splitlines()
    except (OSError, ValueError) as error:
        raise KitError(f"{SUMS} cannot be read ({error}): unpack the kit again") from error
    files = [match.groups() for line in lines if (match := LINE.fullmatch(line))]
    if not files or len(files) != len(lines):
        raise KitError(f"{SUMS} is damaged: unpack the kit again")
    missing = [name for _, name in files if not inside(name).is_file()]
    if missing:
        raise KitError(f"missing: {listed(missing)}. Unpack the kit again, or copy it again")
    total = sum(inside(name).stat().st_size for _, name in files)
    done, damaged = 0, []
    for sha256, name in files:
        digest = hashlib.sha256()
        with inside(name).open("rb") as stream:
            while chunk := stream.read(CHUNK):
                digest.update(chunk)
                done += len(chunk)
                show(done, total)
        if digest.hexdigest() != sha256:
            damaged.append(name)
    show(None, total)
    if damaged:
        raise KitError(f"damaged: {listed(damaged)}. Unpack the kit again, or copy it again")
    return f"{len(files)} files, {total / 1e6:,.0f} MB, every hash is that of the kit"


def show(done: int | None, total: int) -> None:
    """Show progress on a terminal; None removes it."""
    if sys.stderr.isatty():
        print("\r" + " " * 40 + "\r" if done is None else f"\rreading {done * 100 // (total or 1):3} %", end="",
              file=sys.stderr, flush=True)  # fmt: skip


def listed(names: list[str]) -> str:
    """Return the first names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def check_machine(kit: dict[str, Any], python: str) -> str:
    """Check that this machine and its Python are those that the kit is for; return what was found."""
    cpu = platform.machine().lower()
    cpu = MACHINES.get(cpu, cpu)
    system = SYSTEMS.get(sys.platform, sys.platform)
    here = f"{system}-{'arm64' if system == 'macos' and cpu == 'aarch64' else cpu}"
    if here != kit["platform"]:
        raise KitError(f"this kit is for {kit['platform']}, and this machine is {here}: make one with --for {here}")
    if struct.calcsize("P") != 8:
        raise KitError("this Python has 32 bits: a kit needs a 64-bit system")
    if python not in kit["pythons"]:
        raise KitError(
            f"this is Python {python}, and the kit has packages for {', '.join(kit['pythons'])}: install one of them, "
            f"or make the kit with --python {python}"
        )
    found = [f"Python {platform.python_version()} at {sys.executable}", here]
    wanted = kit["pythons"][python]["glibc"]
    if sys.platform == "linux" and wanted:
        try:
            name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
        except (ValueError, OSError):
            name, version = "", ""
        if name != "glibc":
            raise KitError("this system has no glibc (Alpine has musl): ONNX Runtime has no packages for it")
        if [int(part) for part in version.split(".")[:2]] < [int(part) for part in wanted.split(".")]:
            raise KitError(f"this system has glibc {version}, and the packages need {wanted}: use a newer system")
        found.append(f"glibc {version}")
    return ", ".join(found)


def unpack(python: dict[str, Any], folder: Path) -> str:
    """Unpack the wheels into a folder, if they are not there already; return what was done."""
    lines = (HERE / SUMS).read_text(encoding="ascii").splitlines()
    sums = {match[2]: match[1] for match in map(LINE.fullmatch, lines) if match}
    mark = hashlib.sha256("".join(f"{sums[name]}  {name}\n" for name in python["wheels"]).encode())
    complete = folder / ".complete"
    if (HERE / ENV).is_symlink():
        raise KitError(f"{ENV} is a link: remove it, the packages are unpacked there")
    with contextlib.suppress(OSError):
        if complete.read_text() == mark.hexdigest():
            return f"{len(python['wheels'])} in {folder.relative_to(HERE)}, unpacked before"
    partial = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        partial.mkdir(parents=True)
        need, free = 0, shutil.disk_usage(partial).free
        for name in python["wheels"]:
            with zipfile.ZipFile(inside(name)) as wheel:
                need += sum(info.file_size for info in wheel.infolist())
        if need > free:
            raise KitError(f"no space: the packages need {need / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free here")
        for name in python["wheels"]:
            with zipfile.ZipFile(inside(name)) as wheel:
                unpack_wheel(wheel, partial)
        (partial / ".complete").write_text(mark.hexdigest())
        partial.rename(folder)
    except (OSError, zipfile.BadZipFile) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise KitError(f"the packages cannot be unpacked to {folder.parent} ({error})") from error
    return f"{len(python['wheels'])} unpacked to {folder.relative_to(HERE)}, {need / 1e6:,.0f} MB"


def unpack_wheel(wheel: zipfile.ZipFile, folder: Path) -> None:
    """Unpack the modules of a wheel; its scripts and headers are not needed."""
    for info in wheel.infolist():
        parts = info.filename.split("/")
        if info.is_dir():
            continue
        if parts[0].endswith(".data"):
            if parts[1] not in ("purelib", "platlib"):
                continue
            parts = parts[2:]
        if not parts or any(part in ("", ".", "..") or "\\" in part or ":" in part for part in parts):
            raise KitError(f"{wheel.filename} names a file outside of it, {info.filename!r}: get the kit again")
        target = folder.joinpath(*parts)
        target.parent.mkdir(parents=True, exist_ok=True)
        with wheel.open(info) as source, target.open("wb") as file:
            shutil.copyfileobj(source, file, CHUNK)


def use(folder: Path) -> None:
    """Import packages from a folder first, in this process and those that it starts."""
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"], os.environ["PYTHONNOUSERSITE"] = str(folder), "1"


def write_launcher(folder: Path) -> None:
    """Write the program `edgelm` into the kit, which uses what was unpacked."""
    if os.name == "nt":
        name, text = "edgelm.cmd", (
            f'@set "PYTHONPATH=%~dp0{ENV}\\{folder.name}"\r\n@"{sys.executable}" -s -m edgelm %*\r\n'
        )  # fmt: skip
    else:
        quoted = sys.executable.replace("'", "'\\''")
        text = (
            '#!/bin/sh\n# Made by check.sh.\nhere=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd) || exit 1\n'
            f"PYTHONPATH=$here/{ENV}/{folder.name} exec '{quoted}' -s -m edgelm \"$@\"\n"
        )
        name = "edgelm"
    replace(HERE / name, text)
    (HERE / name).chmod(0o755)


def replace(path: Path, text: str) -> None:
    """Write a file in place of an old one; a link is replaced, not followed."""
    partial = path.with_name(path.name + ".partial")
    with contextlib.suppress(FileNotFoundError):
        partial.unlink()
    with partial.open("x", encoding="utf-8", newline="") as file:
        file.write(text)
    partial.replace(path)


def command(*arguments: str) -> int:
    """Run a command of EdgeLM in this process; return its exit code."""
    before = sys.argv
    sys.argv = ["edgelm", *arguments]
    try:
        runpy.run_module("edgelm", run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = before
        sys.stdout.flush()
    return 0


def parity() -> bool:
    """Run the parity check, and write report.json and report.html; return whether it passed."""
    # As `edgelm parity bundle --report report.html`, which does not give the summary and the JSON in one run.
    errors = importlib.import_module("edgelm.errors")
    try:
        report = importlib.import_module("edgelm.parity.check").check_parity(
            HERE / "bundle", progress=importlib.import_module("edgelm.progress").Bars()
        )
        replace(HERE / "report.json", json.dumps(report.to_dict(), allow_nan=False) + "\n")
        importlib.import_module("edgelm.parity.report").write_report(report, HERE / "report.html")
    except (errors.EdgeLMError, OSError, MemoryError) as error:
        raise KitError(f"the parity check could not run: {error or 'not enough memory'}") from error
    print(importlib.import_module("edgelm.cli.parity").summary(report))
    return bool(report.passed)


if __name__ == "__main__":
    sys.exit(main())
