"""Is everything that can be missing or incompatible one clear error: GPU, driver, device, library, version, memory?

Failures that need no GPU are real here. A GPU of another kind, an old driver or too little memory are simulated by a
fake driver library.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from edgelm.bundle import Bundle
from edgelm.errors import (
    BundleError,
    DeviceError,
    DeviceMemoryError,
    EdgeLMError,
    ExportError,
    RuntimeUnavailableError,
)
from edgelm.installing import install_hint
from edgelm.runtimes import open_runtime
from edgelm.runtimes.cuda.device import DeviceInfo
from edgelm.runtimes.tensorrt import engine_info, library
from edgelm.runtimes.tensorrt.build import build_bundle
from edgelm.runtimes.tensorrt.builder import BuildOptions
from edgelm.runtimes.tensorrt.engine import Engine, choose, compatible, diagnosis, failed, incompatible
from edgelm.runtimes.tensorrt.engine_info import EngineInfo, engines
from edgelm.runtimes.tensorrt.library import Library
from edgelm.runtimes.tensorrt.plugins import PluginLibrary

A10 = DeviceInfo("A10", (8, 6), 72, 24 << 30, (13, 0))
INFO = EngineInfo("engines/e.engine", "tensorrt-rtx", "1.7.1.116", (86,), "library", 32, 512, 512, "float16", False, {})
HAVE = {"tensorrt-rtx": "1.7.1.116"}


def plugins_of(bundle: Bundle, info: EngineInfo) -> PluginLibrary:
    return PluginLibrary(bundle.file(info.library))


def test_without_a_driver_loading_says_so(copied: Bundle, monkeypatch) -> None:
    monkeypatch.setenv("EDGELM_CUDA_DRIVER", str(copied.path / "nowhere" / "libcuda.so.1"))
    with pytest.raises(DeviceError, match="no NVIDIA driver"):
        open_runtime(copied, "tensorrt")
    assert not compatible(copied)


def test_without_a_gpu_loading_says_so(copied: Bundle, gpu) -> None:
    gpu(devices=0)
    with pytest.raises(DeviceError, match="GPU"):
        open_runtime(copied, "tensorrt")
    assert not compatible(copied)


def test_an_engine_for_other_devices_is_refused_and_all_are_named(copied: Bundle, gpu) -> None:
    gpu(sm=90)
    with pytest.raises(RuntimeUnavailableError) as raised:
        open_runtime(copied, "tensorrt")
    said = str(raised.value)
    assert "engines/rtx-1.7.1-sm86-sm89-sm120.engine was built for SM 86, SM 89, SM 120" in said
    assert "is SM 90" in said
    assert f"run `edgelm build {copied.path}` on this device, or use the runtime cuda-kernels" in said
    assert not compatible(copied)
    gpu(sm=89)
    assert compatible(copied)


def test_an_old_driver_is_refused(copied: Bundle, gpu) -> None:
    gpu(sm=86, version=11080)
    with pytest.raises(EdgeLMError, match=r"driver"):
        open_runtime(copied, "tensorrt")
    assert incompatible(INFO, replace(A10, driver=(11, 8)), HAVE) == (
        "needs a driver for CUDA 12 or newer, and this one supports 11.8"
    )


def test_options_that_an_engine_lacks_are_refused(copied: Bundle, gpu) -> None:
    gpu(sm=86)
    with pytest.raises(EdgeLMError, match="was built for a cache of float16: leave kv out"):
        open_runtime(copied, "tensorrt", kv="int8")
    with pytest.raises(EdgeLMError, match="tensorrt has no option 'threads'; it has: context_length, chunk, kv"):
        open_runtime(copied, "tensorrt", threads=2)
    with pytest.raises(EdgeLMError, match="chunk is 0: it has to be an integer, 1 or more"):
        open_runtime(copied, "tensorrt", chunk=0)


def test_an_edition_or_version_that_is_not_here_is_named(tmp_path) -> None:
    assert incompatible(INFO, A10, HAVE) is None
    assert incompatible(INFO, A10, {}) == "needs tensorrt-rtx 1.7.1.116, which is not installed"
    assert (
        incompatible(INFO, A10, {"tensorrt-rtx": "1.8"}) == "was built by tensorrt-rtx 1.7.1.116, and 1.8 is installed"
    )
    older = replace(INFO, plugins="python")
    assert incompatible(older, A10, HAVE) == "was built by an older EdgeLM, whose plugins were written in Python"
    with pytest.raises(RuntimeUnavailableError, match="has no engine: run `edgelm build"):
        choose([], A10, HAVE, tmp_path)
    full = replace(INFO, file="engines/f.engine", flavour="tensorrt", version="11.4")
    both = {**HAVE, "tensorrt": "11.4"}
    assert choose([INFO, full], A10, both, tmp_path) is full
    assert choose([INFO, full], A10, HAVE, tmp_path) is INFO


def test_tensorrt_rtx_without_a_gpu_gives_our_error(copied: Bundle, rtx: Library) -> None:
    (info,) = engines(copied)
    with pytest.raises(RuntimeUnavailableError, match="does not run here: TensorRT-RTX finds no GPU that it can use"):
        Engine(rtx, info, copied.file(info.file), plugins_of(copied, info))


def test_a_damaged_engine_is_found(copied: Bundle, rtx: Library) -> None:
    (info,) = engines(copied)
    path = copied.file(info.file)
    path.write_bytes(b"\1" * 64 + path.read_bytes()[64:])
    with pytest.raises(RuntimeUnavailableError, match="the file is damaged: copy the bundle again"):
        Engine(rtx, info, path, plugins_of(copied, info))
    path.write_bytes(b"")
    with pytest.raises(BundleError, match="is empty"):
        engine_info.plugins_in(path)
    (copied.path / info.file.replace(".engine", ".json")).write_text('{"format": 2}')
    with pytest.raises(BundleError, match=r"format is 2, this EdgeLM reads 1: upgrade edgelm"):
        engines(copied)


def test_a_weight_memory_needs_an_engine_that_streams(copied: Bundle, rtx: Library) -> None:
    (info,) = engines(copied)
    with pytest.raises(EdgeLMError, match=r"built without weight streaming.*--weight-streaming"):
        Engine(rtx, info, copied.file(info.file), plugins_of(copied, info), weight_memory=1 << 20)


def test_every_diagnosis_of_tensorrt_rtx_has_a_message(rtx: Library) -> None:
    flags = rtx.api.EngineInvalidityDiagnostics
    names = [name for name in dir(flags) if name.isupper()]
    assert len(names) == 7
    words = {diagnosis(rtx.api, int(getattr(flags, name))) for name in names}
    assert len(words) == 7
    assert not any("finds no GPU" in word for word in words)
    assert "update the driver" in diagnosis(rtx.api, int(flags.OLD_CUDA_DRIVER))
    assert "--weight-memory" in diagnosis(rtx.api, int(flags.INSUFFICIENT_GPU_MEMORY))


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("Error Code 2: OutOfMemory (Requested size was 4096 bytes.)", DeviceMemoryError),
        ("Cuda Runtime (out of memory)", DeviceMemoryError),
        ("(cudaError 35: CUDA driver version is insufficient for CUDA runtime version)", DeviceError),
        ("Serialization assertion stdVersionRead == serializationVersion failed", BundleError),
        ("something else", DeviceError),
    ],
)
def test_failures_of_tensorrt_are_told_apart(said: str, kind: type[EdgeLMError]) -> None:
    error = failed("loading", said)
    assert type(error) is kind
    assert said in str(error)


def test_without_tensorrt_the_way_to_install_it_is_said(monkeypatch, copied: Bundle, gpu) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name.startswith("tensorrt") else real(name, *rest)
    )
    assert library.installed() == {}
    with pytest.raises(
        RuntimeUnavailableError, match=re.escape(f"TensorRT is not installed: {install_hint('tensorrt-rtx')}")
    ):
        library.load()
    with pytest.raises(RuntimeUnavailableError, match=re.escape(install_hint("tensorrt-rtx"))):
        build_bundle(copied, BuildOptions((86,)))
    with pytest.raises(
        RuntimeUnavailableError, match=f"nothing installed can run .*{re.escape(install_hint('tensorrt-rtx'))}"
    ):
        open_runtime(copied, "tensorrt")
    gpu(sm=86)
    assert not compatible(copied)


def test_an_unknown_or_missing_edition_is_refused(copied: Bundle) -> None:
    with pytest.raises(RuntimeUnavailableError, match="no TensorRT edition 'x'; there are: tensorrt, tensorrt-rtx"):
        library.load("x")
    if importlib.util.find_spec("tensorrt") is None:
        with pytest.raises(RuntimeUnavailableError, match=r"tensorrt is not installed: .*NVIDIA's own index"):
            build_bundle(copied, BuildOptions(), edition="tensorrt")


PARSE_AFTER_ANOTHER_IMPORT = """
import sys
import tensorrt_rtx
from pathlib import Path
from edgelm.bundle import Bundle
from edgelm.errors import ExportError
from edgelm.runtimes.tensorrt.build import build_bundle
from edgelm.runtimes.tensorrt.builder import BuildOptions
try:
    build_bundle(Bundle.open(sys.argv[1]), BuildOptions((86,)))
except ExportError as error:
    print(error)
"""


def test_another_import_before_ours_is_an_error_and_no_abort(copied: Bundle) -> None:
    """Otherwise the parser would not find its library and would abort the process."""
    done = subprocess.run(
        [sys.executable, "-c", PARSE_AFTER_ANOTHER_IMPORT, copied.path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "tensorrt_rtx was imported before EdgeLM could load its library under the name" in done.stdout


def test_impossible_build_options_are_refused() -> None:
    for options in ({"max_batch": 0}, {"chunk": 0}):
        with pytest.raises(ExportError, match="give 1 or more"):
            BuildOptions((86,), **options)
