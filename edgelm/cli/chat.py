"""`edgelm chat`: talk with a model in a terminal."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelm.cli.main import Terminated
from edgelm.cli.options import BUNDLE, given, loading_options, sampling_options

if TYPE_CHECKING:
    from edgelm.generate import LanguageModel

HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer"


@click.command()
@click.argument("bundle", type=BUNDLE)
@click.option("--system", help="System message.")
@sampling_options(temperature=0.7)
@loading_options
@click.option("--quiet", "-q", is_flag=True, help="No lines about speed.")
def chat(
    bundle: Path,
    system: str | None,
    runtime: str | None,
    threads: int | None,
    context_length: int | None,
    kv: str | None,
    weight_budget: int | None,
    quiet: bool,
    **sampling: Any,
) -> None:
    """Talk with the model in BUNDLE. /reset forgets the conversation, /exit leaves, Ctrl-C stops an answer."""
    from edgelm.template_sandbox import start_for

    start_for(bundle)  # meanwhile the rest is imported
    from edgelm.generate import load

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - line editing and history in input()
    loading = {"threads": threads, "context_length": context_length, "kv": kv, "weight_budget": weight_budget}
    with load(bundle, runtime=runtime, **given(**loading)) as model:
        start = [] if system is None else [{"role": "system", "content": system}]
        # A model without a template, or one that takes no system message, says so before the first question.
        model.render_chat([*start, {"role": "user", "content": "?"}])
        click.echo(HELP, err=True)
        converse(model, start, given(**sampling), quiet=quiet)


def converse(model: LanguageModel, start: list[dict[str, str]], options: dict[str, Any], *, quiet: bool) -> None:
    """Read messages until the input ends or /exit."""
    from edgelm.errors import ContextLengthError

    messages = list(start)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            click.echo()
            return
        except Terminated:
            raise
        except KeyboardInterrupt:
            click.echo(f"\n{HELP}", err=True)
            continue
        if line == "/exit":
            return
        if line == "/reset":
            messages = list(start)
        elif line.startswith("/"):
            click.echo(HELP, err=True)
        elif line:
            messages.append({"role": "user", "content": line})
            try:
                messages.append({"role": "assistant", "content": answer(model, messages, options, quiet=quiet)})
            except ContextLengthError as error:
                messages.pop()
                click.echo(f"{error}; /reset forgets the conversation", err=True)


def answer(model: LanguageModel, messages: list[dict[str, str]], options: dict[str, Any], *, quiet: bool) -> str:
    """Print the model's answer as it comes; Ctrl-C ends it, and what was said stays said."""
    from edgelm.cli.options import timings_line

    stream = model.chat_stream(messages, **options)
    try:
        for piece in stream:
            click.echo(piece, nl=False)
    except Terminated:
        raise
    except KeyboardInterrupt:
        stream.close()
    click.echo()
    if not quiet:
        click.echo(timings_line(stream.generation), err=True)
    return stream.generation.text
