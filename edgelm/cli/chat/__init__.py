"""`edgelm chat`: talk with a model in a terminal."""

from __future__ import annotations

import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import click

from edgelm.cli.common.options import BUNDLE, loading_options, sampling_options


@click.command()
@click.argument("bundle", type=BUNDLE)
@click.option("--system", help="System message.")
@click.option("--no-trim", is_flag=True, help="Refuse a message that the context has no room for; drop no old turns.")
@click.option("--no-history", is_flag=True, help="Do not keep what is typed for the arrow keys of later sessions.")
@sampling_options(temperature=0.7)
@loading_options
@click.option("--quiet", "-q", is_flag=True, help="No lines about speed.")
def chat(
    bundle: Path,
    system: str | None,
    no_trim: bool,
    no_history: bool,
    loading: dict[str, Any],
    sampling: dict[str, Any],
    quiet: bool,
) -> None:
    """Talk with the model in BUNDLE.

    When the context is full the oldest turns are dropped. /help lists the commands. A line is a message, and so is a
    paste, and what stands between two \"\"\". Ctrl-C stops an answer, Ctrl-D leaves. Messages can be piped in: then
    only answers are printed, and the exit code is 1 if one failed.
    """
    from edgelm.tokenization.template_sandbox import start_for

    start_for(bundle)  # meanwhile the rest is imported
    from edgelm.cli.chat.input import History, piped_entries, typed_entries
    from edgelm.cli.chat.session import WELCOME, Screen, Session
    from edgelm.generation.language_model import load

    screen = Screen()
    with load(bundle, **loading) as model:
        session = Session(model, screen, sampling, system=system, trim=not no_trim, quiet=quiet)
        terminal = sys.stdin is not None and sys.stdin.isatty()
        if terminal:
            screen.info(WELCOME)
            history = None if no_history else History.default()
            read = typed_entries(history, lambda prompt: screen.style(prompt, fg="cyan", bold=True))
        else:
            read = piped_entries(BytesIO() if sys.stdin is None else sys.stdin.buffer)
        session.run(read, terminal=terminal)
        if session.failed and not terminal:
            click.get_current_context().exit(1)
