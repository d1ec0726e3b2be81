"""Options that several verbs share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from edgelm.quant.calibration import CalibrationOptions

Command = TypeVar("Command", bound=Callable[..., Any])

BUNDLE = click.Path(path_type=Path)
THREADS = click.IntRange(1, 1024)
"""As `edgelm.runtimes.MAX_THREADS`, which would import numpy."""


class Number(click.FloatRange):
    """A number in a range; "nan" and "inf", which Python takes for numbers, are none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number."""
        found = super().convert(value, param, ctx)
        if not math.isfinite(found):
            self.fail(f"{value!r} is not a number.", param, ctx)
        return found


kv_option = click.option(
    "--kv",
    type=click.Choice(["float16", "float32", "int8", "fp8"]),
    help="Type of the cache [as exported: float16 unless the recipe says another; float32 for portable bundles].",
)


class Size(click.ParamType[int]):
    """Bytes, as "2GB" or "2GiB"."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number of bytes."""
        from edgelm.sizes import parse_size

        try:
            return value if isinstance(value, int) else parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


weight_budget_option = click.option(
    "--weight-budget",
    type=Size(),
    metavar="SIZE",
    help="Weights that may lie in the GPU's memory, for a TensorRT engine that streams them, for example 2GB [all].",
)


def loading_options(command: Command) -> Command:
    """Which runtime, how many threads, how much context, what cache, how many weights on a GPU."""
    for option in (
        weight_budget_option,
        kv_option,
        click.option("--context-length", type=click.IntRange(min=1), help="Positions to allocate [model's, <= 4096]."),
        click.option("--threads", type=THREADS, help="Threads [physical cores allowed]."),
        click.option("--runtime", metavar="NAME", help="Runtime [the best one here]; `edgelm doctor` lists them."),
    ):
        command = option(command)
    return command


def sampling_options(temperature: float) -> Callable[[Command], Command]:
    """How tokens are chosen and when to stop; `temperature` is the verb's default."""

    def decorate(command: Command) -> Command:
        for option in (
            click.option("--stop", multiple=True, metavar="TEXT", help="Stop before this text; may be repeated."),
            click.option("--seed", type=click.IntRange(0, 2**64 - 1), help="Make sampling repeatable."),
            click.option(
                "--repetition-penalty",
                type=Number(min=0, min_open=True),
                default=1.0,
                show_default=True,
                help="Above 1 avoids tokens that were there already.",
            ),
            click.option("--min-p", type=Number(0, 1), help="Only tokens this fraction as likely as the best."),
            click.option("--top-p", type=Number(0, 1, min_open=True), help="Only the most likely that reach this."),
            click.option("--top-k", type=click.IntRange(min=0), help="Only the K most likely tokens; 0: all."),
            click.option(
                "--temperature",
                "-t",
                type=Number(min=0),
                default=temperature,
                show_default=True,
                help="0: always the most likely token.",
            ),
            click.option(
                "--max-tokens",
                "-n",
                type=click.IntRange(min=1),
                default=256,
                show_default=True,
                help="Tokens to generate at most.",
            ),
        ):
            command = option(command)
        return command

    return decorate


def calibration_options(command: Command) -> Command:
    """Whether to choose codes by a text, which, and when an expert has seen enough of it."""
    for option in (
        click.option(
            "--require-coverage", is_flag=True, help="Fail where an expert sees too few tokens to be calibrated."
        ),
        click.option(
            "--min-expert-tokens",
            type=click.IntRange(min=0),
            help="Tokens that an expert needs to be calibrated [as many as its inputs have values].",
        ),
        click.option("--sample-length", type=click.IntRange(min=2), help="Tokens of a sample [512]."),
        click.option("--samples", type=click.IntRange(min=1), help="Samples of the text [128]."),
        click.option(
            "--smooth",
            type=click.Choice(["activations", "weights"]),
            help="Scale float weights first, the model's function kept: activations where these are int8 or fp8, "
            "weights where they are float.",
        ),
        click.option(
            "--calibration",
            metavar="TEXT",
            help="Choose codes by what the model computes for a text: a file, a folder, or builtin.",
        ),
    ):
        command = option(command)
    return command


def chosen_calibration(
    calibration: str | None,
    samples: int | None,
    sample_length: int | None,
    min_expert_tokens: int | None,
    require_coverage: bool,
    smooth: str | None,
) -> CalibrationOptions | None:
    """What `calibration_options` came to; None without --calibration.

    Raises:
        click.UsageError: another of them was given without it.
    """
    if calibration is None:
        if require_coverage or any(value is not None for value in (samples, sample_length, min_expert_tokens, smooth)):
            raise click.UsageError(
                "--samples, --sample-length, --min-expert-tokens, --require-coverage and --smooth go with --calibration"
            )
        return None
    from edgelm.cli.extras import need_export_extra

    need_export_extra()
    from edgelm.quant.calibration import CalibrationOptions, CoverageOptions

    return CalibrationOptions(
        text=calibration,
        coverage=CoverageOptions(min_tokens=min_expert_tokens),
        require_coverage=require_coverage,
        smoothing=smooth,
        **given(samples=samples, length=sample_length),
    )


def given(**options: Any) -> dict[str, Any]:
    """Drop the options that were left out, so that the library's defaults hold."""
    return {name: value for name, value in options.items() if value is not None}


def timings_line(generation: Any) -> str:
    """One line about what a generation took."""
    timings = generation.timings
    parts = [f"{timings.prompt_tokens} prompt tokens"]
    if timings.reused_tokens:
        parts[0] += f" ({timings.reused_tokens} cached)"
    if timings.prefill_tokens_per_second:
        parts[0] += f" at {timings.prefill_tokens_per_second:.1f}/s"
    if generation.tokens:
        parts.append(f"first after {timings.time_to_first_token:.2f} s")
        speed = f" at {timings.decode_tokens_per_second:.1f} tokens/s" if timings.decoded_tokens else ""
        parts.append(f"{len(generation.tokens)} generated{speed}")
    parts.append(f"ended by {generation.stop_reason}")
    return "[" + ", ".join(parts) + "]"


def generation_json(generation: Any) -> dict[str, Any]:
    """A generation as a JSON document."""
    timings = generation.timings
    return {
        "text": generation.text,
        "tokens": list(generation.tokens),
        "stop_reason": generation.stop_reason,
        "timings": {
            **dataclasses.asdict(timings),
            "prefill_tokens_per_second": timings.prefill_tokens_per_second,
            "decode_tokens_per_second": timings.decode_tokens_per_second,
        },
    }
