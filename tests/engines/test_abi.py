"""Is our declaration of TensorRT's plugin interface that of NVIDIA's headers, where they are installed?

By hand, 2026-11-29, with the headers of NVIDIA/TensorRT on GitHub: 10.3, 10.9, 10.16, 11.0 and 11.1 pass. Their folder
and that of CUDA's can be named: EDGELM_TENSORRT_INCLUDE=include:/usr/local/cuda/include.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from edgelm.runtimes.cuda.planning import library_path

HERE = Path(__file__).parent
FOLDERS = [folder for folder in os.environ.get("EDGELM_TENSORRT_INCLUDE", "").split(":") if folder]
COMPILER = [os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or "", "-std=c++17"]
COMPILER += [option for folder in FOLDERS for option in ("-isystem", folder)]


def has_headers() -> bool:
    """Whether the compiler finds NVIDIA's headers."""
    source = "#include <NvInfer.h>\n"
    command = [*COMPILER, "-x", "c++", "-fsyntax-only", "-"]
    return bool(COMPILER[0]) and subprocess.run(command, input=source.encode(), capture_output=True).returncode == 0


NVIDIAS = has_headers()


@pytest.mark.skipif(not NVIDIAS, reason="NVIDIA's headers of TensorRT are not installed")
def test_the_interface_is_that_of_nvidias_headers(tmp_path: Path) -> None:
    program = tmp_path / "abi"
    sources = HERE.parents[1] / "runtimes" / "csrc"
    options = ["-Wno-invalid-offsetof", "-I", sources, HERE / "abi_test.cc", "-o", program, "-ldl"]
    subprocess.run([*COMPILER, *options], check=True)
    done = subprocess.run([program, library_path()], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("as in TensorRT")
