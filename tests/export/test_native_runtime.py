"""Does the native runtime compute the same however a prompt is split, cached and batched? What does it refuse?"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from tiny_models import OPERATOR_SETS, MakeCheckpoint

import edgelm
from edgelm.bundle import Bundle
from edgelm.bundle.kv_cache import KV_TYPES
from edgelm.cli.inspect import bundle_rows
from edgelm.cli.main import cli
from edgelm.errors import (
    ContextLengthError,
    EdgeLMError,
    ExportError,
    GenerationError,
    RecipeError,
    RuntimeUnavailableError,
)
from edgelm.export import ExportOptions, export_bundle
from edgelm.parity.golden import GoldenOptions
from edgelm.parity.prompts import Prompt
from edgelm.quant.checkpoint import quantize_checkpoint
from edgelm.quant.recipe import KV_TYPES as RECIPE_KV_TYPES
from edgelm.quant.recipe import Recipe
from edgelm.runtimes import Runtime, open_batch, open_runtime, open_tracing

pytestmark = pytest.mark.skipif("native" not in OPERATOR_SETS, reason="needs the compiled operators")

SHORT = GoldenOptions(prompts=(Prompt("short", "The quick brown fox"),), greedy_tokens=2)
IDS = np.random.default_rng(3).integers(4, 600, 60).tolist()


@pytest.fixture(scope="module")
def bundles(checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Bundle]:
    folder = tmp_path_factory.mktemp("native")
    options = ExportOptions(golden=SHORT, ops="native")
    return {
        (name, recipe): export_bundle(checkpoint(name), folder / f"{name}-{recipe}", recipe=recipe, options=options)
        for name in ("olmoe", "fox")
        for recipe in ("none", "int8", "int4")
    }


@pytest.fixture(scope="module")
def portable(checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    options = ExportOptions(golden=SHORT, ops="portable")
    return export_bundle(checkpoint("fox"), tmp_path_factory.mktemp("portable") / "b", options=options)


@pytest.fixture(params=["olmoe", "fox"])
def exact(bundles: dict[tuple[str, str], Bundle], request: pytest.FixtureRequest) -> Bundle:
    return bundles[request.param, "none"]


def opened(bundle: Bundle, **options: int | str) -> Runtime:
    return open_runtime(bundle, **{"threads": 1, **options})


def all_logits(runtime: Runtime, ids: list[int]) -> NDArray[np.float32]:
    runtime.reset()
    return np.concatenate([block.copy() for block in runtime.logits_all(ids)])


def assert_close(found: NDArray[np.float32], expected: NDArray[np.float32], tolerance: float) -> None:
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error <= tolerance, error


@pytest.mark.parametrize("chunk", [1, 7, 59, 512])
def test_a_prompt_may_be_split_into_any_chunks(exact: Bundle, chunk: int) -> None:
    with opened(exact) as whole, opened(exact, chunk=chunk) as cut:
        expected = all_logits(whole, IDS)
        assert expected.shape == (len(IDS), whole.vocab_size)
        assert_close(all_logits(cut, IDS), expected, 1e-6)
        cut.reset()
        assert_close(cut.prefill(IDS[:40]), expected[39], 1e-6)
        for position in range(40, 60):
            assert_close(cut.decode(IDS[position]), expected[position], 1e-6)
        cut.truncate(10)
        assert_close(cut.prefill(IDS[10:13]), expected[12], 1e-6)


def test_results_do_not_depend_on_the_number_of_threads(
    bundles: dict[tuple[str, str], Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Three threads that share a CPU are enough here; a user would be told that there are too few CPUs.
    monkeypatch.setattr("edgelm.devices.max_threads", lambda: 3)
    for bundle in bundles.values():
        with opened(bundle) as one, opened(bundle, threads=3) as three:
            np.testing.assert_array_equal(one.prefill(IDS), three.prefill(IDS))
            np.testing.assert_array_equal(one.decode(5), three.decode(5))


# Rounding error of a cached value, relative root mean square. Floats with m bits: a step of 2^-m over sqrt(12), where
# values are 1.44 powers of two in the mean. int8: 1/127 of a row's largest value, which is 2.3 times the root mean
# square of 32 normal values, over sqrt(12).
CACHES = [("float32", 128, 0.0), ("float16", 64, 2.0e-4), ("int8", 36, 5.2e-3), ("fp8", 34, 2.5e-2)]


@pytest.mark.parametrize(("kv", "row", "rounding"), CACHES)
def test_the_caches_type_is_chosen_at_load(exact: Bundle, kv: str, row: int, rounding: float) -> None:
    # Keys and values of two layers are four independent roundings. Measured: 0.7 to 1.1 times that.
    expected = 2 * rounding
    with opened(exact) as default, opened(exact, kv=kv, context_length=100) as chosen:
        heads = exact.manifest.model.num_kv_heads
        assert chosen.cache_bytes == 2 * exact.manifest.model.num_layers * heads * 100 * row
        # An unquantised bundle rounds nothing else, so its default cache does not round either.
        found, wide = all_logits(chosen, IDS), all_logits(default, IDS)
        assert_close(found, wide, 1.5 * expected)
        assert np.linalg.norm(found - wide) >= 0.4 * expected * np.linalg.norm(wide), "the cache rounds too little"
        assert_close(chosen.decode(7), default.decode(7), 2.5 * expected)  # of a single position


def test_a_quantised_bundle_has_a_float16_cache(bundles: dict[tuple[str, str], Bundle]) -> None:
    with opened(bundles["fox", "int4"]) as default, opened(bundles["fox", "int4"], kv="float16") as chosen:
        assert default.cache_bytes == chosen.cache_bytes
        np.testing.assert_array_equal(default.prefill(IDS), chosen.prefill(IDS))


def test_the_recipes_cache_is_the_bundles(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    recipe = Recipe.from_toml('name = "small"\ndefault = "int4-g32-sym"\nkv = "int8"\n')
    bundle = export_bundle(
        checkpoint("fox"), tmp_path / "b", recipe=recipe, options=ExportOptions(golden=SHORT, ops="native")
    )
    assert bundle.manifest.graph.kv_dtype == "int8"
    assert "int8 cache each" in dict(bundle_rows(bundle, None))["context"]
    with opened(bundle) as default, opened(bundle, kv="int8") as same, opened(bundle, kv="float16") as other:
        assert default.cache_bytes == same.cache_bytes < other.cache_bytes
        np.testing.assert_array_equal(default.prefill(IDS), same.prefill(IDS))
        assert (default.prefill(IDS) != other.prefill(IDS)).any()
    with pytest.raises(ExportError, match=r'recipe small has kv = "int8", but portable operators .* --ops native'):
        export_bundle(checkpoint("fox"), tmp_path / "p", recipe=recipe, options=ExportOptions(ops="portable"))
    assert not (tmp_path / "p").exists()


def test_cache_and_activations_can_be_chosen_for_a_quantised_checkpoint(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    schemes = 'default = "int4-g32-sym"\n'
    quantize_checkpoint(checkpoint("fox"), tmp_path / "q", Recipe.from_toml('name = "a"\n' + schemes))
    chosen = Recipe.from_toml('name = "b"\nkv = "fp8"\nactivations = "float"\n' + schemes)
    options = ExportOptions(golden=SHORT, ops="native")
    bundle = export_bundle(tmp_path / "q", tmp_path / "b", recipe=chosen, options=options)
    assert bundle.manifest.graph.kv_dtype == "fp8"
    assert dict(bundle_rows(bundle, None))["activations"] == "float32"
    other = Recipe.from_toml('name = "c"\ndefault = "int8-g32-sym"\n')
    with pytest.raises(RecipeError, match='already quantised with the recipe "a", not "c"'):
        export_bundle(tmp_path / "q", tmp_path / "c", recipe=other, options=options)


def test_every_cache_that_recipes_can_name_exists() -> None:
    assert set(RECIPE_KV_TYPES) == {"auto", *KV_TYPES}


def test_decoding_with_half_of_the_head_gives_the_same_best_tokens(bundles: dict[tuple[str, str], Bundle]) -> None:
    with opened(bundles["olmoe", "int4"]) as runtime:
        exact = all_logits(runtime, IDS)
        runtime.reset()
        for position, token in enumerate(IDS):
            logits = runtime.decode(token)
            best = np.argsort(-exact[position])[:20]
            assert_close(logits[best], exact[position, best], 5e-2)
            assert logits.argmax() == best[0] or exact[position, logits.argmax()] > exact[position, best[0]] - 0.05


@pytest.mark.parametrize("recipe", ["none", "int4"])
@pytest.mark.parametrize("name", ["olmoe", "fox"])
def test_a_batch_gives_each_sequence_what_it_gets_alone(
    bundles: dict[tuple[str, str], Bundle], name: str, recipe: str
) -> None:
    bundle = bundles[name, recipe]
    prompts = [IDS[:9], IDS[9:10], IDS[20:53], IDS[2:7]]
    with open_batch(bundle, 4, threads=2, context_length=80, chunk=8) as batch, opened(bundle, chunk=8) as alone:
        steps = [[5, 6, 7, 8], [15, 16, 17, 18], [25, 26, 27, 28]]
        first = [batch.prefill(row, prompt).copy() for row, prompt in enumerate(prompts)]
        together = [batch.decode_batch(step).copy() for step in steps]
        assert batch.lengths.tolist() == [12, 4, 36, 8]
        for row, prompt in enumerate(prompts):
            alone.reset()
            np.testing.assert_array_equal(first[row], alone.prefill(prompt))
            for logits, step in zip(together, steps, strict=True):
                # A step of one row reads the head's low nibbles only for the best candidates.
                single = alone.decode(step[row])
                assert_close(logits[row], single, 1e-6 if recipe == "none" else 0.1)
                assert logits[row].argmax() == single.argmax()
        # One sequence is rewound and continues alone; the others stay where they were.
        batch.truncate(2, 33)
        again = batch.prefill(2, [step[2] for step in steps])
        assert_close(again, together[-1][2], 1e-6 if recipe == "none" else 0.1)
        assert batch.lengths.tolist() == [12, 4, 36, 8]


@pytest.mark.parametrize("kv", ["float16", "int8"])
def test_a_sequence_moves_to_another_row_and_keeps_its_bits(bundles: dict[tuple[str, str], Bundle], kv: str) -> None:
    prompts, options = [IDS[:9], IDS[9:30], IDS[20:53]], {"threads": 2, "context_length": 80, "kv": kv}
    with open_batch(bundles["olmoe", "int4"], 3, **options) as batch:
        for row, prompt in enumerate(prompts):
            batch.prefill(row, prompt)
        expected = [batch.decode_batch([5, 6, 7]).copy(), batch.decode_batch([8, 9, 10]).copy()]
    with open_batch(bundles["olmoe", "int4"], 3, **options) as batch:
        for row, prompt in enumerate(prompts):
            batch.prefill(row, prompt)
        np.testing.assert_array_equal(batch.decode_batch([5, 6, 7]), expected[0])
        batch.move(2, 0)
        assert batch.lengths.tolist() == [34, 22, 0]
        batch.use(2)
        np.testing.assert_array_equal(batch.decode_batch([10, 9]), expected[1][[2, 1]])
        assert batch.lengths.tolist() == [35, 23, 0]
        batch.move(1, 1)
        for use, message in (
            (lambda: batch.decode_batch([1, 2, 3]), "3 tokens for 2 sequences"),
            (lambda: batch.use(0), "cannot use 0 sequences: give 1 to 3"),
            (lambda: batch.use(4), "cannot use 4 sequences"),
            (lambda: batch.move(3, 0), "sequence 3 does not exist"),
            (lambda: batch.move(0, -1), "sequence -1 does not exist"),
        ):
            with pytest.raises(GenerationError, match=message):
                use()
        assert batch.lengths.tolist() == [35, 23, 0]


def test_a_batch_refuses_what_does_not_fit(bundles: dict[tuple[str, str], Bundle], portable: Bundle) -> None:
    bundle = bundles["fox", "int4"]
    with open_batch(bundle, 2, threads=1, context_length=10) as batch:
        batch.prefill(1, IDS[:10])
        batch.prefill(0, IDS[:3])
        with pytest.raises(ContextLengthError, match="1 tokens do not fit: the context holds 10, 10 are taken"):
            batch.decode_batch([1, 2])
        assert batch.lengths.tolist() == [3, 10]
        for use, message in (
            (lambda: batch.decode_batch([1]), "1 tokens for 2 sequences"),
            (lambda: batch.prefill(2, [1]), "sequence 2 does not exist: choose 0 to 1"),
            (lambda: batch.truncate(0, 4), "cannot keep 4 cached tokens: give 0 to 3"),
            (lambda: batch.prefill(0, [bundle.manifest.model.vocab_size]), "outside the vocabulary"),
        ):
            with pytest.raises(GenerationError, match=message):
                use()
    with pytest.raises(EdgeLMError, match="was closed"):
        batch.prefill(0, [1])
    with pytest.raises(EdgeLMError, match="batch is 0"):
        open_batch(bundle, 0)
    with pytest.raises(RuntimeUnavailableError, match=r"portable operators, with which .* one sequence at a time"):
        open_batch(portable, 2)


def test_options_that_do_not_exist_are_refused(bundles: dict[tuple[str, str], Bundle], portable: Bundle) -> None:
    with pytest.raises(EdgeLMError, match="kv is 'int4': the KV cache can be float32, float16, int8, fp8"):
        opened(bundles["fox", "int4"], kv="int4")
    with pytest.raises(EdgeLMError, match=r"kv is 'int8', but the cache of .* is float32: leave kv out, or .*native"):
        opened(portable, kv="int8")
    with opened(portable, kv="float32") as runtime:
        assert runtime.prefill([1, 2]).shape == (640,)


def test_without_compiled_operators_the_error_names_alternatives(
    bundles: dict[tuple[str, str], Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGELM_OPS_LIBRARY", "")
    with pytest.raises(RuntimeUnavailableError, match=r"compiled operators, .*C\+\+ compiler.*--ops portable"):
        opened(bundles["fox", "int4"])


def test_an_instruction_set_that_cannot_be_used_is_refused(
    bundles: dict[tuple[str, str], Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGELM_ISA", "mmx")
    with pytest.raises(RuntimeUnavailableError, match=r"mmx.*scalar"):
        opened(bundles["fox", "int4"])


def test_every_instruction_set_gives_the_same_bits(
    bundles: dict[tuple[str, str], Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgelm.runtimes.onnxruntime.native_library import describe_cpu

    found = []
    for isa in describe_cpu().instruction_sets:
        if isa.available:
            monkeypatch.setenv("EDGELM_ISA", isa.name)
            with opened(bundles["olmoe", "int4"]) as runtime:
                found.append(np.stack([runtime.prefill(IDS[:20]), runtime.decode(3)]))
    assert len(found) > 1
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)


def test_prompts_traced_together_give_the_same_as_alone(exact: Bundle) -> None:
    texts = [IDS[:9], IDS[:4], IDS[2:37]]
    runtime = open_tracing(exact, "onnxruntime-cpu", threads=1)
    assert runtime is not None
    with runtime:
        together = runtime.trace_all(texts)
        alone = [runtime.trace(text) for text in texts]
    for one, other, text in zip(together, alone, texts, strict=True):
        assert one.logits is not None
        assert other.logits is not None
        assert one.logits.shape[0] == len(text)
        assert_close(one.logits, other.logits, 1e-6)
        for a, b in zip(one.hidden + one.router_logits, other.hidden + other.router_logits, strict=True):
            assert_close(a, b, 1e-6)


def test_commands_have_options_for_cache_and_batch(bundles: dict[tuple[str, str], Bundle]) -> None:
    path = str(bundles["olmoe", "int4"].path)
    run = CliRunner().invoke(cli, ["run", path, "hello", "--kv", "int8", "--max-tokens", "4", "--json"])
    assert run.exit_code == 0, run.output
    with edgelm.load(path, kv="int8") as model:
        assert model.generate("hello", max_tokens=4).text == json.loads(run.stdout)["text"]
    sizes = ["--prompt-tokens", "8", "--new-tokens", "4", "--repeat", "1"]
    bench = CliRunner().invoke(cli, ["bench", path, *sizes, "--batch", "3", "--kv", "int8"])
    assert bench.exit_code == 0, bench.output
    assert "decode 4 x 3" in bench.stdout
    assert "native operators, int8 cache" in bench.stdout
    document = json.loads(CliRunner().invoke(cli, ["bench", path, *sizes, "--json"]).stdout)
    assert (document["ops"], document["kv"], document["batch"]) == ("native", "float16", 1)


def test_inspect_says_which_schemes_the_recipe_chose(bundles: dict[tuple[str, str], Bundle]) -> None:
    line = dict(bundle_rows(bundles["olmoe", "int4"], None))["schemes"]
    assert line.startswith("embedding, head int8-g")
    assert re.search(r"; router float; the rest int4-g\d+-sym; \d\.\d bits per weight$", line)


def test_inspect_says_how_weights_are_packed(bundles: dict[tuple[str, str], Bundle]) -> None:
    path = str(bundles["olmoe", "int4"].path)
    shown = CliRunner().invoke(cli, ["inspect", path, "--verbose"]).stdout
    assert "layers.*" not in CliRunner().invoke(cli, ["inspect", path]).stdout
    for text in (
        "layers.*.attn.qkv.weight: 2 x int4, groups of 32 [384, 128], 4.51 bits per weight",
        "layers.*.moe.experts: 32 x int4, groups of 32, SwiGLU [128, 128]",
        "lm_head.weight: int8 in split nibbles, a scale per row [640, 128]",
        "model.layers.*.mlp.gate.weight: 2 x float32 [16, 128]",
    ):
        assert text in shown, shown
    document = json.loads(CliRunner().invoke(cli, ["inspect", path, "--json"]).stdout)
    assert document["weights"][0]["kind"]
    assert sum(entry["count"] for entry in document["weights"]) == 2 * (2 + 1 + 2 * 16) + 2


def test_inspect_names_the_tensor_whose_header_is_damaged(
    bundles: dict[tuple[str, str], Bundle], tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(bundles["fox", "int4"].path, tmp_path / "b")
    bundle = Bundle.open(tmp_path / "b")
    entry = next(e for e in bundle.manifest.tensors if e.name == "layers.0.attn.qkv.weight")
    with bundle.file("model.onnx.data").open("r+b") as stream:
        stream.seek(entry.offset + 5)
        stream.write(b"\x77")
    shown = CliRunner().invoke(cli, ["inspect", str(bundle.path)])
    assert shown.exit_code == 1
    assert "layers.0.attn.qkv.weight is no packed matrix: 119 is not a valid Kind" in shown.stderr


def test_a_head_has_split_nibbles_only_below_layers_of_fewer_than_eight_bits(
    bundles: dict[tuple[str, str], Bundle],
) -> None:
    for (family, recipe), bundle in bundles.items():
        lower = [tensor.name for tensor in bundle.manifest.tensors if tensor.name.endswith(".lower")]
        assert bool(lower) == (recipe == "int4"), (family, recipe, lower)
