"""What kits are made of, without network: wheels of the packages installed here, and of this checkout."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from edgelm.system.platforms import Platform, this_platform
from edgelm.version import __version__

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "csrc"
PYTHON = f"3.{sys.version_info.minor}"
PACKAGES = (
    "click", "flatbuffers", "jinja2", "markdown-it-py", "markupsafe", "mdurl", "numpy", "onnxruntime", "packaging",
    "protobuf", "pygments", "rich", "sentencepiece", "tokenizers",
)  # fmt: skip
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "LANG": "C.UTF-8"}
"""Of a check on a machine that has nothing."""


def wheel(path: Path, files: dict[str, bytes | Path]) -> Path:
    """Write a wheel, uncompressed."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            if isinstance(content, Path):
                archive.write(content, name)
            else:
                archive.writestr(name, content)
    return path


def wheel_of_installed(found: importlib.metadata.Distribution, folder: Path, platform: Platform) -> None:
    """Write the wheel that a package came from, which was installed for a platform, but for its programs."""
    tags = re.findall(r"^Tag: (.*)$", found.read_text("WHEEL") or "", re.MULTILINE)
    parts = [sorted(set(part)) for part in zip(*(tag.split("-") for tag in tags), strict=True)]
    # Some name the system that built them.
    parts[2] = [platform.pip_tags[0]] if parts[2] != ["any"] else ["any"]
    files = {
        str(path): Path(str(found.locate_file(path)))
        for path in found.files or []
        if ".." not in path.parts and path.suffix != ".pyc" and path.name != "RECORD"
    }
    label = re.sub(r"[-.]+", "_", found.name)
    wheel(folder / f"{label}-{found.version}-{'-'.join('.'.join(part) for part in parts)}.whl", files)


def this_platform_checked() -> Platform:
    found = this_platform()
    if found is None or not found.name.startswith("linux-"):
        pytest.skip("kits are tried on Linux")
    return found


def metadata() -> bytes:
    """The metadata of our wheel, as pyproject.toml says it."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = ["Metadata-Version: 2.2", "Name: edgelm", f"Version: {__version__}"]
    lines += [f"Requires-Python: {project['requires-python']}"]
    lines += [f"Requires-Dist: {one}" for one in project["dependencies"]]
    for one in project["optional-dependencies"]["cpu"]:
        requirement, _, marker = one.partition("; ")
        condition = f"({marker}) and extra == 'cpu'" if marker else "extra == 'cpu'"
        lines.append(f"Requires-Dist: {requirement}; {condition}")
    return "\n".join(lines).encode()


def unpack(kit: Path, folder: Path) -> Path:
    """Unpack a kit with the programs of a device, and return its folder."""
    folder.mkdir()
    subprocess.run(["tar", "xf", kit, "-C", folder], check=True)
    (found,) = folder.iterdir()
    return found


def check(folder: Path, *, status: int, **environment: str) -> str:
    """Run check.sh as on a machine that has nothing, and return what it prints on both streams."""
    command = [str(shutil.which("sh")), str(folder / "check.sh")]
    unshare = shutil.which("unshare")
    if (
        os.geteuid() == 0
        and unshare
        and subprocess.run([unshare, "--net", "true"], capture_output=True).returncode == 0
    ):
        command = [str(unshare), "--net", *command]
    result = subprocess.run(
        command, env={**ENVIRONMENT, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=300, cwd="/",
    )  # fmt: skip
    assert result.returncode == status, result.stdout
    return result.stdout
