"""Does an engine ask TensorRT for what it needs, and is every refusal an error with TensorRT's own reason?

A stand-in replaces TensorRT's runtime, which needs a GPU. The library, its log and its constants are the real ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from harness import Plugins

from edgelm.errors import BundleError, DeviceError, DeviceMemoryError, RuntimeUnavailableError
from edgelm.runtimes.cuda.planning import library_path
from edgelm.runtimes.tensorrt.engine import DECODE, PREFILL, Context, Engine
from edgelm.runtimes.tensorrt.engine_info import EngineInfo
from edgelm.runtimes.tensorrt.library import Library
from edgelm.runtimes.tensorrt.plugins import PluginLibrary

INFO = EngineInfo("engines/e.engine", "tensorrt-rtx", "1.7.1.116", (86,), "library", 32, 512, 512, "float16", False, {})
STREAMS = replace(INFO, weight_streaming=True)
SCRATCH = {DECODE: 1000, PREFILL: 5000}


class Played:
    """TensorRT's runtime, engine, configuration and context in one: it writes down what is asked of it.

    Attributes:
        asked: names of calls with their arguments.
        refuses: name of a call to the message that it logs when it refuses.
    """

    engine_header_size = 64
    num_io_tensors = 2
    streamable_weights_size = 1 << 20

    def __init__(self, api: Any) -> None:
        self.api = api
        self.asked: dict[str, tuple[Any, ...]] = {}
        self.refuses: dict[str, str] = {}
        self.logger: Any = None
        self.validity = api.EngineValidity.VALID
        self.flags = 0

    def _answer(self, name: str, *arguments: Any, answer: Any = True, refusal: Any = False) -> Any:
        self.asked[name] = arguments
        if name not in self.refuses:
            return answer
        self.logger.log(self.api.ILogger.ERROR, self.refuses[name])
        return refusal

    def get_plugin_registry(self) -> Any:
        return self

    def load_library(self, path: str) -> Any:
        return self._answer("load_library", path, answer=self, refusal=None)

    def get_engine_validity(self, header: bytes) -> tuple[Any, int]:
        self.asked["get_engine_validity"] = (len(header),)
        return self.validity, self.flags

    def deserialize_cuda_engine(self, data: Any) -> Any:
        return self._answer("deserialize_cuda_engine", len(data), answer=self, refusal=None)

    def get_tensor_name(self, index: int) -> str:
        return ("input_ids", "logits")[index]

    def get_tensor_mode(self, name: str) -> Any:
        return self.api.TensorIOMode.INPUT if name == "input_ids" else self.api.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(itemsize=4)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (1, -1)

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return SCRATCH[profile]

    def create_runtime_config(self) -> Any:
        return self

    def create_runtime_cache(self) -> Any:
        return self

    def deserialize(self, data: bytes) -> None:
        self.asked["deserialize"] = (data,)

    def serialize(self) -> bytes:
        return b"compiled"

    def set_runtime_cache(self, cache: Any) -> None:
        self.asked["set_runtime_cache"] = (cache,)

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.asked["strategy"] = (strategy,)

    def create_execution_context(self, config: Any) -> Any:
        return self._answer("create_execution_context", config, answer=self, refusal=None)

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        return bool(self._answer("profile", profile, stream))

    def set_device_memory(self, address: int, size: int) -> None:
        self.asked["scratch"] = (address, size)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        return bool(self._answer("shape", name, shape))

    def set_tensor_address(self, name: str, address: int) -> bool:
        return bool(self._answer("address", name, address))

    def execute_async_v3(self, stream: int) -> bool:
        return bool(self._answer("run", stream))


@pytest.fixture
def played(rtx: Library, monkeypatch: pytest.MonkeyPatch) -> Played:
    stand_in = Played(rtx.api)

    def runtime(logger: Any) -> Played:
        stand_in.logger = logger
        return stand_in

    monkeypatch.setattr(rtx.api, "Runtime", runtime)
    return stand_in


@pytest.fixture
def load(rtx: Library, played: Played, tmp_path: Path) -> Callable[..., Engine]:
    path = tmp_path / "e.engine"
    path.write_bytes(bytes(100))

    def one(info: EngineInfo = INFO, **options: Any) -> Engine:
        return Engine(rtx, info, path, PluginLibrary(library_path()), **options)

    return one


def context(engine: Engine, cache: Path | None = None) -> Context:
    return engine.context(PREFILL, 7, 4096, 5000, cache)


def test_an_engine_is_checked_and_described(load: Callable[..., Engine], played: Played) -> None:
    engine = load()
    assert played.asked["load_library"] == (str(library_path()),)
    assert played.asked["get_engine_validity"] == (64,)
    assert played.asked["deserialize_cuda_engine"] == (100,)
    assert [(t.name, t.is_input, t.element_bytes) for t in engine.tensors] == [
        ("input_ids", True, 4), ("logits", False, 4),
    ]  # fmt: skip
    assert engine.input_shape("input_ids") == (1, -1)
    assert engine.activation_bytes() == 5000
    engine.close()


def test_an_engine_for_another_gpu_is_refused_with_the_reason(load: Callable[..., Engine], played: Played) -> None:
    played.validity = played.api.EngineValidity.INVALID
    played.flags = int(played.api.EngineInvalidityDiagnostics.UNSUPPORTED_CC)
    with pytest.raises(RuntimeUnavailableError, match="it was not built for this GPU: build it with `edgelm build"):
        load()


@pytest.mark.parametrize(
    ("said", "kind"),
    [("Requested size: out of memory", DeviceMemoryError), ("Serialization assertion failed", BundleError)],
)
def test_an_engine_that_cannot_be_loaded_is_an_error_with_tensorrts_reason(
    load: Callable[..., Engine], played: Played, said: str, kind: type[Exception]
) -> None:
    played.refuses["deserialize_cuda_engine"] = said
    with pytest.raises(kind, match=f"loading it .*failed: .*{said}"):
        load()


@pytest.mark.parametrize(("asked", "taken"), [(1 << 10, 1 << 10), (1 << 30, 1 << 20)])
def test_streamed_weights_get_the_memory_asked_and_no_more_than_they_have(
    load: Callable[..., Engine], played: Played, asked: int, taken: int
) -> None:
    load(STREAMS, weight_memory=asked)
    assert played.weight_streaming_budget_v2 == taken  # type: ignore[attr-defined]


def test_a_context_has_its_profile_scratch_and_addresses(load: Callable[..., Engine], played: Played) -> None:
    made = context(load())
    assert played.asked["strategy"] == (played.api.ExecutionContextAllocationStrategy.USER_MANAGED,)
    assert played.asked["profile"] == (PREFILL, 7)
    assert played.asked["scratch"] == (4096, 5000)
    made.bind("input_ids", 512, [1, 3])
    assert played.asked["shape"] == ("input_ids", (1, 3))
    assert played.asked["address"] == ("input_ids", 512)
    made.run(7)
    assert played.asked["run"] == (7,)
    assert made.capturable(7)
    made.close()


@pytest.mark.parametrize(
    ("call", "doing"),
    [
        ("create_execution_context", "making a context"),
        ("profile", "choosing a profile"),
        ("shape", r"setting the shape of input_ids to \(1, 3\)"),
        ("address", "setting the address of input_ids"),
        ("run", "running it"),
    ],
)
def test_a_refused_call_is_named_with_tensorrts_reason(
    load: Callable[..., Engine], played: Played, call: str, doing: str
) -> None:
    played.refuses[call] = "it does not like that"
    with pytest.raises(DeviceError, match=rf"{doing} \(.*e\.engine\) failed: it does not like that"):
        made = context(load())
        made.bind("input_ids", 512, [1, 3])
        made.run(7)


def test_an_error_of_a_plugin_is_raised_as_it_is(load: Callable[..., Engine], played: Played, harness) -> None:
    engine = load()
    made = context(engine)
    plugins = Plugins(harness, library_path())

    def run(stream: int) -> bool:
        assert plugins.create("LastToken", "nonsense") is None
        return False

    played.execute_async_v3 = run  # type: ignore[method-assign]
    with pytest.raises(BundleError, match=r"^a plugin has the field nonsense"):
        made.run(7)


def test_a_library_of_plugins_inside_the_engine_is_allowed_and_no_other_is_loaded(
    load: Callable[..., Engine], played: Played
) -> None:
    load(replace(INFO, plugins="embedded"))
    assert played.engine_host_code_allowed  # type: ignore[attr-defined]
    assert "load_library" not in played.asked


def test_compiled_kernels_are_kept_for_the_next_start(
    load: Callable[..., Engine], played: Played, tmp_path: Path
) -> None:
    cache = tmp_path / "cache" / "e.rtx"
    context(load(), cache).keep_compiled()
    assert cache.read_bytes() == b"compiled"
    assert "deserialize" not in played.asked
    context(load(), cache)
    assert played.asked["deserialize"] == (b"compiled",)
    context(load()).keep_compiled()  # without a place for them there is nothing to keep


def test_kernels_that_cannot_be_written_are_no_error(load: Callable[..., Engine], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    context(load(), tmp_path / "cache" / "e.rtx").keep_compiled()
    assert (tmp_path / "cache").read_text() == "a file"
