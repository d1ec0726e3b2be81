"""Does the installed libedgelm have what an app needs, and do the examples in C and C++ give Python's tokens?"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from harness import ROOT, onnxruntime

import edgelm

PROMPT = "import os\n\n\ndef read(path):\n    with open("
CMAKE = [f"lib/cmake/edgelm/edgelm{part}.cmake" for part in ("Config", "ConfigVersion", "Targets")]
HEADERS = ["include/edgelm/edgelm.h", "include/edgelm/edgelm.hpp"]
FILES = [*HEADERS, "bin/edgelm-parity", "lib/libedgelm.so", "lib/pkgconfig/edgelm.pc", *CMAKE]
# A small app with the C++ wrapper: it prints a prompt's tokens and writes the logits of all its positions to a file.
TOKENS = """
#include <edgelm/edgelm.hpp>
#include <fstream>
#include <iostream>
int main(int, char** argv) {
  edgelm::Model model(argv[1]);
  edgelm::GenerateOptions options;
  options.max_tokens = 24;
  for (const auto token : model.generate(argv[2], options).tokens()) std::cout << token << ' ';
  model.reset();
  const auto ids = model.tokenize(argv[2]);
  const auto logits = model.logits(ids, ids.size());
  std::ofstream(argv[3], std::ios::binary)
      .write(reinterpret_cast<const char*>(logits.data()), std::streamsize(logits.size() * sizeof(float)));
}
"""


def run(*command: object, status: int = 0, stdin: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "EDGELM_ONNXRUNTIME": onnxruntime().decode()}
    result = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, input=stdin, timeout=300, env=environment
    )
    assert result.returncode == status, result.stderr or result.stdout
    return result


@pytest.fixture(scope="module")
def sdk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installed library, moved to another place than it was installed to."""
    folder = tmp_path_factory.mktemp("install")
    run("cmake", "--install", ROOT / "build/csrc", "--component", "edgelm", "--prefix", folder / "first", "--strip")
    return (folder / "first").rename(folder / "moved")


@pytest.fixture(scope="module")
def example(sdk: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Function (folder of an example, program) that builds it and returns the program."""

    def build(folder: str, program: str) -> Path:
        target = tmp_path_factory.mktemp(program)
        run("cmake", "-S", ROOT / "examples" / folder, "-B", target, f"-DCMAKE_PREFIX_PATH={sdk}")
        run("cmake", "--build", target)
        return target / program

    return build


@pytest.fixture(scope="module")
def tour(example: Callable[[str, str], Path]) -> Path:
    return example("c", "tour")


@pytest.fixture(scope="module")
def chat(example: Callable[[str, str], Path]) -> Path:
    return example("cpp", "chat")


def test_the_installed_library_is_small_and_needs_the_system_alone(sdk: Path) -> None:
    assert {str(path.relative_to(sdk)) for path in sdk.rglob("*") if path.is_file()} >= set(FILES)
    library = sdk / "lib" / "libedgelm.so"
    # Nearly half are kernels: four tables, unrolled for every kind of weights.
    assert library.resolve().stat().st_size < 2_700_000
    symbols = {
        line.split()[-1].split("@")[0] for line in run("nm", "-D", "--defined-only", library).stdout.splitlines()
    }
    declared = re.findall(r"EDGELM_API .*?(edgelm_\w+)\(", (sdk / "include/edgelm/edgelm.h").read_text())
    assert symbols == set(declared)
    dynamic = run("readelf", "--dynamic", "--program-headers", "--wide", library).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(\w+)", dynamic))
    assert needed <= {"libstdc", "libgcc_s", "libm", "libc", "libdl", "libpthread", "ld"}
    assert re.search(r"\(SONAME\).*\[libedgelm\.so\.1\]", dynamic)
    assert re.search(r"GNU_STACK .* RW ", dynamic)  # no executable stack


def test_the_installed_parity_program_finds_the_library_beside_it(sdk: Path) -> None:
    assert re.fullmatch(r"edgelm-parity \d+\.\d+\.\d+\n", run(sdk / "bin" / "edgelm-parity", "--version").stdout)


@pytest.fixture(scope="module")
def small_app(sdk: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`TOKENS`, built without CMake."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "tokens.cc").write_text(TOKENS)
    flags = run("pkg-config", "--cflags", "--libs", sdk / "lib/pkgconfig/edgelm.pc").stdout.split()
    strict = ("-std=c++17", "-Wall", "-Wextra", "-Werror")
    run("c++", *strict, folder / "tokens.cc", "-o", folder / "tokens", *flags, f"-Wl,-rpath,{sdk}/lib")
    return folder / "tokens"


@pytest.mark.parametrize("name", ["olmoe", "fox"])
def test_programs_in_c_and_cpp_give_the_tokens_and_logits_of_python(
    name: str,
    tour: Path,
    chat: Path,
    small_app: Path,
    tiny_bundle: Callable[[str, str, str], Path],
    tmp_path: Path,
) -> None:
    bundle = tiny_bundle(name, "int4", "native")
    with edgelm.load(bundle, chat=False) as model:
        expected = model.generate(PROMPT, max_tokens=24)
        ids = model.tokenizer.encode(PROMPT)
        model.runtime.reset()
        logits = np.concatenate([block.copy() for block in model.runtime.logits_all(ids)])
    shown = dict(re.findall(r"^(prompt|tokens|ends): (.*)$", printed := run(tour, bundle, PROMPT).stdout, re.MULTILINE))
    assert shown["prompt"].split() == [str(token) for token in ids]
    assert shown["tokens"].split() == [str(token) for token in expected.tokens]
    assert f"text: {expected.text}\ntokens: " in printed
    result = run(chat, bundle, PROMPT, 24)
    assert result.stdout == expected.text + "\n"
    assert f"[{len(expected.tokens)} tokens, the first after " in result.stderr
    printed = run(small_app, bundle, PROMPT, tmp_path / "logits").stdout
    assert printed.split() == [str(token) for token in expected.tokens]
    assert (tmp_path / "logits").read_bytes() == logits.tobytes()


def test_the_c_program_stops_at_a_string_and_checks_parity(tour: Path, fox: Path) -> None:
    with edgelm.load(fox, chat=False) as model:
        whole = model.generate(PROMPT, max_tokens=24).text
    stop = whole[len(whole) // 2 :][:3]
    printed = run(tour, fox, PROMPT, "never", stop).stdout
    assert f"text: {whole[: whole.index(stop)]}\ntokens: " in printed
    assert "ends: a stop string" in printed
    report = json.loads(run(tour, "--parity", fox).stdout)
    assert report["passed"] is True


def test_the_cpp_program_answers_questions_until_an_empty_line(chat: Path, fox: Path) -> None:
    result = run(chat, fox, stdin="def read\nand write\n\nnot asked\n")
    assert result.stdout.count("\n") >= 2
    assert result.stderr.count("> ") == 3
    assert result.stderr.count(" tokens, the first after ") == 2


def test_errors_are_told(tour: Path, chat: Path, tmp_path: Path) -> None:
    run(tour, status=2)
    run(chat, status=2)
    for program, prefix in ((tour, "error 2: "), (chat, "error: ")):
        told = run(program, tmp_path / "nowhere", "x", status=1).stderr
        assert told.startswith(f"{prefix}{tmp_path}/nowhere does not exist")
        assert len(told.splitlines()) == 1
