"""Does the page of the manifest have every key, with its type?"""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgelm.bundle import Manifest
from edgelm.export import ExportOptions, export_bundle

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reference" / "manifest.md"
ROW = re.compile(r"^\| `(?P<key>[\w.\[\]*]+)` \| (?P<type>[^|]+) \| [^|]+ \| (?:`(?P<example>.+)` )?\|$", re.MULTILINE)
ROWS = {row["key"]: row for row in ROW.finditer(PAGE.read_text(encoding="utf-8"))}
JSON_TYPES = {
    "text": str, "integer": int, "true or false": bool, "true": bool, "object": dict, "list": list,
    "list of integers": list, "list of texts": list,
}  # fmt: skip


def keys_of(cls: type, prefix: str = "") -> Iterator[str]:
    """Every key that JSON of the dataclass may have; `*` for any name, `[]` for an entry of a list."""
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        key = f"{prefix}{item.name}"
        hint = hints[item.name]
        inner = [part for part in typing.get_args(hint) if isinstance(part, type)]
        kind = typing.get_origin(hint)
        if kind in (types.UnionType, typing.Union):
            hint = inner[0]
        if kind is dict:
            if key not in ("files", "tools"):  # whose sections have no row of their own in the others
                yield key
            value = typing.get_args(hint)[1]
            yield from keys_of(value, f"{key}.*.") if dataclasses.is_dataclass(value) else [f"{key}.*"]
        elif kind is tuple and inner and dataclasses.is_dataclass(inner[0]):
            yield key
            yield from keys_of(inner[0], f"{key}[].")
        else:
            yield key
            if dataclasses.is_dataclass(hint):
                yield from keys_of(typing.cast(type, hint), f"{key}.")


def test_the_page_has_every_key_and_no_other() -> None:
    counts = {"calibration.methods.*"}  # an object of numbers, which its own row describes
    assert set(ROWS) - {"files", "tools"} == set(keys_of(Manifest)) - counts


def values_of(data: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in data.items():
        key = f"{prefix}{name}"
        if key not in ROWS and f"{prefix}*" in ROWS:
            key = f"{prefix}*"
        if key not in ROWS and any(row.startswith(f"{prefix}*.") for row in ROWS):
            yield from values_of(value, f"{prefix}*.")
            continue
        yield key, value
        if isinstance(value, dict) and key != "calibration.methods":
            yield from values_of(value, f"{key}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for entry in value:
                yield from values_of(entry, f"{key}[].")


@pytest.mark.parametrize("ops", ["native", "portable"])
def test_an_exported_manifest_has_the_keys_and_types_of_the_page(ops: str, tmp_path: Path) -> None:
    checkpoint = ROOT / "examples" / "checkpoints" / "olmoe-tiny"
    export_bundle(checkpoint, tmp_path / "bundle", options=ExportOptions(ops=ops))
    data = json.loads((tmp_path / "bundle" / "manifest.json").read_text(encoding="utf-8"))
    seen = set()
    for key, value in values_of(data):
        assert key in ROWS, f"{PAGE.name} has no row for {key}, say of {value!r}"
        kind = ROWS[key]["type"].removesuffix(", optional").strip()
        if value is None:
            assert kind.endswith(" or null"), f"{key} is null"
        else:
            expected = JSON_TYPES[kind.removesuffix(" or null")]
            assert type(value) is expected, f"{key} is {value!r}, and the page says {kind}"
        seen.add(key)
    required = {key for key, row in ROWS.items() if not row["type"].strip().endswith("optional")}
    under_optional = ("calibration.", "requires[]")
    assert {key for key in required if not key.startswith(under_optional)} <= seen


@pytest.mark.parametrize("key", [key for key, row in ROWS.items() if row["example"]])
def test_an_example_has_the_type_of_its_row(key: str) -> None:
    example = json.loads(ROWS[key]["example"])
    kind = ROWS[key]["type"].removesuffix(", optional").strip().removesuffix(" or null")
    assert type(example) is JSON_TYPES[kind]
