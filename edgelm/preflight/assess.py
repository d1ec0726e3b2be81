"""Assess a model on a machine or board: for each recipe whether it fits, and how fast it will be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgelm import devices
from edgelm.bundle.capabilities import GPU, NATIVE, PORTABLE, missing
from edgelm.errors import EdgeLMError, ExportError
from edgelm.preflight.boards import Board, predict_for
from edgelm.preflight.fit import COMFORT, Memory, disk_bytes, longest_context, memory
from edgelm.preflight.planned import Planned, SchemeOf, float_type, plan
from edgelm.preflight.predict import SECONDS, Prediction, predict
from edgelm.preflight.subject import Subject
from edgelm.quant.recipe import Recipe
from edgelm.sizes import format_size

DEFAULT_CONTEXT = 4096
_CAPABILITIES = {"native": NATIVE, "portable": PORTABLE, "gpu": GPU}


@dataclass(frozen=True)
class Question:
    """What is asked about a model.

    Attributes:
        target, ops: what the bundle is for; `ops` is "native" or "portable" on a CPU.
        context: tokens of the context; None for 4,096, or the model's own where it is shorter.
        kv: type of the KV cache; None for the bundle's own.
        threads: CPU threads; None for the physical cores.
        prompt_tokens, new_tokens: what speed is predicted for, as `edgelm bench`.
        board: a board of the table; None for this machine.
        seconds: time to measure each phase for; 0 for no measurement.
    """

    target: str = "cpu"
    ops: str = "native"
    context: int | None = None
    kv: str | None = None
    threads: int | None = None
    prompt_tokens: int = 512
    new_tokens: int = 128
    board: Board | None = None
    seconds: float = SECONDS


@dataclass(frozen=True)
class Option:
    """A recipe for the model on the machine.

    Attributes:
        recipe: its name.
        planned: the bundle; None where it cannot be made.
        memory: memory of a run; None likewise.
        available: bytes of memory that the machine has for it; None where it is not known.
        longest_context: the longest context that fits.
        prediction: its speed; None where it is not known.
        unknown: why the speed is not known.
        refused: why it cannot be exported or does not fit.
    """

    recipe: str
    planned: Planned | None
    memory: Memory | None
    available: int | None
    longest_context: int
    prediction: Prediction | None
    unknown: str | None
    refused: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether it can be made and run."""
        return not self.refused

    @property
    def comfortable(self) -> bool:
        """Whether memory is left for other programs."""
        return self.fits and (
            self.memory is None or self.available is None or self.memory.total <= COMFORT * self.available
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the option for a JSON document."""
        planned, prediction = self.planned, self.prediction
        found = None
        if prediction is not None:
            ranges = {name: getattr(prediction, name) for name in ("prefill", "decode", "first_token")}
            found = {**vars(prediction), **{name: r and r.as_dict() for name, r in ranges.items()}}
        return {
            "recipe": self.recipe,
            "target": planned and planned.target,
            "ops": planned and planned.ops,
            "bundle_bytes": planned and disk_bytes(planned),
            "weights_bytes": planned and planned.weights_bytes,
            "memory": self.memory and self.memory.as_dict(),
            "memory_available": self.available,
            "longest_context": self.longest_context,
            "fits": self.fits,
            "comfortable": self.comfortable,
            "refused": list(self.refused),
            "prediction": found,
            "unknown": self.unknown,
        }


def context_of(subject: Subject, asked: int | None) -> int:
    """Return the context length to assess.

    Raises:
        EdgeLMError: the model's context is shorter than the one asked for.
    """
    assert subject.decoder is not None
    most = subject.decoder.context_length
    if asked is not None and asked > most:
        raise EdgeLMError(f"--context-length {asked} is more than the model's context of {most}")
    return min(DEFAULT_CONTEXT, most) if asked is None else asked


def planned_bundle(subject: Subject, recipe: Recipe, question: Question, scheme: SchemeOf | None = None) -> Planned:
    """Plan the bundle of a subject; of a bundle that exists the sizes are those of its manifest.

    Raises:
        ExportError: the target does not support what the recipe asks for.
    """
    decoder, manifest = subject.decoder, subject.manifest
    assert decoder is not None
    if manifest is not None:
        made = plan(
            decoder, recipe, name=manifest.model.name, target=manifest.target, ops=manifest.ops, dtype=manifest.dtype
        )
        return replace(made, tensors={one.name: one.size for one in manifest.tensors}, kv=manifest.graph.kv_dtype)
    known = scheme or recipe.for_model(decoder).match
    quantises = any(known(name) is not None for name in decoder.matrices)
    dtype = float_type("auto", subject.dtype, question.target, quantises=quantises)
    return plan(
        decoder, recipe, name=subject.name, target=question.target, ops=question.ops, dtype=dtype, scheme=scheme
    )


def assess(
    subject: Subject,
    recipe: Recipe,
    question: Question,
    *,
    scheme: SchemeOf | None = None,
    available: int | None = None,
    disk_free: int | None = None,
) -> Option:
    """Assess one recipe.

    Args:
        subject: the model; its decoder is known.
        recipe: how it is quantised.
        question: what is asked.
        scheme: the scheme of each tensor, for a checkpoint that is quantised already.
        available: bytes of memory of the machine; None for this machine's or the board's.
        disk_free: bytes free where the bundle is to be written; None where it is not known.
    """
    assert subject.decoder is not None
    board = question.board
    if available is None:
        available = board.available if board is not None else devices.describe().memory_available
    refused = [*subject.refused]
    try:
        planned = planned_bundle(subject, recipe, question, scheme)
    except ExportError as error:
        return Option(recipe.name, None, None, available, 0, None, None, (*refused, str(error)))
    refused += missing(subject.decoder, _CAPABILITIES[planned.ops])
    context = context_of(subject, question.context)
    needed = memory(planned, context, question.kv)
    longest = planned.info.context_length if available is None else longest_context(planned, available, question.kv)
    if available is not None and needed.total > available:
        left = f"a context of {longest:,} tokens would fit" if longest else "no context would fit"
        refused.append(
            f"memory: {format_size(needed.total)} are needed at a context of {context:,}, "
            f"{format_size(available)} are there: {left}"
        )
    if subject.kind != "bundle" and disk_free is not None and disk_bytes(planned) > disk_free:
        refused.append(f"disk: the bundle takes {format_size(disk_bytes(planned))}, {format_size(disk_free)} are free")
    prediction, unknown = _speed(planned, question)
    return Option(recipe.name, planned, needed, available, longest, prediction, unknown, tuple(refused))


def _speed(planned: Planned, question: Question) -> tuple[Prediction | None, str | None]:
    """Return the predicted speed, or why there is none."""
    limit = planned.info.context_length
    new = min(question.new_tokens, max(1, limit // 5))
    prompt = max(1, min(question.prompt_tokens, limit - new))
    try:
        if question.board is not None:
            return predict_for(planned, question.board, prompt_tokens=prompt, new_tokens=new, kv=question.kv), None
        if not question.seconds:
            return None, "not measured"
        if planned.target != "cpu":
            return None, "the kernels of GPUs are not timed before a bundle exists: run `edgelm bench` on it"
        return predict(
            planned,
            prompt_tokens=prompt,
            new_tokens=new,
            kv=question.kv,
            threads=question.threads,
            seconds=question.seconds,
        ), None
    except EdgeLMError as error:
        return None, str(error)


def recommended(options: Sequence[Option]) -> Option | None:
    """Return the first option that fits, which is the smallest: decoding is the faster the fewer bytes it reads."""
    return next((option for option in options if option.fits), None)
