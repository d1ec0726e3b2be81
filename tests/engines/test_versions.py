"""Does the code use full TensorRT from 10.3 (JetPack 6) to 11, and refuse what is older with the reason?

Full TensorRT is no package of pip. Its Python interface is one, without TensorRT: the names in it are compared with
those that we use. That they do what they say was not tried before 11.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgelm.bundle import Bundle
from edgelm.errors import ExportError, RuntimeUnavailableError
from edgelm.progress import Silent
from edgelm.runtimes.tensorrt import build, builder, engine, library
from edgelm.runtimes.tensorrt.builder import BuildOptions, GraphShape, build_engine
from edgelm.runtimes.tensorrt.library import FULL, RTX, Library
from edgelm.runtimes.tensorrt.plugins import PluginLibrary

# Python names of TensorRT in builder.py and engine.py, without those that the code asks for first or that only
# TensorRT-RTX has.
NAMES = re.findall(
    r"\w+",
    """
    ALIASED_PLUGIN_IO_10_03 Builder BuilderFlag DETAILED ExecutionContextAllocationStrategy INPUT
    NetworkDefinitionCreationFlag OnnxParser PreviewFeature ProfilingVerbosity Runtime STRONGLY_TYPED TensorIOMode
    USER_MANAGED WEIGHT_STREAMING add_optimization_profile build_serialized_network create_builder_config
    create_execution_context create_network create_optimization_profile desc deserialize_cuda_engine
    engine_host_code_allowed execute_async_v3 get_device_memory_size_for_profile_v2 get_error get_input
    get_plugin_registry get_tensor_dtype get_tensor_mode get_tensor_name get_tensor_shape node_name num_errors
    num_inputs num_io_tensors parse_from_file plugins_to_serialize profiling_verbosity set_device_memory set_flag
    set_input_shape set_optimization_profile_async set_preview_feature set_shape set_tensor_address
    streamable_weights_size weight_streaming_budget_v2
    """,
)
LATER = ("IStreamWriter", "build_serialized_network_to_stream")
ONLY_RTX = re.findall(
    r"\w+",
    """
    ComputeCapability EngineInvalidityDiagnostics EngineValidity create_runtime_cache create_runtime_config
    engine_header_size get_engine_validity num_compute_capabilities set_compute_capability
    set_execution_context_allocation_strategy set_runtime_cache
    """,
)
# Found by the pattern below, but of Python or of our own classes.
OTHERS = re.findall(
    r"\w+",
    """
    append profiles
    """,
)


@pytest.fixture(scope="module")
def interface() -> bytes:
    """The compiled Python interface of TensorRT 10.3."""
    try:
        found = metadata.distribution("tensorrt-cu12-bindings")
    except metadata.PackageNotFoundError:
        pytest.skip("tensorrt-cu12-bindings has no wheel for this Python or machine")
    assert found.version == "10.3.0"
    (file,) = (Path(str(found.locate_file(one))) for one in found.files or () if one.name == "tensorrt.so")
    return file.read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_tensorrt_10_3_has_every_name_that_we_use(interface: bytes, name: str) -> None:
    assert name.encode() in interface


@pytest.mark.parametrize("name", LATER)
def test_names_that_came_later_are_asked_for_first(interface: bytes, name: str) -> None:
    assert name.encode() not in interface
    source = Path(builder.__file__).read_text()
    assert f'hasattr(builder, "{LATER[1]}")' in source


def test_the_list_of_names_is_that_of_the_sources() -> None:
    sources = "".join(Path(str(module.__file__)).read_text() for module in (builder, engine))
    objects = (
        r"(?:api|builder|config|network|parser|profile|engine|made|_engine|_made|_runtime|error|\w+Flag|\w+Feature)"
    )
    used = set(re.findall(rf"\b{objects}\.([A-Za-z]\w+)", sources))
    assert set(NAMES) <= set(re.findall(r"\w+", sources))
    assert used - {*NAMES, *LATER, *ONLY_RTX, *OTHERS} == set()


def installed_version(folder: Path, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install a module `tensorrt` that has nothing but a version."""
    (folder / "tensorrt").mkdir()
    (folder / "tensorrt" / "__init__.py").write_text(f"__version__ = {version!r}\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    library._load.cache_clear()


@pytest.mark.parametrize("version", ["8.6.2", "10.0.1", "10.2.0.post1", "10.2"])
def test_an_older_tensorrt_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    installed_version(tmp_path, version, monkeypatch)
    said = (
        rf"TensorRT {re.escape(version)} is installed, and 10\.3 or newer is needed: caches are updated in place, .*Jet"
    )
    with pytest.raises(RuntimeUnavailableError, match=said):
        library.load(FULL)
    library._load.cache_clear()
    sys.modules.pop("tensorrt", None)


@pytest.mark.parametrize("version", ["10.3.0", "10.13.3.9.post1", "11.4.0.106", "of unknown version"])
def test_tensorrt_from_10_3_on_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    installed_version(tmp_path, version, monkeypatch)
    assert library.load(FULL).version == version
    library._load.cache_clear()
    sys.modules.pop("tensorrt", None)


def test_tensorrts_own_attention_needs_a_newer_one(tmp_path: Path) -> None:
    shape = GraphShape(512, "float16", "plugin", "engine")
    jetpack = Library(FULL, "10.3.0", SimpleNamespace())  # type: ignore[arg-type]
    said = r"needs TensorRT 10\.15, and 10\.3\.0 is installed: export the bundle again without --attention engine"
    with pytest.raises(ExportError, match=said):
        build_engine(jetpack, tmp_path / "g", tmp_path / "e", shape, BuildOptions(), PluginLibrary(tmp_path), (87,))


def test_what_an_older_parser_cannot_read_can_be_exported_without_it(rtx: Library) -> None:
    reasons = ["UNSUPPORTED_NODE: RMSNormalization"]
    advice = "an older TensorRT reads bundles that were exported with --matmul plugin"
    assert builder._unread(Library(FULL, "10.3.0", rtx.api), reasons) == f"{reasons[0]}; {advice}"
    assert builder._unread(Library(FULL, "11.4.0.106", rtx.api), reasons) == builder._unread(rtx, reasons) == reasons[0]


def small_network(rtx: Library) -> tuple[Any, Any, Any]:
    """A network that adds two vectors; its builder and configuration."""
    api = rtx.api
    made = api.Builder(rtx.logger())
    network = made.create_network(builder._strongly_typed(api))
    a, b = (network.add_input(name, api.float32, (8,)) for name in "ab")
    network.mark_output(network.add_elementwise(a, b, api.ElementWiseOperation.SUM).get_output(0))
    config = made.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(api.ComputeCapability.SM86, 0)
    return made, network, config


class Older:
    """TensorRT's builder as it was before 10.13."""

    def __init__(self, made: Any) -> None:
        self.build_serialized_network = made.build_serialized_network


def test_an_engine_is_the_same_streamed_or_returned(rtx: Library, tmp_path: Path) -> None:
    made, network, config = small_network(rtx)
    assert builder._write(rtx.api, made, network, config, tmp_path / "streamed")
    assert builder._write(rtx.api, Older(made), network, config, tmp_path / "returned")
    assert (tmp_path / "returned").read_bytes() == (tmp_path / "streamed").read_bytes() != b""
    refuses = SimpleNamespace(build_serialized_network=lambda network, config: None)
    assert not builder._write(rtx.api, refuses, network, config, tmp_path / "none")
    assert rtx.edition == RTX


@pytest.mark.parametrize("older", [False, True])
def test_a_full_disk_is_an_error_of_the_system(rtx: Library, tmp_path: Path, older: bool) -> None:
    made, network, config = small_network(rtx)
    out = tmp_path / "full"
    out.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        builder._write(rtx.api, Older(made) if older else made, network, config, out)
    assert not out.is_symlink()


def test_full_tensorrt_builds_for_the_chosen_gpu(
    copied: Bundle, gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpu(devices=2)
    calls = tmp_path / "calls"
    monkeypatch.setenv("FAKE_CUDA_LOG", str(calls))
    monkeypatch.setenv("EDGELM_GPU", "1")

    def stops(*_: object) -> None:
        (tmp_path / "calls_before").write_text(calls.read_text())
        raise ExportError("enough")

    monkeypatch.setattr(build, "build_engine", stops)
    full = Library(FULL, "10.3.0", SimpleNamespace())  # type: ignore[arg-type]
    assert build.chosen_sms(full, (), copied.path) == (86,)
    with pytest.raises(ExportError, match="enough"):
        build.build_into(copied.path, copied.manifest.graph.weights_file, full, BuildOptions(), (86,), Silent())
    made, after = ((tmp_path / name).read_text() for name in ("calls_before", "calls"))
    assert "cuDevicePrimaryCtxRetain 41\ncuCtxSetCurrent" in made
    assert "cuDevicePrimaryCtxRelease" not in made
    assert "cuDevicePrimaryCtxRelease_v2 41 left 0" in after
