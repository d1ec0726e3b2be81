"""Render random templates with jinja2 and with libedgelm, and compare the texts.

    make build/csrc/capi_chat_template_test
    python tests/capi/fuzz_chat_templates.py --seconds 300

Templates are made of expressions, filters, tests, loops, macros and whitespace control over one conversation. Errors
are equal if they are of the same kind. What libedgelm refuses by name is counted.
"""

# ruff: noqa: E501 - lines of templates are what they are

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgelm.tokenization.chat_template import _checked
from edgelm.tokenization.template_worker import Renderer

PROGRAM = Path(__file__).parents[2] / "build/csrc/capi_chat_template_test"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
KINDS = {
    "is not valid": "i",
    "refuses these messages": "r",
    "tries what a template may not": "f",
    "fails on these messages": "e",
    "does more than a chat template may": "l",
    "uses what this library does not support": "unsupported",
}
MESSAGES = [
    {"role": "system", "content": " Be brief.\n"},
    {"role": "user", "content": 'Größe <&> "x" 1\'2 \U0001f600 '},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "f", "arguments": {"a": [1, 2.5, None]}}}],
    },
    {"role": "tool", "content": {"items": [3, 1, 2], "keys": "k", "n": -7}},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes.", "reasoning": "Because."},
]
VARIABLES = {
    "d": {"b": 1, "a": "x", "items": 5, "é": [], "n": {"m": {"k": [0, {"z": 9}]}}},
    "xs": [3, 1, 2, 3],
    "words": ["pear", "Apple", "fig", "apple", ""],
    "people": [{"name": "Ann", "age": 3, "tags": ["x"]}, {"name": "bob", "age": 1}, {"name": "Cy", "age": 3, "tags": []}],
    "text": "Hello, World\n  two  words\tand é\u2003ü\n",
    "pi": 3.14159,
    "n": 7,
    "yes": True,
}  # fmt: skip

ATTRIBUTES = ["a", "b", "n", "m", "k", "role", "content", "name", "age", "tags", "items", "z", "tool_calls", "0"]
NAMES = ["d", "xs", "words", "people", "text", "pi", "n", "yes", "missing", "messages", "x", "y", "ns", "tools", "loop"]
TESTS = ["defined", "undefined", "none", "string", "number", "mapping", "sequence", "iterable", "odd", "even", "integer", "float", "boolean", "true", "false", "lower", "upper", "callable"]  # fmt: skip
PAIR_TESTS = ["eq", "ne", "lt", "gt", "le", "ge", "in", "divisibleby", "equalto"]
PLAIN_FILTERS = ["abs", "capitalize", "count", "d", "dictsort", "first", "float", "indent", "int", "items", "join", "last", "length", "list", "lower", "max", "min", "reverse", "round", "sort", "string", "sum", "title", "tojson", "trim", "unique", "upper", "wordcount", "select", "reject", "escape", "center"]  # fmt: skip
METHODS = ["upper()", "lower()", "strip()", "split()", "title()", "items()", "keys()", "values()", "get('a')", "get('zz', 1)", "startswith('H')", "endswith(('n', 'x'))", "split('o')", "rsplit(' ', 1)", "split(none, 1)", "splitlines()", "replace('o', 'é')", "find('o')", "rfind('o')", "count('o')", "index(1)", "count(3)", "join(words)", "lstrip('H ')", "rstrip()", "partition(',')", "rpartition(' ')", "center(9, '*')", "ljust(4)", "zfill(6)", "isdigit()", "isalpha()", "isupper()", "islower()", "isspace()", "isalnum()", "format(1, b=2)", "capitalize()", "removeprefix('He')", "expandtabs(3)", "copy()", "append(1)", "pop()"]  # fmt: skip


CONSTANTS = ["0", "1", "2", "-3", "7", "2.5", "1e3", "0.1", "true", "false", "none", "''", "'a'", "'Hello, é'", "'o'", "' x\\n'", '"it\'s"', "[]", "{}", "()", "'%s|%d'", "'{:>4}'", "'b'", "'😀z'"]  # fmt: skip


class Maker:
    """Makes random templates."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.choose: Callable[[Any], Any] = self.random.choice

    def constant(self) -> str:
        return str(self.choose(CONSTANTS))

    def small(self) -> str:
        return str(self.choose(["", "0", "1", "2", "-1", "-2", "5", "n"]))

    def filter(self, depth: int) -> str:
        r, e = self.random.random(), self.expression
        if r < 0.45:
            return str(self.choose(PLAIN_FILTERS))
        attribute, name = (
            self.choose(["name", "age", "role", "content", "tags.0", "missing"]),
            self.choose(PLAIN_FILTERS),
        )
        test, pair = self.choose(TESTS), self.choose(PAIR_TESTS)
        return str(
            self.choose(
                [
                    f"default({e(depth - 1)})", f"default({e(depth - 1)}, true)", f"join({self.constant()})",
                    f"map(attribute='{attribute}')", f"map('{name}')", f"map(attribute='{attribute}', default={self.constant()})",
                    f"selectattr('{attribute}')", f"selectattr('{attribute}', '{pair}', {self.constant()})",
                    f"rejectattr('{attribute}', '{test}')", f"select('{test}')", f"reject('{pair}', {e(depth - 1)})",
                    f"sort(reverse=true, attribute='{attribute}')", f"sort(attribute='{attribute}')", "sort(case_sensitive=true)",
                    f"groupby('{attribute}')", f"batch({self.small() or 2}, {self.constant()})", f"slice({self.small() or 3})",
                    f"replace({self.constant()}, {self.constant()})", f"truncate({self.choose([3, 5, 9])}, {self.constant()})",
                    f"round({self.small() or 1})", f"round({self.small() or 0}, 'floor')", f"tojson(indent={self.small() or 2})",
                    "tojson(sort_keys=true)", "tojson(separators=(',', ':'))", "tojson(ensure_ascii=true)",
                    f"trim({self.constant()})", f"int({self.constant()})", f"format({e(depth - 1)})", f"indent({self.small() or 2}, true)",
                    f"sum(start={self.constant()})", f"sum(attribute='{attribute}')", f"attr('{self.choose(ATTRIBUTES)}')", f"unique(attribute='{attribute}')",
                    f"dictsort(by='value', reverse={self.constant()})", f"max(attribute='{attribute}')", f"center({self.small() or 8})",
                ]
            )
        )  # fmt: skip

    def expression(self, depth: int) -> str:
        r, e = self.random.random(), self.expression
        if depth <= 0 or r < 0.12:
            return str(self.choose(NAMES)) if self.random.random() < 0.6 else self.constant()
        d = depth - 1
        makers: list[Callable[[], str]] = [
            lambda: f"{e(d)} | {self.filter(d)}",
            lambda: f"{e(d)} | {self.filter(d)} | {self.filter(d)}",
            lambda: f"({e(d)} | {self.filter(d)} | list)",
            lambda: f"{self.choose(NAMES)}.{self.choose(ATTRIBUTES)}",
            lambda: f"({e(d)}).{self.choose(METHODS)}",
            lambda: f"{self.choose(['text', 'words[1]', 'd', 'xs', 'messages[1].content'])}.{self.choose(METHODS)}",
            lambda: f"({e(d)})[{e(d)}]",
            lambda: f"{self.choose(NAMES)}[{self.small()}:{self.small()}]",
            lambda: (
                f"{self.choose(['text', 'xs', 'words', 'messages', 'x'])}[{self.small()}:{self.small()}:{self.choose(['', '1', '-1', '2', '-2'])}]"
            ),
            lambda: f"({e(d)} {self.choose(['+', '-', '*', '/', '//', '%', '~', '~'])} {e(d)})",
            lambda: f"({e(d)} {self.choose(['==', '!=', '<', '<=', '>', '>=', 'in', 'not in', 'and', 'or'])} {e(d)})",
            lambda: f"({e(d)} < {e(d)} <= {e(d)})",
            lambda: f"(not {e(d)})",
            lambda: f"-{e(0)}",
            lambda: f"({e(d)} if {e(d)} else {e(d)})",
            lambda: f"({e(d)} if {e(d)})",
            lambda: f"({e(d)} is {self.choose(['', 'not '])}{self.choose(TESTS)})",
            lambda: f"({e(d)} is {self.choose(PAIR_TESTS)} {self.constant()})",
            lambda: f"[{e(d)}, {e(d)}]",
            lambda: f"({e(d)}, {e(d)})",
            lambda: "{" + f"'a': {e(d)}, {self.constant()}: {e(d)}" + "}",
            lambda: f"range({self.small() or 3}) | list",
            lambda: f"dict(a={e(d)}, b=1)",
            lambda: (
                f"'{self.choose(['%s', '%5s|', '%-4s|', '%d', '%05d', '%.2f', '%x', '%r', '%s %s'])}' % {self.choose([e(0), f'({e(0)},)', f'({e(d)}, {e(0)})'])}"
            ),
            lambda: (
                f"'{self.choose(['{}', '{:>6}', '{!r}', '{:.1f}', '{0}{0}', '{:05d}', '{a}'])}'.format({e(0)}, a={e(0)})"
            ),
            lambda: f"f({e(d)})",
            lambda: f"f({e(d)}, b={e(d)})",
            lambda: (
                f"loop.{self.choose(['index', 'index0', 'first', 'last', 'length', 'revindex', 'previtem', 'nextitem', 'depth'])}"
            ),
            lambda: f"ns.{self.choose(['v', 'w'])}",
        ]
        return str(self.choose(makers)())

    def tag(self, text: str) -> str:
        left, right = self.choose(["", "", "", "-", "+"]), self.choose(["", "", "", "-", "+"])
        return "{%" + left + " " + text + " " + right + "%}"

    def output(self, depth: int) -> str:
        return "{{" + self.choose(["", "", "-"]) + f" {self.expression(depth)} " + self.choose(["", "", "-"]) + "}}"

    def data(self) -> str:
        return str(self.choose(["", "a", "\n", " \n  ", "  ", "text\n", "\n\n", "é ", "\t"]))

    def body(self, depth: int) -> str:
        return "".join(self.data() + self.statement(depth) for _ in range(self.random.randint(1, 3))) + self.data()

    def statement(self, depth: int) -> str:
        t, d = self.tag, depth - 1
        if depth <= 0 or self.random.random() < 0.35:
            return self.output(2)
        e = self.expression
        target = self.choose(["x", "y"])
        makers: list[Callable[[], str]] = [
            lambda: t(f"for {target} in {e(2)}") + self.body(d) + t("endfor"),
            lambda: t(f"for {target} in xs if {e(1)}") + self.body(d) + t("else") + self.body(d) + t("endfor"),
            lambda: t("for x, y in d.items()") + self.body(d) + t("endfor"),
            lambda: t("for x in messages") + self.body(d) + t(f"if {e(1)}") + t(self.choose(["break", "continue"])) + t("endif") + self.body(d) + t("endfor"),
            lambda: t("for x in [1, [2, [3]], []] recursive") + "{{ loop(x) if x is iterable else x }}" + self.data() + t("endfor"),
            lambda: t(f"if {e(2)}") + self.body(d) + t("endif"),
            lambda: t(f"if {e(2)}") + self.body(d) + t(f"elif {e(1)}") + self.body(d) + t("else") + self.body(d) + t("endif"),
            lambda: t(f"set {target} = {e(2)}"),
            lambda: t(f"set x, y = {e(1)}, {e(1)}"),
            lambda: t(f"set ns.{self.choose(['v', 'w'])} = {e(2)}"),
            lambda: t(f"set {target}") + self.body(d) + t("endset"),
            lambda: t(f"set {target} | {self.filter(1)}") + self.body(d) + t("endset"),
            lambda: t(f"filter {self.filter(1)}") + self.body(d) + t("endfilter"),
            lambda: t(f"with x = {e(1)}, z = {e(1)}") + self.body(d) + "{{ z }}" + t("endwith"),
            lambda: t("macro f(x, b=2)") + self.body(d) + "{{ b }}" + t("endmacro"),
            lambda: t("call f(1)") + self.body(d) + t("endcall"),
            lambda: t("macro g(x)") + "[{{ caller(x) }}]" + t("endmacro") + t(f"call(y) g({e(1)})") + self.body(d) + t("endcall"),
            lambda: t("generation") + self.body(d) + t("endgeneration"),
            lambda: self.choose(["{#", "{#-"]) + " c\n " + self.choose(["#}", "-#}", "+#}"]),
            lambda: t("raw") + self.data() + "{{ x }}" + self.data() + t("endraw"),
        ]  # fmt: skip
        return str(self.choose(makers)())

    def template(self) -> str:
        start = "{% set ns = namespace(v=1, w='w') %}{% macro f(a, b='é') %}<{{ a }}{{ b }}>{% endmacro %}"
        if self.random.random() < 0.7:
            return (start if self.random.random() < 0.3 else "") + self.output(self.random.randint(1, 3))
        return start + self.body(2)


class Program:
    """The C++ program: a request a line, an answer a line."""

    def __init__(self, path: Path) -> None:
        self.popen = subprocess.Popen(
            [path, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )

    def close(self) -> None:
        self.popen.communicate(timeout=60)

    def outcome(self, source: str) -> tuple[str, str]:
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        request = {"source": source, "special": SPECIAL, "messages": MESSAGES, "variables": VARIABLES}
        self.popen.stdin.write(json.dumps(request, ensure_ascii=False) + "\n")
        self.popen.stdin.flush()
        line = self.popen.stdout.readline()
        if not line:
            raise SystemExit(f"the program ended with {self.popen.wait()} on {source!r}")
        answer = json.loads(line)
        if "text" in answer:
            return "d", answer["text"]
        kind = next(
            (kind for words, kind in KINDS.items() if answer["error"].startswith(f"chat template {words}")), "?"
        )
        return kind, answer["error"]


def python_outcome(renderer: Renderer, source: str) -> tuple[str, str]:
    """Return the letter of an answer of `template_worker`, and its text."""
    given = {"tools": None, "documents": None, **SPECIAL, **VARIABLES, "messages": _checked(MESSAGES)}
    answer = renderer.answer(json.dumps({"source": source, "given": given | {"add_generation_prompt": True}}).encode())
    return answer[:1].decode(), answer[1:].decode("utf-8", "surrogatepass")


@dataclass
class Result:
    """What was compared.

    Attributes:
        counts: templates by outcome.
        reasons: what libedgelm refused by name.
        differences: the first ones, for a person.
    """

    counts: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)


def fuzz(program: Path, seed: int, seconds: float, templates: int = 10**9) -> Result:
    """Compare random templates until the time is over, or there were enough."""
    maker, process, renderer, result = Maker(seed), Program(program), Renderer(8 << 20), Result()
    counts = result.counts
    end = time.monotonic() + seconds
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Python's compiler, such as "is" with a literal
        while time.monotonic() < end and counts["templates"] < templates:
            source = maker.template()
            given, wanted = process.outcome(source), python_outcome(renderer, source)
            counts["templates"] += 1
            if given[0] == "unsupported":
                counts["refused by name"] += 1
                result.reasons[given[1].split(": ", 1)[1].split(": ", 1)[-1].split(";")[0]] += 1
            elif given == wanted or given[0] == wanted[0] != "d":
                counts["equal texts" if wanted[0] == "d" else "equal errors"] += 1
            elif wanted[1].startswith("Tried to resolve a name"):
                counts["faults of jinja2's compiler"] += 1
            elif wanted[0] == "i" and (given[0] == "e" or "unhashable" in wanted[1]):
                counts["errors that jinja2 finds earlier, in constants"] += 1
            else:
                counts["differences"] += 1
                result.differences.append(
                    f"{source!r}\npython {wanted[0]} {wanted[1]!r}\nc++    {given[0]} {given[1]!r}"
                )
    process.close()
    return result


def main() -> None:
    """Compare, and print what was compared."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", type=Path, default=PROGRAM)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    result = fuzz(arguments.program, arguments.seed, arguments.seconds)
    for difference in result.differences[:10]:
        print(f"--- {difference}")
    print(dict(result.counts))
    for reason, count in result.reasons.most_common(12):
        print(f"{count:6} {reason}")
    if result.differences:
        sys.exit("there are differences")


if __name__ == "__main__":
    main()
