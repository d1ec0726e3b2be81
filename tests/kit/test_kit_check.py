"""Does a kit prove itself on a machine that has Python alone, or nothing, and name what is wrong with a broken one?"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from kit_inputs import PYTHON, check, unpack

from edgelm.kit import package
from edgelm.system.platforms import Platform

BASE = getattr(sys, "_base_executable", sys.executable)
"""The Python of this virtual environment, which has none of its packages."""


@pytest.fixture(scope="module")
def kit(bundle: Path, dist: Path, wheels: Path, platform: Platform, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kit for Python, unpacked and checked once."""
    folder = tmp_path_factory.mktemp("kit")
    package(bundle, folder / "kit.tar", platform=platform.name, pythons=[PYTHON], dist=dist, wheels=wheels)
    found = unpack(folder / "kit.tar", folder / "there")
    printed = check(found, status=0, PYTHON=BASE)
    assert f"14 unpacked to env/{PYTHON}" in printed or f"15 unpacked to env/{PYTHON}" in printed
    assert "This device computes the same model as the reference" in printed
    assert printed.splitlines()[-2].startswith("The parity check passed.")
    return found


@pytest.fixture(scope="module")
def c_kit(bundle: Path, dist: Path, wheels: Path, platform: Platform, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kit for C, unpacked."""
    folder = tmp_path_factory.mktemp("c-kit")
    package(bundle, folder / "kit.tar", platform=platform.name, c=True, dist=dist, wheels=wheels)
    return unpack(folder / "kit.tar", folder / "there")


def test_a_checked_kit_has_reports_and_a_program_and_is_checked_again_faster(kit: Path) -> None:
    assert json.loads((kit / "report.json").read_text())["passed"] is True
    assert "<html" in (kit / "report.html").read_text()[:200]
    version = subprocess.run([kit / "edgelm", "--version"], env={}, capture_output=True, text=True, cwd="/", check=True)
    assert version.stdout.startswith("edgelm 0.")
    stamp = (kit / "env" / PYTHON / ".complete").stat().st_mtime_ns
    assert "unpacked before" in check(kit, status=0, PYTHON=BASE)
    assert (kit / "env" / PYTHON / ".complete").stat().st_mtime_ns == stamp


def test_a_changed_byte_and_missing_files_are_named(kit: Path) -> None:
    weights = kit / "bundle" / "model.onnx.data"
    with weights.open("r+b") as file:
        file.seek(1000)
        byte = file.read(1)
        file.seek(1000)
        file.write(bytes([byte[0] ^ 1]))
    assert "check: damaged: bundle/model.onnx.data. Unpack the kit again" in check(kit, status=1, PYTHON=BASE)
    with weights.open("r+b") as file:
        file.seek(1000)
        file.write(byte)
    (rich,) = (kit / "wheels").glob("rich-*.whl")
    away = rich.rename(kit.parent / rich.name)
    assert f"check: missing: wheels/{rich.name}. Unpack the kit again" in check(kit, status=1, PYTHON=BASE)
    away.rename(rich)


def test_a_python_without_packages_in_the_kit_is_told(kit: Path, tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\necho 3.6\n")
    old.chmod(0o755)
    for name in ("sh", "dirname"):
        (tmp_path / name).symlink_to(shutil.which(name) or name)
    printed = check(kit, status=1, PATH=str(tmp_path))
    assert f"this kit needs one of Python {PYTHON}. python3 is Python 3.6." in printed
    old.unlink()
    assert "No Python was found." in check(kit, status=1, PATH=str(tmp_path))


def test_the_check_writes_into_its_folder_only(kit: Path, tmp_path: Path) -> None:
    """A link in place of what the check makes is replaced or refused, not followed."""
    copy = tmp_path / "copy"
    shutil.copytree(kit, copy, symlinks=True)
    shutil.rmtree(copy / "env")
    (tmp_path / "outside").mkdir()
    (copy / "env").symlink_to(tmp_path / "outside")
    assert "env is a link" in check(copy, status=1, PYTHON=BASE)
    assert list((tmp_path / "outside").iterdir()) == []
    # Names that lead out of the kit, in SHA256SUMS and in a wheel.
    sums = (copy / "SHA256SUMS").read_text()
    (copy / "SHA256SUMS").write_text(sums.replace("  README.md", "  ../README.md"))
    assert "the kit names a file outside of it, '../README.md'" in check(copy, status=1, PYTHON=BASE)
    for name in ("/etc/passwd", "..\\x", "C:x"):
        (copy / "SHA256SUMS").write_text(sums.replace("  README.md", f"  {name}"))
        assert "the kit names a file outside of it" in check(copy, status=1, PYTHON=BASE)


def test_a_wheel_that_leads_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    from edgelm.kit.device.check import KitError, unpack_wheel

    for name in ("../out", "/out", "a/../../out", "x.data/purelib/../../../out"):
        with zipfile.ZipFile(tmp_path / "bad.whl", "w") as archive:
            archive.writestr(name, "x")
        with zipfile.ZipFile(tmp_path / "bad.whl") as archive, pytest.raises(KitError, match="outside of it"):
            unpack_wheel(archive, tmp_path / "env")
    assert not (tmp_path / "out").exists()


def test_parts_of_a_wheel_that_pip_would_place_elsewhere(tmp_path: Path) -> None:
    from edgelm.kit.device.check import unpack_wheel

    with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
        for name in ("x-1.data/purelib/x/a.py", "x-1.data/platlib/x/b.so", "x-1.data/scripts/x", "x/c.py"):
            archive.writestr(name, "x")
    with zipfile.ZipFile(tmp_path / "x.whl") as archive:
        unpack_wheel(archive, tmp_path / "env")
    found = sorted(path.relative_to(tmp_path / "env").as_posix() for path in (tmp_path / "env").rglob("*.*"))
    assert found == ["x/a.py", "x/b.so", "x/c.py"]
    assert not (tmp_path / "env" / "x-1.data").exists()


def test_a_kit_for_c_needs_neither_python_nor_anything_else(c_kit: Path, tmp_path: Path) -> None:
    for name in ("sh", "dirname", "sha256sum", "grep", "uname"):
        (tmp_path / name).symlink_to(shutil.which(name) or name)
    printed = check(c_kit, status=0, PATH=str(tmp_path))
    assert "every hash is that of the kit" in printed
    assert "This device computes the same model as the reference" in printed
    assert printed.splitlines()[-1].startswith("The parity check passed.")
    assert json.loads((c_kit / "report.json").read_text())["made_by"].startswith("libedgelm ")
    assert (c_kit / "libedgelm" / "lib" / "libedgelm.so").is_symlink()
    assert (c_kit / "libedgelm" / "licenses" / "onnxruntime" / "LICENSE").is_file()
    assert os.access(c_kit / "libedgelm" / "bin" / "edgelm-parity", os.X_OK)


def test_a_broken_kit_for_c_is_named(c_kit: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(c_kit, copy, symlinks=True)
    library = copy / "libedgelm" / "lib" / "libonnxruntime.so.1"
    library.chmod(0o644)
    with library.open("r+b") as file:
        file.write(b"x")
    (copy / "bundle" / "config.json").unlink()
    printed = check(copy, status=1)
    assert "libedgelm/lib/libonnxruntime.so.1: FAILED" in printed
    assert "bundle/config.json: FAILED open or read" in printed
    assert "config.json: OK" not in printed
    assert "missing or damaged: unpack the kit again" in printed
    (copy / "SHA256SUMS").unlink()
    assert "SHA256SUMS is missing" in check(copy, status=1)


def test_another_machine_is_told(c_kit: Path, kit: Path, tmp_path: Path) -> None:
    fake = tmp_path / "uname"
    fake.write_text("#!/bin/sh\n[ $1 = -s ] && echo Linux || echo riscv64\n")
    fake.chmod(0o755)
    assert "this kit is for linux-" in check(c_kit, status=1, PATH=f"{tmp_path}:/usr/bin:/bin")
    other = tmp_path / "other"
    shutil.copytree(kit, other, symlinks=True)
    text = (other / "kit.json").read_text()
    changed = text.replace('"platform": "linux-', '"platform": "windows-')
    (other / "kit.json").write_text(changed)
    sums = (other / "SHA256SUMS").read_text().splitlines(keepends=True)
    (other / "SHA256SUMS").write_text("".join(line for line in sums if not line.endswith("  kit.json\n")))
    assert "this kit is for windows-" in check(other, status=1, PYTHON=BASE)
