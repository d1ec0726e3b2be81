"""Does libedgelm run GPU bundles as Python's cuda-kernels does, bit for bit, and name what goes wrong?

There is no GPU here: both run through the driver of tests/cuda/fake_driver.c, which runs emulated kernels on the CPU.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import harness
import numpy as np
import pytest
from harness import Error, Model

import edgelm
from edgelm.bundle import Bundle
from edgelm.export import ExportOptions, export_bundle
from edgelm.export.tensorrt.options import EngineOptions
from edgelm.generation.sampling import Sampler, Sampling
from edgelm.runtimes import open_runtime
from edgelm.runtimes.cuda.kernels import images

sys.path.append(str(Path(__file__).parents[1] / "cuda"))
import emulated_images
from gpu_bundles import CHECKPOINTS, GOLDEN, recipe

os.environ.setdefault("EDGELM_EMULATOR_CACHE", str(Path(__file__).parents[2] / "build" / "emulated"))
RUNTIME = "cuda-kernels"
IDS = [5, 900, 17, 44, 1203, 8, 310, 77, 640, 12, 99]
CASES = (("fox", "int8", "int8"), ("olmoe", "none", "bfloat16"), ("olmoe", "int4", "float16"), ("olmoe", "int4", "fp8"))
Bundles = Callable[[str, str], Path]


@pytest.fixture(scope="session")
def driver_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emulated_images.driver_library(tmp_path_factory.mktemp("driver"))


@pytest.fixture(autouse=True)
def driver(driver_library: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GPU of SM 86 with four multiprocessors."""
    monkeypatch.setenv("EDGELM_CUDA_DRIVER", str(driver_library))
    monkeypatch.setenv("FAKE_CUDA_MULTIPROCESSORS", "4")
    for name in ("EDGELM_GPU", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    return driver_library


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    """Return a function that exports a tiny checkpoint with emulated kernels, once each."""
    folder, made = tmp_path_factory.mktemp("gpu"), {}

    def one(family: str, name: str) -> Path:
        path = folder / f"{family}-{name}"
        if path not in made:
            options = ExportOptions(target="tensorrt", sms=(86,), golden=GOLDEN, engines=EngineOptions(build=False))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(images, "compile_images", emulated_images.compile_images)
                export_bundle(CHECKPOINTS / f"{family}-tiny", path, recipe=recipe(family, name), options=options)
            made[path] = path
        return path

    return one


@pytest.fixture
def fox(bundles: Bundles) -> Path:
    return bundles("fox", "int8")


@pytest.fixture
def copy(fox: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fox, tmp_path / "copy"))


def calls(log: Path, name: str) -> list[list[str]]:
    return [line.split()[1:] for line in log.read_text().splitlines() if line.split()[0] == name]


@pytest.mark.parametrize(("family", "name", "kv"), CASES)
def test_logits_and_tokens_are_pythons_bit_for_bit(bundles: Bundles, family: str, name: str, kv: str) -> None:
    path = bundles(family, name)
    chunk = 4 if kv == "int8" else 2048
    options = {"context_length": 64, "kv": kv, "chunk": chunk}
    with Model(path, **options) as ours, open_runtime(Bundle.open(path), RUNTIME, **options) as python:
        assert ours.info.runtime == RUNTIME.encode()
        want = np.concatenate([block.copy() for block in python.logits_all(IDS)])
        np.testing.assert_array_equal(ours.logits(IDS, len(IDS)), want)
        python.reset()
        ours.reset()
        last = python.prefill(IDS).copy()
        np.testing.assert_array_equal(ours.logits(IDS)[0], last)
        # Steps of one token: the first is launched, the second captured, the others are launches of the graph.
        followed = [*IDS]
        for token in (8, 44, 5, 900):
            followed.append(token)
            np.testing.assert_array_equal(ours.logits(followed)[0], python.decode(token))
        # The cache is cut to the common part, and decoding goes on behind it.
        python.truncate(7)
        np.testing.assert_array_equal(ours.logits([*IDS[:7], 3])[0], python.decode(3))
        for given in (Sampling(), Sampling(0.8, top_k=20, repetition_penalty=1.3, seed=1)):
            python.reset()
            ours.reset()
            sampler = Sampler(given, IDS)
            tokens = [sampler.sample(python.prefill(IDS).copy())]
            for _ in range(4):
                tokens.append(python.decode_sampled(tokens[-1], sampler))
            chosen = {"temperature": given.temperature, "top_k": given.top_k, "seed": given.seed}
            found = ours.generate(IDS, max_tokens=5, repetition_penalty=given.repetition_penalty, **chosen).tokens
            assert list(found) == tokens[: len(found)]
            assert len(found) == 5 or tokens[len(found)] in Bundle.open(path).manifest.tokens.eos_ids


def test_a_greedy_step_is_one_graph_and_copies_only_the_token(
    fox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "calls"
    with Model(fox, context_length=64) as model:
        model.generate(IDS, max_tokens=4)
        monkeypatch.setenv("FAKE_CUDA_LOG", str(log))
        generated = len(model.generate(IDS, max_tokens=12).tokens)
        monkeypatch.delenv("FAKE_CUDA_LOG")
    assert generated == 12
    made = [line.split()[0] for line in log.read_text().splitlines()]
    assert generated - 1 <= made.count("cuGraphLaunch") <= generated
    assert made.count("cuStreamBeginCapture_v2") == 0
    # Copies outside graphs, if any: the last token of the prompt, whose cache was kept, and its logits.
    assert made.count("cuMemcpyHtoDAsync_v2") <= 2
    assert made.count("cuMemcpyDtoHAsync_v2") <= 1


def test_memory_is_no_more_than_pythons(fox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    for name, opened in (("ours", lambda: Model(fox)), ("python", lambda: open_runtime(Bundle.open(fox), RUNTIME))):
        log = tmp_path / name
        monkeypatch.setenv("FAKE_CUDA_LOG", str(log))
        with opened():
            pass
        monkeypatch.delenv("FAKE_CUDA_LOG")
        sizes.append([int(call[0]) for call in calls(log, "cuMemAlloc_v2")])
        assert calls(log, "cuMemFree_v2")[-1] == ["left", "0"]
        assert calls(log, "cuDevicePrimaryCtxRelease_v2")[-1][-2:] == ["left", "0"]
    ours, python = sizes
    assert len(ours) == len(python) == 2
    assert ours[0] == python[0]  # the weights
    assert ours[1] <= python[1]  # Python's has memory for sampling as well


def test_a_session_goes_on_with_the_same_bits(bundles: Bundles, tmp_path: Path) -> None:
    path, session = bundles("olmoe", "int4"), tmp_path / "session"
    for kv in ("float16", "int8"):
        with Model(path, kv=kv, context_length=128) as saved, Model(path, kv=kv, context_length=64) as read:
            saved.logits(IDS)
            saved.save_session(session)
            read.load_session(session)
            assert read.cached_tokens == len(IDS)
            np.testing.assert_array_equal(read.logits([*IDS, 8]), saved.logits([*IDS, 8]))
    with Model(path, kv="fp8", context_length=64) as other, pytest.raises(Error, match="fp8") as found:
        other.load_session(session)
    assert found.value.code in ("FILE", "INVALID_ARGUMENT")


@pytest.mark.parametrize(("family", "name", "kv"), CASES)
def test_python_and_c_read_each_others_sessions(
    bundles: Bundles, tmp_path: Path, family: str, name: str, kv: str
) -> None:
    path = bundles(family, name)
    of_c, of_python = tmp_path / "c", tmp_path / "python"
    options = {"runtime": RUNTIME, "kv": kv}
    with (
        Model(path, context_length=128, **options) as ours,
        edgelm.load(path, context_length=128, **options) as python,
        Model(path, context_length=64, **options) as our_restart,
        edgelm.load(path, context_length=64, **options) as restart,
    ):
        tokens = python.generate(IDS, max_tokens=4).tokens
        assert ours.generate(IDS, max_tokens=4).tokens == tokens
        ours.save_session(of_c)
        python.save_session(of_python)
        size = python.runtime.saved_bytes(len(IDS) + len(tokens) - 1)  # type: ignore[attr-defined]
        assert of_c.read_bytes()[-4 - size : -4] == of_python.read_bytes()[-4 - size : -4]
        our_restart.load_session(of_python)
        assert restart.load_session(of_c) == our_restart.cached_tokens == len(IDS) + len(tokens) - 1
        longer = [*IDS, 8, 44]
        want = python.generate(longer, max_tokens=6)
        found, our_found = restart.generate(longer, max_tokens=6), our_restart.generate(longer, max_tokens=6)
        assert found.tokens == our_found.tokens == want.tokens
        assert found.timings.reused_tokens == our_found.reused == want.timings.reused_tokens == len(IDS)


def test_the_debug_program_passes_parity(bundles: Bundles) -> None:
    passed, report = harness.parity(bundles("olmoe", "int4"))
    assert passed, report
    layers = json.loads(report)["diagnosis"]["layers"]
    assert max(layer["worst"] for layer in layers) < 0.2


def refusal(path: Path, **options: object) -> Error:
    with pytest.raises(Error) as found:
        Model(path, context_length=64, **options)
    return found.value


@pytest.mark.parametrize(
    ("settings", "code", "said"),
    [
        ({"EDGELM_CUDA_DRIVER": "/nonexistent/libcuda.so.1"}, "UNAVAILABLE", "no NVIDIA driver: /nonexistent/"),
        ({"FAKE_CUDA_VERSION": "12040"}, "UNAVAILABLE", "its driver supports CUDA 12.4, and .* update the driver"),
        ({"FAKE_CUDA_SM": "75"}, "UNAVAILABLE", "compute capability 7.5, and the kernels need 8.0"),
        ({"FAKE_CUDA_MEMORY": str(1 << 20)}, "RUNTIME", "1.05 MB of 1.05 MB free, and .* are needed .*context_length"),
        ({"FAKE_CUDA_DEVICES": "0"}, "UNAVAILABLE", "nvidia-smi lists a GPU"),
        ({"CUDA_VISIBLE_DEVICES": ""}, "UNAVAILABLE", "CUDA_VISIBLE_DEVICES= shows no GPU"),
        ({"EDGELM_GPU": "1"}, "UNAVAILABLE", "there is no GPU 1: this machine shows 1"),
        ({"EDGELM_GPU": "GPU-1"}, "UNAVAILABLE", "EDGELM_GPU=GPU-1 is not the number of a GPU"),
        ({"FAKE_CUDA_FAIL": "cuMemAlloc_v2=2"}, "RUNTIME", "more are needed: end what else uses the GPU"),
        ({"FAKE_CUDA_FAIL": "cuModuleLoadDataEx=218"}, "RUNTIME", "ptxas fatal : as the compiler says"),
        ({"FAKE_CUDA_FAIL": "cuStreamSynchronize=700"}, "RUNTIME", "invalid memory, a bug in EdgeLM"),
    ],
)
def test_what_goes_wrong_is_named(
    fox: Path, settings: dict[str, str], code: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Error, match=said) as found, Model(fox, context_length=64) as model:
        model.logits(IDS)
    assert found.value.code == code


def test_the_chosen_gpu_is_used(fox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "calls"
    for name, value in (("FAKE_CUDA_DEVICES", "4"), ("CUDA_VISIBLE_DEVICES", "3,1"), ("EDGELM_GPU", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FAKE_CUDA_LOG", str(log))
    with Model(fox, context_length=64):
        pass
    assert calls(log, "cuDevicePrimaryCtxRetain") == [["41"]]


def test_kernels_that_wait_themselves_are_launched_early(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copy / "kernels" / "kernels.json"
    index = json.loads(path.read_text())
    waits = sorted(name for name in index["argument_bytes"] if name.startswith(("top_", "linear_")))
    index["images"]["sm_86"]["waits"] = waits
    path.write_text(json.dumps(index))
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"]["kernels/kernels.json"]["size"] = path.stat().st_size
    (copy / "manifest.json").write_text(json.dumps(manifest))
    found = {}
    for pdl in ("0", "1"):
        log = tmp_path / f"calls{pdl}"
        monkeypatch.setenv("EDGELM_GPU_PDL", pdl)
        monkeypatch.setenv("FAKE_CUDA_LOG", str(log))
        with Model(copy, context_length=64) as model:
            found[pdl] = model.logits(IDS)
        assert bool(calls(log, "cuLaunchKernelEx")) == (pdl == "1")
    np.testing.assert_array_equal(found["0"], found["1"])


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("program.json", lambda data: data["values"].update(logits=["f32", 8]), r'needs \d+ values in "logits"'),
        ("program.json", lambda data: data["nodes"].pop(0), "reads hidden.0, which no node computes"),
        ("program.json", lambda data: data["weights"]["rope.cos"].update(offset=1 << 40), "the program's weights end"),
        ("kernels/kernels.json", lambda data: data["argument_bytes"].popitem(), "lacks the kernel"),
        ("kernels/kernels.json", lambda data: data.update(format=9), "format is 9, this EdgeLM reads 2: upgrade"),
    ],
)
def test_a_damaged_bundle_is_refused(copy: Path, file: str, change: Callable[[dict], object], said: str) -> None:
    data = json.loads((copy / file).read_text())
    change(data)
    (copy / file).write_text(json.dumps(data))
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"][file]["size"] = (copy / file).stat().st_size
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Error, match=said) as found:
        Model(copy, context_length=64)
    assert found.value.code == ("UNAVAILABLE" if "lacks" in said else "BUNDLE")


def test_wrong_options_are_refused(fox: Path) -> None:
    error = refusal(fox, kv="int4")
    assert (error.code, "float16, bfloat16, float32, int8, fp8" in str(error)) == ("INVALID_ARGUMENT", True)
    assert refusal(fox, kv="float32").code in ("RUNTIME", "INVALID_ARGUMENT")  # the debug program's only
