"""Do chat completions give what `LanguageModel.chat` gives, whole or as a stream, with every option of the request?"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from http_server import HttpServer

import edgelm

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = {"model": "olmoe", "messages": [{"role": "user", "content": "import os"}], "temperature": 0, "max_tokens": 12}
START = {"model": "olmoe", "prompt": "def add(a, b):", "temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def model(tiny_bundle: Callable[..., Any]) -> Any:
    with edgelm.load(tiny_bundle("olmoe", "int4", "native"), threads=2) as loaded:
        yield loaded


def text_of(answer: Any, index: int = 0) -> str:
    choice = answer["choices"][index]
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


def streamed(events: list[Any], index: int = 0) -> str:
    choices = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content", "") if "delta" in choice else choice["text"] for choice in choices)


def test_greedy_chat_is_that_of_the_library(server: HttpServer, model: Any) -> None:
    answer = server.answer(CHAT, HELLO)
    expected = model.generate_many([model.chat_tokens(HELLO["messages"])] * 2, max_tokens=12)[0]
    assert text_of(answer) == expected.text
    choice = answer["choices"][0]
    assert choice["finish_reason"] == ("length" if expected.stop_reason == "length" else "stop")
    assert answer["usage"]["prompt_tokens"] == expected.timings.prompt_tokens
    assert answer["usage"]["completion_tokens"] == len(expected.tokens)
    assert answer["usage"]["total_tokens"] == expected.timings.prompt_tokens + len(expected.tokens)
    assert (answer["object"], answer["model"]) == ("chat.completion", "olmoe")
    assert choice["message"] == {"role": "assistant", "content": expected.text, "refusal": None}


def test_a_greedy_completion_is_that_of_the_library(server: HttpServer, model: Any) -> None:
    expected = model.generate_many([START["prompt"]] * 2, max_tokens=12)[0]
    assert text_of(server.answer(TEXT, START)) == expected.text
    ids = model.tokenizer.encode(START["prompt"])
    assert text_of(server.answer(TEXT, {**START, "prompt": ids})) == expected.text


@pytest.mark.parametrize(("path", "request_"), [(CHAT, HELLO), (TEXT, START)])
def test_a_stream_has_the_same_text_and_ends_with_the_usage(server: HttpServer, path: str, request_: Any) -> None:
    sampled = {**request_, "temperature": 1.2, "seed": 7, "n": 2}
    whole = server.answer(path, sampled)
    events = server.events(path, {**sampled, "stream_options": {"include_usage": True}})
    assert [streamed(events, index) for index in range(2)] == [text_of(whole, index) for index in range(2)]
    assert text_of(whole, 0) != text_of(whole, 1)
    assert events[-1]["choices"] == []
    counted = {name: count for name, count in whole["usage"].items() if name != "prompt_tokens_details"}
    assert {name: events[-1]["usage"][name] for name in counted} == counted
    assert all(event["usage"] is None for event in events[:-1])
    reasons = [choice["finish_reason"] for event in events for choice in event["choices"] if choice["finish_reason"]]
    assert sorted(reasons) == sorted(choice["finish_reason"] for choice in whole["choices"])
    assert len({event["id"] for event in events}) == 1
    assert all("usage" not in event for event in server.events(path, request_))


def test_a_seed_repeats_an_answer_and_numbers_the_choices(server: HttpServer) -> None:
    sampled = {**START, "temperature": 1.5, "n": 3}
    texts = [choice["text"] for choice in server.answer(TEXT, {**sampled, "seed": 5})["choices"]]
    assert texts == [choice["text"] for choice in server.answer(TEXT, {**sampled, "seed": 5})["choices"]]
    assert len(set(texts)) == 3
    assert text_of(server.answer(TEXT, {**sampled, "n": 1, "seed": 6})) == texts[1]
    assert text_of(server.answer(TEXT, {**sampled, "n": 1, "seed": -1}))


def test_several_prompts_have_their_choices_in_order(server: HttpServer) -> None:
    prompts = ["import", "class A", "def f"]
    singles = [text_of(server.answer(TEXT, {**START, "prompt": prompt})) for prompt in prompts]
    answer = server.answer(TEXT, {**START, "prompt": prompts, "n": 2})
    assert [choice["text"] for choice in answer["choices"]] == [text for text in singles for _ in range(2)]
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    echoed = server.answer(TEXT, {**START, "prompt": prompts, "echo": True})
    assert [choice["text"] for choice in echoed["choices"]] == [a + b for a, b in zip(prompts, singles, strict=True)]
    assert streamed(server.events(TEXT, {**START, "prompt": prompts, "echo": True}), 1) == prompts[1] + singles[1]


def test_best_of_returns_the_most_likely(server: HttpServer) -> None:
    sampled = {**START, "temperature": 1.5, "seed": 3, "logprobs": 0}
    tried = server.answer(TEXT, {**sampled, "n": 6})["choices"]
    mean = {
        choice["text"]: sum(choice["logprobs"]["token_logprobs"]) / len(choice["logprobs"]["tokens"])
        for choice in tried
    }
    best = server.answer(TEXT, {**sampled, "n": 2, "best_of": 6})
    assert [choice["text"] for choice in best["choices"]] == sorted(mean, key=lambda text: -mean[text])[:2]
    assert best["usage"]["completion_tokens"] == 6 * 12
    plain = server.answer(TEXT, {**sampled, "n": 2, "best_of": 6, "logprobs": None})
    assert [choice["logprobs"] for choice in plain["choices"]] == [None, None]


def test_logprobs_are_those_of_the_model(server: HttpServer, model: Any) -> None:
    import numpy as np

    answer = server.answer(CHAT, {**HELLO, "logprobs": True, "top_logprobs": 3, "max_tokens": 4})
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == 4
    prompt = model.chat_tokens(HELLO["messages"])
    logits = np.asarray(model.runtime.prefill(prompt), np.float64)
    logprobs = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
    model.runtime.reset()
    assert content[0]["logprob"] == pytest.approx(logprobs.max(), abs=2e-3)
    assert [one["logprob"] for one in content[0]["top_logprobs"]] == pytest.approx(np.sort(logprobs)[:-4:-1], abs=2e-3)
    for one in content:
        assert one["top_logprobs"][0]["token"] == one["token"]  # greedy
        assert bytes(one["bytes"]).decode() == one["token"]
    assert "".join(one["token"] for one in content) == text_of(answer)
    events = server.events(CHAT, {**HELLO, "logprobs": True, "top_logprobs": 3, "max_tokens": 4})
    found = [choice["logprobs"] for event in events for choice in event["choices"] if choice["logprobs"]]
    assert [one for each in found for one in each["content"]] == content


def test_logprobs_of_completions_have_offsets(server: HttpServer) -> None:
    answer = server.answer(TEXT, {**START, "logprobs": 2})
    logprobs, text = answer["choices"][0]["logprobs"], text_of(answer)
    assert "".join(logprobs["tokens"]) == text
    for token, offset, top in zip(logprobs["tokens"], logprobs["text_offset"], logprobs["top_logprobs"], strict=True):
        assert text[offset:].startswith(token)
        assert max(top, key=lambda one: top[one]) == token
        assert len(top) == 2
    events = server.events(TEXT, {**START, "logprobs": 2})
    offsets = [
        at for event in events for one in event["choices"] if one["logprobs"] for at in one["logprobs"]["text_offset"]
    ]
    assert offsets == logprobs["text_offset"]


def test_stop_strings_end_an_answer_and_are_not_part_of_it(server: HttpServer) -> None:
    text = text_of(server.answer(TEXT, {**START, "max_tokens": 40}))
    stop = text[5:8]
    answer = server.answer(TEXT, {**START, "max_tokens": 40, "stop": [stop, "never there"]})
    assert text_of(answer) == text[: text.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert streamed(server.events(TEXT, {**START, "max_tokens": 40, "stop": stop})) == text_of(answer)


def test_a_bias_and_penalties_change_the_choice(server: HttpServer, model: Any) -> None:
    first = model.tokenizer.encode(text_of(server.answer(TEXT, START)), add_bos=False)[0]
    banned = server.answer(TEXT, {**START, "logit_bias": {str(first): -100}})
    assert model.tokenizer.encode(text_of(banned), add_bos=False)[0] != first
    forced = server.answer(TEXT, {**START, "logit_bias": {"65": 100}, "max_tokens": 5, "logprobs": 0})
    assert len(set(forced["choices"][0]["logprobs"]["tokens"])) == 1
    for penalty in ("frequency_penalty", "presence_penalty"):
        penalised = {**START, "logit_bias": {"65": 100}, "max_tokens": 5, "logprobs": 0, penalty: 2}
        assert text_of(server.answer(TEXT, penalised)) == text_of(forced)  # 2 is little beside 100
    repeated = {**START, "max_tokens": 60, "ignore_eos": True, "logprobs": 0}
    plain = server.answer(TEXT, repeated)["choices"][0]["logprobs"]["tokens"]
    for change in ({"frequency_penalty": 2}, {"presence_penalty": 2}, {"repetition_penalty": 1.5}):
        tokens = server.answer(TEXT, {**repeated, **change})["choices"][0]["logprobs"]["tokens"]
        assert len(set(tokens)) > len(set(plain)), change


def test_the_end_can_be_put_off(server: HttpServer, model: Any) -> None:
    end = str(next(iter(model.end_ids)))
    wanting = {**START, "logit_bias": {end: 100}}
    assert server.answer(TEXT, wanting)["usage"]["completion_tokens"] == 0
    assert server.answer(TEXT, {**wanting, "min_tokens": 3})["usage"]["completion_tokens"] == 3
    assert server.answer(TEXT, {**wanting, "ignore_eos": True})["usage"]["completion_tokens"] == 12


def test_filters_that_change_nothing_are_taken_with_temperature_0(server: HttpServer) -> None:
    greedy = text_of(server.answer(TEXT, START))
    assert text_of(server.answer(TEXT, {**START, "top_p": 0.9, "top_k": 40, "min_p": 0.1})) == greedy
    assert text_of(server.answer(TEXT, {**START, "temperature": 1, "top_p": 0})) == greedy
    assert text_of(server.answer(TEXT, {**START, "temperature": 1, "top_k": 1})) == greedy
    assert text_of(server.answer(TEXT, {**START, "temperature": 1, "min_p": 1})) == greedy
    assert text_of(server.answer(TEXT, {**START, "temperature": 1, "top_k": -1, "seed": 1})) != greedy


@pytest.mark.parametrize("stream", [False, True])
def test_a_json_schema_a_regex_and_a_grammar_are_followed(server: HttpServer, stream: bool) -> None:
    def text(change: Any) -> str:
        sampled = {**HELLO, "temperature": 1, "seed": 2, "max_tokens": 200, **change}
        return streamed(server.events(CHAT, sampled)) if stream else text_of(server.answer(CHAT, sampled))

    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "maximum": 9, "minimum": 0}, "kind": {"enum": ["x", "y"]}},
        "required": ["n", "kind"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}
    found = json.loads(text({"response_format": wanted}))
    assert set(found) == {"n", "kind"}
    assert 0 <= found["n"] <= 9
    assert found["kind"] in ("x", "y")
    date = text({"regex": "[0-9]{4}-[0-9]{2}"})
    assert len(date) == 7
    assert date.replace("-", "").isdigit()
    assert text({"grammar": 'start: "yes" | "no"'}) in ("yes", "no")


@pytest.mark.parametrize(
    ("path", "change", "param", "said"),
    [
        (CHAT, {"max_completion_tokens": 3}, "max_tokens", "two names of one limit"),
        (CHAT, {"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        (CHAT, {"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
        (CHAT, {"regex": "a", "grammar": 'start: "a"'}, "grammar", "both say"),
        (CHAT, {"regex": "(("}, "regex", "unclosed group"),
        (CHAT, {"grammar": "start: nothing"}, "grammar", "nothing"),
        (CHAT, {"response_format": {"type": "json_schema"}}, "response_format.json_schema", "goes with"),
        (CHAT, {"logit_bias": {"2048": 1}}, "logit_bias", "from 0 to 2047"),
        (CHAT, {"logit_bias": {"a": 1}}, "logit_bias", "'a'"),
        (CHAT, {"messages": [{"role": "assistant"}]}, "messages[0].content", "is missing"),
        (CHAT, {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "cannot set messages"),
        (CHAT, {"tool_choice": "required"}, "tool_choice", "there are no tools"),
        (TEXT, {"best_of": 1, "n": 2}, "best_of", "less than n"),
        (TEXT, {"best_of": 2, "stream": True}, "best_of", "leave stream out"),
        (TEXT, {"echo": True, "logprobs": 1}, "echo", "not supported"),
        (TEXT, {"prompt": []}, "prompt", "0 entries"),
        (TEXT, {"prompt": [5000]}, "prompt", "from 0 to 2047"),
        (TEXT, {"prompt": [1] * 513}, "prompt", "the context of olmoe is 512"),
        (TEXT, {"suffix": "end"}, "suffix", "not supported"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    server: HttpServer, path: str, change: Any, param: str, said: str
) -> None:
    error = server.error(path, {**(HELLO if path == CHAT else START), **change})
    assert error["param"] == param
    assert said in error["message"]
    assert "/" not in error["message"].replace("/v1", "")


def test_the_model_may_be_left_out_only_where_there_is_one(
    server: HttpServer, serving: Callable[..., HttpServer]
) -> None:
    unnamed = {name: value for name, value in START.items() if name != "model"}
    assert "olmoe, fox" in server.error(TEXT, unnamed)["message"]
    assert server.error(TEXT, {**START, "model": "gpt-4"}, 404)["code"] == "model_not_found"
    assert serving().answer(TEXT, unnamed)["model"] == "olmoe"


def test_two_models_answer_at_the_same_time(server: HttpServer) -> None:
    answers = [server.answer(TEXT, {**START, "model": name}) for name in ("olmoe", "fox")]
    assert [answer["model"] for answer in answers] == ["olmoe", "fox"]
    assert answers[0]["system_fingerprint"] != answers[1]["system_fingerprint"]
    assert text_of(answers[0]) != text_of(answers[1])
