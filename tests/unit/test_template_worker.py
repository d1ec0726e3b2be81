"""Do templates give the same inside the process with limits as outside of it?

There no file can be opened: what Python and jinja2 load late must be there before. Both run the same renderer, the
process over pipes and with limits, this test in the program itself.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from published_templates import FILTERS, GLOBALS, PUBLISHED, TESTS

from edgelm.tokenization.template_sandbox import SANDBOX
from edgelm.tokenization.template_worker import Answer, Renderer

TALK = [{"role": "user", "content": "Hi <b>there</b>"}, {"role": "assistant", "content": "Köln"}] * 2
PARTS = [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}]
GIVEN = {"bos_token": "<bos>", "eos_token": "<eos>", "add_generation_prompt": True}
CASES = {
    "namespace": "{% set n = namespace(self=1) %}{% set n.x = 2 %}{{ n.self + n.x }}",
    "private names": "{% set n = namespace(_x=1) %}",
    "generation": "{% for m in messages %}{% generation %}{% set a = 1 %}{{ m.role }}{% endgeneration %}{% endfor %}",
    "parts": "{% macro show(c) %}{% for p in c %}{{ p.text }},{% endfor %}{% endmacro %}{{ show(messages[0].content) }}"
    "{{ show(c=messages[0]['content']) }}",
    "parts by index": "{% set c = messages[0]['content'] %}{% for p in c[0:] | list %}{{ p }}{% endfor %}",
    "joined parts": "{{ messages[0].content }}",
    "raised": "{{ raise_exception('roles must alternate') }}",
    "internals": "{{ messages.__class__ }}",
    "wrong types": "{{ 1 + 'a' }}",
    "undefined": "{{ nothing.at.all }}",
    "no template": "{% for %}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "too long": "{% for a in range(3000) %}{{ 'x' * 3000 }}{% endfor %}",
}


def both(source: str, given: dict[str, Any] | None) -> tuple[tuple[bytes, str], tuple[bytes, str]]:
    """The letter and the text of an answer, outside and inside."""
    answer = Renderer(8 << 20).answer(json.dumps({"source": source, "given": given}).encode())
    return (answer[:1], answer[1:].decode("utf-8", "surrogatepass")), SANDBOX.ask(source, given)


@pytest.mark.parametrize("messages", [TALK, PARTS], ids=["texts", "parts"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_templates_give_the_same(name: str, messages: list[dict[str, Any]]) -> None:
    outside, inside = both(PUBLISHED[name], {**GIVEN, "messages": messages})
    assert inside == outside


@pytest.mark.parametrize("source", [FILTERS, TESTS, GLOBALS], ids=["filters", "tests", "globals"])
def test_all_of_jinja_gives_the_same(source: str) -> None:
    outside, inside = both(source, {**GIVEN, "messages": TALK})
    assert outside[0] == Answer.DONE
    assert inside == outside


@pytest.mark.parametrize("messages", [TALK, PARTS], ids=["texts", "parts"])
@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_answer_is_the_same(name: str, messages: list[dict[str, Any]]) -> None:
    outside, inside = both(CASES[name], {**GIVEN, "messages": messages})
    assert inside == outside


def test_a_check_renders_nothing() -> None:
    assert both("{{ raise_exception('never') }}", None) == ((Answer.DONE, ""),) * 2
