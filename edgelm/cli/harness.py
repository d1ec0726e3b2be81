"""`edgelm harness`: lm-evaluation-harness with bundles among its models."""

from __future__ import annotations

import click


# Only a first --help is this command's own: `edgelm harness run --help` is the harness's.
@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def harness(arguments: tuple[str, ...]) -> None:
    """Run lm-evaluation-harness: its own command line, with the model "edgelm".

    edgelm harness --model edgelm --model_args bundle=DIR --tasks arc_challenge --num_fewshot 25
    """
    from edgelm.cli.extras import need_eval_extra

    need_eval_extra()
    from edgelm.lm_harness import main

    main(arguments)
