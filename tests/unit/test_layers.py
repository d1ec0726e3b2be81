"""Does every file import only from lower layers, and are there no import cycles?

All import statements in the sources count, also those inside functions and under TYPE_CHECKING. `LAYERS` is the section
"Layers" of the design as data. An entry of a table that is no longer needed fails, so that the tables can only shrink.
tests/unit/test_packaging.py shows that running bundles needs neither torch nor onnx nor transformers.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {"edgelm": "edgelm", "quant": "edgelm.quant", "export": "edgelm.export", "runtimes": "edgelm.runtimes"}
MOST_FILES = 15
OPEN_ENDED = {"edgelm/models": "one file per model"}
"""Folders that may hold more files, with the reason."""

LAYERS = {
    "base": "errors sizes slices output_paths files installing devices progress progress_bar json_dataclass corpus "
    "version platforms system measuring.energy",
    "models": "models",
    "primitives": "quant.scheme quant.tensor quant.primitives quant.fp8 quant.native quant.codec quant.recipe "
    "quant.quality",
    "checkpoint": "checkpoint",
    "tokenization": "tokenization",
    "bundle": "bundle",
    "sampling": "generation.sampling generation.shortlist",
    "runtimes": "runtimes",
    "preflight": "preflight",
    "generation": "generation",
    "reference": "reference",
    "weights": "quant quant.source quant.formats quant.checkpoint",
    "rounding": "quant.activations quant.reference",
    "methods": "quant.calibration quant.methods quant.mixed_precision quant.smoothing quant.scaled_checkpoint",
    "pages": "pages",
    "parity": "parity",
    "evaluation": "evaluation",
    "comparison": "comparison",
    "synth": "synth",
    "export": "export",
    "benchmark": "benchmark",
    "measuring": "measuring",
    "kit": "kit",
    "serving": "serving",
    "releases": "runtimes.csrc.dist",
    "edgelm": "edgelm",
    "cli": "cli __main__",
}
"""Modules by part, without the prefix "edgelm.", lowest part first. A module never imports from a later part."""

ALLOWED = {
    "primitives": "base models",
    "models": "base",
    "checkpoint": "base models",
    "tokenization": "base checkpoint",
    "bundle": "base models primitives",
    "sampling": "base",
    "runtimes": "base models checkpoint bundle sampling",
    "preflight": "base models primitives checkpoint bundle runtimes",
    "generation": "base tokenization bundle sampling runtimes",
    "reference": "base models checkpoint",
    "weights": "base models primitives checkpoint",
    "rounding": "base models primitives reference weights",
    "methods": "base models primitives checkpoint tokenization bundle reference weights rounding",
    "pages": "base",
    "parity": "base models primitives checkpoint tokenization bundle runtimes reference weights rounding pages",
    "evaluation": "base models primitives checkpoint tokenization bundle sampling runtimes generation reference "
    "weights rounding pages parity",
    "comparison": "base pages",
    "synth": "base models checkpoint",
    "export": "base models primitives checkpoint tokenization bundle runtimes reference weights methods parity",
    "benchmark": "base bundle sampling runtimes",
    "measuring": "base bundle pages benchmark",
    "kit": "base bundle",
    "serving": "base models tokenization bundle runtimes generation parity",
    "releases": "base",
    "edgelm": "base bundle generation parity",
    "cli": "base primitives models checkpoint tokenization bundle sampling runtimes preflight generation weights "
    "methods pages parity evaluation comparison synth export benchmark measuring kit serving edgelm",
}
"""The parts that a part may import."""

EXCEPTIONS: dict[tuple[str, str], str] = {}
"""Imports of a higher part that are allowed, with the reason."""

PACKAGES = {
    "torch": "reference rounding methods parity evaluation export",
    "onnx": "export",
    "onnxruntime": "runtimes",
    "tokenizers": "tokenization",
    "sentencepiece": "tokenization",
    "jinja2": "tokenization pages",
    "rich": "base",
    "tomli": "base",
    "click": "cli",
    "anyio": "serving",
    "llguidance": "serving",
    "ray": "serving",
    "starlette": "cli serving",
    "uvicorn": "cli",
    "huggingface_hub": "base checkpoint",
    "lm_eval": "evaluation",
    "tqdm": "evaluation",
    "pytest": "parity",
    "packaging": "kit releases",
    "lief": "releases",
    "scikit_build_core": "releases",
}
"""Third-party packages and the parts that import them, without numpy."""

AT_ONCE = {
    "torch": "reference rounding methods evaluation",
    "onnx": "export",
    "rich": "base",
    "click": "cli",
    "anyio": "serving",
    "llguidance": "serving",
    "ray": "serving",
    "starlette": "serving",
    "uvicorn": "cli",
    "lm_eval": "evaluation",
    "tqdm": "evaluation",
    "pytest": "parity",
    "packaging": "releases",
    "lief": "releases",
    "scikit_build_core": "releases",
}
"""Modules that import a third-party package at module level; the others import it inside functions."""


def test_does_every_part_import_only_what_it_may() -> None:
    found: dict[str, set[str]] = defaultdict(set)
    for module, other in _edges():
        if (module, other) not in EXCEPTIONS and _part(module) != _part(other):
            found[_part(module)].add(_part(other))
    assert found == {part: set(allowed.split()) for part, allowed in ALLOWED.items()}


def test_is_no_part_allowed_to_import_a_higher_one() -> None:
    order = list(LAYERS)
    above = [
        (part, other)
        for part, allowed in ALLOWED.items()
        for other in allowed.split()
        if order.index(other) >= order.index(part)
    ]
    assert above == []


def test_is_every_exception_needed() -> None:
    order, edges = list(LAYERS), set(_edges())
    assert [edge for edge in EXCEPTIONS if edge not in edges] == []
    assert [e for e in EXCEPTIONS if order.index(_part(e[0])) >= order.index(_part(e[1]))] == []


def test_is_the_command_line_not_imported_by_other_parts() -> None:
    above = [(a, b) for a, b in _edges() if _part(b) == "cli" and _part(a) != "cli"]
    assert above == []


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in (ROOT / "edgelm" / "cli").iterdir() if path.stem[0] != "_")
)
def test_does_a_command_import_lazily(name: str) -> None:
    """`edgelm --help` and errors in options must be fast, so modules that import slowly are imported lazily."""
    seen: set[str] = set()
    left = [f"edgelm.cli.{name}"]
    while left:
        module = left.pop()
        if module not in seen and module:
            seen.add(module)
            imports = [one for statement in _at_once(_modules()[module]) for one in _imported(statement)]
            left += [*imports, module.rpartition(".")[0]]
    assert {_part(module) for module in seen} <= {"base", "models", "bundle", "edgelm", "cli"}
    others = {one for module in seen for statement in _at_once(_modules()[module]) for one in _others(statement)}
    assert others <= {"click"}


def test_are_there_no_import_cycles() -> None:
    assert list(_circles()) == []


def test_are_third_party_packages_imported_only_where_allowed() -> None:
    used: dict[str, set[str]] = defaultdict(set)
    at_once: dict[str, set[str]] = defaultdict(set)
    for module, tree in _modules().items():
        for name in (name for statement in _statements(tree) for name in _others(statement)):
            used[name].add(_part(module))
        for name in (name for statement in _at_once(tree) for name in _others(statement)):
            at_once[name].add(_part(module))
    for found, table in ((used, PACKAGES), (at_once, AT_ONCE)):
        del found["numpy"]
        assert found == {name: set(parts.split()) for name, parts in table.items()}


def test_has_no_folder_too_many_files() -> None:
    found = {}
    for path in (path for folder in FOLDERS for path in [ROOT / folder, *(ROOT / folder).rglob("*")]):
        if path.is_dir() and path.name != "__pycache__":
            loose = [one for one in path.iterdir() if one.is_file() and one.suffix not in (".typed", ".so")]
            name = path.relative_to(ROOT).as_posix()
            if len(loose) > MOST_FILES and name not in OPEN_ENDED:
                found[name] = len(loose)
    assert found == {}


@lru_cache
def _modules() -> Mapping[str, ast.Module]:
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join((package, *(part for part in parts if part != "__init__")))
            found[name] = ast.parse(path.read_bytes(), str(path))
    return found


@lru_cache
def _edges() -> tuple[tuple[str, str], ...]:
    """Return pairs (module, module of EdgeLM that it imports)."""
    pairs = {
        (module, other)
        for module, tree in _modules().items()
        for statement in _statements(tree)
        for other in _imported(statement)
    }
    return tuple(sorted(pair for pair in pairs if pair[0] != pair[1]))


def _statements(tree: ast.Module) -> Iterator[ast.Import | ast.ImportFrom]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom))


def _at_once(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield the imports that run when the module is imported: not those in functions or under TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from (one for branch in node.orelse for one in _at_once(branch))
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _at_once(node)


def _imported(statement: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """Yield the modules of EdgeLM that a statement imports: of `from package import name` the module or the package."""
    if isinstance(statement, ast.Import):
        yield from (one.name for one in statement.names if one.name in _modules())
        return
    assert not statement.level, "imports are absolute"
    assert statement.module is not None
    if statement.module.partition(".")[0] == "edgelm":
        for one in statement.names:
            full = f"{statement.module}.{one.name}"
            yield full if full in _modules() else statement.module


def _others(statement: ast.Import | ast.ImportFrom) -> Iterator[str]:
    names = [one.name for one in statement.names] if isinstance(statement, ast.Import) else [statement.module or ""]
    for name in names:
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names and top != "edgelm":
            yield top


@lru_cache
def _part(module: str) -> str:
    parts = {name: part for part, names in LAYERS.items() for name in names.split()}
    name = module.removeprefix("edgelm.")
    if module in ("edgelm", "edgelm.quant"):
        return parts[name]
    while name not in parts:
        name, dot, _ = name.rpartition(".")
        assert dot, f"{module} is in no part of LAYERS"
        assert name != "quant", f"{module} is in no part of LAYERS"
    return parts[name]


def _circles() -> Iterator[list[str]]:
    """Yield groups of modules with import cycles (Tarjan's strongly connected components)."""
    graph: dict[str, list[str]] = defaultdict(list)
    for module, other in _edges():
        graph[module].append(other)
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []

    def visit(module: str) -> Iterator[list[str]]:
        index[module] = lowest[module] = len(index)
        stack.append(module)
        for other in graph[module]:
            if other not in index:
                yield from visit(other)
            if other in stack:
                lowest[module] = min(lowest[module], lowest[other])
        if lowest[module] == index[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1:
                yield sorted(group)

    for module in _modules():
        if module not in index:
            yield from visit(module)
