"""Do chat templates render as transformers renders them, and does a hostile one get nowhere?"""

from __future__ import annotations

import datetime
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizer_folders import gemma, olmoe, put

from edgelm.chat import ChatTemplate
from edgelm.errors import GenerationError, TokenizerError
from edgelm.synth_tokenizer import GEMMA_CHAT_TEMPLATE, OLMOE_CHAT_TEMPLATE
from edgelm.tokenizer import Tokenizer

TALK = [
    {"role": "user", "content": 'Hi <&> "é" '},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "x"},
]
SPECIAL = {"bos_token": "<bos>", "eos_token": "<eos>"}

# What templates of real models use: macros, namespaces, loop controls, filters, tests, whitespace control.
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


@pytest.mark.parametrize("source", [OLMOE_CHAT_TEMPLATE, GEMMA_CHAT_TEMPLATE, HARD_TEMPLATE])
@pytest.mark.parametrize("prompt", [True, False])
def test_rendering_is_transformers(source: str, prompt: bool) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    tools = [{"type": "function", "function": {"name": "f", "description": "Größe <b>", "parameters": {}}}]
    for talk in (TALK, TALK[:1], TALK[:2]):
        expected, _ = render_jinja_template(
            [talk], chat_template=source, add_generation_prompt=prompt, tools=tools, **SPECIAL
        )
        assert rendered(source, talk, add_generation_prompt=prompt, variables={"tools": tools}) == expected[0]


def test_olmoes_form_is_the_known_one_and_encodes_to_the_right_ids(tmp_path: Path) -> None:
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


def test_gemmas_form_encodes_to_the_right_ids(tmp_path: Path) -> None:
    folder = gemma(tmp_path / "g")
    tokenizer = Tokenizer.from_folder(folder)
    text = ChatTemplate.from_folder(folder).render(TALK[:1])
    assert text == '<bos><start_of_turn>user\nHi <&> "é"<end_of_turn>\n<start_of_turn>model\n'
    ids = tokenizer.encode(text, add_bos=False)
    assert [i for i in ids if i in (1, 2, 106, 107)] == [2, 106, 107, 106]


def test_a_file_wins_over_the_config_and_names_choose(tmp_path: Path) -> None:
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


def test_no_template_says_what_to_do(tmp_path: Path) -> None:
    folder = gemma(tmp_path / "g")
    put(folder, "tokenizer_config.json", {"chat_template": None})
    with pytest.raises(TokenizerError, match=r"no chat template: .* as chat_template.jinja"):
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


def test_a_template_that_refuses_says_why() -> None:
    with pytest.raises(GenerationError, match="refuses these messages: System role not supported"):
        rendered(GEMMA_CHAT_TEMPLATE, [{"role": "system", "content": "Be nice."}])


@pytest.mark.parametrize(
    "source",
    ["{{ 'a' + 1 }}", "{{ messages[7].content.x }}", "{{ 1 // 0 }}", "{{ nothing() }}", "{{ 'é'.encode('ascii') }}"],
)
def test_a_template_that_fails_is_an_error_of_ours(source: str) -> None:
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
def test_pythons_internals_are_out_of_reach(source: str) -> None:
    try:
        text = rendered(source)
    except (GenerationError, TokenizerError):
        return
    assert "class" not in text
    assert "module" not in text
    assert "0x" not in text


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in 'abc' %}x{% endfor %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for a in [[[]]] recursive %}{{ loop([[a]]) }}{% endfor %}",
        "{{ range(10 ** 9) | list }}",
        "{{ 'x' * 10 ** 9 }}",
        "{{ 10 ** 9 * 'x' }}",
        "{{ [1] * 10 ** 9 }}",
        "{{ 10 ** (10 ** 10) }}",
        "{{ 2 ** 64 ** 64 }}",
        "{% set n = namespace(x='xxxxxxxx') %}{% for i in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
        "{% set n = namespace(x='xxxxxxxx') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
        "{% set n = namespace(x=[1]) %}{% for i in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x | length }}",
        "{% set n = namespace(x=99999) %}{% for i in range(40) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}",
        "{{ 'x'.ljust(10 ** 9) }}",
        "{{ 'x'.zfill(width=10 ** 9) }}",
        "{{ '{:1000000000}'.format('x') }}",
        "{{ '{:{}}'.format('x', '1000000000') }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{% set x = 'x' * 1000000 %}{{ x.replace('x', x) }}",
        "{% set x = 'x' * 1000000 %}{{ x | replace('x', x) }}",
        "{% set x = 'x' * 1000000 %}{{ ([x] * 1000000) | join }}",
        "{% set x = 'x' * 1000000 %}{{ ([x] * 1000000) | join(attribute=none) }}",
        "{% set x = 'x' * 1000000 %}{{ x.join([x] * 1000000) }}",
        "{% set x = '\n' * 1000000 %}{{ x | indent(1000000) }}",
        "{{ messages | tojson(indent=1000000000) }}",
        "{{ ('\t' * 1000000).expandtabs(1000000) }}",
        "{% set x = 'x' * 1000000 %}{% for i in range(1000) %}{{ x }}{% endfor %}",
        "{% set x = ['x' * 1000000] * 1000000 %}{{ x | tojson }}",
        "{% set x = ['x' * 1000000] * 1000000 %}{{ x | string }}",
        "{% set x = ['x' * 1000000] * 1000000 %}{{ x }}",
        "{% set x = ['x' * 1000000] * 1000000 %}{{ x ~ '' }}",
        "{% set x = ['x' * 1000000] * 1000000 %}{{ x | upper }}",
        "{% set x = ['x' * 1000000] * 1000000 %}{{ '%s' % x }}",
        "{% set x = ['x' * 1000000] * 1000000 %}{{ '{}'.format(x) }}",
        "{% set x = ['x' * 1000000] * 1000000 %}{{ '{x}'.format(x=x) }}",
        "{% set x = ['x' * 1000000] * 1000000 %}{{ 'a' | replace('a', x) }}",
        "{% set x = [[[['x' * 9999] * 9999] * 9999] * 9999] * 9999 %}{{ x | list | string }}",
        "{% set x = {'k': ['x' * 1000000] * 1000000} %}{{ x }}{{ x | tojson }}",
    ],
)
def test_a_template_without_end_is_stopped(source: str) -> None:
    start = time.monotonic()
    with pytest.raises((GenerationError, TokenizerError)):
        rendered(source)
    assert time.monotonic() - start < 10
