"""Is the page of the C API what edgelm.h says, and do the programs of the guide work?"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "_ext"))
sys.path.insert(0, str(Path(__file__).parents[1] / "capi"))
sys.path.insert(0, str(Path(__file__).parent))

from c_reference import HEADER, PAGE, page
from harness import LIBRARY, onnxruntime

from examples import blocks

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "c.md"


def test_is_the_page_what_the_header_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run docs/_ext/c_reference.py --write"


def test_is_every_function_and_struct_on_the_page() -> None:
    names = set(re.findall(r"\b(edgelm_\w+)", HEADER.read_text(encoding="utf-8"))) - {"edgelm_initial", "edgelm_error_"}
    text = PAGE.read_text(encoding="utf-8")
    assert len(names) > 40
    assert {name for name in names if not re.search(rf"\b{name}\b", text)} == set()


def test_is_the_program_of_the_readme_that_of_the_guide() -> None:
    texts = [
        next(b.text for b in blocks(path) if b.file == "chat.cc") for path in (GUIDE, GUIDE.parents[2] / "README.md")
    ]
    assert texts[0] == texts[1]


@pytest.fixture(scope="module")
def include(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with edgelm/edgelm.h, as an installation has."""
    folder = tmp_path_factory.mktemp("include")
    (folder / "edgelm").symlink_to(HEADER.parent)
    return folder


@pytest.mark.parametrize("name", ["chat.cc", "complete.c"])
def test_does_a_program_of_the_guide_compile_and_run(
    name: str, include: Path, tmp_path: Path, tiny_bundle: Callable[[str, str, str], Path]
) -> None:
    (block,) = [block for block in blocks(GUIDE) if block.file == name]
    assert len(block.text.splitlines()) <= 32
    source, program = tmp_path / name, tmp_path / "program"
    source.write_text(block.text)
    language = ("c++", "-std=c++17") if name.endswith(".cc") else ("cc", "-std=c11")
    built = subprocess.run(
        [*language, "-Wall", "-Wextra", "-Werror", f"-I{include}", source, LIBRARY, f"-Wl,-rpath,{LIBRARY.parent}",
         "-o", program], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    environment = {**os.environ, "EDGELM_ONNXRUNTIME": onnxruntime().decode()}
    ran = subprocess.run(
        [program, tiny_bundle("fox", "int4", "native")], input="Hello\nAnd now?\n", env=environment, cwd=tmp_path,
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert len(ran.stdout) > 20
    failed = subprocess.run([program, tmp_path], input="", env=environment, capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert "manifest.json" in failed.stderr
