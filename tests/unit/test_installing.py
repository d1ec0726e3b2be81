"""Do install hints name something that pip can install, whatever the source of this installation?"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from edgelm.installing import install_hint

ROOT = Path(__file__).parents[2]
METADATA = """Metadata-Version: 2.4
Name: edgelm
Version: 9
Requires-Dist: numpy>=2.0
Provides-Extra: export
Requires-Dist: torch>=2.8; extra == 'export'
Requires-Dist: onnx>=1.18; extra == "export"
Provides-Extra: gpu-export
Requires-Dist: edgelm[export]; extra == 'gpu-export'
Requires-Dist: nvidia-cuda-nvrtc<13.1,>=13.0; extra == 'gpu-export'
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The metadata folder of an installation that comes first on the path."""
    folder = tmp_path / "site" / "edgelm-9.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(METADATA)
    monkeypatch.syspath_prepend(tmp_path / "site")
    return folder


def came_from(installed: Path, origin: Path, **more: object) -> None:
    (installed / "direct_url.json").write_text(json.dumps({"url": origin.as_uri(), **more}))


def test_a_checkout_is_named_editable_or_not(installed: Path, tmp_path: Path) -> None:
    checkout = tmp_path / "my checkout"
    checkout.mkdir()
    (checkout / "pyproject.toml").touch()
    came_from(installed, checkout, dir_info={"editable": True})
    assert install_hint("export") == f"pip install -e '{checkout}[export]'"
    came_from(installed, checkout, dir_info={})
    assert install_hint("export", "cpu") == f"pip install '{checkout}[export,cpu]'"
    assert install_hint() == f"pip install --force-reinstall --no-deps '{checkout}'"


def test_a_wheel_file_is_named(installed: Path, tmp_path: Path) -> None:
    wheel = tmp_path / "edgelm-9-py3-none-any.whl"
    wheel.touch()
    came_from(installed, wheel, archive_info={})
    assert install_hint("cpu") == f"pip install '{wheel}[cpu]'"


def test_a_source_that_no_longer_exists_is_not_named(installed: Path, tmp_path: Path) -> None:
    packages = "pip install 'torch>=2.8' 'onnx>=1.18'"
    for origin in (tmp_path / "removed", tmp_path / "removed.whl"):
        came_from(installed, origin)
        assert install_hint("export") == packages
    (installed / "direct_url.json").write_text('{"url": "https://example.org/edgelm-9-py3-none-any.whl"}')
    assert install_hint("export") == packages
    (installed / "direct_url.json").unlink()
    assert install_hint("gpu-export") == f"{packages} 'nvidia-cuda-nvrtc<13.1,>=13.0'"
    assert install_hint() == "pip install --force-reinstall --no-deps '.' in a checkout of EdgeLM"


def test_every_hint_comes_from_install_hint() -> None:
    own = re.compile(r"pip install (?:-\S+ )*'?edgelm\b(?!-VERSION)")
    files = [file for folder in ("edgelm", "export", "quant", "runtimes") for file in (ROOT / folder).rglob("*.py")]
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
    assert len(files) > 100
    assert [str(file) for file in (*files, *pages) if own.search(file.read_text(encoding="utf-8"))] == []


def test_a_copy_without_metadata_is_named_as_a_checkout(tmp_path: Path) -> None:
    (tmp_path / "edgelm").symlink_to(ROOT / "edgelm")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from edgelm.installing import install_hint as h; print(h('cpu'))"
    )
    command = [sys.executable, "-I", "-S", "-c", code, str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said == "pip install '.[cpu]' in a checkout of EdgeLM\n"


def test_damaged_metadata_is_no_error(installed: Path) -> None:
    (installed / "direct_url.json").write_text("{")
    assert install_hint("export") == "pip install 'torch>=2.8' 'onnx>=1.18'"
