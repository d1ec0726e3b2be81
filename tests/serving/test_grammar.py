"""Do answers under a grammar always match it, with every kind of tokenizer, and is every bad grammar refused?"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from marked_folders import ROWS, marked
from numpy.typing import NDArray
from serving_client import Asked

from edgelm.errors import EdgeLMError, GenerationError, GenerationTypeError, GenerationValueError
from edgelm.serving.constraints import Grammar, GrammarTokenizer, grammar_for, json_schema, vocabulary
from edgelm.serving.engine import Engine
from edgelm.tokenization.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from tokenizer_folders import KINDS, example, llama, olmoe

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["cat", "dog", None]},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "maxItems": 3},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
    "$defs": {"tag": {"type": "string", "pattern": "^[a-c]{1,3}$"}},
}
EngineOf = Callable[..., Engine]


def schema(given: object, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": given, **more}}


def lark(text: str) -> dict[str, Any]:
    return {"type": "grammar", "grammar": text}


def is_person(text: str) -> bool:
    found = json.loads(text)
    assert list(found) == ["name", "age", "kind", "tags"]
    assert isinstance(found["name"], str) and len(found["name"]) <= 8
    assert type(found["age"]) is int and 0 <= found["age"] <= 120
    assert found["kind"] in ("cat", "dog", None) and len(found["tags"]) <= 3
    assert all(re.fullmatch("[a-c]{1,3}", tag) for tag in found["tags"])
    return text.startswith("{") and text.endswith("}")


MATCHES: dict[str, tuple[Any, Callable[[str], Any]]] = {
    "schema": (schema(PERSON), is_person),
    "object": ({"type": "json_object"}, lambda text: isinstance(json.loads(text), dict)),
    "regex": (
        {"type": "regex", "regex": " [a-c]{2,4} the (é|漢|\n)[0-9]?"},
        lambda text: re.fullmatch(" [a-c]{2,4} the (é|漢|\n)[0-9]?", text),
    ),
    "lark": (
        lark('start: "the" (" " NAME)+ "."\nNAME: /[A-Z][a-z]{0,3}/'),
        lambda text: re.fullmatch("the( [A-Z][a-z]{0,3})+[.]", text),
    ),
}


def random_text(tokenizer: GrammarTokenizer, grammar: Grammar, seed: int, most: int = 400) -> str | None:
    """Return the text of random tokens that a grammar allows; None if it did not end."""
    rng, rule, text = np.random.default_rng(seed), grammar.rule(), tokenizer.tokenizer.detokenizer()
    ends, pieces = sorted(tokenizer.end_ids), []
    for _ in range(most):
        logits = rng.normal(size=tokenizer.vocab_size).astype(np.float32)
        logits[ends] += 3
        token = int(rule.apply(logits).argmax())
        rule.accept(token)
        if token in tokenizer.end_ids:
            return "".join(pieces) + text.flush()
        assert token < tokenizer.tokenizer.vocab_size and token not in tokenizer.tokenizer.special
        pieces.append(text.push(token))
    return None


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], GrammarTokenizer]:
    """Function that returns the vocabulary of a kind of tokenizer, with more logits than tokens."""
    root, made = tmp_path_factory.mktemp("tokenizers"), dict[str, GrammarTokenizer]()
    kinds = {
        **KINDS,
        "llama": llama,
        "olmoe_tiny": lambda folder: example(folder, "olmoe-tiny"),
        "fox_tiny": lambda folder: example(folder, "fox-tiny"),
    }

    def get(kind: str) -> GrammarTokenizer:
        if kind not in made:
            tokenizer = Tokenizer.from_folder(kinds[kind](root / kind))
            made[kind] = GrammarTokenizer(tokenizer, tokenizer.eos_ids, tokenizer.vocab_size + 37)
        return made[kind]

    return get


@pytest.mark.parametrize("kind", [*KINDS, "llama", "olmoe_tiny", "fox_tiny"])
@pytest.mark.parametrize("form", MATCHES)
def test_does_random_text_match(tokenizers: Callable[[str], GrammarTokenizer], kind: str, form: str) -> None:
    response_format, matches = MATCHES[form]
    tokenizer = tokenizers(kind)
    grammar = grammar_for(response_format, tokenizer)
    assert grammar is not None
    texts = [random_text(tokenizer, grammar, seed) for seed in range(12)]
    ended = [text for text in texts if text is not None]
    assert len(ended) >= 6
    for text in ended:
        assert matches(text), (kind, text)


@pytest.mark.parametrize(("model", "recipe"), [("olmoe", "int4"), ("fox", "int8")])
def test_do_trained_models_write_valid_json(engine_of: EngineOf, model: str, recipe: str) -> None:
    engine = engine_of(model, recipe, "native")
    loaded = engine.model
    tokenizer = GrammarTokenizer(loaded.tokenizer, loaded.end_ids, loaded.runtime.vocab_size)
    grammar = grammar_for(schema(PERSON), tokenizer)
    assert grammar is not None
    prompt = loaded.tokenizer.encode("Once upon a time there was a cat:")
    options = [{}, *({"temperature": 1.5, "seed": seed} for seed in range(24)), {"repetition_penalty": 1.3}]
    asked = [Asked(engine, prompt, rules=[grammar.rule()], max_tokens=300, **given) for given in options]
    for one in asked:
        engine.submit(one.job)
    results = [one.result for one in asked]
    ended = [result for result in results if result.stop_reason == "eos"]
    assert len(ended) >= 20
    assert all(is_person(result.text) for result in ended)
    assert len({result.text for result in ended}) > 10
    # The end of the context or of max_tokens ends an incomplete text, as everywhere.
    short = Asked(engine, prompt, rules=[grammar.rule()], max_tokens=3)
    engine.submit(short.job)
    assert short.result.stop_reason == "length"


class Forbidden:
    """A rule that forbids tokens."""

    def __init__(self, tokens: NDArray[np.int64]) -> None:
        self._tokens = tokens

    def apply(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        changed = logits.copy()
        changed[self._tokens] = -np.inf
        return changed

    def accept(self, token: int) -> None:
        assert token not in self._tokens


def test_do_other_sequences_go_on_when_one_cannot(engine_of: EngineOf) -> None:
    engine = engine_of()
    loaded = engine.model
    tokenizer = GrammarTokenizer(loaded.tokenizer, loaded.end_ids, loaded.runtime.vocab_size)
    grammar = grammar_for({"type": "regex", "regex": "ab"}, tokenizer)
    assert grammar is not None
    prompt = loaded.tokenizer.encode("Hello")
    stuck = Asked(
        engine, prompt, rules=[Forbidden(np.flatnonzero(grammar.rule().allowed())), grammar.rule()], max_tokens=20
    )
    free = Asked(engine, prompt, rules=[grammar.rule()], max_tokens=20)
    for one in (stuck, free):
        engine.submit(one.job)
    with pytest.raises(GenerationError, match="forbidden by other options"):
        _ = stuck.result
    result = free.result
    assert (result.text, result.stop_reason) == ("ab", "eos")


def masks(grammar: Grammar, tokenizer: Tokenizer, text: str) -> Iterator[NDArray[np.bool_]]:
    """Yield the allowed tokens before each token of a text, and after the last."""
    rule = grammar.rule()
    for token in tokenizer.encode(text, add_bos=False):
        yield rule.allowed()
        rule.accept(token)
    yield rule.allowed()


def test_are_only_end_tokens_allowed_after_the_end(tokenizers: Callable[[str], GrammarTokenizer]) -> None:
    for kind in KINDS:
        tokenizer = tokenizers(kind)
        grammar = grammar_for({"type": "regex", "regex": "the"}, tokenizer)
        assert grammar is not None
        *_, last = masks(grammar, tokenizer.tokenizer, "the")
        assert set(np.flatnonzero(last).tolist()) == tokenizer.end_ids, kind


@pytest.mark.parametrize("special", [False, True])
def test_do_special_tokens_never_stand_for_their_text(tmp_path: Path, special: bool) -> None:
    tokenizer = Tokenizer.from_folder(marked(tmp_path / "tokenizer", special=special))
    words = GrammarTokenizer(tokenizer, tokenizer.eos_ids, ROWS)
    marker = tokenizer.token_id("<tool_call>")
    assert marker is not None and (marker in tokenizer.special) is special
    for given in ({"type": "regex", "regex": "<tool_call>|<\\|endoftext\\|>"}, {"type": "regex", "regex": "(.|\n)+"}):
        grammar = grammar_for(given, words)
        assert grammar is not None
        allowed = grammar.rule().allowed()
        assert allowed[marker] == (not special)
        assert not allowed[[index for index in tokenizer.special if index not in words.end_ids]].any()
        assert not allowed[sorted(words.end_ids)].any()
        assert not allowed[tokenizer.vocab_size :].any()


def test_can_a_grammar_name_special_tokens(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(marked(tmp_path / "tokenizer", special=True))
    words = GrammarTokenizer(tokenizer, tokenizer.eos_ids, ROWS)
    marker = tokenizer.token_id("<tool_call>")
    for text in (f'start: <[{marker}]> "x"', 'start: <tool_call> "x"'):
        grammar = grammar_for(lark(text), words)
        assert grammar is not None
        assert np.flatnonzero(grammar.rule().allowed()).tolist() == [marker]
    # A negated terminal matches any bytes, and is no way around.
    grammar = grammar_for(lark('start: TEXT "q"\nTEXT: ~/(?s:.*)q(?s:.*)/'), words)
    assert grammar is not None
    assert not grammar.rule().allowed()[sorted(tokenizer.special)].any()


def test_does_a_rule_leave_logits_as_they_are(tokenizers: Callable[[str], GrammarTokenizer]) -> None:
    tokenizer = tokenizers("olmoe")
    grammar = grammar_for({"type": "json_object"}, tokenizer)
    assert grammar is not None
    logits = np.random.default_rng(0).normal(size=tokenizer.vocab_size).astype(np.float32)
    before, rule = logits.copy(), grammar.rule()
    changed = rule.apply(logits)
    allowed = rule.allowed()
    assert np.array_equal(logits, before)
    assert np.array_equal(changed[allowed], before[allowed]) and np.isneginf(changed[~allowed]).all()
    assert changed.dtype == np.float32 and 0 < allowed.sum() < tokenizer.vocab_size / 2
    # Rules of one grammar do not share state.
    rule.accept(int(changed.argmax()))
    assert np.array_equal(grammar.rule().allowed(), allowed)


def test_does_a_text_without_tokens_fail_alone(tmp_path: Path) -> None:
    small = Tokenizer.from_folder(olmoe(tmp_path / "small", 150))  # lacks some bytes
    words = GrammarTokenizer(small, small.eos_ids, 150)
    with pytest.raises(GenerationValueError, match="regex: the grammar cannot go on: no token of the vocabulary"):
        grammar_for({"type": "regex", "regex": "漢"}, words)
    grammar = grammar_for({"type": "regex", "regex": "[a-b]漢"}, words)
    assert grammar is not None
    rule = grammar.rule()
    rule.accept(int(np.flatnonzero(rule.allowed())[0]))
    with pytest.raises(GenerationError, match="cannot go on: no token of the vocabulary has the characters"):
        rule.apply(np.zeros(150, np.float32))
    # A token that the grammar forbids shows in the next step.
    rule = grammar.rule()
    rule.accept(small.encode("z", add_bos=False)[0])
    with pytest.raises(GenerationError, match="the grammar cannot go on: "):
        rule.apply(np.zeros(150, np.float32))


WRONG: list[tuple[Any, type[EdgeLMError], str]] = [
    (5, GenerationTypeError, 'response_format is 5: it has to be an object such as {"type": "json_object"}'),
    ({}, GenerationTypeError, "response_format.type is missing"),
    ({"type": "xml"}, GenerationValueError, "response_format.type is 'xml': it has to be one of text, json_object, "),
    ({"type": "json_schema"}, GenerationTypeError, "response_format.json_schema is missing"),
    ({"type": "json_schema", "json_schema": {}}, GenerationTypeError, "response_format.json_schema.schema is missing"),
    (schema([]), GenerationTypeError, "json_schema.schema is []: it has to be a JSON schema, an object"),
    (schema({}, strict="yes"), GenerationTypeError, "strict is 'yes': it has to be true or false"),
    (schema({"type": "text"}), GenerationValueError, "json_schema.schema, at #: invalid type: text"),
    (
        schema({"properties": {"a/b": {"items": {"not": {}}, "type": "array"}}}),
        GenerationValueError,
        'schema, at #/properties/a~1b/items: the keyword "not" cannot be enforced: leave it out',
    ),
    (
        schema({"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"uniqueItems": True, "contains": {}}]}}}),
        GenerationValueError,
        'schema, at #/$defs/a/anyOf/0: the keywords "contains" and "uniqueItems" cannot be enforced: leave them out',
    ),
    (
        schema({"allOf": [{"properties": {"at": {"type": "string", "format": "zip"}}}]}),
        GenerationValueError,
        'schema, at #/allOf/0/properties/at: the format "zip" cannot be enforced: leave it out',
    ),
    (schema({"oneOf": [{"minLength": 1}, {"minLength": 2}]}), GenerationValueError, 'which may overlap: use "anyOf"'),
    (schema({"$ref": "https://a.example/b"}), GenerationValueError, 'a "$ref" leads out of the schema'),
    (schema({"$ref": "#/$defs/a"}), GenerationValueError, "at #: pointer '/$defs/a' does not exist"),
    (schema({"pattern": "a(?=b)"}), GenerationValueError, "at #: its pattern cannot be used: look-around"),
    (schema({"const": 1, "type": "string"}), GenerationValueError, "at #: unsatisfiable schema"),
    (schema({"not": {}, "x-guidance": {"lenient": True}}), GenerationValueError, 'the keyword "not" cannot be'),
    (schema({"enum": ["x" * 70_000]}), GenerationValueError, "schema has 70014 bytes, more than the limit of 65536"),
    (schema({"const": float("nan")}), GenerationValueError, "schema is not JSON: Out of range float values"),
    (schema({"const": "\ud800"}), GenerationValueError, "schema is not JSON: 'utf-8' codec can't encode"),
    ({"type": "regex"}, GenerationTypeError, "response_format.regex is missing"),
    ({"type": "regex", "regex": 1}, GenerationTypeError, "response_format.regex is 1: it has to be a string"),
    ({"type": "regex", "regex": "("}, GenerationValueError, "response_format.regex: unclosed group"),
    ({"type": "regex", "regex": r"\bx"}, GenerationValueError, "response_format.regex: invalid regex"),
    ({"type": "regex", "regex": "a" * 70_000}, GenerationValueError, "regex has 70000 characters, more than the limit"),
    ({"type": "regex", "regex": "\udc00"}, GenerationValueError, "regex is not valid Unicode at character 0"),
    (lark(""), GenerationValueError, "response_format.grammar: Empty grammar"),
    (lark('a: "b"'), GenerationValueError, "response_format.grammar: no start rule found"),
    (lark('start: a\na: "a" foo'), GenerationValueError, 'grammar: line 2, column 4: unknown name: "foo"'),
    (lark('start: <nope> "x"'), GenerationValueError, 'unknown special token: "<nope>"'),
]  # fmt: skip


@pytest.mark.parametrize(("given", "kind", "said"), WRONG)
def test_are_wrong_formats_refused_in_one_line(
    tokenizers: Callable[[str], GrammarTokenizer], given: Any, kind: type[EdgeLMError], said: str
) -> None:
    with pytest.raises(kind) as caught:
        grammar_for(given, tokenizers("olmoe_tiny"))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_is_plain_text_no_grammar(tokenizers: Callable[[str], GrammarTokenizer]) -> None:
    assert grammar_for(None, tokenizers("olmoe_tiny")) is None
    assert grammar_for({"type": "text"}, tokenizers("olmoe_tiny")) is None


def test_are_deep_schemas_refused(tokenizers: Callable[[str], GrammarTokenizer]) -> None:
    deep: dict[str, Any] = {}
    for _ in range(5000):
        deep = {"items": deep}
    with pytest.raises(GenerationValueError, match="nested more than 64 levels deep"):
        grammar_for(schema(deep), tokenizers("olmoe_tiny"))


HOSTILE: dict[str, Any] = {
    "nested repetition": {"type": "regex", "regex": "((.{0,500}x){0,500}y){0,500}"},
    "exponential automaton": {"type": "regex", "regex": "(.|\n)*a(.|\n){30}c"},
    "classes": {"type": "regex", "regex": r"[\p{L}\p{N}]{1,2000}"},
    "long literal": {"type": "regex", "regex": "the people know " * 4000},
    "alternatives": {"type": "regex", "regex": "|".join(f"{i}a{i}" for i in range(5000))},
    "long array": schema({"type": "array", "minItems": 10**6, "items": {"type": "integer"}}),
    "long string": schema({"type": "string", "minLength": 10**9}),
    "many properties": schema({"properties": {f"p{i}": {"type": "string"} for i in range(1500)}}),
    "many values": schema({"enum": [f"v{i}" for i in range(5000)]}),
    "product of alternatives": schema(
        {"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {"type": "null"}}} for j in range(4)]} for i in range(10)]}
    ),
    "multiples": schema({"type": "integer", "multipleOf": 99991, "minimum": 0, "maximum": 10**12}),
    "intersection": lark("start: T\nT: /(.*a.{12})*/ & /(.*b.{12})*/ & /(.*c.{12})*/"),
    "negation": lark("start: T\nT: /(?s:.*)/ & ~/(?s:.*)(a|b).{20}c(?s:.*)/"),
    "repeated rules": lark('start: (x{100}){100}\nx: (y{100}){100}\ny: "a"'),
    "ambiguous": lark('start: s\ns: s s | "a" | s s s | ""'),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_is_the_work_for_hostile_grammars_bounded(tokenizers: Callable[[str], GrammarTokenizer], case: str) -> None:
    tokenizer, rng = tokenizers("olmoe"), np.random.default_rng(1)
    began = time.thread_time()
    try:
        grammar = grammar_for(HOSTILE[case], tokenizer)
        assert grammar is not None
        rule = grammar.rule()
        for _ in range(30):
            token = int(rule.apply(rng.normal(size=tokenizer.vocab_size).astype(np.float32)).argmax())
            rule.accept(token)
    except GenerationError as error:
        assert "\n" not in str(error)
    assert time.thread_time() - began < 5  # 0.7 s at most when this was written


def test_are_compiled_grammars_kept(
    tokenizers: Callable[[str], GrammarTokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary, "MOST_GRAMMARS", 3)
    tokenizer = tokenizers("olmoe")
    first = grammar_for(schema(PERSON), tokenizer)
    assert grammar_for(schema(PERSON), tokenizer) is first
    for number in range(3):
        grammar_for({"type": "regex", "regex": f"a{number}"}, tokenizer)
    again = grammar_for(schema(PERSON), tokenizer)
    assert again is not first and again is not None


def test_does_a_model_need_an_end_token(tokenizers: Callable[[str], GrammarTokenizer]) -> None:
    with pytest.raises(GenerationValueError, match="needs a token that ends a text"):
        GrammarTokenizer(tokenizers("olmoe").tokenizer, [], 3000)


def test_is_whitespace_between_parts_bounded(tokenizers: Callable[[str], GrammarTokenizer]) -> None:
    tokenizer = tokenizers("plain_byte_level")
    grammar = grammar_for({"type": "json_object"}, tokenizer)
    assert grammar is not None
    encode = tokenizer.tokenizer.encode
    for text, right in (('{ "a": [\n  1,\n  2\n]}', True), ("{  }", False), ("{\n\n}", False), (" {}", False)):
        rule = grammar.rule()
        good = True
        for token in encode(text, add_bos=False):
            good = good and bool(rule.allowed()[token])
            if good:
                rule.accept(token)
        assert good is right, text
    assert json_schema.WHITESPACE
