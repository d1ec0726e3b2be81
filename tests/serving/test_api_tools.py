"""Are tools shown to the model, are calls forced where they have to come, and parsed back, whole and in a stream?"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from http_server import HttpServer

CHAT = "/v1/chat/completions"
TEMPLATE = """\
{% if tools %}TOOLS{% for tool in tools %} {{ tool.function | tojson }}{% endfor %}
{% endif %}{% for message in messages %}{{ message.role }}: {{ message.content or "" }}{% if message.tool_calls %}\
{% for call in message.tool_calls %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{% endfor %}{% endif %}
{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two digits.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"enum": [1, 2]}, "b": {"enum": [3, 4]}},
                "required": ["a", "b"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {"additionalProperties": False}}},
]
ASKED = {"messages": [{"role": "user", "content": "1 + 3?"}], "tools": TOOLS, "temperature": 1, "max_tokens": 200}


@pytest.fixture(scope="module")
def calling(with_template: Callable[..., Any]) -> Iterator[HttpServer]:
    """A server with a model whose template shows tools."""
    with with_template("caller", TEMPLATE) as running:
        yield running


def calls_of(running: HttpServer, request: Any, stream: bool) -> tuple[list[tuple[str, Any]], str]:
    """Return the calls of an answer, whose ids have to be there, and its finish reason."""
    if not stream:
        choice = running.answer(CHAT, request)["choices"][0]
        assert choice["message"]["content"] is None
        calls = choice["message"]["tool_calls"]
        assert all(call["type"] == "function" for call in calls)
        assert len({call["id"] for call in calls}) == len(calls)
        found = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]
        return found, choice["finish_reason"]
    pieces: dict[int, list[Any]] = {}
    reason = ""
    for event in running.events(CHAT, request):
        (choice,) = event["choices"]
        for call in choice["delta"].get("tool_calls", []):
            pieces.setdefault(call["index"], []).append(call)
        reason = choice["finish_reason"] or reason
    found = []
    for index in sorted(pieces):
        first, *others = pieces[index]
        assert first["id"]
        assert first["type"] == "function"
        assert all("id" not in one and "name" not in one["function"] for one in others)
        text = "".join(one["function"]["arguments"] for one in pieces[index])
        found.append((first["function"]["name"], json.loads(text)))
    return found, reason


@pytest.mark.parametrize("stream", [False, True])
def test_a_named_function_is_called_with_arguments_of_its_schema(calling: HttpServer, stream: bool) -> None:
    choice = {"type": "function", "function": {"name": "add"}}
    request = {**ASKED, "tool_choice": choice, "parallel_tool_calls": False, "seed": 1}
    calls, reason = calls_of(calling, request, stream)
    assert reason == "stop"  # as OpenAI
    ((name, arguments),) = calls
    assert name == "add"
    assert arguments["a"] in (1, 2)
    assert arguments["b"] in (3, 4)


@pytest.mark.parametrize("stream", [False, True])
def test_a_required_call_comes(calling: HttpServer, stream: bool) -> None:
    request = {**ASKED, "tool_choice": "required", "parallel_tool_calls": False, "seed": 4}
    calls, reason = calls_of(calling, request, stream)
    assert [name for name, _ in calls] in (["add"], ["now"])
    assert reason == "tool_calls"


def test_several_calls_are_parsed_back_in_order(calling: HttpServer) -> None:
    request = {**ASKED, "tool_choice": "required", "seed": 4, "ignore_eos": True}
    calls = calling.answer(CHAT, request)["choices"][0]["message"]["tool_calls"]
    whole = [(call["function"]["name"], call["function"]["arguments"]) for call in calls][:-1]  # the last is cut off
    assert len(whole) >= 2
    assert all(set(json.loads(arguments)) == ({"a", "b"} if name == "add" else set()) for name, arguments in whole)


def test_without_a_call_the_answer_is_text(calling: HttpServer) -> None:
    for choice in ("none", "auto"):
        message = calling.answer(CHAT, {**ASKED, "tool_choice": choice, "max_tokens": 5})["choices"][0]["message"]
        assert isinstance(message["content"], str)
        assert "tool_calls" not in message


def test_the_template_gets_tools_and_earlier_calls(calling: HttpServer) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a":1,"b":3}'}}
    talk = [
        {"role": "user", "content": "1 + 3?"},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "annotations": []},
        {"role": "tool", "tool_call_id": "call_1", "content": "4"},
    ]
    tokens = calling.answer("/tokenize", {"messages": talk, "tools": TOOLS})["tokens"]
    text = calling.answer("/detokenize", {"tokens": tokens})["prompt"]
    assert text.startswith("TOOLS {")
    assert '"description": "Add two digits."' in text
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 3}}\n</tool_call>' in text
    assert text.endswith("tool: 4assistant:")
    unseen = calling.answer("/tokenize", {"messages": talk})["tokens"]
    assert "TOOLS" not in calling.answer("/detokenize", {"tokens": unseen})["prompt"]
    assert calling.answer(CHAT, {"messages": talk, "tools": TOOLS, "max_tokens": 2})


@pytest.mark.parametrize(
    ("change", "param", "said"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "subtract"}}}, "tool_choice", "'subtract'"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools[1].function.name", "a name of its own"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "letters"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type", '"retrieval"'),
        ({"regex": "a+"}, "response_format", "tool_choice"),
    ],
)
def test_wrong_tools_are_refused_by_name(calling: HttpServer, change: Any, param: str, said: str) -> None:
    error = calling.error(CHAT, {**ASKED, **change})
    assert error["param"] == param
    assert said in error["message"]


def test_a_model_without_tools_says_so(server: HttpServer) -> None:
    error = server.error(CHAT, {**ASKED, "model": "olmoe"})
    assert "tools cannot be used with olmoe" in error["message"]
    assert error["param"] == "tools"
