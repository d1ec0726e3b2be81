"""Is reasoning told from the answer, however the text is cut, and does a grammar hold for the answer alone?"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from http_server import HttpServer

from edgelm.serving.api.responses import (
    InputCall,
    InputMessage,
    InputReasoning,
    InputResult,
    ReasoningText,
    ResponsesRequest,
)
from edgelm.serving.constraints import Reasoning, ReasoningParser
from edgelm.serving.endpoints.responses import as_chat

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
TEMPLATE = """\
{% for message in messages %}{{ message.role }}: {% if message.reasoning_content %}<think>
{{ message.reasoning_content }}
</think>

{% endif %}{{ message.content or "" }}
{% endfor %}{% if add_generation_prompt %}assistant: {% if start == "open" %}<think>
{% elif start == "closed" %}<think>

</think>

{% endif %}{% endif %}"""
QUESTION = {"messages": [{"role": "user", "content": "1 + 3?"}], "temperature": 1, "seed": 1, "max_tokens": 200}
THINKS = {**QUESTION, "regex": "<think>\n[ab]{3}\n</think>\n\n[cd]{3}"}


def parsed(pieces: Sequence[str], began: bool) -> tuple[str, str]:
    parser = ReasoningParser(began=began)
    found = [*map(parser.feed, pieces), parser.finish()]
    return "".join(thought for thought, _ in found), "".join(content for _, content in found)


@pytest.mark.parametrize(
    ("text", "began", "wanted"),
    [
        ("<think>\nso\n\nthen\n</think>\n\nFour.", False, ("so\n\nthen", "Four.")),
        ("\n<think>so</think>Four. ", False, ("so", "Four. ")),
        ("<think>\n\n</think>\n\nFour.", False, ("", "Four.")),
        ("so </th </think></think> four", True, ("so </th", "</think> four")),
        ("so\n</think>\n\nFour.\n", True, ("so", "Four.\n")),
        ("so it is </th", True, ("so it is </th", "")),
        ("<think> so it is \n", False, ("so it is", "")),
        (" Four.", False, ("", " Four.")),
        ("<thin air", False, ("", "<thin air")),
        ("Four <think>so</think>", False, ("", "Four <think>so</think>")),
        ("<think>a <think> b</think>c", False, ("a <think> b", "c")),
        ("  ", False, ("", "  ")),
        ("", True, ("", "")),
    ],
)
def test_is_the_reasoning_found_at_every_cut(text: str, began: bool, wanted: tuple[str, str]) -> None:
    assert parsed([text], began) == wanted
    assert parsed(list(text), began) == wanted
    for cut in range(len(text) + 1):
        assert parsed([text[:cut], text[cut:]], began) == wanted, cut


@pytest.fixture(scope="module")
def reasoning(with_template: Callable[..., Any]) -> Iterator[HttpServer]:
    """A server with a model whose template knows reasoning."""
    with with_template("thinker", TEMPLATE) as running:
        yield running


def streamed(running: HttpServer, request: Any) -> tuple[str, str, int]:
    """Return the reasoning, the content and the number of the reasoning's tokens of a stream."""
    thought = content = ""
    tokens = -1
    for event in running.events(CHAT, {**request, "stream_options": {"include_usage": True}}):
        for choice in event["choices"]:
            assert not (thought and content and "reasoning_content" in choice["delta"])
            thought += choice["delta"].get("reasoning_content", "")
            content += choice["delta"].get("content", "")
        if event["usage"]:
            tokens = event["usage"]["completion_tokens_details"]["reasoning_tokens"]
    return thought, content, tokens


def test_the_reasoning_is_a_field_of_its_own(reasoning: HttpServer) -> None:
    answer = reasoning.answer(CHAT, THINKS)
    message, usage = answer["choices"][0]["message"], answer["usage"]
    assert len(message["reasoning_content"]) == len(message["content"]) == 3
    assert set(message["reasoning_content"]) <= set("ab")
    assert set(message["content"]) <= set("cd")
    tokens = usage["completion_tokens_details"]["reasoning_tokens"]
    assert 3 <= tokens < usage["completion_tokens"]
    assert streamed(reasoning, THINKS) == (message["reasoning_content"], message["content"], tokens)

    whole = reasoning.answer(CHAT, {**THINKS, "reasoning_format": "none"})
    assert whole["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0
    (choice,) = whole["choices"]
    assert "reasoning_content" not in choice["message"]
    assert choice["message"]["content"] == f"<think>\n{message['reasoning_content']}\n</think>\n\n{message['content']}"


def test_an_answer_without_reasoning_has_no_such_field(reasoning: HttpServer) -> None:
    for more in ({}, {"chat_template_kwargs": {"start": "closed"}}):
        answer = reasoning.answer(CHAT, {**QUESTION, **more, "regex": "[cd]{3}"})
        assert "reasoning_content" not in answer["choices"][0]["message"]
        assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0


def test_an_answer_that_ends_inside_the_reasoning_has_no_content(reasoning: HttpServer) -> None:
    request = {**QUESTION, "chat_template_kwargs": {"start": "open"}, "max_tokens": 5, "ignore_eos": True}
    answer = reasoning.answer(CHAT, request)
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"] == ""
    assert choice["message"]["reasoning_content"].strip() == choice["message"]["reasoning_content"] != ""
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 5
    assert streamed(reasoning, request) == (choice["message"]["reasoning_content"], "", 5)


class Typed:
    """A rule that allows certain tokens, one after the other."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def apply(self, logits: Any) -> Any:
        return np.where(np.arange(len(logits)) == 3, logits, -np.inf)

    def accept(self, token: int) -> None:
        self.seen.append(token)


def test_a_grammar_holds_after_reasoning_that_the_prompt_began(reasoning: HttpServer) -> None:
    tokenizer = reasoning.service.models.all["thinker"].running.model.tokenizer
    prompt = tokenizer.encode("assistant: <think>\n")
    found = Reasoning.of(TEMPLATE, prompt, tokenizer)
    assert found == Reasoning(began=True)
    inner = Typed()
    rule = found.grammar_rule(inner, tokenizer)
    logits = np.zeros(tokenizer.vocab_size, np.float32)
    for token in tokenizer.encode("so it is</think>"):
        assert np.isfinite(rule.apply(logits)).all()
        rule.accept(token)
    assert np.isfinite(rule.apply(logits)).sum() == 1
    rule.accept(3)
    assert inner.seen == [3]

    assert Reasoning.of(TEMPLATE, tokenizer.encode("user: <think>\nassistant: "), tokenizer) == Reasoning(began=False)
    assert Reasoning(began=False).grammar_rule(inner, tokenizer) is inner
    assert Reasoning.of(TEMPLATE, tokenizer.encode("assistant: <think>\n\n</think>\n\n"), tokenizer) is None
    assert Reasoning.of("{{ messages }}", prompt, tokenizer) is None


def test_responses_have_an_item_of_reasoning_that_can_be_sent_back(reasoning: HttpServer) -> None:
    given = {"input": "1 + 3?", "chat_template_kwargs": {"start": "open"}}
    assert "chat_template_kwargs" in reasoning.error(RESPONSES, given)["message"]  # no field of this endpoint
    thinks = {"name": "a", "schema": {"type": "object"}}
    asked = {"input": "1 + 3?", "temperature": 1, "seed": 1, "max_output_tokens": 30, "text": {"format": {
        "type": "json_schema", **thinks}}}  # fmt: skip
    plain = reasoning.answer(RESPONSES, asked)
    assert [item["type"] for item in plain["output"]] == ["message"]
    assert plain["usage"]["output_tokens_details"] == {"reasoning_tokens": 0}

    earlier = [
        {"role": "user", "content": "1 + 3?"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "so"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Four."}]},
        {"role": "user", "content": "And 1 + 1?"},
    ]
    more = {**asked, "input": earlier}
    chat = [
        {"role": "user", "content": "1 + 3?"},
        {"role": "assistant", "content": "Four.", "reasoning_content": "so"},
        {"role": "user", "content": "And 1 + 1?"},
    ]
    counted = reasoning.answer("/tokenize", {"messages": chat})["count"]
    assert reasoning.answer(RESPONSES, more)["usage"]["input_tokens"] == counted
    cut_off = [earlier[0], earlier[1], earlier[3]]  # its answer never came
    chat = [chat[0], chat[2]]
    counted = reasoning.answer("/tokenize", {"messages": chat})["count"]
    assert reasoning.answer(RESPONSES, {**asked, "input": cut_off})["usage"]["input_tokens"] == counted


def test_reasoning_and_the_calls_after_it_are_one_message() -> None:
    def thought(text: str) -> InputReasoning:
        return InputReasoning("reasoning", [ReasoningText("reasoning_text", text)])

    items = [
        InputMessage("user", "a"), thought("first"), InputCall("function_call", "c1", "f", "{}"),
        InputResult("function_call_output", "c1", "4"), thought("cut off"), thought("second"),
        InputMessage("assistant", "b"), thought("third"), InputCall("function_call", "c2", "f", "{}"), thought("last"),
    ]  # fmt: skip
    found = as_chat(ResponsesRequest(input=items)).messages
    shown = [(one.role, one.content, one.reasoning_content, len(one.tool_calls or [])) for one in found]
    assert shown == [
        ("user", "a", None, 0), ("assistant", None, "first", 1), ("tool", "4", None, 0),
        ("assistant", "b", "second", 0), ("assistant", None, "third", 1),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def always(with_template: Callable[..., Any]) -> Iterator[HttpServer]:
    """A server with a model whose every prompt begins the reasoning, as those of DeepSeek-R1."""
    with with_template("thinker", TEMPLATE.replace('start == "open"', "true")) as running:
        yield running


def test_the_events_of_responses_tell_of_reasoning(always: HttpServer) -> None:
    asked = {"input": "1 + 3?", "temperature": 1, "seed": 1, "max_output_tokens": 6}
    (item,) = always.answer(RESPONSES, asked)["output"]
    assert (item["type"], item["summary"], item["status"]) == ("reasoning", [], "incomplete")
    ((part,),) = (item["content"],)
    assert part["type"] == "reasoning_text"
    text = always.post(RESPONSES, {**asked, "stream": True}).text
    events = [json.loads(part.partition("\ndata: ")[2]) for part in text.split("\n\n") if part.startswith("event: ")]
    text = "".join(event["delta"] for event in events if event["type"] == "response.reasoning_text.delta")
    assert text == part["text"] != ""
    (done,) = (event for event in events if event["type"] == "response.reasoning_text.done")
    assert done["text"] == text
    (added,) = (event for event in events if event["type"] == "response.output_item.added")
    assert added["item"]["content"] == []
    last = events[-1]["response"]
    assert last["usage"]["output_tokens_details"] == {"reasoning_tokens": 6}
    assert json.dumps({**last["output"][0], "id": ""}) == json.dumps({**item, "id": ""})


def test_the_openai_client_reads_reasoning(always: HttpServer) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"http://127.0.0.1:{always.port}/v1", api_key="none") as client:
        chat = client.chat.completions.create(model="thinker", messages=QUESTION["messages"], max_tokens=6, seed=1)
        assert chat.choices[0].message.reasoning_content
        assert chat.usage.completion_tokens_details.reasoning_tokens == 6
        with client.responses.stream(model="thinker", input="1 + 3?", max_output_tokens=6) as stream:
            deltas = [event.delta for event in stream if event.type == "response.reasoning_text.delta"]
        with client.responses.create(model="thinker", input="1 + 3?", max_output_tokens=6, stream=True) as stream:
            (item,) = list(stream)[-1].response.output
        assert item.type == "reasoning"
        assert item.content[0].text
        assert deltas
