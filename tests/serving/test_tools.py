"""Are calls of tools found in every answer, however it is cut, in the format of every kind of chat template?"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from marked_folders import ROWS, marked
from serving_client import Asked
from tool_templates import PYTHON_CALLS, WITH_TOOLS

from edgelm.errors import EdgeLMError, GenerationTypeError, GenerationValueError
from edgelm.serving.constraints import (
    CallDelta,
    ContentDelta,
    GrammarTokenizer,
    ToolFormat,
    ToolOptions,
    collect,
    require_tool_format,
    tool_format,
)  # fmt: skip
from edgelm.serving.constraints.call_syntax import CallSyntax, JsonCalls, NamedCalls
from edgelm.serving.constraints.call_xml import XmlCalls
from edgelm.serving.constraints.history import History
from edgelm.serving.engine import Engine
from edgelm.tokenization.chat_template import ChatTemplate
from edgelm.tokenization.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from published_templates import PUBLISHED

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Return the weather.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 6},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
                "unit": {"$ref": "#/$defs/unit"},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
            "$defs": {"unit": {"enum": ["C", "F"]}},
        },
    },
}
NOW = {"type": "function", "function": {"name": "now", "parameters": {"additionalProperties": False}}}
TOOLS = [WEATHER, NOW]
USER = {"role": "user", "content": "What is the weather in Paris?"}
HEAD = '{"name": "\0", "parameters": '
HERMES = JsonCalls("<tool_call>", open="\n", close="\n", end="</tool_call>", separator="", between="\n")
LLAMA = JsonCalls("<|python_tag|>", head=HEAD, separator="; ", bare=True)
MISTRAL = JsonCalls("[TOOL_CALLS]", open=" [", close="]", own_id=True, short_ids=True)
PHI = JsonCalls("<|tool_call|>", end="<|/tool_call|>", separator="", between="")
FORMATS: dict[str, ToolFormat | None] = {
    "qwen-2.5": ToolFormat(HERMES, History()),
    "qwen-3": ToolFormat(HERMES, History(empty_content=True)),
    "qwen-3-coder": ToolFormat(XmlCalls(), History()),
    "llama-3.1": ToolFormat(LLAMA, History(), several=False),
    "mistral": ToolFormat(MISTRAL, History(short_ids=True)),
    "mistral-3": ToolFormat(NamedCalls(), History(short_ids=True)),
    "granite-3": ToolFormat(JsonCalls("<|tool_call|>", open="[", close="]"), History()),
    "phi-4-mini": ToolFormat(PHI, History()),
    "listed": ToolFormat(JsonCalls("<TOOLCALL>", open="[", close="]", end="</TOOLCALL>"), History()),
    "text": ToolFormat(
        JsonCalls("<tool_call>", end="</tool_call>", separator="", between=""), History(text=True, empty_content=True)
    ),
}
Pair = tuple[str, str]


def template(name: str) -> ChatTemplate:
    return ChatTemplate(
        {**PUBLISHED, **WITH_TOOLS, "python": PYTHON_CALLS}[name], {"bos_token": "<s>", "eos_token": "</s>"}
    )


def options(choice: object = None, parallel: bool | None = None, tools: Sequence[object] = TOOLS) -> ToolOptions:
    found = ToolOptions.of(tools, choice, parallel)
    assert found is not None
    return found


@pytest.mark.parametrize("name", [*PUBLISHED, *[name for name in WITH_TOOLS if name not in PUBLISHED]])
def test_is_the_format_of_a_template_found(name: str) -> None:
    # The short Qwen 3 of the unit tests has no tools; the one here replaces it.
    assert tool_format(template(name)) == FORMATS.get(name)


def test_are_templates_without_tools_refused_by_name() -> None:
    with pytest.raises(GenerationValueError, match="tools cannot be used with tiny: its chat template does not show"):
        require_tool_format(template("olmoe-instruct"), "tiny")
    with pytest.raises(GenerationValueError, match="template shows tools, but calls that are not JSON are known only"):
        require_tool_format(template("python"), "tiny")
    found = require_tool_format(template("qwen-3"), "tiny")
    assert found.syntax == HERMES


def conversation(calls: Sequence[Pair], content: str | None = None) -> list[dict[str, Any]]:
    made = [
        {"id": f"call{i:05}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for i, (name, arguments) in enumerate(calls)
    ]
    return [USER, {"role": "assistant", "content": content, "tool_calls": made}]


def parsed(found: ToolFormat, pieces: Sequence[str], chosen: ToolOptions) -> tuple[str, list[Pair]]:
    parser = found.parser(chosen)
    deltas = [delta for piece in pieces for delta in parser.feed(piece)] + parser.finish()
    _, content, calls = collect(deltas)
    assert parser.calls >= len(calls)
    for index in range(len(calls)):
        own = [delta for delta in deltas if isinstance(delta, CallDelta) and delta.index == index]
        assert [(delta.id is not None, delta.name is not None) for delta in own[:1]] == [(True, True)]
        assert all(delta.id is None and delta.name is None for delta in own[1:])
    assert len({call.id for call in calls}) == len(calls)
    return content, [(call.name, call.arguments) for call in calls]


def every_cut(found: ToolFormat, text: str, chosen: ToolOptions) -> tuple[str, list[Pair]]:
    """Return what is parsed from a text; check that it is the same for every cut in two, and for single characters."""
    whole = parsed(found, [text], chosen)
    assert parsed(found, list(text), chosen) == whole
    for cut in range(len(text) + 1):
        assert parsed(found, [text[:cut], text[cut:]], chosen) == whole, (text[:cut], text[cut:])
    return whole


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "granite-3"])
def test_is_what_a_template_writes_parsed_back(name: str) -> None:
    found, rendered = FORMATS[name], template(name)
    assert found is not None
    wanted = [
        ("get_weather", '{"city": "P\\"}]</tool_calls> é漢\\n", "days": 3, "unit": "C"}'),
        ("now", "{}"),
        ("now", '{"a": {"b": [1, {"c": null}]}}'),
    ]
    variables = found.variables(options())
    for count in (1, 2, 3) if found.several else (1,):
        messages = found.messages(conversation(wanted[:count]))
        prompt = rendered.render([USER], variables=variables)
        text = rendered.render(messages, variables=variables, add_generation_prompt=False)
        answer = text[len(prompt.removesuffix("\n")) :] if text.startswith(prompt.removesuffix("\n")) else ""
        assert answer, (prompt, text)
        for end in ("</s>", "<|im_end|>\n", "<|eot_id|>", "<|end|>", "</assistant>"):
            answer = answer.removesuffix(end)
        content, calls = every_cut(found, answer.strip(), options())
        assert not content
        assert [(call, json.loads(arguments)) for call, arguments in calls] == [
            (call, json.loads(arguments)) for call, arguments in wanted[:count]
        ]


ONE = '{"name": "get_weather", "arguments": {"city": "P\\"}\\\\", "n": [1, {"a": "]"}]}}'
ARGUMENTS = '{"city": "P\\"}\\\\", "n": [1, {"a": "]"}]}'
LLAMA_ONE = ONE.replace('"arguments"', '"parameters"')
CALL = ("get_weather", ARGUMENTS)
EMPTY = ("now", "{}")
ANSWERS: list[tuple[CallSyntax, str, str, list[Pair]]] = [
    (HERMES, "", "", []),
    (HERMES, "  hello \n", "  hello \n", []),
    (HERMES, f"<tool_call>\n{ONE}\n</tool_call>", "", [CALL]),
    (HERMES, f"<tool_call>{ONE}</tool_call>\n", "", [CALL]),
    (HERMES, f"I look.\n\n<tool_call>\n{ONE}\n</tool_call> \n", "I look.", [CALL]),
    (HERMES, f"<tool_call>\n{ONE}\n</tool_call>\n<tool_call>\n{ONE}\n</tool_call>", "", [CALL, CALL]),
    (HERMES, f"<tool_call>\n{ONE}\n{ONE}\n</tool_call>", "", [CALL, CALL]),
    (HERMES, f'<tool_call>\n[{ONE}, {{"name": "now"}}]\n</tool_call> so', "so", [CALL, EMPTY]),
    (HERMES, '<tool_call>{"arguments": {"a": 1}, "name": "now"}</tool_call>', "", [("now", '{"a": 1}')]),
    (HERMES, '<tool_call>{"name": "now", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("now", '{"a": 1}')]),
    (HERMES, '<tool_call>{"name": "now", "arguments": null, "id": 5}</tool_call>', "", [EMPTY]),
    (
        HERMES,
        '<tool_call>{"type": "function", "function": {"name": "now", "arguments": {}}}</tool_call>',
        "",
        [EMPTY],
    ),
    (HERMES, '<tool_call>\n{"name": "now", "arguments": {}}}\n</tool_call> so', "so", [EMPTY]),
    (HERMES, '<tool_call>\n{"name": "now", "arguments": {}\n</tool_call> so', "so", [EMPTY]),
    (HERMES, '<tool_call>\n{"name": "now", "arguments": {"a": 1]}\n</tool_call> so', "so", [("now", '{"a": 1')]),
    (HERMES, '<tool_call>\n{"name": "now", "arguments": {"a": "', "", [("now", '{"a": "')]),
    (HERMES, '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>', "", [("unknown", "{}")]),
    (HERMES, "<tool_call>\n", "<tool_call>\n", []),
    (HERMES, "<tool_cal", "<tool_cal", []),
    (HERMES, "a < b <tool> <<tool_call", "a < b <tool> <<tool_call", []),
    (HERMES, "Write <tool_call> first.", "Write <tool_call> first.", []),
    (HERMES, f"x <tool_call> <tool_call>{ONE}</tool_call>", "x <tool_call> ", [CALL]),
    (HERMES, '<tool_call>\n{"title": 1}\n</tool_call>', '<tool_call>\n{"title": 1}\n</tool_call>', []),
    (HERMES, '<tool_call>{"name": ""}</tool_call>', '<tool_call>{"name": ""}</tool_call>', []),
    (HERMES, '<tool_call>{"name": "now", "arguments": 5}', '<tool_call>{"name": "now", "arguments": 5}', []),
    (HERMES, '<tool_call>{"name": "\\q"}', '<tool_call>{"name": "\\q"}', []),
    (HERMES, "<tool_call>{}</tool_call>", "<tool_call>{}</tool_call>", []),
    (HERMES, "<tool_call>[]</tool_call>", "<tool_call>[]</tool_call>", []),
    (LLAMA, LLAMA_ONE, "", [CALL]),
    (LLAMA, f" \n{ONE}", "", [CALL]),
    (LLAMA, f"<|python_tag|>{LLAMA_ONE}", "", [CALL]),
    (LLAMA, f"{LLAMA_ONE}; {LLAMA_ONE}", "", [CALL, CALL]),
    (LLAMA, f"{LLAMA_ONE}\n{LLAMA_ONE} so", "so", [CALL, CALL]),
    (LLAMA, '{"name": "now", "parameters": {}} so', "so", [EMPTY]),
    (LLAMA, '{"answer": 42}', '{"answer": 42}', []),
    (LLAMA, '{"name": "Bob", "parameters": {}}', '{"name": "Bob", "parameters": {}}', []),
    (LLAMA, f"See: {LLAMA_ONE}", f"See: {LLAMA_ONE}", []),
    (LLAMA, '{"name": "now", "parameters": {"a": [12', "", [("now", '{"a": [12')]),
    (LLAMA, '{"name": "now", "parameters": {"a": 1]', "]", [("now", '{"a": 1')]),
    (LLAMA, "{}", "{}", []),
    (LLAMA, '{"name": "no', '{"name": "no', []),
    (LLAMA, '<|python_tag|>search.call(q="x")', '<|python_tag|>search.call(q="x")', []),
    (MISTRAL, f"[TOOL_CALLS] [{ONE}]", "", [CALL]),
    (MISTRAL, f'ok [TOOL_CALLS][{ONE}, {{"name": "now", "arguments": {{}}, "id": "a1b2c3d4e"}}]', "ok", [CALL, EMPTY]),
    (MISTRAL, f"[TOOL_CALLS] [{ONE}", "", [CALL]),
    (MISTRAL, f"[TOOL_CALLS] {ONE}", "", [CALL]),
    (MISTRAL, f"[TOOL_CALLS] [{ONE}]\n\n so", "so", [CALL]),
    (MISTRAL, '[TOOL_CALLS] [{"name": "now", "arguments": {"a": "b', "", [("now", '{"a": "b')]),
    (NamedCalls(), '[TOOL_CALLS]now[ARGS]{"a": "b', "", [("now", '{"a": "b')]),
    (MISTRAL, "[TOOL_CALLS] []", "[TOOL_CALLS] []", []),
    (MISTRAL, "[TOOL_CALLS", "[TOOL_CALLS", []),
    (NamedCalls(), f"[TOOL_CALLS]get_weather[ARGS]{ARGUMENTS}[TOOL_CALLS]now[ARGS]{{}}", "", [CALL, EMPTY]),
    (NamedCalls(), "ok [TOOL_CALLS]now[CALL_ID]12[ARGS] {}\nso", "ok\nso", [EMPTY]),
    (NamedCalls(), "[TOOL_CALLS]now{}", "[TOOL_CALLS]now{}", []),
    (NamedCalls(), "[TOOL_CALLS][ARGS]{}", "[TOOL_CALLS][ARGS]{}", []),
    (NamedCalls(), "[TOOL_CALLS]now[ARGS]5", "[TOOL_CALLS]now[ARGS]5", []),
    (PHI, f"<|tool_call|>{ONE}<|/tool_call|><|tool_call|>{ONE}<|/tool_call|>", "", [CALL, CALL]),
    (
        XmlCalls(),
        "I look.\n<tool_call>\n<function=get_weather>\n<parameter=city>\n5\n</parameter>\n<parameter=days>\n3\n"
        "</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
        "I look.",
        [("get_weather", '{"city": "5", "days": 3}'), EMPTY],
    ),
    (XmlCalls(), "<function=now>\n</function> so", "so", [EMPTY]),
    (XmlCalls(), "<tool_call>\n<function=now>", "", [("now", "")]),
    (XmlCalls(), "<tool_call>\nnow", "<tool_call>\nnow", []),
]


@pytest.mark.parametrize(("syntax", "text", "content", "calls"), ANSWERS)
def test_does_parsing_not_depend_on_the_cuts(syntax: CallSyntax, text: str, content: str, calls: list[Pair]) -> None:
    found = every_cut(ToolFormat(syntax, History()), text, options())
    assert found == (content, calls)


def test_are_calls_reported_as_they_come() -> None:
    parser = ToolFormat(HERMES, History()).parser(options())
    steps = [
        ("Look", [ContentDelta("Look")]),
        (" <tool_call>\n{", []),
        ('"name": "now", "arguments": ', []),
        ('{"a": ', ["now", '{"a": ']),
        ("[1, 2", [None, "[1, 2"]),
        ("]}}\n</tool_call>", [None, "]}"]),
    ]
    for piece, wanted in steps:
        deltas = parser.feed(piece)
        if wanted and not isinstance(wanted[0], ContentDelta):
            assert [item for d in deltas if isinstance(d, CallDelta) for item in (d.name, d.arguments)] == wanted
        else:
            assert deltas == wanted
    assert parser.finish() == []


@pytest.mark.parametrize(("short", "pattern"), [(False, "call_[0-9a-f]{24}"), (True, "[A-Za-z0-9]{9}")])
def test_do_ids_have_the_length_that_a_template_wants(short: bool, pattern: str) -> None:
    parser = ToolFormat(MISTRAL if short else HERMES, History()).parser(options())
    marker = parser.syntax.markers[0]
    *_, calls = collect(parser.feed(f'{marker}[{{"name": "now"}}, {{"name": "now"}}]') + parser.finish())
    assert len(calls) == 2 and all(re.fullmatch(pattern, call.id) for call in calls)


def test_is_only_the_first_call_reported_without_parallel_calls() -> None:
    text = f"<tool_call>\n{ONE}\n</tool_call>\n<tool_call>\n{ONE}\n</tool_call>"
    assert every_cut(ToolFormat(HERMES, History()), text, options(parallel=False)) == ("", [CALL])
    assert every_cut(ToolFormat(HERMES, History(), several=False), text, options()) == ("", [CALL])


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "5", "5"),
        ({"type": "string"}, " a\nb ", " a\nb "),
        ({"type": "integer"}, "5", 5),
        ({"type": "integer"}, "5.5", "5.5"),
        ({"type": "number"}, "5.5", 5.5),
        ({"type": "boolean"}, "True", True),
        ({"type": "boolean"}, "1", "1"),
        ({"type": ["string", "null"]}, "null", None),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "None", None),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "7", 7),
        ({"type": "object"}, '{"a": [1]}', {"a": [1]}),
        ({"type": "array"}, "not JSON", "not JSON"),
        ({"type": "number"}, "NaN", "NaN"),
        ({"enum": [1, 2]}, "2", 2),
        ({"const": "a"}, "a", "a"),
        ({}, "5", "5"),
        ({}, "[5]", [5]),
        ({"type": "string"}, '"quoted"', '"quoted"'),
    ],
)
def test_do_arguments_in_elements_get_their_types(schema: Any, text: str, value: Any) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": schema}}}}
    answer = f"<tool_call>\n<function=f>\n<parameter=a>\n{text}\n</parameter>\n</function>\n</tool_call>"
    content, calls = every_cut(ToolFormat(XmlCalls(), History()), answer, options(tools=[tool]))
    assert not content
    found = json.loads(calls[0][1])["a"]
    assert (found, type(found)) == (value, type(value))


def random_answer(
    found: ToolFormat, words: GrammarTokenizer, chosen: ToolOptions, response_format: object, seed: int
) -> tuple[str, list[Pair]] | None:
    """Return content and calls of random tokens under the grammar, or None if they did not end."""
    grammar = found.grammar(chosen, words, response_format)
    assert grammar is not None
    rng, rule, tokenizer = np.random.default_rng(seed), grammar.rule(), words.tokenizer
    text, parser = tokenizer.detokenizer(shown=found.shown(tokenizer)), found.parser(chosen)
    brace = tokenizer.encode("{", add_bos=False)[0]
    deltas = []
    for _ in range(300):
        logits = rng.normal(size=words.vocab_size).astype(np.float32)
        logits[sorted(words.end_ids)] += 4
        logits[[brace, *range(2024, 2031)]] += 3
        token = int(rule.apply(logits).argmax())
        rule.accept(token)
        if token in words.end_ids:
            _, content, calls = collect(deltas + parser.feed(text.flush()) + parser.finish())
            return content, [(call.name, call.arguments) for call in calls]
        deltas += parser.feed(text.push(token))
    return None


def follows_schema(name: str, arguments: str, *, text_only: bool) -> bool:
    given = json.loads(arguments)
    if name == "now":
        return given == {}
    assert name == "get_weather" and set(given) <= {"city", "days", "unit"} and {"city", "unit"} <= set(given)
    assert isinstance(given["city"], str) and (text_only or len(given["city"]) <= 6)
    return given["unit"] in ("C", "F") and given.get("days", 1) in range(1, 10)


@pytest.fixture(scope="module", params=[False, True], ids=["added", "special"])
def words(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> GrammarTokenizer:
    """A vocabulary whose markers are ordinary or special tokens."""
    folder = marked(tmp_path_factory.mktemp("marked") / "tokenizer", special=request.param)
    tokenizer = Tokenizer.from_folder(folder)
    return GrammarTokenizer(tokenizer, tokenizer.eos_ids, ROWS)


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("text", "qwen-2.5")])
def test_do_required_calls_follow_their_schemas(words: GrammarTokenizer, name: str) -> None:
    found = FORMATS[name]
    assert found is not None
    text_only = isinstance(found.syntax, XmlCalls)
    answers = [random_answer(found, words, options("required"), None, seed) for seed in range(20)]
    ended = [answer for answer in answers if answer is not None]
    assert len(ended) >= 4
    for content, calls in ended:
        assert not content and len(calls) >= 1
        assert all(follows_schema(*call, text_only=text_only) for call in calls)
    named = {"type": "function", "function": {"name": "now"}}
    for seed in range(3):
        answer = random_answer(found, words, options(named, parallel=False), None, seed)
        assert answer is not None and answer[0] == ""
        assert [(call, json.loads(arguments)) for call, arguments in answer[1]] == [("now", {})]


@pytest.mark.parametrize("name", ["qwen-3", "llama-3.1", "mistral", "mistral-3", "qwen-3-coder", "granite-3"])
def test_do_optional_calls_follow_the_schemas_of_strict_functions(words: GrammarTokenizer, name: str) -> None:
    found = FORMATS[name]
    assert found is not None
    text_only = isinstance(found.syntax, XmlCalls)
    answers = [random_answer(found, words, options("auto"), None, seed) for seed in range(30)]
    ended = [answer for answer in answers if answer is not None]
    assert ended
    assert all(follows_schema(*call, text_only=text_only) for _, calls in ended for call in calls)
    with_json = {"type": "json_schema", "json_schema": {"schema": {"type": "integer", "minimum": 10, "maximum": 99}}}
    for seed in range(20):
        answer = random_answer(found, words, options("auto"), with_json, seed)
        if answer is not None:
            content, calls = answer
            assert bool(calls) != bool(content)
            assert not content or 10 <= json.loads(content) <= 99
            assert all(follows_schema(*call, text_only=text_only) for call in calls)


def test_is_there_no_grammar_where_nothing_is_enforced(words: GrammarTokenizer) -> None:
    found = ToolFormat(HERMES, History())
    loose = options("auto", tools=[NOW])
    assert found.grammar(loose, words) is None
    assert found.grammar(options("none"), words) is None
    json_object = found.grammar(options("none"), words, {"type": "json_object"})
    assert json_object is not None and found.variables(options("none")) == {}
    with pytest.raises(GenerationValueError, match='of the type "regex" cannot be combined with tools'):
        found.grammar(loose, words, {"type": "regex", "regex": "a"})


def test_are_keywords_ignored_only_for_functions_that_are_not_strict(words: GrammarTokenizer) -> None:
    found = ToolFormat(HERMES, History())
    schema = {"properties": {"a": {"type": "array", "uniqueItems": True, "items": {"enum": [1]}}}, "required": ["a"]}

    def tool(strict: bool, parameters: object = schema) -> dict[str, Any]:
        return {"type": "function", "function": {"name": "f", "strict": strict, "parameters": parameters}}

    assert found.grammar(options("required", tools=[tool(False)]), words) is not None
    wanted = r'tools\[0\].function.parameters, at #/properties/a: the keyword "uniqueItems" cannot be enforced'
    with pytest.raises(GenerationValueError, match=wanted):
        found.grammar(options("required", tools=[tool(True)]), words)
    with pytest.raises(GenerationValueError, match=r"tools\[0\].function.parameters, at #/properties/a: invalid type"):
        found.grammar(options("required", tools=[tool(False, {"properties": {"a": {"type": "text"}}})]), words)


def test_does_a_trained_model_call_a_function(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of("olmoe", "int4", "native")
    loaded = engine.model
    words = GrammarTokenizer(loaded.tokenizer, loaded.end_ids, loaded.runtime.vocab_size)
    prompt = loaded.tokenizer.encode("Call a function:")
    for syntax in (HERMES, LLAMA, MISTRAL):
        found = ToolFormat(syntax, History())
        grammar = found.grammar(options("required", parallel=False), words)
        assert grammar is not None
        asked = [
            Asked(engine, prompt, rules=[grammar.rule()], max_tokens=200, **given)
            for given in ({}, *({"temperature": 1.4, "seed": seed} for seed in range(6)))
        ]
        for one in asked:
            engine.submit(one.job)
        results = [one.result for one in asked]
        ended = [result.text for result in results if result.stop_reason == "eos"]
        assert len(ended) >= 5
        for text in ended:
            content, [(name, arguments)] = parsed(found, [text], options())
            assert not content and follows_schema(name, arguments, text_only=False)


def test_are_markers_shown_that_are_special_tokens(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(marked(tmp_path / "tokenizer", special=True))
    found = ToolFormat(HERMES, History())
    ids = tokenizer.encode(f"<tool_call>\n{ONE}\n</tool_call><|python_tag|>", add_bos=False)
    shown = found.shown(tokenizer)
    assert shown == {tokenizer.token_id("<tool_call>"), tokenizer.token_id("</tool_call>")}
    for stream, text in (
        (tokenizer.detokenizer(), f"\n{ONE}\n"),
        (tokenizer.detokenizer(shown=shown), f"<tool_call>\n{ONE}\n</tool_call>"),
    ):
        assert "".join(map(stream.push, ids)) + stream.flush() == text
    plain = Tokenizer.from_folder(marked(tmp_path / "plain", special=False))
    assert found.shown(plain) == frozenset()


def test_do_earlier_calls_become_what_templates_want() -> None:
    messages = [*conversation([("now", '{"a": 1}')]), {"role": "tool", "tool_call_id": "call00000", "content": "12"}]
    long = json.loads(json.dumps(messages).replace("call00000", "call_0123456789abcdef"))
    (user, assistant, result) = History().messages(long)
    assert (user, result) == (long[0], long[2])
    assert assistant["tool_calls"][0]["function"]["arguments"] == {"a": 1} and assistant["content"] is None
    (_, assistant, result) = History(text=True, empty_content=True, short_ids=True).messages(long)
    assert assistant["tool_calls"][0]["function"]["arguments"] == '{"a": 1}' and assistant["content"] == ""
    assert re.fullmatch("[a-z0-9]{9}", result["tool_call_id"])
    assert result["tool_call_id"] == assistant["tool_calls"][0]["id"]
    assert History(short_ids=True).messages(messages)[2]["tool_call_id"] == "call00000"
    assert long[1]["tool_calls"][0]["function"]["arguments"] == '{"a": 1}'  # the request is as it was
    for empty in (None, "", {}):
        call = {"id": "a", "function": {"name": "now", "arguments": empty}}
        [message] = History().messages([{"role": "assistant", "tool_calls": [call]}])
        assert message["tool_calls"][0] == {
            "id": "a", "type": "function", "function": {"name": "now", "arguments": {}},
        }  # fmt: skip
    assert History().messages([{"role": "assistant", "content": "a", "tool_calls": []}]) == [
        {"role": "assistant", "content": "a"}
    ]


@pytest.mark.parametrize(
    ("message", "kind", "said"),
    [
        (5, GenerationTypeError, "messages[0] is 5: it has to be an object with a role"),
        ({"role": "assistant", "tool_calls": 5}, GenerationTypeError, "messages[0].tool_calls is 5: it has to be a"),
        ({"role": "assistant", "tool_calls": [5]}, GenerationTypeError, "messages[0].tool_calls[0] has to be like"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]},
            GenerationTypeError,
            "messages[0].tool_calls[0].function.name is None: it has to be a string",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            GenerationValueError,
            "messages[0].tool_calls[0].function.arguments is not JSON: Expecting property name",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]},
            GenerationValueError,
            "function.arguments is '[1]': it has to be a JSON object",
        ),
    ],
)
def test_are_malformed_earlier_calls_refused(message: Any, kind: type[EdgeLMError], said: str) -> None:
    with pytest.raises(kind) as caught:
        History().messages([message])
    assert said in str(caught.value)


def function(**given: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": given}]


@pytest.mark.parametrize(
    ("given", "kind", "said"),
    [
        ((5,), GenerationTypeError, "tools is 5: it has to be a list of functions"),
        (("ab",), GenerationTypeError, "tools is 'ab': it has to be a list"),
        (([5],), GenerationTypeError, "tools[0] is 5: it has to be like"),
        (([{"type": "web_search"}],), GenerationTypeError, "tools[0] is {'type': 'web_search'}: it has to be like"),
        (([{"type": "function"}],), GenerationTypeError, "tools[0].function is None: it has to be an object"),
        ((function(),), GenerationTypeError, "tools[0].function.name is None: it has to be a string"),
        ((function(name="a b"),), GenerationValueError, "tools[0].function.name is 'a b': it has to be 1 to 64"),
        ((function(name="f", strict=1),), GenerationTypeError, "tools[0].function.strict is 1: it has to be true or"),
        ((function(name="f", description=1),), GenerationTypeError, "description is 1: it has to be a string"),
        ((function(name="f", parameters=1),), GenerationTypeError, "tools[0].function.parameters is 1: it has to be"),
        (
            (function(name="f", parameters={"type": "string"}),),
            GenerationValueError,
            "tools[0].function.parameters has the type 'string': it has to be \"object\"",
        ),
        (([NOW, NOW],), GenerationValueError, "tools[1].function.name is 'now', as tools[0].function.name is"),
        (([NOW] * 129,), GenerationValueError, "tools has 129 functions, more than the limit of 128"),
        (
            ([function(name=f"f{i}", parameters={"enum": ["x" * 60_000]})[0] for i in range(5)],),
            GenerationValueError,
            "more than the limit of 262144",
        ),
        ((None, "required"), GenerationValueError, "tool_choice is 'required', but there are no tools"),
        (([], {"type": "function"}), GenerationValueError, "but there are no tools"),
        ((TOOLS, "any"), GenerationValueError, "tool_choice is 'any': it has to be"),
        ((TOOLS, 5), GenerationValueError, "tool_choice is 5: it has to be"),
        ((TOOLS, {"type": "function"}), GenerationTypeError, "tool_choice has to be like"),
        (
            (TOOLS, {"type": "function", "function": {"name": "g"}}),
            GenerationValueError,
            "tool_choice names the function 'g', which is not in tools; there are: get_weather, now",
        ),
        ((TOOLS, {"type": "allowed_tools"}), GenerationValueError, "tool_choice is {'type': 'allowed_tools'}: it has"),
        ((TOOLS, None, 1), GenerationTypeError, "parallel_tool_calls is 1: it has to be true or false"),
    ],
)
def test_are_wrong_tools_refused(given: tuple[Any, ...], kind: type[EdgeLMError], said: str) -> None:
    with pytest.raises(kind) as caught:
        ToolOptions.of(*given)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_are_tool_options_read() -> None:
    assert ToolOptions.of(None) is None and ToolOptions.of([], "none") is None
    found = options()
    assert (found.choice, found.named, found.parallel) == ("auto", False, True)
    assert [one.name for one in found.functions] == ["get_weather", "now"]
    assert [one.strict for one in found.functions] == [True, False]
    assert "strict" not in found.tools[0]["function"] and found.tools[1] == NOW
    named = options({"type": "function", "function": {"name": "now"}}, True)
    assert (named.choice, named.named, named.parallel) == ("required", True, False)
    assert [one.name for one in named.functions] == ["now"] and len(named.tools) == 2
    some = {"mode": "required", "tools": [{"type": "function", "function": {"name": "now"}}]}
    allowed = options({"type": "allowed_tools", "allowed_tools": some})
    assert (allowed.choice, allowed.named, [one.name for one in allowed.functions]) == ("required", False, ["now"])
