"""Does examples/tensorrt_cpp compile, generate what our own executor does, and say what is wrong?

TensorRT needs a GPU: stand_in.cc replaces it. The bundle's plugins are real and run on the emulator. By hand,
2026-11-29: the example compiles with NVIDIA's headers of TensorRT 10.3, 10.9, 10.16, 11.0 and 11.1. Linked with
TensorRT-RTX 1.7.1 and a stand-in for cudaGetDeviceCount and cudaStreamCreate, it loads the library of plugins and ends
where TensorRT asks for a GPU; linked with the lean runtimes of 10.15 and 11.4, it ends in createInferRuntime.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from cpp_example import EXAMPLE, HERE, MOST_POSITIONS, Program, compile_example
from emulated_images import EmulatedKernels
from harness import Plugins
from kernel_folders import compiled
from played import PlayedGraph
from test_abi import COMPILER, NVIDIAS

from edgelm.bundle import Bundle
from edgelm.runtimes import open_runtime
from edgelm.runtimes.cuda.driver import CudaDevice
from edgelm.runtimes.tensorrt.engine_info import engines

PROMPT, COUNT = [3, 4, 5, 6, 7], 4


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compile_example(tmp_path_factory.mktemp("example"))


@pytest.fixture
def bundle(export) -> Bundle:
    return export("fox-tiny", "int8")


@pytest.fixture
def files(bundle: Bundle) -> tuple[Path, Path]:
    """The bundle's engine and its library of plugins."""
    (info,) = engines(bundle)
    return bundle.file(info.file), bundle.file(info.library)


@pytest.fixture
def graph(bundle: Bundle, harness: ctypes.CDLL, gpu: Callable[..., None], emulated) -> Iterator[PlayedGraph]:
    gpu(sm=86, multiprocessors=4)
    device = CudaDevice(EmulatedKernels())
    made = PlayedGraph(bundle, device, Plugins(harness, emulated(bundle)))
    yield made
    made.close()
    device.close()


def expected(bundle: Bundle) -> str:
    """What our own executor generates, prefilled in the same chunks."""
    with open_runtime(bundle, "cuda-emulated", context_length=40) as model:
        model.prefill(PROMPT[:4])
        ids = [int(np.argmax(model.prefill(PROMPT[4:])))]
        while len(ids) < COUNT:
            ids.append(int(np.argmax(model.decode(ids[-1]))))
    return " ".join(map(str, ids)) + "\n"


def test_it_generates_what_the_executor_does(example, bundle, files, graph, capfd, monkeypatch) -> None:
    engine, library = files
    program = Program(example, graph)
    monkeypatch.chdir(library.parent)
    assert program.run(engine, ",".join(map(str, PROMPT)), COUNT, library.name) == 0
    out, said = capfd.readouterr()
    assert out == expected(bundle)
    assert [line.split(" tokens, ")[0] for line in said.splitlines()] == ["prefill: 5", "decode: 3"]
    # TensorRT wants an absolute path. The first decoding step is not captured, the graph runs the others.
    assert program.calls == [
        f"loadLibrary {library}", f"engine of {engine.stat().st_size}", "run 1", "run 1", "run 0", "capture 0",
        "replay", "replay",
    ]  # fmt: skip
    assert program.buffers == 0


def test_an_engine_with_its_plugins_that_cannot_be_captured(example, bundle, files, graph, capfd, tmp_path) -> None:
    program = Program(example, graph, capturable=False)
    prompt = tmp_path / "ids.txt"
    prompt.write_text("3, 4, 5\n6 7\n")
    assert program.run(files[0], prompt, COUNT) == 0
    assert capfd.readouterr().out == expected(bundle)
    assert program.calls[0] == "allowed"
    assert program.calls[2:] == ["run 1", "run 1", "run 0", "capture 0", "run 0", "run 0"]
    assert program.buffers == 0


@pytest.mark.parametrize(
    ("refused", "said"),
    [
        ("cudaGetDeviceCount", "there is no GPU, or no driver that is new enough for it: as CUDA says"),
        ("cudaMalloc", "allocating 16 bytes for input_ids: as CUDA says"),
        ("createInferRuntime", "starting TensorRT failed: it says why"),
        ("loadLibrary", "loading LIBRARY failed: it says why"),
        ("deserializeCudaEngine", "loading ENGINE in TensorRT 10.3.4 failed: it says why"),
        ("createExecutionContext", "making an execution context failed: it says why"),
        ("setOptimizationProfileAsync", "choosing a profile failed: it says why"),
        ("cudaStreamSynchronize", "choosing a profile: as CUDA says"),
    ],
)
def test_each_failure_is_one_line_with_tensorrts_reason(example, files, graph, capfd, refused: str, said: str) -> None:
    engine, library = files
    program = Program(example, graph, refused=refused, message="it says why")
    assert program.run(engine, "1,2", 2, library) == 1
    said = said.replace("ENGINE", str(engine)).replace("LIBRARY", str(library))
    assert capfd.readouterr() == ("", f"error: {said}\n")
    assert program.buffers == 0


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["ENGINE", "1,2"], 2, "usage: generate ENGINE IDS COUNT [PLUGINS]"),
        (["nothing.engine", "1,2", 4], 1, "error: cannot read the engine nothing.engine, or it is empty"),
        ([HERE, "1,2", 4], 1, f"error: cannot read the engine {HERE}, or it is empty"),
        (["EMPTY", "1,2", 4], 1, "error: cannot read the engine EMPTY, or it is empty"),
        (["ENGINE", "1,2", 4, "no.so"], 1, "error: there is no library no.so"),
        (["ENGINE", "1,x", 4], 1, "error: IDS is neither a list of token ids, such as 12,345,67, nor a file of them"),
        (["ENGINE", "", 4], 1, "error: IDS is neither a list of token ids, such as 12,345,67, nor a file of them"),
        (["ENGINE", "1,2", 0], 1, "error: COUNT is 0: give 1 or more"),
        (["ENGINE", "1,2", "x"], 1, "error: COUNT is x: give 1 or more"),
        (
            ["ENGINE", "1,2", MOST_POSITIONS - 1], 1,
            "error: the prompt and new tokens are 129, and the engine's caches hold 128",
        ),
        (["ENGINE", "1,3072", 4], 1, "error: 3072 is no token id: there are 3072"),
        (["ENGINE", "-1", 4], 1, "error: -1 is no token id: there are 3072"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(example, files, graph, capfd, tmp_path, arguments, status: int, said: str) -> None:
    empty = tmp_path / "empty.engine"
    empty.touch()
    names = {"ENGINE": files[0], "EMPTY": empty}
    program = Program(example, graph)
    assert program.run(*(names.get(argument, argument) for argument in arguments)) == status
    assert capfd.readouterr() == ("", said.replace("EMPTY", str(empty)) + "\n")
    assert program.buffers == 0


def test_the_engine_of_another_program_is_refused(example, files, capfd) -> None:
    program = Program(example)
    assert program.run(files[0], "1,2", 4) == 1
    assert capfd.readouterr().err == f"error: {files[0]} is no engine of an EdgeLM bundle\n"


CMAKE = shutil.which("cmake")


@pytest.mark.skipif(CMAKE is None, reason="CMake is not installed")
def test_its_build_finds_tensorrt_and_cuda(tmp_path: Path) -> None:
    """With the stand-in as TensorRT's library, and a module that stands in for CMake's own of the CUDA toolkit."""
    root, modules = tmp_path / "tensorrt", tmp_path / "modules"
    (root / "lib").mkdir(parents=True)
    modules.mkdir()
    shutil.copytree(HERE / "declarations", root / "include")
    compiled(
        "c++", ["-shared", "-fPIC", "-I", HERE / "declarations", HERE / "stand_in.cc"], root / "lib" / "libnvinfer.so"
    )
    (modules / "FindCUDAToolkit.cmake").write_text("add_library(CUDA::cudart INTERFACE IMPORTED)\n")
    build = tmp_path / "build"
    options = [f"-DTENSORRT_ROOT={root}", f"-DCMAKE_MODULE_PATH={modules}"]
    subprocess.run([CMAKE, "-S", EXAMPLE, "-B", build, *options], check=True)
    subprocess.run([CMAKE, "--build", build], check=True)
    done = subprocess.run([build / "generate"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "usage: generate ENGINE IDS COUNT [PLUGINS]\n")


@pytest.mark.skipif(not NVIDIAS, reason="NVIDIA's headers of TensorRT are not installed")
def test_it_compiles_against_nvidias_headers() -> None:
    options = ["-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    subprocess.run([*COMPILER, *options, EXAMPLE / "generate.cc"], check=True)
