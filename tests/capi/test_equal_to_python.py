"""Do C and Python give the same logits, bit for bit, and the same tokens and texts?"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import Model

import edgelm
from edgelm.bundle.kv_cache import KV_TYPES

CASES = [
    *(("olmoe", "native", kv) for kv in KV_TYPES),
    *(("fox", "native", kv) for kv in KV_TYPES),
    ("olmoe", "portable", "float32"),
    ("fox", "portable", "float32"),
]
CONVERSATION = [
    {"role": "user", "content": 'Say "hello",\n\tthen \\ 日本 🙂'},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "def f(x):\n    return x"},
]
SAMPLED: list[dict[str, Any]] = [
    {"temperature": 1.0, "seed": 1},
    {"temperature": 0.7, "seed": 2**64 - 1, "top_k": 40, "top_p": 0.9},
    {"temperature": 1.3, "seed": 3, "min_p": 0.05},
    {"temperature": 0.9, "seed": 4, "top_p": 0.8, "repetition_penalty": 1.2},
    {"repetition_penalty": 1.3},
]


def python_logits(model: edgelm.LanguageModel, ids: Sequence[int], positions: int) -> np.ndarray[Any, Any]:
    rows = [block.copy() for block in model.cache.logits_of_last(list(ids), positions)]
    return np.concatenate(rows)


@pytest.mark.parametrize(("name", "ops", "kv"), CASES)
def test_are_logits_and_greedy_tokens_equal(
    name: str, ops: str, kv: str, tiny_bundle: Callable[[str, str, str], Path]
) -> None:
    folder = tiny_bundle(name, "int4", ops)
    with Model(folder, kv=kv, threads=2) as model, edgelm.load(folder, kv=kv, threads=2, chat=False) as python:
        assert model.info.kv == kv.encode()
        prompt = python.tokenizer.encode("import os\n\n\ndef read(path):\n    with open(")
        for _ in range(2):  # the second time with the prompt in the cache
            ours, theirs = model.generate(prompt, max_tokens=48), python.generate(prompt, max_tokens=48)
            assert ours.tokens == theirs.tokens
            assert ours.stop_reason == theirs.stop_reason
            assert ours.reused == theirs.timings.reused_tokens
        ids = [*prompt, *ours.tokens]
        # Cached positions, new ones in one step, and a single one.
        for wanted, positions in ((ids, len(ids)), (ids[::-1], 3), (ids[::-1], 1)):
            assert np.array_equal(model.logits(wanted, positions), python_logits(python, wanted, positions))


def test_is_a_prompt_of_several_chunks_equal(fox: Path) -> None:
    with Model(fox, threads=2, chunk=64) as model, edgelm.load(fox, threads=2, chat=False) as python:
        python.runtime.chunk = 64
        ids = [(7 * i * i + 3) % 3000 for i in range(150)]
        assert np.array_equal(model.logits(ids), python_logits(python, ids, 1))
        assert model.generate(ids, max_tokens=8).tokens == python.generate(ids, max_tokens=8).tokens


@pytest.mark.parametrize("options", SAMPLED, ids=str)
def test_are_sampled_tokens_equal(model: Model, python: edgelm.LanguageModel, options: dict[str, Any]) -> None:
    prompt = python.tokenizer.encode("class Reader:\n")
    ours = model.generate(prompt, max_tokens=40, **options)
    assert ours.tokens == python.generate(prompt, max_tokens=40, **options).tokens
    assert model.generate(prompt, max_tokens=40, **options).tokens == ours.tokens


def test_is_every_number_of_threads_equal(fox: Path, python: edgelm.LanguageModel) -> None:
    prompt = python.tokenizer.encode("import os")
    with Model(fox, threads=1) as model:
        assert model.info.threads == 1
        assert model.generate(prompt).tokens == python.generate(prompt).tokens


@pytest.mark.parametrize("text", ["import os\n", "größe = '日本 🙂'\n", " x", "</s> after"])
def test_are_texts_equal(model: Model, python: edgelm.LanguageModel, text: str) -> None:
    assert model.tokenize(text) == python.tokenizer.encode(text)
    ours, theirs = model.generate(text, max_tokens=30), python.generate(text, max_tokens=30)
    assert (ours.text, ours.tokens, ours.stop_reason) == (theirs.text, theirs.tokens, theirs.stop_reason)
    shown: list[str] = []
    model.generate(text, max_tokens=30, on_text=shown.append)
    assert shown == list(python.stream(text, max_tokens=30))


def test_are_stop_strings_found_as_in_python(model: Model, python: edgelm.LanguageModel) -> None:
    text = python.generate("import os\n", max_tokens=60).text
    for stops in ([text[10:14]], ["@nowhere@", text[20:21], text[12:25]], [text[-3:] + "x"]):
        shown: list[str] = []
        ours = model.generate("import os\n", max_tokens=60, stop=stops, on_text=shown.append)
        theirs = python.generate("import os\n", max_tokens=60, stop=stops)
        assert (ours.text, ours.tokens, ours.stop_reason) == (theirs.text, theirs.tokens, theirs.stop_reason)
        assert "".join(shown) == ours.text


def test_does_the_chat_answer_as_python_does(model: Model, python: edgelm.LanguageModel) -> None:
    messages = json.dumps(CONVERSATION)
    assert model.info.has_chat_template == 1
    assert model.render_chat(messages) == python.render_chat(CONVERSATION)
    ours, theirs = model.generate(messages, chat=True, max_tokens=20), python.chat(CONVERSATION, max_tokens=20)
    assert (ours.text, ours.tokens) == (theirs.text, theirs.tokens)
    assert ours.timings["prompt_tokens"] == theirs.timings.prompt_tokens


def test_are_the_facts_those_of_the_manifest(model: Model, python: edgelm.LanguageModel) -> None:
    info, manifest = model.info, python.bundle.manifest
    assert (info.name, info.family) == (manifest.model.name.encode(), manifest.model.family.encode())
    assert (info.recipe, info.target, info.operators) == (manifest.recipe.name.encode(), b"cpu", b"native")
    assert (info.runtime, info.kv) == (python.runtime.name.encode(), b"float16")
    assert (info.vocab_size, info.context_length) == (python.runtime.vocab_size, python.runtime.context_length)
    assert (info.model_context_length, info.num_layers) == (manifest.model.context_length, manifest.model.num_layers)
    assert (info.num_experts, info.experts_per_token) == (0, 0)
    assert info.eos_ids[: info.eos_count] == list(manifest.tokens.eos_ids)
    assert (info.bos_id, info.pad_id) == (manifest.tokens.bos_id, manifest.tokens.pad_id)
    assert info.tokenizer_problem is None


def test_do_streamed_texts_join_to_the_whole_text(model: Model, python: edgelm.LanguageModel) -> None:
    for text in ("größe = '日本 🙂'\n", "", "  a  b"):
        ids = python.tokenizer.encode(text)
        for skip in (True, False):
            assert model.detokenize(ids, skip) == python.tokenizer.decode(ids, skip_special=skip)
            assert "".join(model.detokenize_streamed(ids, skip)) == model.detokenize(ids, skip)
