"""Is a request read as it is documented, and is every wrong or unknown field refused by name?"""

import json
from dataclasses import fields

import pytest

from edgelm.serving.api import answers, requests
from edgelm.serving.api.errors import ApiError
from edgelm.serving.api.openapi import described, schema_of
from edgelm.serving.api.reading import read_body, read_data

HELLO = {"messages": [{"role": "user", "content": "Hello"}]}
BODIES = [value for value in vars(requests).values() if isinstance(value, type) and value.__name__.endswith("Request")]


def refused(cls: type, data: object) -> ApiError:
    with pytest.raises(ApiError) as raised:
        read_data(cls, data)
    return raised.value


def test_a_request_of_the_openai_client_is_read():
    data = {
        **HELLO,
        "model": "olmoe",
        "max_completion_tokens": 5,
        "temperature": 0,
        "stop": ["a", "b"],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}, "strict": True}}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "integer"}}},
        "stream": True,
        "stream_options": {"include_usage": True},
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
    }
    found = read_body(requests.ChatRequest, json.dumps(data).encode())
    assert found.messages == [requests.Message("user", "Hello")]
    assert found.temperature == 0.0
    assert found.tool_choice == requests.ToolChoice("function", requests.FunctionName("f"))
    assert found.response_format is not None
    assert found.response_format.json_schema == requests.JsonSchema("a", {"type": "integer"})


def test_an_answer_can_be_sent_back_as_a_message():
    message = {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    }
    found = read_data(requests.ChatRequest, {"messages": [message]})
    assert found.messages[0].tool_calls == [requests.ToolCall("call_1", requests.FunctionCall("f", "{}"))]


def test_null_is_as_good_as_absent():
    optional = {item.name: None for item in fields(requests.ChatRequest) if item.name != "messages"}
    assert read_data(requests.ChatRequest, {**HELLO, **optional}) == read_data(requests.ChatRequest, HELLO)


@pytest.mark.parametrize("field", ["suffix", "audio", "functions", "prediction", "reasoning_effort", "top_a", ""])
def test_an_unknown_field_is_refused_by_name(field):
    error = refused(requests.ChatRequest, {**HELLO, field: 1})
    assert (error.status, error.code) == (400, "unsupported_parameter")
    assert error.param == (field or '""')
    assert error.message == f"{error.param} is not supported by this server"


@pytest.mark.parametrize(
    ("change", "param", "said"),
    [
        ({"messages": []}, "messages", "has 0 entries"),
        ({"messages": [{"role": "owner", "content": "a"}]}, "messages[0].role", '"owner"'),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "expected a text or a list or null"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
            'is "image_url" (a string), expected "text"',
        ),
        ({"temperature": 2.5}, "temperature", "is 2.5, expected a number from 0 to 2"),
        ({"temperature": "1"}, "temperature", 'is "1" (a string)'),
        ({"n": True}, "n", "is true, expected a whole number from 1 to 16"),
        ({"n": 17}, "n", "is 17"),
        ({"max_tokens": 0}, "max_tokens", "is 0"),
        ({"stop": [""]}, "stop[0]", "has 0 characters"),
        ({"stop": ["a"] * 17}, "stop", "has 17 entries"),
        ({"top_logprobs": 21}, "top_logprobs", "is 21"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "is 101"),
        ({"store": True}, "store", "is true, expected false"),
        ({"tool_choice": "always"}, "tool_choice", '"none" or "auto" or "required" or an object'),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "is missing"),
        ({"response_format": {"type": "xml"}}, "response_format.type", '"xml"'),
        ({"modalities": ["text", "audio"]}, "modalities[1]", '"audio"'),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation", "is true"),
    ],
)
def test_a_wrong_field_is_named(change, param, said):
    error = refused(requests.ChatRequest, {**HELLO, **change})
    assert (error.status, error.param) == (400, param)
    assert error.message.startswith(f"{param} ")
    assert said in error.message
    assert "\n" not in error.message


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[]", b'{"messages": NaN}', b'{"model": "a", "model": "b"}'])
def test_what_is_no_json_object_is_refused(body):
    with pytest.raises(ApiError) as raised:
        read_body(requests.ChatRequest, body)
    assert raised.value.status == 400


@pytest.mark.parametrize("prompt", ["a", ["a", "b"], [1, 2], [[1], [2, 3]]])
def test_prompts_have_the_four_forms(prompt):
    assert read_data(requests.CompletionRequest, {"prompt": prompt}).prompt == prompt


def test_an_error_has_the_form_of_openai():
    error = refused(requests.ChatRequest, {**HELLO, "audio": {}})
    assert error.body == {
        "error": {
            "message": "audio is not supported by this server",
            "type": "invalid_request_error",
            "param": "audio",
            "code": "unsupported_parameter",
        }
    }


@pytest.mark.parametrize("cls", [*BODIES, answers.ChatAnswer, answers.CompletionAnswer, answers.ModelList])
def test_every_field_of_the_schemas_is_described(cls):
    schemas: dict[str, dict] = {}
    assert schema_of(cls, schemas) == {"$ref": f"#/components/schemas/{cls.__name__}"}
    for name, schema in schemas.items():
        assert schema["properties"], name
        for field, of_field in schema["properties"].items():
            assert of_field["description"].endswith("."), (name, field)


def test_the_schema_says_what_the_reader_checks():
    schemas: dict[str, dict] = {}
    schema_of(requests.ChatRequest, schemas)
    chat = schemas["ChatRequest"]
    assert chat["required"] == ["messages"]
    assert chat["additionalProperties"] is False
    temperature = chat["properties"]["temperature"]
    assert temperature["anyOf"] == [{"type": "number", "minimum": 0, "maximum": 2}, {"type": "null"}]
    assert chat["properties"]["messages"]["maxItems"] == 10_000
    assert chat["properties"]["store"]["anyOf"][0] == {"type": "boolean", "enum": [False]}
    assert schemas["Message"]["properties"]["role"]["enum"] == ["system", "developer", "user", "assistant", "tool"]
    assert described(requests.ChatRequest)["n"] == "number of answers."
    assert described(requests.ChatRequest)["temperature"].startswith("0 always takes")
