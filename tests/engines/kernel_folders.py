"""Folders of kernels without code, and the compilers of what tests call."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from edgelm.runtimes.cuda import planning
from edgelm.runtimes.cuda.kernels.sources import SOURCES


def index_only(names: object, sms: Sequence[int], folder: Path, progress: object = None) -> None:
    """Write a folder of kernels that lists all kernels for devices but contains no code."""
    del names, progress
    folder.mkdir()
    images = {}
    for sm in sms:
        images[f"sm_{sm}"] = {"file": f"sm_{sm}.cubin", "nvrtc": [12, 6], "resources": {}}
        (folder / f"sm_{sm}.cubin").write_bytes(f"\x7fELF for SM {sm}".encode())
    index = {"format": 2, "source": "", "argument_bytes": argument_bytes(), "images": images}
    (folder / "kernels.json").write_text(json.dumps(index))


@functools.cache
def argument_bytes() -> dict[str, int]:
    """Return the bytes of the arguments of every kernel, by a program that prints the sizes of their structs."""
    lines = [line.split("\t") for line in planning.call("kernels", {}).decode().splitlines()]
    structs = {name: text.split(",")[1].strip() for _, name, text in lines}
    headers = sorted(path.relative_to(SOURCES).as_posix() for path in SOURCES.rglob("*_args.cuh"))
    source = "#include <cstdio>\n" + "".join(f'#include "{header}"\n' for header in headers)
    source += "using namespace edgelm;\nint main() {\n"
    source += "".join(f'  printf("{one} %zu\\n", sizeof({one}));\n' for one in sorted(set(structs.values()))) + "}\n"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "sizes.cc").write_text(source)
        program = compiled("c++", [Path(folder) / "sizes.cc", "-I", SOURCES], Path(folder) / "sizes")
        printed = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split()
    sizes = dict(zip(printed[::2], map(int, printed[1::2]), strict=True))
    return {name: sizes[one] for name, one in structs.items()}


def compiled(language: str, arguments: list[object], out: Path) -> Path:
    """Compile C ("c") or C++ ("c++") with warnings as errors."""
    known = {"c": ("CC", "gcc", "cc"), "c++": ("CXX", "g++", "c++")}
    variable, *names = known[language]
    compiler = os.environ.get(variable) or next(filter(None, map(shutil.which, names)), None)
    assert compiler is not None, "these tests need a C and a C++ compiler"
    standard = {"c": "gnu11", "c++": "c++17"}[language]
    options = [f"-std={standard}", "-O1", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([compiler, *options, *map(str, arguments), "-o", out], check=True)
    return out
