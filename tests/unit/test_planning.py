"""Is the library of launch planning found, and are requests that it cannot answer errors with a reason?"""

from __future__ import annotations

from pathlib import Path

import pytest

from edgelm.errors import BundleError, DeviceError, EdgeLMError
from edgelm.runtimes.cuda import planning


def test_a_named_library_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(planning.LIBRARY_VARIABLE, str(tmp_path / "x.so"))
    with pytest.raises(DeviceError, match=r"EDGELM_PLUGINS_LIBRARY=.*x.so: the file does not exist; unset"):
        planning.library_path()
    (tmp_path / "x.so").touch()
    assert planning.library_path() == tmp_path / "x.so"


def test_an_installation_without_compiled_parts_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(planning.LIBRARY_VARIABLE, raising=False)
    monkeypatch.setattr("edgelm.runtimes.__path__", [str(tmp_path)])
    with pytest.raises(DeviceError, match=r"libedgelm_plugins.so is missing: install edgelm from a wheel"):
        planning.library_path()


def test_errors_have_the_class_of_their_kind() -> None:
    with pytest.raises(DeviceError, match=r"^rows is -1, expected 0 to 2147483647$"):
        planning.call("argmax_workspace", {"rows": -1, "columns": 5})
    with pytest.raises(BundleError, match=r"^weights of the kind int5: upgrade edgelm$"):
        matrix = {f"matrix_{name}": 64 for name in ("rows", "columns", "group")}
        planning.call("matmul_kernels", {**matrix, "matrix_kind": "int5", "activation": "bf16", "rounding": 0.0})
    with pytest.raises(EdgeLMError, match=r"^there is no function x$"):
        planning.call("x", {})


@pytest.mark.parametrize("name", ["layers.0\nsm=1", "layers.0\0"])
def test_a_name_cannot_add_a_field(name: str) -> None:
    with pytest.raises(BundleError, match="a name or value has a line end or a NUL character"):
        planning.call("node_kernels", {"op": "LastToken", "name": name})
