"""Does an invalid document give an error of one line that names the field?"""

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pytest

from edgelm.errors import BundleError
from edgelm.json_dataclass import (
    Count,
    ErrorFactory,
    InvalidField,
    Length,
    OneOf,
    Range,
    StrEnum,
    convert,
    from_data,
    parse,
    read_bytes,
    require_format,
    shown,
)

ERRORS = ErrorFactory(BundleError, "make it again")


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True)
class Inner:
    width: Annotated[int, Range(1, 64)]
    ratio: float = 1.0


@dataclass(frozen=True)
class Outer:
    name: str
    flag: bool
    inner: Inner
    many: tuple[Inner, ...] = ()
    pair: tuple[str, Count] = ("", 0)
    sizes: dict[str, Count] = field(default_factory=dict)
    kind: Annotated[str, OneOf(("a", "b"))] = "a"
    colour: Colour = Colour.RED
    maybe: Annotated[int, Range(0, 9)] | None = None
    value: int | float | str = 0
    scale: Annotated[float, Range(0)] = 1.0


GOOD = {"name": "x", "flag": True, "inner": {"width": 3}}


def test_valid_data_is_read():
    data = {
        **GOOD,
        "many": [{"width": 1, "ratio": 2}, {"width": 64}],
        "pair": ["p", 7],
        "sizes": {"é": 1},
        "kind": "b",
        "colour": "blue",
        "maybe": None,
        "value": 1.5,
    }
    found = from_data(Outer, data, "f.json", ERRORS)
    assert found == Outer(
        "x", True, Inner(3), (Inner(1, 2.0), Inner(64)), ("p", 7), {"é": 1}, "b", Colour.BLUE, None, 1.5
    )
    assert type(found.many[0].ratio) is float


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": 1}, "name is 1, expected a text"),
        ({"name": None}, "name is null, expected a text"),
        ({"name": "\ud800"}, "name holds half of a surrogate pair"),
        ({"flag": 1}, "flag is 1, expected true or false"),
        ({"flag": "true"}, 'flag is "true" (a string), expected true or false'),
        ({"inner": []}, "inner is a list, expected an object"),
        ({"inner": {}}, "inner.width is missing, expected a whole number from 1 to 64"),
        ({"inner": {"width": "12"}}, 'inner.width is "12" (a string), expected a whole number from 1 to 64'),
        ({"inner": {"width": True}}, "inner.width is true, expected a whole number from 1 to 64"),
        ({"inner": {"width": 1.0}}, "inner.width is 1.0, expected a whole number from 1 to 64"),
        ({"inner": {"width": 0}}, "inner.width is 0, expected"),
        ({"inner": {"width": 65}}, "inner.width is 65, expected"),
        ({"inner": {"width": 2**200}}, "inner.width is a number of 201 bits, expected"),
        ({"inner": {"width": 1, "ratio": 10**400}}, "inner.ratio is a number of 1329 bits, expected a number"),
        ({"inner": {"width": 1, "ratio": float("nan")}}, "inner.ratio is nan, expected a number"),
        ({"many": [{"width": 1}, {"width": 1, "x": 0}]}, "many[1].x is an unknown field (upgrade"),
        ({"many": {}}, "many is an object, expected a list"),
        ({"pair": ["p"]}, "pair is a list, expected a list of 2 entries"),
        ({"pair": ["p", -1]}, "pair[1] is -1, expected a whole number from 0 to"),
        ({"sizes": {"a.b": "1"}}, 'sizes.a.b is "1" (a string)'),
        ({"sizes": {"\x1b": -1}}, r'sizes."\u001b" is -1'),
        ({"kind": "c"}, 'kind is "c" (a string), expected "a" or "b"'),
        ({"colour": 1}, 'colour is 1, expected "red" or "blue"'),
        ({"maybe": 10}, "maybe is 10, expected a whole number from 0 to 9 or null"),
        ({"value": []}, "value is a list, expected a whole number or a number or a text"),
        ({"value": True}, "value is true, expected"),
        ({"scale": -0.5}, "scale is -0.5, expected a number of 0 or more"),
        ({"extra": 1}, "extra is an unknown field"),
    ],
)
def test_invalid_values_are_named_with_their_path(change, said):
    with pytest.raises(BundleError) as caught:
        from_data(Outer, GOOD | change, "f.json", ERRORS)
    message = str(caught.value)
    assert message.startswith(f"f.json: {said}")
    assert message.endswith(": make it again")
    assert "\n" not in message


@pytest.mark.parametrize("data", [None, [], 1, "x"])
def test_a_document_of_a_wrong_type_is_refused(data):
    with pytest.raises(BundleError, match=r"f.json: it is .*, expected an object"):
        from_data(Outer, data, "f.json", ERRORS)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff{}", "not valid JSON ('utf-8' codec"),
        (b'{"a": 1, "b": 2, "a": 3}', 'the key "a" is there twice'),
        (b"[NaN]", "NaN is not a number"),
        (b"[-Infinity]", "-Infinity is not a number"),
        (b"[1e999]", "the number 1e999 is too large"),
        (b"[" + b"1" * 5000 + b"]", "not valid JSON (Exceeds the limit"),
        (b"[" * 65 + b"]" * 65, "nested more than 64 deep"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"[" * 2_000_000 + b"]" * 2_000_000, "nested too deeply"),
    ],
)
def test_text_that_is_not_json_is_refused(text, said):
    with pytest.raises(BundleError) as caught:
        parse(text, "f.json", ERRORS)
    assert str(caught.value).startswith("f.json: not valid JSON")
    assert said in str(caught.value)


def test_nesting_up_to_the_limit_is_read():
    value = parse(b"[" * 64 + b"]" * 64, "f.json", ERRORS)
    assert json.dumps(value) == "[" * 64 + "]" * 64


def test_infinite_numbers_are_allowed_in_documents_of_others():
    assert parse(b"[Infinity]", "f.json", ERRORS, finite=False) == [float("inf")]


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("1", 'is "1" (a string), this EdgeLM reads 1: make it again'),
        (1.0, "is 1.0, this EdgeLM reads 1: make it again"),
        (True, "is true, this EdgeLM reads 1: make it again"),
        (0, "is 0, this EdgeLM reads 1: make it again"),
        (2, "is 2, this EdgeLM reads 1: upgrade edgelm"),
        (None, "is null, this EdgeLM reads 1: make it again"),
    ],
)
def test_format_versions_are_compared_with_their_type(version, said):
    with pytest.raises(BundleError) as caught:
        require_format({"format": version}, "format", 1, "f.json", ERRORS)
    assert str(caught.value) == f"f.json: format {said}"
    assert require_format({"format": 1}, "format", 1, "f.json", ERRORS) == {"format": 1}
    with pytest.raises(BundleError, match="format is missing, this EdgeLM reads 1"):
        require_format({}, "format", 1, "f.json", ERRORS)


def test_files_that_cannot_be_documents_are_not_read(tmp_path):
    with pytest.raises(BundleError, match="gone: is missing"):
        read_bytes(tmp_path / "gone", ERRORS)
    with pytest.raises(BundleError, match="is a folder, not a file"):
        read_bytes(tmp_path, ERRORS)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BundleError, match="pipe: is not a file"):
        read_bytes(tmp_path / "pipe", ERRORS)
    with (tmp_path / "large").open("wb") as stream:
        stream.truncate(1 << 40)
    start = time.process_time()
    with pytest.raises(BundleError, match="is larger than 8388608 bytes"):
        read_bytes(tmp_path / "large", ERRORS)
    assert time.process_time() - start < 1
    with pytest.raises(BundleError, match="cannot be read"):
        read_bytes(tmp_path / "a\0b", ERRORS)
    (tmp_path / "small").write_bytes(b"{}")
    assert read_bytes(tmp_path / "small", ERRORS) == b"{}"
    assert read_bytes(tmp_path / "small", ERRORS, 2) == b"{}"
    with pytest.raises(BundleError, match="is larger than 1 bytes"):
        read_bytes(tmp_path / "small", ERRORS, 1)


def test_a_system_file_of_size_zero_is_read_up_to_the_limit():
    file = Path("/proc/self/status")
    if not file.is_file():
        pytest.skip("this system has no /proc")
    assert file.stat().st_size == 0
    assert read_bytes(file, ERRORS).startswith(b"Name:")
    with pytest.raises(BundleError, match="is larger than 10 bytes"):
        read_bytes(file, ERRORS, 10)


def test_long_values_are_shown_short_and_in_one_line():
    assert shown("x" * 1000) == f'"{"x" * 60}"... (a string)'
    assert shown("a\nb") == r'"a\nb" (a string)'
    assert len(shown(10**100)) < 80


@dataclass(frozen=True)
class Circle:
    type: Annotated[str, OneOf(("circle",))]
    radius: float


@dataclass(frozen=True)
class Square:
    side: float
    type: Annotated[str, OneOf(("square", "box"))] = "square"


@dataclass(frozen=True)
class Flexible:
    texts: str | list[str] | list[int] | list[list[int]] | None = None
    shapes: list[Circle | Square] = field(default_factory=list)
    few: Annotated[list[Annotated[str, Length(1, 3)]], Length(0, 2)] = field(default_factory=list)
    never: Annotated[bool, OneOf((False,))] | None = None
    whatever: Any = None
    choice: Annotated[str, OneOf(("auto", "none"))] | Circle | None = None


def test_unions_of_lists_and_of_objects_are_read():
    for texts in ("a", ["a", "b"], [1, 2], [[1], [2, 3]], [], None):
        assert convert(Flexible, {"texts": texts}).texts == texts
    shapes = [{"type": "circle", "radius": 1}, {"type": "box", "side": 2}, {"side": 3}]
    assert convert(Flexible, {"shapes": shapes}).shapes == [Circle("circle", 1.0), Square(2.0, "box"), Square(3.0)]
    found = convert(Flexible, {"few": ["abc", "a"], "never": False, "whatever": [{"a": None}], "choice": "auto"})
    assert found == Flexible(few=["abc", "a"], never=False, whatever=[{"a": None}], choice="auto")
    assert convert(Flexible, {"choice": {"type": "circle", "radius": 2}}).choice == Circle("circle", 2.0)


@pytest.mark.parametrize(
    ("data", "path", "said"),
    [
        ({"texts": 5}, "texts", "is 5, expected a text or a list or null"),
        ({"texts": [1, "a"]}, "texts[1]", 'is "a" (a string), expected a whole number'),
        ({"texts": ["a", 1]}, "texts[1]", "is 1, expected a text"),
        ({"texts": [[1], [2, "x"]]}, "texts[1][1]", 'is "x" (a string), expected a whole number'),
        ({"shapes": [{"type": "circle"}]}, "shapes[0].radius", "is missing, expected a number"),
        (
            {"shapes": [{"type": "line"}]},
            "shapes[0].type",
            'is "line" (a string), expected "circle" or "square" or "box"',
        ),
        ({"shapes": [{"type": ["circle"]}]}, "shapes[0].type", 'is a list, expected "circle" or "square" or "box"'),
        ({"shapes": [3]}, "shapes[0]", "is 3, expected an object"),
        ({"few": ["abcd"]}, "few[0]", "has 4 characters, expected a text of 1 to 3 characters"),
        ({"few": ["a", "b", "c"]}, "few", "has 3 entries, expected a list of 0 to 2 entries"),
        ({"few": 1}, "few", "is 1, expected a list of 0 to 2 entries"),
        ({"never": True}, "never", "is true, expected false or null"),
        ({"never": 0}, "never", "is 0, expected false or null"),
        ({"choice": "x"}, "choice", 'is "x" (a string), expected "auto" or "none" or an object or null'),
        ({"choice": {"type": "circle"}}, "choice.radius", "is missing, expected a number"),
    ],
)
def test_an_alternative_that_does_not_fit_is_named(data, path, said):
    with pytest.raises(InvalidField) as raised:
        convert(Flexible, data)
    assert (raised.value.field, raised.value.problem, raised.value.unknown) == (path, said, False)


def test_an_unknown_field_is_told_apart_from_a_wrong_one():
    with pytest.raises(InvalidField) as raised:
        convert(Flexible, {"shapes": [{"type": "circle", "radius": 1, "colour": 2}]})
    assert raised.value.unknown
    assert raised.value.field == "shapes[0].colour"


@dataclass(frozen=True)
class Line:
    type: Annotated[str, OneOf(("line",))]


def test_a_missing_type_is_named_where_no_alternative_has_a_default():
    @dataclass(frozen=True)
    class Holder:
        shape: Circle | Line

    with pytest.raises(InvalidField, match=r'shape\.type is missing, expected "circle" or "line"'):
        convert(Holder, {"shape": {}})
