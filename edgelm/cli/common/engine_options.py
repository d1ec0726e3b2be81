"""Options about TensorRT's engines, of `edgelm export` and `edgelm build`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

Command = Callable[..., Any]

ENGINE_PARAMETERS = ("sms", "engines", "linears", "attention", "max_batch", "chunk", "weight_streaming")
"""The parameters that are about `--target tensorrt` alone."""


def chosen_sms(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    """The numbers of --sm."""
    del context, parameter
    if text is None:
        return None
    parts = [part.strip().removeprefix("sm_") for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise click.BadParameter(f"{text!r} is no list of compute capabilities: write for example 86,89")
    return tuple(dict.fromkeys(int(part) for part in parts))


def build_options(command: Command) -> Command:
    """What an engine is built for."""
    for option in (
        click.option("--weight-streaming", is_flag=True, help="Let weights stay in host memory (run --weight-budget)."),
        click.option(
            "--chunk", default=512, show_default=True, type=click.IntRange(min=1), help="Tokens of a prefill step."
        ),
        click.option(
            "--max-batch", default=32, show_default=True, type=click.IntRange(min=1),
            help="Sequences that decode together, at most.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


def engine_options(command: Command) -> Command:
    """With --target tensorrt: whether engines are built, for what, and who computes what in them."""
    who = click.Choice(["engine", "plugin"])
    for option in (
        click.option(
            "--attention", default="plugin", show_default=True, type=who, help="Who computes attention in an engine."
        ),
        click.option(
            "--linears", default="engine", show_default=True, type=who,
            help="Who computes dense products in an engine, where TensorRT has them.",
        ),
        click.option(
            "--engines/--no-engines", "engines", default=None,
            help="With --target tensorrt: build engines now [if TensorRT is installed].",
        ),
    ):  # fmt: skip
        command = option(command)
    return build_options(command)
