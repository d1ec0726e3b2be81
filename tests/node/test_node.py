"""Do portable bundles run in Node with npm's onnxruntime-node, an older ONNX Runtime than Python's?

The tests run examples/node-portable/generate.js: prefill of the prompt, then one token per step with the KV cache.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgelm.bundle import Bundle
from edgelm.export import ExportOptions, export_bundle
from edgelm.parity.golden import GoldenOptions
from edgelm.quant import PRESETS, Recipe, Rule, Scheme
from edgelm.runtimes import open_runtime
from edgelm.tokenization.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
MODULES = ROOT / "build" / "node" / "node_modules"
VERSION = json.loads((Path(__file__).parent / "package.json").read_text())["dependencies"]["onnxruntime-node"]
TOKENS = 12
FLOAT_EXPERTS = Recipe(
    "int4 with float activations of experts",
    Scheme(4, 32),
    (Rule("*.experts.*", Scheme(4, 32), activations="float"), *PRESETS["int4"].rules),
)
# For 8-bit experts, 1.30 has float activations, and 1.31 quantises them to int8.
CASES = [
    ("fox", PRESETS["int4"], 2e-2),
    ("fox", PRESETS["int8"], 2e-2),
    ("olmoe", PRESETS["none"], 1e-4),
    ("olmoe", PRESETS["int8"], 5e-2),
    ("olmoe", FLOAT_EXPERTS, 2e-2),
]


@pytest.fixture(scope="module")
def node() -> str:
    found, module = shutil.which("node"), MODULES / "onnxruntime-node" / "package.json"
    problem = None
    if found is None:
        problem = "there is no node"
    elif not module.is_file():
        problem = f"there is no {module.parent}: make node"
    elif json.loads(module.read_text())["version"] != VERSION:
        problem = f"{module.parent} is not {VERSION}: make node"
    if problem is not None:
        if os.environ.get("CI") == "true":
            pytest.fail(problem)
        pytest.skip(problem)
    assert found is not None
    return found


def export(folder: Path, name: str, recipe: Recipe) -> Bundle:
    options = ExportOptions(ops="portable", golden=GoldenOptions(greedy_tokens=0, max_prompt_tokens=4))
    return export_bundle(ROOT / "examples" / "checkpoints" / f"{name}-tiny", folder, recipe=recipe, options=options)


def generate(node: str, bundle: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [node, str(ROOT / "examples" / "node-portable" / "generate.js"), str(bundle), *map(str, arguments)]
    environment = {**os.environ, "NODE_PATH": str(MODULES)}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


@pytest.mark.parametrize(("name", "recipe", "tolerance"), CASES, ids=lambda value: getattr(value, "name", None))
def test_node_generates_what_python_generates(
    node: str, tmp_path: Path, name: str, recipe: Recipe, tolerance: float
) -> None:
    bundle = export(tmp_path / "b", name, recipe)
    prompt = Tokenizer.from_folder(bundle.path).encode("Once upon a time there was")
    result = generate(node, bundle.path, ",".join(map(str, prompt)), TOKENS)
    assert result.returncode == 0, result.stderr
    document: dict[str, Any] = json.loads(result.stdout)
    assert len(document["tokens"]) == TOKENS
    with open_runtime(bundle, threads=1) as runtime:
        logits = runtime.prefill(prompt)
        for token, row in zip(document["tokens"], document["logits"], strict=True):
            found = np.asarray(row, np.float32)
            assert np.linalg.norm(found - logits) < tolerance * np.linalg.norm(logits)
            assert token == int(logits.argmax()) == int(found.argmax())
            logits = runtime.decode(token)


def test_a_bundle_that_needs_a_newer_onnxruntime_is_refused_with_the_reason(node: str, tmp_path: Path) -> None:
    bundle = export(tmp_path / "b", "olmoe", PRESETS["int4"])
    result = generate(node, bundle.path, "5,6", 2)
    assert result.returncode == 1
    assert result.stdout == ""
    assert "int8 activations of 4-bit experts" in result.stderr
    assert f"which needs onnxruntime 1.31.0; here is {VERSION}" in result.stderr
    # The refusal is necessary.
    manifest = json.loads(bundle.file("manifest.json").read_text())
    del manifest["requires"]
    bundle.file("manifest.json").write_text(json.dumps(manifest))
    assert "accuracy_level" in generate(node, bundle.path, "5,6", 2).stderr


def test_wrong_arguments_are_told(node: str, tmp_path: Path) -> None:
    assert generate(node, tmp_path).returncode == 2
    bundle = export(tmp_path / "b", "fox", PRESETS["none"]).path
    for path, ids, count, reason in (
        (tmp_path / "nowhere", "5,6", 2, "no such file"),
        (bundle, "5,x", 2, "NaN is no token id"),
        (bundle, "5,3072", 2, "3072 is no token id: they are whole numbers below 3072"),
        (bundle, "5,6", 511, "2 prompt tokens and 511 more do not fit into 512 positions"),
    ):
        result = generate(node, path, ids, count)
        assert result.returncode == 1
        assert result.stderr.startswith("error: ")
        assert reason in result.stderr
        assert len(result.stderr.splitlines()) == 1


PACKAGES = [Path(__file__).parent, *(ROOT / "examples" / name for name in ("node", "node-portable", "web"))]


@pytest.mark.parametrize("folder", PACKAGES, ids=lambda folder: folder.name)
def test_lock_files_name_no_registry_and_agree(folder: Path) -> None:
    wanted = json.loads((folder / "package.json").read_text())["dependencies"]
    lock = json.loads((folder / "package-lock.json").read_text())
    packages = {name: entry for name, entry in lock["packages"].items() if name}
    assert all("integrity" in entry and "resolved" not in entry for entry in packages.values())
    tested = json.loads((Path(__file__).parent / "package.json").read_text())["dependencies"]
    for name, version in wanted.items():
        assert packages[f"node_modules/{name}"]["version"] == version == tested[name]
