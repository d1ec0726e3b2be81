"""The options of generation: their names and types for editors, their values when they are used."""

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
    """The keyword arguments of `generate`, `stream` and the like: see `Options` and `Sampling` for what each means.

    Static types only: what is read, and checked again, are the two classes. A test compares all three.
    """

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
    """The options of one generation, checked.

    `max_tokens`: how many tokens to generate at most; None: until the model ends or the context is full.
    `stop`: a string or strings that end the text; they are not part of it.
    `reuse`: with a seed, too, use what earlier calls have cached. The text then is the same only after the same calls.
    `sampling`: see `edgelm.generation.sampling.Sampling`, whose fields are given as keyword arguments too.
    """

    max_tokens: int | None = DEFAULT_MAX_TOKENS
    stop: tuple[str, ...] = ()
    reuse: bool = False
    sampling: Sampling = field(default_factory=Sampling)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """From keyword arguments.

        Raises:
            GenerationTypeError: an unknown name, or a value of the wrong type.
            GenerationValueError: a value out of range.
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
