"""Options of generation: a typed dictionary for editors and type checkers, and a class that checks the values."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypedDict

from edgelm.errors import GenerationTypeError, GenerationValueError
from edgelm.generation.sampling import Sampling, changed, is_integer
from edgelm.generation.stop_strings import StopStrings

DEFAULT_MAX_TOKENS = 256


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of `LanguageModel.generate`, `stream`, `chat` and so on.

    Attributes:
        max_tokens: most tokens to generate, default 256; None: until the model ends the text or the context is full.
        stop: a string or strings that end the text; they are not part of it.
        reuse: with a seed, reuse the KV cache of earlier calls as well. The text is then reproducible only after the
            same earlier calls. Default False.
        temperature: 0, the default, is greedy decoding; 1 samples from the model's own distribution.
        top_k: sample among the k most likely tokens; 0, the default: all.
        top_p: sample among the most likely tokens that together reach this probability; 1, the default: all.
        min_p: sample among tokens with at least this fraction of the highest probability; 0, the default: all.
        repetition_penalty: divide positive and multiply negative logits of tokens that occurred; 1, the default: none.
        seed: makes sampling reproducible; None, the default: a random one.
    """

    # Static types only. `Options` and `Sampling` read and check the values; a test compares all three.

    max_tokens: int | None
    stop: str | Iterable[str] | None
    reuse: bool
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | None


@dataclass(frozen=True)
class Options:
    """Checked options of a generation.

    Attributes:
        max_tokens: most tokens to generate; None: until the model ends the text or the context is full.
        stop: strings that end the text; they are not part of it.
        reuse: with a seed, reuse the KV cache of earlier calls as well. The text is then reproducible only after the
            same earlier calls.
        sampling: how tokens are chosen.
    """

    max_tokens: int | None = DEFAULT_MAX_TOKENS
    stop: tuple[str, ...] = ()
    reuse: bool = False
    sampling: Sampling = field(default_factory=Sampling)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """Check the keyword arguments of `GenerateOptions`.

        Raises:
            GenerationTypeError: a name is unknown, or a value has a wrong type.
            GenerationValueError: a value is out of range.
        """
        valid = list(GenerateOptions.__annotations__)
        for name in given:
            if name not in valid:
                near = difflib.get_close_matches(name, valid, 1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                raise GenerationTypeError(f"there is no option {name!r:.60}{hint}; there are: {', '.join(valid)}")
        return cls(
            _max_tokens(given.get("max_tokens", DEFAULT_MAX_TOKENS)),
            _stop(given.get("stop")),
            _reuse(given.get("reuse", False)),
            Sampling(**{item.name: given[item.name] for item in fields(Sampling) if item.name in given}),
        )

    def __repr__(self) -> str:
        own = [f"max_tokens={self.max_tokens}", *([f"stop={self.stop!r:.60}"] if self.stop else [])]
        own += ["reuse=True"] if self.reuse else []
        return f"Options({', '.join([*own, *([changed(self.sampling)] if self.sampling != Sampling() else [])])})"


def _max_tokens(value: Any) -> int | None:
    if value is None:
        return None
    right_type = is_integer(value)
    if not right_type or value < 1:
        kind = GenerationValueError if right_type else GenerationTypeError
        raise kind(f"max_tokens is {value!r:.100}: it has to be an integer, 1 or more, or None for no limit")
    return int(value)


def _reuse(value: Any) -> bool:
    if not isinstance(value, bool):
        raise GenerationTypeError(f"reuse is {value!r:.100}: it has to be True or False")
    return value


def _stop(value: Any) -> tuple[str, ...]:
    value = () if value is None else (value,) if isinstance(value, str) else value
    if isinstance(value, (bytes, bytearray)) or not isinstance(value, Iterable):
        raise GenerationTypeError(f"stop is {value!r:.100}: it has to be a string or a list of strings")
    stops = tuple(value)
    StopStrings(stops)
    return stops
