"""Does a kit made here prove itself on the emulated machine, which has Python alone or nothing, and no network?"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import pytest
from root import ISAS, ArmRoot
from shipped import PACKED

sys.path.insert(0, str(Path(__file__).parents[1] / "kit"))

from kit_inputs import PACKAGES, unpack, wheel_of_installed

from edgelm.export import ExportOptions, export_bundle
from edgelm.kit import package
from edgelm.parity.golden import GoldenOptions
from edgelm.parity.prompts import Prompt
from edgelm.system.platforms import PLATFORMS

PLATFORM = PLATFORMS["linux-aarch64"]
CHECKPOINT = Path(__file__).parents[2] / "examples" / "checkpoints" / "olmoe-tiny"


@pytest.fixture(scope="module")
def inputs(arm: ArmRoot, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of our wheel and C archive; the other wheels, from the machine's; a bundle with one prompt."""
    folder = tmp_path_factory.mktemp("inputs")
    wheels = folder / "wheels"
    wheels.mkdir()
    (site,) = arm.folder.glob("env/lib/python3.*/site-packages")
    for found in importlib.metadata.distributions(path=[str(site)]):
        if found.name.lower() in PACKAGES:
            wheel_of_installed(found, wheels, PLATFORM)
    # The emulator computes each position slowly.
    golden = GoldenOptions((Prompt("code", "def read(path):\n"),), greedy_tokens=2)
    export_bundle(CHECKPOINT, folder / "olmoe", recipe="int4", options=ExportOptions(golden=golden))
    return {"bundle": folder / "olmoe", "dist": PACKED, "wheels": wheels, "site": site}


def test_a_kit_passes_with_environment_python_alone_and_a_broken_one_is_named(
    arm: ArmRoot, inputs: dict[str, Path], tmp_path: Path
) -> None:
    python = inputs["site"].parent.name.removeprefix("python")
    package(
        inputs["bundle"], tmp_path / "kit.tar", platform=PLATFORM.name, pythons=[python], dist=inputs["dist"],
        wheels=inputs["wheels"],
    )  # fmt: skip
    kit = unpack(tmp_path / "kit.tar", tmp_path / "there")
    environment = {"PYTHON": str(arm.folder / "root" / "usr" / "bin" / "python3")}

    def check(status: int) -> str:
        done = arm.run(["sh", str(kit / "check.sh")], check=False, env=environment)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    printed = check(0)
    assert f"{PLATFORM.name}, glibc 2." in printed
    assert "compiled, neon-i8mm" in printed
    assert "This device computes the same model as the reference" in printed
    assert "The parity check passed." in printed
    (rich,) = (kit / "wheels").glob("rich-*.whl")
    rich.rename(tmp_path / rich.name)
    assert f"missing: wheels/{rich.name}" in check(1)
    (tmp_path / rich.name).rename(rich)
    with (kit / "bundle" / "model.onnx.data").open("r+b") as file:
        file.seek(5000)
        file.write(b"changed")
    assert "damaged: bundle/model.onnx.data" in check(1)


def test_a_kit_for_c_passes_on_a_cpu_of_a_raspberry_pi_5(arm: ArmRoot, inputs: dict[str, Path], tmp_path: Path) -> None:
    package(
        inputs["bundle"], tmp_path / "kit.tar", platform=PLATFORM.name, c=True, dist=inputs["dist"],
        wheels=inputs["wheels"], pythons=(),
    )  # fmt: skip
    kit = unpack(tmp_path / "kit.tar", tmp_path / "there")
    emulator = f"qemu-aarch64 -cpu {ISAS['neon-dot'].cpu} -L {arm.folder / 'isa' / 'neon-dot'}"
    done = arm.run(["sh", str(kit / "check.sh")], check=False, env={"EMULATOR": emulator})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "This device computes the same model as the reference" in done.stdout
    assert "The parity check passed." in done.stdout
