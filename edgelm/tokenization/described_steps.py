"""Describe the steps of a tokenizer of the `tokenizers` library: the part of `description` that vocabularies use."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from edgelm.tokenization.added_tokens import FLAGS

# Steps that libedgelm has, and their fields.
_NORMALIZERS: Mapping[str, tuple[str, ...]] = {
    "NFC": (),
    "NFD": (),
    "NFKC": (),
    "NFKD": (),
    "Lowercase": (),
    "StripAccents": (),
    "Nmt": (),
    "Strip": ("strip_left", "strip_right"),
    "Prepend": ("prepend",),
    "Replace": ("pattern", "content"),
}
_PRE_TOKENIZERS: Mapping[str, tuple[str, ...]] = {
    "ByteLevel": ("add_prefix_space", "use_regex"),
    "Split": ("pattern", "behavior", "invert"),
    "Metaspace": ("replacement", "prepend_scheme", "split"),
    "Digits": ("individual_digits",),
    "Punctuation": ("behavior",),
    "Whitespace": (),
    "WhitespaceSplit": (),
    "CharDelimiterSplit": ("delimiter",),
    "FixedLength": ("length",),
    "BertPreTokenizer": (),
}
_MODEL_FIELDS = ("unk_token", "fuse_unk", "byte_fallback", "ignore_merges", "end_of_word_suffix")
# Steps after which the first character of a text need not be the first of its original.
_MOVES_THE_START = ("Strip", "StripAccents", "Nmt")


class UnsupportedError(Exception):
    """libedgelm does not have a step of the tokenizer; the message says which."""


def added_tokens(tokens: Iterable[tuple[int, Any]]) -> list[dict[str, Any]]:
    """Return tokens of the library with their ids; flags only where they are set."""
    return [
        {"id": index, "content": token.content, **{flag: True for flag in FLAGS if getattr(token, flag)}}
        for index, token in sorted(tokens, key=lambda item: (item[0], item[1].content))
    ]


def steps(native: Any, part: str) -> list[dict[str, Any]]:
    """Return the steps of the library's `normalizer` or `pre_tokenizer`, with sequences flattened.

    Raises:
        UnsupportedError: libedgelm does not have a step.
    """
    step = getattr(native, part)
    if step is None:
        return []
    known = _NORMALIZERS if part == "normalizer" else _PRE_TOKENIZERS
    inner = "normalizers" if part == "normalizer" else "pretokenizers"
    result = []
    todo = [json.loads(step.__getstate__())]
    while todo:
        item = todo.pop(0)
        if item["type"] == "Sequence":
            todo = item[inner] + todo
        elif item["type"] not in known:
            raise UnsupportedError(f"its {part} has the step {item['type']}, which libedgelm does not have")
        else:
            result.append({"type": item["type"], **{name: item[name] for name in known[item["type"]]}})
    return result


def json_model(native: Any) -> dict[str, Any]:
    """Return the settings of the library's model, without vocabulary and merges.

    Raises:
        UnsupportedError: libedgelm does not have such a model.
    """
    kind = type(native.model).__name__
    if kind == "BPE":
        model = {name: getattr(native.model, name) for name in _MODEL_FIELDS}
        unknown = model["unk_token"]
        model["unk_id"] = None if unknown is None else native.model.token_to_id(unknown)
        return {"type": kind, **model}
    if kind == "Unigram":
        state = json.loads(native.model.__getstate__())
        return {"type": kind, "unk_id": state["unk_id"], "byte_fallback": state["byte_fallback"]}
    raise UnsupportedError(f"it is a {kind} model; libedgelm has BPE and Unigram")


def check_order(normalizer: list[dict[str, Any]], pre_tokenizer: list[dict[str, Any]]) -> None:
    """Check combinations of steps.

    Raises:
        UnsupportedError: libedgelm does not have such a combination.
    """
    if not any(step.get("prepend_scheme") == "first" for step in pre_tokenizer):
        return
    what = "its Metaspace prepends a space to the beginning of a text"
    if pre_tokenizer[0].get("prepend_scheme") != "first":
        raise UnsupportedError(f"{what}, but is not the first step of its pre_tokenizer")
    for step in normalizer:
        pattern = step.get("pattern", {}).get("String", "")
        if step["type"] in _MOVES_THE_START or (
            step["type"] == "Replace" and not (len(pattern) == 1 and step["content"])
        ):
            raise UnsupportedError(f"{what}, which {step['type']} may remove")
