"""Do clients get structured output and calls of tools over HTTP, whole and as a stream, with OpenAI's own library?"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from http_server import HttpServer
from tool_templates import QWEN_3

from edgelm.serving.settings import Settings

CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 5}, "unit": {"enum": ["C", "F"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "get_weather", "strict": True, "parameters": CITY}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "additionalProperties": False}}},
]
ASK: Any = [{"role": "user", "content": "What is the weather in Paris?"}]


@pytest.fixture(scope="module")
def client(tiny_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """A client of a server with two models: `tools`, whose chat template has tools, and `plain`."""
    source, folder = tiny_bundle("olmoe", "int4", "native"), tmp_path_factory.mktemp("models") / "tools"
    shutil.copytree(source, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    templates = {"default": config["chat_template"], "tool_use": QWEN_3}
    config["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    data = json.dumps(config).encode()
    (folder / "tokenizer_config.json").write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["tokenizer_config.json"] |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with HttpServer(Settings(models={"tools": folder, "plain": source}, loading={"threads": 2})) as running:
        yield openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)


def city_of(text: str) -> dict[str, str]:
    found: dict[str, str] = json.loads(text)
    assert set(found) == {"city", "unit"} and len(found["city"]) <= 5 and found["unit"] in ("C", "F")
    return found


def test_does_an_answer_follow_its_schema(client: openai.OpenAI) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": CITY}}
    ended = 0
    for seed in range(6):
        answer = client.chat.completions.create(
            model="plain", messages=ASK, response_format=wanted, temperature=1.2, seed=seed, max_tokens=150
        )
        if answer.choices[0].finish_reason == "stop":
            ended += 1
            city_of(answer.choices[0].message.content or "")
    assert ended >= 4


def test_is_a_function_called(client: openai.OpenAI) -> None:
    called = set()
    for seed in range(8):
        given: dict[str, Any] = {
            "model": "tools", "messages": ASK, "tools": TOOLS, "tool_choice": "required", "temperature": 1.3,
            "seed": seed, "max_tokens": 200, "parallel_tool_calls": False,
        }  # fmt: skip
        choice = client.chat.completions.create(**given).choices[0]
        if choice.finish_reason == "length":
            continue
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
        [call] = choice.message.tool_calls or []
        assert call.type == "function" and call.id.startswith("call_")
        called.add(call.function.name)
        assert json.loads(call.function.arguments) == {} or city_of(call.function.arguments)
        chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**given, stream=True)]
        pieces = [piece for chunk in chunks for piece in chunk.delta.tool_calls or []]
        assert [piece.function.name for piece in pieces if piece.id] == [call.function.name]
        assert "".join(piece.function.arguments or "" for piece in pieces) == call.function.arguments
        assert not any(chunk.delta.content for chunk in chunks)
        assert chunks[-1].finish_reason == "tool_calls"
    assert called


def test_does_a_conversation_go_on_after_a_call(client: openai.OpenAI) -> None:
    named: Any = {"type": "function", "function": {"name": "now"}}
    first = client.chat.completions.create(
        model="tools", messages=ASK, tools=TOOLS, tool_choice=named, max_tokens=80
    ).choices[0]
    [call] = first.message.tool_calls or []
    assert (first.finish_reason, call.function.name) == ("stop", "now")
    history: Any = [*ASK, first.message, {"role": "tool", "tool_call_id": call.id, "content": "12:00"}]
    second = client.chat.completions.create(model="tools", messages=history, tools=TOOLS, max_tokens=5)
    assert second.usage is not None and first.message.tool_calls is not None
    none = client.chat.completions.create(
        model="tools", messages=history, tools=TOOLS, tool_choice="none", max_tokens=5
    )
    assert none.choices[0].message.tool_calls is None
    assert none.usage is not None and none.usage.prompt_tokens < second.usage.prompt_tokens


@pytest.mark.parametrize(
    ("given", "param", "said"),
    [
        ({"model": "plain", "tools": TOOLS}, "tools", "tools cannot be used with plain: its chat template does not"),
        ({"tool_choice": "required"}, "tool_choice", "but there are no tools"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}},
            "response_format",
            'at #: the keyword "not" cannot be enforced',
        ),
        ({"tools": [{**TOOLS[0], "type": "web"}]}, None, "web"),
    ],
)
def test_are_errors_told_as_those_of_the_request(client: openai.OpenAI, given: Any, param: Any, said: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "tools", "messages": ASK, **given})
    assert said in caught.value.message
    assert param is None or caught.value.param == param
