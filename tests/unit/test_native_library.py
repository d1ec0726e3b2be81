"""Is the operators' library found, and are errors reported when a session registers it?"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import onnxruntime as ort
import pytest

from edgelm.errors import RuntimeUnavailableError
from edgelm.runtimes.onnxruntime import native_library
from edgelm.runtimes.onnxruntime.native_library import describe_cpu, library_path


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The compiled operators, which choose the instruction set."""
    monkeypatch.delenv("EDGELM_ISA", raising=False)
    path = library_path()
    if path is None:
        pytest.skip("this installation has no compiled operators")
    return path


@pytest.mark.skipif(os.environ.get("CI") != "true", reason="a machine without a compiler may lack them; CI may not")
def test_ci_has_the_compiled_operators() -> None:
    assert library_path() is not None


def test_the_environment_variable_selects_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "x.so"
    library.touch()
    monkeypatch.setenv("EDGELM_OPS_LIBRARY", str(library))
    assert library_path() == library
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDGELM_OPS_LIBRARY", "x.so")
    assert library_path() == library
    monkeypatch.setenv("EDGELM_OPS_LIBRARY", "")
    assert library_path() is None
    monkeypatch.setenv("EDGELM_OPS_LIBRARY", str(tmp_path / "none.so"))
    with pytest.raises(RuntimeUnavailableError, match="the file does not exist"):
        library_path()


def test_a_library_of_another_version_or_kind_is_refused(operators: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in (0, 99):  # a newer library than this EdgeLM, and an older one
        monkeypatch.setattr(native_library, "ABI", other)
        with pytest.raises(
            RuntimeUnavailableError, match=rf"another version of EdgeLM \(interface 2, expected {other}\)"
        ):
            describe_cpu()
    monkeypatch.setenv("EDGELM_OPS_LIBRARY", str(Path(ctypes.__file__)))
    with pytest.raises(RuntimeUnavailableError, match="cannot be loaded as EdgeLM's operators"):
        describe_cpu()


def test_every_available_instruction_set_can_be_registered(operators: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert any(isa.available for isa in describe_cpu().instruction_sets)
    for isa in describe_cpu().instruction_sets:
        monkeypatch.setenv("EDGELM_ISA", isa.name)
        if isa.available:
            assert describe_cpu().chosen == isa.name
            ort.SessionOptions().register_custom_ops_library(str(operators))


def test_registering_with_an_unsupported_instruction_set_is_a_clear_error(
    operators: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = [isa.name for isa in describe_cpu().instruction_sets if not isa.available]
    for name in ("sse9", *absent):
        monkeypatch.setenv("EDGELM_ISA", name)
        with pytest.raises(Exception, match=f"EDGELM_ISA={name}: .*Set it to one of .*scalar"):
            ort.SessionOptions().register_custom_ops_library(str(operators))
