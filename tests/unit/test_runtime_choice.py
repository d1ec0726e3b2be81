"""Which of several runtimes is used by default?"""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
from tiny_graph import Shape, write_tiny_bundle

from edgelm.bundle import Bundle
from edgelm.errors import RuntimeUnavailableError
from edgelm.installing import install_hint
from edgelm.runtimes import registry
from edgelm.runtimes.registry import RuntimeEntry, _choose

MISSING = "no_package_of_this_name"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_tiny_bundle(tmp_path_factory.mktemp("tiny") / "bundle", Shape(layers=1))


def entry(name: str, *, compatible: bool | None = None, requires: str = "numpy", by_name: bool = False) -> RuntimeEntry:
    """Return an entry of a runtime for CPU bundles; `compatible`: its answer, None if it has no such check."""
    return RuntimeEntry(
        name=name,
        classes={},
        targets=("cpu",),
        requires=requires,
        options=(),
        summary="",
        extras=("cpu",),
        compatibility="" if compatible is None else f"compatible_{compatible}",
        only_by_name=by_name,
    )


@pytest.fixture(autouse=True)
def compatibility_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    for answer in (True, False):
        module = ModuleType(f"compatible_{answer}")
        module.compatible = lambda bundle, answer=answer: answer  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.parametrize(
    ("entries", "chosen"),
    [
        ([entry("a"), entry("b")], "a"),
        ([entry("a", compatible=True), entry("b")], "a"),
        ([entry("a", compatible=False), entry("b"), entry("c")], "b"),
        ([entry("a", compatible=False), entry("b", compatible=False), entry("c")], "c"),
        ([entry("a", compatible=False), entry("b", compatible=False)], "b"),  # the last one raises its own error
        ([entry("a", compatible=False)], "a"),
        ([entry("a", requires=MISSING), entry("b")], "b"),
        ([entry("a", by_name=True), entry("b")], "b"),
        ([entry("a", compatible=False), entry("b", by_name=True)], "a"),
    ],
)
def test_the_first_installed_compatible_runtime_is_used(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, entries: list[RuntimeEntry], chosen: str
) -> None:
    monkeypatch.setattr(registry, "_ENTRIES", tuple(entries))
    assert _choose(bundle, None).name == chosen


def test_is_a_runtime_that_is_never_the_default_used_by_name(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_ENTRIES", (entry("a"), entry("b", by_name=True), entry("c", compatible=False)))
    assert [_choose(bundle, name).name for name in ("a", "b", "c")] == ["a", "b", "c"]
    monkeypatch.setattr(registry, "_ENTRIES", (entry("b", by_name=True),))
    with pytest.raises(RuntimeUnavailableError, match="exported for cpu, which no runtime here runs"):
        _choose(bundle, None)


def test_without_a_runtime_every_way_to_install_one_is_named(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = (entry("a", requires=MISSING), entry("b", requires=MISSING), entry("c", requires=MISSING, by_name=True))
    monkeypatch.setattr(registry, "_ENTRIES", missing)
    with pytest.raises(RuntimeUnavailableError) as caught:
        _choose(bundle, None)
    assert str(caught.value).endswith(f": {install_hint('cpu')} (for a) or {install_hint('cpu')} (for b)")


def test_are_the_emulated_kernels_never_the_default() -> None:
    assert [one.name for one in registry.runtimes() if one.only_by_name] == ["cuda-emulated"]
