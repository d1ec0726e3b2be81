"""Read the added tokens that the JSON files next to a vocabulary declare, in the way of transformers 5.23.

Fine-tuned checkpoints have tokens that the vocabulary file lacks: in added_tokens.json, in `added_tokens_decoder` of
tokenizer_config.json, or only by name (`eos_token`, `additional_special_tokens`). `Declared.tokens` lists them in the
order in which transformers adds them (`PreTrainedTokenizerBase._from_pretrained`, `TokenizersBackend.__init__`). The
order decides their ids: a token of the vocabulary keeps its id, and another one gets the next free id, whatever id a
file declares.

Two differences from transformers are intended. Tokens that only its classes name, such as Gemma's `<mask>`, are not
added unless a file has them, since the model has no rows for them. Objects with a `content` are accepted wherever a
token is expected.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgelm.checkpoint.jsonfile import read_optional_json
from edgelm.errors import TokenizerError

CONFIG = "tokenizer_config.json"
SPECIAL_MAP = "special_tokens_map.json"
ADDED = "added_tokens.json"
# More than any published vocabulary has. Larger ids and counts are refused: the file is damaged or malicious.
MAX_IDS = 1 << 22
MAX_ADDED = 1 << 17  # tokens that one file adds; published ones add up to some thousands
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
# Tokenizer classes of transformers that build their own steps, and the default tokens of each.
CLASS_TOKENS: Mapping[str, Mapping[str, str]] = {
    "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "GemmaTokenizer": {
        "unk_token": "<unk>",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    },
    "GPTNeoXTokenizer": {
        "unk_token": "<|endoftext|>",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|padding|>",
    },
}
CLASS_OF_MODEL_TYPE = {"olmo": "GPTNeoXTokenizer", "olmoe": "GPTNeoXTokenizer", "gemma": "GemmaTokenizer"}


@dataclass(frozen=True)
class AddedToken:
    """A token that is split off a text before the rest is encoded.

    Attributes:
        content: its string.
        lstrip: also match the white space before it.
        rstrip: also match the white space after it.
        single_word: match only where no letter or digit is next to it.
        normalized: match in the normalised text.
        special: not text; omitted when decoding.
        declared: the id that a file gives it; None where none does.
        where: the file that declares it; empty for defaults of transformers' classes.
    """

    content: str
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False
    special: bool = True
    declared: int | None = None
    where: str = ""

    def equals(self, other: AddedToken) -> bool:
        """Return whether both are equal, apart from where they are declared."""
        return self == replace(other, declared=self.declared, where=self.where)

    def to_library(self) -> Any:
        """Return the token as an object of the `tokenizers` library."""
        import tokenizers

        return tokenizers.AddedToken(self.content, **{name: getattr(self, name) for name in FLAGS})


@dataclass(frozen=True)
class Declared:
    """The tokens and settings that the JSON files of a folder declare.

    Attributes:
        config: contents of tokenizer_config.json.
        kind: the class of transformers whose rules apply, one of `CLASS_TOKENS`; "" for the rules in the vocabulary
            file itself.
        names: `bos_token` and so on, by name, from a file or the class; None where a file says there is no such token.
        listed: tokens with a declared id, by that id.
        extra: further special tokens. None: no file lists any, so those of a tokenizer.model are used.
        rows: rows of the model's embedding; None where config.json does not say.
        use_own_tokens: whether the tokens listed in a tokenizer.json are used where its steps are rebuilt.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    kind: str = ""
    names: Mapping[str, AddedToken | None] = field(default_factory=dict)
    listed: Mapping[int, AddedToken] = field(default_factory=dict)
    extra: tuple[AddedToken, ...] | None = None
    rows: int | None = None
    use_own_tokens: bool = True

    def flag(self, name: str, default: bool) -> bool:
        """Return a boolean of tokenizer_config.json; null means the default.

        Raises:
            TokenizerError: it is neither true, false nor null.
        """
        value = self.config.get(name)
        if value is not None and not isinstance(value, bool):
            raise TokenizerError(f"{CONFIG}: {name} is {str(value)[:80]!r}; expected true or false")
        return default if value is None else value

    def tokens(
        self,
        own: Mapping[int, AddedToken] | None = None,
        extra: Iterable[AddedToken] = (),
        present: Iterable[str] = (),
    ) -> list[AddedToken]:
        """Return the tokens to add, in order.

        Args:
            own: tokens that a tokenizer.json lists, by id. If they are used, they replace those of `listed`.
            extra: tokens of a tokenizer.model, used where no file lists any.
            present: strings of tokens that have been added already.
        """
        listed = {**self.listed, **(own or {})} if self.use_own_tokens else dict(self.listed)
        named = {token.content: token for token in self.names.values() if token}
        unlisted = [*named.values(), *(extra if self.extra is None else self.extra)]
        # Listed tokens come first and keep their flags, but named tokens are special.
        result: dict[str, AddedToken] = {}
        for token in [*(listed[index] for index in sorted(listed)), *(t for t in unlisted if t.content not in present)]:
            if token.content and token.content not in result:
                result[token.content] = replace(token, special=token.special or token.content in named)
        return list(result.values())


def _check_text(content: str, where: str) -> None:
    if not content.isascii() and any("\ud800" <= character <= "\udfff" for character in content):
        raise TokenizerError(f"{where}: the token {content[:80]!r} is not valid Unicode; fetch the file again")


def _token(value: object, where: str, what: str, *, special: bool | None = None) -> AddedToken:
    """Return the token of a string or an object; `special` is the default of that flag."""
    if isinstance(value, str):
        value = {"content": value}
    if not isinstance(value, Mapping) or not isinstance(value.get("content"), str):
        raise TokenizerError(f"{where}: {what} is {str(value)[:80]!r}; expected a string or an object with a content")
    for name in value:
        if name not in ("content", "__type", "id", *FLAGS):
            raise TokenizerError(f"{where}: {what} has the unknown field {str(name)[:80]!r}; remove it")
    _check_text(value["content"], where)
    flags = {name: value[name] for name in FLAGS if value.get(name) is not None}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise TokenizerError(f"{where}: the flags of {what} are {str(flags)[:120]}; expected true or false")
    flags.setdefault("special", bool(special))
    flags.setdefault("normalized", not flags["special"])
    return AddedToken(value["content"], where=where, **flags)


def _index(value: object, where: str, content: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < MAX_IDS:
        raise TokenizerError(f"{where}: the id of {content[:80]!r} is {str(value)[:80]!r}; expected 0 to {MAX_IDS - 1}")
    return value


def _check_count(values: Sized, where: str) -> None:
    if len(values) > MAX_ADDED:
        raise TokenizerError(f"{where}: {len(values)} tokens are more than the limit of {MAX_ADDED}; remove some")


def _decoder_tokens(value: object) -> dict[int, AddedToken]:
    where = f"{CONFIG}: added_tokens_decoder"
    if not isinstance(value, Mapping):
        raise TokenizerError(f"{where} is {str(value)[:80]!r}; expected an object of ids and tokens")
    _check_count(value, where)
    result = {}
    for key, item in value.items():
        token = _token(item, where, f"token {key[:80]!r}", special=False)
        digits = key.strip()
        index = _index(int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 20 else key, where, key)
        result[index] = replace(token, declared=index)
    return result


def _file_tokens(values: Mapping[str, Any], special: set[str]) -> dict[int, AddedToken]:
    """Return the tokens of added_tokens.json by id; those in `special` are special."""
    _check_count(values, ADDED)
    result = {}
    for content, value in values.items():
        index = _index(value, ADDED, content)
        _check_text(content, ADDED)
        flag = content in special
        result[index] = AddedToken(content, normalized=not flag, special=flag, declared=index, where=ADDED)
    return result


def json_tokens(value: object, where: str) -> dict[int, AddedToken]:
    """Return the `added_tokens` of a tokenizer.json by id.

    Raises:
        TokenizerError: it is not a list of tokens with ids.
    """
    if value is None:
        return {}
    if not isinstance(value, list):
        raise TokenizerError(f"{where}: added_tokens is not a list; fetch the file again")
    _check_count(value, f"{where}: added_tokens")
    result = {}
    for item in value:
        token = _token(item, where, "an entry of added_tokens", special=False)
        index = _index(item.get("id") if isinstance(item, Mapping) else None, where, token.content)
        result[index] = replace(token, declared=index)
    return result


def _extra_values(config: Mapping[str, Any], special_map: Mapping[str, Any]) -> tuple[list[Any] | None, list[Any]]:
    """Return the unnamed special tokens (None: no file lists any), and those that also make a listed token special."""
    value = config.get("extra_special_tokens")
    if not value and "additional_special_tokens" in config:
        value = config["additional_special_tokens"]
    mapped = special_map.get("extra_special_tokens")
    for name, given in ((CONFIG, value), (SPECIAL_MAP, mapped)):
        if given is not None and not isinstance(given, list | Mapping):
            raise TokenizerError(f"{name}: extra_special_tokens is {str(given)[:80]!r}; expected a list of tokens")
    if isinstance(mapped, list):
        value = [*(value if isinstance(value, list) else []), *mapped]
    if isinstance(value, list):
        _check_count(value, f"{CONFIG}: extra_special_tokens")
        return value, [item for item in value if isinstance(item, str) or (isinstance(mapped, list) and item in mapped)]
    late = special_map.get("additional_special_tokens")
    return late if isinstance(late, list) else None, []


def _further_names(values: Mapping[str, Any], where: str) -> dict[str, AddedToken | None]:
    """Return the tokens with names of a model's own, such as `image_token`."""
    names = {key: item for key, item in values.items() if key.endswith("_token") and key not in NAMED}
    extra = values.get("extra_special_tokens")
    if isinstance(extra, Mapping):
        names |= extra
    return {key: _token(item, where, repr(key[:80]), special=True) for key, item in names.items() if _is_token(item)}


def _is_token(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, Mapping) and isinstance(value.get("content"), str))


def _kind(config: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """Return the class that transformers' `AutoTokenizer` selects, if it is one of `CLASS_TOKENS`; else ""."""
    named = config.get("tokenizer_class") or model.get("tokenizer_class")
    name = named if isinstance(named, str) else CLASS_OF_MODEL_TYPE.get(str(model.get("model_type")), "")
    name = name.removesuffix("Fast")
    return name if name in CLASS_TOKENS else ""


def _makes_special(name: str, config: Mapping[str, Any], token: AddedToken) -> bool:
    """Return whether a token of added_tokens.json is special, and matched in raw text, because it equals `token`."""
    return name in NAMED and (token.where != CONFIG or isinstance(config.get(name), str))


def read_declared(folder: Path) -> Declared:
    """Read the declarations of a checkpoint or bundle folder.

    Raises:
        CheckpointError: a file is not a JSON object.
        TokenizerError: a declaration has a wrong type.
    """
    config = read_optional_json(folder / CONFIG)
    special_map = read_optional_json(folder / SPECIAL_MAP)
    model = read_optional_json(folder / "config.json")
    kind = _kind(config, model)
    has_decoder = config.get("added_tokens_decoder") is not None
    # With added_tokens_decoder the other two files are ignored, except names that only they have.
    names: dict[str, AddedToken | None] = {
        name: AddedToken(content) for name, content in CLASS_TOKENS.get(kind, {}).items()
    }
    for file, where in ((special_map, SPECIAL_MAP), (config, CONFIG))[:: 1 if has_decoder else -1]:
        for name in NAMED:
            if name in file:
                names[name] = None if file[name] is None else _token(file[name], where, name, special=True)
        if not (has_decoder and where == SPECIAL_MAP):
            names |= _further_names(file, where)
    values, flagging = _extra_values(config, {} if has_decoder else special_map)
    extra = None
    if values is not None:
        extra = tuple(_token(item, CONFIG, "an extra special token", special=True) for item in values)
    if has_decoder:
        listed = _decoder_tokens(config["added_tokens_decoder"])
    else:
        special = {token.content for name, token in names.items() if token and _makes_special(name, config, token)}
        special |= {_token(item, SPECIAL_MAP, "an extra special token").content for item in flagging}
        listed = _file_tokens(read_optional_json(folder / ADDED), special)
    rows = model.get("vocab_size")
    return Declared(
        config=config,
        kind=kind,
        names=names,
        listed=listed,
        extra=extra,
        rows=rows if isinstance(rows, int) and not isinstance(rows, bool) and rows > 0 else None,
        use_own_tokens=not has_decoder,
    )
