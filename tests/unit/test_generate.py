"""Does a loaded model generate the tokens of its runtime's logits, stop correctly, and keep its cache consistent?"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scripted_model import Scripted, scripted
from tiny_graph import Shape, write_tiny_model

import edgelm
from edgelm.bundle import Bundle
from edgelm.errors import ContextLengthError, EdgeLMError, GenerationError, TokenizerError
from edgelm.generation.language_model import LanguageModel, load
from edgelm.generation.sampling import Sampler, Sampling
from edgelm.runtimes import open_runtime
from edgelm.tokenization.tokenizer import Tokenizer

PROMPT = "def main():\n    return"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "bundle", eos_ids=(2,))


@pytest.fixture
def model(bundle: Bundle) -> LanguageModel:
    return load(bundle.path, threads=1)


def test_greedy_decoding_takes_the_runtimes_best_token(model: LanguageModel) -> None:
    got = model.generate(PROMPT, max_tokens=12)
    tokens = model.tokenizer.encode(PROMPT)
    want = []
    model.runtime.reset()
    for token in tokens:
        logits = model.runtime.decode(token)
    for _ in range(12):
        want.append(int(logits.argmax()))
        logits = model.runtime.decode(want[-1])
    assert got.tokens == tuple(want)
    assert got.text == model.tokenizer.decode(want)
    assert got.stop_reason == "length"


def test_the_texts_of_a_stream_join_to_the_result(model: LanguageModel) -> None:
    stream = model.stream(PROMPT, max_tokens=30, temperature=1.5, seed=1)
    pieces = list(stream)
    assert len(pieces) > 5
    assert "".join(pieces) == stream.generation.text == model.tokenizer.decode(stream.generation.tokens)
    assert stream.generation == stream.generation
    assert list(stream) == []


@pytest.mark.parametrize("options", [{}, {"temperature": 1.2, "top_p": 0.9, "seed": 5}])
def test_a_call_gives_the_same_text_on_a_used_and_a_fresh_model(
    model: LanguageModel, bundle: Bundle, options: dict[str, float]
) -> None:
    first = model.generate(PROMPT, max_tokens=40, **options)
    model.generate("something else", max_tokens=3)
    model.generate(PROMPT, max_tokens=3)
    again = model.generate(PROMPT, max_tokens=40, **options)
    assert again.timings.reused_tokens == again.timings.prompt_tokens
    with load(bundle.path, threads=1) as fresh:
        assert first.tokens == again.tokens == fresh.generate(PROMPT, max_tokens=40, **options).tokens


class Recorder(Sampler):
    """Keeps the logits that it is given."""

    def sample(self, logits: Any) -> int:
        self.logits = logits.copy()
        return 0


def next_logits(model: LanguageModel, token: int) -> Any:
    """Append a token as a stream does; return the logits after it."""
    recorder = Recorder(Sampling(temperature=1.0))
    model.cache.decode_sampled(token, recorder)
    return recorder.logits


def test_with_a_seed_logits_do_not_depend_on_earlier_calls(model: LanguageModel, bundle: Bundle) -> None:
    tokens = model.tokenizer.encode(PROMPT * 4)
    with load(bundle.path, threads=1) as fresh:
        want, _ = fresh.cache.prefill(tokens, exact=True)
        model.cache.prefill(tokens[:1], exact=False)
        for token in tokens[1:-1]:
            next_logits(model, token)
        reused, count = model.cache.prefill(tokens, exact=False)
        assert count == len(tokens) - 1
        # Without a seed, the prompt is computed in other chunks: the logits are close but not equal.
        np.testing.assert_allclose(reused, want, atol=1e-4)
        assert not np.array_equal(reused, want)
        again, count = model.cache.prefill(tokens, exact=True)
        assert count == 0
        np.testing.assert_array_equal(again, want)
        next_logits(model, 5)
        repeated, count = model.cache.prefill(tokens, exact=True)
        assert count == len(tokens)
        np.testing.assert_array_equal(repeated, want)
        np.testing.assert_array_equal(next_logits(model, 7), next_logits(fresh, 7))


@pytest.mark.parametrize(("options", "reused"), [({}, 9), ({"seed": 1}, 0), ({"seed": 1, "reuse": True}, 9)])
def test_with_a_seed_a_longer_prompt_is_recomputed_unless_reuse_is_set(
    model: LanguageModel, options: dict[str, int], reused: int
) -> None:
    tokens = list(range(5, 15))
    model.generate(tokens, max_tokens=1, **options)
    assert model.generate([*tokens[:9], 40, 41], max_tokens=1, **options).timings.reused_tokens == reused


def test_with_a_seed_only_whole_steps_of_a_fresh_model_are_reused(bundle: Bundle) -> None:
    def in_steps_of_four() -> LanguageModel:
        runtime = open_runtime(bundle, threads=1, chunk=4)
        return LanguageModel(bundle, runtime, Tokenizer.from_folder(bundle.path))

    tokens = list(range(5, 16))
    with in_steps_of_four() as model:
        for prompt, exact, reused in (
            (tokens, True, 0),
            ([*tokens, 30, 31], True, 8),
            ([*tokens[:5], 40, 41, 42, 43], False, 5),  # now the tokens behind the first step are not those of a step
            ([*tokens[:5], 40, 41, 42, 43, 44], True, 4),
            ([*tokens[:5], 40, 41, 42, 43, 44, 45], True, 8),
            (tokens[:4], True, 0),  # its last token has to be computed, for the logits
        ):
            logits, count = model.cache.prefill(prompt, exact=exact)
            assert count == reused, prompt
            if exact:
                with in_steps_of_four() as fresh:
                    np.testing.assert_array_equal(logits, fresh.cache.prefill(prompt, exact=True)[0])
        model.cache.prefill(tokens, exact=True)
        list(model.cache.logits_of_last([*tokens[:6], 50, 51, 52], 2))
        assert model.cache.prefill([*tokens[:6], 50, 51, 52, 53], exact=True)[1] == 4


def test_reused_prefixes_give_the_results_of_a_fresh_model(model: LanguageModel, bundle: Bundle) -> None:
    tokens = model.tokenizer.encode(PROMPT)
    calls = [
        (tokens, {"temperature": 1.5, "seed": 1}),
        (tokens, {"temperature": 1.5, "seed": 2}),  # the whole prompt is reused, the answer after it is not
        (tokens, {}),
        ([*tokens, 70, 71], {"temperature": 1.5, "seed": 2}),
        (tokens, {"temperature": 1.5, "seed": 1}),
        (tokens[:-1], {"temperature": 1.5, "seed": 1}),
        ([*tokens[:-1], 80], {"repetition_penalty": 1.5}),
        (tokens, {}),
        ([*tokens, 90], {}),
    ]
    for prompt, options in calls:
        got = model.generate(prompt, max_tokens=15, **options)
        with load(bundle.path, threads=1) as fresh:
            assert got.tokens == fresh.generate(prompt, max_tokens=15, **options).tokens, (prompt, options)
            assert model.runtime.position == fresh.runtime.position
            # To the last bit where that is guaranteed, else up to rounding.
            model_next, fresh_next = next_logits(model, 7), next_logits(fresh, 7)
            if "seed" in options:
                np.testing.assert_array_equal(model_next, fresh_next)
            np.testing.assert_allclose(model_next, fresh_next, atol=1e-4)


def test_only_the_last_answer_counts_as_cached(model: LanguageModel, bundle: Bundle) -> None:
    tokens = model.tokenizer.encode(PROMPT)
    first = model.generate(tokens, max_tokens=9, temperature=1.5, seed=1).tokens
    other = model.generate(tokens, max_tokens=9).tokens
    assert first[0] != other[0]
    again = model.generate([*tokens, *first, 91], max_tokens=9)
    assert again.timings.reused_tokens == len(tokens)
    with load(bundle.path, threads=1) as fresh:
        assert again.tokens == fresh.generate([*tokens, *first, 91], max_tokens=9).tokens
        np.testing.assert_allclose(next_logits(model, 7), next_logits(fresh, 7), atol=1e-4)


def test_every_bit_of_a_seed_matters(model: LanguageModel) -> None:
    seeds = [1, 1 + 2**32, 1 + 2**40, 1 + 2**63]
    found = [model.generate(PROMPT, max_tokens=12, temperature=2.0, seed=seed).tokens for seed in seeds]
    assert len(set(found)) == len(seeds)
    assert found == [model.generate(PROMPT, max_tokens=12, temperature=2.0, seed=seed).tokens for seed in seeds]


def test_without_a_seed_texts_differ(model: LanguageModel) -> None:
    assert len({model.generate(PROMPT, max_tokens=20, temperature=2.0).text for _ in range(4)}) > 1


def test_of_a_longer_prompt_only_the_new_part_is_computed(model: LanguageModel, bundle: Bundle) -> None:
    tokens = model.tokenizer.encode(PROMPT)
    first = model.generate(tokens, max_tokens=10)
    assert first.timings.reused_tokens == 0
    # The last generated token was not fed to the model, so it is not cached.
    longer = [*tokens, *first.tokens, 70, 71]
    second = model.generate(longer, max_tokens=10)
    assert second.timings.reused_tokens == len(tokens) + 9
    changed = [*longer[:5], 99, *longer[6:]]
    third = model.generate(changed, max_tokens=10)
    assert third.timings.reused_tokens == 5
    shorter = model.generate(changed[:8], max_tokens=10)
    assert shorter.timings.reused_tokens == 7
    with load(bundle.path, threads=1) as fresh:
        assert fresh.generate(longer, max_tokens=10).tokens == second.tokens
        assert fresh.generate(changed, max_tokens=10).tokens == third.tokens
        assert fresh.generate(changed[:8], max_tokens=10).tokens == shorter.tokens


def test_the_end_token_ends_a_text_and_is_not_part_of_it(bundle: Bundle) -> None:
    got = scripted(bundle, "hello").generate("x")
    assert (got.text, got.stop_reason, len(got.tokens)) == ("hello", "eos", 5)


@pytest.mark.parametrize("stop", ["lo w", ["zzz", "lo w"], ("world", "lo w", "o wor")])
def test_a_stop_string_over_several_tokens_ends_the_text_before_it(bundle: Bundle, stop: str | list[str]) -> None:
    stream = scripted(bundle, "hello world").stream("x", stop=stop)
    assert list(stream) == ["h", "e", "l"]
    assert (stream.generation.text, stream.generation.stop_reason) == ("hel", "stop")
    assert len(stream.generation.tokens) == len("hello w")


def test_a_stop_string_that_does_not_occur_changes_nothing(bundle: Bundle) -> None:
    got = scripted(bundle, "hello wor").generate("x", stop="world")
    assert (got.text, got.stop_reason) == ("hello wor", "eos")


def test_a_character_of_several_tokens_is_not_split(bundle: Bundle) -> None:
    tokenizer = Tokenizer.from_folder(bundle.path)
    tokens = [token for char in "aé漢🎉" for token in tokenizer.encode(char)]
    assert len(tokens) > 4
    model = LanguageModel(bundle, Scripted([*tokens, 2], 1), tokenizer)
    assert list(model.stream("x")) == ["a", "é", "漢", "🎉"]
    cut_short = model.generate("x", max_tokens=2)
    assert cut_short.text == "a\ufffd"


def test_a_full_context_ends_a_generation_without_an_error(bundle: Bundle) -> None:
    model = scripted(bundle, "a" * 20, end=False, context_length=8)
    got = model.generate("x", max_tokens=None)
    # 8 positions hold the prompt and 7 tokens; the eighth token comes from the logits of the last position.
    assert (got.text, got.stop_reason, model.runtime.position) == ("a" * 8, "length", 8)


def test_a_prompt_longer_than_the_context_is_refused_at_once(bundle: Bundle) -> None:
    with load(bundle.path, threads=1, context_length=16) as model:
        model.generate([5] * 10, max_tokens=2)
        with pytest.raises(ContextLengthError, match=r"17 tokens do not fit: the context holds 16, so 16 fit.*256"):
            model.stream([5] * 17)
        assert model.generate([5] * 16, max_tokens=9).stop_reason == "length"


def test_closing_a_stream_early_leaves_the_model_usable(model: LanguageModel) -> None:
    want = model.generate(PROMPT, max_tokens=10).tokens
    stream = model.stream(PROMPT, max_tokens=50)
    next(stream)
    stream.close()
    assert stream.generation.stop_reason == "interrupted"
    assert list(stream) == []
    assert model.generate(PROMPT, max_tokens=10).tokens == want


class Interrupting(Scripted):
    """Raises KeyboardInterrupt during a decode step, after the runtime has written the cache."""

    def decode(self, token: int) -> NDArray[np.float32]:
        logits = super().decode(token)
        if self._position == 5:
            raise KeyboardInterrupt
        return logits


def test_ctrl_c_during_a_step_leaves_a_consistent_cache(bundle: Bundle) -> None:
    tokenizer = Tokenizer.from_folder(bundle.path)
    runtime = Interrupting([tokenizer.encode(char)[0] for char in "abcdefgh"], 1)
    model = LanguageModel(bundle, runtime, tokenizer)
    with pytest.raises(KeyboardInterrupt):
        model.generate("x", max_tokens=8)
    prompt = [tokenizer.encode(char)[0] for char in "xabcdeZ"]
    runtime.fed.clear()
    model.stream(prompt, max_tokens=1).__next__()
    assert runtime.fed == prompt[5:]
    assert len(runtime.fed) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"max_token": 3},
            r"no option 'max_token' \(did you mean max_tokens\?\); there are: max_tokens, stop, reuse, temperature",
        ),
        ({"n": 3}, "no option 'n'; there are: "),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"top_p": 0.5}, "top_p would do nothing"),
        ({"stop": ["a", ""]}, "stop string ''"),
        ({"reuse": 1}, "reuse is 1: it has to be True or False"),
        ({"temperature": -1}, "temperature is -1"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(
    model: LanguageModel, options: dict[str, object], message: str
) -> None:
    with pytest.raises(GenerationError, match=message):
        model.stream(PROMPT, **options)
    assert model.runtime.position == 0


def test_prompts_without_usable_tokens_are_refused(model: LanguageModel) -> None:
    with pytest.raises(GenerationError, match="prompt is empty"):
        model.generate("")
    with pytest.raises(GenerationError, match="token id 512"):
        model.generate([1, 512])


def test_reprs_are_one_line(model: LanguageModel) -> None:
    from edgelm.generation.options import Options

    stream = model.stream(PROMPT * 5, max_tokens=100, temperature=2.0, seed=1)
    assert repr(stream).startswith("TextStream(not begun, ")
    next(stream)
    assert repr(stream).endswith(" prompt tokens, 1 generated)")
    stream.close()
    assert repr(stream).startswith("TextStream(interrupted, ")
    generation = model.generate(PROMPT, max_tokens=100, temperature=2.0, seed=1)
    for thing, says in (
        (model, ["LanguageModel(", str(model.bundle.path), "tiny-graph", "onnxruntime-cpu", "256 positions"]),
        (model.bundle, ["Bundle(", str(model.bundle.path), "tiny-graph", "portable"]),
        (model.bundle.manifest, ["tiny-graph"]),
        (generation, ["Generation('", f"{len(generation.tokens)} tokens", repr(generation.stop_reason)]),
        (Options.of({"temperature": 0.5, "stop": ["x"]}), ["Options(max_tokens=256, stop=('x',), temperature=0.5)"]),
        (Options.of({}), ["Options(max_tokens=256)"]),
        (Options.of({"stop": ["y" * 5000], "seed": 3}).sampling, ["Sampling(seed=3)"]),
        (Options.of({"stop": ["y" * 5000]}), ["Options(max_tokens=256, stop=('yyy"]),
    ):
        said = repr(thing)
        assert "\n" not in said
        assert len(said) < 100 + len(str(model.bundle.path))
        for text in says:
            assert text in said


def test_timings_count_tokens_without_the_consumers_time(model: LanguageModel) -> None:
    import time

    stream = model.stream(PROMPT, max_tokens=5)
    for _ in stream:
        time.sleep(0.05)
    timings = stream.generation.timings
    assert timings.prompt_tokens == len(model.tokenizer.encode(PROMPT))
    assert timings.decoded_tokens == 4
    assert 0 < timings.prefill_seconds <= timings.time_to_first_token
    assert 0 < timings.decode_seconds < 0.05
    assert timings.decode_tokens_per_second == pytest.approx(4 / timings.decode_seconds)
    assert timings.prefill_tokens_per_second == pytest.approx(timings.prompt_tokens / timings.prefill_seconds)


def test_chat_renders_the_bundles_template(model: LanguageModel) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    rendered = model.render_chat(messages)
    assert rendered.endswith("<|user|>\nHi\n<|assistant|>\n")
    answer = model.chat(messages, max_tokens=8)
    assert answer.tokens == model.generate(model.tokenizer.encode(rendered, add_bos=False), max_tokens=8).tokens
    followed = [*messages, {"role": "assistant", "content": answer.text}, {"role": "user", "content": "More"}]
    shared = answer.timings.prompt_tokens - 1
    assert model.chat(followed, max_tokens=2).timings.reused_tokens >= shared


def test_chat_without_a_template_is_an_error(bundle: Bundle, tmp_path: Path) -> None:
    import json
    import shutil

    folder = tmp_path / "b"
    shutil.copytree(bundle.path, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    model = LanguageModel(bundle, load(bundle.path, threads=1).runtime, Tokenizer.from_folder(folder))
    model.bundle = Bundle(folder, bundle.manifest)
    with pytest.raises(TokenizerError, match="no chat template"):
        model.chat([{"role": "user", "content": "Hi"}])


def test_a_closed_model_refuses_use(bundle: Bundle) -> None:
    with load(bundle.path, threads=1) as model:
        model.generate(PROMPT, max_tokens=1)
    with pytest.raises(EdgeLMError, match="was closed"):
        model.generate(PROMPT, max_tokens=1)


def test_the_package_exports_its_names_and_imports_quickly() -> None:
    code = (
        "import sys, edgelm; "
        "heavy = {'numpy', 'onnxruntime', 'torch', 'jinja2', 'tokenizers', 'click'} & set(sys.modules); "
        "assert not heavy, heavy; assert callable(edgelm.load); assert 'torch' not in sys.modules; "
        "assert set(edgelm.__all__) <= set(dir(edgelm))"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
    assert edgelm.load is load
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        edgelm.lode  # noqa: B018


def test_every_exported_name_can_be_imported() -> None:
    for name in edgelm.__all__:
        assert getattr(edgelm, name) is not None


def test_shape_of_the_tiny_model_is_used(tmp_path: Path) -> None:
    bundle = write_tiny_model(tmp_path / "b", Shape(vocab=300, layers=1, context=32))
    with load(bundle.path, threads=1) as model:
        assert (model.runtime.vocab_size, model.runtime.context_length) == (300, 32)
        assert len(model.generate([4, 5], max_tokens=None).tokens) == 31
