"""Does an installed wheel run a bundle with its declared requirements only?

A wheel is built and installed into a new environment with the run-time requirements of `edgelm[cpu]` and nothing else,
not even pip. The requirements are copied from this environment, so that no network is needed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from edgelm.cli.common.options import EXPORT_PACKAGES
from edgelm.export import ExportOptions, export_bundle
from edgelm.parity.golden import GoldenOptions
from edgelm.parity.prompts import BUILT_IN
from edgelm.quant import Scheme, primitives
from edgelm.synth import write_random_checkpoint

ROOT = Path(__file__).parents[2]
FORBIDDEN = ("torch", "onnx", "transformers", "safetensors", "huggingface_hub", "onnxruntime_genai", "pytest")
CONFIG = {
    "architectures": ["OlmoeForCausalLM"],
    "model_type": "olmoe",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": False,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
# Loads and runs a bundle as an app does, checks parity as a device does, and prints the imported modules.
USE = """
import json, sys
import edgelm, edgelm.cli.main, edgelm.quant, edgelm.runtimes
model = edgelm.load(sys.argv[1])
generation = model.generate("Once upon a time", max_tokens=4)
report = edgelm.check_parity(sys.argv[1])
print(json.dumps({"tokens": len(generation.tokens), "passed": report.passed, "file": edgelm.__file__,
                  "modules": sorted({name.partition(".")[0] for name in sys.modules})}))
"""


def clean_environment(**extra: str) -> dict[str, str]:
    dropped = ("PYTHONPATH", "PYTHONSAFEPATH", *(name for name in os.environ if name.startswith("EDGELM_")))
    return {name: value for name, value in os.environ.items() if name not in dropped} | extra


def run(*command: object, **extra: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env=clean_environment(**extra),
        cwd=Path(sys.prefix),  # not the checkout, whose folders could be imported as top-level packages
        timeout=600,  # the first build of a wheel compiles six sets of kernels
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


def build_wheel(folder: Path, *settings: str, **extra: str) -> Path:
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q")
    run(*pip, *settings, "-w", folder, ROOT, **extra)
    (wheel,) = folder.glob("*.whl")
    return wheel


def closure(requirements: list[Requirement]) -> dict[str, metadata.Distribution]:
    """Return the installed distributions that these requirements need, with their dependencies."""
    found: dict[str, metadata.Distribution] = {}
    while requirements:
        requirement = requirements.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name = canonicalize_name(requirement.name)
        if name not in found:
            found[name] = metadata.distribution(requirement.name)
            requirements += [Requirement(text) for text in found[name].requires or ()]
    return found


def extra_requirements(wheel: Path, extra: str) -> list[Requirement]:
    """Return the requirements of the wheel with an extra."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    wanted = [Requirement(line.removeprefix("Requires-Dist: ")) for line in lines if line.startswith("Requires-Dist: ")]
    chosen = [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": extra})]
    for requirement in chosen:
        requirement.marker = None
    return chosen


def copy_distribution(distribution: metadata.Distribution, site: Path) -> None:
    for file in distribution.files or ():
        # Console scripts are outside the folder, and compiled .pyc files would contain paths of this environment.
        if ".." in file.parts or "__pycache__" in file.parts:
            continue
        target = site / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(str(file.locate()), target)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # In make's build folder, with make's generator, so that only changed sources are compiled.
    settings = ("--config-settings", f"build-dir={ROOT / 'build' / 'csrc'}")
    generator = os.environ.get("CMAKE_GENERATOR", "Unix Makefiles")
    return build_wheel(tmp_path_factory.mktemp("wheel"), *settings, CMAKE_GENERATOR=generator)


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # With these CXX and PATH, any use of a compiler would fail.
    return build_wheel(tmp_path_factory.mktemp("pure"), EDGELM_PURE="1", CXX="/nonexistent/c++", PATH="/nonexistent")


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Iterator[Path]:
    """The folder of an environment like one made by `pip install edgelm[cpu]`."""
    folder = tmp_path_factory.mktemp("device")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    site = next(folder.glob("lib/python*/site-packages"))
    for distribution in closure(extra_requirements(wheel, "cpu")).values():
        copy_distribution(distribution, site)
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "-q")
    run(*pip, "--no-deps", "--no-index", wheel)
    yield folder
    shutil.rmtree(folder)  # 150 MB


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    write_random_checkpoint(CONFIG, folder / "checkpoint")
    golden = GoldenOptions(prompts=BUILT_IN[:1], greedy_tokens=4)
    export_bundle(folder / "checkpoint", folder / "bundle", recipe="int4", options=ExportOptions(golden=golden))
    return folder / "bundle"


def wheel_names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_one_package_and_the_kernels(wheel):
    assert re.fullmatch(r"edgelm-[\d.]+-py3-none-(?!any)\w+\.whl", wheel.name)
    names = wheel_names(wheel)
    tops = {name.split("/")[0] for name in names}
    assert {re.sub(r"-[\d.]+\.dist-info", "-x.dist-info", top) for top in tops} == {"edgelm", "edgelm-x.dist-info"}
    assert {"edgelm/quant/_edgelm_quant.so", "edgelm/runtimes/_edgelm_ops.so"} <= names
    assert "edgelm/py.typed" in names
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in names)
    assert not [name for name in names if "__pycache__" in name or name.endswith((".cc", ".o"))]
    cuda = ROOT / "runtimes/csrc/cuda"
    headers = [path for path in cuda.rglob("*") if path.suffix == ".cuh" or (path.parent == cuda and path.is_file())]
    sources = {f"edgelm/{path.relative_to(ROOT).as_posix()}" for path in headers}
    assert {name for name in names if "csrc" in name} == sources  # sources of the GPU kernels, which an export compiles
    assert {Path(name).suffix for name in sources} == {".cuh", ".h"}


def test_the_wheel_holds_every_module_of_the_checkout(wheel):
    files = [path for kind in ("*.py", "*.j2", "*.css") for path in (ROOT / "edgelm").rglob(kind)]
    expected = {f"edgelm/{path.relative_to(ROOT / 'edgelm').as_posix()}" for path in files}
    for folder in ("export", "quant", "runtimes"):
        expected |= {f"edgelm/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / folder).rglob("*.py")}
    # What makes releases is for a checkout only.
    expected = {name for name in expected if not name.startswith("edgelm/runtimes/csrc/dist/")}
    assert expected <= wheel_names(wheel)


def test_entry_points_exist(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        lines = [line for line in archive.read(name).decode().splitlines() if "=" in line]
    assert len(lines) == 2
    for line in lines:
        module = line.partition("=")[2].strip().partition(":")[0]
        assert f"{module.replace('.', '/')}.py" in wheel_names(wheel), line


def test_an_installed_wheel_has_one_top_level_package(device):
    code = "import importlib.util as u; print([n for n in ('export', 'quant', 'runtimes', 'csrc') if u.find_spec(n)])"
    assert run(device / "bin" / "python", "-c", code).stdout.strip() == "[]"


def test_a_run_only_install_runs_a_bundle_and_checks_parity(device, bundle):
    found = json.loads(run(device / "bin" / "python", "-c", USE, bundle).stdout.splitlines()[-1])
    assert found["tokens"] == 4
    assert found["passed"]
    assert Path(found["file"]).is_relative_to(device)
    assert not set(FORBIDDEN) & set(found["modules"])
    # tokenizers depends on huggingface_hub, which must not be imported; the others must not be installed.
    absent = tuple(name for name in FORBIDDEN if name != "huggingface_hub")
    code = f"import importlib.util as u; print([n for n in {absent} if u.find_spec(n)])"
    assert run(device / "bin" / "python", "-c", code).stdout.strip() == "[]"


def test_running_a_bundle_does_not_import_export_dependencies(bundle):
    done = subprocess.run(
        [sys.executable, "-c", USE, str(bundle)], capture_output=True, text=True, cwd=Path(sys.prefix), check=False
    )
    assert done.returncode == 0, done.stderr
    modules = set(json.loads(done.stdout.splitlines()[-1])["modules"])
    assert "onnxruntime" in modules
    assert not set(FORBIDDEN) & modules


def test_the_command_is_installed_and_names_the_missing_extra(device, bundle, wheel):
    command = device / "bin" / "edgelm"
    assert re.fullmatch(r"edgelm \d+\.\d+\.\d+", run(command, "--version").stdout.strip())
    assert "quantize" in run(command, "--help").stdout
    generated = run(command, "run", bundle, "Once", "--max-tokens", 3, "--json")
    assert len(json.loads(generated.stdout)["tokens"]) == 3
    refused = subprocess.run(
        [command, "export", bundle, "-o", device / "x"],
        capture_output=True,
        text=True,
        env=clean_environment(),
        check=False,
    )
    assert refused.returncode == 1
    # The hint names the wheel file, since EdgeLM is not on a package index.
    assert f"pip install '{wheel}[export]'" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_the_installed_kernel_quantises_like_numpy(device):
    code = (
        "import numpy as np; from edgelm.quant import Scheme, native\n"
        "w = np.random.default_rng(3).standard_normal((8, 256)).astype(np.float32)\n"
        "q = native.quantize(w, Scheme(4, 32)); print(len(native.isas()), q.codes.tobytes().hex())"
    )
    isas, codes = run(device / "bin" / "python", "-c", code).stdout.split()
    assert int(isas) >= 3
    weight = np.random.default_rng(3).standard_normal((8, 256)).astype(np.float32)
    assert codes == primitives.quantize(weight, Scheme(4, 32)).codes.tobytes().hex()


def test_the_installed_operators_are_found_and_say_which_kernels_they_use(device):
    found = json.loads(run(device / "bin" / "edgelm", "inspect", "--cpu", "--json").stdout)
    assert Path(found["library"]).is_relative_to(device)
    usable = [isa["name"] for isa in found["instruction_sets"] if isa["available"]]
    assert found["chosen"] == usable[0]
    assert usable[-1] == "scalar"


def test_a_pure_wheel_needs_no_compiler_and_quantises_the_same(pure_wheel, device, tmp_path):
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in wheel_names(pure_wheel) if name.endswith(".so")]
    with zipfile.ZipFile(pure_wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "import numpy as np, edgelm; from edgelm.quant import Scheme, native\n"
        "w = np.random.default_rng(3).standard_normal((8, 256)).astype(np.float32)\n"
        "print(edgelm.__file__, native.library(), native.quantize(w, Scheme(4, 32)).codes.tobytes().hex())"
    )
    # The environment provides the requirements; the pure wheel is first on the path.
    file, library, codes = run(device / "bin" / "python", "-c", code, PYTHONPATH=str(tmp_path)).stdout.split()
    assert Path(file).is_relative_to(tmp_path)
    assert library == "None"
    weight = np.random.default_rng(3).standard_normal((8, 256)).astype(np.float32)
    assert codes == primitives.quantize(weight, Scheme(4, 32)).codes.tobytes().hex()
    said = run(device / "bin" / "python", "-m", "edgelm", "inspect", "--cpu", PYTHONPATH=str(tmp_path)).stdout
    assert "no compiled operators: bundles with portable operators run" in said


def test_the_export_extra_has_the_requirements_of_the_command(wheel):
    names = {canonicalize_name(requirement.name) for requirement in extra_requirements(wheel, "export")}
    assert {canonicalize_name(name) for name in EXPORT_PACKAGES} <= names


def test_every_requirement_is_pinned_and_the_pins_satisfy_it():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            (specifier,) = pin.specifier
            assert specifier.operator == "==", line
            pins[canonicalize_name(pin.name)] = specifier.version
    extras = project["optional-dependencies"]
    pinned = ("cpu", "export", "gpu-export", "tensorrt-rtx", "eval", "dev")
    for text in (*project["dependencies"], *(text for extra in pinned for text in extras[extra])):
        requirement = Requirement(text)
        if requirement.name != "edgelm":
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), text
