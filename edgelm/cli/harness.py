"""`edgelm harness`: run lm-evaluation-harness on bundles."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import click

from edgelm.cli.common.help import verb


# `edgelm harness --help` is this help; `edgelm harness run --help` is the harness's.
@verb(
    example="edgelm harness --model edgelm --model_args bundle=olmoe --tasks arc_easy",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def harness(arguments: tuple[str, ...]) -> None:
    """Run tasks of lm-evaluation-harness on a bundle.

    ARGUMENTS are lm-evaluation-harness's own; `edgelm harness run --help` lists them. The model is called "edgelm".
    """
    from edgelm.cli.common.options import need_eval_extra

    need_eval_extra()
    check_bundle(arguments)
    from edgelm.evaluation.lm_harness import main

    main(arguments)


def check_bundle(arguments: Sequence[str]) -> None:
    """Check the bundle in the harness's arguments now: the harness itself opens it after a minute of loading tasks.

    Raises:
        click.UsageError: the model is "edgelm" and no bundle is named.
        BundleError: it is not a bundle.
    """
    from edgelm.bundle import Bundle

    if "edgelm" not in _values(arguments, "--model", "-M") or {"-h", "--help"} & set(arguments):
        return
    given = _values(arguments, "--model_args", "-a")
    named = [found[1] for text in given if (found := re.search(r'(?:^|[,{\s"])bundle"?\s*[=:]\s*"?([^,"}]+)', text))]
    if named:
        Bundle.open(Path(named[-1].strip()))
    elif not _values(arguments, "--config", "-C"):
        raise click.UsageError("--model edgelm needs a bundle: add --model_args bundle=DIR")


def _values(arguments: Sequence[str], *names: str) -> list[str]:
    """Return the values of the options with these names."""
    found: list[str] = []
    taking = False
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if argument.startswith("-"):
            taking = name in names
            found += [value] if taking and equals else []
        elif taking:
            found.append(argument)
    return found
