"""Do the bundles of the tiny checkpoints compute on 64-bit Arm what they compute on x86, bit for bit, and pass parity?

Bundles are exported here, and run there by what ships: the wheel and the C archive, with ONNX Runtime's aarch64 wheel.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from root import ISAS, PLATFORM, REPOSITORY
from shipped import Shipped, zig

from edgelm.export import ExportOptions, export_bundle
from edgelm.parity.golden import GoldenOptions

sys.path.insert(0, str(REPOSITORY / "tests" / "capi"))
from harness import onnxruntime

Bundles = Callable[[str, str, str], Path]
MODELS = [(model, recipe) for model in ("olmoe", "fox") for recipe in ("int4", "int8")]
# Each instruction set gets both models and both recipes; Python and C check each bundle on different ones.
PYTHON = {
    ("olmoe", "int4"): "neon-dot",
    ("fox", "int8"): "neon-dot",
    ("fox", "int4"): "neon-i8mm",
    ("olmoe", "int8"): "neon-i8mm",
}
OTHER = {"neon-dot": "neon-i8mm", "neon-i8mm": "neon-dot"}
HERE = REPOSITORY / "build" / "csrc" / "libedgelm.so"


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Function that writes to the log of `make test-arm`."""

    def write(*lines: str) -> None:
        with capsys.disabled():
            print("", *lines, sep="\n  ", flush=True)

    return write


@pytest.mark.parametrize(("model", "recipe"), MODELS)
def test_edgelm_parity_passes(
    shipped: Shipped, tiny_bundle: Bundles, tmp_path: Path, show: Callable[..., None], model: str, recipe: str
) -> None:
    isa, bundle = PYTHON[model, recipe], tiny_bundle(model, recipe, "native")
    command = ["python", "-m", "edgelm", "parity", str(bundle)]
    done = shipped.root.run(command, isa=isa, env=shipped.environment, cwd=tmp_path)
    show(f"aarch64, {isa}: edgelm parity {bundle.name}", *filter(None, done.stdout.splitlines()))
    assert done.stdout.startswith("This device computes the same model as the reference")


@pytest.mark.parametrize(("model", "recipe"), MODELS)
def test_edgelm_parity_in_c_passes(
    shipped: Shipped, tiny_bundle: Bundles, tmp_path: Path, show: Callable[..., None], model: str, recipe: str
) -> None:
    isa, bundle = OTHER[PYTHON[model, recipe]], tiny_bundle(model, recipe, "native")
    command = [str(shipped.archive / "bin" / "edgelm-parity"), str(bundle), "--json", "report.json"]
    done = shipped.root.run(command, isa=isa, env=shipped.environment, cwd=tmp_path)
    summary = [line for line in done.stdout.splitlines() if line]
    show(f"aarch64, {isa}: edgelm-parity {bundle.name}", summary[0], summary[-1])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["passed"]
    assert report["device"]["architecture"] == "aarch64"
    assert report["device"]["cpu"] == ISAS[isa].name


def test_a_portable_bundle_passes(shipped: Shipped, tmp_path: Path, show: Callable[..., None]) -> None:
    """With ONNX Runtime's own operators and a short prompt: they take most of the time here."""
    bundle = tmp_path / "fox-int8-portable"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("def read(path):\n    with open(path) as stream:\n")
    options = ExportOptions(ops="portable", golden=GoldenOptions.from_arguments(prompts, 4))
    export_bundle(REPOSITORY / "examples/checkpoints/fox-tiny", bundle, recipe="int8", options=options)
    command = ["python", "-m", "edgelm", "parity", str(bundle)]
    done = shipped.root.run(command, isa="neon-dot", env=shipped.environment, cwd=tmp_path)
    summary = [line for line in done.stdout.splitlines() if line]
    show(f"aarch64, neon-dot: edgelm parity {bundle.name}", summary[0], summary[-1])


@pytest.fixture(scope="session")
def here(tiny_bundle: Bundles, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """The logits of the four bundles on this machine."""
    out = tmp_path_factory.mktemp("here") / "logits.npz"
    environment = {**os.environ, "EDGELM_LIBRARY": str(HERE)}
    bundles = [tiny_bundle(*model, "native") for model in MODELS]
    command = [sys.executable, Path(__file__).with_name("logits.py"), out, *bundles]
    subprocess.run(command, env=environment, check=True)
    return dict(np.load(out))


@pytest.mark.parametrize("isa", OTHER)
def test_logits_have_the_same_bits_as_here(
    shipped: Shipped, tiny_bundle: Bundles, here: dict[str, np.ndarray], tmp_path: Path, isa: str,
    show: Callable[..., None],
) -> None:  # fmt: skip
    out = tmp_path / "logits.npz"
    bundles = [str(tiny_bundle(*model, "native")) for model in MODELS]
    environment = {**shipped.environment, "EDGELM_LIBRARY": str(shipped.archive / "lib" / "libedgelm.so")}
    command = ["python", str(Path(__file__).with_name("logits.py")), str(out), *bundles]
    shipped.root.run(command, isa=isa, env=environment, cwd=tmp_path)
    there = np.load(out)
    assert set(there) == set(here)
    assert len(here) == len(MODELS) * 2 * 3  # Python and C; prefill, decode, tokens
    different = [name for name in here if here[name].tobytes() != there[name].tobytes()]
    assert not different
    count = sum(values.size for name, values in here.items() if "tokens" not in name)
    show(f"aarch64, {isa}: {count:,} logits of {len(bundles)} bundles, by Python and C, have the bits of this machine")


def test_the_tour_in_c_prints_what_it_prints_here(shipped: Shipped, tiny_bundle: Bundles, tmp_path: Path) -> None:
    arguments = [str(tiny_bundle("olmoe", "int4", "native")), "def read(path):\n", "return"]
    there, here = tmp_path / "tour-arm", tmp_path / "tour"
    include, source = shipped.archive / "include", REPOSITORY / "examples" / "c" / "tour.c"
    for compiler, library, program in (
        ([zig(), "cc", "-target", PLATFORM.zig], shipped.archive / "lib", there),
        (["cc"], HERE.parent, here),
    ):
        subprocess.run([*compiler, "-o", program, source, f"-I{include}", f"-L{library}", "-ledgelm"], check=True)
    environment = {"LD_LIBRARY_PATH": str(HERE.parent), "EDGELM_ONNXRUNTIME": onnxruntime().decode()}
    expected = subprocess.run([here, *arguments], env=environment, capture_output=True, text=True, check=True).stdout
    environment = {**shipped.environment, "LD_LIBRARY_PATH": str(shipped.archive / "lib")}
    for isa in OTHER:
        assert shipped.root.run([str(there), *arguments], isa=isa, env=environment, cwd=tmp_path).stdout == expected
