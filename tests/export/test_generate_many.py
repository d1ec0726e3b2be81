"""Does each of many prompts that decode together get the same tokens as alone, and end when it should?"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_models import OPERATOR_SETS, MakeCheckpoint

import edgelm
from edgelm.bundle import Bundle
from edgelm.errors import ContextLengthError, EdgeLMError, GenerationError, GenerationTypeError, GenerationValueError
from edgelm.export import ExportOptions, export_bundle
from edgelm.generation.options import GenerateOptions
from edgelm.parity.golden import GoldenOptions
from edgelm.parity.prompts import Prompt
from edgelm.runtimes import open_batch
from edgelm.runtimes.onnxruntime.native import NativeBatch, NativeRuntime

SHORT = GoldenOptions(prompts=(Prompt("short", "The quick brown fox"),), greedy_tokens=2)
PROMPTS: list[str | list[int]] = ["one", "two and a half prompts", "def f(x):\n    return", [5, 6, 7, 8], "x" * 60, "Z"]
native = pytest.mark.skipif("native" not in OPERATOR_SETS, reason="needs the compiled operators")


@pytest.fixture(scope="module")
def bundles(checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    folder = tmp_path_factory.mktemp("many")
    wanted = [("olmoe", "int4", "native"), ("fox", "none", "native"), ("fox", "int8", "portable")]
    return {
        f"{name}-{ops}": export_bundle(
            checkpoint(name), folder / f"{name}-{ops}", recipe=recipe, options=ExportOptions(golden=SHORT, ops=ops)
        )
        for name, recipe, ops in wanted
        if ops in OPERATOR_SETS
    }


@pytest.fixture(scope="module", params=["olmoe-native", "fox-native", "fox-portable"])
def loaded(bundles: dict[str, Bundle], request: pytest.FixtureRequest) -> Iterator[edgelm.LanguageModel]:
    if request.param not in bundles:
        pytest.skip("needs the compiled operators")
    with edgelm.load(bundles[request.param].path, threads=1, chat=False) as model:
        yield model


@pytest.fixture
def model(loaded: edgelm.LanguageModel) -> Iterator[edgelm.LanguageModel]:
    loaded.runtime.reset()
    end_ids = loaded.end_ids
    yield loaded
    loaded.end_ids = end_ids


@pytest.fixture
def batching(bundles: dict[str, Bundle]) -> Iterator[edgelm.LanguageModel]:
    with edgelm.load(bundles["olmoe-native"].path, threads=1, chat=False) as model:
        yield model


def tokens(results: Sequence[edgelm.Generation]) -> list[tuple[int, ...]]:
    return [result.tokens for result in results]


@pytest.mark.parametrize("batch", [1, 2, 4, 8])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.3, "top_p": 0.9, "repetition_penalty": 1.2}])
def test_each_result_is_what_the_prompt_gives_alone(
    model: edgelm.LanguageModel, batch: int, options: GenerateOptions
) -> None:
    common: GenerateOptions = {"max_tokens": 17, "seed": 7, **options}
    found = model.generate_many(PROMPTS, batch=batch, **common)
    alone = [model.generate(prompt, **common) for prompt in PROMPTS]
    assert [(one.text, one.tokens, one.stop_reason) for one in found] == [
        (one.text, one.tokens, one.stop_reason) for one in alone
    ]
    for one, other in zip(found, alone, strict=True):
        assert one.timings.prompt_tokens == other.timings.prompt_tokens
        assert one.timings.decoded_tokens == other.timings.decoded_tokens
        assert 0 < one.timings.prefill_seconds < one.timings.time_to_first_token
        assert one.timings.decode_seconds > 0


def test_each_prompt_has_its_own_options_and_ends_by_itself(model: edgelm.LanguageModel) -> None:
    model.end_ids = frozenset()
    plain = model.generate(PROMPTS[0], max_tokens=12, temperature=1.5, seed=1)
    stop = plain.text[4:6]
    ending = model.generate(PROMPTS[1], max_tokens=12, temperature=1.5, seed=2).tokens[3]
    each: list[GenerateOptions] = [
        {"stop": stop, "seed": 1},
        {"seed": 2},
        {"max_tokens": 1},
        {"seed": 2**40 + 3},
        {"temperature": 0.0},
        {"max_tokens": 30, "seed": 5},
    ]
    common: GenerateOptions = {"max_tokens": 12, "temperature": 1.5, "seed": 3}
    model.end_ids = frozenset([ending])
    found = model.generate_many(PROMPTS, batch=3, each=each, **common)
    alone = [model.generate(prompt, **{**common, **own}) for prompt, own in zip(PROMPTS, each, strict=True)]
    assert tokens(found) == tokens(alone)
    assert [one.stop_reason for one in found] == [one.stop_reason for one in alone]
    assert (found[0].stop_reason, found[1].stop_reason) == ("stop", "eos")
    assert len(found[2].tokens) <= 1
    assert found[0].text == plain.text[: plain.text.index(stop)]
    assert ending not in found[1].tokens


def test_without_a_seed_the_same_prompt_gives_different_texts(model: edgelm.LanguageModel) -> None:
    found = model.generate_many(["once"] * 4, max_tokens=16, temperature=2.0)
    assert len(set(tokens(found))) > 1


def test_the_context_ends_a_sequence_and_not_its_neighbours(bundles: dict[str, Bundle]) -> None:
    if "olmoe-native" not in bundles:
        pytest.skip("needs the compiled operators")
    prompts = [[5] * 20, [6] * 32, [7] * 3, [8] * 31]
    with edgelm.load(bundles["olmoe-native"].path, threads=1, context_length=32, chat=False) as model:
        found = model.generate_many(prompts, batch=2, max_tokens=None, seed=1)
        alone = [model.generate(prompt, max_tokens=None, seed=1) for prompt in prompts]
    assert tokens(found) == tokens(alone)
    assert [len(one.tokens) for one in found] == [13, 1, 30, 2]


class Watched(NativeBatch):
    """Notes how many sequences each step decodes."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.widths: list[int] = []

    @property
    def steps(self) -> int:
        return len(self.widths)

    def decode_batch(self, tokens: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
        self.widths.append(len(tokens))
        return super().decode_batch(tokens)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[Watched]:
    made: list[Watched] = []

    def make(*arguments: Any, **options: Any) -> Watched:
        made.append(Watched(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(NativeRuntime, "batch_class", staticmethod(make))
    return made


@native
def test_finished_sequences_are_replaced_and_memory_is_what_is_needed(
    batching: edgelm.LanguageModel, watched: list[Watched]
) -> None:
    lengths = [30, 2, 2, 2, 2, 2, 2]
    each: list[GenerateOptions] = [{"max_tokens": length} for length in lengths]
    batching.generate([9, 9, 9], max_tokens=4)
    kept = batching.runtime.position
    found = batching.generate_many([[5 + i] * 10 for i in range(len(lengths))], batch=2, each=each)
    assert [len(one.tokens) for one in found] == lengths
    (batch,) = watched
    # The short prompts run one after another beside the long one, without steps of their own.
    assert batch.steps == 29
    assert (batch.batch, batch.context_length) == (2, 40)
    assert batch._caches == []
    assert batching.runtime.position == kept
    batching.generate_many([[5] * 10] * 3, max_tokens=None)
    assert (watched[1].batch, watched[1].context_length) == (3, batching.runtime.context_length)


@native
def test_a_row_is_not_computed_after_its_sequence_ended(batching: edgelm.LanguageModel, watched: list[Watched]) -> None:
    lengths = [3, 9, 5, 9]
    each: list[GenerateOptions] = [{"max_tokens": length} for length in lengths]
    common: GenerateOptions = {"temperature": 1.2, "seed": 4}
    found = batching.generate_many(PROMPTS[:4], batch=4, each=each, **common)
    assert tokens(found) == tokens([
        batching.generate(prompt, **{**common, **own}) for prompt, own in zip(PROMPTS, each, strict=False)
    ])  # fmt: skip
    assert [len(one.tokens) for one in found] == lengths
    assert watched[0].widths == [4, 4, 3, 3, 2, 2, 2, 2]
    batching.generate_many(PROMPTS[:2], batch=2, each=[{"max_tokens": 2}, {"max_tokens": 4}])
    assert watched[1].widths == [2, 1, 1]


@native
def test_closing_the_model_ends_a_batch(batching: edgelm.LanguageModel, watched: list[Watched]) -> None:
    def close_once_it_runs() -> None:
        while not watched or not watched[0].steps:
            pass
        batching.close()

    closing = threading.Thread(target=close_once_it_runs)
    closing.start()
    with pytest.raises(EdgeLMError, match="this model was closed"):
        batching.generate_many([[5], [6]], max_tokens=None)
    closing.join()
    assert watched[0]._caches == []


@pytest.mark.parametrize(
    ("prompts", "options", "kind", "said"),
    [
        ("hello", {}, GenerationTypeError, "prompts is 'hello': it has to be a list of prompts"),
        (5, {}, GenerationTypeError, "prompts is 5"),
        (["a", 5], {}, GenerationTypeError, "prompt 1: the prompt: 5 cannot be used"),
        (["a", [1, 10**6]], {}, GenerationError, "prompt 1: token id 1000000"),
        (["a", "b", []], {}, GenerationError, "prompt 2: the prompt is empty"),
        (["a", "x" * 500], {}, ContextLengthError, r"prompt 1: 50\d tokens do not fit"),
        (["a"], {"batch": 0}, GenerationValueError, "batch is 0"),
        (["a"], {"batch": 2.5}, GenerationTypeError, r"batch is 2\.5"),
        (["a"], {"temprature": 1}, GenerationTypeError, "no option 'temprature' .did you mean temperature?"),
        (["a", "b"], {"each": [{}]}, GenerationValueError, "each has options for 1 prompts, and there are 2"),
        (["a", "b"], {"each": [{}, {"top_k": -1}]}, GenerationValueError, "prompt 1: top_k is -1"),
    ],
)
def test_what_cannot_be_used_is_named_before_anything_runs(
    model: edgelm.LanguageModel, prompts: Any, options: Any, kind: type[EdgeLMError], said: str
) -> None:
    with pytest.raises(kind, match=said):
        model.generate_many(prompts, **options)
    assert model.runtime.position == 0


def test_no_prompts_give_no_results(model: edgelm.LanguageModel, tmp_path: Path) -> None:
    assert model.generate_many([]) == []
    assert tokens(model.generate_many(iter(["a", "b"]), max_tokens=3)) == tokens(
        [model.generate(prompt, max_tokens=3, seed=1) for prompt in ("a", "b")]
    )


@native
def test_do_the_logits_of_a_row_not_depend_on_how_many_there_are(bundles: dict[str, Bundle]) -> None:
    with open_batch(bundles["olmoe-native"], 3) as batch:
        for row in range(3):
            batch.prefill(row, [5 + row, 6])
        together = batch.decode_batch([7, 8, 9]).copy()
        batch.truncate(0, 2)
        batch.use(1)
        assert batch.decode_batch([7]).tobytes() == together[:1].tobytes()


@native
def test_does_a_copied_cache_give_the_same_bits(bundles: dict[str, Bundle]) -> None:
    prompt = [5 + i % 90 for i in range(70)]
    with open_batch(bundles["olmoe-native"], 2, context_length=100) as batch:
        first = batch.prefill(0, prompt).copy()
        data = batch.read_cache(0, 16, 48)
        assert data.nbytes == batch.copied_bytes(32)
        batch.write_cache(1, 0, 16, batch.read_cache(0, 0, 16))
        batch.write_cache(1, 16, 48, data)
        assert batch.lengths.tolist() == [70, 48]
        assert batch.prefill(1, prompt[48:]).tobytes() == first.tobytes()
        for wrong, message in [
            ((0, 8, 16), "cannot copy the cache of tokens 8 to 16: give multiples of 16"),
            ((0, 32, 16), "cannot copy the cache of tokens 32 to 16: give multiples of 16"),
            ((0, 64, 80), "cannot read 80 cached tokens: sequence 0 has 70"),
            ((2, 0, 16), "sequence 2 does not exist"),
        ]:
            with pytest.raises(GenerationError, match=message):
                batch.read_cache(*wrong)
        with pytest.raises(GenerationError, match="cannot keep 80 cached tokens"):
            batch.write_cache(0, 80, 96, batch.read_cache(0, 0, 16))
        with pytest.raises(GenerationError, match="bytes are not the cache of 32 tokens"):
            batch.write_cache(0, 0, 32, batch.read_cache(0, 0, 16))
        with pytest.raises(ContextLengthError):
            batch.write_cache(0, 64, 112, batch.read_cache(0, 0, 48))
