"""Reading of JSON documents: limits before parsing, then conversion to frozen dataclasses by their type hints.

A wrong document raises an error of one line that names the file, the field, its value and what is allowed:

    manifest.json: model.num_layers is "12" (a string), expected a whole number from 1 to 65536: export the bundle again

Types are exact: `true` and `1.0` are not integers, and infinite numbers are refused. A field's range is part of its
type, as `Annotated[int, Range(1, 64)]`. A field with a default may be missing. An unknown field is refused, since it
may change the meaning of the others. `read_json` also reads documents of others, such as a config.json.

A union of dataclasses is told apart by the field `type`, whose hint names the values with `OneOf`.
"""

from __future__ import annotations

import json
import math
import stat
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from edgelm.errors import EdgeLMError

__all__ = [
    "Count",
    "ErrorFactory",
    "InvalidField",
    "Length",
    "OneOf",
    "Range",
    "StrEnum",
    "convert",
    "from_data",
    "parse",
    "parse_toml",
    "quoted",
    "read_bytes",
    "read_json",
    "require_format",
    "shown",
    "without_unknown",
]  # fmt: skip

MAX_BYTES = 8 << 20
"""Largest document of EdgeLM. Parsed, it takes up to 25 times as much memory. OLMoE's largest document is 1 MB."""
MAX_DEPTH = 64
_SHOWN = 60
_LIST, _OBJECT = "a list", "an object"

T = TypeVar("T")
_Reader = Callable[[Any], Any]


class StrEnum(str, Enum):
    """Strings of a fixed set, as `enum.StrEnum`, which Python 3.10 lacks."""

    __str__ = str.__str__


@dataclass(frozen=True)
class ErrorFactory:
    """Makes the errors of an invalid document: the class of the error, and advice on what to do."""

    error: type[EdgeLMError]
    advice: str

    def at(self, where: Path | str, problem: str) -> EdgeLMError:
        """Return the error, for the caller to raise."""
        return self.error(f"{where}: {problem}: {self.advice}")


@dataclass(frozen=True)
class Range:
    """Range of the numbers that a field may have, both ends included."""

    low: float
    high: float = math.inf

    def __str__(self) -> str:
        return f"of {self.low} or more" if self.high == math.inf else f"from {self.low} to {self.high}"


@dataclass(frozen=True)
class Length:
    """Limits of the characters of a text or the entries of a list, both ends included."""

    low: int
    high: int

    def __str__(self) -> str:
        return f"of {self.low} to {self.high}"


@dataclass(frozen=True)
class OneOf:
    """The strings, or other scalars, that a field may have."""

    choices: tuple[str | bool | int, ...]


Count = Annotated[int, Range(0, 2**63 - 1)]
"""A size, an offset or a count: a non-negative int64."""


class InvalidField(Exception):  # noqa: N818 - a fault of the document, which callers turn into their own error
    """An invalid value and the path to it. Each enclosing reader appends its key, so `path` is innermost first.

    Attributes:
        problem: what is wrong, to follow the field's name.
        path: keys and indices.
        unknown: whether there is no such field.
    """

    def __init__(self, problem: str, *path: str | int, unknown: bool = False) -> None:
        super().__init__(problem)
        self.problem = problem
        self.path = list(path)
        self.unknown = unknown

    @property
    def field(self) -> str:
        """The path as it is written, such as "messages[0].role"; empty for the whole document."""
        path = ""
        for key in reversed(self.path):
            if isinstance(key, int):
                path += f"[{key}]"
            else:
                name = key if key.isprintable() and 0 < len(key) <= _SHOWN else quoted(key)
                path += f".{name}" if path else name
        return path

    def __str__(self) -> str:
        return f"{self.field or 'it'} {self.problem}"


def read_bytes(path: Path, errors: ErrorFactory, limit: int = MAX_BYTES) -> bytes:
    """Return the contents of a file of at most `limit` bytes.

    Raises:
        EdgeLMError: of the class of `errors`: the file is missing, unreadable, too large, or not a regular file.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise errors.at(path, "is a folder, not a file" if stat.S_ISDIR(found.st_mode) else "is not a file")
        if found.st_size <= limit:
            with path.open("rb") as stream:
                data = stream.read(limit + 1)  # the size of some system files reads as 0
            if len(data) <= limit:
                return data
    except FileNotFoundError as error:
        raise errors.at(path, "is missing") from error
    except (OSError, ValueError) as error:  # a ValueError: a name with a zero byte
        reason = getattr(error, "strerror", None) or str(error)
        raise errors.at(path, f"cannot be read ({reason})") from error
    raise errors.at(path, f"is larger than {limit} bytes, too large for such a file")


def parse(text: bytes | str, where: Path | str, errors: ErrorFactory, *, finite: bool = True) -> Any:
    """Parse JSON. It must be UTF-8, nested at most `MAX_DEPTH` deep, and without duplicate keys, which readers resolve
    differently.

    Args:
        text: the document.
        where: its name in errors.
        errors: makes the error of an invalid document.
        finite: whether NaN and infinite numbers are refused. They are not JSON, but Python writes them.

    Raises:
        EdgeLMError: of the class of `errors`: the document is not valid.
    """
    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8")
        numbers: dict[str, Any] = {"parse_constant": _no_constant, "parse_float": _finite} if finite else {}
        value = json.loads(decoded, object_pairs_hook=_unique, **numbers)
        if not _shallow(value):
            raise ValueError(f"nested more than {MAX_DEPTH} deep")
    except RecursionError:
        raise errors.at(where, "not valid JSON (nested too deeply)") from None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise errors.at(where, f"not valid JSON ({error or 'empty'})") from None
    return value


def parse_toml(text: bytes | str, where: Path | str, errors: ErrorFactory) -> dict[str, Any]:
    """Parse TOML. Raises as `parse`; errors name the line."""
    if sys.version_info >= (3, 11):
        import tomllib  # novm: vermin looks at conditions outside functions only
    else:
        import tomli as tomllib  # the same library

    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8")
        value = tomllib.loads(decoded)
        if not _shallow(value):
            raise ValueError(f"nested more than {MAX_DEPTH} deep")
    except RecursionError:
        raise errors.at(where, "not valid TOML (nested too deeply)") from None
    except ValueError as error:  # so is TOMLDecodeError
        raise errors.at(where, f"not valid TOML ({error})") from None
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:_SHOWN]} is too large")
    return value


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {quoted(key)} is there twice")
            seen.add(key)
    return result


def _shallow(value: Any) -> bool:
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        if not level:
            return True
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
    return not level


def read_json(path: Path, errors: ErrorFactory) -> Any:
    """Read and parse a JSON file; see `read_bytes` and `parse`."""
    return parse(read_bytes(path, errors), path, errors)


def from_data(cls: type[T], data: Any, where: Path | str, errors: ErrorFactory, *, ignored: Sequence[str] = ()) -> T:
    """Convert a parsed document to a dataclass.

    Args:
        cls: the dataclass. Its fields are int, float, bool, str, None, `StrEnum`, `Any`, dataclasses, and unions,
            tuples, lists and dicts by str of these; `Annotated` with a `Range` limits a number, with `OneOf` a string,
            with `Length` a string or a list.
        data: the result of `parse` or `parse_toml`.
        where: the document's name in errors.
        errors: makes the error of an invalid document.
        ignored: top-level fields to skip.

    Raises:
        EdgeLMError: of the class of `errors`, naming a field that is missing, unknown, or of a wrong type or range.
    """
    if ignored and isinstance(data, dict):
        data = {key: value for key, value in data.items() if key not in ignored}
    try:
        return convert(cls, data)
    except InvalidField as problem:
        raise errors.at(where, str(problem)) from None


def convert(cls: type[T], data: Any) -> T:
    """Convert parsed JSON to a dataclass as `from_data` does.

    Raises:
        InvalidField: a field is missing, unknown, or of a wrong type or range.
    """
    hint: Any = cls
    value: T = _reader(hint)[1](data)
    return value


def without_unknown(hint: Any, data: Any) -> Any:
    """Return a document without the fields that the dataclass `hint` lacks, for documents that later versions extend.

    What has another type than its hint is returned as it is, for `from_data` to refuse.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if is_dataclass(hint) and isinstance(data, dict):
        hints = get_type_hints(hint, include_extras=True)
        return {key: without_unknown(hints[key], item) for key, item in data.items() if key in hints}
    if origin in (Union, types.UnionType):
        return without_unknown(next(item for item in arguments if item is not type(None)), data)
    if origin is tuple and isinstance(data, list):
        return [without_unknown(arguments[0], item) for item in data]
    if origin is dict and isinstance(data, dict):
        return {key: without_unknown(arguments[1], item) for key, item in data.items()}
    return data


def require_format(data: Any, key: str, expected: int, where: Path | str, errors: ErrorFactory) -> dict[str, Any]:
    """Check that `data` is an object whose `key` is the `expected` format version, and return it.

    Raises:
        EdgeLMError: of the class of `errors`: it is not. Where the format is newer, the error advises to upgrade.
    """
    if not isinstance(data, dict):
        raise errors.at(where, f"it is {shown(data)}, expected an object")
    version = data.get(key)
    if type(version) is not int or version != expected:
        is_newer = type(version) is int and version > expected
        found = shown(version) if key in data else "missing"
        problem = f"{key} is {found}, this EdgeLM reads {expected}"
        raise (ErrorFactory(errors.error, "upgrade edgelm") if is_newer else errors).at(where, problem)
    return data


def shown(value: object) -> str:
    """Return a value as messages show it: short, in one line, and with `"1"` distinct from `1`."""
    if isinstance(value, str):
        return f"{quoted(value)} (a string)"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, (list, tuple)):
        return "a list"
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)[:_SHOWN]


def quoted(text: str) -> str:
    """Return at most 60 characters of a text in quotes, with control characters escaped."""
    short = json.dumps(text[:_SHOWN], ensure_ascii=not text.isprintable())
    return f"{short}..." if len(text) > _SHOWN else short


def _expect(kind: str, value: object) -> InvalidField:
    return InvalidField(f"is {shown(value)}, expected {kind}")


# Returns a description of the accepted values and a reader of them. Cached: there are few hints and many values.
@cache
def _reader(hint: Any) -> tuple[str, _Reader]:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        limit = next((item for item in arguments[1:] if isinstance(item, (Range, Length, OneOf))), None)
        if limit is None:
            return _reader(arguments[0])
        return _one_of(limit.choices) if isinstance(limit, OneOf) else _limited(arguments[0], limit)
    if hint is Any:
        return "any value", lambda value: value
    if origin in (Union, types.UnionType):
        return _union(tuple(arguments))
    if origin in (list, Sequence):
        return _sequence(arguments[0], list)
    if origin is tuple:
        return _sequence(arguments[0], tuple) if arguments[1:] == (...,) else _fixed(tuple(arguments))
    if origin in (dict, Mapping):
        assert arguments[0] is str, hint
        return _mapping(arguments[1])
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        kind, read = _one_of(tuple(item.value for item in hint))
        return kind, lambda value: hint(read(value))
    if is_dataclass(hint):
        return _dataclass(hint)
    return _scalar(hint)


def _scalar(hint: Any) -> tuple[str, _Reader]:
    kind = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}[hint]

    def read(value: Any) -> Any:
        if type(value) is not hint:
            raise _expect(kind, value)
        return value

    def read_float(value: Any) -> float:
        if type(value) not in (float, int):
            raise _expect(kind, value)
        try:
            number = float(value)
        except OverflowError:
            raise _expect(kind, value) from None
        if not math.isfinite(number):
            raise _expect(kind, value)
        return number

    def read_text(value: Any) -> str:
        if type(value) is not str:
            raise _expect(kind, value)
        if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise InvalidField("holds half of a surrogate pair, which is not a character")
        return value

    return kind, {float: read_float, str: read_text}.get(hint, read)


def _limited(hint: Any, limits: Range | Length) -> tuple[str, _Reader]:
    simple, inner = _reader(hint)
    unit = "" if isinstance(limits, Range) else " entries" if simple == _LIST else " characters"
    kind = f"{simple} {limits}{unit}"

    def read(value: Any) -> Any:
        try:
            found = inner(value)
        except InvalidField as problem:
            if problem.path:
                raise
            raise _expect(kind, value) from None
        size = found if isinstance(limits, Range) else len(found)
        if not limits.low <= size <= limits.high:
            raise InvalidField(f"has {size}{unit}, expected {kind}") if unit else _expect(kind, value)
        return found

    return (simple if simple == _LIST else kind), read


def _union(hints: tuple[Any, ...]) -> tuple[str, _Reader]:
    """Return the reader of a union. Lists and objects are read by the alternatives of that kind."""
    others = [_reader(hint) for hint in hints if hint is not type(None)]
    nullable = type(None) in hints
    kinds = [kind for kind, _ in others] + (["null"] if nullable else [])
    kind = " or ".join(dict.fromkeys(kinds))
    tagged = _tagged(hints)

    def read(value: Any) -> Any:
        if value is None and nullable:
            return None
        container = isinstance(value, (dict, list))
        if len(others) == 1 and container:
            return others[0][1](value)  # its error names the path inside the value
        if tagged and isinstance(value, dict):
            return _by_tag(tagged, value)
        wanted = _OBJECT if isinstance(value, dict) else _LIST
        problems = []
        for name, inner in others:
            try:
                return inner(value)
            except InvalidField as problem:
                if container and name == wanted:
                    problems.append(problem)
        # The alternative that came furthest is probably meant.
        raise max(problems, key=lambda one: _depth(one.path)) if problems else _expect(kind, value)

    return kind, read


def _depth(path: Sequence[str | int]) -> tuple[int, int]:
    """Return how far a reader came: the length of the path to its error, then the index of the outermost list."""
    return len(path), path[-1] if path and isinstance(path[-1], int) else 0


def _tagged(hints: tuple[Any, ...]) -> dict[str | bool | int | None, _Reader]:
    """Return readers of the dataclasses of a union by the values of their field `type`; None: it may be missing.

    Empty where fewer than two have such a field.
    """
    found: dict[str | bool | int | None, _Reader] = {}
    classes: list[Any] = [hint for hint in hints if is_dataclass(hint)]
    for cls in classes if len(classes) > 1 else []:
        of_type = get_type_hints(cls, include_extras=True)["type"]
        limits = [item for item in _flat(of_type) if isinstance(item, OneOf)]
        given = next(item for item in fields(cls) if item.name == "type")
        for choice in [*limits[0].choices, *([] if given.default is MISSING else [None])]:
            assert choice not in found, f"two alternatives have the type {choice}"
            found[choice] = _reader(cls)[1]
    return found


def _flat(hint: Any) -> list[Any]:
    """Return the arguments of a hint and of the hints inside it."""
    return [part for argument in get_args(hint) for part in (argument, *_flat(argument))]


def _by_tag(tagged: Mapping[str | bool | int | None, _Reader], value: dict[str, Any]) -> Any:
    tag = value.get("type")
    if (isinstance(tag, str) or tag is None) and tag in tagged:
        return tagged[tag](value)
    expected = " or ".join(json.dumps(choice) for choice in tagged if choice is not None)
    if "type" not in value:
        raise InvalidField(f"is missing, expected {expected}", "type")
    raise InvalidField(f"is {shown(tag)}, expected {expected}", "type")


def _one_of(choices: tuple[str | bool | int, ...]) -> tuple[str, _Reader]:
    kind = " or ".join(json.dumps(choice) for choice in choices)

    def read(value: Any) -> Any:
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            raise _expect(kind, value)
        return value

    return kind, read


def _sequence(hint: Any, make: Callable[[list[Any]], Any]) -> tuple[str, _Reader]:
    _, inner = _reader(hint)

    def read(value: Any) -> Any:
        if not isinstance(value, list):
            raise _expect(_LIST, value)
        found: list[Any] = []
        try:
            for item in value:
                found.append(inner(item))  # noqa: PERF401 - on an error, its length is the index of the item
        except InvalidField as problem:
            problem.path.append(len(found))
            raise
        return make(found)

    return _LIST, read


def _fixed(hints: tuple[Any, ...]) -> tuple[str, _Reader]:
    readers = [_reader(hint)[1] for hint in hints]

    def read(value: Any) -> Any:
        if not isinstance(value, list) or len(value) != len(readers):
            raise _expect(f"a list of {len(readers)} entries", value)
        found: list[Any] = []
        try:
            for inner, item in zip(readers, value, strict=True):
                found.append(inner(item))
        except InvalidField as problem:
            problem.path.append(len(found))
            raise
        return tuple(found)

    return f"a list of {len(readers)} entries", read


def _mapping(hint: Any) -> tuple[str, _Reader]:
    _, inner = _reader(hint)
    _, text = _reader(str)

    def read(value: Any) -> Any:
        if not isinstance(value, dict):
            raise _expect(_OBJECT, value)
        found = {}
        for key, item in value.items():
            try:
                found[text(key)] = inner(item)
            except InvalidField as problem:
                problem.path.append(key)
                raise
        return found

    return _OBJECT, read


def _dataclass(cls: Any) -> tuple[str, _Reader]:
    hints = get_type_hints(cls, include_extras=True)
    names = {item.name: _reader(hints[item.name]) for item in fields(cls) if item.init}
    required = [
        item.name for item in fields(cls) if item.init and item.default is MISSING and item.default_factory is MISSING
    ]

    def read(value: Any) -> Any:
        if not isinstance(value, dict):
            raise _expect(_OBJECT, value)
        found = {}
        for key, item in value.items():
            if key not in names:
                unknown = "is an unknown field (upgrade edgelm if a newer one wrote this file)"
                raise InvalidField(unknown, key, unknown=True)
            try:
                found[key] = names[key][1](item)
            except InvalidField as problem:
                problem.path.append(key)
                raise
        for key in required:
            if key not in found:
                raise InvalidField(f"is missing, expected {names[key][0]}", key)
        return cls(**found)

    return _OBJECT, read
