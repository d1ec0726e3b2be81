"""`edgelm doctor`: what EdgeLM can do on this machine; with a model, whether it fits and how fast it will be."""

from __future__ import annotations

from typing import Any

import click

from edgelm.bundle.kv_cache import KV_TYPES
from edgelm.cli.common.help import Group, option, verb
from edgelm.cli.common.options import RecipeName, Whole, json_option, threads_option, verbose_option

_OF_MODELS = (
    "board", "recipe", "target", "ops", "context_length", "kv", "prompt_tokens", "new_tokens", "threads",
)  # fmt: skip


@verb(example="edgelm doctor tensoropera/Fox-1-1.6B --for pi5-8gb")
@click.argument("model", required=False)
@option(
    "--for",
    "board",
    metavar="BOARD",
    help="Predict for a board in place of this machine, for example pi5-8gb, orin-nano-8gb, n100-16gb, or `list`.",
)
@option(
    "--recipe",
    metavar="NAME|FILE",
    type=RecipeName(),
    default_text="int4, and int8 to compare with",
    help="How to quantise: a preset or a .toml file.",
)
@option(
    "--target",
    type=click.Choice(["cpu", "cuda", "tensorrt"]),
    default_text="what the machine or board has",
    help="Kind of device.",
)
@option(
    "--ops",
    type=click.Choice(["native", "portable"]),
    default_text="native where they are installed",
    help="Operator set on a CPU.",
)
@option(
    "--context-length",
    type=Whole(min=1),
    default_text="4,096, or the model's",
    help="Tokens that the cache must have room for.",
)
@option("--kv", group=Group.RUNTIME, type=click.Choice(KV_TYPES), default_text="as exported", help="Type of the cache.")
@option("--prompt-tokens", type=Whole(min=1), default=512, help="Length of the prompt to predict for.")
@option("--new-tokens", type=Whole(min=1), default=128, help="Tokens generated after it.")
@threads_option()
@verbose_option("Without a model: also versions of packages and the GPU parts. With one: the time of each part.")
@json_option
def doctor(model: str | None, verbose: bool, as_json: bool, **settings: Any) -> None:
    """Show what EdgeLM can do here, or whether MODEL fits and how fast it will be.

    MODEL is a checkpoint folder, a hub id or a bundle. Of a checkpoint, only config.json and the headers of the weights
    are read; of a hub id, only small files are fetched. The speed is predicted from a measurement of two seconds.

    Exit code 1 if no runtime can be used here, or if MODEL does not fit or cannot be exported.
    """
    import json

    from edgelm.cli.common.options import was_given
    from edgelm.cli.common.output import echo

    if settings["board"] == "list":
        from edgelm.cli.preflight.model import board_list

        click.echo(board_list(as_json=as_json))
        return
    if model is None:
        from edgelm.cli.preflight.machine import examine, text

        given = was_given(*_OF_MODELS)
        if given:
            raise click.UsageError(f"{given[0]} needs a model: give a checkpoint folder, a hub id or a bundle")
        document = examine()
        click.echo(json.dumps(document) if as_json else text(document, verbose=verbose))
        if not any(runtime["usable"] for runtime in document["runtimes"].values()):
            raise click.exceptions.Exit(1)
        return
    from edgelm.cli.preflight.model import examine_model, report

    found = examine_model(model, **settings)
    if as_json:
        click.echo(json.dumps(found.as_dict()))
    else:
        echo(report(found, verbose=verbose))
    if not found.fits:
        raise click.exceptions.Exit(1)
