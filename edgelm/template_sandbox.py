"""The environment that chat templates run in: transformers' jinja2 sandbox, with bounds on time and memory.

jinja2's sandbox keeps a template from Python's internals but not from looping for ever or making a text of a terabyte.
Here loop rounds and calls are counted, operators and functions that multiply lengths are checked before they run, and
filters that take a width and that no chat template uses are left out.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

MAX_VALUE = 1 << 20  # characters and items in one value; no number given to a call may be larger
MAX_STEPS = 300_000  # loop rounds and calls of one rendering

# "%99999d", "%*d", "{:99999}", and a field inside a field, which could hold any width.
WIDE_FORMAT = re.compile(r"%[^a-zA-Z%]*(\d{5,}|\*)|\{[^}]*(\d{5,}|\{)")
HIDDEN_METHODS = ("expandtabs", "translate")
FILTERS = frozenset(
    """
    abs attr capitalize count d default dictsort e escape first float groupby int items last length list lower map max
    min reject rejectattr reverse round safe select selectattr sort string title trim truncate unique upper wordcount
    """.split()  # noqa: SIM905 - a list literal of one name a line would bury the rest
)


class TemplateLimit(Exception):  # noqa: N818 - it is turned into a GenerationError by the caller
    """The template does more than any chat template needs to."""


class Budget:
    """Counts what one rendering does, so that an endless loop or recursion ends in an error."""

    def __init__(self) -> None:
        self._steps = MAX_STEPS

    def step(self) -> None:
        """Take one step. Raises `TemplateLimit` when there are none left."""
        self._steps -= 1
        if self._steps < 0:
            raise TemplateLimit(f"more than {MAX_STEPS} loop rounds and calls")

    def count(self, items: Iterable[Any]) -> Iterator[Any]:
        """Pass the items on, one step each."""
        for item in items:
            self.step()
            yield item


def _check_length(length: int) -> None:
    if length > MAX_VALUE:
        raise TemplateLimit(f"a text or list of more than {MAX_VALUE} items")


def _bounded(value: Any) -> Any:
    """The value itself, if all its characters and items, those of items included, are not too many."""
    total = 0
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, dict):
            total += len(item)
            stack += item.values()
        elif isinstance(item, list | tuple):
            # Before they are stacked: they may be a million times the same list.
            total += len(item)
            _check_length(total)
            stack += item
        _check_length(total)
    return value


def _binary(operator: str, left: Any, right: Any, apply: Callable[[], Any]) -> Any:
    """`apply()`, the result of left operator right, unless that would be huge."""
    if operator == "**" and not (isinstance(right, int | float) and abs(right) <= 64):
        raise TemplateLimit("a power above 64")
    if operator == "*":
        for sequence, times in ((left, right), (right, left)):
            if isinstance(sequence, str | list | tuple) and isinstance(times, int):
                _check_length(len(sequence) * times)
    if operator == "%" and isinstance(left, str) and WIDE_FORMAT.search(left):
        raise TemplateLimit("a format wider than 9999")
    if operator == "%":
        _bounded(right)
    result = apply()
    if isinstance(result, str | list | tuple):
        _check_length(len(result))
    if isinstance(result, int) and result.bit_length() > 4096:
        raise TemplateLimit("a number of more than 4096 bits")
    return result


def _replace(value: Any, old: str, new: str, count: int | None = None) -> str:
    text, old, new = str(value), str(_bounded(old)), str(_bounded(new))
    _check_length(len(text) + text.count(old) * len(new))
    return text.replace(old, new, -1 if count is None else count)


def _indent(value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    from jinja2.filters import do_indent

    text = str(value)
    _check_length(len(text) + (text.count("\n") + 1) * (len(width) if isinstance(width, str) else abs(width)))
    return do_indent(text, width, first, blank)


def _join(parts: Iterable[Any], separator: str) -> str:
    texts: list[str] = []
    length = 0
    for part in parts:
        texts.append(str(_bounded(part)))
        length += len(texts[-1]) + len(separator)
        _check_length(length)
    return separator.join(texts)


def _check_string_method(text: str, name: str, args: tuple[Any, ...]) -> None:
    if name in ("format", "format_map"):
        _bounded(args)
        if WIDE_FORMAT.search(text):
            raise TemplateLimit("a format wider than 9999")
    if name == "replace" and len(args) > 1 and isinstance(args[0], str) and isinstance(args[1], str):
        _check_length(len(text) + text.count(args[0]) * len(args[1]))
    if name == "join" and args and isinstance(args[0], list | tuple):
        _join(args[0], text)


def _raise_exception(message: str) -> None:
    from jinja2.exceptions import TemplateError

    raise TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own escapes <, > and & for HTML, which is not what a model was trained on.
    if indent is not None and not (isinstance(indent, int) and indent <= 16):
        raise TemplateLimit("an indent above 16")
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    _check_length(len(text))
    return text


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def sandbox(budget: Budget) -> Any:
    """transformers' jinja2 environment: immutable sandbox, loop controls, `generation` blocks; bounded by `budget`."""
    from jinja2 import filters, nodes, pass_environment
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's part for training; the text is rendered as it is."""

        tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def bounded(node: nodes.Expr) -> nodes.Expr:
        return nodes.Filter(node, "_bounded", [], [], None, None)

    class Bounded(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"+", "*", "**", "%"})

        def _generate(self, source: Any, *args: Any, **kwargs: Any) -> str:
            for loop in list(source.find_all(nodes.For)):
                loop.iter = nodes.Filter(loop.iter, "_count", [], [], None, None)
            for join in list(source.find_all(nodes.Concat)):
                join.nodes = [bounded(part) for part in join.nodes]
            for step in list(source.find_all(nodes.Filter)):
                if step.node is not None and not step.name.startswith("_"):
                    step.node = bounded(step.node)
            return super()._generate(source, *args, **kwargs)

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            hidden = isinstance(obj, str) and attr in HIDDEN_METHODS
            return not hidden and super().is_safe_attribute(obj, attr, value)

        def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
            budget.step()
            # jinja2 wraps str.format in a function that remembers the method.
            owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)
            name = getattr(function, "__name__", "a function")
            if any(isinstance(value, int) and abs(value) > MAX_VALUE for value in (*args, *kwargs.values())):
                raise TemplateLimit(f"a number above {MAX_VALUE} given to {name}")
            if isinstance(owner, str):
                _check_string_method(owner, name, (*args, *kwargs.values()))
            return super().call(context, function, *args, **kwargs)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            return _binary(
                operator, left, right, lambda: super(Bounded, self).call_binop(context, operator, left, right)
            )

    @pass_environment
    def join(environment: Any, parts: Iterable[Any], separator: str = "", attribute: str | int | None = None) -> str:
        if attribute is not None:
            parts = map(filters.make_attrgetter(environment, attribute), parts)
        return _join(parts, str(separator))

    environment = Bounded(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols], finalize=_bounded
    )
    environment.filters = {name: function for name, function in environment.filters.items() if name in FILTERS}
    environment.filters |= {"tojson": _tojson, "replace": _replace, "indent": _indent, "join": join}
    environment.filters |= {"_count": budget.count, "_bounded": _bounded}
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment
