"""What the C library refuses, with which code and which words."""

from __future__ import annotations

import ctypes
import json
import shutil
from ctypes import byref, c_int, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import pytest
from harness import (
    Error,
    GenerateOptions,
    Info,
    Model,
    OpenOptions,
    ParityOptions,
    Timings,
    call,
    ids_of,
    library,
    onnxruntime,
    sized,
)

import edgelm

NULL = c_void_p()


def refused(code: str, words: str, name: str, *arguments: Any) -> None:
    with pytest.raises(Error) as error:
        call(name, *arguments)
    assert (error.value.code, words in str(error.value)) == (code, True), error.value


def test_is_null_refused_wherever_something_is_needed(model: Model) -> None:
    out, size, handle = c_void_p(), c_size_t(), model.handle
    for name, needed, arguments in (
        ("edgelm_open", "path", (None, None, byref(out))),
        ("edgelm_open", "model", (b"x", None, None)),
        ("edgelm_get_info", "model", (NULL, byref(sized(Info)))),
        ("edgelm_get_info", "edgelm_model_info", (handle, None)),
        ("edgelm_tokenize", "model", (NULL, b"x", 1, -1, byref(out), byref(size))),
        ("edgelm_tokenize", "text", (handle, None, 1, -1, byref(out), byref(size))),
        ("edgelm_tokenize", "ids", (handle, b"x", 1, -1, None, byref(size))),
        ("edgelm_tokenize", "count", (handle, b"x", 1, -1, byref(out), None)),
        ("edgelm_detokenize", "ids", (handle, None, 1, 1, byref(out), byref(size))),
        ("edgelm_detokenizer_new", "model", (NULL, 1, byref(out))),
        ("edgelm_detokenizer_push", "detokenizer", (NULL, 1, byref(out), byref(size))),
        ("edgelm_detokenizer_flush", "detokenizer", (NULL, byref(out), byref(size))),
        ("edgelm_render_chat", "messages", (handle, None, 2, None, 0, 1, byref(out), byref(size))),
        ("edgelm_generate", "model", (NULL, ids_of([1]), 1, None, byref(out))),
        ("edgelm_generate", "ids", (handle, None, 1, None, byref(out))),
        ("edgelm_generate", "generation", (handle, ids_of([1]), 1, None, None)),
        ("edgelm_generate_text", "prompt", (handle, None, 1, None, byref(out))),
        ("edgelm_chat", "messages", (handle, None, 1, None, byref(out))),
        ("edgelm_generation_timings", "generation", (NULL, byref(sized(Timings)))),
        ("edgelm_logits", "logits", (handle, ids_of([1]), 1, 1, None, 9)),
        ("edgelm_save_session", "path", (handle, None)),
        ("edgelm_load_session", "path", (handle, None)),
        ("edgelm_reset", "model", (NULL,)),
        ("edgelm_cached_tokens", "count", (handle, None)),
        ("edgelm_parity", "path", (None, None, byref(c_int()), byref(out), byref(size))),
    ):
        refused("INVALID_ARGUMENT", f"{needed} is NULL", name, *arguments)
    lib = library()
    for name in ("edgelm_close", "edgelm_error_free", "edgelm_free", "edgelm_cancel", "edgelm_detokenizer_free",
                 "edgelm_generation_free"):  # fmt: skip
        getattr(lib, name)(None)
    assert lib.edgelm_error_code(None) == 0
    assert lib.edgelm_error_message(None) == b""
    assert ctypes.string_at(lib.edgelm_generation_text(None, byref(size))) == b""
    assert lib.edgelm_generation_tokens(None, byref(size)) is None


@pytest.mark.parametrize("size", [0, 1, 8, 17, 5000, 2**63])
@pytest.mark.parametrize("kind", [GenerateOptions, OpenOptions, Info, Timings, ParityOptions])
def test_is_an_absurd_size_of_a_struct_refused(model: Model, kind: type[Any], size: int) -> None:
    struct, out, text_size = sized(kind), c_void_p(), c_size_t()
    struct.size = size
    calls: dict[type[Any], tuple[Any, ...]] = {
        GenerateOptions: ("edgelm_generate", model.handle, ids_of([1]), 1, byref(struct), byref(out)),
        OpenOptions: ("edgelm_open", b"x", byref(struct), byref(out)),
        Info: ("edgelm_get_info", model.handle, byref(struct)),
        ParityOptions: ("edgelm_parity", b"x", byref(struct), byref(c_int()), byref(out), byref(text_size)),
    }
    if kind is Timings:
        call("edgelm_generate", model.handle, ids_of([1]), 1, byref(sized(GenerateOptions, max_tokens=1)), byref(out))
        calls[kind] = ("edgelm_generation_timings", out, byref(struct))
    refused("INVALID_ARGUMENT", f"its size is {size}: set it with EDGELM_INIT", *calls[kind])
    if kind is Timings:
        library().edgelm_generation_free(out)


class OldOptions(ctypes.Structure):
    """edgelm_generate_options of a header that had no more."""

    _fields_ = GenerateOptions._fields_[:3]


class NewOptions(ctypes.Structure):
    """edgelm_generate_options of a header that has more."""

    _fields_ = (*GenerateOptions._fields_, ("later", ctypes.c_int64))


class NewInfo(ctypes.Structure):
    _fields_ = (*Info._fields_, ("later", ctypes.c_int64))


class OldInfo(ctypes.Structure):
    _fields_ = (*Info._fields_[:3], ("beyond", ctypes.c_int64))


def test_do_programs_of_other_headers_work(model: Model) -> None:
    out = c_void_p()

    def tokens(options: Any) -> int:
        call("edgelm_generate", model.handle, ids_of([5, 6]), 2, byref(options), byref(out))
        count = c_size_t()
        library().edgelm_generation_tokens(out, byref(count))
        library().edgelm_generation_free(out)
        return count.value

    assert tokens(sized(OldOptions, max_tokens=3)) == 3
    assert tokens(sized(NewOptions, max_tokens=4)) == 4
    refused("INVALID_ARGUMENT", "sets an option that EdgeLM", "edgelm_generate", model.handle, ids_of([5]), 1,
            byref(sized(NewOptions, later=1)), byref(out))  # fmt: skip
    newer = sized(NewInfo, later=7)
    call("edgelm_get_info", model.handle, byref(newer))
    assert (newer.name, newer.later) == (b"fox-tiny", 0)
    older = sized(OldInfo, beyond=7)
    older.size = OldInfo.beyond.offset
    call("edgelm_get_info", model.handle, byref(older))
    assert (older.name, older.beyond, older.size) == (b"fox-tiny", 7, OldInfo.beyond.offset)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_tokens": -2}, "max_tokens is -2: it has to be an integer, 1 or more"),
        ({"temperature": -1.0}, "temperature is -1.0: it has to be a number, 0 (greedy) or more"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": 1.0, "top_k": -1}, "top_k is -1"),
        ({"temperature": 1.0, "top_p": float("nan")}, "top_p is nan"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty is inf"),
        ({"top_k": 5}, "top_k would do nothing with temperature 0"),
        ({"reuse": 2}, "reuse is 2: it has to be 0 or 1"),
        ({"stop": ["a", ""]}, "stop string '' cannot be found"),
        ({"stop": [b"\xff"]}, "is not UTF-8"),
    ],
)
def test_are_bad_options_refused(model: Model, options: dict[str, Any], words: str) -> None:
    with pytest.raises(Error) as error:
        model.generate([5, 6], **options)
    assert (error.value.code, words in str(error.value)) == ("INVALID_ARGUMENT", True), error.value


def test_are_bad_prompts_refused_as_in_python(model: Model, python: edgelm.LanguageModel) -> None:
    for ids, code in (
        ([], "INVALID_ARGUMENT"),
        ([1, -1], "INVALID_ARGUMENT"),
        ([1, 3072], "INVALID_ARGUMENT"),
        ([1] * 5000, "CONTEXT_FULL"),
    ):
        with pytest.raises(edgelm.EdgeLMError) as theirs:
            python.generate(ids)
        with pytest.raises(Error) as ours:
            model.generate(ids)
        assert ours.value.code == code
        assert str(ours.value).replace("open with", "load with") == str(theirs.value)
    for text in (b"\xff", b"a\xc3"):
        with pytest.raises(Error) as ours:
            model.tokenize(text)
        assert ours.value.code == "TOKENIZER"
    with pytest.raises(Error, match="outside the vocabulary"):
        model.detokenize([10**6])
    with pytest.raises(Error, match="add_bos is 2"):
        model.tokenize("x", add_bos=2)


def test_are_bad_positions_and_buffers_refused(model: Model) -> None:
    for positions in (0, 4):
        with pytest.raises(Error, match=f"positions is {positions}: give 1 to 3"):
            model.logits([1, 2, 3], positions)
    logits = (ctypes.c_float * 10)()
    refused("INVALID_ARGUMENT", "capacity is 10 floats", "edgelm_logits", model.handle, ids_of([1]), 1, 1, logits, 10)
    huge = 2**64 - 1
    refused("INVALID_ARGUMENT", "capacity", "edgelm_logits", model.handle, ids_of([1]), 1, huge, logits, 10)
    refused("INVALID_ARGUMENT", "cannot be the number", "edgelm_generate", model.handle, ids_of([1]), huge, None,
            byref(c_void_p()))  # fmt: skip


@pytest.mark.parametrize(
    "messages", ["", "{", "{}", "[1]", '[{"role": "user"}]', '[{"role": 1, "content": "x"}]', "[" * 100_000, "\xff"]
)
def test_are_malformed_messages_refused(model: Model, messages: str) -> None:
    for chat in (lambda: model.render_chat(messages), lambda: model.generate(messages, chat=True)):
        with pytest.raises(Error) as error:
            chat()
        assert error.value.code in {"INVALID_ARGUMENT", "TEMPLATE"}, error.value


def test_are_bad_bundles_and_options_of_opening_refused(fox: Path, tmp_path: Path) -> None:
    def opening(path: Path, **options: Any) -> str:
        with pytest.raises(Error) as error:
            Model(path, **options)
        return f"{error.value.code}: {error.value}"

    assert opening(tmp_path / "missing").startswith("BUNDLE: ")
    assert opening(tmp_path).startswith("BUNDLE: ")
    for options in ({"threads": -1}, {"context_length": -1}, {"chunk": -5}, {"kv": "int3"}, {"runtime": "abacus"}):
        assert opening(fox, **options).startswith(("INVALID_ARGUMENT: ", "UNAVAILABLE: ")), options
    assert opening(fox, onnxruntime=str(tmp_path / "libonnxruntime.so")).startswith("UNAVAILABLE: ")
    damaged = tmp_path / "damaged"
    shutil.copytree(fox, damaged)
    (damaged / "model.onnx").write_bytes(b"x")
    assert opening(damaged).startswith("BUNDLE: ")


def test_do_token_ids_work_without_a_tokenizer(fox: Path, tmp_path: Path, model: Model) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(fox, folder)
    description = json.loads((folder / "tokenizer.edgelm.json").read_text(encoding="utf-8"))
    for name in ("kind", "normalizer", "rules"):
        description.pop(name, None)
    description["unsupported"] = "a step that nobody has"
    text = json.dumps(description, indent=1, ensure_ascii=False)
    (folder / "tokenizer.edgelm.json").write_text(text, encoding="utf-8")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    manifest["files"]["tokenizer.edgelm.json"]["size"] = len(text.encode())
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with Model(folder, threads=2) as other:
        assert "a step that nobody has" in other.info.tokenizer_problem.decode()
        ours = other.generate([5, 6, 7], max_tokens=8)
        assert (ours.tokens, ours.text) == (model.generate([5, 6, 7], max_tokens=8).tokens, "")
        for use in (
            lambda: other.tokenize("x"),
            lambda: other.detokenize([5]),
            lambda: other.generate("x"),
            lambda: other.generate([5], stop=["x"]),
            lambda: other.render_chat("[]"),
        ):
            with pytest.raises(Error, match="a step that nobody has") as error:
                use()
            assert error.value.code == "TOKENIZER"


def test_is_the_path_of_onnx_runtime_found_in_the_environment(
    fox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGELM_ONNXRUNTIME", onnxruntime().decode())
    with Model(fox, onnxruntime=None, threads=1) as opened:
        assert opened.info.threads == 1
