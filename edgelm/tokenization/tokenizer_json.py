"""Check a tokenizer.json before the `tokenizers` library loads it, and rebuild its steps as transformers does.

The file comes with a checkpoint. The library runs any steps in it without limits, and panics on some files. So steps
that could exhaust the device's memory or time are refused here.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from edgelm.checkpoint.jsonfile import parse_json_object
from edgelm.errors import CheckpointError, TokenizerError
from edgelm.json_dataclass import ErrorFactory, read_bytes
from edgelm.tokenization.added_tokens import MAX_IDS, Declared

MAX_BYTES = 64 << 20  # a vocabulary of 256 000 entries takes about 35 MB
MAX_STEPS = 64  # of one kind; published tokenizers have up to six
MAX_GROWTH = 16  # characters that replacements may make of one, without Unicode normalisation
MAX_PREPENDED = 1024  # characters prepended to every part of a text
MAX_PATTERN = 20_000  # characters of a regular expression
MANY = 16  # bounded repetitions of this many or more count as unbounded
SPACE = "▁"

_Result = TypeVar("_Result")


def read(path: Path) -> tuple[dict[str, Any], str]:
    """Read and check a tokenizer.json, and return its parsed contents and its text.

    Raises:
        TokenizerError: the file cannot be read, is too large, is not JSON, or has steps that are refused.
    """
    text = read_bytes(path, ErrorFactory(TokenizerError, "fetch the file again"), MAX_BYTES)
    try:
        data = parse_json_object(text, str(path))
    except CheckpointError as error:
        raise TokenizerError(str(error)) from error
    try:
        _check(data)
    except (ValueError, RecursionError) as error:
        reason = "steps within steps without end" if isinstance(error, RecursionError) else error
        raise TokenizerError(f"{path}: not a usable tokenizer.json ({reason}); fetch the file again") from error
    return data, text.decode()


def call_library(call: Callable[..., _Result], *arguments: Any, what: str) -> _Result:
    """Call the library. Its panics raise a `BaseException` of a class that cannot be imported.

    Raises:
        TokenizerError: the call failed; the message begins with `what`.
    """
    try:
        return call(*arguments)
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # the library raises plain Exception for everything else
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise TokenizerError(f"{what} ({reason})") from error


def _check(data: Mapping[str, Any]) -> None:
    model = data.get("model")
    if not isinstance(model, Mapping):
        raise ValueError("it has no model")
    _check_vocabulary(model.get("vocab"))
    if model.get("continuing_subword_prefix"):  # of WordPiece; the library's BPE panics on merges shorter than it
        raise ValueError("it has a continuing_subword_prefix, which is not supported")
    if model.get("type") == "BPE":
        _check_merges(model.get("merges"), model["vocab"])
    changing = list(_steps(data.get("normalizer"), "normalizers"))
    _check_growth("normalizer", changing)
    for step in changing:
        if step["type"] == "Precompiled":
            _check_charsmap(step.get("precompiled_charsmap"))
    _check_growth("decoder", list(_steps(data.get("decoder"), "decoders")))
    splitting = list(_steps(data.get("pre_tokenizer"), "pretokenizers"))
    if len(splitting) > MAX_STEPS:
        raise ValueError(f"its pre_tokenizer has {len(splitting)} steps")
    list(_steps(data.get("post_processor"), "processors"))
    for step in splitting:
        if step["type"] == "FixedLength" and not step.get("length"):
            raise ValueError("a FixedLength of its pre_tokenizer has no length")
        if (pattern := _regex(step)) is not None:
            check_pattern(pattern)


def _check_vocabulary(vocab: object) -> None:
    if isinstance(vocab, Mapping):
        ids = vocab.values()
        if (
            any(type(index) is not int for index in ids)
            or not 0 <= min(ids, default=0) <= max(ids, default=0) < MAX_IDS
        ):
            raise ValueError(f"an id of its vocabulary is not between 0 and {MAX_IDS - 1}")
    elif isinstance(vocab, list):
        if len(vocab) > MAX_IDS:
            raise ValueError(f"its vocabulary has {len(vocab)} entries")
        for entry in vocab:
            if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], int | float)):
                raise ValueError("an entry of its vocabulary is not a string with a score")
            if not math.isfinite(entry[1]):
                raise ValueError("a score of its vocabulary is not finite")
    else:
        raise ValueError("its model has no vocabulary")


def _check_merges(merges: object, vocab: object) -> None:
    """Check that every merge makes a token of two tokens; the library panics on some others."""
    if not isinstance(merges, list) or not isinstance(vocab, Mapping):
        raise ValueError("its BPE has no merges or no vocabulary")
    pair = None
    try:  # a simple loop, since there may be half a million
        for pair in merges:
            left, right = pair.split(" ") if type(pair) is str else pair
            if left + right not in vocab:
                raise ValueError("not a token")
    except (ValueError, TypeError):
        raise ValueError(f"the merge {str(pair)[:80]!r} does not make one token of two") from None


def _check_charsmap(value: object) -> None:
    """Check the table of a Precompiled step: the size of its trie, the trie, and UTF-8 text."""
    data = base64.b64decode(value, validate=True) if isinstance(value, str) else b""
    trie = int.from_bytes(data[:4], "little")
    if len(data) < 4 or trie % 4 or trie > len(data) - 4:
        raise ValueError("a precompiled_charsmap is damaged")
    data[4 + trie :].decode()


def adds_bos(data: Mapping[str, Any], bos: int) -> bool:
    """Return whether the file's post-processor prepends `bos` to a text."""
    for step in _steps(data.get("post_processor"), "processors"):
        first = step.get("cls")
        if step["type"] == "TemplateProcessing" and isinstance(step.get("single"), list) and step["single"]:
            piece = step["single"][0]
            token = piece.get("SpecialToken") if isinstance(piece, Mapping) else None
            name = token.get("id") if isinstance(token, Mapping) else None
            special = step.get("special_tokens")
            entry = special.get(name) if isinstance(special, Mapping) and isinstance(name, str) else None
            ids = entry.get("ids") if isinstance(entry, Mapping) else None
            first = [name, *ids] if isinstance(ids, list) else None
        if isinstance(first, list) and first[1:2] == [bos]:
            return True
    return False


def _steps(step: object, inner: str) -> Iterator[Mapping[str, Any]]:
    """Yield the steps, with nested sequences flattened."""
    if step is None:
        return
    if not isinstance(step, Mapping):
        raise ValueError(f"a step is a {type(step).__name__}")
    if not isinstance(step.get("type"), str):
        raise ValueError("a step without a type")
    if step.get("type") != "Sequence":
        yield step
        return
    children = step.get(inner)
    if not isinstance(children, list):
        raise ValueError("a sequence without steps")
    for child in children:
        yield from _steps(child, inner)


def _regex(step: Mapping[str, Any]) -> str | None:
    pattern = step.get("pattern")
    value = pattern.get("Regex") if isinstance(pattern, Mapping) else None
    return value if isinstance(value, str) else None


def _check_growth(what: str, steps: list[Mapping[str, Any]]) -> None:
    """Refuse steps that together make a text much longer, apart from Unicode normalisation (at most 18 times)."""
    if len(steps) > MAX_STEPS:
        raise ValueError(f"its {what} has {len(steps)} steps")
    growth = 1.0
    prepended = 0
    for step in steps:
        if step.get("type") == "Prepend" and isinstance(step.get("prepend"), str):
            prepended += len(step["prepend"])
        if step.get("type") != "Replace":
            continue
        pattern, content = step.get("pattern"), step.get("content")
        if not isinstance(pattern, Mapping) or not isinstance(content, str):
            raise ValueError(f"a Replace of its {what} is incomplete")
        if (regex := _regex(step)) is not None:
            check_pattern(regex)
            growth *= 1 + len(content)  # it may match the empty string between any two characters
        else:
            string = pattern.get("String")
            if not isinstance(string, str) or not string:
                raise ValueError(f"a Replace of its {what} replaces nothing")
            growth *= max(1.0, len(content) / len(string))
    if growth > MAX_GROWTH or prepended * growth > MAX_PREPENDED:
        raise ValueError(f"its {what} makes texts up to {growth:.0f} times as long and puts {prepended} before each")


_QUANTIFIER = re.compile(r"(?P<sign>[*+?])|\{(?P<low>\d*)(?P<comma>,?)(?P<high>\d*)\}")


def _repeats(pattern: str, position: int) -> tuple[bool, int]:
    """Return whether a quantifier at `position` repeats many times and can backtrack, and where it ends."""
    match = _QUANTIFIER.match(pattern, position)
    if not match or match.end() - match.start() == 2:  # "{}" is literal
        return False, position
    if match["sign"]:
        possessive = pattern[match.end() : match.end() + 1] == "+"
        lazy = pattern[match.end() : match.end() + 1] == "?"
        return match["sign"] != "?" and not possessive, match.end() + (possessive or lazy)
    high = match["high"] or (match["low"] if not match["comma"] else "")
    if any(int(bound) > 1000 for bound in (match["low"], match["high"]) if bound):
        raise ValueError(f"a regular expression repeats something {match[0]} times")
    return not high or int(high) >= MANY, match.end()


def _class_end(pattern: str, position: int) -> int:
    """Return where the character class that begins at `position` ends. Classes nest in Oniguruma."""
    depth = 0
    while position < len(pattern):
        character = pattern[position]
        if character == "\\":
            position += 1
        elif character == "[":
            depth += 1
            position += pattern[position + 1 : position + 2] == "^"
            position += pattern[position + 1 : position + 2] == "]"
        elif character == "]":
            depth -= 1
            if not depth:
                return position + 1
        position += 1
    return position


def check_pattern(pattern: str) -> None:
    """Refuse a regular expression whose form suggests exponential time.

    Nested repetitions such as `(a+)+` and references to groups are refused. Possessive and atomic repetitions do not
    backtrack and are allowed.

    Raises:
        ValueError: the pattern is refused.
    """
    if len(pattern) > MAX_PATTERN:
        raise ValueError(f"a regular expression has {len(pattern)} characters")
    position = 0
    # For each open group: whether something in it repeats, and whether it is atomic.
    groups: list[list[bool]] = [[False, False]]
    while position < len(pattern):
        character = pattern[position]
        inner = False
        if character == "\\":
            if pattern[position + 1 : position + 2] in tuple("123456789kg"):
                raise ValueError("a regular expression refers to a group of its own")
            position += 2
        elif character == "[":
            position = _class_end(pattern, position)
        elif character == "(":
            groups.append([False, pattern.startswith("(?>", position)])
            position += 2 if pattern.startswith("(?", position) else 1
            continue
        elif character == ")" and len(groups) > 1:
            inner, atomic = groups.pop()
            inner = inner and not atomic
            position += 1
        else:
            position += 1
        repeated, position = _repeats(pattern, position)
        if repeated and inner:
            raise ValueError(f"the regular expression {pattern[:80]!r} has a repetition within a repetition")
        groups[-1][0] = groups[-1][0] or repeated or inner


def rebuilt(data: Mapping[str, Any], declared: Declared, own_tokens_dropped: bool = False) -> dict[str, Any] | None:
    """Return the file's contents with the steps of its transformers class; None where the file is used unchanged.

    These classes use only the vocabulary, merges and post-processor of the file, and so does this function. A file of
    another kind than its class (byte-level or not) is used unchanged. With `own_tokens_dropped`, the tokens that the
    file adds are not used, so it must be rebuilt even if its steps are the same.

    Raises:
        TokenizerError: a setting has the wrong type.
    """
    model = data["model"]
    has_merges = isinstance(model.get("merges"), list) and isinstance(model.get("vocab"), Mapping)
    kinds = {step.get("type") for step in _steps(data.get("decoder"), "decoders")}
    byte_level = declared.kind == "GPTNeoXTokenizer"
    if not declared.kind or model.get("type") != "BPE" or not has_merges or ("ByteLevel" in kinds) != byte_level:
        return None
    decoder = [_replace_step(SPACE, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    unknown = None
    normalizer: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any]
    if declared.kind == "GPTNeoXTokenizer":
        normalizer = {"type": "NFC"}
        prefix = declared.flag("add_prefix_space", False)
        pre_tokenizer = {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True, "use_regex": True}
        decoder = [pre_tokenizer]
    elif declared.kind == "GemmaTokenizer":
        normalizer = _replace_step(" ", SPACE)
        split = {"pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
        pre_tokenizer = {"type": "Split", **split}
        unknown = token.content if (token := declared.names.get("unk_token")) else None
    else:
        scheme = prepend_scheme(declared)
        pre_tokenizer = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}
        if scheme != "never":
            decoder.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    result: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": data.get("post_processor"),
        "decoder": decoder[0] if len(decoder) == 1 else {"type": "Sequence", "decoders": decoder},
        "model": {
            "type": "BPE",
            "unk_token": unknown,
            "fuse_unk": not byte_level,
            "byte_fallback": not byte_level,
            "vocab": model["vocab"],
            "merges": model["merges"],
        },
    }
    return None if same_steps(data, result) and not own_tokens_dropped else result


_MODEL_DEFAULTS = {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "end_of_word_suffix": ""}


def same_steps(data: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether both have the same steps, so that a large vocabulary need not be serialised again."""
    models = []
    for model in (data["model"], other["model"]):
        rest = {key: value for key, value in model.items() if key not in ("vocab", "merges") and value is not None}
        models.append({**_MODEL_DEFAULTS, **rest})
    return models[0] == models[1] and all(
        data.get(key) == other[key] for key in ("normalizer", "pre_tokenizer", "decoder")
    )


def prepend_scheme(declared: Declared) -> str:
    """Return where LlamaTokenizer prepends a space: "always" to each part of a text, to the "first" one, or "never".

    With `"legacy": true` it also does so after special tokens; the default in transformers is false.

    Raises:
        TokenizerError: a setting has the wrong type.
    """
    if not declared.flag("add_prefix_space", True):
        return "never"
    return "always" if declared.flag("legacy", False) else "first"


def _replace_step(old: str, new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def load(text: str, path: Path) -> Any:
    """Load a tokenizer.json into the library, without truncation, padding and dropout.

    Raises:
        TokenizerError: the library refuses the file.
    """
    import tokenizers

    tokenizer = call_library(tokenizers.Tokenizer.from_str, text, what=f"{path}: not a usable tokenizer.json")
    # These settings are for training batches.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # It is called even without special tokens, so replace it with one that changes nothing but offsets.
    tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    if getattr(tokenizer.model, "dropout", None) is not None:
        tokenizer.model.dropout = None
    return tokenizer
