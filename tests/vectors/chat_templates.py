"""Write the chat templates, conversations and texts that Python and libedgelm both have to give.

    python tests/vectors/chat_templates.py           compare the file with what Python gives now
    python tests/vectors/chat_templates.py --write   write it

tests/unit/test_chat_vectors.py does the first, runtimes/csrc/tests/capi/chat_template_test.cc runs the file in C++.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from edgelm.errors import GenerationValueError, TokenizerError
from edgelm.tokenization.chat_template import ChatTemplate, _checked
from edgelm.tokenization.template_worker import Renderer

FILE = Path(__file__).with_suffix(".json")
ROOT = Path(__file__).parents[2]
SPECIAL = {"bos_token": "<bos>", "eos_token": "<eos>"}
KINDS = {b"i": "invalid", b"r": "refused", b"f": "forbidden", b"e": "failed", b"l": "limit"}


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"edgelm_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FEATURES = _module(Path(__file__).with_name("chat_features.py"))
PUBLISHED: dict[str, str] = _module(ROOT / "tests" / "unit" / "published_templates.py").PUBLISHED

CALL = {"id": "abcdef123", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln", "n": 1.5}}}
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
ASKED = {"role": "user", "content": "  Weather? "}
TALK = [
    {"role": "user", "content": 'Hi <&> "é" '},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "x"},
]
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": TALK[:1],
    "answered": TALK[:2],
    "longer": TALK,
    "system": [{"role": "system", "content": " Be brief.\n"}, *TALK],
    "empty texts": [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}, TALK[2]],
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
    "both": [TALK[0], {"role": "assistant", "content": "Y", "reasoning_content": "A", "thinking": "B"}, TALK[2]],
    "parts": [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": " b "}]},
        TALK[1],
        {"role": "user", "content": [{"type": "text", "text": "😀"}]},
    ],
    "unknown role": [{"role": "critic", "content": "No."}],
}
# With a date, since a template that asks for today's gives another text tomorrow.
OPTIONS: list[dict[str, Any]] = [
    {"prompt": True, "variables": {"date_string": "26 Jul 2024"}},
    {"prompt": False, "variables": {"tools": TOOLS, "date_string": "1 May"}},
    {
        "prompt": True,
        "variables": {
            "date_string": "1 Mai",
            "tools": TOOLS,
            "enable_thinking": False,
            "tools_in_user_message": False,
        },
    },
]
# Whether a template loops over parts.
READERS = {
    "{% for p in messages[0].content %}{{ p.text }}{% endfor %}": True,
    "{% for p in messages[0]['content'] if p.type == 'text' %}{{ p.text }}{% endfor %}": True,
    "{% for p in messages[0].content | selectattr('type', 'equalto', 'text') %}{{ p.text }}{% endfor %}": True,
    "{% set c = messages[0].content %}{% set d = c %}{% for p in d[0:] %}{{ p.text }}{% endfor %}": True,
    "{% macro f(x) %}{% for p in x %}{{ p.text }}{% endfor %}{% endmacro %}{{ f(messages[0].content) }}": True,
    "{% macro f(x) %}{% for p in x %}{{ p.text }}{% endfor %}{% endmacro %}{{ f(x=messages[0].content) }}": True,
    "{% for m in messages %}{% for t in tools or [] %}{{ t }}{% endfor %}{{ m.content }}{% endfor %}": False,
    "{% set c = messages[0].content %}{% for m in messages %}{{ c }}{% endfor %}": False,
}
MALFORMED: list[Any] = [
    [],
    [{"role": "user"}],
    [{"role": 1, "content": "x"}],
    [{"content": "x"}],
    ["Hi"],
    [TALK[0], {"role": "assistant", "content": None}],
    [{"role": "tool", "content": None}],
    [{"role": "user", "content": []}],
    [TALK[0], {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
    [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "au'dio"}]}],
    [{"role": "user", "content": [{"type": "text"}]}],
    [{"role": "user", "content": [{"text": "a"}]}],
    [{"role": "user", "content": ["a"]}],
    [{"role": "user", "content": 3}],
    [{"role": "user", "content": {"type": "text", "text": "a"}}],
]


def templates() -> dict[str, str]:
    """Return published templates, and those of the tiny checkpoints."""
    named = dict(PUBLISHED)
    for folder in sorted((ROOT / "examples" / "checkpoints").iterdir()):
        settings = folder / "tokenizer_config.json"
        if settings.is_file():
            named[folder.name] = json.loads(settings.read_text(encoding="utf-8"))["chat_template"]
    return named


class _Python:
    """Renders in this process, which is quick: these templates are ours."""

    def __init__(self) -> None:
        self._renderer = Renderer(8 << 20)

    def outcome(self, source: str, messages: Any, prompt: bool, variables: dict[str, Any]) -> dict[str, str]:
        given = {"tools": None, "documents": None, **SPECIAL, **variables}
        given |= {"messages": _checked(messages), "add_generation_prompt": prompt}
        answer = self._renderer.answer(json.dumps({"source": source, "given": given}).encode())
        text = answer[1:].decode()
        if answer[:1] == b"d":
            return {"text": text}
        # What a template says itself is the same in both languages.
        return {"error": KINDS[answer[:1]], **({"said": text} if answer[:1] == b"r" else {})}


def _cases(python: _Python) -> Iterator[dict[str, Any]]:
    for name, source in templates().items():
        for talk, messages in CONVERSATIONS.items():
            for number, options in enumerate(OPTIONS):
                case = {"template": name, "messages": talk, "options": number}
                yield {**case, **python.outcome(source, messages, options["prompt"], options["variables"])}


def contents() -> dict[str, Any]:
    """Return what the file has to hold."""
    python = _Python()
    messages, variables = FEATURES.MESSAGES, FEATURES.VARIABLES
    malformed = []
    for given in MALFORMED:
        try:
            _checked(given)
            raise AssertionError(f"accepted: {given}")
        except GenerationValueError as error:
            malformed.append({"messages": given, "message": str(error)})
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    return {
        "special": SPECIAL,
        "templates": templates(),
        "conversations": CONVERSATIONS,
        "options": OPTIONS,
        "cases": list(_cases(python)),
        "messages": messages,
        "variables": variables,
        "features": [
            {"source": source, **python.outcome(source, messages, True, variables)} for source in FEATURES.FEATURES
        ],
        "left_out": [{"source": source, "named": named} for source, named in FEATURES.LEFT_OUT.items()],
        "parts": [
            {"source": source, "messages": parts, **python.outcome(source, parts, True, {})} for source in READERS
        ],
        "malformed": malformed,
    }


def text() -> str:
    """Return the file's text: JSON, with one case a line."""
    lines = []
    for key, value in contents().items():
        if isinstance(value, list):
            items = ",\n".join(json.dumps(item, ensure_ascii=False) for item in value)
            lines.append(f"{json.dumps(key)}: [\n{items}\n]")
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def left_out_but_invalid() -> list[str]:
    """Return templates of `LEFT_OUT` that jinja2 does not read either."""
    invalid = []
    for source in FEATURES.LEFT_OUT:
        try:
            ChatTemplate(source, {})
        except TokenizerError:
            invalid.append(source)
    return invalid


def main() -> None:
    """Write the file, or compare it."""
    if "--write" in sys.argv[1:]:
        FILE.write_text(text(), encoding="utf-8")
    elif FILE.read_text(encoding="utf-8") != text():
        sys.exit(f"{FILE} is not what Python gives: run with --write, and look at the difference")


if __name__ == "__main__":
    main()
