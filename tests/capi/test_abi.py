"""Is edgelm.h the interface of the library: for C, for C++, for the linker?"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from harness import LIBRARY, ROOT, GenerateOptions, Info, OpenOptions, ParityOptions, Timings, library, onnxruntime

import edgelm

HEADERS = ROOT / "runtimes" / "csrc" / "capi"
STRICT = ("-Wall", "-Wextra", "-Wpedantic", "-Werror", f"-I{HEADERS}")
HEADER = (HEADERS / "edgelm.h").read_text(encoding="utf-8")
FUNCTIONS = set(re.findall(r"^EDGELM_API [^(]*?\b(edgelm_\w+)\(", HEADER, re.MULTILINE))


def compiled(compiler: str, *arguments: str) -> None:
    ran = subprocess.run([compiler, *STRICT, *arguments], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def output(program: Path, bundle: Path, folder: Path) -> str:
    command = [program, bundle, onnxruntime().decode(), folder]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_does_the_library_export_the_functions_of_the_header_and_nothing_else() -> None:
    listed = subprocess.run(["nm", "-D", "--defined-only", LIBRARY], capture_output=True, text=True, check=True).stdout
    exported = {line.split()[-1].split("@")[0] for line in listed.splitlines()}
    assert len(FUNCTIONS) > 30
    assert exported == FUNCTIONS


def test_is_the_version_that_of_the_package() -> None:
    assert library().edgelm_version().decode() == edgelm.__version__
    assert library().edgelm_abi_version() == 1


@pytest.mark.parametrize(("compiler", "language"), [("cc", ("c", "-std=c11")), ("c++", ("c++", "-std=c++17"))])
def test_does_a_program_use_every_function(compiler: str, language: tuple[str, str], fox: Path, tmp_path: Path) -> None:
    source, program = Path(__file__).with_name("every_function.c"), tmp_path / "program"
    text = source.read_text(encoding="utf-8")
    assert {name for name in FUNCTIONS if f"{name}(" in text} == FUNCTIONS
    kind, standard = language
    compiled(compiler, standard, "-x", kind, str(source), "-x", "none", str(LIBRARY), "-o", str(program),
             f"-Wl,-rpath,{LIBRARY.parent}")  # fmt: skip
    assert output(program, fox, tmp_path) == "fox-tiny: 6 layers\nall functions work\n"


@pytest.mark.parametrize("standard", ["-std=c++17", "-std=c++20"])
def test_does_a_program_use_every_method_of_the_wrapper(standard: str, fox: Path, tmp_path: Path) -> None:
    source, program = Path(__file__).with_name("every_method.cc"), tmp_path / "program"
    compiled("c++", standard, "-Wshadow", "-Wconversion", "-Wno-sign-conversion", str(source), str(LIBRARY),
             "-o", str(program), f"-Wl,-rpath,{LIBRARY.parent}")  # fmt: skip
    assert output(program, fox, tmp_path) == "all methods work\n"


def test_are_the_structs_of_these_tests_those_of_the_header(tmp_path: Path) -> None:
    structs = {
        "edgelm_open_options": OpenOptions,
        "edgelm_model_info": Info,
        "edgelm_generate_options": GenerateOptions,
        "edgelm_timings": Timings,
        "edgelm_parity_options": ParityOptions,
    }
    lines = []
    for name, kind in structs.items():
        lines += [f"_Static_assert(offsetof({name}, {m}) == {getattr(kind, m).offset}, #m);".replace("#m", f'"{m}"')
                  for m, _ in kind._fields_]  # fmt: skip
        last = kind._fields_[-1][0]
        # No padding at the end: a member that a later version appends lies beyond the size of today.
        lines.append(f'_Static_assert(offsetof({name}, {last}) + 8 == sizeof({name}), "{name}");')
    source = tmp_path / "structs.c"
    source.write_text('#include "edgelm.h"\n' + "\n".join(lines) + "\n")
    compiled("cc", "-std=c11", "-c", str(source), "-o", str(tmp_path / "structs.o"))
