"""Fixtures of kits: wheels, our own wheel and C archive, and a bundle."""

from __future__ import annotations

import importlib.metadata
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from kit_inputs import BUILD, PACKAGES, ROOT, metadata, this_platform_checked, wheel, wheel_of_installed

from edgelm.system.platforms import Platform
from edgelm.version import __version__


@pytest.fixture(scope="session")
def platform() -> Platform:
    return this_platform_checked()


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory, platform: Platform) -> Path:
    """A folder with the wheels of the packages that run bundles."""
    folder = tmp_path_factory.mktemp("wheels")
    for name in PACKAGES:
        wheel_of_installed(importlib.metadata.distribution(name), folder, platform)
    return folder


@pytest.fixture(scope="session")
def dist(tmp_path_factory: pytest.TempPathFactory, platform: Platform) -> Path:
    """A folder with our wheel for this machine, as `make wheels` lays it out, and with the C archive."""
    folder = tmp_path_factory.mktemp("dist")
    files: dict[str, bytes | Path] = {f"edgelm-{__version__}.dist-info/METADATA": metadata()}
    for source, target in {"edgelm": "edgelm", "quant": "edgelm/quant", "runtimes": "edgelm/runtimes"}.items():
        for path in sorted((ROOT / source).rglob("*")):
            inner = path.relative_to(ROOT / source)
            if path.is_file() and inner.parts[0] != "csrc" and "__pycache__" not in inner.parts:
                files[f"{target}/{inner.as_posix()}"] = path
    files["edgelm/runtimes/_edgelm_ops.so"] = BUILD / "_edgelm_ops.so"
    files["edgelm/quant/_edgelm_quant.so"] = BUILD / "_edgelm_quant.so"
    wheel(folder / f"edgelm-{__version__}-py3-none-{platform.wheel_tag}.whl", files)
    prefix = folder / f"edgelm-{__version__}-{platform.name}"
    subprocess.run(
        ["cmake", "--install", BUILD, "--component", "edgelm", "--prefix", prefix, "--strip"],
        check=True, capture_output=True,
    )  # fmt: skip
    with tarfile.open(folder / f"{prefix.name}.tar.gz", "w:gz", compresslevel=1) as tar:
        tar.add(prefix, prefix.name)
    return folder


@pytest.fixture(scope="session")
def bundle(tiny_bundle: Callable[[str, str, str], Path]) -> Path:
    return tiny_bundle("fox", "int4", "native")
