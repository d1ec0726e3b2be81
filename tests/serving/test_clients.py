"""Do the clients that people use work unchanged: openai, LangChain's, llm?"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from http_server import HttpServer
from pydantic import BaseModel
from test_api_tools import TEMPLATE, TOOLS

TALK: Any = [{"role": "user", "content": "import os"}]
DIGITS = {
    "type": "object",
    "properties": {"a": {"enum": [1, 2]}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def calling(with_template: Callable[..., Any]) -> Iterator[HttpServer]:
    """A server with one model whose template shows tools, called `tiny`."""
    with with_template("tiny", TEMPLATE) as running:
        yield running


@pytest.fixture(scope="module")
def client(calling: HttpServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{calling.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


class Digits(BaseModel):
    a: int
    ok: bool


def test_openai_chats_whole_and_as_a_stream(client: openai.OpenAI) -> None:
    given: Any = {"model": "tiny", "messages": TALK, "temperature": 0, "max_tokens": 12}
    whole = client.chat.completions.create(**given)
    usage = None
    text = ""
    for chunk in client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
    assert text == whole.choices[0].message.content
    assert usage is not None
    assert whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens == 12
    again = client.chat.completions.create(
        **{**given, "messages": [*TALK, whole.choices[0].message, {"role": "user", "content": "more"}]}
    )
    assert again.choices[0].message.content
    # Its helper takes "length" for an error: this answer ends by itself.
    with client.chat.completions.stream(model="tiny", messages=TALK, extra_body={"regex": "yes|no"}) as stream:
        assert stream.get_final_completion().choices[0].message.content in ("yes", "no")


def test_openai_in_an_event_loop_and_leaving_early(calling: HttpServer) -> None:
    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{calling.url}/v1", api_key="none", max_retries=0) as client:
            given: Any = {"model": "tiny", "messages": TALK, "temperature": 0}
            answers = await asyncio.gather(
                *[client.chat.completions.create(**given, max_tokens=count) for count in (3, 5, 8, 13, 21)]
            )
            stream = await client.chat.completions.create(**given, max_tokens=21, stream=True)
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            left = await client.chat.completions.create(
                **given, max_tokens=450, n=16, stream=True, extra_body={"ignore_eos": True}
            )
            async for _ in left:
                break
            await left.close()
            return [*[answer.choices[0].message.content or "" for answer in answers], text]

    *texts, streamed = asyncio.run(run())
    assert all(texts[-1].startswith(text) for text in texts)
    assert streamed == texts[-1]
    calling.wait(lambda: calling.service.active == 0)


def test_openai_parses_a_json_schema(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(model="tiny", messages=TALK, response_format=Digits, max_tokens=400, seed=3)
    assert isinstance(parsed.choices[0].message.parsed, Digits)
    schema: Any = {"type": "json_schema", "json_schema": {"name": "digits", "schema": DIGITS, "strict": True}}
    found = client.chat.completions.create(model="tiny", messages=TALK, response_format=schema, max_tokens=400, seed=3)
    assert set(json.loads(found.choices[0].message.content or "")) == {"a", "b"}
    anything = client.chat.completions.create(
        model="tiny", messages=TALK, response_format={"type": "json_object"}, max_tokens=5, seed=3
    )
    assert (anything.choices[0].message.content or "").lstrip().startswith("{")


def test_openai_calls_tools_and_sends_results_back(client: openai.OpenAI) -> None:
    given: Any = {"model": "tiny", "tools": TOOLS, "max_tokens": 400, "seed": 2, "parallel_tool_calls": False}
    message = client.chat.completions.create(**given, messages=TALK, tool_choice="required").choices[0].message
    assert message.tool_calls is not None
    (call,) = message.tool_calls
    talk = [*TALK, message, {"role": "tool", "tool_call_id": call.id, "content": "4"}]
    assert client.chat.completions.create(**{**given, "max_tokens": 4}, messages=talk).choices[0].message.content
    with client.chat.completions.stream(**given, messages=TALK, tool_choice="required") as stream:
        streamed = stream.get_final_completion().choices[0].message.tool_calls
    assert streamed is not None
    assert streamed[0].function.name == call.function.name  # type: ignore[union-attr]  # no custom tools here
    assert json.loads(streamed[0].function.arguments) == json.loads(call.function.arguments)  # type: ignore[union-attr]


def test_openai_completes_and_embeds_and_lists(client: openai.OpenAI) -> None:
    completion = client.completions.create(model="tiny", prompt=["a", "b"], max_tokens=3, logprobs=2, echo=False)
    assert [choice.index for choice in completion.choices] == [0, 1]
    assert completion.choices[0].logprobs is not None
    pieces = client.completions.create(model="tiny", prompt="a", max_tokens=3, stream=True)
    assert [one.choices[0].finish_reason for one in pieces][-1] in ("length", "stop")
    vectors = client.embeddings.create(model="tiny", input=["one", "two"])  # the client asks for base64
    plain = client.embeddings.create(model="tiny", input="one", encoding_format="float")
    assert np.linalg.norm(vectors.data[0].embedding) == pytest.approx(1, abs=1e-5)
    assert vectors.data[0].embedding == pytest.approx(plain.data[0].embedding, abs=1e-5)
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_openai_raises_its_own_errors(calling: HttpServer, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'"):
        client.chat.completions.create(model="gpt", messages=TALK)
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="tiny", messages=TALK, reasoning_effort="low")
    assert (refused.value.param, refused.value.code) == ("reasoning_effort", "unsupported_parameter")
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="tiny", prompt=[1] * 600)
    assert long.value.code == "context_length_exceeded"


def test_openai_responses_whole_and_as_a_stream(client: openai.OpenAI) -> None:
    given: Any = {"model": "tiny", "input": "import os", "temperature": 0, "max_output_tokens": 12}
    whole = client.responses.create(**given, instructions="Write Python.")
    assert whole.output_text
    assert whole.status == "incomplete"
    assert whole.incomplete_details is not None
    assert whole.incomplete_details.reason == "max_output_tokens"
    assert whole.usage is not None
    assert whole.usage.output_tokens == 12
    text, kinds = "", []
    for event in client.responses.create(**given, instructions="Write Python.", stream=True):
        assert event.sequence_number == len(kinds)
        kinds.append(event.type)
        if event.type == "response.output_text.delta":
            text += event.delta
        if event.type == "response.incomplete":
            assert event.response.output_text == text
    assert text == whole.output_text
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.incomplete",
    ]  # fmt: skip
    talk: Any = [{"role": "user", "content": "import os"}, *whole.output, {"role": "user", "content": "more"}]
    assert client.responses.create(**{**given, "input": talk}).output_text
    logged = client.responses.create(**given, include=["message.output_text.logprobs"], top_logprobs=2)
    part: Any = logged.output[0]
    assert len(part.content[0].logprobs) == 12
    assert len(part.content[0].logprobs[0].top_logprobs) == 2


def test_openai_responses_call_tools_and_follow_a_schema(client: openai.OpenAI) -> None:
    tools: Any = [{"type": "function", "strict": True, **TOOLS[0]["function"]}]
    given: Any = {"model": "tiny", "tools": tools, "tool_choice": "required", "parallel_tool_calls": False}
    first = client.responses.create(**given, input="1 + 3?", max_output_tokens=400)
    (call,) = first.output
    assert call.type == "function_call"
    assert set(json.loads(call.arguments)) == {"a", "b"}
    talk: Any = [
        {"role": "user", "content": "1 + 3?"}, call,
        {"type": "function_call_output", "call_id": call.call_id, "output": "4"},
    ]  # fmt: skip
    assert client.responses.create(model="tiny", tools=tools, input=talk, max_output_tokens=30).output
    with client.responses.stream(**given, input="1 + 3?") as stream:
        events = [event.type for event in stream]
        final = stream.get_final_response()
    assert "response.function_call_arguments.done" in events
    assert json.loads(final.output[0].arguments)  # type: ignore[union-attr]  # a call
    parsed = client.responses.parse(model="tiny", input="?", text_format=Digits, max_output_tokens=400)
    assert isinstance(parsed.output_parsed, Digits)
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="tiny", input="?", previous_response_id="resp_1")
    assert refused.value.param == "previous_response_id"
    with pytest.raises(openai.BadRequestError) as long:
        client.responses.create(model="tiny", input="a b " * 600)
    assert long.value.param == "input"


def test_langchain_chats_streams_calls_tools_and_embeds(calling: HttpServer) -> None:
    from langchain_openai import ChatOpenAI, OpenAIEmbeddings

    given: Any = {"base_url": f"{calling.url}/v1", "api_key": "none", "model": "tiny", "max_retries": 0}
    chat = ChatOpenAI(**given, temperature=0, max_completion_tokens=12)
    whole = chat.invoke("import os")
    assert whole.content
    assert whole.usage_metadata is not None
    assert "".join(str(piece.content) for piece in chat.stream("import os")) == whole.content
    many = ChatOpenAI(**given, temperature=1, max_completion_tokens=400, seed=5)
    tools = [tool["function"] for tool in TOOLS[:1]]
    called: Any = many.bind_tools(tools, tool_choice="any", parallel_tool_calls=False).invoke("1 + 3?")
    assert called.tool_calls[0]["name"] == "add"
    assert set(called.tool_calls[0]["args"]) == {"a", "b"}
    for method in ("json_schema", "function_calling"):
        assert isinstance(many.with_structured_output(Digits, method=method).invoke("?"), Digits)
    embeddings = OpenAIEmbeddings(**given, check_embedding_ctx_length=False)
    assert len(embeddings.embed_query("one")) == 128


def test_llm_chats(calling: HttpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    settings = f"- model_id: tiny\n  model_name: tiny\n  api_base: {calling.url}/v1\n"
    (tmp_path / "extra-openai-models.yaml").write_text(settings)
    import llm
    from click.testing import CliRunner
    from llm.cli import cli

    model = llm.get_model("tiny")
    model.key = "none"
    answer = model.prompt("import os", temperature=0, max_tokens=12)
    whole = model.prompt("import os", temperature=0, max_tokens=12, stream=False)
    assert answer.text() == whole.text() != ""
    options = ["-o", "temperature", "0", "-o", "max_tokens", "12", "--key", "none", "--no-log"]
    ran = CliRunner().invoke(cli, ["prompt", "-m", "tiny", "import os", *options])
    assert ran.exit_code == 0, ran.output
    assert ran.output.strip() == answer.text().strip()
