"""`edgelm synth`: write a checkpoint with random weights."""

from __future__ import annotations

from pathlib import Path

import click

from edgelm.cli.common.help import option, verb
from edgelm.cli.common.options import Whole, json_option, need_export_extra, output_option, overwrite_option

# Listed here too, so that `edgelm synth --help` needs no torch.
NAMES = ("olmoe-1b-7b", "fox-1-1.6b", "llama-3.2-1b", "qwen3-0.6b", "qwen2.5-1.5b", "olmo-2-1b", "mistral-7b")


@verb(example="edgelm synth olmoe-1b-7b -o random-olmoe")
@click.argument("name", type=click.Choice(NAMES), metavar="NAME")
@output_option("Checkpoint folder to write.", required=True)
@option("--seed", type=Whole(min=0), default=0, help="Seed of the random weights: same seed, same bytes.")
@overwrite_option("a checkpoint that EdgeLM wrote,")
@json_option
def synth(name: str, out: Path, seed: int, overwrite: bool, as_json: bool) -> None:
    """Write a checkpoint with a published model's shapes and random weights.

    For benchmarking export, speed and memory without a download; the text that it generates is noise. NAME, with
    the size in GB: olmoe-1b-7b (13.8), fox-1-1.6b (3.3), llama-3.2-1b (2.5), qwen3-0.6b (1.2), qwen2.5-1.5b (3.1),
    olmo-2-1b (3.0), mistral-7b (14.5).
    """
    import json
    import time

    from edgelm.progress import Bars
    from edgelm.sizes import format_size

    need_export_extra()
    from edgelm.synth import synth as write

    start = time.monotonic()
    write(name, out, seed, Bars(), overwrite=overwrite)
    seconds = time.monotonic() - start
    total = sum(path.stat().st_size for path in out.iterdir())
    if as_json:
        document = {"checkpoint": str(out), "name": name, "seed": seed, "bytes": total, "seconds": round(seconds, 1)}
        click.echo(json.dumps(document))
    else:
        click.echo(f"{out}: {name}, seed {seed}, {format_size(total)} in {seconds:.0f} s")
