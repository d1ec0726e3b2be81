"""Fixtures: bundles with real engines, exported once for all tests, a stand-in for TensorRT's calls of plugins, and two
driver libraries for machines without a GPU: a fake one that runs emulated kernels, and one that notes
launches."""

from __future__ import annotations

import ctypes
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import RecordingDriver, open_harness
from kernel_folders import argument_bytes, compiled, index_only

from edgelm.bundle import Bundle
from edgelm.export import ExportOptions, export_bundle
from edgelm.export.tensorrt import target as gpu_target
from edgelm.parity.golden import GoldenOptions
from edgelm.parity.prompts import BUILT_IN
from edgelm.runtimes.cuda.device import DeviceInfo
from edgelm.runtimes.cuda.kernels import images
from edgelm.runtimes.cuda.kernels.sources import SOURCES
from edgelm.runtimes.cuda.operators import Operators
from edgelm.runtimes.cuda.program import PROGRAM_FILE, Program
from edgelm.runtimes.tensorrt.library import Library, load
from edgelm.runtimes.tensorrt.plugins import write_library

sys.path.append(str(Path(__file__).parents[1] / "cuda"))
import emulated_images

CHECKPOINTS = Path(__file__).parents[2] / "examples" / "checkpoints"
SMS = (86, 89, 120)
Export = Callable[[str, str], Bundle]


@pytest.fixture(scope="session")
def rtx() -> Library:
    return load("tensorrt-rtx")


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Return a function that exports a tiny checkpoint with a recipe, once each.

    Everything is real except the compiled kernels, which take a minute and have their own tests.
    """
    made: dict[tuple[str, str], Bundle] = {}
    folder = tmp_path_factory.mktemp("tensorrt")

    def one(checkpoint: str, recipe: str) -> Bundle:
        key = (checkpoint, recipe)
        if key not in made:
            golden = GoldenOptions(BUILT_IN[:1], greedy_tokens=1, max_prompt_tokens=8)
            options = ExportOptions(target="tensorrt", sms=(*SMS, 90), golden=golden)
            out = folder / f"{checkpoint}-{recipe}"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(gpu_target, "compile_bundle_kernels", index_only)
                made[key] = export_bundle(CHECKPOINTS / checkpoint, out, recipe=recipe, options=options)
        return made[key]

    return one


@pytest.fixture(scope="session")
def harness(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """A stand-in for TensorRT that calls plugins; see harness.py."""
    here = Path(__file__).parent
    options = ["-shared", "-fPIC", "-fvisibility=hidden", "-I", SOURCES.parent, here / "harness.cc", "-ldl"]
    return open_harness(compiled("c++", options, tmp_path_factory.mktemp("harness") / "harness.so"))


@pytest.fixture(scope="session")
def recording_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = Path(__file__).with_name("recording_driver.c")
    return compiled("c", ["-shared", "-fPIC", source], tmp_path_factory.mktemp("recording") / "libcuda.so.1")


@pytest.fixture
def recorder(recording_library: Path, monkeypatch: pytest.MonkeyPatch) -> RecordingDriver:
    """The driver library that libedgelm_plugins.so opens: it notes launches."""
    monkeypatch.setenv("EDGELM_CUDA_DRIVER", str(recording_library))
    return RecordingDriver(recording_library, argument_bytes())


@pytest.fixture
def copied(export: Export, tmp_path: Path) -> Bundle:
    """A copy of a bundle, which a test may change."""
    source = export("fox-tiny", "none")
    return Bundle.open(shutil.copytree(source.path, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def driver_library(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(emulated_images.driver_library(tmp_path_factory.mktemp("driver")))


@pytest.fixture
def gpu(driver_library: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that configures the GPU of the fake driver: gpu(sm=86, version=13000, memory=...)."""

    def show(**settings: int) -> None:
        monkeypatch.setenv("EDGELM_CUDA_DRIVER", driver_library)
        for name, value in settings.items():
            monkeypatch.setenv(f"FAKE_CUDA_{name.upper()}", str(value))

    return show


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Bundle], Path]:
    """Return a function that writes the library of plugins of a bundle with emulated kernels for SM 86, once each."""
    made: dict[Path, Path] = {}
    folder = tmp_path_factory.mktemp("libraries")

    def library(bundle: Bundle) -> Path:
        if bundle.path not in made:
            program = Program.read(bundle.file(PROGRAM_FILE))
            info = DeviceInfo("emulated", (8, 6), 4, 0, (13, 0))
            names = Operators(program, bundle.manifest.graph.kv_dtype, 0, info).kernels()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(images, "compile_images", emulated_images.compile_images)
                images.compile_bundle_kernels(names, [86], folder / bundle.path.name, ptx=False)
            made[bundle.path] = folder / f"{bundle.path.name}.so"
            write_library(images.KernelFolder(folder / bundle.path.name), made[bundle.path])
        return made[bundle.path]

    return library
