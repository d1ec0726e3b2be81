"""Does the runtime cuda-kernels compute the model correctly on the emulator?"""

from __future__ import annotations

import json
import queue
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu_bundles import write_bundle

import edgelm
from edgelm.bundle import Bundle, sha256_of
from edgelm.errors import (
    BundleError,
    DeviceError,
    DeviceMemoryError,
    EdgeLMError,
    GenerationError,
    RuntimeUnavailableError,
)
from edgelm.generation.options import Options
from edgelm.generation.sampling import Sampler, Sampling
from edgelm.parity.check import check_parity
from edgelm.runtimes import open_batch, open_runtime, runtimes
from edgelm.runtimes.cuda.device import Device
from edgelm.runtimes.cuda.emulated import EmulatedDevice
from edgelm.runtimes.cuda.model import CudaRuntime
from edgelm.runtimes.cuda.program import PROGRAM_FILE
from edgelm.serving import engine

RUNTIME = "cuda-emulated"
FAMILIES = ("olmoe", "fox")
RECIPES = ("none", "int8", "int4", "fp8", "fp8-token")
TOKENS = [5, 900, 17, 44, 1203, 8, 310, 77, 640, 12, 99]
Bundles = Callable[[str, str], Bundle]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    """Return a function that exports each bundle once."""
    made: dict[tuple[str, str], Bundle] = {}

    def bundle(family: str, name: str) -> Bundle:
        if (family, name) not in made:
            made[family, name] = write_bundle(tmp_path_factory.mktemp("bundle") / name, family, name)
        return made[family, name]

    return bundle


@pytest.fixture
def damaged(bundles: Bundles, tmp_path: Path) -> Iterator[Path]:
    """A copy of a bundle of OLMoE, which a test may change."""
    yield Path(shutil.copytree(bundles("olmoe", "int4").path, tmp_path / "damaged"))


def change_program(folder: Path, change: Callable[[dict], None]) -> Bundle:
    """Rewrite a bundle's program and update its manifest."""
    path = folder / PROGRAM_FILE
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][PROGRAM_FILE]["size"] = path.stat().st_size
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return Bundle.open(folder)


def test_does_an_older_bundle_still_pass_parity() -> None:
    """tests/export/test_older_bundles.py describes the bundle."""
    report = check_parity(Path(__file__).parents[1] / "export" / "older_bundles" / "fox-tensorrt", runtime=RUNTIME)
    assert report.passed, report


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_does_a_bundle_pass_parity_and_is_the_debug_program_exact(bundles: Bundles, family: str, name: str) -> None:
    report = check_parity(bundles(family, name), runtime=RUNTIME)
    assert report.passed, [check for check in report.checks if check.passed is False]
    assert report.runtime == RUNTIME
    assert report.diagnosis is not None
    # 1 is the limit; float32 rounding leaves 0.04, the lowest bit of one weight 5 and more.
    assert max(layer.worst for layer in report.diagnosis.layers) < 0.2
    # The effect of rounding activations: E4M3 has 4 bits, bfloat16 8.
    assert report.kl_mean < (1e-2 if name == "fp8-token" else 1e-3)
    assert report.logit_error < (0.05 if name == "fp8-token" else 0.01)


def test_is_a_renormalising_router_found_and_named(damaged: Path) -> None:
    def renormalise(data: dict) -> None:
        layer = [node for node in data["nodes"] if node["op"] == "SparseMoE"][1]
        assert layer["attrs"]["normalize"] == 0
        layer["attrs"]["normalize"] = 1

    report = check_parity(change_program(damaged, renormalise), runtime=RUNTIME, integrity=False)
    assert not report.passed
    assert report.first_diverged_layer == 1
    assert report.cause is not None
    assert "MoE" in report.cause


def test_are_logits_the_same_at_once_in_chunks_and_token_by_token(bundles: Bundles) -> None:
    with open_runtime(bundles("olmoe", "int4"), RUNTIME, context_length=64, chunk=4) as model:
        at_once = np.concatenate([block.copy() for block in model.logits_all(TOKENS)])
        assert at_once.shape == (len(TOKENS), model.vocab_size)
        model.reset()
        last = model.prefill(TOKENS).copy()
        model.truncate(5)
        for token in TOKENS[5:]:
            stepped = model.decode(token).copy()
        assert model.position == len(TOKENS)
    scale = np.abs(at_once).max()
    # The kernels for few and for many tokens sum in different orders.
    assert np.abs(at_once[-1] - last).max() < 0.02 * scale
    assert np.abs(stepped - last).max() < 0.02 * scale


@pytest.mark.parametrize("family", FAMILIES)
def test_is_the_greedy_token_the_largest_logit(bundles: Bundles, family: str, copies: list[int]) -> None:
    with open_runtime(bundles(family, "int8"), RUNTIME, context_length=64) as model:
        token = int(model.prefill(TOKENS).argmax())
        for _ in range(3):
            position = model.position
            copies.clear()
            chosen = model.decode_greedy(token)
            assert copies == []
            model.truncate(position)
            assert chosen == int(model.decode(token).argmax())
            token = chosen


SAMPLING = (
    Sampling(0.8, top_k=20, repetition_penalty=1.3, seed=1),
    Sampling(0.7, top_p=0.9, seed=2),
    Sampling(1.0, min_p=0.02, seed=3),
    Sampling(1.5, seed=4),
    Sampling(repetition_penalty=1.5),
)


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the bytes of each copy that is not part of a CUDA graph."""
    done: list[int] = []

    def counted(name: str) -> None:
        original = getattr(EmulatedDevice, name)

        def copy(self: EmulatedDevice, address: int, data: np.ndarray) -> None:
            done.append(data.nbytes)
            original(self, address, data)

        monkeypatch.setattr(EmulatedDevice, name, copy)

    for name in ("upload", "download"):
        counted(name)
    return done


@pytest.mark.parametrize("options", SAMPLING, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_is_a_sampled_token_that_of_the_logits(
    bundles: Bundles, family: str, options: Sampling, copies: list[int]
) -> None:
    here, host = Sampler(options, TOKENS), Sampler(options, TOKENS)
    with open_runtime(bundles(family, "int8"), RUNTIME, context_length=64) as model:
        here.sample(first := model.prefill(TOKENS).copy())
        token = host.sample(first)
        for step in range(8):
            position = model.position
            copies.clear()
            found = model.decode_sampled(token, here)
            # The bits of the prompt's tokens, a segment of the logits for a draw from all of them; else nothing.
            seen, part = model.vocab_size // 8, 4 * 1024
            expected = [seen] * (options.repetition_penalty != 1 and step == 0) + [part] * (options == SAMPLING[3])
            assert copies == expected
            model.truncate(position)
            token = host.sample(model.decode(token))
            assert found == token


def test_are_sampled_tokens_of_a_batch_those_of_its_logits(bundles: Bundles, copies: list[int]) -> None:
    prompts = [TOKENS[:3], TOKENS, TOKENS[4:9], TOKENS[2:], TOKENS]
    here = [Sampler(options, prompt) for options, prompt in zip(SAMPLING, prompts, strict=True)]
    host = [Sampler(options, prompt) for options, prompt in zip(SAMPLING, prompts, strict=True)]
    with open_batch(bundles("olmoe", "int4"), 6, RUNTIME, context_length=32) as batch:
        logits = [batch.prefill(row, prompt).copy() for row, prompt in enumerate(prompts)]
        batch.prefill(5, [1])
        for sampler, row in zip(here, logits, strict=True):
            sampler.sample(row)
        tokens = [*(sampler.sample(row) for sampler, row in zip(host, logits, strict=True)), 0]
        for _ in range(5):
            lengths = batch.lengths
            copies.clear()
            found = batch.decode_sampled(tokens, [*here, None])
            assert sum(copies) <= 2 * batch.vocab_size // 8 + 4 * 1024
            assert (batch.lengths == lengths + 1).all()
            for row, length in enumerate(lengths):
                batch.truncate(row, int(length))
            rows = batch.decode_batch(tokens)
            assert found == [*(sampler.sample(row) for sampler, row in zip(host, rows[:5], strict=True)), 0]
            tokens = found
        with pytest.raises(GenerationError, match="5 tokens for 6 sequences"):
            batch.decode_sampled(tokens[:5], [*here, None])
        with pytest.raises(GenerationError, match="cuda-emulated decodes all 6 sequences"):
            batch.use(5)
        with pytest.raises(GenerationError, match="cuda-emulated cannot move a sequence"):
            batch.move(1, 0)


def test_does_a_bundle_without_the_kernels_of_sampling_copy_its_logits(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch, copies: list[int]
) -> None:
    load = EmulatedDevice.load

    def older(self: EmulatedDevice, names: Sequence[str]) -> None:
        if any(name.startswith("sample_") for name in names):
            raise RuntimeUnavailableError("kernels lacks the kernel sample_parts_f32")
        load(self, names)

    options = SAMPLING[0]

    def sampled() -> list[int]:
        sampler = Sampler(options, TOKENS)
        with open_runtime(bundles("fox", "int8"), RUNTIME, context_length=64) as model:
            tokens = [sampler.sample(model.prefill(TOKENS))]
            for _ in range(4):
                copies.clear()
                tokens.append(model.decode_sampled(tokens[-1], sampler))
                whole.append(4 * model.vocab_size in copies)
            model.decode_greedy(tokens[-1])
            shared = model.open_batch(1, 32)
            assert shared is not None
            with shared as batch:
                tokens.append(sampler.sample(batch.prefill(0, TOKENS)))
                tokens += batch.decode_sampled(tokens[-1:], [sampler])
        return tokens

    whole: list[bool] = []
    expected = sampled()
    assert whole == [False] * 4
    with monkeypatch.context() as patch:
        patch.setattr(EmulatedDevice, "load", older)
        assert sampled() == expected
    assert whole[4:] == [True] * 4


def test_do_sequences_of_a_batch_decode_as_they_would_alone(bundles: Bundles) -> None:
    bundle = bundles("fox", "int4")
    prompts = [TOKENS[:3], TOKENS, TOKENS[4:9]]
    alone = []
    with open_runtime(bundle, RUNTIME, context_length=32) as model:
        for prompt in prompts:
            model.reset()
            first = int(model.prefill(prompt).argmax())
            alone.append((first, model.decode(first).copy()))
    with open_batch(bundle, len(prompts), RUNTIME, context_length=32) as batch:
        for row, prompt in enumerate(prompts):
            batch.prefill(row, [*prompt, 1])
            batch.truncate(row, 0)
        firsts = [int(batch.prefill(row, prompt).argmax()) for row, prompt in enumerate(prompts)]
        assert firsts == [first for first, _ in alone]
        together = batch.decode_batch(firsts)
        assert batch.lengths.tolist() == [len(prompt) + 1 for prompt in prompts]
        for row, (_, logits) in enumerate(alone):
            assert np.abs(together[row] - logits).max() < 0.02 * np.abs(logits).max()
        expected = together.copy()
    # The same with a runtime's weights; the runtime's own sequence is not affected.
    with open_runtime(bundle, RUNTIME, context_length=64) as model:
        model.prefill(prompts[0])
        with model.open_batch(len(prompts), 32) as shared:  # type: ignore[union-attr]  # this runtime has batches
            for row, prompt in enumerate(prompts):
                shared.prefill(row, prompt)
            np.testing.assert_array_equal(shared.decode_batch(firsts), expected)
        with pytest.raises(EdgeLMError, match="this batch was closed"):
            shared.decode_batch(firsts)
        assert np.abs(model.decode(firsts[0]) - alone[0][1]).max() < 0.02 * np.abs(alone[0][1]).max()


@pytest.mark.parametrize(("kv", "row"), [("bfloat16", 64), ("int8", 36), ("fp8", 36)])
def test_is_a_cache_of_fewer_bits_smaller_and_close(bundles: Bundles, kv: str, row: int) -> None:
    bundle = bundles("olmoe", "none")

    def last(kv: str) -> tuple[np.ndarray, int]:
        with open_runtime(bundle, RUNTIME, context_length=64, kv=kv) as model:
            logits = model.prefill(TOKENS).copy()
            assert isinstance(model, CudaRuntime)
            return logits, model.cache_bytes

    (wide, _), (coarse, nbytes) = last("float16"), last(kv)
    model = bundle.manifest.model
    room = 2 * model.num_layers * model.num_kv_heads * 64 * row
    assert room <= nbytes < room + 4096
    assert 0 < np.abs(wide - coarse).max() < 0.1 * np.abs(wide).max()


def test_is_what_does_not_fit_refused_with_figures(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    def small(kernels: Path) -> Device:
        device = EmulatedDevice(lazy=True)
        device.info = replace(device.info, memory=3 << 20)
        return device

    monkeypatch.setattr(CudaRuntime, "open_device", staticmethod(small))
    with pytest.raises(
        DeviceMemoryError, match=r"has 3.15 MB of 3.15 MB free, and [\d.]+ MB are needed .*context_length"
    ):
        CudaRuntime(bundles("fox", "int4"))


def test_is_the_emulator_chosen_only_by_name(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGELM_CUDA_DRIVER", "/nonexistent/libcuda.so.1")
    with pytest.raises(EdgeLMError, match=r"no NVIDIA driver|no GPU kernels"):
        open_runtime(bundles("fox", "int4"))
    assert RUNTIME in [entry.name for entry in runtimes()]


def test_does_cuda_kernels_say_what_it_lacks_without_a_driver(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGELM_CUDA_DRIVER", "/nonexistent/libcuda.so.1")
    bundle = bundles("fox", "int4")
    (bundle.path / "kernels").mkdir(exist_ok=True)
    (bundle.path / "kernels" / "kernels.json").write_text(json.dumps({"format": 2, "argument_bytes": {}, "images": {}}))
    with pytest.raises(DeviceError, match=r"no NVIDIA driver: /nonexistent/libcuda\.so\.1 cannot be loaded"):
        open_runtime(bundle, "cuda-kernels")


def test_is_another_targets_bundle_refused(bundles: Bundles) -> None:
    with pytest.raises(RuntimeUnavailableError, match="was exported for tensorrt, but onnxruntime-cpu runs cpu"):
        open_runtime(bundles("fox", "int4"), "onnxruntime-cpu")


def test_does_a_bundle_with_onnx_graphs_of_version_0_1_still_run(damaged: Path) -> None:
    # Up to version 0.1 such bundles had the program twice more, as ONNX files that no runtime opened.
    path = damaged / "manifest.json"
    manifest = json.loads(path.read_text())
    for key, name in (("file", "model.onnx"), ("debug_file", "model.debug.onnx")):
        (damaged / name).write_bytes(name.encode())
        manifest["graph"][key] = name
        manifest["files"][name] = {"size": len(name), "sha256": sha256_of(damaged / name)}
    path.write_text(json.dumps(manifest))
    bundle = Bundle.open(damaged)
    assert bundle.verify() == []
    with open_runtime(bundle, RUNTIME, context_length=64) as runtime:
        assert np.isfinite(runtime.prefill(TOKENS[:3])).all()
    assert check_parity(bundle, runtime=RUNTIME).passed


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data.update(format=2), "format is 2, this EdgeLM reads 1: upgrade"),
        (lambda data: data.pop("values"), "values is missing, expected an object"),
        (lambda data: data["values"].update(logits=["f32", 1 << 40]), r"values.logits\[1\] is 1099511627776, expected"),
        (lambda data: data["values"].update(logits=["f32", 8]), r'needs \d+ values in "logits", which has 8'),
        (lambda data: data["nodes"][1]["attrs"].update(rows=-1), "rows of .* is -1, expected a whole number from 1"),
        (lambda data: data["nodes"][1]["attrs"].update(group=7), "in groups of 7, which no .* matrix has"),
        (lambda data: data["nodes"][2]["attrs"].update(head_size=0), "head_size of .* is 0, expected a whole number"),
        (lambda data: data["nodes"][0].update(op="Rotate"), "has the operator 'Rotate'"),
        (lambda data: data["nodes"].pop(0), "reads hidden.0, which no node computes"),
        (lambda data: data["nodes"][1]["attrs"].pop("group"), "has no group"),
        (lambda data: data["nodes"][1]["attrs"].update(kind="int2"), "of the kind 'int2'"),
        (lambda data: data["nodes"][1]["attrs"].update(activations="int7"), "has activations 'int7'"),
        (lambda data: data["weights"]["rope.cos"].update(size=4), "has 4 bytes for"),
        (lambda data: data["weights"]["rope.cos"].update(offset=1 << 40), "the program's weights end at"),
    ],
)
def test_is_a_damaged_program_named(damaged: Path, change: Callable[[dict], None], said: str) -> None:
    bundle = change_program(damaged, change)
    with pytest.raises(BundleError, match=said):
        open_runtime(bundle, RUNTIME, context_length=64).close()


def test_are_wrong_options_and_uses_refused(bundles: Bundles) -> None:
    bundle = bundles("olmoe", "int4")
    with pytest.raises(EdgeLMError, match="kv is 'int4': the KV cache can be"):
        open_runtime(bundle, RUNTIME, kv="int4")
    with pytest.raises(EdgeLMError, match="chunk is 0"):
        open_runtime(bundle, RUNTIME, chunk=0)
    with pytest.raises(EdgeLMError, match="batch is 0"):
        open_batch(bundle, 0, RUNTIME)
    model = open_runtime(bundle, RUNTIME, context_length=8)
    with pytest.raises(EdgeLMError, match="9 tokens do not fit"):
        model.prefill([1] * 9)
    with pytest.raises(GenerationError, match="outside the vocabulary"):
        model.prefill([1 << 20])
    assert model.position == 0
    model.close()
    model.close()
    with pytest.raises(EdgeLMError, match="closed"):
        model.decode(1)


@pytest.mark.parametrize("family", FAMILIES)
def test_is_the_matmul_behind_attention_what_attention_prefetches(bundles: Bundles, family: str) -> None:
    with open_runtime(bundles(family, "int4"), RUNTIME, context_length=64) as model:
        executor: Any = model._executor  # type: ignore[attr-defined]  # of this runtime
        program = executor._program
        decode = [one for one in executor._launches((1, 1, 0, False, "")) if one.kernel.startswith("attention_decode")]
    ranges = [struct.unpack_from("<Qq", one.args, len(one.args) - 16) for one in decode]
    matrices = [
        program.nodes[index + 1].inputs[1]
        for index, node in enumerate(program.nodes)
        if node.op == "GroupQueryAttention"
    ]
    base = executor._weights.address(matrices[0]) - program.weights[matrices[0]].offset
    assert [(start - base, size) for start, size in ranges] == [
        (program.weights[name].offset, program.weights[name].size) for name in matrices
    ]
    assert all("o_proj" in name for name in matrices), matrices


def test_do_requests_of_a_server_not_depend_on_each_other(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "FIXED_CHUNK", 32)
    shared = [5 + i * 7 % 900 for i in range(40)]
    prompts = [shared, [*shared, 17, 44], [3, 9], [*shared[:33], 8]]

    def ask(served: engine.Engine, wanted: Sequence[int]) -> list[tuple[list[tuple[int, float | None]], int]]:
        asked: list[tuple[engine.Job, queue.Queue[engine.Event]]] = []
        for index in wanted:
            events: queue.Queue[engine.Event] = queue.Queue()
            options = Options.of({"max_tokens": 3, "temperature": 1.1 * (index % 2), "seed": index})
            # Without log-probabilities tokens are chosen on the device.
            logprobs = 0 if index < 2 else None
            answer = served.model.continuation(prompts[index], options)
            asked.append((engine.Job(answer, events.put, logprobs=logprobs), events))
            served.submit(asked[-1][0])
        found = []
        for _, events in asked:
            tokens = []
            while isinstance(event := events.get(timeout=300), engine.Token):
                tokens.append((event.token, event.logprob))
            assert isinstance(event, engine.Finished), event
            found.append((tokens, event.generation.timings.reused_tokens))
        return found

    def serve() -> engine.Engine:
        model = edgelm.load(bundles("olmoe", "int4").path, runtime=RUNTIME, context_length=64, chat=False)
        return engine.Engine(model, slots=2)

    alone = []
    for index in range(len(prompts)):
        served = serve()
        alone += ask(served, [index])
        served.close()
    assert [reused for _, reused in alone] == [0] * 4
    served = serve()
    together = ask(served, [3, 2, 1, 0])[::-1]
    served.close()
    assert [tokens for tokens, _ in together] == [tokens for tokens, _ in alone]
    assert [reused for _, reused in together] == [32, 32, 0, 0]
