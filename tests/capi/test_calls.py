"""Cancelling, threads, prefix reuse and sessions of the C library."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from harness import Error, Generation, Model

PROMPT = list(range(100, 140))


def test_how_much_of_a_prompt_is_reused(model: Model) -> None:
    model.reset()
    assert model.cached_tokens == 0
    first = model.generate(PROMPT, max_tokens=4)
    assert (first.reused, first.timings["prompt_tokens"], first.timings["decoded_tokens"]) == (0, 40, 3)
    assert model.cached_tokens == 43
    assert model.generate(PROMPT, max_tokens=4, temperature=1.0, seed=1).reused == 40  # identical and fresh
    assert model.generate([*PROMPT[:30], 7], max_tokens=1).reused == 30
    assert model.generate([*PROMPT[:30], 7, 8], max_tokens=1, temperature=1.0, seed=1).reused == 0
    assert model.generate([*PROMPT[:30], 7, 8, 9], max_tokens=1, temperature=1.0, seed=1, reuse=1).reused == 32


def test_does_the_answer_stay_in_the_cache(model: Model) -> None:
    model.reset()
    answer = model.generate(PROMPT, max_tokens=10)
    assert model.generate([*PROMPT, *answer.tokens, 5], max_tokens=1).reused == 40 + 9


def test_does_the_time_of_the_callback_not_count(model: Model) -> None:
    texts: list[str] = []

    def slowly(text: str) -> None:
        texts.append(text)
        time.sleep(0.05)

    result = model.generate("import os\n", max_tokens=12, on_text=slowly)
    assert len(texts) > 4
    assert 0 < result.timings["decode_seconds"] < 0.05 * (len(texts) - 1)
    assert result.timings["time_to_first_token"] >= result.timings["prefill_seconds"] > 0


def test_does_the_callback_end_the_text(model: Model) -> None:
    texts: list[str] = []

    def third(text: str) -> bool:
        texts.append(text)
        return len(texts) == 3

    result = model.generate("import os\n", max_tokens=50, on_text=third)
    assert (result.stop_reason, result.text) == ("interrupted", "".join(texts))


def test_does_cancel_end_the_call_that_runs(model: Model) -> None:
    begun, results = threading.Event(), []

    def generate() -> None:
        results.append(model.generate("import os\n", max_tokens=-1, on_text=lambda _: begun.set()))

    model.cancel()  # nothing runs: the next call is not affected
    thread = threading.Thread(target=generate)
    thread.start()
    assert begun.wait(30)
    model.cancel()
    thread.join(30)
    (result,) = results
    assert result.stop_reason == "interrupted"
    whole = model.generate("import os\n", max_tokens=max(1, len(result.tokens)))
    assert whole.tokens[: len(result.tokens)] == result.tokens
    assert whole.stop_reason != "interrupted"


def test_do_eight_threads_get_what_one_gets(model: Model) -> None:
    prompts = [[*PROMPT[:20], i, i + 1] for i in range(8)]
    wanted = [model.generate(prompt, max_tokens=12, temperature=1.0, seed=i) for i, prompt in enumerate(prompts)]
    results: list[Generation | None] = [None] * 8

    def generate(i: int) -> None:
        for _ in range(3):
            results[i] = model.generate(prompts[i], max_tokens=12, temperature=1.0, seed=i)
            assert model.detokenize(results[i].tokens) == results[i].text

    threads = [threading.Thread(target=generate, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [result and result.tokens for result in results] == [one.tokens for one in wanted]


def test_is_a_call_of_the_callback_refused(model: Model) -> None:
    errors: list[Error] = []

    def compute(_: str) -> bool:
        try:
            model.generate(PROMPT)
        except Error as error:
            errors.append(error)
        return True

    model.generate("import os\n", on_text=compute)
    assert [error.code for error in errors] == ["INVALID_ARGUMENT"]
    assert "callback" in str(errors[0])


def test_does_close_end_the_call_that_runs(fox: Path) -> None:
    opened, begun, results = Model(fox, threads=1), threading.Event(), []
    thread = threading.Thread(
        target=lambda: results.append(opened.generate("import os\n", max_tokens=-1, on_text=lambda _: begun.set()))
    )
    thread.start()
    assert begun.wait(30)
    opened.close()
    thread.join(30)
    assert results[0].stop_reason == "interrupted"


def test_can_a_callback_close_the_model(fox: Path) -> None:
    opened = Model(fox, threads=1)
    result = opened.generate("import os\n", on_text=lambda _: opened.close())
    assert result.stop_reason == "interrupted"
    assert len(result.text) > 0


@pytest.mark.parametrize("kv", ["float32", "float16", "int8", "fp8"])
def test_does_a_session_go_on_with_the_same_logits(fox: Path, tmp_path: Path, kv: str) -> None:
    path = tmp_path / "session"
    with Model(fox, threads=2, kv=kv) as one, Model(fox, threads=2, kv=kv) as other:
        answer = one.generate(PROMPT, max_tokens=10)
        one.save_session(path)
        other.load_session(path)
        assert other.cached_tokens == one.cached_tokens == 49
        # The identical prompt, also with a seed, since it was computed afresh.
        assert other.generate(PROMPT, max_tokens=10, temperature=1.0, seed=1).reused == 40
        other.load_session(path)
        longer = [*PROMPT, *answer.tokens, 11, 12]
        assert np.array_equal(other.logits(longer), one.logits(longer))
        assert other.generate([*longer, 13], max_tokens=10).tokens == one.generate([*longer, 13], max_tokens=10).tokens
        assert [entry.name for entry in tmp_path.iterdir()] == ["session"]


def test_is_a_session_of_something_else_refused(fox: Path, model: Model, tmp_path: Path) -> None:
    path = tmp_path / "session"
    model.generate(PROMPT, max_tokens=2)
    model.save_session(path)
    data = path.read_bytes()
    with Model(fox, threads=1, kv="int8") as other, pytest.raises(Error, match='type "float16"') as refused:
        other.load_session(path)
    assert refused.value.code == "FILE"
    with Model(fox, threads=1, context_length=16) as other, pytest.raises(Error, match="do not fit") as refused:
        other.load_session(path)
    assert refused.value.code == "CONTEXT_FULL"
    for damaged in (b"", data[:-1], data[:100], bytes([*data[:-5], data[-5] ^ 1, *data[-4:]]), data + b"x"):
        path.write_bytes(damaged)
        with pytest.raises(Error) as refused:
            model.load_session(path)
        assert refused.value.code == "FILE"
        assert model.cached_tokens == 41
    with pytest.raises(Error) as refused:
        model.save_session(tmp_path / "missing" / "session")
    assert refused.value.code == "FILE"
