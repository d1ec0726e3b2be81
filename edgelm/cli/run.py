"""`edgelm run`: continue a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgelm.cli.options import BUNDLE, given, loading_options, sampling_options


@click.command()
@click.argument("bundle", type=BUNDLE)
@click.argument("prompt")
@click.option("--chat", "as_chat", is_flag=True, help="PROMPT is a message: apply the model's chat template.")
@click.option("--system", help="System message, with --chat.")
@sampling_options(temperature=0.0)
@loading_options
@click.option("--quiet", "-q", is_flag=True, help="No line about speed.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document when done, instead of streaming.")
def run(
    bundle: Path,
    prompt: str,
    as_chat: bool,
    system: str | None,
    runtime: str | None,
    threads: int | None,
    context_length: int | None,
    kv: str | None,
    weight_budget: int | None,
    quiet: bool,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Continue PROMPT with the model in BUNDLE. PROMPT "-" is read from standard input.

    The text streams to standard output, its speed goes to standard error. Ctrl-C stops.
    """
    import json
    import sys

    from edgelm.cli.options import generation_json, timings_line
    from edgelm.generate import load

    if system is not None and not as_chat:
        raise click.UsageError("--system needs --chat: without a chat template there is no system message")
    text = sys.stdin.read() if prompt == "-" else prompt
    options = given(**sampling)
    loading = {"threads": threads, "context_length": context_length, "kv": kv, "weight_budget": weight_budget}
    with load(bundle, runtime=runtime, chat=as_chat, **given(**loading)) as model:
        if as_chat:
            messages = [{"role": "user", "content": text}]
            if system is not None:
                messages.insert(0, {"role": "system", "content": system})
            stream = model.chat_stream(messages, **options)
        else:
            stream = model.stream(text, **options)
        try:
            for piece in stream:
                if not as_json:
                    click.echo(piece, nl=False)
        finally:
            generation = stream.generation
            if as_json:
                click.echo(json.dumps(generation_json(generation)))
            elif generation.text:
                click.echo()
            if not quiet:
                click.echo(timings_line(generation), err=True)
