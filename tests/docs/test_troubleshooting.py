"""Does the program still print the errors that head the sections of the troubleshooting page?

A heading is an error's words as printed, with `...` for what varies: names, numbers, paths.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from click.testing import CliRunner

from edgelm.cli.main import cli
from edgelm.quant.checkpoint import quantize_checkpoint
from edgelm.quant.recipe import Recipe

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
SOURCES = ("edgelm", "export", "quant", "runtimes")
TEXT = PAGE.read_text(encoding="utf-8")
ERRORS = re.findall(r"^### `(.+)`$", TEXT, re.MULTILINE)
PRINTED = re.findall(r"^### `(.+)`\n\n<!-- printed by: (.+) -->$", TEXT, re.MULTILINE)
"""Errors with a command that ends with them, where the page has one: most that are made quickly."""
SHORTEST = 12
"""Fixed characters of a heading, below which it could be found anywhere."""
CHECKPOINT = ROOT / "examples" / "checkpoints" / "olmoe-tiny"


@cache
def strings() -> tuple[str, ...]:
    """Every string of the sources, with a newline for each value that is inserted: of Python but docstrings, and the
    statements of C++ that runtimes for GPUs call."""
    found = []
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
            for node in ast.walk(tree):
                if isinstance(node, ast.JoinedStr):
                    found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "\n" for v in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                    found.append(node.value)
    for path in sorted((ROOT / "runtimes" / "csrc" / "cuda").rglob("*.cc")):
        statements = re.sub(r'"\s*\n\s*"', "", path.read_text(encoding="utf-8")).split(";\n")
        found += ["\n".join(re.findall(r'"((?:[^"\\\n]|\\.)*)"', statement)) for statement in statements]
    return tuple(found)


def stands_in(error: str, texts: tuple[str, ...]) -> bool:
    """Whether one of the strings has the fixed parts of `error` in their order."""
    parts = [part.strip() for part in error.split("...") if part.strip()]
    pattern = re.compile(".*?".join(map(re.escape, parts)), re.DOTALL)
    return any(pattern.search(text) for text in texts)


def test_the_page_has_the_errors_that_users_meet() -> None:
    assert len(ERRORS) >= 30
    assert len(PRINTED) == TEXT.count("printed by:")
    assert len(set(ERRORS)) == len(ERRORS)


@pytest.mark.parametrize("error", ERRORS)
def test_the_error_is_still_printed_in_these_words(error: str) -> None:
    fixed = error.replace("...", "")
    assert len(fixed) >= SHORTEST, f"{error}: give more of the error's words"
    assert stands_in(error, strings()), f"{error}: no string of {', '.join(SOURCES)} has these words"


@pytest.mark.parametrize("error", ERRORS)
def test_the_error_has_a_cause_and_a_remedy(error: str) -> None:
    section = TEXT.split(f"### `{error}`\n")[1].split("\n##")[0]
    assert "**Why.**" in section, f"{error}: say why"
    assert "**Do.**" in section, f"{error}: say what to do"


@pytest.fixture(scope="module")
def places(tiny_bundle: Callable[[str, str, str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bundles and checkpoints, good and damaged, by the names that the page's commands have for them."""
    root = tmp_path_factory.mktemp("places")
    found = {
        "checkpoint": CHECKPOINT, "fox": CHECKPOINT.parent / "fox-tiny", "out": root / "out", "empty": root / "empty",
        "quantised": root / "quantised", "damaged": root / "damaged",
        "bundle": tiny_bundle("olmoe", "int4", "native"), "portable": tiny_bundle("olmoe", "int4", "portable"),
    }  # fmt: skip
    found["empty"].mkdir()
    for name, of in {"odd": "checkpoint", "cut": "checkpoint", "mute": "checkpoint", "lacking": "bundle",
                     "short": "bundle"}.items():  # fmt: skip
        found[name] = Path(shutil.copytree(found[of], root / name))
    config = found["odd"] / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attn_temperature": 2.0}))
    for path in (found["cut"] / "model.safetensors", found["short"] / "model.onnx.data"):
        path.write_bytes(path.read_bytes()[:-1000])
    for path in (found["mute"] / "tokenizer.json", found["lacking"] / "model.onnx"):
        path.unlink()
    shutil.copy(CHECKPOINT / "config.json", found["empty"])
    quantize_checkpoint(CHECKPOINT, found["quantised"], Recipe.load("int4"))
    damage = [sys.executable, ROOT / "examples" / "damage.py", found["bundle"], found["damaged"]]
    subprocess.run(damage, check=True, capture_output=True)
    return found


@pytest.mark.parametrize(("error", "command"), PRINTED)
def test_the_command_prints_the_error(error: str, command: str, places: dict[str, Path]) -> None:
    result = CliRunner().invoke(cli, [word.format(**places) for word in command.split()])
    assert result.exit_code in (1, 2), result.output
    assert stands_in(error, (" ".join(result.output.split()),)), result.output
    assert not places["out"].exists()


def test_words_are_found_in_their_order_across_inserted_values() -> None:
    texts = ("\n is missing: copy \n again", "tensor \n")
    assert stands_in("... is missing: copy ... again", texts)
    assert not stands_in("again ... is missing", texts)
    assert not stands_in("tensor ... is missing", texts)
