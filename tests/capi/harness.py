"""A small binding of edgelm.h with ctypes, for tests only. An app in Python uses the package edgelm."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Sequence
from ctypes import POINTER, byref, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
LIBRARY = Path(os.environ.get("EDGELM_LIBRARY", ROOT / "build" / "csrc" / "libedgelm.so"))

CODES = {
    1: "INVALID_ARGUMENT", 2: "BUNDLE", 3: "TOKENIZER", 4: "TEMPLATE", 5: "CONTEXT_FULL", 6: "UNAVAILABLE",
    7: "RUNTIME", 8: "CANCELLED", 9: "FILE", 10: "INTERNAL",
}  # fmt: skip
REASONS = ("eos", "stop", "length", "interrupted")
TEXT_CALLBACK = ctypes.CFUNCTYPE(c_int, c_void_p, POINTER(ctypes.c_char), c_size_t)


class OpenOptions(ctypes.Structure):
    _fields_ = (
        ("size", c_size_t), ("runtime", c_char_p), ("onnxruntime", c_char_p), ("threads", c_int32),
        ("context_length", c_int32), ("chunk", c_int32), ("kv", c_char_p),
    )  # fmt: skip


class Info(ctypes.Structure):
    _fields_ = (
        ("size", c_size_t), ("name", c_char_p), ("family", c_char_p), ("recipe", c_char_p), ("target", c_char_p),
        ("operators", c_char_p), ("runtime", c_char_p), ("kv", c_char_p), ("vocab_size", c_int64),
        ("context_length", c_int64), ("model_context_length", c_int64), ("num_layers", c_int64),
        ("num_experts", c_int64), ("experts_per_token", c_int64), ("threads", c_int32), ("has_chat_template", c_int32),
        ("bos_id", c_int32), ("pad_id", c_int32), ("eos_ids", POINTER(c_int32)), ("eos_count", c_size_t),
        ("tokenizer_problem", c_char_p),
    )  # fmt: skip


class GenerateOptions(ctypes.Structure):
    _fields_ = (
        ("size", c_size_t), ("max_tokens", c_int32), ("temperature", c_double), ("top_k", c_int32),
        ("top_p", c_double), ("min_p", c_double), ("repetition_penalty", c_double), ("seed", POINTER(c_uint64)),
        ("stop", POINTER(c_char_p)), ("stop_count", c_size_t), ("reuse", c_int32), ("on_text", TEXT_CALLBACK),
        ("user", c_void_p),
    )  # fmt: skip


class Timings(ctypes.Structure):
    _fields_ = (
        ("size", c_size_t), ("prompt_tokens", c_int64), ("reused_tokens", c_int64), ("decoded_tokens", c_int64),
        ("prefill_seconds", c_double), ("time_to_first_token", c_double), ("decode_seconds", c_double),
    )  # fmt: skip


class ParityOptions(ctypes.Structure):
    _fields_ = (
        ("size", c_size_t), ("runtime", c_char_p), ("onnxruntime", c_char_p), ("threads", c_int32), ("kv", c_char_p),
        ("skip_layers", c_int32), ("on_progress", c_void_p), ("user", c_void_p),
    )  # fmt: skip


class Error(Exception):
    """What a function returned: the code's name and the message."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def sized(kind: type[ctypes.Structure], **members: Any) -> Any:
    """Return a struct with its size, as EDGELM_INIT makes it, and these members."""
    struct = kind(**members)
    struct.size = ctypes.sizeof(kind)
    return struct


@functools.cache
def onnxruntime() -> bytes:
    """The path of the ONNX Runtime library of the Python package."""
    import onnxruntime

    (path,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*")
    return str(path).encode()


@functools.cache
def library() -> ctypes.CDLL:
    """Load libedgelm, and set what its functions take and return."""
    lib = ctypes.CDLL(str(LIBRARY))
    pointer = c_void_p
    texts = {
        "edgelm_version": [], "edgelm_error_message": [pointer],
    }  # fmt: skip
    for name, arguments in texts.items():
        getattr(lib, name).restype, getattr(lib, name).argtypes = c_char_p, arguments
    for name in ("edgelm_error_free", "edgelm_free", "edgelm_close", "edgelm_detokenizer_free", "edgelm_cancel",
                 "edgelm_generation_free"):  # fmt: skip
        getattr(lib, name).restype, getattr(lib, name).argtypes = None, [pointer]
    lib.edgelm_error_code.argtypes = lib.edgelm_generation_reason.argtypes = [pointer]
    lib.edgelm_generation_text.argtypes, lib.edgelm_generation_text.restype = [pointer, pointer], pointer
    lib.edgelm_generation_tokens.argtypes, lib.edgelm_generation_tokens.restype = [pointer, pointer], pointer
    fallible = {
        "edgelm_open": [c_char_p, pointer, pointer],
        "edgelm_get_info": [pointer, pointer],
        "edgelm_tokenize": [pointer, pointer, c_size_t, c_int, pointer, pointer],
        "edgelm_detokenize": [pointer, pointer, c_size_t, c_int, pointer, pointer],
        "edgelm_detokenizer_new": [pointer, c_int, pointer],
        "edgelm_detokenizer_push": [pointer, c_int32, pointer, pointer],
        "edgelm_detokenizer_flush": [pointer, pointer, pointer],
        "edgelm_render_chat": [pointer, pointer, c_size_t, pointer, c_size_t, c_int, pointer, pointer],
        "edgelm_generate": [pointer, pointer, c_size_t, pointer, pointer],
        "edgelm_generate_text": [pointer, pointer, c_size_t, pointer, pointer],
        "edgelm_chat": [pointer, pointer, c_size_t, pointer, pointer],
        "edgelm_generation_timings": [pointer, pointer],
        "edgelm_logits": [pointer, pointer, c_size_t, c_size_t, pointer, c_size_t],
        "edgelm_save_session": [pointer, c_char_p],
        "edgelm_load_session": [pointer, c_char_p],
        "edgelm_reset": [pointer],
        "edgelm_cached_tokens": [pointer, pointer],
        "edgelm_parity": [c_char_p, pointer, pointer, pointer, pointer],
    }
    for name, arguments in fallible.items():
        getattr(lib, name).restype, getattr(lib, name).argtypes = c_void_p, arguments
    return lib


def call(name: str, *arguments: Any) -> None:
    """Call a function that can fail.

    Raises:
        Error: it failed.
    """
    lib = library()
    error = getattr(lib, name)(*arguments)
    if error:
        code, message = lib.edgelm_error_code(error), lib.edgelm_error_message(error).decode()
        lib.edgelm_error_free(error)
        raise Error(CODES[code], message)


def _taken(text: c_char_p | c_void_p, size: int) -> bytes:
    value = ctypes.string_at(text, size)
    assert ctypes.string_at(text.value + size, 1) == b"\0"  # type: ignore[operator]
    library().edgelm_free(text)
    return value


def ids_of(tokens: Sequence[int]) -> Any:
    return (c_int32 * len(tokens))(*tokens)


class Generation:
    """The result of a generation, copied; the timings' members are attributes."""

    def __init__(self, handle: c_void_p) -> None:
        lib, size, timings = library(), c_size_t(), sized(Timings)
        self.text = ctypes.string_at(lib.edgelm_generation_text(handle, byref(size)), size.value).decode()
        tokens = lib.edgelm_generation_tokens(handle, byref(size))
        self.tokens = tuple(ctypes.cast(tokens, POINTER(c_int32))[: size.value]) if size.value else ()
        self.stop_reason = REASONS[lib.edgelm_generation_reason(handle)]
        call("edgelm_generation_timings", handle, byref(timings))
        self.timings = {name: getattr(timings, name) for name, _ in Timings._fields_[1:]}
        self.reused = timings.reused_tokens
        lib.edgelm_generation_free(handle)


class Model:
    """An opened bundle. Options and results are as in Python's `edgelm.load` and `LanguageModel`."""

    def __init__(self, path: Path | str, **options: Any) -> None:
        self.handle = c_void_p()
        encoded = {name: value.encode() if isinstance(value, str) else value for name, value in options.items()}
        given = sized(OpenOptions, **{"onnxruntime": onnxruntime(), **encoded})
        call("edgelm_open", str(path).encode(), byref(given), byref(self.handle))

    def close(self) -> None:
        handle, self.handle = self.handle, c_void_p()
        library().edgelm_close(handle)

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def info(self) -> Any:
        info = sized(Info)
        call("edgelm_get_info", self.handle, byref(info))
        return info

    def tokenize(self, text: str | bytes, add_bos: int = -1) -> list[int]:
        data, ids, count = text.encode() if isinstance(text, str) else text, c_void_p(), c_size_t()
        call("edgelm_tokenize", self.handle, data, len(data), add_bos, byref(ids), byref(count))
        found = ctypes.cast(ids, POINTER(c_int32))[: count.value]
        library().edgelm_free(ids)
        return list(found)

    def detokenize(self, ids: Sequence[int], skip_special: bool = True) -> str:
        text, size = c_void_p(), c_size_t()
        call("edgelm_detokenize", self.handle, ids_of(ids), len(ids), skip_special, byref(text), byref(size))
        return _taken(text, size.value).decode()

    def detokenize_streamed(self, ids: Sequence[int], skip_special: bool = True) -> list[str]:
        """The texts of a detokenizer for these ids, with that of flush."""
        handle, text, size, texts = c_void_p(), c_void_p(), c_size_t(), []
        call("edgelm_detokenizer_new", self.handle, skip_special, byref(handle))
        for one in ids:
            call("edgelm_detokenizer_push", handle, one, byref(text), byref(size))
            texts.append(ctypes.string_at(text, size.value).decode())
        call("edgelm_detokenizer_flush", handle, byref(text), byref(size))
        texts.append(ctypes.string_at(text, size.value).decode())
        library().edgelm_detokenizer_free(handle)
        return texts

    def render_chat(self, messages: str, variables: str | None = None, add_generation_prompt: bool = True) -> str:
        text, size, data = c_void_p(), c_size_t(), messages.encode()
        extra = None if variables is None else variables.encode()
        call(
            "edgelm_render_chat", self.handle, data, len(data), extra, len(extra or b""), add_generation_prompt,
            byref(text), byref(size),
        )  # fmt: skip
        return _taken(text, size.value).decode()

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        chat: bool = False,
        on_text: Callable[[str], object] | None = None,
        seed: int | None = None,
        stop: Sequence[str | bytes] = (),
        **options: Any,
    ) -> Generation:
        """`chat`: the prompt is the JSON of messages. `on_text` stops the generation by returning something true."""
        given = sized(GenerateOptions, **options)
        if seed is not None:
            given.seed = ctypes.pointer(c_uint64(seed))
        if stop:
            encoded = [one.encode() if isinstance(one, str) else one for one in stop]
            given.stop, given.stop_count = (c_char_p * len(stop))(*encoded), len(stop)
        if on_text is not None:
            given.on_text = TEXT_CALLBACK(lambda _, text, size: int(bool(on_text(text[:size].decode()))))
        handle = c_void_p()
        if isinstance(prompt, str):
            data, name = prompt.encode(), "edgelm_chat" if chat else "edgelm_generate_text"
            call(name, self.handle, data, len(data), byref(given), byref(handle))
        else:
            call("edgelm_generate", self.handle, ids_of(prompt), len(prompt), byref(given), byref(handle))
        return Generation(handle)

    def cancel(self) -> None:
        library().edgelm_cancel(self.handle)

    def logits(self, ids: Sequence[int], positions: int = 1) -> np.ndarray[Any, Any]:
        logits = np.full((positions, self.info.vocab_size), np.nan, np.float32)
        where = logits.ctypes.data_as(POINTER(c_float))
        call("edgelm_logits", self.handle, ids_of(ids), len(ids), positions, where, logits.size)
        return logits

    def save_session(self, path: Path) -> None:
        call("edgelm_save_session", self.handle, str(path).encode())

    def load_session(self, path: Path) -> None:
        call("edgelm_load_session", self.handle, str(path).encode())

    def reset(self) -> None:
        call("edgelm_reset", self.handle)

    @property
    def cached_tokens(self) -> int:
        count = c_int64()
        call("edgelm_cached_tokens", self.handle, byref(count))
        return count.value


def parity(path: Path, **options: Any) -> tuple[bool, str]:
    """Return whether the parity check passed, and its JSON report."""
    passed, report, size = c_int(), c_void_p(), c_size_t()
    encoded = {name: value.encode() if isinstance(value, str) else value for name, value in options.items()}
    given = sized(ParityOptions, **{"onnxruntime": onnxruntime(), **encoded})
    call("edgelm_parity", str(path).encode(), byref(given), byref(passed), byref(report), byref(size))
    return bool(passed.value), _taken(report, size.value).decode()
