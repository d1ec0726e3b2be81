"""Do editors, type checkers and the running code agree on the options of generation?"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from test_api_arguments import WRONG

from edgelm.errors import EdgeLMError, GenerationError
from edgelm.generation.options import GenerateOptions, Options
from edgelm.generation.sampling import Sampling

ROOT = Path(__file__).resolve().parents[2]


def test_the_typed_dictionary_equals_the_options_that_are_read() -> None:
    typed = get_type_hints(GenerateOptions)
    hints = {**get_type_hints(Options), **get_type_hints(Sampling)}
    read = {item.name: hints[item.name] for item in (*fields(Options), *fields(Sampling)) if item.name != "sampling"}
    assert typed == {**read, "stop": str | Iterable[str] | None}  # kept as a tuple
    assert not GenerateOptions.__required_keys__
    # The list of invalid values is complete.
    assert set(WRONG) == set(typed)


def test_each_default_equals_omitting_the_option() -> None:
    own = {"max_tokens": Options().max_tokens, "stop": None, "reuse": Options().reuse}
    defaults = {**own, **{item.name: item.default for item in fields(Sampling)}}
    assert set(defaults) == set(get_type_hints(GenerateOptions))
    for name, value in defaults.items():
        assert Options.of({name: value}) == Options.of({}) == Options()


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({"temperature": "1"}, TypeError),
        ({"temperature": None}, TypeError),
        ({"temperature": True}, TypeError),
        ({"temperature": float("nan")}, ValueError),
        ({"temperature": -1}, ValueError),
        ({"top_k": 2.0}, TypeError),
        ({"top_k": -1}, ValueError),
        ({"top_k": 5}, ValueError),
        ({"top_p": [0.5], "temperature": 1}, TypeError),
        ({"top_p": 0, "temperature": 1}, ValueError),
        ({"min_p": 2, "temperature": 1}, ValueError),
        ({"repetition_penalty": 0}, ValueError),
        ({"seed": "1"}, TypeError),
        ({"seed": 2**64}, ValueError),
        ({"max_tokens": 2.5}, TypeError),
        ({"max_tokens": 0}, ValueError),
        ({"stop": 5}, TypeError),
        ({"stop": b"x"}, TypeError),
        ({"stop": ["a", 1]}, TypeError),
        ({"stop": ""}, ValueError),
        ({"reuse": 1}, TypeError),
        ({"temprature": 1}, TypeError),
        ({"": 1}, TypeError),
    ],
)
def test_a_wrong_type_is_a_type_error_and_a_wrong_value_a_value_error(
    given: dict[str, Any], kind: type[Exception]
) -> None:
    with pytest.raises(kind) as caught:
        Options.of(given)
    assert isinstance(caught.value, GenerationError)
    assert isinstance(caught.value, TypeError) != isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("temprature", "temperature"), ("max_new_tokens", "max_tokens"), ("topk", "top_k"), ("stops", "stop")],
)
def test_a_mistyped_name_gets_a_suggestion(name: str, meant: str) -> None:
    with pytest.raises(
        EdgeLMError, match=rf"no option '{name}' \(did you mean {meant}\?\); there are: max_tokens, stop"
    ):
        Options.of({name: 1})


RIGHT = """
import asyncio
from typing import Any
import edgelm

def right(model: edgelm.LanguageModel, loose: dict[str, Any], options: edgelm.GenerateOptions) -> str:
    result: edgelm.Generation = model.generate("x", max_tokens=None, temperature=1, seed=None, stop=["a", "b"])
    for piece in model.stream([1, 2], stop="a", top_p=0.5, **loose):
        print(piece.upper())
    model.chat([{"role": "user", "content": "x"}], min_p=0.1, repetition_penalty=1.1)
    many: list[edgelm.Generation] = model.generate_many(["x", [1]], batch=2, each=[{"seed": 1}, options], top_k=4)
    return result.text + many[0].text + model.generate("x", **options).text

async def later(model: edgelm.LanguageModel) -> None:
    async for piece in model.chat_stream([{"role": "user", "content": "x"}], max_tokens=3):
        print(piece.upper())
    print((await model.generate_async("x", seed=3)).stop_reason)
"""
WRONG_CALLS = """
import edgelm

async def wrong(model: edgelm.LanguageModel) -> None:
    model.generate("x", temprature=1.0)  # refused
    model.generate("x", temperature="hot")  # refused
    model.stream("x", max_tokens=1.5)  # refused
    model.stream(5)  # refused
    model.chat([{"role": "user"}], top_k=None)  # refused
    model.chat_stream([{"role": "user"}], stop=3)  # refused
    model.generate_many(["x"], each=[{"sed": 1}])  # refused
    model.generate_many(["x"], sed=1)  # refused
    await model.generate_async("x", seed="1")  # refused
    await model.chat_async([], topp=1)  # refused
    options: edgelm.GenerateOptions = {"max_token": 3}  # refused
"""


def test_mypy_accepts_valid_calls_and_refuses_invalid_ones(tmp_path: Path) -> None:
    (tmp_path / "right.py").write_text(RIGHT)
    (tmp_path / "wrong.py").write_text(WRONG_CALLS)
    subprocess.run(["make", "-s", "pyview"], cwd=ROOT, check=True)
    view = ROOT / "build" / "pyview"
    # In that folder, to use the cache of `make types`.
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "--no-error-summary"]
    done = subprocess.run(
        [*command, str(tmp_path / "right.py"), str(tmp_path / "wrong.py")],
        cwd=view, capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = {line for line in done.stdout.splitlines() if " error: " in line}
    places = {(Path(line.split(":")[0]).name, int(line.split(":")[1])) for line in found}
    wanted = {("wrong.py", n) for n, line in enumerate(WRONG_CALLS.splitlines(), 1) if line.endswith("# refused")}
    assert len(wanted) == 11
    assert places == wanted, done.stdout + done.stderr
