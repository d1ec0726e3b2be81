"""Use what was built as a device does: the wheel in a new environment, the archive from CMake and pkg-config."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

CHECKPOINT = "examples/checkpoints/olmoe-tiny"


def run(*command: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """Run a command and return what it printed.

    Raises:
        RuntimeError: it failed; the message has what it printed.
    """
    words = [str(word) for word in command]
    given = None if env is None else {**os.environ, **env}
    ran = subprocess.run(words, cwd=cwd, env=given, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"{' '.join(words)}: exit code {ran.returncode}\n{ran.stdout}{ran.stderr}")
    return ran.stdout


def smoke(root: Path, pure: Path, wheel: Path, archive: Path, work: Path) -> list[str]:
    """Run the wheels' and the archive's programs here.

    Args:
        root: the checkout.
        pure: the wheel without compiled libraries.
        wheel: a wheel for this machine.
        archive: a C archive for this machine.
        work: folder for the environment, the bundle and the examples; made again.

    Returns:
        what was run, in words.

    Raises:
        RuntimeError: something failed.
    """
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    bundle = work / "bundle"
    run(sys.executable, "-m", "edgelm", "export", root / CHECKPOINT, "-o", bundle)
    return [*_wheel(root, wheel, bundle, work), *_archive(root, archive, bundle, work), *_pure(pure, work)]


def _wheel(root: Path, wheel: Path, bundle: Path, work: Path) -> list[str]:
    run(sys.executable, "-m", "venv", "--without-pip", work / "venv")
    python = work / "venv" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--constraint",
        root / "constraints.txt", f"{wheel}[cpu]")  # fmt: skip
    program = work / "venv" / "bin" / "edgelm"
    text = run(program, "doctor", cwd=work)
    parity = run(program, "parity", bundle, cwd=work)
    if str(work) not in run(python, "-c", "import edgelm; print(edgelm.__file__)", cwd=work):
        raise RuntimeError("the environment of the wheel imports another edgelm")
    return [f"edgelm doctor: {len(text.splitlines())} lines", f"edgelm parity: {parity.splitlines()[0]}"]


def _pure(pure: Path, work: Path) -> list[str]:
    """In place of the wheel that `_wheel` installed."""
    python = work / "venv" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--force-reinstall", pure)
    text = run(work / "venv" / "bin" / "edgelm", "doctor", cwd=work)
    return [f"edgelm doctor of the pure wheel: {len(text.splitlines())} lines"]


def _archive(root: Path, archive: Path, bundle: Path, work: Path) -> list[str]:
    with tarfile.open(archive) as tar:
        tar.extractall(work, filter="data")
    prefix = work / archive.name.removesuffix(".tar.gz")
    (capi,) = (work / "venv").glob("lib/python*/site-packages/onnxruntime/capi")
    runtime = next(capi.glob("libonnxruntime.so*"))
    parity = run(prefix / "bin" / "edgelm-parity", bundle, "--onnxruntime", runtime)
    build = work / "tour"
    run("cmake", "-S", root / "examples" / "c", "-B", build, f"-DCMAKE_PREFIX_PATH={prefix}")
    run("cmake", "--build", build)
    finder = {"PKG_CONFIG_PATH": str(prefix / "lib" / "pkgconfig")}
    flags = run("pkg-config", "--cflags", "--libs", "edgelm", env=finder).split()
    run("cc", root / "examples" / "c" / "tour.c", "-o", work / "tour-pkg-config", *flags)
    environment = {"EDGELM_ONNXRUNTIME": str(runtime), "LD_LIBRARY_PATH": str(prefix / "lib")}
    words = [run(program, bundle, "def read(path):\n", env=environment) for program in
             (build / "tour", work / "tour-pkg-config")]  # fmt: skip
    if words[0] != words[1]:
        raise RuntimeError(f"the two builds of the tour print different text:\n{words[0]}\n{words[1]}")
    return [
        f"edgelm-parity: {parity.splitlines()[0]}",
        "the tour in C: built with find_package and pkg-config, and run",
    ]
