"""Do chat templates render as in transformers, and is a hostile one harmless?"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from published_templates import FILTERS, GLOBALS, PUBLISHED, TESTS
from tokenizer_folders import gemma, olmoe, put

from edgelm.errors import GenerationError, TokenizerError
from edgelm.synth.tokenizer import GEMMA_CHAT_TEMPLATE, OLMOE_CHAT_TEMPLATE
from edgelm.tokenization.chat_template import ChatTemplate, template_notes
from edgelm.tokenization.tokenizer import Tokenizer

TALK = [
    {"role": "user", "content": 'Hi <&> "é" '},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "x"},
]
SPECIAL = {"bos_token": "<bos>", "eos_token": "<eos>"}

# Features used by templates of published models: macros, namespaces, loop controls, filters, tests, whitespace control.
HARD_TEMPLATE = """
{%- macro part(m, last=false) -%}
    {%- if m.content is string -%}{{ m.content | trim | replace('x', 'y') }}{%- endif -%}{{ '' if last else '|' }}
{%- endmacro -%}
{%- set ns = namespace(seen=0, names=[]) -%}
{% for message in messages %}
  {% if message.role not in ['user', 'assistant'] %}
    {% continue %}
  {% endif %}
  {% set ns.seen = ns.seen + 1 %}
  {{ loop.index0 ~ ':' ~ message['role'].upper()[:4] }} {{ part(message, last=loop.last) }}
  {% generation %}{{ message | tojson }}{% endgeneration %}
{% endfor %}
{{- (messages | map(attribute='role') | join(',')) + ' ' + messages | selectattr('role', 'equalto', 'user') | list | length | string }}
{{ tools | default([], true) | tojson(indent=2) }} {{ [3, 1] | sort }} {{ 'a,b'.split(',') | reverse | list }} {{ 7 % 4 }} {{ 2 ** 5 }}
{{ 'n %d of %s' % (ns.seen, 'all') }} {{ 'f {}'.format(3) }} {{ 'ab' * 3 }} {{ "{'k': 'v'}" }} {{ {'k': [1, none]} | tojson }}
{% for letter in 'abc' %}{{ letter }}{{ loop.last }}{{ loop.length }}{{ loop.previtem is defined }}{% if letter == 'b' %}{% break %}{% endif %}{% endfor %}
{% for m in messages if m.role == 'user' %}{{ loop.revindex }}{{ m.content }}{% endfor %}
{% for i in range(2) recursive %}{{ i }}{% else %}none{% endfor %}{{ bos_token }}{% if add_generation_prompt %}<go>{% endif %}
"""  # noqa: E501


def rendered(source: str, messages: list[dict[str, Any]] | None = None, **options: Any) -> str:
    return ChatTemplate(source, SPECIAL).render(TALK if messages is None else messages, **options)


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Größe <b>'s & more",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
CALL = {"id": "abcdef123", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln", "n": 1.5}}}
ASKED = {"role": "user", "content": "  Weather? "}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": TALK[:1],
    "answered": TALK[:2],
    "longer": TALK,
    "system": [{"role": "system", "content": " Be brief.\n"}, *TALK],
    "empty": [
        {"role": "user", "content": ""},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "\ud800"},
    ],
    "call": [ASKED, {"role": "assistant", "content": None, "tool_calls": [CALL]}],
    "calls": [ASKED, {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL, CALL], "name": None}],
    "result": [
        ASKED,
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "abcdef123", "name": "weather", "content": "12 °C"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nTwelve."},
    ],
    "result that is no text": [
        ASKED,
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "abcdef123", "content": {"degrees": 12, "content": [1, None]}},
    ],
    "reasoning": [*TALK[:1], {"role": "assistant", "content": "Yes.", "reasoning": "Because."}],
    "thinking": [*TALK[:1], {"role": "assistant", "content": "Yes.", "thinking": "Because.", "weight": 1}],
    "unknown role": [{"role": "critic", "content": "No."}],
    "many": [TALK[i % 2] for i in range(1001)],
}
TEMPLATES = {**PUBLISHED, "olmoe-tiny": OLMOE_CHAT_TEMPLATE, "gemma-tiny": GEMMA_CHAT_TEMPLATE, "hard": HARD_TEMPLATE}


@pytest.fixture(scope="module")
def oracle() -> Callable[..., str]:
    """Function that renders with transformers, and returns the text or the kind of error."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Fast(models.WordLevel({"x": 0}, "x")), **SPECIAL)
    return partial(tokenizer.apply_chat_template, tokenize=False)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
def test_rendering_equals_transformers(name: str, tools: Any, oracle: Callable[..., str]) -> None:
    template = ChatTemplate(TEMPLATES[name], SPECIAL)
    equal = 0
    for what, talk in CONVERSATIONS.items():
        for prompt in (True, False):
            more = {"tools": tools, **({"enable_thinking": False} if prompt and tools else {})}
            try:
                expected = oracle(talk, chat_template=TEMPLATES[name], add_generation_prompt=prompt, **more)
            except Exception:  # transformers may raise anything
                with pytest.raises(GenerationError):
                    template.render(talk, prompt, more)
                continue
            assert template.render(talk, prompt, more) == expected, what
            equal += 1
    assert equal >= 6  # no template refuses everything


def parted(talk: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the conversation with every content split into two parts."""
    return [
        m | {"content": [{"type": "text", "text": m["content"][:1]}, {"type": "text", "text": m["content"][1:]}]}
        for m in talk
    ]


@pytest.mark.parametrize("name", PUBLISHED)
def test_parts_are_passed_to_templates_that_read_them_and_joined_for_others(
    name: str, oracle: Callable[..., str]
) -> None:
    reads_parts = name in ("gemma-3", "vision")
    talk = parted(TALK)
    given = talk if reads_parts else [
        m | {"content": "\n".join(part["text"] for part in m["content"])} for m in talk
    ]  # fmt: skip
    expected = oracle(given, chat_template=PUBLISHED[name], add_generation_prompt=True)
    assert ChatTemplate(PUBLISHED[name], SPECIAL).render(talk) == expected
    assert "type" not in expected


@pytest.mark.parametrize(
    ("source", "reads"),
    [
        ("{% for p in messages[0].content %}{{ p.text }}{% endfor %}", True),
        ("{% for p in messages[0]['content'] if p.type == 'text' %}{{ p.text }}{% endfor %}", True),
        ("{% for p in messages[0].content | selectattr('type', 'equalto', 'text') %}{{ p.text }}{% endfor %}", True),
        ("{% set c = messages[0].content %}{% set d = c %}{% for p in d[0:] %}{{ p.text }}{% endfor %}", True),
        ("{% macro f(x) %}{% for p in x %}{{ p.text }}{% endfor %}{% endmacro %}{{ f(messages[0].content) }}", True),
        ("{% macro f(x) %}{% for p in x %}{{ p.text }}{% endfor %}{% endmacro %}{{ f(x=messages[0].content) }}", True),
        ("{{ messages[0].content }}", False),
        ("{% for m in messages %}{% for t in tools or [] %}{{ t }}{% endfor %}{{ m.content }}{% endfor %}", False),
        ("{% set c = messages[0].content %}{% for m in messages %}{{ c }}{% endfor %}", False),
    ],
)
def test_templates_that_read_parts_are_detected(source: str, reads: bool) -> None:
    assert rendered(source, parted([{"role": "user", "content": "ab"}])) == ("ab" if reads else "a\nb")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"type": "image_url", "image_url": {"url": "x"}}], "message 1: part 0 .* of type 'image_url': .* text only"),
        ([{"type": "text", "text": "a"}, {"type": "audio"}], "message 1: part 1 of its content is of type 'audio'"),
        ([{"type": "text"}], 'message 1: part 0 of its content must be like {"type": "text"'),
        ([{"text": "a"}], "message 1: part 0"),
        (["a"], "message 1: part 0"),
        ([{"type": "text", "text": 3}], "message 1: part 0"),
        (3, "message 1 must be like"),
        ({"type": "text", "text": "a"}, "message 1 must be like"),
        (None, "message 1 must be like"),
    ],
)
def test_content_that_is_not_text_is_refused(content: Any, message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        rendered("x", [TALK[0], {"role": "user", "content": content}])


def test_variables_that_are_not_json_are_refused() -> None:
    for value in (object(), {1, 2}, b"x"):
        with pytest.raises(GenerationError, match="must be JSON"):
            rendered("x", variables={"tools": value})
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(GenerationError, match="must be JSON"):
        rendered("x", variables={"tools": loop})


def test_every_filter_test_and_global_is_available(oracle: Callable[..., str]) -> None:
    from jinja2.defaults import DEFAULT_FILTERS, DEFAULT_NAMESPACE, DEFAULT_TESTS

    for name in DEFAULT_FILTERS:
        assert re.search(rf"\| {name}\b", FILTERS), name
    for name in DEFAULT_TESTS:
        assert f" is {name}" in TESTS or f"select('{name}'" in TESTS, name
    for name in DEFAULT_NAMESPACE:
        assert re.search(rf"\b{name}\b", GLOBALS), name
    for source in (FILTERS, TESTS, GLOBALS):
        assert rendered(source, TALK, add_generation_prompt=False) == oracle(TALK, chat_template=source)


def test_the_template_of_olmoe_encodes_to_the_right_ids(tmp_path: Path) -> None:
    folder = olmoe(tmp_path / "o")
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}, TALK[2]]
    tokenizer = Tokenizer.from_folder(folder)
    text = ChatTemplate.from_folder(folder, tokenizer).render(talk)
    end = "|||IP_ADDRESS|||"
    assert text == f"{end}<|user|>\nHi\n<|assistant|>\nHello!{end}\n<|user|>\nx\n<|assistant|>\n"
    ids = tokenizer.encode(text, add_bos=False)
    assert ids[0] == tokenizer.bos_id == 2999
    assert ids.count(2999) == 2
    assert 0 not in ids


def test_the_template_of_gemma_encodes_to_the_right_ids(tmp_path: Path) -> None:
    folder = gemma(tmp_path / "g")
    tokenizer = Tokenizer.from_folder(folder)
    text = ChatTemplate.from_folder(folder).render(TALK[:1])
    assert text == '<bos><start_of_turn>user\nHi <&> "é"<end_of_turn>\n<start_of_turn>model\n'
    ids = tokenizer.encode(text, add_bos=False)
    assert [i for i in ids if i in (1, 2, 106, 107)] == [2, 106, 107, 106]


def test_a_template_file_overrides_the_config_and_names_select(tmp_path: Path) -> None:
    folder = gemma(tmp_path / "g")
    named = [{"name": "default", "template": "D"}, {"name": "rag", "template": "R"}]
    put(folder, "tokenizer_config.json", {"chat_template": named})
    assert ChatTemplate.from_folder(folder).render(TALK) == "D"
    assert ChatTemplate.from_folder(folder, name="rag").render(TALK) == "R"
    with pytest.raises(TokenizerError, match="no chat template 'x'; there are default, rag"):
        ChatTemplate.from_folder(folder, name="x")
    (folder / "chat_template.jinja").write_text("F{{ eos_token }}")
    assert ChatTemplate.from_folder(folder).render(TALK) == "F<eos>"
    assert ChatTemplate.from_folder(folder, name="rag").render(TALK) == "R"
    (folder / "chat_template.jinja").unlink()
    put(folder, "tokenizer_config.json", {"chat_template": named[1:]})
    assert ChatTemplate.from_folder(folder).render(TALK) == "R"


def test_a_missing_template_says_what_to_do(tmp_path: Path) -> None:
    folder = gemma(tmp_path / "g")
    put(folder, "tokenizer_config.json", {"chat_template": None})
    with pytest.raises(TokenizerError, match=r"no chat template: .* as chat_template.jinja"):
        ChatTemplate.from_folder(folder)


def test_a_template_that_is_no_text_or_too_long_is_refused(tmp_path: Path) -> None:
    folder = gemma(tmp_path / "g")
    (folder / "chat_template.jinja").write_bytes(b"caf\xe9")
    with pytest.raises(TokenizerError, match=r"chat_template.jinja: cannot be read .*utf-8"):
        ChatTemplate.from_folder(folder)
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "default", "template": "D"}, {"name": "rag", "template": "x" * ((1 << 20) + 1)}]
    put(folder, "tokenizer_config.json", {"chat_template": named})
    with pytest.raises(TokenizerError, match="chat template 'rag' has 1048577 characters"):
        ChatTemplate.from_folder(folder)


@pytest.mark.parametrize("value", [3, ["x"], [{"name": "a"}], {"default": "x"}])
def test_a_template_of_another_kind_is_refused(tmp_path: Path, value: object) -> None:
    folder = gemma(tmp_path / "g")
    put(folder, "tokenizer_config.json", {"chat_template": value})
    with pytest.raises(TokenizerError, match="chat_template is neither"):
        ChatTemplate.from_folder(folder)


@pytest.mark.parametrize(
    "source", ["{% for %}", "{{ x", "{% unknown %}", "{{ 1 | nosuchfilter }}", "{% if a %}", "{{ a b }}"]
)
def test_a_template_that_does_not_parse_is_refused(source: str) -> None:
    with pytest.raises(TokenizerError, match="chat template is not valid"):
        ChatTemplate(source, SPECIAL)


def test_an_export_notes_a_template_that_does_not_parse(tmp_path: Path) -> None:
    folder = gemma(tmp_path / "g")
    assert template_notes(folder) == []
    named = [{"name": "default", "template": "{{ x }}"}, {"name": "rag", "template": "{% for %}"}]
    put(folder, "tokenizer_config.json", {"chat_template": named})
    (note,) = template_notes(folder)
    assert re.fullmatch(r".*/g: chat template 'rag' is not valid: .*; conversations will not work with it, .*", note)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "Hi",
        {"role": "user", "content": "x"},
        ["Hi"],
        [{"role": "user"}],
        [{"role": 1, "content": "x"}],
        [{"content": "x"}],
    ],
)
def test_malformed_messages_are_refused(messages: Any) -> None:
    with pytest.raises(GenerationError, match=r'"role": "user", "content": "Hello"'):
        rendered("x", messages)


def test_the_refusal_of_a_template_gives_its_reason() -> None:
    with pytest.raises(GenerationError, match="refuses these messages: System role not supported"):
        rendered(GEMMA_CHAT_TEMPLATE, [{"role": "system", "content": "Be nice."}])


@pytest.mark.parametrize(
    "source",
    ["{{ 'a' + 1 }}", "{{ messages[7].content.x }}", "{{ 1 // 0 }}", "{{ nothing() }}", "{{ 'é'.encode('ascii') }}"],
)
def test_a_failing_template_raises_an_edgelm_error(source: str) -> None:
    with pytest.raises(GenerationError, match="chat template"):
        rendered(source)


def test_messages_are_not_changed_by_a_template() -> None:
    talk = [dict(message) for message in TALK]
    with pytest.raises(GenerationError, match="tries what a template may not"):
        rendered("{{ messages.append(1) }}", talk)
    with pytest.raises(GenerationError, match="tries what a template may not"):
        rendered("{{ messages[0].update(content='changed') }}", talk)
    assert talk == TALK


def test_the_date_is_todays() -> None:
    assert rendered("{{ strftime_now('%Y') }}") in {str(datetime.datetime.now().year + i) for i in (0, -1)}


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}{{ ''.__class__.__mro__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__['datetime'].sys.modules }}",
        "{{ strftime_now.__globals__ }}{{ strftime_now.__globals__.x }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ self.__init__.__globals__ }}{{ self._TemplateReference__context.x }}",
        "{{ ''|attr('__class__')|attr('__mro__') }}",
        "{{ messages | map(attribute='__class__') | map(attribute='__mro__') | list | tojson }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{{ '{x.__globals__}'.format_map({'x': raise_exception}) }}",
        "{{ lipsum.__globals__.os }}",
        "{{ namespace.__init__.__globals__.x }}",
        "{% set f = ''.__getattribute__ %}{{ f('x') }}",
        "{{ (messages | groupby('role')).__class__.__base__.__subclasses__() }}",
        "{{ _count.__self__ }}{{ _count.__self__.x }}{{ _count.x.y }}",
    ],
)
def test_python_internals_cannot_be_reached(source: str) -> None:
    try:
        text = rendered(source)
    except (GenerationError, TokenizerError):
        return
    assert "class" not in text
    assert "module" not in text
    assert "0x" not in text


@pytest.mark.parametrize("set_it", ["{% set n = namespace(NAME=1) %}", "{% set n = namespace() %}{% set n.NAME = 1 %}"])
@pytest.mark.parametrize("name", ["__class__", "_Namespace__attrs", "_x"])
def test_a_namespace_refuses_names_of_python_internals(set_it: str, name: str) -> None:
    assert rendered(set_it.replace("NAME", "x") + "{{ n.x }}") == "1"
    with pytest.raises(GenerationError, match="a namespace cannot have the attribute"):
        rendered(set_it.replace("NAME", name))
